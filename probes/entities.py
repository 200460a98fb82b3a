"""Entity awareness: which latents or experts fire on entities that the model knows, and which on those it does not?

    table = awareness(m, s, known_texts, unknown_texts)              s an SAE, or sites: "routing[*]", "mlp_hidden[3]"
    effect(m, s.clamp(latent, 5.0), held_out, metric, [s.clamp(i, 5.0) for i in others])    does it decide?
    attention_change(m, s.clamp(latent, 5.0), held_out, controls)    where do later heads look then?

A unit's separation score is the share of known entities on which it fires less that of unknown ones (Ferrando et al.
2024, "Do I Know This Entity?", arXiv:2411.14257, section 3); those that fire on unknown ones have a negative one. Units
are chosen by it on one half of the entities, and scored on the other by AUROC; the control chooses among the same units
by shuffled labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.calls import recorded
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd


def activity(m: Any, units: Any, texts: Any, at: str = "last") -> dict[str, np.ndarray]:
    """What each unit does in each text: site -> [text, unit]. `units` is an SAE (its latents) or site patterns."""
    from interp.sae import SAE
    from probes.reading import features

    if isinstance(units, SAE):
        site = str(units.site)
        h = features(m, texts, site, at=at)[str(m.resolve(site)[0])]
        with torch.no_grad():
            return {f"sae[{site}]": units.encode(torch.from_numpy(h)).float().numpy()}
    read = features(m, texts, units, at=at)
    return {node: read[node] for node in read}


@recorded
def awareness(
    m: Any, units: Any, known: Sequence[Any], unknown: Sequence[Any], *, at: str = "last", top: int = 5,
    groups: tuple[Sequence[object], Sequence[object]] | None = None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """The units that tell known entities from unknown ones.

    Args:
        m: the model.
        units: an SAE, or patterns of sites whose features are units (neurons, or experts by ``routing[*]``).
        known: texts that end in an entity the model knows.
        unknown: the same with entities it does not.
        at: which token; the entity's last.
        top: how many units of each kind are scored.
        groups: entity of each known and each unknown text.
        seed: of halves, shuffle and bootstrap.

    Returns:
        Table, best first: node (the unit), site, unit, kind (on what it fires: "known" | "unknown"), baseline ("none" |
        "shuffled"), known, unknown (share of texts of the choosing half on which it fires), separation, metric
        ("auroc", on the other half, above .5 if it does as chosen), value, low, high.

    Raises ProbeError for fewer than four texts of a kind.
    """
    import pandas as pd

    from probes.scores import auroc, interval

    if min(len(known), len(unknown)) < 4:
        raise ProbeError(f"awareness: {len(known)} known and {len(unknown)} unknown texts; give at least four of each")
    y = np.r_[np.ones(len(known), bool), np.zeros(len(unknown), bool)]
    names = np.arange(len(y)) if groups is None else np.array([f"{v}" for part in groups for v in part])
    if len(names) != len(y):
        raise ProbeError(f"groups: {len(names)} for {len(y)} texts; give one per text")
    acts = activity(m, units, [*known, *unknown], at)
    choosing = _half(y, names, seed)
    shuffled = y.copy()
    rng = np.random.default_rng(seed)
    for part in (choosing, ~choosing):
        shuffled[part] = rng.permutation(y[part])
    rows: list[dict[str, Any]] = []
    for baseline, labels in (("none", y), ("shuffled", shuffled)):
        found = []
        for site, z in acts.items():
            fires = z[choosing] > 0
            on, off = fires[labels[choosing]].mean(0), fires[~labels[choosing]].mean(0)
            found += [(on[i] - off[i], site, i, on[i], off[i]) for i in range(z.shape[1]) if on[i] != off[i]]
        found.sort(key=lambda f: -f[0])
        ends = [
            *((f, "known") for f in found[:top] if f[0] > 0),
            *((f, "unknown") for f in found[::-1][:top] if f[0] < 0),
        ]
        for (score, site, i, on_i, off_i), kind in ends:
            z = acts[site][~choosing][:, i]
            truth = labels[~choosing] == (kind == "known")
            got = interval(truth, z, auroc, names[~choosing], seed=seed)
            node = f"{site[:-1]}, latent={i}]" if site.startswith("sae[") else f"{site}, unit {i}"
            rows.append({"node": node, "site": site, "unit": i, "kind": kind, "baseline": baseline,
                         "known": float(on_i), "unknown": float(off_i), "separation": float(score), "metric": "auroc",
                         "value": got.value, "low": got.low, "high": got.high})  # fmt: skip
    columns = ["node", "site", "unit", "kind", "baseline", "known", "unknown", "separation", "metric", "value", "low",
               "high"]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "at": at, "seed": seed, "texts": len(y),
                   "units": sum(z.shape[1] for z in acts.values())}  # fmt: skip
    return table


@recorded
def attention_change(
    m: Any, edit: Any, inputs: Any, controls: Sequence[Any], *, keys: Any = None, sites: str = "pattern[*]"
) -> pd.DataFrame:
    """How an edit moves the last token's attention to the entity, head by head.

    Args:
        m: the model.
        edit: an Edit; heads below its site cannot change and show 0.
        inputs: texts or Tokens.
        controls: edits of the same size.
        keys: the entity's tokens, bool [text, pos]; by default all but the first token.
        sites: patterns of attention.

    Returns:
        Table: layer, head, metric ("attention"), before (mean share of attention), value (its change), low, high (95 %
        of the controls' changes).
    """
    import pandas as pd

    tokens = inputs if hasattr(inputs, "mask") else m.tokens(inputs)
    where = tokens.mask & (tokens.position > 0) if keys is None else torch.as_tensor(keys)
    if where.shape != tokens.mask.shape:
        raise ProbeError(f"keys: {list(where.shape)}; expected {list(tokens.mask.shape)}, a bool for each token")
    found = m.resolve(sites)

    def looks(*change: Any) -> np.ndarray:
        with m.intervene(*change):
            acts = m.capture(tokens, found, check=False)
        rows = torch.arange(len(tokens))
        return np.stack([(acts[str(s)][rows, :, tokens.last] * where[:, None]).sum(-1).mean(0).numpy() for s in found])

    plain = looks()
    mine = looks(edit) - plain  # [layer, head]
    others = np.stack([looks(c) - plain for c in controls])
    low, high = np.quantile(others, [0.025, 0.975], axis=0)
    rows = [{"layer": site.layer, "head": h, "metric": "attention", "before": float(plain[i, h]),
             "value": float(mine[i, h]), "low": float(low[i, h]), "high": float(high[i, h])}
            for i, site in enumerate(found) for h in range(plain.shape[1])]  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "inputs": len(tokens), "controls": len(controls)}
    return table


def _half(y: np.ndarray, names: np.ndarray, seed: int) -> np.ndarray:
    """True for one half of the groups of either class [text]."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(y), bool)
    for kind in (True, False):
        own = np.unique(names[y == kind])
        chosen |= (y == kind) & np.isin(names, rng.permutation(own)[: len(own) // 2])
    return chosen
