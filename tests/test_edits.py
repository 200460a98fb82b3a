"""Every edit does its formula, to its tokens and its slice alone, and edits compose in the order they stand in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interp import edits
from interp.activations import Tokens
from interp.edits import Edit, EditError, Where
from interp.model import Model
from interp.scope import Scope
from interp.sites import KINDS, Site
from interp.zoo.tiny import tiny

SITE = "resid_post[1]"
IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def m() -> Model:
    return Model(tiny("llama"), name="llama")


@pytest.fixture(scope="module")
def moe() -> Model:
    return Model(tiny("olmoe"), name="olmoe")


def read(m: Model, site: str = SITE, ids: Any = IDS, *changes: Any) -> Tensor:
    with m.intervene(*changes):
        return m.capture(ids, site)[site]


def padded(side: str) -> Tokens:
    """Row 0 is four tokens shorter than row 1."""
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[0, 4:] = False
    return Tokens(IDS, mask).padded(side)


# -- what each does --------------------------------------------------------------------------------------------
DRAW = torch.Generator().manual_seed(3)
V, W, A = (torch.randn(*shape, generator=DRAW) for shape in ((32,), (32,), (32, 32)))
U = torch.linalg.qr(torch.randn(32, 3, generator=DRAW))[0].T  # three orthonormal directions
PER_TOKEN = torch.randn(2, 8, 32, generator=DRAW)
FORMULAS: dict[str, tuple[Edit, Callable[[Tensor], Tensor]]] = {
    "affine, number": (edits.affine(SITE, 0.5, 2.0), lambda h: 0.5 * h + 2),
    "affine, vectors": (edits.affine(SITE, V, W), lambda h: V * h + W),
    "affine, matrix": (edits.affine(SITE, A, W), lambda h: h @ A.T + W),
    "affine, only b": (edits.affine(SITE, b=W), lambda h: h + W),
    "add, vector": (edits.add(SITE, V), lambda h: h + V),
    "add, number": (edits.add(SITE, 1.5), lambda h: h + 1.5),
    "add, a vector per token": (edits.add(SITE, PER_TOKEN), lambda h: h + PER_TOKEN),
    "scale, number": (edits.scale(SITE, -3.0), lambda h: -3 * h),
    "scale, vector": (edits.scale(SITE, V), lambda h: V * h),
    "zero": (edits.zero(SITE), torch.zeros_like),
    "mean": (edits.mean(SITE, V), lambda h: V.expand_as(h)),
    "replace, number": (edits.replace(SITE, 7.0), lambda h: torch.full_like(h, 7)),
    "replace, vector": (edits.replace(SITE, V), lambda h: V.expand_as(h)),
    "replace, per token": (edits.replace(SITE, PER_TOKEN), lambda h: PER_TOKEN),
    "replace, per token of one row": (edits.replace(SITE, PER_TOKEN[:1]), lambda h: PER_TOKEN[:1].expand_as(h)),
    "project out, one": (edits.project_out(SITE, V), lambda h: h - (h @ V)[..., None] * V / V.dot(V)),
    "project out, several": (edits.project_out(SITE, A[:3]), lambda h: h - h @ torch.linalg.pinv(A[:3]) @ A[:3]),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_edit_does_its_formula(m: Model, name: str) -> None:
    edit, formula = FORMULAS[name]
    plain = read(m)
    torch.testing.assert_close(read(m, SITE, IDS, edit), formula(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_edit_changes_the_tokens_of_its_scope_and_no_other_bit(m: Model, name: str) -> None:
    edit, formula = FORMULAS[name]
    mask = torch.zeros_like(IDS, dtype=torch.bool)
    mask[0, 2] = mask[1, 5] = mask[1, 6] = True
    plain, changed = read(m), read(m, SITE, IDS, edit.within(mask))
    assert torch.equal(changed[~mask], plain[~mask])
    torch.testing.assert_close(changed[mask], formula(plain)[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("directions", [1, 3])
def test_projecting_out_leaves_nothing_of_the_directions_and_is_done_once(m: Model, directions: int) -> None:
    chosen = U[:directions] * torch.tensor([[3.0], [0.2], [7.0]])[:directions]  # their lengths mean nothing
    once = edits.project_out(SITE, chosen)
    left = read(m, SITE, IDS, once)
    assert float((left @ U[:directions].T).abs().max()) < 1e-5
    torch.testing.assert_close(read(m, SITE, IDS, once, once), left, rtol=0, atol=2e-6)
    torch.testing.assert_close(read(m) - left, (read(m) @ U[:directions].T) @ U[:directions], rtol=0, atol=1e-5)


def test_projecting_out_directions_that_depend_on_each_other_takes_out_their_span_only(m: Model) -> None:
    one = read(m, SITE, IDS, edits.project_out(SITE, V))
    same = read(m, SITE, IDS, edits.project_out(SITE, torch.stack([V, -2 * V, 1e-4 * V])))
    torch.testing.assert_close(same, one, rtol=0, atol=2e-6)
    everything = read(m, SITE, IDS, edits.project_out(SITE, torch.randn(40, 32)))
    assert float(everything.abs().max()) < 1e-5


def test_a_direction_of_nothing_is_refused() -> None:
    for bad in (torch.zeros(32), torch.full((32,), torch.nan), torch.stack([V, torch.zeros(32)])):
        with pytest.raises(EditError, match=r"project_out at resid_post\[1\]: a direction must be finite and not zero"):
            edits.project_out(SITE, bad)


# -- noise -----------------------------------------------------------------------------------------------------
def drawn(m: Model, ids: Any, seed: int = 0, site: str = SITE) -> Tensor:
    """The noise itself, in units of its standard deviation."""
    return (read(m, site, ids, edits.noise(site, 2.0, seed)) - read(m, site, ids)) / 2


def test_noise_is_standard_normal_and_differs_between_rows_positions_sites_and_seeds(m: Model) -> None:
    ids = IDS[:1].expand(4, -1)
    noise = drawn(m, ids)
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1
    flat = torch.cat(
        [noise.flatten(0, 1), drawn(m, ids, seed=1).flatten(0, 1), drawn(m, ids, 0, "resid_post[0]").flatten(0, 1)]
    )
    similar = torch.corrcoef(flat) - torch.eye(len(flat))
    assert float(similar.abs().max()) < 0.8


def test_noise_belongs_to_its_row_and_position_whatever_the_batch(m: Model) -> None:
    torch.testing.assert_close(drawn(m, IDS[:1])[0], drawn(m, IDS)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn(m, IDS[:, :5]), drawn(m, IDS)[:, :5], rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn(m, OTHER), drawn(m, IDS), rtol=0, atol=1e-5)
    right, left = padded("right"), padded("left")
    torch.testing.assert_close(drawn(m, left)[left.mask], drawn(m, right)[right.mask], rtol=0, atol=1e-5)


def test_noise_is_the_same_with_and_without_a_cache(m: Model) -> None:
    texts = []
    for use_cache in (True, False):
        with m.intervene(edits.noise(SITE, 0.5, seed=3)):
            texts.append(m.generate(IDS, max_new_tokens=6, eos_token_id=None, use_cache=use_cache).new_ids)
    assert torch.equal(*texts)


def test_noise_past_its_block_goes_on(m: Model) -> None:
    long = torch.randint(3, 90, (1, 128))
    assert edits.Noise.block <= 128
    small = edits.Noise(1.0)
    object.__setattr__(small, "block", 32)
    with m.intervene(Edit(SITE, small)):
        assert m.capture(long, SITE)[SITE][:, 40:].isfinite().all()


# -- replaying -------------------------------------------------------------------------------------------------
def test_freezing_a_layer_gives_back_the_run_it_was_taken_from(m: Model) -> None:
    clean = m.capture(IDS, ["resid_post[*]", "z[*]", "pattern[*]"], logits=True)
    assert clean.logits is not None
    for site in ("resid_post[1]", "resid_post[-1]", "resid_post[*]"):
        with m.intervene(edits.freeze(site, clean)):
            torch.testing.assert_close(m(OTHER), clean.logits, rtol=0, atol=1e-6)
    for site in ("z[1]", "pattern[1]", "z[1, head=2]", "pattern[1, head=2]"):
        assert torch.equal(read(m, site, OTHER, edits.freeze(site, clean)), clean[site])


def test_freezing_goes_by_token_whatever_the_padding_on_either_side(m: Model) -> None:
    wanted = m(padded("right"))[padded("right").mask]
    for given_side in ("right", "left"):
        clean = m.capture(padded(given_side), [SITE])
        for side in ("right", "left"):
            tokens = padded(side)
            with m.intervene(edits.freeze(SITE, clean)):
                got = m(Tokens(OTHER.where(tokens.mask, 0), tokens.mask))
            torch.testing.assert_close(got[tokens.mask], wanted, rtol=0, atol=2e-5)


def test_a_value_per_token_goes_by_token_in_every_edit(m: Model) -> None:
    value = torch.randn(2, 8, 32)
    for make in (edits.add, edits.replace, edits.scale, edits.mean):
        right, left = padded("right"), padded("left")
        a, b = (read(m, SITE, t, make(SITE, value)) for t in (right, left))
        torch.testing.assert_close(b[left.mask], a[right.mask], rtol=0, atol=2e-5)


def test_freezing_replays_the_prompt_and_leaves_what_is_generated(m: Model) -> None:
    clean = m.capture(IDS, SITE)
    made = []
    for use_cache in (True, False):
        with m.intervene(edits.freeze(SITE, clean)) as run:
            made.append(m.generate(OTHER, max_new_tokens=4, eos_token_id=None, use_cache=use_cache).new_ids)
        assert run.trace().position.max() == 7
    assert torch.equal(*made)
    message = r"there are values for 8 tokens, and the edit reaches token 8; limit it with scope='prompt'"
    with pytest.raises(EditError, match=message), m.intervene(edits.freeze(SITE, clean, scope="all")):
        m.generate(OTHER, max_new_tokens=4, eos_token_id=None)


def test_freezing_experts_and_their_choice_gives_back_the_block(moe: Model) -> None:
    sites = ["expert_ids[1]", "expert_weight[1]", "expert_out[1]", "mlp_out[1]"]
    clean = moe.capture(IDS, sites)
    frozen = [edits.freeze(s, clean) for s in sites[:3]]
    torch.testing.assert_close(read(moe, "mlp_out[1]", OTHER, *frozen), clean["mlp_out[1]"], rtol=0, atol=1e-6)


def test_what_cannot_be_replayed_is_refused_when_the_edit_is_made(m: Model, moe: Model) -> None:
    clean = m.capture(IDS, "resid_post[0]")
    with pytest.raises(KeyError, match=r"resid_post\[1\] was not captured; there are resid_post\[0\]"):
        edits.freeze("resid_post[1]", clean)
    with pytest.raises(EditError, match="one expert's rows belong to no fixed tokens; freeze expert_out of the whole"):
        edits.freeze("expert_out[1, expert=3]", moe.capture(IDS, "expert_out[1]"))
    left = m.capture(padded("left"), "pattern[1]")
    with pytest.raises(EditError, match="padded on the left, so their keys have other columns; capture them padded on"):
        edits.freeze("pattern[1]", left)


def test_a_plain_mapping_can_be_replayed(m: Model) -> None:
    kept = {"resid_post[1]": PER_TOKEN, "resid_post[2]": 2 * PER_TOKEN}
    with m.intervene(edits.freeze("resid_post[1:]", kept)):
        acts = m.capture(IDS, "resid_post[1:]")
    assert torch.equal(acts["resid_post[1]"], PER_TOKEN)
    assert torch.equal(acts["resid_post[2]"], 2 * PER_TOKEN)


# -- gates -----------------------------------------------------------------------------------------------------
def test_a_gate_blends_per_token_or_per_row(m: Model) -> None:
    plain = read(m)
    for g in (torch.rand(2, 8), torch.rand(2)):
        gated = edits.replace(SITE, V).gated(lambda h, where, g=g: g)
        share = g[..., None] if g.dim() == 2 else g[:, None, None]
        torch.testing.assert_close(read(m, SITE, IDS, gated), plain + share * (V - plain), rtol=0, atol=1e-5)


def test_a_gate_sees_the_activation_and_its_tokens(m: Model) -> None:
    seen: list[Where] = []
    plain = read(m)
    limit = plain[:, 2:5].norm(dim=-1).median()

    def gate(h: Tensor, where: Where) -> Tensor:
        seen.append(where)
        return (h.norm(dim=-1) > limit).float()

    closed = read(m, SITE, IDS, edits.zero(SITE, scope="window(2, 5)").gated(gate))
    hit = (plain.norm(dim=-1) > limit) & torch.tensor([2 <= p < 5 for p in range(8)])
    assert 0 < int(hit.sum()) < 6, "the gate should open for some of the tokens"
    assert torch.equal(closed, plain.masked_fill(hit[..., None], 0))
    assert (seen[0].site, seen[0].mask.tolist()) == (SITE, [[2 <= p < 5 for p in range(8)]] * 2)
    assert seen[0].position.tolist() == [list(range(8))] * 2


# -- composition -----------------------------------------------------------------------------------------------
def test_edits_at_one_site_act_from_left_to_right_and_outer_contexts_first(m: Model) -> None:
    plain = read(m)
    add, double = edits.add(SITE, V), edits.scale(SITE, 2.0)
    torch.testing.assert_close(read(m, SITE, IDS, add, double), 2 * (plain + V))
    torch.testing.assert_close(read(m, SITE, IDS, double, add), 2 * plain + V)
    torch.testing.assert_close(read(m, SITE, IDS, [double, [add]], double), 2 * (2 * plain + V))
    with m.intervene(add):
        torch.testing.assert_close(read(m, SITE, IDS, double), 2 * (plain + V))
        with m.intervene(double), m.intervene(add, double):
            torch.testing.assert_close(read(m), 2 * (2 * (plain + V) + V))
        torch.testing.assert_close(read(m), plain + V)


def test_an_indexed_edit_and_one_of_the_whole_site_keep_their_order(m: Model) -> None:
    one, whole = edits.replace("z[1, head=2]", 3.0), edits.scale("z[1]", 2.0)
    assert float(read(m, "z[1, head=2]", IDS, one, whole).mean()) == 6
    assert float(read(m, "z[1, head=2]", IDS, whole, one).mean()) == 3


def test_whatever_can_make_edits_is_an_edit(m: Model) -> None:
    class Steering:
        def as_edits(self, model: Model) -> list[Any]:
            assert model is m
            return [edits.add("resid_post[*]", V), Half()]

    class Half:
        def as_edits(self, model: Model) -> Edit:
            return [edits.scale(SITE, 0.5)]  # type: ignore[return-value]

    with m.intervene(Steering()):
        got = m(IDS)
    with m.intervene(edits.add("resid_post[*]", V), edits.scale(SITE, 0.5)):
        assert torch.equal(m(IDS), got)
    message = r"intervene: expected Edits \(interp.edits.zero\(...\), ...\), got Tensor"
    with pytest.raises(TypeError, match=message), m.intervene(V):
        pass


# -- slices ----------------------------------------------------------------------------------------------------
SLICES = [
    ("llama", "z[1, head=2]"), ("llama", "q[1, head=0]"), ("llama", "k[1, head=1]"), ("llama", "v[1, head=1, dim=3]"),
    ("llama", "pattern[1, head=3]"), ("llama", "mlp_hidden[1, neuron=17]"), ("llama", "resid_pre[1, dim=5]"),
    ("llama", "embed[dim=0]"), ("llama", "logits[token=9]"), ("llama", "resid_mid[1, dim=31]"),
    ("olmoe", "router_logits[1, expert=3]"), ("olmoe", "expert_weight[1, slot=1]"), ("olmoe", "expert_out[1, slot=0]"),
    ("olmoe", "expert_hidden[1, slot=0, neuron=4]"), ("olmoe", "expert_out[1, expert=3, dim=2]"),
    ("olmoe", "expert_out[1, expert=3]"), ("olmoe", "expert_hidden[1, expert=3, neuron=4]"),
    ("olmoe", "expert_weight[1, expert=3]"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "site"), SLICES)
def test_an_edit_of_a_slice_changes_no_other_bit(m: Model, moe: Model, family: str, site: str) -> None:
    model = m if family == "llama" else moe
    tokens = padded("left")
    base = Site.parse(site).base
    before = model.capture(tokens, str(base))
    with model.intervene(edits.add(site, 1.0, scope="window(0, 3)")):
        after = model.capture(tokens, str(base))
    changed = after[base] != before[base]
    hit = torch.ones_like(changed)
    for key, value in Site.parse(site).index:
        axis = KINDS[base.name].axes.index(KINDS[base.name].index[key])
        view = [1] * changed.dim()
        if key == "expert" and base.kind.routed:
            chosen = before.experts(1).ids == value
            hit &= chosen.reshape(*chosen.shape, *[1] * (changed.dim() - 3))
        else:
            view[axis] = -1
            hit &= (torch.arange(changed.shape[axis]) == value).reshape(view)
    window = (tokens.position < 3) & tokens.mask
    view = [1] * changed.dim()
    view[0], view[base.kind.pos_axis] = window.shape
    hit &= window.reshape(view)
    assert torch.equal(changed, hit)
    assert bool(hit.any())


# -- bad input -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edits.replace(SITE, torch.randn(31)), r"the edit's tensor is \[31\], and the activation is \[2, 8, 32\]; give "
         r"\[32\] for all tokens alike, or \[2, 8, 32\] for one value per token"),
        (edits.replace(SITE, torch.randn(8, 32)), r"the edit's tensor is \[8, 32\]"),
        (edits.replace(SITE, torch.randn(2, 8, 31)), r"a value per token must be \[2, 8, 32\] here, got \[2, 8, 31\]"),
        (edits.replace(SITE, torch.randn(3, 8, 32)), r"a value per token must be \[2, 8, 32\] here, got \[3, 8, 32\]"),
        (edits.replace(SITE, torch.randn(2, 5, 32)), r"there are values for 5 tokens, and the edit reaches token 7"),
        (edits.replace(SITE, torch.randn(2, 8, 32).double()), r"the value is torch.float64 on cpu, the model computes "
         r"torch.float32 on cpu; convert it with .to\('cpu', torch.float32\)"),
        (edits.replace(SITE, torch.ones(32, dtype=torch.long)), r"the edit's tensor is torch.int64; give floating"),
        (edits.replace(SITE, torch.empty(2, 8, 32, device="meta")), r"the value is torch.float32 on meta, the model"),
        (edits.replace(SITE, torch.empty(32, device="meta")), r"on the meta device, which holds no values"),
        (edits.affine(SITE, torch.randn(16, 32)), r"the matrix A is \[16, 32\]; it must be square, of size 32"),
        (edits.project_out(SITE, torch.randn(16)), r"the edit's tensor is \[1, 16\].*its last axis must be 32"),
        (Edit(SITE, lambda h, where: h[..., :3], name="cut"), r"the edit gave \[2, 8, 3\] torch.float32 on cpu; "
         r"the site holds \[2, 8, 32\]"),
        (Edit(SITE, lambda h, where: h.double()), r"the edit gave \[2, 8, 32\] torch.float64"),
        (Edit(SITE, lambda h, where: h.to("meta")), r"float32 on meta; the site holds"),
        (edits.noise("pattern[1]", 1.0), r"pattern\[1\]: noise is defined for sites with axes \[batch, pos, ...\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_site_and_the_shapes(m: Model, edit: Edit, message: str) -> None:
    with pytest.raises(EditError, match=message), m.intervene(edit):
        m(IDS)


def test_the_whole_message_begins_with_the_site(m: Model) -> None:
    with pytest.raises(EditError, match=r"^resid_post\[1\]: "), m.intervene(edits.add("resid_post[-2]", torch.ones(3))):
        m(IDS)


def test_an_edit_says_what_it_is() -> None:
    assert repr(edits.zero("z[5, head=3]", scope="last")) == "Edit(zero at z[5, head=3], scope='last')"
    assert repr(edits.add(Site("resid_post", 1), 1.0, name="steer")) == "Edit(steer at resid_post[1], scope='all')"
    assert "gated" in repr(edits.zero("embed").gated(lambda h, w: h[..., 0]))
    assert edits.zero("embed", scope=Scope.last()).within("all").scope.text == "all"
