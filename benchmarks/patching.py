"""Activation patching: our exact sweep against TransformerLens's, and what the estimators cost and miss.

    python benchmarks/patching.py                      # SmolLM2, heads x positions of z, peer on a sample of patches
    python benchmarks/patching.py --whole              # the peer's whole sweep too: three tokens; --every 3 for a third
    python benchmarks/patching.py --peak               # memory of our sweep under several budgets
    python benchmarks/patching.py --cost               # what each estimator takes, in plain forward passes
    python benchmarks/patching.py --card --task ioi    # recall and relative cost of every estimator, with intervals
    python benchmarks/patching.py --shapes             # the same on random models of three shapes

Both sweeps run in one process, on the same weights and prompts, in turns: in each round ours runs whole and the peer
runs a random sample of the same patches (with --whole all of them, once), so the ratio compares seconds per patch of
one round. Values are compared patch by patch. Memory is what the process holds in RAM at its peak beyond what it held
before the sweep, in a process of its own for each budget.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
SHORT = "Paris is in", "Rome is in", " France", " Italy"  # every position differs: no patch is free
TIMED = ("atp", "atp+qk", "atp*", "secant+qk")
METHODS = ("atp", "atp+qk", "atp+graddrop", "atp*", "ig", "secant", "secant+qk")
TASKS = ("ioi", "capital_swap", "fully_random")
SITES = ["q[*]", "k[*]", "v[*]", "z[*]", "mlp_out[*]"]


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="rounds of the sweep, or of --cost")] = 3,
    sample: Annotated[int, typer.Option(min=2, help="patches that the peer runs in a round")] = 40,
    whole: Annotated[bool, typer.Option("--whole", help="the peer runs all patches of a short sweep, once")] = False,
    every: Annotated[int, typer.Option(min=1, help="every how many layers are swept")] = 1,
    budget: Annotated[int, typer.Option(help="bytes that our sweep may use")] = 2**28,
    threads: Annotated[int, typer.Option(help="torch threads; 0: torch's own choice")] = 0,
    peak: Annotated[bool, typer.Option("--peak", help="measure memory instead")] = False,
    cost: Annotated[bool, typer.Option("--cost", help="time the estimators instead")] = False,
    card: Annotated[bool, typer.Option("--card", help="compare estimators with exact patching, on SmolLM2")] = False,
    task: Annotated[list[str] | None, typer.Option(help="tasks of --card; repeatable")] = None,
    shapes: Annotated[bool, typer.Option("--shapes", help="the same on random models of three shapes")] = False,
    pairs: Annotated[int, typer.Option(min=1, help="prompt pairs of --card, --shapes and --cost")] = 6,
    method: Annotated[list[str] | None, typer.Option(help="estimators of --card and --shapes; repeatable")] = None,
    nodes: Annotated[int, typer.Option(min=2, help="nodes patched exactly by --card and --shapes")] = 600,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Time the sweep, measure its memory, time the estimators or grade them."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if card or shapes:
        methods = tuple(method or METHODS)
        document = (
            graded_shapes(pairs, nodes, methods) if shapes else graded_smollm2(task or TASKS, pairs, nodes, methods)
        )
    elif peak:
        document = {
            "what": "memory of a sweep of 360 heads and positions, SmolLM2, a metric of all logits",
            "rows": [memory(2**20 * n) for n in (48, 64, 96, 128, 256)],
        }
    elif cost:
        document = costs(rounds, pairs)
    else:
        document = sweep(rounds, sample, whole, every, budget)
    print(json.dumps(document) if as_json else text(document))


def sweep(rounds: int, sample: int, whole: bool, every: int, budget: int) -> dict[str, Any]:
    """z of every head at every position, denoising: ours whole, the peer's on a sample."""
    import pandas as pd
    import torch
    from transformer_lens import patching as peer
    from transformer_lens.model_bridge import TransformerBridge

    import interp
    from interp import metrics
    from interp.patching import patch

    m = interp.load("smollm2")
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=interp.load("smollm2").hf, tokenizer=m.tokenizer, device="cpu", dtype=torch.float32
    )
    prompts = SHORT if whole else (CLEAN, CORRUPT, " Mary", " John")
    clean, corrupt = (m.tokens(prompt).ids for prompt in prompts[:2])
    right, wrong = (m.tokenizer(w, add_special_tokens=False).input_ids[0] for w in prompts[2:])
    metric, length = metrics.logit_diff(right, wrong), clean.shape[1]
    layers = range(0, m.n_layers, every)
    nodes = [f"z[{i}]" for i in layers]
    rows = [(i, p, h) for i in layers for p in range(length) for h in range(m.n_heads)]
    draw, ours, theirs, gaps = torch.Generator().manual_seed(0), [], [], []
    patch(m, clean, corrupt, metric, "z[0]@-1")  # the map of the model's parts is made once
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        for _ in range(1 if whole else rounds):
            start = time.perf_counter()
            table = patch(m, clean, corrupt, metric, nodes, budget=budget)
            ours.append(time.perf_counter() - start)
            chosen = range(len(rows)) if whole else torch.randperm(len(rows), generator=draw)[:sample].tolist()
            index = pd.DataFrame([rows[i] for i in chosen], columns=["layer", "pos", "head_index"])
            start = time.perf_counter()
            values = peer.generic_activation_patch(
                bridge,
                corrupt,
                cache,
                lambda x: metric(x)[0],
                peer.layer_pos_head_vector_patch_setter,
                "z",
                index_df=index,
            )
            theirs.append((time.perf_counter() - start) / len(index) * len(rows))
            ordered = table.set_index(["layer", "position", "head"]).value
            made = torch.tensor([ordered[tuple(r)] for r in index.to_numpy().tolist()])
            gaps.append(float((made + table.attrs["baseline"]["corrupt"] - values).abs().max()))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "what": f"z of every head at every position, {len(layers)} layers of SmolLM2, denoise",
        "patches": len(rows),
        "tokens": length,
        "ours_s": ours,
        "peer_s": theirs,
        "peer_ran": len(rows) if whole else sample,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "largest_gap": max(gaps),
        "rows": table.attrs["rows"],
        "forward_passes": table.attrs["forward_passes"],
        "shortcuts": table.attrs["shortcuts"],
        "budget": budget,
        "threads": torch.get_num_threads(),
    }


