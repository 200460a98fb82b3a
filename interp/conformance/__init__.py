"""Conformance: does interp read and write this model rightly? Identities that must hold, whatever the family.

    interp.conformance.check(model)            a list of `Finding`s: one per identity, with its error
    interp.conformance.table(["olmoe", ...])   the same over tiny random models of transformers families

Each identity is an oracle that does not go through the code it tests:

    logits      a run under full capture gives the plain run's logits
    attention   pattern x v = z;   log pattern - scaled q.k depends on positions only (softmax, masks and biases do)
    stream      resid_mid = a resid_pre + b attn_out;   the next layer starts where this one ended
    experts     sum over slots of weight x out = what the experts module returned
    surgery     zeroing a head, neuron, expert or shared expert = zeroing the weights that read it
    twins       scaling q = scaling k;  scaling v = scaling z;  adding to resid_pre[l+1] = adding to resid_post[l]
    router      pushing one expert's logit up puts it into every token's choice; pushing it down takes it out; -inf and
                +inf do so whatever biases and groups say
    factors     Monet: g = softmax of the surviving key logits;  sum of weight x single expert = mlp_out;  masking an
                expert takes out its weight x output
    parts       Monet: zeroing a key = masking its row or column;  zeroing a part's neurons = zeroing the weights that
                make them;  pushing a key logit up gives the key its head's whole weight in every layer of the group
    gradient    the derivative of an edit, by differences, = the gradient that reaches the site
    padding     left, right or no padding: the same activations at the same tokens
    cache       generating with and without KV cache: the same edited tokens, the same text
    restored    afterwards: the same hooks, implementations, weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.conformance import factored, reading, running, writing
from interp.conformance.bench import Bench, Finding, Result
from interp.model import Model

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Finding", "check", "family", "table", "totals"]

#: Identities that a family cannot satisfy by its own making, with the reason; reported, and not counted as ours.
KNOWN = {
    (
        "bitnet",
        "gradient",
    ): "activations are rounded to 8 bits with a straight-through gradient, so slopes are not gradients",
    ("hrm_text", "gradient"): "gradients are cut between the passes of its loop by design",
}


_CHECKS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "logits": reading.logits,
    "attention": reading.attention,
    "stream": reading.stream,
    "experts": reading.experts,
    "surgery": writing.surgery,
    "twins": writing.twins,
    "router": writing.router,
    "factors": factored.factors,
    "parts": factored.parts,
    "gradient": running.gradient,
    "padding": running.padding,
    "cache": running.cache,
}


def check(m: Model, ids: Tensor | None = None, seed: int = 0) -> list[Finding]:
    """Runs every identity that applies to this model. `ids` [batch, pos] defaults to random tokens, 2 x 10."""
    generator = torch.Generator().manual_seed(seed)
    if ids is None:
        ids = torch.randint(3, min(m.d_vocab, 1000), (2, 10), generator=generator).to(m.device)
    bench = Bench(m, ids, generator)
    before = bench.state()
    findings: list[Finding] = []
    for name, run in _CHECKS.items():
        try:
            findings += [Finding(name, *f) for f in run(bench)]
        except Exception as error:  # a crash of one identity is a finding; the others still count
            findings.append(Finding(name, False, math.inf, f"{type(error).__name__}: {error}"))
    after = bench.state()
    wrong = [key for key in before if before[key] != after[key]]
    family = getattr(m.config, "model_type", "")
    findings = [
        f if f.ok or (family, f.check) not in KNOWN else Finding(f.check, True, f.error, KNOWN[family, f.check])
        for f in findings
    ]
    findings.append(Finding("restored", not wrong, 0.0 if not wrong else math.inf, ", ".join(wrong)))
    return findings


#: What a family must show, besides passing every identity, to count as whole.
CORE = ("embed", "resid_pre", "resid_post", "attn_out", "q", "k", "v", "pattern", "z", "mlp_out", "logits")
WHOLE = {
    "dense": (*CORE, "mlp_hidden"),
    "moe": (*CORE, "router_logits", "expert_ids", "expert_weight", "expert_hidden", "expert_out"),
    "factored": (*CORE, "key_logits1", "key_logits2", "g1", "g2", "z1"),
}


def family(name: str) -> dict[str, Any]:
    """One line of the table: does this family, tiny and random, pass; what it lacks, and why."""
    from interp.zoo.families import FAMILIES
    from interp.zoo.tiny import tiny

    kind = FAMILIES[name].kind if name in FAMILIES else "dense"
    row: dict[str, Any] = {
        "family": name,
        "kind": kind,
        "whole": False,
        "logit_error": math.nan,
        "failed": "",
        "refused": "",
    }
    try:
        m = Model(tiny(name), name=name)
        findings = check(m)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}"}
    places = {n for n, _ in m.anatomy.places}
    missing = [n for n in WHOLE[kind if kind in WHOLE else "moe"] if n not in places]
    reasons = sorted(
        {why for n in missing for (site, _), why in m.anatomy.absent.items() if site == n},
        key=lambda why: ("is dense" in why, why),  # a dense layer among routed ones says nothing about the family
    )
    failed = sorted({f"{f.check} ({f.note})" for f in findings if not f.ok})
    return row | {
        "whole": not failed and not missing,
        "logit_error": max(f.error for f in findings if f.check == "logits"),
        "failed": "; ".join(failed),
        "refused": f"{', '.join(missing)}: {reasons[0]}" if missing else "",
    }


def table(families: list[str] | None = None) -> pd.DataFrame:
    """Conformance of tiny random models of transformers families, one line each.

    Columns: family, kind, whole, logit_error (max abs, float32), failed (identities that do not hold), refused (core
    sites that the family does not have, with the reason).
    """
    import pandas as pd

    from interp.zoo.families import FAMILIES

    return pd.DataFrame([family(name) for name in families or FAMILIES])


def totals(frame: pd.DataFrame) -> pd.DataFrame:
    """Families per kind: all, whole, passing with refused sites, failing."""
    rows = frame.assign(partly=~frame.whole & (frame.failed == ""), failing=frame.failed != "")
    return rows.groupby("kind")[["whole", "partly", "failing"]].sum().assign(families=rows.groupby("kind").size())
