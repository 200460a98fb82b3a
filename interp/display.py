"""How the nouns show themselves in Jupyter: small HTML tables, without scripts, styles of their own or the network.

    %load_ext interp.display            in a notebook: from then on the last line of a cell shows itself so
    display.html(m)                     the same as text, for pages of your own
    m.capture(texts, "resid_<tab>       and sites of your models complete within quotes (`interp.completion`)

In a terminal ``repr`` says the same in one line. A Table is a pandas DataFrame; with the extension it shows the
settings that it carries (``.attrs``) below its rows. Everything that came from models, files or users is escaped.

Rich output is registered with IPython for each class by its name, so loading the extension imports nothing heavy.
"""

from __future__ import annotations

import html as _html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp import calls

if TYPE_CHECKING:
    import pandas as pd

    from interp.activations import Activations
    from interp.experts import ExpertSet
    from interp.model import Model
    from interp.sae import SAE

#: Lines of a table that are shown before it is folded up.
MOST = 12


def html(thing: Any) -> str:
    """A noun as HTML: Model, Activations, ExpertSet, SteeringMap, SAE, a probe, or a Table.

    Raises TypeError for anything else, naming its type.
    """
    for kind in type(thing).__mro__:
        shower = _SHOWERS.get((kind.__module__, kind.__name__))
        if shower is not None:
            return shower(thing)
    raise TypeError(f"display.html: no HTML for a {type(thing).__name__}; it shows {', '.join(n for _, n in _SHOWERS)}")


def model(m: Model) -> str:
    """Sizes, and the sites that the model has; those it lacks are folded up with the reason."""
    sizes = {
        "class": type(m.hf).__name__, "layers": m.n_layers, "d_model": m.d_model, "heads": m.n_heads,
        "vocabulary": f"{m.d_vocab:,}", "context": m.n_ctx or "unbounded",
        "experts": f"{m.n_experts:,} a layer" + (f", top {m.top_k}" if m.top_k else "") if m.n_experts else "none",
        "weights": f"{str(m.dtype).removeprefix('torch.')} on {m.device}",
        "tokenizer": "yes" if m.tokenizer is not None else "none: give token ids",
    }  # fmt: skip
    rows = m.map().to_dict("records")
    here = [(r["site"], _layers(r["layers"]), " x ".join(r["axes"]), r["what"]) for r in rows if r["present"]]
    not_here = [(r["site"], r["absent"]) for r in rows if not r["present"]]
    return _card(
        f"Model {m.name}", _pairs(sizes),
        _folded(f"{len(here)} sites to read and write", _rows(("site", "layers", "axes", "what"), here)),
        _folded(f"{len(not_here)} sites it lacks", _rows(("site", "why"), not_here)) if not_here else "",
    )  # fmt: skip


def activations(acts: Activations) -> str:
    """The tokens that were run, and each site's tensor with its axes."""
    rows = [
        (str(site), " x ".join(f"{axis} {n}" for axis, n in zip(site.axes, tensor.shape, strict=False)),
         str(tensor.dtype).removeprefix("torch."))
        for site, tensor in sorted(acts.tensors.items())
    ]  # fmt: skip
    batch, pos = acts.tokens.ids.shape
    about = f"{batch} rows of {pos} positions, {int(acts.mask.sum())} tokens" + (
        ", with logits" if acts.logits is not None else ""
    )
    return _card(f"Activations of {acts.model or 'a model'}", _note(about),
                 _shortened(("site", "axes", "type"), rows, "sites"))  # fmt: skip


def expert_set(chosen: ExpertSet) -> str:
    """How many units of each layer, the first of them, and how they were chosen."""
    rows = [
        (layer, len(ids), f"{len(ids) / chosen.size:.1%}", ", ".join(map(str, ids[:8].tolist())) + _dots(ids, 8))
        for layer, ids in chosen.ids.items()
    ]
    return _card(f"ExpertSet: {len(chosen):,} {'neurons' if chosen.kind == 'neurons' else 'experts'} of {chosen.name}",
                 _shortened(("layer", "units", "share", "ids"), rows, "layers"),
                 _folded("how they were chosen", _pairs(chosen.record)) if chosen.record else "")  # fmt: skip


def steering_map(v: Any) -> str:
    """The parts: where, what, how long, on which tokens."""
    vectors = getattr(v, "vectors", {})
    rows = [
        (p.site, p.map.kind, f"{float(vectors[p.site].norm()):.3g}" if p.site in vectors else "", p.scope.text,
         "yes" if p.gate else "")
        for p in v
    ]  # fmt: skip
    return _card(f"{type(v).__name__}: {v.method} of {v.model}",
                 _shortened(("site", "map", "norm", "tokens", "gated"), rows, "parts"),
                 _folded("how it was made", _pairs(v.record)) if v.record else "")  # fmt: skip


