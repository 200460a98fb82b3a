"""What a Table found, in the words of a title. Figures say this where they are given no title."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

#: How a metric's change is said.
_UNITS = {"loss": "nats", "logit_diff": "logits", "log_prob": "nats", "kl": "nats"}


def removal(table: pd.DataFrame, metric: str = "loss") -> str:
    """Of `experts.remove_each` or `evaluate`: what each label loses by its own experts, what the others lose, and
    whether random experts cost as much.
    """
    here = table[table["metric"] == metric]
    aimed = _aimed(here)
    own, other = here[aimed & (here["baseline"] == "none")], here[~aimed & (here["baseline"] == "none")]
    random = here[aimed & (here["baseline"] == "random")]
    what, unit = ("loss" if metric == "loss" else metric), _UNITS.get(metric, "")
    names = list(dict.fromkeys(own["removed"]))
    whose = f"without the experts of {names[0]}, its {what}" if len(names) == 1 else f"each label's {what}, without its"
    whose += "" if len(names) == 1 else " experts,"
    said = f"{whose} changes by {own['value'].mean():+.2f} {unit}".rstrip()
    if len(other):
        said += f", that of other text by {other['value'].abs().mean():.3f}"
    if len(random):
        bound = random.set_index(["removed", "label"])["high"]
        mine = own.set_index(["removed", "label"])
        shared = mine.index.intersection(bound.index)
        beyond = int((mine.loc[shared, "value"] > bound.loc[shared]).sum())
        clear = f"beyond random experts for {beyond} of {len(shared)}"
        if len(shared) == 1:
            clear = "more than by random experts" if beyond else "no more than by random experts"
        said += f"; {clear}"
    return _whose(table) + said


def _aimed(table: pd.DataFrame) -> pd.Series:
    """True where a row's label is (one of those) that the removed experts carry."""
    import pandas as pd

    aimed = [label in str(gone).split(" + ") for gone, label in zip(table["removed"], table["label"], strict=True)]
    return pd.Series(aimed, index=table.index, dtype=bool)


def frontier(table: pd.DataFrame) -> str:
    """Of `experts.frontier`: how deep the deepest cut goes, and where a cut costs the others least."""
    deep = table.iloc[int(table["damage"].argmax())]
    said = f"the deepest cut costs its own text {deep['damage']:.2f} nats and other text {deep['spill']:.2f}"
    if not table["selectivity"].notna().any():
        return _whose(table) + said
    best = table.iloc[int(table["selectivity"].argmax())]
    method = f" ({best['method']})" if table["method"].nunique() > 1 else ""
    return f"{_whose(table)}{said}; the most selective one {best['damage']:.2f} against {best['spill']:.3f}{method}"


def patching(table: pd.DataFrame, tokens: Sequence[str] | None = None) -> str:
    """Of `patching.patch` or `attribute`: the strongest node, its share of the difference between the runs, and how
    many others come near; for one stream at several tokens, at which of them it is strongest, layer by layer.
    """
    size = table["value"].abs()
    if not len(table) or not size.notna().any():
        return f"{_whose(table)}no node has an effect that is a number"
    top = table.iloc[int(size.argmax())]
    metric, direction = str(top.get("metric", "metric")), str(top.get("direction", ""))
    where = str(top["node"])
    if str(top.get("position")) not in ("<NA>", "nan", "None"):
        where += f" at {_token(int(top['position']), tokens)}"
    ends = table.attrs.get("baseline") or {}
    gap = abs(ends.get("clean", 0.0) - ends.get("corrupt", 0.0))
    share = f", {abs(top['value']) / gap:.0%} of the runs' difference" if gap else ""
    near = int((size >= size.max() / 2).sum()) - 1
    verb = {"noise": "takes away", "denoise": "gives back"}.get(direction, "moves")
    if (top["value"] > 0) == (direction == "noise"):
        verb = "moves"  # the other way than the patch goes
    how = "" if str(top.get("method", "exact")) == "exact" else f" (estimated by {top['method']})"
    if runs := _stream(table):
        parts = [f"{_token(place, tokens)} in layer{f' {a}' if a == b else f's {a} to {b}'}" for place, a, b in runs]
        return f"{_whose(table)}{table['site'].iloc[0]} {verb} most at {', then '.join(parts)}{how}"
    unit = _UNITS.get(metric, metric)
    amount = abs(top["value"]) if verb != "moves" else top["value"]
    form = f"{amount:.2f}" if verb != "moves" else f"{amount:+.2f}"
    return (
        f"{_whose(table)}{where} {verb} {form} {unit}{share}, the most of {len(table):,} nodes; "
        f"{near or 'no'} {'other comes' if near <= 1 else 'others come'} to half of it{how}"
    )


