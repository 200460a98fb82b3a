"""Fitting a probe per layer: interp against the loop over scikit-learn's LogisticRegression, in one process, by turns.

    python benchmarks/probes.py --capture acts                    # SmolLM2's residual streams on disk, resumable
    python benchmarks/probes.py --activations acts                # binary: is the token's text fiction?
    python benchmarks/probes.py --capture acts --tokens 81000 --of $(seq 0 29)     # all layers, 6 GB
    python benchmarks/probes.py --activations acts --solvers lbfgs --seconds 600   # ... against scikit-learn's default
    python benchmarks/probes.py --activations acts --penalties .001 .01 .1 1   # ... choosing C, as by_layer does
    python benchmarks/probes.py --activations acts --label domain # nine classes
    python benchmarks/probes.py --layers 30 --seconds 7200        # made up, of the full size: 30 x 100,000
    python benchmarks/probes.py --questions                       # what SmolLM2 knows: all ready questions, or some
    python benchmarks/probes.py --routing domain language         # what monet-mini's routing knows

A layer is [token, 576] in float32, standardised, the same penalties C for both; a fifth of the documents is held out,
half of them to choose the penalty by, where there are several, and half to score what was chosen.
Times are of fitting alone, data in memory, standardising included. In each round every method fits one and the same
layer, in shuffled order; what counts is the ratio of that round, and the layers' sum. scikit-learn fits as most people
call it (lbfgs, its default tolerance, as many iterations as that takes) and by its quickest solver for many rows
(newton-cholesky). What "the same accuracy" means is shown beside the times: held-out accuracy, and by how much the
objective of each lies above the lowest of them, relative to that.

Made-up activations are drawn like a residual stream: a few directions hold most of the variance, one dimension is
massive, and the label lies along a direction of middling size.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts this folder first on the path; this file would then be found where the package `probes` is meant
sys.path.append(sys.path.pop(sys.path.index(str(Path(__file__).parent.resolve()))))

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from _clock import Ratio, interleave


@dataclass(frozen=True)
class Layer:
    """One layer's features, standardisation left to the methods, with labels and what is held out."""

    name: str
    X: np.ndarray
    y: np.ndarray
    X_validation: np.ndarray
    y_validation: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def capture(folder: str, tokens: int, layers: list[int]) -> None:
    """Writes the residual streams of SmolLM2 over the domain corpus, labels beside them; resumes what is there."""
    import interp
    from interp import corpora, store

    m = interp.load("smollm2")
    by_label = corpora.load("train", group="domain", max_bytes=400_000)
    each = tokens // (128 * len(by_label)) + 1
    rows = [
        (text[:1200], label) for i in range(each) for label, of in by_label.items() if i < len(of) for text in [of[i]]
    ]
    texts, labels = zip(*rows, strict=True)
    sites = [f"resid_post[{layer}]" for layer in layers]
    ds = store.write(m, list(texts), sites, folder, labels=list(labels), dtype="float32", context=128, batch_size=16,
                     documents_per_range=64)  # fmt: skip
    print(ds)


def stored(folder: str, label: str, layers: list[str]) -> Iterator[Layer]:
    """The layers of a dataset that `capture` wrote."""
    from interp import store

    ds = store.open(folder)
    frame = ds.tokens(["label", "document"]).to_pandas()
    y = frame.label.to_numpy() if label == "domain" else (frame.label == label).to_numpy().astype(int)
    part = frame.document.to_numpy() % 10
    parts = [part % 5 != 0, part == 0, part == 5]
    for site in layers or ds.sites:
        X = ds[site][:].float().numpy()
        yield Layer(site, *(a[rows] for rows in parts for a in (X, y)))


