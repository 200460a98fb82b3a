"""Published effects tried on a real model, where `tests/papers` proves them on trained or planted ones.

actadd     activation addition (Turner et al. 2023): words of weddings over the coefficient, beside random additions
bandit     entropic steering (Rahn et al. 2024): how undecided a player of two slot machines is, over beta
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _steer_data as data
import torch
from _steer_functions import _interval

import steering
from steering.continuation import continued, log_likelihoods
from steering.east import weighted
from steering.maps import PerToken
from steering.pairs import Passage, passage
from steering.reading import read

PROMPTS = [
    "I went up to my friend and said", "This morning at the office we talked about", "In her letter she wrote about",
    "My brother called me to tell me about", "On the bus an old woman told us about", "The film was mostly about",
    "Last year my parents were busy with", "All that the guests could speak of was", "Everybody in town heard about",
    "The first thing he mentioned was", "We stayed up all night because of", "She smiled when she thought of",
]  # fmt: skip
WORDS = [" wedding", " bride", " marriage", " groom", " ceremony", " married"]


def papers(m: Any, out: Path, *, controls: int, only: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """One row per paper; each is kept under `out`."""
    ways: dict[str, Callable[..., dict[str, Any]]] = {"actadd": actadd, "bandit": bandit}
    for name, way in ways.items():
        if only and name not in only:
            continue
        file = out / f"paper-{name}.json"
        if not file.exists():
            file.write_text(json.dumps({"paper": name} | way(m, controls)))
        yield json.loads(file.read_text())


def actadd(m: Any, controls: int) -> dict[str, Any]:
    """log P(wedding words) at the end of prompts, change from unsteered and beyond random additions, by c."""
    start = m.tokenizer.bos_token  # as in the paper every text begins with it, so that nothing is added there
    v = steering.actadd(m, f"{start} weddings", f"{start} ", layer=6)
    generator, b = torch.Generator().manual_seed(0), v.parts[0].map.tensors()["b"]
    runs: dict[Any, Any] = {0.0: []} | {("own", c): (v * c).as_edits(m) for c in (1.0, 2.0, 4.0)}
    for i in range(controls):
        b_random = torch.randn(b.shape, generator=generator)
        b_random = b_random * (b.norm(dim=1) / b_random.norm(dim=1))[:, None]
        one = steering.SteeringMap.of(m, {v.sites[0]: PerToken(b_random)}, scope=v.scope)
        runs |= {(i, c): (one * c).as_edits(m) for c in (1.0, 2.0, 4.0)}
    targets = sorted({int(m.tokens(word, special=False).row(0)[0]) for word in WORDS})
    asked = [passage(m, start + prompt).ids for prompt in PROMPTS]
    found = {key: torch.zeros(len(asked)) for key in runs}
    for part in continued(m, [Passage((*ids, targets[0]), len(ids)) for ids in asked], runs):
        found[part.run][part.rows] = part.logits[:, 0].softmax(-1)[:, targets].sum(-1).log()
    texts = [passage(m, start + text).ids for text in data.NEUTRAL[:6]]
    own = {key: edits for key, edits in runs.items() if key == 0.0 or key[0] == "own"}
    front = v.record["tokens"] + 1  # the addition is made to a prompt, so the texts' first tokens are one
    nats = log_likelihoods(m, [Passage(ids, front) for ids in texts], own)
    perplexity = {key: round(float((-nats.per_token(key).mean()).exp()), 1) for key in own}
    row: dict[str, Any] = {"prompts": len(PROMPTS), "perplexity of another topic, c=0": perplexity[0.0]}
    for c in (1.0, 2.0, 4.0):
        other = torch.stack([found[i, c] for i in range(controls)]).mean(0)
        row[f"c={c:g}"] = {
            "change": _interval((found["own", c] - found[0.0]).numpy()),
            "beyond random": _interval((found["own", c] - other).numpy()),
            "perplexity of another topic": perplexity["own", c],
        }  # fmt: skip
    return row


# -- a bandit told in words ------------------------------------------------------------------------------------
ARMS = [("red", "blue"), ("left", "right"), ("one", "two"), ("north", "south"), ("gold", "silver"), ("cat", "dog"),
        ("black", "white"), ("sun", "moon"), ("apple", "orange"), ("east", "west"), ("king", "queen"),
        ("green", "yellow")]  # fmt: skip
ROUNDS, UNDECIDED = 8, 4


def game(arms: tuple[str, str], swap: bool) -> list[str]:
    """The player's prompts, round by round: it tries both arms in turn, then keeps to the one that pays."""
    good, bad = arms[::-1] if swap else arms
    text = f"A game with two machines, {arms[0]} and {arms[1]}. In each round the player chooses one of them.\n"
    prompts = []
    for t in range(ROUNDS):
        prompts.append(f"{text}Round {t + 1}: the player chooses")
        arm = (good, bad)[(t + swap) % 2] if t < UNDECIDED else good
        text = f"{prompts[-1]} {arm} and {'wins' if arm == good else 'loses'}.\n"
    return prompts


