"""STR-15. Probing then Editing Response Personality of Large Language Models (Ju et al. 2025, arXiv:2504.10227).

Check: for two classes the probe's probability after the edit is the goal to 1e-3, reached by the smallest move; for
several classes the smallest move is solved for, or refused where the goal cannot be reached; damage (KL and
next-token accuracy on text that has nothing to do with it) and the cost in time are printed.
"""

from __future__ import annotations

import time

import pytest
import torch

import steering
from steering.planted import AGAINST, NEUTRAL, WITH, Planted


def test_two_classes_reach_the_goal_by_the_smallest_move():
    p = Planted()
    texts = [[WITH + i] for i in range(30)] + [[AGAINST + i] for i in range(30)]
    for goal in (0.7, 0.99):
        made = steering.probe_edit(p.m, texts, ["open"] * 30 + ["shy"] * 30, "open", goal=goal, layer=1, at="last")
        map_, rows = made.parts[0].map, p.m.tokens([[AGAINST + i] for i in range(30)])
        with p.m.intervene(made):
            h = p.m.capture(rows, "resid_post[1]")["resid_post[1]"][:, 0]
        probability = (h @ map_.weight.T + map_.bias).softmax(-1)[:, map_.target]
        assert float((probability - goal).abs().max()) <= 1e-3
        # smallest: the move is along the plane's normal
        move = h - p.table[AGAINST : AGAINST + 30]
        normal = map_.weight[map_.target] - map_.weight[1 - map_.target]
        cosine = torch.nn.functional.cosine_similarity(move, normal[None], dim=1)
        assert float(cosine.min()) > 0.9999


def test_several_classes_reach_the_goal_and_no_random_way_is_shorter():
    p = Planted()
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.linalg.qr(torch.randn(32, 32, generator=g)).Q[:4]
    with torch.no_grad():
        for k in range(4):
            p.table[10 + 20 * k : 30 + 20 * k] = centres[k] + 0.3 * torch.randn(20, 32, generator=g)
    texts, labels = [[10 + i] for i in range(80)], [f"trait {i // 20}" for i in range(80)]
    made = steering.probe_edit(p.m, texts, labels, "trait 2", goal=0.9, layer=0)
    map_, rows = made.parts[0].map, p.m.tokens(texts[:20])
    with p.m.intervene(made):
        h = p.m.capture(rows, "resid_post[0]")["resid_post[0]"][:, 0]
    probability = (h @ map_.weight.T + map_.bias).softmax(-1)[:, map_.target]
    assert float((probability - 0.9).abs().max()) <= 1e-3
    start = p.table[10:30]
    length = (h - start).norm(dim=1)
    shorter = 0
    for _ in range(2000):  # points as near as the edit, or nearer: none may reach the goal
        way = torch.nn.functional.normalize((h - start) + 0.5 * torch.randn(20, 32, generator=g), dim=1)
        tried = start + 0.999 * length[:, None] * way
        shorter += int(((tried @ map_.weight.T + map_.bias).softmax(-1)[:, map_.target] > 0.9 + 1e-4).sum())
    assert shorter == 0


def test_a_class_between_others_is_refused():
    p = Planted()
    with torch.no_grad():
        line = torch.linspace(-1, 1, 30)
        p.table[10:40] = 10 * line[:, None] * p.direction  # on one line, so the middle is between the ends
    labels = ["low"] * 10 + ["middle"] * 10 + ["high"] * 10
    with pytest.raises(steering.SteeringError, match="between the others"):
        steering.probe_edit(p.m, [[10 + i] for i in range(30)], labels, "middle", layer=0, min_accuracy=0.5)


def test_damage_and_cost_are_told():
    p = Planted()
    texts = [[WITH + i] for i in range(30)] + [[AGAINST + i] for i in range(30)]
    made = steering.probe_edit(p.m, texts, ["open"] * 30 + ["shy"] * 30, "open")
    g = torch.Generator().manual_seed(1)
    neutral = torch.randint(NEUTRAL, NEUTRAL + 30, (16, 12), generator=g)
    times, plain = {}, p.m(neutral).log_softmax(-1)
    for name, changes in (("plain", []), ("edited", [made])):
        start = time.perf_counter()
        with p.m.intervene(*changes):
            steered = p.m(neutral).log_softmax(-1)
        times[name] = time.perf_counter() - start
    kl = (plain.exp() * (plain - steered)).sum(-1)
    same = (plain.argmax(-1) == steered.argmax(-1)).float()
    print(f"KL at the edited token {float(kl[:, -1].mean()):.3f}, elsewhere {float(kl[:, :-1].abs().max()):.1e}; "
          f"same next token {float(same.mean()):.3f}; time x {times['edited'] / times['plain']:.2f}")  # fmt: skip
    assert float(kl[:, :-1].abs().max()) < 1e-6  # only the last token of the prompt is touched