def made_up(n_layers: int, tokens: int, classes: int) -> Iterator[Layer]:
    """Activations like a residual stream's [token, 576]."""
    for layer in range(n_layers):
        rng = np.random.default_rng(layer)
        size = np.logspace(1, -1.5, 576, dtype=np.float32)
        basis = np.linalg.qr(rng.standard_normal((576, 576)))[0].astype(np.float32)
        z = rng.standard_normal((tokens * 5 // 4, 576), dtype=np.float32)
        score = z[:, 40:60] @ rng.standard_normal((20, classes), dtype=np.float32) * 0.5
        y = (score + rng.gumbel(size=score.shape)).argmax(1)
        X = (z * size) @ basis
        X[:, 7] += 300
        ends = [slice(tokens), slice(tokens, tokens * 9 // 8), slice(tokens * 9 // 8, None)]
        yield Layer(f"made-up layer {layer}", *(a[rows] for rows in ends for a in (X, y)))


def ours(layer: Layer, Cs: list[float]) -> list[Any]:
    from probes import LinearProbe

    return list(LinearProbe.path(layer.X, layer.y, Cs))


def theirs(layer: Layer, Cs: list[float], solver: str) -> list[Any]:
    """Standardised once, then a fit for each penalty, each from where the last stronger one ended."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler()
    X, found, last = scale.fit_transform(layer.X), [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for C in Cs:
            model = LogisticRegression(C=C, solver=solver, max_iter=10_000, warm_start=last is not None)
            if last is not None:
                model.coef_, model.intercept_ = last.coef_.copy(), last.intercept_.copy()
            last = model.fit(X, layer.y)
            found.append(make_pipeline(scale, model))
    return found


def chosen(layer: Layer, fitted: list[Any]) -> int:
    """The strongest penalty of those that do best on validation."""
    return int(np.argmax([one.score(layer.X_validation, layer.y_validation) for one in fitted]))


def objective(layer: Layer, fitted: Any, C: float) -> float:
    """1/2 |w|^2 + C * loss at what a method found, weights in standardised units, in float64."""
    deviation = layer.X.std(0, dtype=np.float64)
    deviation[deviation == 0] = 1
    if hasattr(fitted, "steps"):
        weight, last = fitted[-1].coef_.astype(float), fitted[-1]
        raw, bias = weight / fitted[0].scale_, last.intercept_ - (weight / fitted[0].scale_) @ fitted[0].mean_
    else:
        raw, bias = fitted.coef_.astype(float), fitted.intercept_.astype(float)
    classes, numbers = np.unique(layer.y, return_inverse=True)
    loss, centre = 0.0, layer.X.mean(0, dtype=np.float64)
    for start in range(0, len(layer.X), 20_000):
        rows = slice(start, start + 20_000)
        score = (layer.X[rows] - centre) @ raw.T + (bias + raw @ centre)
        if len(classes) == 2:
            score = np.concatenate([np.zeros_like(score), score], 1)
        loss -= float(torch.from_numpy(score).log_softmax(1)[torch.arange(len(score)), numbers[rows]].sum())
    return 0.5 * float(((raw * deviation) ** 2).sum()) + C * loss


def measured(layer: Layer, rounds: int, solvers: list[str], seconds: float, Cs: list[float]) -> dict[str, Any]:
    """Times of one layer by turns, and how good each method's minima are."""
    runs: dict[str, Callable[[], Any]] = {"interp": lambda: ours(layer, Cs)}
    runs |= {f"scikit-learn, {solver}": partial(theirs, layer, Cs, solver) for solver in solvers}
    kept: dict[str, Any] = {}

    def keeping(name: str, run: Callable[[], Any]) -> Callable[[], None]:
        def once() -> None:
            kept[name] = run()

        return once

    times = interleave({name: keeping(name, run) for name, run in runs.items()}, rounds, seconds=seconds, warmups=0)
    values = {
        name: np.array([objective(layer, one, C) for one, C in zip(fitted, Cs, strict=True)])
        for name, fitted in kept.items()
    }
    least = np.min(list(values.values()), axis=0)
    row: dict[str, Any] = {"layer": layer.name, "tokens": len(layer.X), "classes": len(np.unique(layer.y)),
                           "rounds": len(times["interp"].wall)}  # fmt: skip
    for name, taken in times.items():
        best = chosen(layer, kept[name])
        row[name] = {
            "seconds": round(taken.best, 2), "CPU seconds": round(min(taken.cpu), 2),
            "accuracy": round(float(kept[name][best].score(layer.X_test, layer.y_test)), 4),
            "C": Cs[best], "objective above the lowest": [float(f"{v:.1e}") for v in values[name] / least - 1],
        }  # fmt: skip
        if name != "interp":
            ratio = Ratio.of(taken.wall, times["interp"].wall)
            row[name]["times slower"] = [round(x, 1) for x in (ratio.median, ratio.low, ratio.high)]
    return row


def answers(names: list[str] | None, groups: list[str], out: Path | None) -> None:
    """Prints what was found, one JSON document a line."""
    import _probe_answers

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    found = [] if names is None else [_probe_answers.questions(names, out)]
    for rows in [*found, *(_probe_answers.routing(group, out) for group in groups)]:
        for row in rows:
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capture", metavar="DIR", help="write SmolLM2's activations there, and stop")
    parser.add_argument("--activations", metavar="DIR", help="fit on these instead of made-up ones")
    parser.add_argument("--sites", nargs="*", default=[], help="of the dataset; default all")
    parser.add_argument("--label", default="fiction", help="a domain against the others, or 'domain' for all nine")
    parser.add_argument("--layers", type=int, default=2, help="made-up layers")
    parser.add_argument("--of", type=int, nargs="*", default=[0, 9, 19, 29], help="layers to capture")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=2, help="of made-up activations")
    parser.add_argument("--solvers", nargs="*", default=["lbfgs", "newton-cholesky"])
    parser.add_argument("--penalties", type=float, nargs="*", default=[0.1], help="C, strongest penalty first")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=200.0, help="after so long no new layer begins")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--questions", nargs="*", metavar="NAME", help="answer ready questions instead; default all")
    parser.add_argument("--routing", nargs="*", default=[], choices=["domain", "language"])
    parser.add_argument("--out", type=Path, help="a folder for the tables of these (parquet)")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.questions is not None or a.routing:
        answers(a.questions, a.routing, a.out)
        return
    if a.capture:
        capture(a.capture, a.tokens, a.of)
        return
    start, rows = time.perf_counter(), []
    for few in made_up(1, 1000, 2):  # what is imported on first use is nobody's time
        measured(few, 1, a.solvers, a.seconds, a.penalties)
    layers = stored(a.activations, a.label, a.sites) if a.activations else made_up(a.layers, a.tokens, a.classes)
    for layer in layers:
        rows.append(measured(layer, a.rounds, a.solvers, a.seconds, a.penalties))
        print(json.dumps(rows[-1]), flush=True)
        if time.perf_counter() - start > a.seconds:
            break
    for clock in ("seconds", "CPU seconds"):
        total = {name: sum(row[name][clock] for row in rows) for name in rows[0] if isinstance(rows[0][name], dict)}
        sums = {name: round(s, 1) for name, s in total.items()}
        slower = {name: round(s / total["interp"], 2) for name, s in total.items()}
        print(json.dumps({"layers": len(rows), clock: sums, "times slower": slower}))


if __name__ == "__main__":
    main()
