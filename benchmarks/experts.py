"""What the expert tools cost: statistics beside a plain pass, a sweep beside one forward per expert, one estimate.

    python benchmarks/experts.py                                   a random OLMoE of the size of olmoe-mini
    python benchmarks/experts.py --model olmoe-mini --json         the trained one

Ratios of processor time within one run, methods alternating; medians over rounds. The loop that a sweep is held
against is the literal one, ``for each expert: with m.intervene(zero): m(tokens)``; it is timed on every eighth expert
and the sum scaled up, and the sweep's numbers are compared with its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import interp
from interp import edits, experts
from interp.experts.batches import Corpus, Window

MINI = {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 84, "vocab_size": 4096,
        "max_position_embeddings": 256, "head_dim": 32}  # fmt: skip


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def random_text(m: interp.Model, rows: int, length: int, labels: int = 1) -> Corpus:
    """Windows of random tokens: enough for costs, which depend on which tokens they are only through the routing."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, m.d_vocab, (rows, length), generator=generator).tolist()
    windows = [Window(i % labels, i, row) for i, row in enumerate(ids)]
    return Corpus([f"label {i}" for i in range(labels)], windows, torch.arange(rows) % labels)


def statistics_cost(m: interp.Model, rounds: int) -> list[dict[str, Any]]:
    """Routing statistics as multiples of a plain forward pass over the same batches."""
    data = random_text(m, 64, 128, labels=6)

    def plain() -> None:
        for batch in data.batches(m):
            m(batch.tokens)

    runs: dict[str, Callable[[], Any]] = {
        "routing": lambda: experts.routing(m, data),
        "routing, no documents kept": lambda: experts.routing(m, data, documents=0),
        "with norms": lambda: experts.routing(m, data, norms=True),
        "with everything": lambda: experts.routing(m, data, norms=True, positions=True, together=True, examples=5),
    }
    plain()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        base = seconds(plain)[0]
        for name, run in runs.items():
            times[name].append(seconds(run)[0] / base)
    return [{"case": "statistics", "what": name, "ratio": statistics.median(t), "low": min(t), "high": max(t)}
            for name, t in times.items()]  # fmt: skip


def sweep_cost(m: interp.Model, rows: int, length: int, last: bool, rounds: int) -> dict[str, Any]:
    """One exact sweep of all experts, beside one full forward pass per expert."""
    data = random_text(m, rows, length)
    tokens = next(data.batches(m, 10**9)).tokens
    metric: Any = (lambda logits: logits[:, -1, 5] - logits[:, -1, 7]) if last else "loss"
    layers = m.anatomy.having("expert_weight")
    some = [(layer, e) for layer in layers for e in range(0, m.n_experts, 8)]

    def value() -> float:
        logits = m(tokens)
        if last:
            return float(metric(logits).mean())
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens.ids[:, 1:].flatten()))

    def loop() -> list[float]:
        found = []
        for layer, expert in some:
            with m.intervene(edits.zero(f"expert_weight[{layer}, expert={expert}]")):
                found.append(value())
        return found

    before, ratios, table, literal = value(), [], None, []
    for _ in range(rounds):
        slow, literal = seconds(loop)
        quick, table = seconds(lambda: experts.sweep(m, data, metric=metric))
        ratios.append(slow * len(layers) * m.n_experts / len(some) / quick)
    assert table is not None
    mine = table.set_index(["layer", "expert"])["value"]
    error = max(abs(mine[pair] - (after - before)) for pair, after in zip(some, literal, strict=True))
    what = f"{rows} x {length} tokens, {'a logit difference at the last token' if last else 'loss'}"
    return {"case": "sweep", "what": what, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            "error": error}  # fmt: skip


def attribution_cost(m: interp.Model, rounds: int) -> dict[str, Any]:
    """All removals estimated at once, as a multiple of a plain forward pass."""
    data = random_text(m, 8, 128)
    tokens = next(data.batches(m, 10**9)).tokens
    ratios = []
    for _ in range(rounds):
        base = seconds(lambda: m(tokens))[0]
        ratios.append(seconds(lambda: experts.attribute(m, data, mode="reroute"))[0] / base)
    return {"case": "attribution", "what": "all experts, content and routing", "ratio": statistics.median(ratios),
            "low": min(ratios), "high": max(ratios)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a zoo name; default a random one of olmoe-mini's size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    m = interp.load(given.model) if given.model else interp.load("tiny:olmoe", **MINI)
    rows = statistics_cost(m, given.rounds)
    rows += [
        sweep_cost(m, *size, given.rounds) for size in ((1, 32, True), (1, 32, False), (1, 128, False), (8, 64, False))
    ]
    rows.append(attribution_cost(m, given.rounds))
    if given.json:
        print(json.dumps({"model": m.name, "rounds": given.rounds, "rows": rows}, indent=1))
        return
    print(repr(m))
    for row in rows:
        unit = "x quicker than the loop" if row["case"] == "sweep" else "x a forward pass"
        error = f", differs by {row['error']:.1e}" if "error" in row else ""
        print(
            f"{row['case']:12s} {row['what']:50s} {row['ratio']:6.2f} {unit} "
            f"({row['low']:.2f}-{row['high']:.2f}){error}"
        )


if __name__ == "__main__":
    main()
