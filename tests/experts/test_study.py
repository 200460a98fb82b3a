"""A study tunes on validation, scores on test, and reports what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from interp import experts
from interp.corpora.words import TOXIC
from interp.experts import study as studies
from interp.experts.toxicity import WordList, suppress


def test_a_study_reads_each_split_for_its_purpose(monet: Any, texts: dict[str, list[str]], tmp_path: Path) -> None:
    asked: list[str] = []

    def splits(split: str) -> dict[str, list[str]]:
        asked.append(split)
        at = ("train", "validation", "test").index(split)
        return {label: documents[at : at + 1] for label, documents in texts.items()}

    grids = [("top", {"count": (2, 6)}), ("skew", {"ratio": (1.2, 1.5)})]
    found = studies.study(monet, splits=splits, grids=grids, controls=2, damage=0.0)
    assert asked == ["train", "validation", "test"]
    curve = found.tables["frontier"]
    assert len(curve) == 4
    enough = curve[curve["damage"] >= 0]
    row = (enough if len(enough) else curve).sort_values("selectivity" if len(enough) else "damage").iloc[-1]
    assert found.rule == row["method"].split(", ")[1]
    assert all(row[name] == value for name, value in found.settings.items())
    test = experts.remove_each(monet, found.stats, splits("test"), rule=found.rule, controls=2, **found.settings)
    pd.testing.assert_frame_equal(found.tables["best"], test)
    assert list(found.tables["paper_summary"]["removed"]) == [*texts, "mean"]
    found.save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "frontier.parquet", "best.parquet", "paper.parquet", "summary.parquet", "paper_summary.parquet",
        "routing.safetensors",
    }  # fmt: skip


def test_best_prefers_selectivity_among_those_that_do_enough() -> None:
    curve = pd.DataFrame(
        {"method": ["monet, skew"] * 2 + ["monet, top"], "selectivity": [5.0, 9.0, 7.0], "damage": [0.6, 0.1, 0.7],
         "spill": [0.12, 0.01, 0.1], "share_of_all": [0.1, 0.1, 0.1], "count": [float("nan")] * 2 + [4.0]}
    )  # fmt: skip
    curve_with_setting = curve.assign(threshold=[2.0, 3.0, float("nan")])
    assert studies.best(curve_with_setting, 0.5) == ("top", {"count": 4.0})
    assert studies.best(curve_with_setting, 5.0) == ("top", {"count": 4.0})
    assert studies.best(curve_with_setting, 0.0) == ("skew", {"threshold": 3.0})


def test_rudeness_is_scored_by_words_that_nothing_was_chosen_by(monet: Any) -> None:
    rude = TOXIC["train"]
    heard: list[str] = []

    def judge(made: Any) -> list[float]:
        heard.extend(made)
        return [0.5] * len(made)

    asked: list[dict[str, list[str]]] = []
    original = studies.routing

    def spying(model: Any, texts: Any, **how: Any) -> Any:
        asked.append(texts)
        return original(model, texts, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "routing", spying)
        table = studies.register(
            monet, prompts=2, samples=1, controls=1, control_prompts=1, select_tokens=300, score_tokens=100, watch=[],
            judge=judge, thresholds=(0.05,), new_tokens=3,
        )  # fmt: skip
    held_out = {*rude.part(1).nouns, *rude.part(1).adjectives}
    chosen_on = " ".join(asked[0]["toxic"]).lower()
    assert any(word in chosen_on for word in rude.part(0).nouns)
    assert not [word for word in held_out if f" {word}" in chosen_on]
    scores = table[table["metric"] == "mean_score"]
    assert set(scores["kind"]) == {"toxic", "neutral"}
    assert (scores["value"] == 0.5).all()
    assert set(table.loc[table["metric"] == "loss", "kind"]) == {"toxic", "neutral"}
    assert heard


def test_suppress_measures_what_the_judge_says(monet: Any, texts: dict[str, list[str]]) -> None:
    """A judge that looks for one letter: the table holds its means, and the losses are those of the masked model."""
    stats = experts.routing(monet, texts)
    judge = WordList({"e": 1.0})
    seen: list[str] = []

    def spying(made: Any) -> list[float]:
        seen.extend(made)
        return [float("e" in text) for text in made]

    table = suppress(
        monet, stats, {"law": ["the court ", "a party "]}, texts, spying, label="law", against="code",
        thresholds=(0.5,), samples=3, new_tokens=5, controls=2, control_prompts=1,
    )  # fmt: skip
    assert judge(["a e b", "abc"]) == [1.0, 0.0]
    before = table[table["threshold"].isna() & (table["metric"] == "mean_score")].iloc[0]
    assert before["value"] == pytest.approx(sum("e" in text for text in seen[:6]) / 6)
    chosen = experts.select(stats, "law", "correlation", threshold=0.5, against="code")
    with experts.switched_off(monet, chosen):
        sums = experts.losses(monet, texts).of("bio").sum(0)
    own = table[(table["threshold"] == 0.5) & (table["baseline"] == "none") & (table["kind"] == "bio")].iloc[0]
    assert own["value"] == pytest.approx(float(sums[0] / sums[2]), abs=1e-9)
    assert own["units"] == len(chosen)
    random = table[table["baseline"] == "random"]
    assert set(random["metric"]) == {"max_score", "probability", "mean_score", "loss"}
    assert len(seen) == 6 + 6 + 2


def test_word_lists_score_the_rudest_word() -> None:
    judge = WordList({"moron": 1.0, "damn": 0.5})
    assert judge(["You MORON, damn!", "damn.", "Hello", ""]) == [1.0, 0.5, 0.0, 0.0]


def test_descriptions_are_of_used_experts_one_layer_per_router(
    monet: Any, texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp import corpora

    monkeypatch.setattr(corpora, "load", lambda split, **how: texts)
    table = studies.descriptions(monet, experts_per_router=8)
    assert set(table["layer"]) <= {0, 2}
    assert ((table["f1"] >= 0) & (table["f1"] <= 1)).all()
    stats = experts.routing(monet, texts)
    for _, row in table.iterrows():
        assert stats.used[:, stats.layers[row["layer"]], row["expert"]].sum() > 0


def test_models_are_compared_at_one_damage() -> None:
    made = pd.DataFrame(
        {"method": ["monet, skew"] * 2, "damage": [0.0, 1.0], "spill": [0.0, 0.1], "share_of_all": [0.0, 0.2]}
    )
    level = studies.compare({"a": made, "b": made.assign(spill=[0.0, 0.4], damage=[0.0, 0.4])}, damage=0.5)
    assert list(level["method"]) == ["a: monet, skew", "b: monet, skew"]
    assert level["selectivity"].iloc[0] == pytest.approx(10.0)
    assert level["spill"].isna().iloc[1]  # b never does so much
