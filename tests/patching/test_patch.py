"""Exact patching: many stacked patches that skip what they cannot change equal one whole run per patch."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import edits, metrics
from interp.patching import patch
from interp.patching.memory import BudgetError, Meter
from interp.patching.nodes import Node, expand, window
from interp.patching.runs import Patcher, effects
from interp.patching.task import PatchError
from interp.sites import Site

from .conftest import differing, logit_gap, one_by_one

#: Grouped heads and rotary; learned positions and Conv1D; parallel blocks; softcaps and windows; attention written by
#: hand; experts and sinks; latent attention; linear attention; several residual streams; layers that pass tuples on.
FAMILIES = ["llama", "gpt2", "falcon", "gemma2", "bloom", "gpt_oss", "deepseek_v3", "qwen3_next", "gemma3n", "monet"]
PLAIN = ["embed", "resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_hidden", "router_logits", "mlp_out"]


def tiny(family: str) -> interp.Model:
    return interp.load(f"tiny:{family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_one_by_one_sweep(family: str) -> None:
    m, (clean, corrupt) = tiny(family), differing()
    draw, tokens, nodes = random.Random(0), m.tokens(clean), []
    for name in PLAIN:
        if m.anatomy.having(name) or name == "embed":
            found = expand(m, name if name == "embed" else f"{name}[*]", tokens)
            nodes += draw.sample(found, min(3, len(found)))
    sets = [[n] for n in nodes] + [draw.sample(nodes, 3) for _ in range(3)] + [[Node(nodes[-1].site, None)]]
    truth = one_by_one(m, corrupt, clean, logit_gap, sets)
    assert float(truth.abs().max()) > 0.02
    assert torch.allclose(effects(m, clean, corrupt, logit_gap, sets), truth, atol=2e-5)
    noised = one_by_one(m, clean, corrupt, logit_gap, sets)
    assert torch.allclose(effects(m, clean, corrupt, logit_gap, sets, direction="noise"), noised, atol=2e-5)


def test_shortcuts_are_taken_where_they_are_exact_and_refused_with_a_reason() -> None:
    clean, corrupt = differing()
    taken = patch(tiny("llama"), clean, corrupt, logit_gap, "z[*]").attrs
    assert taken["shortcuts"] == {
        "layers": "run from the first patched layer on",
        "positions": "run from the first patched position on, over a cached prefix",
    }
    assert taken["rows"] == 2 * (3 * 4 * 6)  # positions 0 and 1 are the same in both runs, and cost nothing
    assert taken["forward_passes"] == pytest.approx(taken["rows"] * 2 / 3 * 6 / 8)  # of the layers, of the positions
    for family, what, why in (("gemma3n", "layers", "no single residual stream"), ("jamba", "positions", "LinearAtt")):
        refused = patch(tiny(family), clean, corrupt, logit_gap, "v[1]").attrs["shortcuts"]
        assert why in refused[what]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_metrics_of_any_reach(family: str) -> None:
    """Of the last token, of a token in the middle, of the whole sequence; per-example answers; padded pairs."""
    m, (clean, corrupt) = tiny(family), differing(3)
    nodes = [[n] for n in expand(m, ["resid_post[*]@5", "z[1]@2"], m.tokens(clean))]
    given: list[tuple[Any, bool]] = [
        (lambda x: x[:, -1, 3], True),
        (lambda x: x[:, 6, 3] ** 2, False),
        (lambda x: x.log_softmax(-1)[..., 3].mean(1), False),
        (lambda x: x[..., 3].amax(1), False),
        (metrics.logit_diff([3, 4, 5], [6, 7, 8]), True),
        (metrics.kl(m(clean)), False),
    ]
    for metric, narrow in given:
        patcher = Patcher(m, clean, corrupt, metric)
        assert patcher.recorded.narrow is narrow
        assert torch.allclose(patcher.effects(nodes), one_by_one(m, corrupt, clean, metric, nodes), atol=2e-5)


def test_pairs_of_different_length_are_padded_and_read_at_their_own_last_token() -> None:
    m, metric = tiny("llama"), metrics.logit_diff([3, 4], [5, 6])
    clean, corrupt = [[9, 8, 7, 6, 5], [9, 8, 7]], [[9, 4, 7, 6, 5], [9, 4, 7]]
    table = patch(m, clean, corrupt, metric, "resid_post[1]")
    assert table.attrs["pairs"] == 2
    together = effects(m, clean, corrupt, metric, [[Node(Site("resid_post", 1), p)] for p in range(5)])
    for i, answers in ((0, (3, 5)), (1, (4, 6))):
        nodes = [[Node(Site("resid_post", 1), p)] for p in range(len(clean[i]))]
        alone = effects(m, [clean[i]], [corrupt[i]], metrics.logit_diff(*answers), nodes)
        assert torch.allclose(together[: len(clean[i]), i], alone[:, 0], atol=2e-5)
    assert together[3:, 1].isnan().all()  # there is no such position
    assert not table.value.isna().any()


def test_experts_are_switched_exactly() -> None:
    """Experts of both runs, of the clean one only, of the corrupt one only: by hand, what each adds is moved."""
    m, (clean, corrupt) = tiny("qwen3_moe"), differing(1)
    before = logit_gap(m(corrupt))
    here, there = (m.capture(ids, "expert_out[1]").experts(1) for ids in (corrupt, clean))
    position = next(
        p for p in range(8) if len(set(here.ids[0, p].tolist()) & set(there.ids[0, p].tolist())) == 1 and p >= 2
    )
    for expert in sorted({*here.ids[0, position].tolist(), *there.ids[0, position].tolist()}):
        (w0, c0), (w1, c1) = (
            ((e.ids == expert) * e.weights, ((e.ids == expert) * e.weights)[..., None] * e.out) for e in (here, there)
        )
        made = expert_on(m, 1, expert, corrupt, position)
        moved = (w1[0, position].sum() - w0[0, position].sum()) * made
        for name, shift in (("expert_weight", moved), ("expert_out", (c1 - c0)[0, position].sum(0))):
            with m.intervene(edits.add("mlp_out[1]", shift, scope=f"window({position}, {position + 1})")):
                truth = logit_gap(m(corrupt)) - before
            node = Node(Site(name, 1, (("expert", expert),)), position)
            assert torch.allclose(effects(m, clean, corrupt, logit_gap, [[node]])[0], truth, atol=2e-5)
            assert float(truth.abs().max()) > 1e-4


def expert_on(m: interp.Model, layer: int, expert: int, ids: Tensor, position: int) -> Tensor:
    """What an expert makes of a token, routed to it or not, from the block's input and the weights."""
    seen: list[Tensor] = []
    block: Any = m.hf.model.layers[layer].mlp
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    m(ids)
    handle.remove()
    gate, up = block.experts.gate_up_proj[expert].chunk(2, 0)
    x = seen[0][0, position]
    with torch.no_grad():
        return block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate @ x) * (up @ x))