def memory(budget: int) -> dict[str, Any]:
    """What a sweep takes in RAM, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory, budget).result()


def _memory(budget: int) -> dict[str, Any]:
    import psutil
    import torch

    import interp
    from interp.patching import patch

    torch.set_num_threads(1)
    m, me = interp.load("smollm2"), psutil.Process()
    m(m.tokens([CLEAN, CORRUPT]))
    patch(interp.load("tiny:llama"), [[5, 6]], [[5, 7]], lambda x: x[:, -1, 3], "z[0]")  # what it imports is no tensor
    m.anatomy  # noqa: B018 - the map of the model's parts is made once
    seen, done = [me.memory_info().rss], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(me.memory_info().rss)

    def everywhere(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1)[..., 100].mean(1)  # reads all logits, which are most of a patched run's memory

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    table = patch(m, CLEAN, CORRUPT, everywhere, "z[20:]", positions=[-4, -3, -2, -1], budget=budget)
    done.set()
    watcher.join()
    return {
        "budget": budget,
        "peak": max(seen) - seen[0],
        "rows": table.attrs["rows"],
        "looks": len(seen),
        "seconds": time.perf_counter() - start,
    }


def costs(rounds: int, pairs: int) -> dict[str, Any]:
    """Seconds of each estimator over those of a plain forward pass of the clean and of the corrupt prompts."""
    import torch
    from _clock import Ratio, interleave

    import interp
    from interp.patching import attribute, builders

    m = interp.load("smollm2")
    made = builders.ioi(m, pairs)
    metric, ids = made.metric(), torch.cat([made.clean.ids, made.corrupt.ids])
    counted: dict[str, dict[str, float]] = {}

    def plain() -> None:
        with torch.no_grad():
            m(ids)

    def run(method: str) -> None:
        counted[method] = attribute(m, made, None, metric, SITES, method).attrs["cost"]  # type: ignore[arg-type]

    m.anatomy  # noqa: B018 - the map of the model's parts is made once
    methods = {method: lambda method=method: run(method) for method in TIMED}
    times = interleave({"plain": plain, "again": plain, **methods}, rounds)
    rows = [
        {"method": name, "seconds": statistics.median(t.wall), "wall": vars(Ratio.of(t.wall, times["plain"].wall)),
         "cpu": vars(Ratio.of(t.cpu, times["plain"].cpu)), **counted.get(name, {})}
        for name, t in times.items()
    ]  # fmt: skip
    return {"what": f"estimators on SmolLM2 ({m.n_layers} layers), {pairs} pairs of {made.clean.ids.shape[1]} tokens, "
            f"nodes {' '.join(SITES)}, in plain passes over clean and corrupt prompts", "costs": rows,
            "threads": torch.get_num_threads()}  # fmt: skip


def graded_smollm2(tasks: Any, pairs: int, nodes: int, methods: tuple[str, ...]) -> dict[str, Any]:
    """The report card on IOI, capital swap and random pairs."""
    import interp
    from interp.patching import builders, report_card

    m, cards = interp.load("smollm2"), []
    for task in tasks:
        made = builders.BUILDERS[task](m, pairs)
        metric = made.metric() if all(made.answers) and all(made.wrong) else _first_token(m, made)
        cards.append({"task": task, **_card(report_card(m, made, None, metric, SITES, methods, sample=nodes))})
    return {"what": "estimators on SmolLM2", "cards": cards}


def _first_token(m: Any, made: Any) -> Any:
    """For unrelated texts: the log-probability of what the model itself says after the clean one."""
    from interp import metrics

    return metrics.log_prob(m(made.clean)[range(len(made)), made.clean.last].argmax(-1))


def graded_shapes(pairs: int, nodes: int, methods: tuple[str, ...]) -> dict[str, Any]:
    """The report card on random models, their queries sharpened so that attention is as peaked as in trained ones."""
    import torch

    from interp.patching import report_card

    cards = []
    for family in ("gemma3", "gpt_oss", "qwen3_moe"):
        for layers in (3, 12):
            m = sharpen(family, 10.0, layers)
            clean = torch.randint(3, 100, (pairs, 10), generator=torch.Generator().manual_seed(0))
            corrupt = clean.clone()
            corrupt[:, [2, 6]] = (clean[:, [2, 6]] + 40) % 97 + 3
            graded = report_card(m, clean, corrupt, lambda x: x[:, -1, 5] - x[:, -1, 7], SITES, methods, sample=nodes)
            cards.append({"task": f"{family}, {layers} layers", **_card(graded)})
    return {"what": "estimators on random models with sharp attention", "cards": cards}


def sharpen(family: str, factor: float, layers: int) -> Any:
    """A tiny random model whose attention scores are multiplied, so that attention is as peaked as in a trained one."""
    import interp

    hf: Any = interp.load(f"tiny:{family}", num_hidden_layers=layers).hf
    for module in hf.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling *= factor
    return interp.Model(hf, name=f"{family}, sharp")


def _card(graded: Any) -> dict[str, Any]:
    return {"sample": graded.attrs["sample"], "pairs": graded.attrs["pairs"], "cost": graded.attrs["cost"],
            "rows": graded.to_dict("records")}  # fmt: skip


def text(document: dict[str, Any]) -> str:
    """The document for people: tables in Markdown."""
    if "cards" in document:
        return "\n".join([document["what"], *(line for card in document["cards"] for line in _card_text(card))])
    if "costs" in document:
        lines = [document["what"], "", "| method | seconds | wall | CPU | counted |", "| --- | --- | --- | --- | --- |"]
        for row in document["costs"]:
            both = (f"{row[k]['median']:.1f} ({row[k]['low']:.1f}-{row[k]['high']:.1f})" for k in ("wall", "cpu"))
            passes = f"{row['forward']:.1f} + {row['backward']:.1f}" if "forward" in row else ""
            lines.append(f"| {row['method']} | {row['seconds']:.2f} | {' | '.join(both)} | {passes} |")
        return "\n".join(lines)
    if "rows" in document and isinstance(document["rows"], list):
        lines = [document["what"], "", "| budget, MiB | peak, MiB | patches | s |", "| --- | --- | --- | --- |"]
        return "\n".join(lines + [
            f"| {r['budget'] / 2**20:.0f} | {r['peak'] / 2**20:.0f} | {r['rows']} | {r['seconds']:.0f} |"
            for r in document["rows"]
        ])  # fmt: skip
    return "\n".join(f"{key:>15}: {value}" for key, value in document.items())


def _card_text(card: dict[str, Any]) -> list[str]:
    """One card: a line per kind of node; each measure of atp, and how the others differ from it on the same pairs."""
    cost = ", ".join(f"{name} {c['forward']:.1f} + {c['backward']:.1f}" for name, c in card["cost"].items())
    lines = ["", f"{card['task']}: {card['sample']} nodes, {card['pairs']} pairs; forward + backward passes: {cost}"]
    rows = {(r["measure"], r["site"], r["method"]): r for r in card["rows"]}
    others = [name for name in card["cost"] if name not in ("exact", "atp")]
    for measure in dict.fromkeys(row["measure"] for row in card["rows"]):
        lines += ["", f"| {measure} | atp | {' | '.join(others)} | random |", "| --- |" + " --- |" * (2 + len(others))]
        for site in dict.fromkeys(row["site"] for row in card["rows"]):
            plain, chance = rows[measure, site, "atp"], rows[measure, site, "random"]
            cells = [f"{site} ({plain['nodes']})", f"{plain['value']:.2f} [{plain['low']:.2f}, {plain['high']:.2f}]"]
            for name in others:
                r = rows[measure, site, name]
                cells.append(f"{r['value']:.2f} ({r['difference_low']:+.3f}, {r['difference_high']:+.3f})")
            lines.append(f"| {' | '.join([*cells, format(chance['value'], '.2f')])} |")
    return lines


if __name__ == "__main__":
    app()
