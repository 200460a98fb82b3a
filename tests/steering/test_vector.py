"""One form for all methods: arithmetic, order, scopes, files, refusals."""

from __future__ import annotations

import pytest
import torch

import interp
import steering
from interp.edits import Where
from interp.sites import SiteError
from steering import SteeringError, SteeringMap, SteeringVector
from steering.maps import Affine, LowRank, Map, PerToken, Shift, projection


@pytest.fixture(scope="module")
def m():
    return interp.load("tiny:llama")


@pytest.fixture
def v(m):
    return SteeringVector.of(m, {"resid_post[1]": torch.randn(32)}, method="hand")


@pytest.fixture
def w(m):
    return SteeringVector.of(m, {"resid_post[1]": torch.randn(32), "resid_post[2]": torch.randn(32)})


IDS = torch.arange(3, 15).view(2, 6)


def logits(m, *edits):
    with m.intervene(*edits):
        return m(IDS)


# -- what it does ----------------------------------------------------------------------------------------------
def test_adds_its_vector_to_exactly_the_tokens_of_its_scope(m, v):
    with m.intervene(v * 2.0):
        after = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    before = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    assert torch.equal(after[:, :-1], before[:, :-1])
    torch.testing.assert_close(after[:, -1], before[:, -1] + 2 * v.vector)


def test_strength_nought_changes_no_bit(m, v):
    assert torch.equal(logits(m, v * 0), m(IDS))


def test_cached_and_uncached_batched_and_single_generation_agree(m, v):
    prompts = [[3, 4, 5, 6, 7], [8, 9, 10]]
    with m.intervene(v * 3.0) as cached:
        a = m.generate(prompts, max_new_tokens=6)
    with m.intervene(v * 3.0) as uncached:
        b = m.generate(prompts, max_new_tokens=6, use_cache=False)
    assert torch.equal(a.new_ids, b.new_ids)
    assert cached.trace().equals(uncached.trace())
    assert cached.trace().groupby("batch").position.min().tolist() == [4, 2]
    with m.intervene(v * 3.0):
        singles = [m.generate([p], max_new_tokens=6).new_ids[0] for p in prompts]
    assert torch.equal(torch.stack(singles), a.new_ids)
    assert not torch.equal(m.generate(prompts, max_new_tokens=6).new_ids, a.new_ids)


# -- arithmetic ------------------------------------------------------------------------------------------------
def test_sum_acts_as_both_together(m, v, w):
    torch.testing.assert_close(logits(m, v + w), logits(m, v, w))
    torch.testing.assert_close(logits(m, v - v + w), logits(m, w))
    assert (v + w).sites == ["resid_post[1]", "resid_post[2]"]


def test_multiples_negation_and_norms(v, w):
    torch.testing.assert_close((-(v * 4) / 2).vector, -2 * v.vector)
    torch.testing.assert_close((3 * v).vector, v.vector * 3)
    assert v.unit().norm == pytest.approx(1)
    assert v.cosine(-v) == pytest.approx(-1)
    assert v.cosine(w) == pytest.approx(float(torch.cosine_similarity(v.vector, w.vectors["resid_post[1]"], dim=0)))
    assert [x.norm for x in steering.equalise([v, v * 3])] == pytest.approx([2 * v.norm] * 2)


def test_sums_of_different_scopes_models_or_gates_are_refused(m, v):
    with pytest.raises(SteeringError, match=r"different scopes .*'all'.*within"):
        v + v.within("all")
    with pytest.raises(SteeringError, match="different gates"):
        v + v.gated(lambda h, where: torch.ones(len(h)))
    other = interp.load("tiny:llama", seed=1)
    with pytest.raises(SteeringError, match="only what belongs to one model"):
        v + SteeringVector.of(other, {"resid_post[1]": v.vector})


def test_order_of_composition_is_the_stated_one(m, v):
    scale = SteeringMap.of(m, {"resid_post[1]": Affine(torch.full((32,), 2.0))}, method="double")
    h = m.capture(IDS, "resid_post[1]")["resid_post[1]"][:, -1]
    for both, want in ((v.then(scale), 2 * (h + v.vector)), (scale.then(v), 2 * h + v.vector)):
        with m.intervene(both):
            torch.testing.assert_close(m.capture(IDS, "resid_post[1]")["resid_post[1]"][:, -1], want)


# -- maps ------------------------------------------------------------------------------------------------------
def maps(d: int = 6) -> list[Map]:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(d, d, generator=g), torch.randn(d, generator=g)
    return [
        Shift(b), Affine(a, b), Affine(a), Affine(b, b), LowRank(a[:, :2], a[:2], b), LowRank(a[:, :1], a[:1]),
        projection(a[:2]),
    ]  # fmt: skip


