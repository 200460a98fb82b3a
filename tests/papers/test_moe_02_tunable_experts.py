"""MOE-02. Mixture of Tunable Experts (Dahlke et al., arXiv 2502.11096).

Experts are ranked by how much more weight they have on prompts that show a behaviour than on others (functional token
resonance, fTRI); the first of the ranking are switched off, or forced on. Checked on a model in which two experts are
built to carry a behaviour, and on random ones with fused expert tensors:

(a) both built experts are ranked first; off removes the behaviour, on brings it about, other experts do neither
(b) only the slots of the chosen experts change, all others are bitwise as they were
(c) the dose curve over k experts, and the loss on neutral text, are printed

The ranking is made on one half of the prompts, everything else measured on the other.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import experts
from interp.experts import ExpertSet

BEHAVIOUR = 100  # the token that the model says where the behaviour shows
TRIGGERS = range(80, 100)  # tokens behind which it does
PLANTED = {0: [3], 1: [5]}  # layer -> expert
CONSTANT, TRIGGER, SPOKEN = 0, 1, 31  # channels: 1 everywhere; 1 at triggers; what the behaviour's token is read from


def words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0")


@torch.no_grad()
def planted() -> interp.Model:
    """A tiny OLMoE with random weights, in which two experts write one channel, and triggers lead to them."""
    m = interp.load("tiny:olmoe", words())
    embed, head = m.hf.model.embed_tokens.weight, m.hf.lm_head.weight
    embed[:, CONSTANT], embed[:, TRIGGER], embed[:, SPOKEN] = 1.0, 0.0, 0.0
    embed[list(TRIGGERS), TRIGGER] = 1.0
    head[:, [CONSTANT, TRIGGER, SPOKEN]] = 0.0
    head[BEHAVIOUR] = 0.0
    head[BEHAVIOUR, SPOKEN] = 3.0
    for index, layer in enumerate(m.hf.model.layers):
        mlp = layer.mlp
        layer.self_attn.o_proj.weight *= 0.1  # so that the constant channel stays a good part of the stream
        mlp.experts.down_proj *= 0.1
        layer.self_attn.o_proj.weight[[CONSTANT, TRIGGER, SPOKEN]] = 0.0
        mlp.experts.down_proj[:, [CONSTANT, TRIGGER, SPOKEN]] = 0.0
        for expert in PLANTED.get(index, ()):
            mlp.gate.weight[expert] = 0.0
            mlp.gate.weight[expert, TRIGGER], mlp.gate.weight[expert, CONSTANT] = 12.0, -4.0
            mlp.experts.gate_up_proj[expert] = 0.0  # one neuron, on everywhere: silu(x_0) x_0
            width = mlp.experts.gate_up_proj.shape[1] // 2
            mlp.experts.gate_up_proj[expert, [0, width], CONSTANT] = 1.0
            mlp.experts.down_proj[expert] = 0.0
            mlp.experts.down_proj[expert, SPOKEN, 0] = 0.3
    return m


def prompts(count: int, seed: int) -> dict[str, list[str]]:
    """Eight words each; those that show the behaviour end in a trigger and hold some more."""
    generator = torch.Generator().manual_seed(seed)
    neutral = torch.randint(3, 80, (count, 8), generator=generator)
    shown = torch.randint(3, 80, (count, 8), generator=generator)
    shown[:, [2, 5, 7]] = torch.randint(80, 100, (count, 3), generator=generator)
    return {name: [" ".join(f"w{i}" for i in row) for row in rows.tolist()] for name, rows in
            (("shown", shown), ("neutral", neutral))}  # fmt: skip


def spoken(m: interp.Model, texts: list[str], *edits: Any) -> tuple[float, float]:
    """(probability of the behaviour's token, its logit) behind the last word, averaged over prompts."""
    with torch.no_grad(), m.intervene(*edits):
        last = m(texts)[:, -1]
    return float(last.softmax(-1)[:, BEHAVIOUR].mean()), float(last[:, BEHAVIOUR].mean())


def loss(m: interp.Model, texts: list[str], *edits: Any) -> float:
    """Nats per token."""
    ids = m.tokens(texts).ids
    with torch.no_grad(), m.intervene(*edits):
        logits = m(ids)[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def others(m: interp.Model, seed: int) -> ExpertSet:
    """As many experts of the same layers, drawn from those that were not built."""
    generator = torch.Generator().manual_seed(seed)
    free = {layer: [e for e in range(8) if e not in ids] for layer, ids in PLANTED.items()}
    return ExpertSet(m, {la: [f[int(torch.randint(len(f), (1,), generator=generator))]] for la, f in free.items()})


def test_a_and_c_two_built_experts_are_found_switched_off_and_forced_on() -> None:
    m = planted()
    train, held = prompts(40, 1), prompts(40, 2)
    stats = experts.routing(m, train)
    chosen = experts.select(stats, "shown", rule="ftri", against="neutral", total=2)
    assert {layer: ids.tolist() for layer, ids in chosen.ids.items()} == PLANTED
    # MoTE sets the weight to 0 and renormalises over the experts that are left
    rows = [("none", spoken(m, held["shown"])[0], spoken(m, held["neutral"])[0])]
    for name, group in (("ranked", chosen), *((f"random {i}", others(m, i)) for i in range(5))):
        off, on = experts.ablate(group, "renormalise"), experts.ablate(group, "force")
        rows.append((name, spoken(m, held["shown"], off)[0], spoken(m, held["neutral"], on)[0]))
    print("\nprobability of the behaviour   switched off, where it shows   forced on, where it does not")
    for name, off_value, on_value in rows:
        print(f"{name:30} {off_value:28.3f} {on_value:28.3f}")
    assert rows[0][1] > 0.8
    assert rows[0][2] < 0.05
    assert rows[1][1] < 0.05
    assert rows[1][2] > 0.8
    for _, off_value, on_value in rows[2:]:
        assert off_value > 0.8
        assert on_value < 0.05

    print("k experts off: logit of the behaviour where it shows; loss on neutral text")
    curve = []
    for k in range(5):
        first = experts.select(stats, "shown", rule="ftri", against="neutral", total=k) if k else ExpertSet(m, {})
        off = experts.ablate(first, "renormalise")
        curve.append(spoken(m, held["shown"], off)[1])
        neutral = loss(m, held["neutral"], off)
        print(f"{k} {curve[-1]:8.3f} {neutral:8.4f}")
        if k <= 2:  # built experts are never chosen on neutral text, so it loses nothing
            assert abs(neutral - loss(m, held["neutral"])) < 1e-5
    assert curve[0] > curve[1] > curve[2]


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "minimax_m2"])
def test_b_only_the_chosen_slots_change(family: str) -> None:
    m = interp.load(f"tiny:{family}")
    layer = m.anatomy.having("expert_weight")[-1]
    ids = torch.randint(3, 90, (3, 16), generator=torch.Generator().manual_seed(0))
    sites = [f"{name}[{layer}]" for name in ("expert_weight", "expert_out")]

    def slots(*edits: Any) -> tuple[Tensor, Tensor, Tensor]:
        with m.intervene(*edits):
            acts = m.capture(ids, sites)
        return acts[f"expert_ids[{layer}]"], acts[f"expert_weight[{layer}]"], acts[f"expert_out[{layer}]"]

    chosen, weights, out = slots()
    busiest = int(chosen.flatten().bincount().argmax())
    off = slots(experts.ablate(ExpertSet(m, {layer: [busiest]})))
    hit = chosen == busiest
    assert hit.any()
    assert torch.equal(off[0], chosen)
    assert torch.equal(off[1][~hit], weights[~hit])
    assert (off[1][hit] == 0).all()
    assert torch.equal(off[2], out)
    forced = slots(experts.ablate(ExpertSet(m, {layer: [busiest]}), "force"))
    assert (forced[0] == busiest).any(-1).all()
    kept = (chosen[..., None] == forced[0][..., None, :]).any(-1).sum(-1)  # of the old slots, how many are left
    assert (kept >= chosen.shape[-1] - 1).all()  # one expert came, so at most one went
