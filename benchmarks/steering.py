"""What steering costs, and what it does to a real model.

    python benchmarks/steering.py                              the cost, on SmolLM2, small settings
    python benchmarks/steering.py --items 40 --layers 30 --rounds 9
    python benchmarks/steering.py --behaviours DIR             dose and response beside random vectors
    python benchmarks/steering.py --equal-kl DIR               methods ranked at equal damage
    python benchmarks/steering.py --function-vectors DIR       in-context tasks without examples
    python benchmarks/steering.py --papers                     entropy of a bandit's player, activation addition, ...

Cost, generation: seconds per call with and without a vector in force, at batch 1 and 16, token by token in turns
(`_turns`): a call is the sum over its tokens of the median over rounds, with a 95 % interval over rounds, by wall clock
and by CPU time. The target is at most 1.03 x. "again" is the plain call a second time: the machine's own noise.
`--only fixed` counts what a vector adds to a token by itself.

Cost, sweep: `steering.sweep` beside the loop of repeng and steering-vectors, that is, for each layer and multiplier one
forward pass over each whole prompt with answer under a forward hook. `--peer` names a folder with steering-vectors
installed in it (``pip install --no-deps --target FOLDER steering-vectors``), whose own `patch_activations` is then
timed; without it the loop is written out with bare hooks, which cost no less. The numbers are compared as well.

DIR is laid out as `_steer_data` says. These runs print one JSON document per row and keep what they computed under
--out, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts this folder first on the path; this file would then be found where the package `steering` is meant
sys.path.append(sys.path.pop(sys.path.index(str(Path(__file__).parent.resolve()))))

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _turns import Turn, by_turns

import interp
import steering
from steering import pairs as _pairs


def questions(n: int) -> list[tuple[str, str, str]]:
    """Prompts of some 60 tokens with two short answers, made up of one frame and varied nouns."""
    things = ["garden", "engine", "library", "kitchen", "harbour", "orchestra", "school", "bakery", "railway", "museum"]
    frame = (
        "Somebody tells you about their {0}. It was closed for a while, then it was opened again by people who live "
        "near it. They ask what you think of the {0}, and whether you would go there on a day like today, number {1} "
        "of the year. What do you say?"
    )
    return [(frame.format(things[i % 10], i), "I would love to see it.", "I would not go near it.") for i in range(n)]


def generation(models: dict[str, Any], batch: int, tokens: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Generating `tokens` new tokens with a vector in force, over the same without: by wall clock and by CPU time.

    `models` are one model, loaded once for each way. A round is a whole call of every way, its tokens by turns; what
    a call takes is the sum over its tokens of the median over rounds, and the interval is over rounds drawn anew.
    """
    m = models["steered"]
    v = steering.SteeringVector.of(m, {f"resid_post[{m.n_layers // 2}]": 0.01 * torch.randn(m.d_model)})
    prompts = [p for p, _, _ in questions(batch)]

    def call(turn: Turn) -> None:
        model = models[turn.name]
        with model.intervene(v) if turn.name == "steered" else contextlib.nullcontext():
            model.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens, streamer=turn)

    taken: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in models}
    start = time.perf_counter()
    for number in range(-1, rounds):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        gc.collect()
        spent = by_turns(dict.fromkeys(models, call), number)
        if number >= 0:
            for name in models:
                taken[name].append(spent[name])
    found = {name: np.array(spent) for name, spent in taken.items()}  # [round, token, clock]
    drawn = np.random.default_rng(0).integers(0, len(found["plain"]), (1000, len(found["plain"])))
    drawn = np.concatenate([np.arange(len(found["plain"]))[None], drawn])
    per_call = {name: np.array([np.median(spent[rows], 0).sum(0) for rows in drawn]) for name, spent in found.items()}
    row: dict[str, Any] = {"case": f"generate, batch {batch}, {tokens} tokens", "rounds": len(found["plain"]),
                           "seconds": round(float(per_call["plain"][0, 0]), 3)}  # fmt: skip
    for name in [n for n in models if n != "plain"]:
        ratio = per_call[name] / per_call["plain"]
        for clock, suffix in enumerate(("", ", CPU time")):
            low, high = np.quantile(ratio[1:, clock], [0.025, 0.975])
            row[name + suffix] = [round(float(x), 4) for x in (ratio[0, clock], low, high)]
    return row


def middle(numerator: list[float], denominator: list[float], draws: int = 2000) -> list[float]:
    """Median of the same-round ratios and its 95 % interval, rounds drawn anew."""
    ratios = np.array(numerator) / np.array(denominator)
    drawn = np.median(np.random.default_rng(0).choice(ratios, (draws, len(ratios))), 1)
    return [round(float(x), 6) for x in (np.median(ratios), *np.quantile(drawn, [0.025, 0.975]))]


