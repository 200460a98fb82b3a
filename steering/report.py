"""The report: what a vector does, what it damages, and what else does as much, as one DataFrame and one HTML file.

    found = steering.report(m, v, held_out_pairs, chat=True)
    found.table                     section, label, metric, multiplier, baseline, position, share, value, low, high, n
    found.save("report.html")       opens without a network

It refuses to be written without the four things that make such a report worth reading (Pres et al. 2024,
arXiv:2410.17245): an open-ended context, likelihoods, a scale common to all behaviours, and a baseline. A vector
that does nothing is reported as doing nothing.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering import pairs as _pairs
from steering.damage import choices, fluency, neutral
from steering.errors import SteeringError
from steering.evaluate import summarise, verdict
from steering.lettered import ab
from steering.pres import pres
from steering.propensity import MULTIPLIERS, check_multipliers, propensities, slopes
from steering.vector import SteeringMap

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("section", "label", "metric", "multiplier", "baseline", "position", "share", "value", "low", "high", "n")


@dataclass
class Report:
    """What `report` found.

    Attributes:
        table: everything measured, one number per row.
        generations: columns multiplier, prompt, text.
        about: settings, and the verdict in words.
    """

    table: pd.DataFrame
    generations: pd.DataFrame
    about: dict[str, Any] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """Which of the four properties it lacks; an empty list is as it should be."""
        own = self.table[self.table["section"] == "on target"]
        have = {
            "context": bool(self.about.get("context")),
            "likelihood": bool((own["metric"] == "propensity").any()),
            "common scale": {"promotes", "demotes"} <= set(own["metric"]),
            "baseline": bool(((own["metric"] == "propensity") & (own["baseline"] == "random")).any()),
        }
        return [name for name, there in have.items() if not there]

    def to_html(self) -> str:
        """The report as one page with everything inside. SteeringError where it lacks one of the four properties."""
        if lack := self.missing():
            raise SteeringError(
                f"the report lacks: {', '.join(lack)}. It needs open-ended prompts, likelihoods of answers, normalised "
                "likelihoods and random controls (controls=20); without them its numbers cannot be read"
            )
        from steering import plots

        figure = plots.overview(self.table)
        drawn = figure.to_html(
            full_html=False, include_plotlyjs=True, config={"displaylogo": False, "responsive": True}
        )
        parts = [f"<h1>Steering report: {html.escape('{method} on {model}'.format(**self.about))}</h1>"]
        parts += [f"<p>{html.escape(line)}</p>" for line in self.about["verdict"]]
        parts.append(drawn)
        for section in dict.fromkeys(self.table["section"]):
            rows = self.table[self.table["section"] == section].drop(columns="section").dropna(axis=1, how="all")
            parts.append(f"<h2>{html.escape(str(section)).capitalize()}</h2>")
            parts.append(rows.to_html(index=False, escape=True, border=0, float_format=lambda x: f"{x:.4g}", na_rep=""))
        if len(self.generations):
            parts.append("<h2>What it writes</h2>")
            parts.append(self.generations.to_html(index=False, escape=True, border=0))
        settings = "".join(
            f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(x))}</td></tr>"
            for k, x in self.about.items()
            if k != "verdict"
        )
        parts.append(f"<h2>Settings</h2><table>{settings}</table>")
        return _PAGE.replace("@BODY@", "\n".join(parts))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page; gives its path."""
        text, target = self.to_html(), Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
        return target


