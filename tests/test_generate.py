"""Generating under captures and edits: what a full run over the final text would read and do, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp import edits
from interp.activations import Activations, Tokens
from interp.model import Model
from interp.results import Generation
from interp.sites import KINDS
from interp.zoo.tiny import tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]  # longer than the sliding window of 5, and shorter
NEW = {"max_new_tokens": 5, "eos_token_id": None}
FAMILIES = ["llama", "gpt2", "gemma2", "olmoe", "gpt_oss", "bloom", "falcon", "jetmoe"]


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: Model(tiny(name), name=name) for name in FAMILIES}


@pytest.fixture(scope="module")
def m(models: dict[str, Model]) -> Model:
    return models["llama"]


def everything(m: Model) -> list[str]:
    return [f"{n}[*]" if KINDS[n].layered else n for n in sorted({name for name, _ in m.anatomy.places})]


def assert_same(got: Activations, want: Activations, skip: tuple[str, ...] = ()) -> None:
    """The same values at every real token, whatever stands at padding."""
    assert torch.equal(got.mask, want.mask)
    real = want.mask
    for site in want.sites:
        if site.name in skip:
            continue
        a, b = got[site], want[site]
        assert a.shape == b.shape, site
        if site.name == "pattern":  # [batch, head, query, key] -> queries that are tokens
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=2e-5, msg=lambda s, site=site: f"{site}: {s}")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_edits_it_is_the_models_own_greedy_generation(models: dict[str, Model], family: str) -> None:
    m = models[family]
    for row in PROMPTS:
        theirs = m.hf.generate(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
                               do_sample=False, pad_token_id=0, **NEW)  # fmt: skip
        assert torch.equal(m.generate([row], **NEW).tokens.ids, theirs)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_captured_equals_a_full_capture_of_the_final_text(
    models: dict[str, Model], family: str, use_cache: bool
) -> None:
    m = models[family]
    made = m.generate(PROMPTS, capture=everything(m), use_cache=use_cache, **NEW)
    assert made.acts is not None
    fed = Tokens(made.tokens.ids[:, :-1], made.tokens.mask[:, :-1])  # the last new token is never fed back
    assert torch.equal(made.acts.tokens.ids, fed.ids)
    assert_same(made.acts, m.capture(fed, everything(m)))


@pytest.mark.parametrize("site", ["z[1, head=2]", "resid_post[-1]", "blocks.1.hook_attn_out", "k[1, head=1, dim=3]"])
def test_a_part_can_be_captured_too(m: Model, site: str) -> None:
    acts = m.generate(PROMPTS, capture=site, **NEW).acts
    assert acts is not None
    assert len(acts) == 1
    assert_same(acts, m.capture(acts.tokens, site))


def test_one_experts_rows_are_those_of_the_calls_joined(models: dict[str, Model]) -> None:
    m = models["olmoe"]
    full = m.generate(PROMPTS, capture="expert_out[1]", **NEW).acts
    assert full is not None
    expert = int(full.experts(1).load().argmax())
    part = m.generate(PROMPTS, capture=f"expert_out[1, expert={expert}]", **NEW).acts
    assert part is not None
    got, want = part[f"expert_out[1, expert={expert}]"], full[f"expert_out[1, expert={expert}]"]
    assert got.shape == want.shape
    order = [t[:, 0].argsort() for t in (got, want)]  # by call here, by row there
    torch.testing.assert_close(got[order[0]], want[order[1]], rtol=0, atol=1e-5)


def test_a_static_cache_holds_room_for_columns_to_come(m: Model) -> None:
    sites = ["k[1]", "v[1]", "z[1]", "resid_post[1]"]
    static = {"cache_implementation": "static", "disable_compile": True, **NEW}
    made = m.generate(PROMPTS, capture=sites, **static)
    assert made.acts is not None
    assert_same(made.acts, m.capture(made.acts.tokens, sites))
    with m.intervene(edits.scale("k[1]", -2.0, scope="window(2, None)")):
        assert torch.equal(m.generate(PROMPTS, **static).new_ids, m.generate(PROMPTS, **NEW).new_ids)


def test_a_generation_says_what_it_made(m: Model, models: dict[str, Model]) -> None:
    made = m.generate(PROMPTS, **NEW)
    assert isinstance(made, Generation)
    assert made.prompt == 7
    assert made.acts is None
    assert made.new_ids.shape == (2, 5)
    assert made.texts == [str(row) for row in made.new_ids.tolist()]  # no tokenizer: ids as text
    assert made.text == made.texts[0]
    assert str(made) == f"{made.texts[0]}\n---\n{made.texts[1]}"
    assert str(m.generate(PROMPTS[0], **NEW)) == made.text
    assert made.tokens.mask[1].tolist() == [False] * 4 + [True] * 8
    assert made.tokens.row(1)[:3].tolist() == PROMPTS[1]


# -- edits -----------------------------------------------------------------------------------------------------
def by_hand(m: Model, rows: list[list[int]], change: Any, picks: Any, new: int = 5) -> list[list[int]]:
    """Greedy generation, each token from the whole text, with the edit on the tokens that `picks` gives."""
    out = []
    for row in rows:
        text = list(row)
        for _ in range(new):
            mask = torch.tensor([[picks(p, len(row)) for p in range(len(text))]])
            with m.intervene(change.within(mask)):
                text.append(int(m([text])[0, -1].argmax()))
        out.append(text[len(row) :])
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("scope", "picks"),
    [
        ("all", lambda p, prompt: True),
        ("prompt", lambda p, prompt: p < prompt),
        ("generated", lambda p, prompt: p >= prompt),
        ("last", lambda p, prompt: p == prompt - 1),
        ("window(1, 5) | generated", lambda p, prompt: 1 <= p < 5 or p >= prompt),
    ],
)
def test_edits_act_on_the_tokens_of_their_scope_with_and_without_a_cache(
    models: dict[str, Model], family: str, scope: str, picks: Any
) -> None:
    m = models[family]
    v = torch.randn(m.d_model, generator=torch.Generator().manual_seed(5))
    change = edits.add("resid_post[1]", v)
    want = by_hand(m, PROMPTS, change, picks)
    for use_cache in (True, False):
        with m.intervene(change.within(scope)):
            assert m.generate(PROMPTS, use_cache=use_cache, **NEW).new_ids.tolist() == want


@pytest.mark.parametrize("site", ["q", "k", "v", "pattern", "z", "mlp_hidden", "resid_mid"])
@pytest.mark.parametrize(("family", "layer"), [("llama", 1), ("gemma2", 0), ("gemma2", 1)])  # 0 slides a window
def test_edits_inside_attention_act_the_same_with_and_without_a_cache(
    models: dict[str, Model], family: str, layer: int, site: str
) -> None:
    m, site = models[family], f"{site}[{layer}]"
    want = by_hand(m, PROMPTS, edits.scale(site, -2.0), lambda p, prompt: p >= 2)
    for use_cache in (True, False):
        with m.intervene(edits.scale(site, -2.0, scope="window(2, None)")):
            assert m.generate(PROMPTS, use_cache=use_cache, **NEW).new_ids.tolist() == want


def test_what_is_captured_under_an_edit_is_what_the_model_went_on_with(m: Model) -> None:
    v = torch.randn(m.d_model)
    with m.intervene(edits.replace("resid_post[1]", v, scope="generated")):
        acts = m.generate(PROMPTS, capture=["resid_post[1]", "resid_pre[2]"], **NEW).acts
    assert acts is not None
    new = acts["resid_post[1]"][:, 7:]
    assert torch.equal(new, v.expand_as(new))
    assert torch.equal(acts["resid_pre[2]"], acts["resid_post[1]"])


def test_sampling_several_continuations_keeps_rows_apart(m: Model) -> None:
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[3:] = True  # the three continuations of the second prompt
    torch.manual_seed(0)
    plain = m.generate(PROMPTS, num_return_sequences=3, do_sample=True, **NEW)
    assert plain.new_ids.shape == (6, 5)
    assert [plain.tokens.row(i)[:3].tolist() for i in range(6)] == [PROMPTS[0][:3]] * 3 + [PROMPTS[1]] * 3
    assert len({tuple(r) for r in plain.new_ids.tolist()}) > 2
    torch.manual_seed(0)
    with m.intervene(edits.zero("resid_post[1]", scope=mask)) as run:
        changed = m.generate(PROMPTS, num_return_sequences=3, do_sample=True, **NEW)
    assert set(run.trace().batch) == {3, 4, 5}
    assert torch.equal(changed.new_ids[:3], plain.new_ids[:3])
    assert not torch.equal(changed.new_ids[3:], plain.new_ids[3:])


def test_beams_are_refused_where_scopes_could_lose_their_rows(m: Model) -> None:
    message = r"num_beams=2 reorders the batch between calls, so scopes would follow the wrong rows; use greedy"
    with pytest.raises(ValueError, match=message), m.intervene(edits.zero("resid_post[1]")):
        m.generate(PROMPTS, num_beams=2, **NEW)
    with pytest.raises(ValueError, match=message):
        m.generate(PROMPTS, num_beams=2, capture="resid_post[1]", **NEW)
    assert m.generate(PROMPTS, num_beams=2, **NEW).new_ids.shape == (2, 5)


def test_an_early_end_of_one_row_leaves_the_other_as_it_is(m: Model) -> None:
    plain = m.generate(PROMPTS, **NEW).new_ids
    end = int(plain[0, 1])
    made = m.generate(PROMPTS, max_new_tokens=5, eos_token_id=end, pad_token_id=0, capture="resid_post[1]")
    assert made.new_ids[0].tolist()[:2] == plain[0].tolist()[:2]
    stop = plain[1].tolist().index(end) + 1 if end in plain[1] else made.new_ids.shape[1]
    assert made.new_ids[1, :stop].tolist() == plain[1, :stop].tolist()


# -- somebody else's calls -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_reads_what_the_model_itself_generates(models: dict[str, Model], family: str) -> None:
    m = Model(models[family].hf, name=family)  # a fresh one, which has not yet learnt what this family overwrites
    ids = torch.tensor([PROMPTS[0]])
    with m.recording(everything(m)) as rec:
        out = m.hf.generate(input_ids=ids, do_sample=False, pad_token_id=0, **NEW)
    acts = rec.activations()
    assert torch.equal(acts.tokens.ids, out[:, :-1])
    assert acts.model == family
    # generate asks for the logits of the last prompt token only; everything else is complete
    assert_same(acts, m.capture(out[:, :-1], everything(m)), skip=("logits",))


def test_a_recording_holds_the_last_sequence(m: Model) -> None:
    with m.recording(["resid_post[0]", "resid_post[2]"]) as rec:
        m.hf(input_ids=torch.tensor([PROMPTS[0]]))
        m.hf(input_ids=torch.tensor([PROMPTS[1]]))
        assert rec.activations().tokens.ids.tolist() == [PROMPTS[1]]
        m.capture([[20, 21]], "resid_post[0]")  # ends before layer 2
    acts = rec.activations()
    assert acts.tokens.ids.tolist() == [[20, 21]]
    assert list(acts) == ["resid_post[0]"]


def test_a_recording_of_nothing_says_so(m: Model) -> None:
    with m.recording("resid_post[1]") as rec:
        pass
    with pytest.raises(RuntimeError, match="nothing was recorded: the model did not run inside the context"):
        rec.activations()


def test_a_recording_understands_a_cache_that_somebody_else_keeps(m: Model) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with m.intervene(edits.add("resid_post[1]", 0.0, scope="all")) as run, m.recording("resid_post[1]") as rec:
        past = m.hf(input_ids=ids[:, :4], use_cache=True).past_key_values
        m.hf(input_ids=ids[:, 4:6], past_key_values=past, use_cache=True)
        m.hf(input_ids=ids[:, 6:], past_key_values=past, use_cache=True)
    assert_same(rec.activations(), m.capture(ids, "resid_post[1]"))
    assert run.trace().position.tolist() == list(range(7))
    assert run.trace().token.tolist() == PROMPTS[0]


def test_edits_follow_embeddings_that_are_fed_in_the_place_of_ids(m: Model) -> None:
    ids = torch.tensor([PROMPTS[0]])
    embeds: Tensor = m.hf.get_input_embeddings()(ids).detach()
    change = edits.scale("resid_post[1]", 2.0, scope="window(2, 4)")
    with m.intervene(change) as run, torch.no_grad():
        got = m.hf(inputs_embeds=embeds).logits
    with m.intervene(change):
        torch.testing.assert_close(got, m(ids), rtol=0, atol=1e-6)
    assert run.trace().token.tolist() == [-1, -1]


def test_a_mask_given_by_place_or_never_repeated_is_heeded(m: Model) -> None:
    """Padding told to the first call stays padding in those that follow with the cache."""
    left = m.tokens(PROMPTS).padded("left")
    with m.intervene(edits.add("resid_post[1]", 0.0, scope="all")) as run, torch.no_grad():
        past = m.hf(left.ids, left.mask.long(), use_cache=True).past_key_values
        m.hf(torch.tensor([[20], [21]]), past_key_values=past, use_cache=True)
    assert len(run.trace()) == 7 + 1 + 3 + 1
    assert run.trace().query("batch == 1").position.tolist() == [0, 1, 2, 3]
