"""MOE-01. Monet: Mixture of Monosemantic Experts for Transformers (arXiv 2412.04139). Parts (c) to (g) of seven.

On monet-mini, a model we trained, and held-out text:

(c) The expert sets of different domains are disjoint; switching one domain's set off hurts that domain more than random
    experts of the same layers and frequency do, and the whole matrix of effects is printed with intervals.
(d) The same for natural languages.
(e) Experts are chosen by their correlation with a rude register, on conversations with one half of its words; switched
    off, they keep the model from going on with words of the other half, which random experts do not.
(f) Beside every ablation stands what it did to all other text: loss, perplexity and next-token accuracy.
(g) Every expert that is used has a list of its top tokens in context.

Where the model or the texts are not to be had the tests skip, saying so. The figures in full, on all labels and more
text, are those of `interp study monet-mini`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

import interp
from interp import corpora, experts
from interp.experts.describe import top_examples
from interp.experts.losses import METRICS
from interp.experts.study import register

DOMAINS = ["biology", "maths", "fiction", "manuals"]  # domains whose packages are small
RATIO = 1.25  # of Monet's rule; above 1 the sets are disjoint
LANGUAGES = ["manuals", "manuals-de", "manuals-fr", "manuals-es"]


@pytest.fixture(scope="module")
def model() -> interp.Model:
    from interp.zoo.load import names

    if "monet-mini" not in names():
        pytest.skip("monet-mini is not in data/models")
    return interp.load("monet-mini")


def texts(split: str, labels: list[str]) -> dict[str, list[str]]:
    try:
        return corpora.load(split, labels=labels, max_bytes=80_000)
    except corpora.CorpusError as error:
        pytest.skip(f"the corpus cannot be had here: {error}")


def removed_in_turn(model: interp.Model, labels: list[str]) -> tuple[experts.RoutingStats, pd.DataFrame]:
    stats = experts.routing(model, texts("train", labels), max_tokens=6_000)
    held_out = texts("test", labels)
    return stats, experts.remove_each(model, stats, held_out, ratio=RATIO, controls=20, max_tokens=800)


def check(stats: experts.RoutingStats, table: pd.DataFrame, labels: list[str]) -> None:
    sets = [experts.select(stats, label, ratio=RATIO) for label in labels]
    assert all(len(a & b) == 0 for i, a in enumerate(sets) for b in sets[:i])
    print(experts.matrix(table).round(3).to_string())
    print(experts.summary(table).round(3).to_string())
    loss = table[table["metric"] == "loss"].set_index(["removed", "label", "baseline"])
    for label in labels:
        own, random = loss.loc[(label, label, "none")], loss.loc[(label, label, "random")]
        assert own["low"] > max(random["high"], 0), f"{label}: {own['value']:.3f} against {random['value']:.3f}"
        others = [loss.loc[(label, other, "none"), "value"] for other in labels if other != label]
        assert own["value"] > max(others)


def test_c_domains(model: interp.Model) -> None:
    stats, table = removed_in_turn(model, DOMAINS)
    check(stats, table, DOMAINS)
    # (f): every ablation is reported on every label, in every metric
    own = table[table["baseline"] == "none"]
    assert len(own) == len(DOMAINS) ** 2 * len(METRICS)
    assert own[["before", "after", "low", "high"]].notna().all().all()


def test_d_languages(model: interp.Model) -> None:
    stats, table = removed_in_turn(model, LANGUAGES)
    check(stats, table, LANGUAGES)


def test_e_rudeness(model: interp.Model) -> None:
    table = register(
        model, prompts=20, samples=2, select_tokens=8_000, score_tokens=400, watch=[], thresholds=(0.2,), controls=20,
        control_prompts=10, new_tokens=16, seed=0,
    )  # fmt: skip
    print(table.round(3).to_string())
    score = table[(table["metric"] == "mean_score") & (table["kind"] == "toxic")]
    before = score[score["threshold"].isna()].iloc[0]
    off, random = (score[(score["threshold"] == 0.2) & (score["baseline"] == b)].iloc[0] for b in ("none", "random"))
    assert off["high"] < before["low"]
    assert off["high"] < random["low"], f"{off['value']:.3f} against {random['value']:.3f} of random experts"
    loss = table[(table["metric"] == "loss") & (table["threshold"] == 0.2)].set_index(["kind", "baseline"])["value"]
    assert loss["neutral", "none"] < loss["toxic", "none"]  # (f): what it costs the friendly register stands beside it


def test_g_every_used_expert_has_a_list(model: interp.Model) -> None:
    held_out = texts("test", DOMAINS)
    stats = experts.routing(model, held_out, max_tokens=600)
    size, first = stats.size, {router: layer for layer, router in reversed(stats.layers.items())}
    everybody = experts.ExpertSet(model, {layer: range(size) for layer in first.values()})
    lists = top_examples(model, held_out, everybody, k=5, max_tokens=600)
    for router, layer in first.items():
        used = set((stats.mass.sum(0)[router] > 0).nonzero()[:, 0].tolist())
        mine: Any = lists[lists["layer"] == layer]
        assert set(mine["expert"]) == used
        assert (mine.groupby("expert")["weight"].first() > 0).all()
        print(f"router {router}: {len(used):,} of {size:,} experts used on {int(stats.tokens.sum()):,} tokens")
