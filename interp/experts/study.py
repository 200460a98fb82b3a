"""The three studies of Monet's section 5 as one call each, on any model with experts, or on a dense model's neurons.

    found = study(m, "domain")                 selection on train, setting on validation, figures on test
    found.tables["summary"]                    one line per removed label, and the mean
    compare({"monet": found, "neurons": other}) at equal damage

A rule has a setting (skew its ratio, top its share), and whoever tries several and keeps the best has tuned it. So
the settings are tried on the *validation* split. The best is the one with the largest selectivity (damage / spill)
among those that do at least `damage` nats; only that one and the paper's own (skew, ratio 2) are measured on the *test*
split, with random controls and intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.experts.batches import Labelled, corpus
from interp.experts.collect import routing
from interp.experts.losses import losses
from interp.experts.resection import at_damage, frontier, remove_each, summary
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError, units_of

if TYPE_CHECKING:
    import pandas as pd

    from interp.experts.toxicity import Judge

PAPER = ("skew", {"ratio": 2.0})

#: The settings that are tried, per kind of unit. Neurons and few coarse experts rarely reach a ratio of 2.
GRIDS: dict[str, list[tuple[str, dict[str, Sequence[float]]]]] = {
    "monet": [("skew", {"ratio": (1.25, 1.5, 2.0, 4.0)}), ("lift", {"ratio": (1.5, 2.0, 3.0, 5.0, 10.0)})],
    "routed": [
        ("skew", {"ratio": (1.25, 1.5, 2.0, 3.0)}),
        ("lift", {"ratio": (1.5, 2.0, 3.0, 5.0)}),
        ("top", {"share": (0.03, 0.0625, 0.125, 0.25)}),
        ("rate", {"share": (0.03, 0.0625, 0.125, 0.25)}),
    ],
    "neurons": [("skew", {"ratio": (1.1, 1.25, 1.5, 2.0)}), ("top", {"share": (0.01, 0.03, 0.06, 0.12, 0.25)})],
}


@dataclass(frozen=True)
class Study:
    """What `study` found.

    Attributes:
        stats: routing statistics of the train split.
        rule, settings: the best on the validation split.
        tables: "frontier" (validation), "best" and "paper" (test, from `remove_each`), "summary", "paper_summary".
    """

    stats: RoutingStats
    rule: str
    settings: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def save(self, out: Path) -> None:
        """Each table as parquet, the statistics as safetensors."""
        out.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            table.to_parquet(out / f"{name}.parquet")
        self.stats.save(out / "routing.safetensors")


def study(
    model: Any,
    group: str = "domain",
    *,
    kind: str = "auto",
    splits: Callable[[str], Labelled] | None = None,
    grids: Sequence[tuple[str, Mapping[str, Sequence[float]]]] | None = None,
    damage: float = 0.5,
    controls: int = 20,
    scored: str = "target",
    select_tokens: int = 10_000,
    tune_tokens: int = 800,
    score_tokens: int = 2_000,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> Study:
    """Removes each label of a group in turn: chosen on train, tuned on validation, measured on test.

    Args:
        model: the model.
        group: of `interp.corpora`: domain, programming or language.
        kind: which units, see `interp.experts.units`.
        splits: split name -> labelled texts, in place of the project's corpora.
        grids: (rule, setting -> values) to try; default `GRIDS`.
        damage: nats per token that the best setting must do at least, on average over removed labels.
        controls: random matched sets per removed label.
        scored: "target" or "all", as for `remove_each`.
        select_tokens: per label, for the statistics.
        tune_tokens: per label, for the settings.
        score_tokens: per label, for the figures.
        seed: of controls and bootstrap.
        say: is told what happens next.

    Raises ExpertError for a model without such units.
    """
    import pandas as pd

    if splits is None:
        from interp import corpora

        splits = lambda split: corpora.load(split, group=group)  # noqa: E731
    units = units_of(model, kind)
    say(f"{model.name}: routing statistics on the train split")
    stats = routing(model, splits("train"), kind=kind, max_tokens=select_tokens)
    tuning = corpus(model, splits("validation"), tune_tokens)
    tries: Sequence[tuple[str, Any]] = grids or GRIDS[units.kind]
    curves = [frontier(model, stats, tuning, rule, say=say, **grid) for rule, grid in tries]
    curve = pd.concat(curves, ignore_index=True)
    rule, settings = best(curve, damage)
    held_out = corpus(model, splits("test"), score_tokens)
    found = Study(stats, rule, settings, {"frontier": curve})
    before = losses(model, held_out)
    for name, (its_rule, its_settings) in {"best": (rule, settings), "paper": PAPER}.items():
        if name == "paper" and (rule, settings) == PAPER:
            table = found.tables["best"]
        else:
            say(f"{model.name}: {its_rule} {its_settings} on the test split")
            table = remove_each(
                model, stats, held_out, rule=its_rule, controls=controls, scored=scored, seed=seed, before=before,
                say=say, **its_settings,
            )  # fmt: skip
        found.tables[name] = table
        found.tables["summary" if name == "best" else "paper_summary"] = summary(table)
    return found


def best(curve: pd.DataFrame, damage: float) -> tuple[str, dict[str, Any]]:
    """The rule and setting of largest selectivity among those that do `damage`; if none does, of largest damage."""
    lines = curve.to_dict("records")
    if not lines:
        raise ExpertError("grids: no setting was tried")
    enough = [line for line in lines if line["damage"] >= damage]
    row = max(enough, key=lambda line: line["selectivity"]) if enough else max(lines, key=lambda line: line["damage"])
    found = ("method", "share_of_all", "damage", "spill", "selectivity")
    settings = {str(name): value for name, value in row.items() if name not in found and value == value}  # no NaN
    return str(row["method"]).rpartition(", ")[2], settings


@recorded
def compare(curves: Mapping[str, pd.DataFrame], damage: float = 0.5) -> pd.DataFrame:
    """Several models' frontiers at one common damage: columns method, damage, spill, selectivity, share_of_all."""
    import pandas as pd

    named = [curve.assign(method=f"{name}: " + curve["method"]) for name, curve in curves.items()]
    return at_damage(pd.concat(named, ignore_index=True), damage)


