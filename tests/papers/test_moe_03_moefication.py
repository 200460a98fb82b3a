"""MOE-03. MoEfication: Transformer Feed-forward Layers are Mixtures of Experts (arXiv 2110.01786).

(a) A balanced split with all experts on equals the dense output to 1e-5.
(b) On a trained model, with 30 % of the experts on, the loss kept by a fitted router lies between that of an oracle's
    and that of a random choice. All three are printed.
(c) The experts that result are experts like any other: selection, switching off and forcing on accept them.
"""

from __future__ import annotations

import pytest
import torch

import interp
from interp import experts
from tests.experts.conftest import TEXTS, build

PROSE = {
    "law": [
        "The court held that the lower court had erred in admitting the evidence, and reversed the judgment.",
        "A contract is formed when an offer is accepted and something of value is given in return for a promise.",
    ],
    "nature": [
        "Plants take up carbon dioxide through small openings in their leaves and turn it into sugar in the light.",
        "The river carries sand and stones down from the mountains and leaves them where the land becomes flat.",
    ],
    "work": [
        "Before you start the machine, make sure that the cover is closed and that nobody stands behind it.",
        "She wrote to the office three times before somebody answered, and then the answer was about something else.",
    ],
}
HELD_OUT = {
    "news": [
        "The council decided on Monday to close the old bridge for repairs, which are expected to take until spring.",
        "Most of the people who live near the harbour work in one of the two factories that were built there.",
    ],
    "how": ["To make bread you need flour, water, salt and time. Mix the flour with the water and let it rest."],
}


def test_a_all_experts_on_is_the_dense_model() -> None:
    for family in ("llama", "gpt2", "phi3"):
        m = interp.load(f"tiny:{family}")
        ids = torch.arange(5, 25).view(2, 10)
        for how in ("weights", "random"):
            error = float((experts.split(m, n=5, how=how)(ids) - m(ids)).abs().max())
            assert error <= 1e-5, (family, how, error)


@pytest.mark.smollm2
def test_b_a_fitted_router_lies_between_oracle_and_chance(smollm2: interp.Model) -> None:
    groups = experts.partition(smollm2, 16, "weights")
    kept = {}
    for gate in ("oracle", "fitted", "random"):
        moe = experts.split(smollm2, groups=groups, active=5, gate=gate, texts=PROSE)
        losses = experts.losses(moe, HELD_OUT)
        kept[gate] = float(losses.nats.sum() / losses.tokens.sum())
    before = experts.losses(smollm2, HELD_OUT)
    dense = float(before.nats.sum() / before.tokens.sum())
    print(f"\n5 of 16 experts on, nats per token: dense {dense:.2f}", {k: f"{v:.2f}" for k, v in kept.items()})
    assert dense < kept["oracle"] < kept["fitted"] < kept["random"]


def test_c_the_experts_are_experts_like_any_other() -> None:
    m = experts.split(build("neurons"), n=4, active=2)
    stats = experts.routing(m, TEXTS, norms=True)
    chosen = experts.select(stats, "law", "ftri", total=2)
    plain = m(TEXTS["law"][0])
    with m.intervene(experts.ablate(chosen)):
        off = m(TEXTS["law"][0])
    with m.intervene(experts.ablate(chosen, "force")):
        forced = m.capture(TEXTS["law"][0], "expert_ids[*]")
    assert float((off - plain).abs().max()) > 1e-4
    for layer, ids in chosen.ids.items():
        hit = (forced[f"expert_ids[{layer}]"][..., None] == ids).any(-2)
        assert bool(hit.all())
    table = experts.dose(m, stats, "law", TEXTS, sizes=(1, 2), controls=2)
    assert set(table["size"]) == {1, 2}
