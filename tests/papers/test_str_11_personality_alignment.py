"""STR-11. Personality Alignment of Large Language Models (Zhu et al. 2024, arXiv:2408.11779): PAS.

Check, on simulated people and a planted model: the match with a person's held-out answers improves over no steering
and over random heads; the fit needs no gradient of the model's weights; its time is printed.

One head of the model reads a direction off the tokens that it sees and writes it to the stream, where the answer is
decided; people differ in which way they answer.
"""

from __future__ import annotations

import time

import torch

import steering
from steering.intervals import bootstrap
from steering.planted import NO, YES, Planted
from steering.vector import SteeringVector

LAYER, HEAD = 1, 2


def one_head_model() -> Planted:
    p = Planted(offset=3.0, answers=True)
    attention, d = p.m.hf.model.layers[LAYER].self_attn, p.m.d_head
    g = torch.Generator().manual_seed(5)
    code = torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    with torch.no_grad():
        for layer in p.m.hf.model.layers:
            layer.self_attn.v_proj.weight.zero_()  # nothing else is read anywhere
        p.m.hf.model.layers[LAYER].input_layernorm.weight.fill_(1.0)
        for q_or_k in (attention.q_proj, attention.k_proj):
            q_or_k.weight.zero_()  # it looks at all tokens alike
        kv = HEAD * p.m.n_kv_heads // p.m.n_heads
        attention.v_proj.weight[kv * d : (kv + 1) * d] = torch.outer(code, p.direction)
        attention.o_proj.weight[:, HEAD * d : (HEAD + 1) * d] = torch.outer(p.direction, code)
        # undecided: both answers are read from the direction, one from its opposite
        p.m.hf.lm_head.weight[NO] = -p.m.hf.lm_head.weight[YES]
    return p


def test_held_out_answers_match_better_than_with_none_or_random_heads():
    p = one_head_model()
    m = p.m
    before = m.fingerprint
    for person in (1, -1):  # one says yes to everything, the other no
        triples = [(prompt, *(sides if person == 1 else sides[::-1])) for prompt, *sides in p.pairs(30)]
        fit, items = triples[:20], [prompt for prompt, _, _ in triples[20:]]
        g = torch.Generator().manual_seed(9)
        held = torch.randint(10, 40, (25, 4), generator=g).tolist()
        wanted = YES if person == 1 else NO

        def match(prompts, *changes, wanted=wanted):
            with m.intervene(*changes):
                logits = m(m.tokens(prompts))[torch.arange(len(prompts)), m.tokens(prompts).last]
            return (logits[:, wanted] > logits[:, YES + NO - wanted]).float()

        start = time.perf_counter()
        v, table = steering.pas(
            m, fit, lambda v, items=items, match=match: float(match(items, v).mean()), heads=1, alphas=(1, 4, 16)
        )
        print(
            f"person {person:+d}: {time.perf_counter() - start:.2f} s; {table.value.tolist()} at {table.alpha.tolist()}"
        )
        assert v.record["heads"][0][:2] == [f"z[{LAYER}]", HEAD]
        steered, plain = match(held, v), match(held)
        random = []
        for _ in range(20):
            layer, head = int(torch.randint(3, (1,), generator=g)), int(torch.randint(4, (1,), generator=g))
            z = torch.zeros(m.n_heads, m.d_head)
            z[head] = torch.randn(m.d_head, generator=g)
            z *= next(iter(v.vectors.values())).norm() / z.norm()
            random.append(match(held, SteeringVector.of(m, {f"z[{layer}]": z})))
        print(
            f"match: steered {steered.mean():.2f}, none {plain.mean():.2f}, "
            f"random heads {torch.stack(random).mean():.2f}"
        )
        assert bootstrap(steered - plain)[0] > 0
        assert bootstrap(steered - torch.stack(random).mean(0))[0] > 0
    assert m.fingerprint == before
    assert all(parameter.grad is None for parameter in m.hf.parameters())