@pytest.mark.parametrize("map_", maps(), ids=lambda x: x.kind)
@pytest.mark.parametrize("k", [0.0, 1.0, 0.5, -2.0])
def test_strength_and_affine_form_agree_with_the_call(map_, k):
    h = torch.randn(2, 3, 6)
    where = Where("resid_post[0]", torch.arange(3).expand(2, 3), torch.ones(2, 3, dtype=torch.bool))
    full, strong = map_(h, where), map_.scaled(k)
    torch.testing.assert_close(strong(h, where), h + k * (full - h))
    a, b = strong.affine()
    torch.testing.assert_close((h if a is None else h @ a.T) + (0 if b is None else b), strong(h, where))
    torch.testing.assert_close(strong.ready(h.device, torch.float64)(h.double(), where).float(), strong(h, where))


def test_projection_removes_the_span_even_of_dependent_directions():
    d = torch.randn(2, 8)
    u = projection(torch.stack([d[0], d[1], d[0] + d[1]]))
    assert u.right.shape == (2, 8)
    h = u(torch.randn(1, 4, 8), None)
    assert float((h @ d.T).abs().max()) < 1e-5


# -- files -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("map_", [*maps(32), PerToken(torch.ones(2, 32))], ids=lambda x: x.kind)
def test_saved_and_loaded_it_does_the_same(m, tmp_path, map_):
    made = SteeringMap.of(m, {"resid_post[1]": map_}, scope="window(0, 4) & ~last", record={"n": 3}).only(1) * 0.7
    path = made.save(tmp_path / "x", intended_use="tests")
    back = steering.load(path, m)
    assert torch.equal(logits(m, back), logits(m, made))
    assert (back.scope.text, back.record, back.method) == (made.scope.text, {"n": 3}, "by hand")
    card = interp.cards.Card.load(path)
    assert card.fields["model_hash"] == m.fingerprint
    assert card.fields["intended_use"] == "tests"


def test_a_vector_comes_back_as_a_vector(m, v, tmp_path):
    back = SteeringMap.load((v * 2).save(tmp_path / "v.safetensors"))
    assert isinstance(back, SteeringVector)
    torch.testing.assert_close(back.vector, 2 * v.vector)


def test_what_a_file_cannot_hold_is_refused(m, v, tmp_path):
    with pytest.raises(SteeringError, match="belongs to one batch"):
        v.within(torch.ones(2, 6, dtype=torch.bool)).save(tmp_path / "v")
    with pytest.raises(SteeringError, match="cannot be saved"):
        v.gated(lambda h, where: torch.ones(len(h))).save(tmp_path / "v")
    (tmp_path / "junk.safetensors").write_bytes(b"no")
    with pytest.raises(SteeringError, match="cannot be read"):
        steering.load(tmp_path / "junk")
    with pytest.raises(SteeringError, match="no such file"):
        steering.load(tmp_path / "nothing")


# -- refusals --------------------------------------------------------------------------------------------------
def test_a_vector_of_another_model_is_refused_and_can_be_taken_over(v, tmp_path):
    other = interp.load("tiny:llama", seed=1)
    with pytest.raises(SteeringError, match=r"fitted on .*take it over with \.on"), other.intervene(v):
        pass
    with pytest.raises(SteeringError, match="fitted on"):
        steering.load(v.save(tmp_path / "v"), other)
    with other.intervene(v.on(other)):
        other(IDS)
    narrow = interp.load("tiny:llama", hidden_size=48)
    with pytest.raises(SteeringError, match=r"width \[32\], and .* has \[48\]"):
        v.on(narrow)


def test_values_that_do_not_fit_are_refused(m):
    with pytest.raises(SteeringError, match=r"width \[31\].* has \[32\]"):
        SteeringVector.of(m, {"resid_post[1]": torch.ones(31)})
    with pytest.raises(SteeringError, match="holds NaN"):
        SteeringVector.of(m, {"resid_post[1]": torch.full((32,), float("nan"))})
    with pytest.raises(SteeringError, match="holds inf"):
        SteeringVector.of(m, {"resid_post[1]": torch.full((32,), float("inf"))})
    for k in (float("nan"), float("inf")):
        with pytest.raises(SteeringError, match="expected a finite number"):
            SteeringVector.of(m, {"resid_post[1]": torch.ones(32)}) * k
    with pytest.raises(SiteError, match=r"resid_post\[7\]: .* has layers 0..2"):
        SteeringVector.of(m, {"resid_post[7]": torch.ones(32)})
    with pytest.raises(SteeringError, match="no part"):
        SteeringVector.of(m, {})
    with pytest.raises(SteeringError, match="zero and has no direction"):
        SteeringVector.of(m, {"resid_post[1]": torch.zeros(32)}).unit()


def test_repr_says_what_it_is(v, w):
    assert repr(v).startswith("SteeringVector(hand at resid_post[1] of ")
    assert "norms" in repr(w)
    assert "layers 1..2" in repr(w)


def test_against_measures_vector_and_stream(m, v):
    table = v.against(m, IDS.tolist())
    h = m.capture(IDS, "resid_post[1]")["resid_post[1]"][:, 1:].reshape(-1, 32)
    row = table.iloc[0]
    assert row.ratio == pytest.approx(v.norm / float(h.norm(dim=1).mean()), rel=1e-5)
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(h, v.vector[None]).mean()), abs=1e-5)
    assert row.mean_cosine == pytest.approx(float(torch.cosine_similarity(h.mean(0), v.vector, dim=0)), abs=1e-5)