def test_all_experts_at_once_are_the_whole_layer() -> None:
    """Patching what every expert adds, jointly, is patching the layer's output (there is nothing else in it)."""
    m, (clean, corrupt) = tiny("qwen3_moe"), differing()
    every = expand(m, "expert_out[1]@5", m.tokens(clean))
    whole = [Node(Site("mlp_out", 1), 5)]
    joint, block = effects(m, clean, corrupt, logit_gap, [every, whole])
    assert float(block.abs().min()) > 1e-3
    assert torch.allclose(joint, block, atol=2e-5)


def test_the_whole_stream_is_the_whole_effect() -> None:
    m, (clean, corrupt) = tiny("gemma3"), differing()
    table = patch(m, clean, corrupt, logit_gap, "resid_post[2]@-1")
    gap = (logit_gap(m(clean)) - logit_gap(m(corrupt))).mean().item()
    assert table.value.item() == pytest.approx(gap, abs=1e-5)
    assert table.attrs["baseline"]["clean"] - table.attrs["baseline"]["corrupt"] == pytest.approx(gap, abs=1e-5)
    assert table.low.item() <= gap <= table.high.item()
    assert (table.metric[0], table.method[0], table.direction[0]) == ("logit_gap", "exact", "denoise")


def test_windows_and_parts() -> None:
    """A window is one joint patch; a part moves only what it says: here one direction of the stream."""
    m, (clean, corrupt) = tiny("llama"), differing()
    nodes = window(m, "mlp_out[*]", m.tokens(clean), 2, positions=[5])
    direction = torch.nn.functional.normalize(torch.randn(m.d_model), dim=0)

    def along(here: Tensor, there: Tensor) -> Tensor:
        return here + ((there - here) @ direction)[..., None] * direction

    part = Node(Site("resid_post", 1), 5, part=along)
    made = effects(m, clean, corrupt, logit_gap, [[n] for n in nodes] + [[part]])
    assert torch.allclose(made[:2], one_by_one(m, corrupt, clean, logit_gap, [[n] for n in nodes]), atol=2e-5)
    here, there = (m.capture(ids, "resid_post[1]")["resid_post[1]"] for ids in (corrupt, clean))
    with m.intervene(edits.replace("resid_post[1]", along(here, there), scope="window(5, 6)")):
        truth = logit_gap(m(corrupt))
    assert torch.allclose(made[2], truth - logit_gap(m(corrupt)), atol=2e-5)
    assert float(made[2].abs().max()) > 1e-3