def fixed(m: Any, batches: list[int], tokens: int, seconds: float) -> dict[str, Any]:
    """What a vector adds to a token, counted where a token costs next to nothing, over what one costs in `m`: CPU time.

    The Python that a vector at one site adds is the same in every model. Each round is plain, steered, steered, plain,
    so that a drift of the machine cancels.
    """
    small = interp.load("tiny:llama")
    v = steering.SteeringVector.of(small, {f"resid_post[{small.n_layers // 2}]": 0.01 * torch.randn(small.d_model)})

    def spent(model: Any, ids: torch.Tensor, n: int, steer: bool = False) -> float:
        start = time.process_time()
        with model.intervene(v) if steer else contextlib.nullcontext():
            model.generate(ids, max_new_tokens=n, min_new_tokens=n)
        return time.process_time() - start

    ids, added, again, start = torch.arange(4, 8)[None], [], [], time.perf_counter()
    for steer in (False, True):
        spent(small, ids, tokens, steer)
    while time.perf_counter() - start < seconds or len(added) < 5:
        first, one, two, last = (spent(small, ids, tokens, steer) for steer in (False, True, True, False))
        added.append((one + two - first - last) / (2 * tokens))
        again.append((last - first) / tokens)
    plain = {}
    for batch in batches:
        ids = torch.arange(100, 100 + 8 * batch).view(batch, 8)
        spent(m, ids, 2)
        plain[batch] = statistics.median((spent(m, ids, 12) - spent(m, ids, 4)) / 8 for _ in range(3))
    return {
        "case": f"added by one vector, {tokens} tokens a call", "rounds": len(added),
        "milliseconds a token": [round(1000 * x, 3) for x in middle(added, [1.0] * len(added))],
        "again": [round(1000 * x, 3) for x in middle(again, [1.0] * len(again))],
        **{f"over a token of {m.name}, batch {b}": [round(x / t, 4) for x in middle(added, [1.0] * len(added))]
           for b, t in plain.items()},
    }  # fmt: skip


