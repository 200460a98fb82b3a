"""What steering costs: generating under a vector, and a layer x multiplier sweep beside the loop that others write.

    python benchmarks/steering.py                  both on SmolLM2, small settings
    python benchmarks/steering.py --items 40 --layers 30 --rounds 9

Generation: seconds per call with and without a vector in force, at batch 1 and 16, interleaved in shuffled order; the
target is at most 1.03 x. "again" is the plain call a second time: what the machine's own noise amounts to.

Sweep: `steering.sweep` beside the loop of repeng and steering-vectors, that is, for each layer and multiplier one
forward pass over each whole prompt with answer under a forward hook (written out here with bare hooks, so that
neither package has to fit the installed transformers; hooks cost them no less). The numbers are compared before the
clock starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from _clock import Ratio, interleave

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


def generation(m: Any, batch: int, tokens: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Generating `tokens` new tokens with a vector in force, over the same without."""
    v = steering.SteeringVector.of(m, {f"resid_post[{m.n_layers // 2}]": 0.01 * torch.randn(m.d_model)})
    prompts = m.tokens([p for p, _, _ in questions(batch)])

    def plain() -> Any:
        return m.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens)

    def steered() -> Any:
        with m.intervene(v):
            return m.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens)

    times = interleave({"plain": plain, "again": plain, "steered": steered}, rounds, seconds=seconds)
    ratios = {name: Ratio.of(taken.wall, times["plain"].wall) for name, taken in times.items()}
    return {
        "case": f"generate, batch {batch}, {tokens} tokens", "rounds": len(times["plain"].wall),
        "seconds": statistics.median(times["plain"].wall),
        **{name: [round(x, 3) for x in (r.median, r.low, r.high)] for name, r in ratios.items() if name != "plain"},
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


def sweeping(m: Any, items: int, n_layers: int, chat: bool) -> dict[str, Any]:
    """One sweep each way, once; the loop is too slow to be repeated."""
    pairs, multipliers = questions(items), [-2.0, -1.0, 1.0, 2.0]
    layers = sorted({round(i * (m.n_layers - 1) / max(1, n_layers - 1)) for i in range(n_layers)})
    v = steering.caa(m, pairs, layer=layers, chat=chat)
    steering.sweep(m, v.only(layers[-1]), pairs[:2], [1.0], chat=chat)  # warm
    start = time.perf_counter()
    ours = steering.sweep(m, v, pairs, multipliers, chat=chat)
    mine = time.perf_counter() - start
    start = time.perf_counter()
    theirs = loop(m, v, pairs, multipliers, layers, chat)
    other = time.perf_counter() - start
    found = ours.set_index(["layer", "multiplier"]).value
    error = max(abs(found[key] - value) for key, value in theirs.items())
    return {
        "case": f"sweep, {items} items x {len(layers)} layers x {len(multipliers)} multipliers",
        "seconds": round(mine, 2),
        "loop": round(other, 2),
        "times quicker": round(other / mine, 2),
        "largest difference (nats per token)": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--items", type=int, default=6)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["generate", "sweep"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    m = interp.load(given.model)
    rows = []
    if given.only != "generate":
        chat = bool(getattr(m.tokenizer, "chat_template", None))
        rows.append(sweeping(m, given.items, given.layers, chat))
        print(json.dumps(rows[-1]), flush=True)
    if given.only != "sweep":
        for batch in map(int, given.batches.split(",")):
            rows.append(generation(m, batch, given.tokens, given.rounds, given.seconds))
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