def report(
    m: Any,
    v: SteeringMap,
    pairs: Any,
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    off_target: Mapping[str, Any] | None = None,
    texts: Any = None,
    questions: Sequence[tuple[str, Sequence[str], int]] | None = None,
    prompts: Sequence[str] | None = None,
    controls: int = 20,
    baselines: Mapping[str, Any] | None = None,
    prompt: tuple[str, str] | None = None,
    judge: Any = None,
    lettered: bool = False,
    max_new_tokens: int = 40,
    chat: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> Report:
    """Measures a vector from every side.

    Args:
        m: the model.
        v: the vector or map.
        pairs: held-out (prompt, positive_text, negative_text) triples of its behaviour.
        multipliers: strengths; 0 is added if it is not among them.
        off_target: other behaviours' pairs by name.
        texts: neutral texts; default the project's own paragraphs.
        questions: (prompt, options, index) for multiple choice.
        prompts: what generations begin with; default the first three prompts of the pairs.
        controls: random controls; a report without any cannot be saved.
        baselines: further maps to set beside it, by name.
        prompt: two instructions, for and against the behaviour, as baseline.
        judge: model under which generations' perplexity is taken.
        lettered: score the pairs as lettered options too, in both orders.
        max_new_tokens: of each generation.
        chat: put prompts into the model's chat template.
        seed: of everything drawn.
        say: is told what happens next.
    """
    import pandas as pd

    triples = _pairs.check(pairs)
    ks = sorted({0.0, *check_multipliers(multipliers)})
    if len(ks) < 2:
        raise SteeringError("multipliers: expected at least one other than 0")
    say(f"scoring {len(triples)} items at {len(ks)} multipliers, with {controls} random controls")
    raw = propensities(m, v, triples, ks, controls=controls, baselines=baselines, prompt=prompt, chat=chat, seed=seed)
    dose = summarise(raw, seed=seed)
    frames = [_rows("on target", "", dose)]
    top = max(ks)
    frames.append(_rows("on target", "", pres(raw, top if top > 0 else min(ks), seed=seed)))
    each = slopes(raw)
    frames.append(_rows("on target", "", _slope_rows(each, seed)))
    if lettered:
        say("scoring lettered options in both orders")
        found = ab(m, v, triples, ks, chat=chat, seed=seed)
        frames.append(_rows("lettered options", "", found.rename(columns={"order": "label"})))
    for name, others in (off_target or {}).items():
        say(f"scoring {name}, which it is not about")
        other = propensities(m, v, others, ks, controls=0, chat=chat, seed=seed)
        frames.append(_rows("off target", name, summarise(other, seed=seed)))
    say("measuring damage to neutral text")
    frames.append(_rows("neutral text", "", neutral(m, v, texts if texts is not None else _paragraphs(), ks,
                                                    controls=min(controls, 5), seed=seed)))  # fmt: skip
    if questions:
        say("asking multiple choice")
        frames.append(_rows("multiple choice", "", choices(m, v, questions, ks, chat=chat, seed=seed)))
    starts = list(prompts) if prompts is not None else [p for p, _, _ in triples[:3] if isinstance(p, str)]
    generations = pd.DataFrame(columns=["multiplier", "prompt", "text"])
    if starts and m.tokenizer is not None:
        say("generating")
        written, generations = fluency(
            m, v, starts, ks, judge=judge, max_new_tokens=max_new_tokens, chat=chat, seed=seed
        )
        frames.append(_rows("generations", "", written))
    said = verdict(dose)
    about = {
        "model": m.name, "fingerprint": m.fingerprint, "method": v.method, "sites": v.sites, "scope": v.scope.text,
        "record": v.record, "items": len(triples), "context": str(triples[0][0])[:400], "chat": chat,
        "controls": controls,
        "seed": seed, **said, "slope": each.attrs["slope"], "flipped": each.attrs["flipped"],
        "verdict": _words(said, each.attrs, controls),
    }  # fmt: skip
    table = pd.concat([f.dropna(axis=1, how="all") for f in frames], ignore_index=True).reindex(columns=list(COLUMNS))
    table.attrs.update({k: x for k, x in about.items() if k != "verdict"})
    return Report(table, generations, about)


def _rows(section: str, label: str, table: pd.DataFrame) -> pd.DataFrame:
    """A table of one of the measures, in the report's columns."""
    out = table.copy()
    out.attrs = {}
    out["section"] = section
    if "label" not in out:
        out["label"] = label
    if "baseline" not in out:
        out["baseline"] = "none"
    return out.reindex(columns=list(COLUMNS))


def _slope_rows(each: pd.DataFrame, seed: int) -> pd.DataFrame:
    import pandas as pd

    from steering.intervals import bootstrap

    rows = []
    for metric, values in (("slope", each["slope"]), ("flipped", (each["slope"] < 0).astype(float))):
        low, high = bootstrap(values, seed=seed)
        rows.append({"metric": metric, "value": float(values.mean()), "low": low, "high": high, "n": len(values)})
    return pd.DataFrame(rows)


def _words(said: dict[str, Any], slope: Mapping[Any, Any], controls: int) -> list[str]:
    """The verdict in sentences, negative results as plainly as positive ones."""
    lines = [
        "The propensity rises with every step of the multiplier."
        if said["rises"]
        else f"The propensity does not rise with every step of the multiplier (Spearman {said['spearman']:.2f})."
    ]
    if said["leaves"] is not None:
        lines.append(
            "It lies beyond the interval of the random vectors at " + ", ".join(f"{k:+g}" for k in said["leaves"]) + "."
            if said["leaves"]
            else f"At no multiplier does it lie beyond the interval of the {controls} random vectors: they do as much."
        )
        if said["wrong"]:
            lines.append("On the wrong side of it at " + ", ".join(f"{k:+g}" for k in said["wrong"]) + ".")
    lines.append(f"{slope['flipped']:.0%} of the items are steered the wrong way.")
    return lines


def _paragraphs() -> list[str]:
    from interp.demo_texts import PARAGRAPHS

    return [text for texts in PARAGRAPHS.values() for text in texts]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Steering report</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px;margin:.5rem 0 1.5rem}
th,td{padding:.2rem .7rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
h2{margin-top:2rem}
</style></head><body>
@BODY@
</body></html>
"""