def bandit(m: Any, controls: int) -> dict[str, Any]:
    """Entropy (nats) of the choice in the last round over beta, with vectors of shuffled weights beside.

    Fitted on the games of half the pairs of arms, scored on the others'.
    """
    half, layer = len(ARMS) // 2, m.n_layers // 2
    seen = [(prompt, arms) for arms in ARMS[:half] for swap in (False, True) for prompt in game(arms, swap)]
    late = [(game(arms, swap)[-1], arms) for arms in ARMS[half:] for swap in (False, True)]
    weight = _entropies(m, seen, {0.0: []})[0.0]
    games = torch.arange(len(seen)) // ROUNDS
    place = f"resid_post[{layer}]"
    z = read(m, [passage(m, prompt) for prompt, _ in seen], [place])[place]

    def vector(weights: torch.Tensor) -> Any:  # as `steering.east`, whose reading of the prompts is done once here
        return steering.SteeringVector.of(m, {place: weighted(z, weights, games)}, method="east")

    v, generator = vector(weight), torch.Generator().manual_seed(0)
    betas = (1.0, 2.0, 4.0, 8.0)
    runs: dict[Any, Any] = {0.0: []} | {("own", beta): (v * beta).as_edits(m) for beta in betas}
    for i in range(controls):
        order = torch.cat([torch.randperm(ROUNDS, generator=generator) + ROUNDS * k for k in range(2 * half)])
        plain = vector(weight[order])
        runs |= {("shuffled", beta, i): (plain * beta).as_edits(m) for beta in betas}
        runs |= {("as long", beta, i): (plain.with_norm(v.norm) * beta).as_edits(m) for beta in betas}
    found = _entropies(m, late, runs)
    row: dict[str, Any] = {
        "games": len(late), "norm": round(v.norm, 2), "norm of the stream": round(float(z.norm(dim=1).mean()), 1),
        "entropy by round, fitted games": [round(float(x), 3) for x in weight.view(-1, ROUNDS).mean(0)],
        "beta=0": _interval(found[0.0].numpy()),
    }  # fmt: skip
    for beta in betas:
        own = found["own", beta]
        row[f"beta={beta:g}"] = {"entropy": _interval(own.numpy())}
        for kind in ("shuffled", "as long"):
            other = torch.stack([found[kind, beta, i] for i in range(controls)]).mean(0)
            row[f"beta={beta:g}"] |= {
                kind: _interval(other.numpy()),
                f"beyond {kind}": _interval((own - other).numpy()),
            }
    for t in (0.5, 2.0, 4.0):
        row[f"temperature {t:g}"] = _interval(_entropies(m, late, {0.0: []}, t)[0.0].numpy())
    return row


def _entropies(m: Any, prompts: list[tuple[str, tuple[str, str]]], runs: Any, temperature: float = 1.0) -> Any:
    """Entropy (nats) of the choice between a prompt's two arms under each run: run -> [prompt]."""
    passages = [passage(m, prompt, f" {arm}") for prompt, arms in prompts for arm in arms]
    nats = log_likelihoods(m, passages, runs).nats
    logp = {key: (each.view(-1, 2) / temperature).log_softmax(-1) for key, each in nats.items()}
    return {key: -(each.exp() * each).sum(-1) for key, each in logp.items()}
