"""The measured numbers as a Markdown page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

HEAD = """# What reading and writing costs

    python benchmarks/capture.py --all --markdown benchmarks/README.md      # makes this page
    python benchmarks/capture.py --model olmoe --dtype bfloat16 --rounds 9  # one model; --json, --help

Each ratio is the median over {rounds} rounds of *method / plain forward pass*, both timed in the same round, in one
process; every method runs once a round, in shuffled order. In brackets the smallest and the largest ratio. CPU time
counts all threads and does not grow while a neighbour has the processor. "again" is the plain pass a second time: how
far it is from 1.00 is the noise. Every method reads the same parameters in memory and makes the whole forward pass, up
to the logits. "Agrees" is the largest difference from what interp captured, relative to the largest value of that
tensor (0: the same bits); it is taken outside the clock. Peers that need other versions of their libraries run in a
process of their own, beside a plain pass and interp in that same process.

SmolLM2 is SmolLM2-135M-Instruct (30 layers, d_model 576); OLMoE is a random model of that family's shape (16 layers,
d_model 512, 8 heads, 64 experts of width 256, top-8).
"""

MACHINE = ("Measured on {cpu}, {cores} cores, {threads} torch threads ({capability}), {system}, "
           "Python {python}; {versions}.")


#: The headings of our sections; what stands under any other is another benchmark's.
OURS = re.compile(r"Against the targets|Writing a dataset|\S+, \S+, batches of ")


def merged(new: str, old: str) -> str:
    """`new`, and behind it the sections of `old` that another benchmark wrote."""
    sections = re.split(r"^(?=## )", old, flags=re.MULTILINE)[1:]  # what stands before the first heading is ours
    others = [text.rstrip() + "\n" for text in sections if not OURS.match(text.removeprefix("## "))]
    return "\n".join([new, *others]) if others else new


def page(document: dict[str, Any]) -> str:
    """Our part of the page."""
    runs = document["runs"]
    counts = sorted({row["rounds"] for run in runs for row in run["rows"] if "rounds" in row})
    parts = [HEAD.format(rounds=" to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))))]
    facts = document["machine"]
    parts.append(MACHINE.format(**facts | {"versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items())}))
    parts.append("\n## Against the targets\n")
    parts += _summary(runs)
    noisy = [f"{run['model']} {run['dtype']}" for run in runs if run["noise"] > 1.25]
    if noisy:
        parts.append("\nThe machine was not quiet: the plain pass itself varied by more than 1.25 x in "
                     f"{', '.join(noisy)}. Trust CPU time there, and run again.")
    parts += tables(document)
    return "\n".join(parts) + "\n"


def tables(document: dict[str, Any]) -> Iterator[str]:
    """Every measured row."""
    for run in document["runs"]:
        yield f"\n## {run['model']}, {run['dtype']}, batches of {run['batch']} x {run['length']} tokens\n"
        yield from _table(run)
    if document.get("write"):
        yield "\n## Writing a dataset\n"
        yield from _written(document["write"])


def _summary(runs: list[dict[str, Any]]) -> Iterator[str]:
    """One line per model and case: our ratio, the target, and the peers' ratios."""
    yield "| model | case | interp, wall | CPU | target | TransformerLens, nnsight, nnterp (wall) |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for run in runs:
        for case in run["cases"]:
            rows = [r for r in run["rows"] if r["case"] == case["name"] and r.get("wall")]
            mine = next(r for r in rows if r["method"] == "interp" and not r["environment"])
            peers = [f"{r['method'].split(' (')[0]} {r['wall']['median']:.2f}" for r in rows
                     if r["method"].startswith(("TransformerLens", "nnsight", "nnterp"))]
            target, told = f"{case['target']:.2f}" if case["target"] else "", "; ".join(peers) or "none offers it"
            yield (f"| {run['model']} {run['dtype']} | {case['title']} | {mine['wall']['median']:.2f} "
                   f"| {mine['cpu']['median']:.2f} | {target} | {told} |")


def _table(run: dict[str, Any]) -> Iterator[str]:
    """All methods of one model."""
    yield "| case | method | wall | fastest | CPU | ms | agrees | |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    titles = {case["name"]: case["title"] for case in run["cases"]}
    for row in sorted(run["rows"], key=lambda row: list(titles).index(row["case"])):
        title, place = titles[row["case"]], f" (beside {row['environment']})" if row["environment"] else ""
        if place and row["method"] != "interp":
            place = " (own process)"
        if not row.get("wall"):
            yield f"| {title} | {row['method']} | | | | | | {_cell(row['note'])} |"
            continue
        agrees = "" if row["error"] is None else f"{row['error']:.0e}" if row["error"] else "0"
        yield (f"| {title} | {row['method']}{place} | {_ratio(row['wall'])} | {row['best']:.2f} | {_ratio(row['cpu'])} "
               f"| {row['ms']:.0f} | {agrees} | {_cell(row['note'])} |")


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _written(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield ("`store.write` without the model (its activations are replayed), beside `safetensors.save_file` of "
           "the same bytes, ready in memory. Rates are medians; ratios are of the same round, raw time / time.\n")
    yield "| what | MB | method | MB/s | rate against raw with fsync | against raw |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        yield (f"| {row['load']} | {row['megabytes']:.0f} | {row['method']} | {row['rate']:.0f} "
               f"| {_ratio(row['synced'])} | {_ratio(row['raw'])} |")
