"""Latents on one page: a single HTML file that needs no network.

    page.save(page.dashboard(m, s, texts, [3, 17, 42]), "latents.html")

Per latent: the contexts in which it fires most (the token marked, darker for larger values), a histogram of its values,
the tokens whose logits its direction moves, how often it fires and with whom, and what the loss does without it. Text
of models and users is escaped wherever it meets HTML. `neuronpedia` gives the same facts in the shape that Neuronpedia
reads.
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.sae import latents as facts
from interp.sae.autoencoder import SAE

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{border-bottom:2px solid #0072B2;margin-top:3rem}table{border-collapse:collapse}
td,th{padding:.15rem .6rem;text-align:left}
.ctx{font-family:ui-monospace,monospace;white-space:pre-wrap;margin:.2rem 0}
.num{color:#666;display:inline-block;width:4rem}
.cols{display:flex;gap:3rem;flex-wrap:wrap}mark{padding:0 .1rem;border-radius:.2rem}nav a{margin-right:.8rem}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}.num{color:#999}mark{color:#111}}
"""


def _text(value: Any) -> str:
    return html.escape(str(value)).replace("\n", "↵")


def _contexts(rows: pd.DataFrame) -> str:
    largest = max(float(rows.value.max()), 1e-12) if len(rows) else 1.0
    out = []
    for row in rows.to_dict("records"):
        shade = 0.25 + 0.75 * row["value"] / largest
        mark = f'<mark style="background:rgba(230,159,0,{shade:.2f})">{_text(row["token"])}</mark>'
        out.append(
            f'<div class="ctx"><span class="num">{row["value"]:.2f}</span>'
            f"{_text(row['before'])}{mark}{_text(row['after'])}</div>"
        )
    return "".join(out) or "<p>It fires nowhere in these texts.</p>"


def _tokens(rows: pd.DataFrame, title: str) -> str:
    cells = "".join(
        f"<tr><td><code>{_text(r.token)}</code></td><td>{r.value:+.3f}</td></tr>" for r in rows.itertuples()
    )
    return f"<div><h4>{title}</h4><table>{cells}</table></div>"


def _bars(values: Sequence[float]) -> str:
    """A histogram as plain SVG."""
    if not len(values):
        return ""
    import numpy as np

    counts, edges = np.histogram(np.asarray(values), bins=24)
    top = max(1, int(counts.max()))
    bars = "".join(
        f'<rect x="{12 * i}" y="{60 - 60 * c / top:.1f}" width="11" height="{60 * c / top:.1f}" fill="#0072B2"/>'
        for i, c in enumerate(counts)
    )
    label = f"values where it fires, {edges[0]:.2f} to {edges[-1]:.2f}, {len(values)} tokens"
    return f'<div><h4>{label}</h4><svg width="290" height="62" role="img" aria-label="{label}">{bars}</svg></div>'


def dashboard(
    m: Model, s: SAE, texts: Sequence[Any], latents: Sequence[int], *, effects: bool = True, top: int = 10,
    context: int = 128, run: int = 8,
) -> str:  # fmt: skip
    """The page as HTML text.

    Args:
        m: the model.
        s: its SAE.
        texts: where to look for contexts.
        latents: which latents.
        effects: measure the change of the loss with each latent off, beside random ones (a pass over the texts each).
        top: contexts, and tokens of each sign, per latent.
        context: tokens per text at most.
        run: texts per forward pass.
    """
    how = {"context": context, "run": run}
    stats = facts.statistics(m, s, texts, latents=latents, **how).set_index("latent")
    where = facts.contexts(m, s, texts, latents, top=top, **how)
    writes = facts.logit_effects(m, s, latents, top=top) if s.d_out == m.d_model else None
    loss = facts.ablation_effects(m, s, texts, latents, **how) if effects else None
    values = _values(m, s, texts, latents, how)
    parts = []
    for latent in latents:
        about = stats.loc[latent]
        partners = ", ".join(f"{i} ({j:.2f})" for i, j in zip(about.partners, about.jaccard, strict=True) if j > 0)
        facts_line = (
            f"fires at {about.density:.3%} of tokens, mean {about['mean']:.2f} where it does, with {partners or 'none'}"
        )
        columns = [_bars(values[latent])]
        if writes is not None:
            mine = writes[writes.latent == latent]
            columns += [
                _tokens(mine[mine.sign == "+"], "makes likelier, logits"),
                _tokens(mine[mine.sign == "-"], "makes less likely, logits"),
            ]
        off = "" if loss is None else _effect(loss, latent)
        parts.append(
            f'<section id="l{latent}"><h2>{_text(s.latent(latent))}</h2><p>{facts_line}{off}</p>'
            f"{_contexts(where[where.latent == latent])}<div class='cols'>{''.join(columns)}</div></section>"
        )
    links = "".join(f'<a href="#l{i}">{i}</a>' for i in latents)
    title = f"{s!r} in {m.name}, {stats.attrs['tokens']} tokens"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
        f"<h1>Latents</h1><p>{_text(title)}</p><nav>{links}</nav>{''.join(parts)}</html>"
    )


def _effect(loss: pd.DataFrame, latent: int) -> str:
    row = loss[(loss.latent == latent) & (loss.baseline == "none")].iloc[0]
    other = loss[loss.baseline == "random"].value
    beside = f"; random latents {other.mean():+.4f}" if len(other) else ""
    return f"; the loss changes by {row.value:+.4f} [{row.low:+.4f}, {row.high:+.4f}] nats without it{beside}"


def _values(
    m: Model, s: SAE, texts: Sequence[Any], latents: Sequence[int], how: dict[str, int]
) -> dict[int, list[float]]:
    out: dict[int, list[float]] = {latent: [] for latent in latents}
    for _, _, support, amounts in facts._batches(m, s, texts, how["context"], how["run"]):
        for latent, found in out.items():
            found += amounts[support.ids == latent].tolist()
    return out


def neuronpedia(m: Model, s: SAE, texts: Sequence[Any], latents: Sequence[int], *, top: int = 10, context: int = 128,
                run: int = 8) -> list[dict[str, Any]]:  # fmt: skip
    """One record per latent with the fields of Neuronpedia's feature import: modelId, layer, index, frac_nonzero,
    pos_str, pos_values, neg_str, neg_values, activations (tokens, values of the window, maxValue)."""
    stats = facts.statistics(m, s, texts, latents=latents, context=context, run=run).set_index("latent")
    writes = facts.logit_effects(m, s, latents, top=top)
    where = facts.contexts(m, s, texts, latents, top=top, context=context, run=run)
    out = []
    for latent in latents:
        mine = writes[writes.latent == latent]
        record: dict[str, Any] = {"modelId": m.name, "layer": "+".join(s.sites), "index": str(latent),
                                  "frac_nonzero": stats.density.to_dict()[latent]}  # fmt: skip
        for key, sign in (("pos", "+"), ("neg", "-")):
            side = mine[mine.sign == sign]
            record |= {f"{key}_str": side.token.tolist(), f"{key}_values": [float(v) for v in side.value]}
        record["activations"] = [
            {"tokens": [r["before"], r["token"], r["after"]], "values": [0.0, r["value"], 0.0],
             "maxValue": r["value"], "maxValueTokenIndex": 1}
            for r in where[where.latent == latent].to_dict("records")
        ]  # fmt: skip
        out.append(record)
    return out


def save(page: str, path: str | os.PathLike[str]) -> Path:
    """Write a page; whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, target)
    return target