def loop(m: Any, v: Any, pairs: list[Any], multipliers: list[float], layers: list[int], chat: bool) -> dict[Any, float]:
    """The peers' way: every layer, multiplier and answer is a forward pass of its own over prompt and answer."""
    sides = _pairs.sides(m, pairs, chat=chat)
    out: dict[Any, float] = {}
    for layer in layers:
        vector = v.vectors[f"resid_post[{layer}]"]
        for k in multipliers:
            total = []
            for two in zip(*sides, strict=True):
                each = []
                for passage in two:

                    def hook(module: Any, args: Any, output: Any, start: int = passage.answer - 1) -> Any:
                        h = output[0] if isinstance(output, tuple) else output
                        h = h.clone()
                        h[:, start:] += k * vector  # noqa: B023 - it runs within this very pass
                        return (h, *output[1:]) if isinstance(output, tuple) else h

                    handle = m.hf.model.layers[layer].register_forward_hook(hook)
                    ids = torch.tensor([passage.ids])
                    with torch.no_grad():
                        logp = m.hf(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                    handle.remove()
                    places = torch.arange(passage.answer, ids.shape[1])
                    each.append(float(logp[places - 1, ids[0, places]].mean()))
                total.append(each[0] - each[1])
            out[layer, k] = sum(total) / len(total)
    return out


def peer_loop(
    folder: Path, m: Any, v: Any, pairs: list[Any], multipliers: list[float], layers: list[int], chat: bool
) -> dict[Any, float]:
    """The same grid by steering-vectors: its `SteeringVector.apply` around a pass over each prompt with answer.

    Its `min_token_index` says from which token on; as there, the vector is multiplied and applied anew for each.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from steering_vectors import SteeringVector as Peer  # type: ignore[import-not-found]

    sides = _pairs.sides(m, pairs, chat=chat)
    out: dict[Any, float] = {}
    for layer in layers:
        theirs = Peer(layer_activations={layer: v.vectors[f"resid_post[{layer}]"]}, layer_type="decoder_block")
        for k in multipliers:
            total = []
            for two in zip(*sides, strict=True):
                each = []
                for passage in two:
                    ids = torch.tensor([passage.ids])
                    with torch.no_grad(), theirs.apply(m.hf, multiplier=k, min_token_index=passage.answer - 1):
                        logp = m.hf(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                    places = torch.arange(passage.answer, ids.shape[1])
                    each.append(float(logp[places - 1, ids[0, places]].mean()))
                total.append(each[0] - each[1])
            out[layer, k] = sum(total) / len(total)
    return out


def sweeping(m: Any, items: int, n_layers: int, chat: bool, peer: Path | None = None) -> dict[str, Any]:
    """One sweep each way, once; the loop is too slow to be repeated."""
    pairs, multipliers = questions(items), [-2.0, -1.0, 1.0, 2.0]
    layers = sorted({round(i * (m.n_layers - 1) / max(1, n_layers - 1)) for i in range(n_layers)})
    v = steering.caa(m, pairs, layer=layers, chat=chat)
    ways: dict[str, Callable[[], Any]] = {
        "sweep": lambda: steering.sweep(m, v, pairs, multipliers, chat=chat),
        "loop": lambda: loop(m, v, pairs, multipliers, layers, chat),
    }
    if peer is not None:
        ways["steering-vectors"] = lambda: peer_loop(peer, m, v, pairs, multipliers, layers, chat)
    steering.sweep(m, v.only(layers[-1]), pairs[:2], [1.0], chat=chat)  # warm
    seconds, found = {}, {}
    for name, run in ways.items():
        start = time.perf_counter()
        found[name] = run()
        seconds[name] = time.perf_counter() - start
    ours = found.pop("sweep").set_index(["layer", "multiplier"]).value
    return {
        "case": f"sweep, {items} items x {len(layers)} layers x {len(multipliers)} multipliers",
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
        "times quicker than": {name: round(seconds[name] / seconds["sweep"], 2) for name in found},
        "largest difference (nats per token)": {
            name: max(abs(ours[key] - value) for key, value in each.items()) for name, each in found.items()
        },
    }


def cost(m: Any, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the two cost tables."""
    if given.only in (None, "sweep"):
        chat = bool(getattr(m.tokenizer, "chat_template", None))
        yield sweeping(m, given.items or 6, given.layers, chat, given.peer)
    if given.only in (None, "fixed"):
        yield fixed(m, [int(b) for b in given.batches.split(",")], given.tokens, given.seconds / 4)
    if given.only in (None, "generate"):
        models = {"plain": m, "again": interp.load(given.model), "steered": interp.load(given.model)}
        for batch in map(int, given.batches.split(",")):
            yield generation(models, batch, given.tokens, given.rounds, given.seconds)


def effect(m: Any, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of what was asked for by --behaviours, --equal-kl, --function-vectors or --papers."""
    given.out.mkdir(parents=True, exist_ok=True)
    shared = {"out": given.out, "only": given.names, "controls": given.controls}
    if given.behaviours:
        from _steer_behaviours import behaviours

        yield from behaviours(m, given.behaviours, layer=given.layer, fit=given.fit, items=given.items or 12,
                              chat=not given.plain, **shared)  # fmt: skip
    if given.equal_kl:
        from _steer_methods import equal_kl

        yield from equal_kl(m, given.equal_kl, layer=given.layer, fit=given.fit, items=given.items or 12,
                            chat=not given.plain, kl=given.kl, **shared)  # fmt: skip
    if given.function_vectors:
        from _steer_functions import Sizes, function_vectors

        sizes = Sizes(given.prompts, given.trials, given.choosing)
        yield from function_vectors(m, given.function_vectors, items=given.items or 40, sizes=sizes, **shared)
    if given.papers:
        from _steer_papers import papers

        yield from papers(m, **shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--behaviours", type=Path, metavar="DIR")
    parser.add_argument("--equal-kl", type=Path, metavar="DIR")
    parser.add_argument("--function-vectors", type=Path, metavar="DIR")
    parser.add_argument("--papers", action="store_true")
    parser.add_argument("--names", nargs="*", help="only behaviours, tasks or papers whose names begin so")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--fit", type=int, default=40, help="pairs to fit on")
    parser.add_argument("--controls", type=int, default=20)
    parser.add_argument("--kl", type=float, default=0.1, help="budget in nats per token of neutral text")
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    parser.add_argument("--out", type=Path, default=Path("steering-results"))
    parser.add_argument("--items", type=int, help="held-out items; for the sweep's cost, its items")
    parser.add_argument("--prompts", type=int, default=60, help="from which function vectors are read")
    parser.add_argument("--trials", type=int, default=20, help="shuffled prompts for the effects of heads")
    parser.add_argument("--choosing", type=int, default=20, help="examples that choose a function vector's settings")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", type=Path, help="a folder that has steering-vectors")
    parser.add_argument("--only", choices=["generate", "fixed", "sweep"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    m = interp.load(given.model)
    asked = given.behaviours or given.equal_kl or given.function_vectors or given.papers
    for row in effect(m, given) if asked else cost(m, given):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