def feature(contexts: pd.DataFrame, writes: pd.DataFrame | None = None, name: str = "") -> str:
    """Of a feature's strongest contexts: the token at which it fires most often, and the one it makes likeliest."""
    fires = contexts["token"].astype(str).str.strip().value_counts()
    said = (
        f"fires on {fires.index[0]!r} in {fires.iloc[0]} of its {len(contexts)} strongest contexts"
        if len(fires)
        else ""
    )
    if writes is not None and len(writes):
        top = writes.iloc[int(writes["value"].argmax())]
        said += f", and makes {str(top['token']).strip()!r} likelier most ({top['value']:+.1f} logits)"
    return f"{name} {said}".strip()


#: Metrics of SAEs of which less is better.
LESS_IS_BETTER = ("fvu",)


def saes(table: pd.DataFrame, metric: str = "ce_recovered") -> str:
    """Of `sae.pareto`: which SAE gives back most (or leaves least), at how many latents a token, and the smallest."""
    wide = table.pivot_table(index="name", columns="metric", values="value")
    less = metric in LESS_IS_BETTER
    best: Any = wide[metric].idxmin() if less else wide[metric].idxmax()
    least: Any = wide["l0"].idxmin()
    what = {"ce_recovered": "of the loss", "explained_variance": "of the variance", "fvu": "of the variance"}
    share = f"{wide.loc[best, metric]:.0%} {what.get(metric, metric)}"
    said = f"{best} {'leaves' if less else 'gives back'} {share}{' unexplained' * less}"
    said += f" with {wide.loc[best, 'l0']:.0f} latents a token"
    if best == least:
        return f"{said}, and none needs fewer"
    return f"{said}, {least} {wide.loc[least, metric]:.0%} with {wide.loc[least, 'l0']:.0f}"


def _token(place: int, tokens: Sequence[str] | None) -> str:
    known = tokens is not None and place < len(tokens)
    return f"token {place}" + (f" {tokens[place].strip()!r}" if known and tokens else "")


def _stream(table: pd.DataFrame) -> list[tuple[int, int, int]]:
    """(token, first layer, last layer) where a whole stream has its largest effect; [] where that is no short story."""
    parts = [axis for axis in ("head", "expert", "neuron") if axis in table.columns and table[axis].notna().any()]
    here = table[table["layer"].notna() & table["position"].notna()] if "position" in table.columns else table[:0]
    if parts or table["site"].nunique() > 1 or here["layer"].nunique() < 2 or here["position"].nunique() < 2:
        return []
    best = here.loc[here.assign(size=here["value"].abs()).groupby("layer")["size"].idxmax()]
    runs: list[tuple[int, int, int]] = []
    for layer, place in zip(best["layer"].astype(int), best["position"].astype(int), strict=True):
        if runs and runs[-1][0] == place:
            runs[-1] = (place, runs[-1][1], layer)
        else:
            runs.append((place, layer, layer))
    return runs if len(runs) <= 3 else []


def _whose(table: pd.DataFrame) -> str:
    return f"{table.attrs['model']}: " if table.attrs.get("model") else ""