@recorded
def register(
    model: Any,
    *,
    kind: str = "auto",
    controls: int = 20,
    prompts: int = 40,
    samples: int = 3,
    select_tokens: int = 25_000,
    score_tokens: int = 2_000,
    watch: Sequence[str] | None = None,
    judge: Judge | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
    **how: Any,
) -> pd.DataFrame:
    """The toxicity study: `toxicity.suppress` on the project's rude and friendly conversations.

    Half of the registers' words are held out. Experts are chosen on conversations that have the other half; the model
    continues beginnings that have the other half, too; and the judge looks for held-out rude words alone. So what goes
    away is not the words that experts were chosen by. Watched are conversations with held-out words and `watch`.

    Args:
        model: the model.
        kind: which units.
        controls: random sets per threshold.
        prompts: beginnings of each register.
        samples: continuations of each.
        select_tokens: per register, for the statistics.
        score_tokens: per watched label.
        watch: labels whose loss must not suffer, default all domains.
        judge: scores continuations in 0..1, such as `toxicity.lexicon()`; default 1 for a held-out rude word.
        seed: of conversations, sampling and controls.
        say: is told what happens next.
        **how: further settings of `suppress`.
    """
    from interp import corpora
    from interp.corpora.words import TOXIC
    from interp.experts.toxicity import WordList, suppress

    say(f"{model.name}: routing statistics on half of the registers' words")
    shortest = 60  # tokens of a conversation, at the least
    stats = routing(model, _conversations(select_tokens // shortest + 1, seed + 1, 0), kind=kind,
                    max_tokens=select_tokens)  # fmt: skip
    watched = _conversations(score_tokens // shortest + 1, seed + 2, 1)
    labels = corpora.labels("domain") if watch is None else list(watch)
    if labels:
        watched |= corpora.load("test", labels=labels)
    begun = _conversations(prompts, seed + 3, 0)
    rude = TOXIC["train"].part(1)
    return suppress(
        model, stats, {label: [_beginning(text) for text in texts] for label, texts in begun.items()},
        corpus(model, watched, score_tokens), judge or WordList(dict.fromkeys([*rude.nouns, *rude.adjectives], 1.0)),
        controls=controls, samples=samples, seed=seed, say=say, **how,
    )  # fmt: skip


def _conversations(count: int, seed: int, part: int) -> dict[str, list[str]]:
    """New conversations from words that the training split knows, one half of them: register -> texts."""
    from interp.corpora.pairs import pairs

    made = list(pairs("train", count, seed, part))
    return {"toxic": [rude.text for rude, _ in made], "neutral": [friendly.text for _, friendly in made]}


def _beginning(text: str, words: int = 40) -> str:
    """The first posts of a conversation, up to some words and the end of a line, and the name of who speaks next."""
    kept: list[str] = []
    for line in text.splitlines():
        if kept and len(" ".join(kept).split()) + len(line.split()) > words:
            return "\n".join([*kept, line.partition(":")[0] + ": You"])
        kept.append(line)
    return "\n".join(kept)


@recorded
def descriptions(
    model: Any,
    group: str = "domain",
    *,
    experts_per_router: int = 50,
    max_tokens: int = 5_000,
    top: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """How well top tokens describe experts: `describe.detection` for a random sample of those that are used.

    Args:
        model: the model, with experts that are on or off.
        group: of `interp.corpora`; descriptions come from its train split, scores from its test split.
        experts_per_router: how many are drawn, among those used on at least 1 in 1,000 train tokens.
        max_tokens: per label and split.
        top: tokens in a description.
        seed: of the draws.
    """
    import torch

    from interp import corpora
    from interp.experts.describe import detection
    from interp.experts.sets import ExpertSet

    train, test = (corpus(model, corpora.load(split, group=group), max_tokens) for split in ("train", "test"))
    stats = routing(model, train)
    used = stats.used.sum(0) / stats.tokens.sum() >= 1e-3  # [router, unit]
    generator = torch.Generator().manual_seed(seed)
    ids: dict[int, torch.Tensor] = {}
    for layer, router in reversed(stats.layers.items()):  # the first layer of each router stands for it
        ids = {la: found for la, found in ids.items() if stats.layers[la] != router}
        candidates = used[router].nonzero()[:, 0]
        ids[layer] = candidates[torch.randperm(len(candidates), generator=generator)[:experts_per_router]]
    table = detection(model, train, test, ExpertSet(model, ids), top=top, seed=seed)
    table.attrs["used"] = {router: int(used[router].sum()) for router in set(stats.layers.values())}
    return table