def sae(s: SAE) -> str:
    """Where it reads and writes, its sizes, and how it was trained."""
    about = {
        "reads": ", ".join(s.sites) or "unknown", "writes": ", ".join(s.targets) or "unknown",
        "latents": f"{s.d_sae:,} of {s.d_in} dimensions", "fires": s.arch + (f", k = {s.k}" if s.k else ""),
    }  # fmt: skip
    return _card(f"SAE ({s.metadata.get('trained_as', s.arch)}, {s.shape})", _pairs(about),
                 _folded("how it was trained", _pairs(s.metadata)) if s.metadata else "")  # fmt: skip


def probe(p: Any) -> str:
    """Its settings, and what it learnt if it was fitted."""
    about: dict[str, Any] = {"settings": p.get_params()}
    if hasattr(p, "classes_"):
        about["classes"] = ", ".join(map(str, list(p.classes_)[:MOST])) + _dots(p.classes_, MOST)
        weights = getattr(p, "coef_", None)
        about["weights"] = f"{weights.shape[0]} x {weights.shape[1]} features" if weights is not None else "not linear"
    else:
        about["fitted"] = "not yet: .fit(X, y)"
    return _card(type(p).__name__, _pairs(about))


def table(frame: pd.DataFrame) -> str:
    """A Table as pandas shows it, and below it the settings that it carries."""
    shown = str(frame.to_html(max_rows=20, notebook=True, escape=True, border=0))
    return shown + (_folded("settings (.attrs)", _pairs(calls.about(frame))) if frame.attrs else "")


_SHOWERS: dict[tuple[str, str], Callable[[Any], str]] = {
    ("interp.model", "Model"): model,
    ("interp.activations", "Activations"): activations,
    ("interp.experts.sets", "ExpertSet"): expert_set,
    ("steering.vector", "SteeringMap"): steering_map,
    ("interp.sae.autoencoder", "SAE"): sae,
    ("probes.base", "Probe"): probe,
    ("pandas", "DataFrame"): table,
    ("pandas.core.frame", "DataFrame"): table,
}
#: Subclasses that IPython must be told of by name, since it looks a name up before the classes above it.
_ALSO = (("steering.vector", "SteeringVector"),)


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext interp.display``: the nouns and Tables with settings show themselves as HTML, and sites complete."""
    from interp import completion

    completion.register(shell)
    formatter = shell.display_formatter.formatters["text/html"]
    for module, name in (*_SHOWERS, *_ALSO):
        formatter.for_type_by_name(module, name, html)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext interp.display``: as before."""
    from interp import completion

    completion.unregister(shell)
    formatter = shell.display_formatter.formatters["text/html"]
    for module, name in (*_SHOWERS, *_ALSO):
        formatter.deferred_printers.pop((module, name), None)
        for kind in [k for k in formatter.type_printers if (k.__module__, k.__name__) == (module, name)]:
            formatter.type_printers.pop(kind)


# -- the pieces ------------------------------------------------------------------------------------------------
def _text(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        value = json.dumps(value, default=str, ensure_ascii=False)
    shown = str(value)
    return _html.escape(shown if len(shown) <= 400 else shown[:399] + "…")


def _card(title: str, *parts: str) -> str:
    return f'<div style="line-height:1.45"><b>{_html.escape(title)}</b>{"".join(parts)}</div>'


def _note(text: str) -> str:
    return f"<div>{_html.escape(text)}</div>"


def _pairs(values: Mapping[Any, Any]) -> str:
    return _rows((), [(key, value) for key, value in values.items()])


def _rows(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    left = ' style="text-align:left;vertical-align:top"'
    head = f"<tr>{''.join(f'<th{left}>{_html.escape(n)}</th>' for n in names)}</tr>" if names else ""
    body = "".join(f"<tr>{''.join(f'<td{left}>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{_html.escape(summary)}</summary>{body}</details>"


def _shortened(names: Sequence[str], rows: Sequence[Sequence[Any]], what: str) -> str:
    """The first rows, the others folded up."""
    if len(rows) <= MOST:
        return _rows(names, rows)
    return _rows(names, rows[:MOST]) + _folded(f"{len(rows) - MOST} more {what}", _rows(names, rows[MOST:]))


def _dots(items: Any, n: int) -> str:
    return ", …" if len(items) > n else ""


def _layers(layers: Sequence[int]) -> str:
    """0, 1, 2, 5 as '0..2, 5'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