def test_an_open_context_is_part_of_both_runs() -> None:
    m, (clean, corrupt) = tiny("llama"), differing()
    nodes = [[n] for n in expand(m, "z[2]@5", m.tokens(clean))]
    with m.intervene(edits.scale("mlp_out[0]", 3.0)):
        assert torch.allclose(
            effects(m, clean, corrupt, logit_gap, nodes),
            one_by_one(m, corrupt, clean, logit_gap, nodes),
            atol=2e-5,
        )
    assert len(m.hf.model.layers[0]._forward_hooks) == 0


def test_nothing_is_left_behind() -> None:
    m, (clean, corrupt) = tiny("gpt_oss"), differing()
    layers, before = list(m.anatomy.layers), m(clean)
    patch(m, clean, corrupt, logit_gap, ["q[*]", "expert_out[1]"])
    with pytest.raises(RuntimeError, match="stop"):
        effects(m, clean, corrupt, _once_then_stop(), [[Node(Site("mlp_out", 2), 5)]])
    assert all(a is b for a, b in zip(m.anatomy.layers, layers, strict=True))
    assert torch.equal(m(clean), before)
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in m.hf.modules())


def _once_then_stop() -> Any:
    """A metric that fails once patches are run."""
    calls = [0]

    def metric(logits: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 4:
            raise RuntimeError("stop")
        return logits[:, -1, 3]

    return metric


def test_the_budget_holds_at_the_peak() -> None:
    m, (clean, corrupt) = tiny("llama"), differing(2, 24)
    nodes = [[n] for n in expand(m, ["z[*]", "mlp_hidden[*]"], m.tokens(clean))]
    free = effects(m, clean, corrupt, logit_gap, nodes)
    m.fingerprint  # noqa: B018 - computed once and kept
    for budget in (400_000, 1_000_000, 4_000_000):
        with Meter() as meter:
            tight = effects(m, clean, corrupt, logit_gap, nodes, budget=budget)
        assert meter.peak <= budget
        assert torch.allclose(tight, free, atol=2e-5)
    with pytest.raises(BudgetError, match=r"budget=50,000 bytes is too small for one patch: .* give at least [\d,]+"):
        effects(m, clean, corrupt, logit_gap, nodes, budget=50_000)


def test_flash_attention_is_switched_and_put_back() -> None:
    m, (clean, corrupt) = tiny("llama"), differing()
    table = patch(m, clean, corrupt, logit_gap, "z[1]")
    m.config._attn_implementation_internal = "flash_attention_2"  # as on a GPU; here it could not even run
    try:
        again = patch(m, clean, corrupt, logit_gap, "z[1]")
        assert again.attrs["shortcuts"]["attention"] == ("switched for the time of patching: flash_attention_2 -> sdpa")
        assert m.config._attn_implementation_internal == "flash_attention_2"
    finally:
        m.config._attn_implementation_internal = "sdpa"
    assert again.value.tolist() == pytest.approx(table.value.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("clean", "corrupt", "metric", "message"),
    [
        ([[3, 4, 5]], [[3, 4]], logit_gap, "pair 0: the clean prompt has 3 tokens and the corrupt one 2"),
        ([[3, 4, 5]], [[3, 4, 5]], logit_gap, "are the same tokens"),
        ([[3, 4, 5]] * 2, [[3, 6, 5]], logit_gap, "there are 2 clean and 1 corrupt prompts"),
        ([[3, 4, 5]], None, logit_gap, "give the corrupt prompts too"),
        ([[3, 4, 5]], [[3, 6, 5]], lambda x: x[:, -1, 3] * math.nan, "gives nan for pair 0 of the base run"),
        ([[3, 4, 5]], [[3, 6, 5]], lambda x: torch.ones(len(x)), "gives the same value on the clean and the corrupt"),
        ([[3, 4, 5]], [[3, 6, 5]], "logit_diff", "expected a function of logits"),
        ([[3, 4, 5]], [[3, 6, 5]], lambda x: x.mean(), r"one number per example, \[1\]"),
    ],
)
def test_bad_questions_are_refused(clean: Any, corrupt: Any, metric: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch(tiny("llama"), clean, corrupt, metric, "z[*]")


def test_a_direction_that_is_none() -> None:
    clean, corrupt = differing()
    with pytest.raises(PatchError, match="expected 'denoise'"):
        patch(tiny("llama"), clean, corrupt, logit_gap, "z[*]", direction="both")  # type: ignore[arg-type]
