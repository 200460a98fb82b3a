"""What two models know: the ready questions on SmolLM2, and domain and language on monet-mini from routing alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interp
import probes
from interp import corpora
from probes.questions import QUESTIONS, ask


def questions(names: list[str], out: Path | None, controls: int = 20) -> Iterator[dict[str, Any]]:
    """Each ready question: where it can be read, beside its controls, and whether the output follows the probe."""
    m = interp.load("smollm2")
    for name in names or QUESTIONS:
        answer = ask(m, name, controls=controls)
        table, a, c = answer.layers, answer.layers.attrs, answer.causal.attrs
        shuffled = table[table.baseline == "shuffled"].set_index("node").value
        if out is not None:
            table.to_parquet(out / f"{name}_layers.parquet")
            answer.causal.to_parquet(out / f"{name}_causal.parquet")
        yield {
            "question": name, "asks": answer.question.asks, "texts": a["examples"], "best": a["best"],
            "accuracy": _with_interval(a["best_value"], a["best_low"], a["best_high"]),
            "shuffled": round(float(shuffled[a["best"]]), 2),
            "bag of tokens": round(float(table[table.baseline == "bag of tokens"].value.iloc[0]), 2),
            "pushed at": answer.node, "slope": round(c["slope"], 3),
            "random slopes": [round(c["random_low"], 3), round(c["random_high"], 3)], "follows": c["causal"],
        }  # fmt: skip


def routing(group: str, out: Path | None, each: int = 48, characters: int = 300) -> Iterator[dict[str, Any]]:
    """Which domain or language a passage is of, from monet-mini's routing, from its residual stream and from words."""
    m = interp.load("monet-mini")
    texts, labels, documents = passages(corpora.load("test", group=group), each, characters)
    table = probes.by_site(
        m, texts, labels, ["routing[*]", "resid_post[*]"], at="mean", groups=documents, metric="balanced",
        controls=("shuffled", "random model", "bag of tokens"),
    )  # fmt: skip
    if out is not None:
        table.to_parquet(out / f"monet_{group}.parquet")
    for row in table.to_dict("records"):
        if row["baseline"] != "shuffled":
            by_chance = table[(table.node == row["node"]) & (table.baseline == "shuffled")].value
            yield {"asks": group, "classes": len(set(labels)), "passages": len(texts), "node": row["node"],
                   "baseline": row["baseline"], "balanced accuracy": _with_interval(*(row[k] for k in _BOUNDS)),
                   "shuffled": round(float(by_chance.iloc[0]), 2) if len(by_chance) else None}  # fmt: skip


def passages(by_label: dict[str, list[str]], each: int, characters: int) -> tuple[list[str], list[str], list[str]]:
    """`each` passages a label, taken from its documents by turns, with labels and the documents they are from."""
    texts, labels, documents = [], [], []
    for label, of in by_label.items():
        places = ((i, start) for start in range(0, 10**6, characters) for i in range(len(of)))
        found = ((i, of[i][start : start + characters]) for i, start in places)
        for _ in range(each):
            i, text = next((i, text) for i, text in found if len(text) > characters // 2)
            texts.append(text)
            labels.append(label)
            documents.append(f"{label} {i}")
    return texts, labels, documents


_BOUNDS = ("value", "low", "high")


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
