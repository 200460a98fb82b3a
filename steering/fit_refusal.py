"""Refusal-type directions: a behaviour that one direction decides, found, selected, erased and induced.

    found = steering.refusal(m, asks, chats, asks_val, chats_val, tokens=["I cannot"])
    found.ablation        erases it everywhere the stream is written
    found.vector          adds it, at its own layer
    found.table           every candidate with its three scores

Source: Arditi et al. 2024 (arXiv:2406.11717), sec. 2-3 and appendix C. The texts are the user's; what the project
ships and tests is about planted refusal of mild requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.edits import Edit
from interp.sites import Site
from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.maps import projection
from steering.pairs import Passage
from steering.reading import At, read, sites_at
from steering.vector import SteeringMap, SteeringVector

if TYPE_CHECKING:
    import pandas as pd

WRITES = ("resid_pre", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Refusal:
    """What `refusal` found.

    Attributes:
        vector: the chosen difference of means, added at its layer to all tokens.
        ablation: the same direction projected out wherever the stream is written.
        table: one row per candidate: layer, position, bypass, induce, kl (nats), kept, chosen.
    """

    vector: SteeringVector
    ablation: SteeringMap
    table: pd.DataFrame


def refusal(
    m: Any,
    present: Any,
    absent: Any,
    present_val: Any,
    absent_val: Any,
    tokens: Sequence[str | int],
    *,
    layer: Any = "*",
    positions: Sequence[int] | None = None,
    filtered: bool = True,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    depth: float = 0.8,
    chat: bool = False,
    system: str | None = None,
    batch_tokens: int = 1024,
) -> Refusal:
    """The direction that decides a behaviour, by difference of means and the published selection.

    Candidates r[i, l] = mean(present) - mean(absent) at block inputs, for each layer l and each position i behind the
    instruction. The score of a prompt is log P(R) - log(1 - P(R)) with R the first tokens of the behaviour. On the
    validation prompts: bypass = mean score of `present_val` with r ablated; induce = of `absent_val` with r added at
    its layer; kl = KL(plain || ablated) of `absent_val` at the last token. Dropped are candidates with kl > max_kl,
    induce < min_induce, l >= depth * layers or a value that is not finite; of the rest the lowest bypass is taken.

    Args:
        m: the model.
        present: prompts that call for the behaviour.
        absent: prompts that do not.
        present_val: other prompts that do, to select on. Score on yet others.
        absent_val: and other prompts that do not.
        tokens: R: token ids, or texts whose first token counts (as it follows the prompt).
        layer: layers to try.
        positions: token positions from the end; by default all that every prompt ends with (a chat template's tail).
        filtered: keep only prompts on which the model does as it is expected to, by the sign of the score.
        max_kl: a candidate may change the unaffected prompts by so many nats.
        min_induce: adding it must bring the score to this at least.
        depth: layers from this share of the depth on are not taken.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        batch_tokens: tokens run at once.

    Raises SteeringError where no candidate passes; the exception's ``.table`` has them all.
    """
    rows = {
        name: _pairs.texts(m, given, chat=chat, system=system, name=name)
        for name, given in zip(_NAMES, (present, absent, present_val, absent_val), strict=True)
    }
    first = opening(m, tokens)
    if filtered:
        rows = {name: _expected(m, name, r, first, batch_tokens) for name, r in rows.items()}
    positions = list(positions) if positions is not None else tail(rows["present"] + rows["absent"])
    table, directions = candidates(m, rows, first, sites_at(m, layer, "resid_pre"), positions, batch_tokens)
    finite = table[["bypass", "induce", "kl"]].notna().all(axis=1)
    shallow = table.layer < depth * m.n_layers
    table["kept"] = finite & shallow & (table.kl <= max_kl) & (table.induce >= min_induce)
    record: dict[str, Any] = {
        "max_kl": max_kl, "min_induce": min_induce, "depth": depth, "tokens": first, "positions": positions,
        "prompts": {name: len(r) for name, r in rows.items()},
    }  # fmt: skip
    table.attrs.update(model=m.name, method="refusal", **record)
    if not bool(table.kept.any()):
        error = SteeringError(
            f"refusal: none of {len(table)} candidates passes kl <= {max_kl}, induce >= {min_induce} and layer < "
            f"{depth} x {m.n_layers}; this model may not have the behaviour in one direction (see the error's .table)"
        )
        error.table = table  # type: ignore[attr-defined]
        raise error
    best: Any = table.bypass.where(table.kept).idxmin()
    table["chosen"] = table.index == best
    site, r = directions[best]
    record |= {"layer": int(table.layer[best]), "position": int(table.position[best])}
    vector = SteeringVector.of(m, {site: r}, method="refusal", scope="all", record=record)
    return Refusal(vector, directional_ablation(m, r, record=record), table)


def candidates(
    m: Any, rows: dict[str, list[Passage]], tokens: list[int], sites: Sequence[str], positions: Sequence[int],
    batch_tokens: int = 1024,
) -> tuple[pd.DataFrame, list[tuple[str, Tensor]]]:  # fmt: skip
    """Every difference of means with its three scores: a row each (layer, position, bypass, induce, kl), and (site, r).

    rows: passages by the names present, absent, present_val, absent_val. A difference of nought has no scores (NaN).
    """
    import pandas as pd

    a, b = (read(m, rows[name], sites, positions, batch_tokens) for name in ("present", "absent"))
    plain = last_logits(m, rows["absent_val"], [], batch_tokens)
    lines, directions = [], []
    for s in sites:
        for i, position in enumerate(positions):
            r = a[s][:, i].mean(0) - b[s][:, i].mean(0)
            scores = dict.fromkeys(("bypass", "induce", "kl"), float("nan"))
            if float(r.norm()) > 0:
                scores = _scores(m, s, r, rows, tokens, plain, batch_tokens)
            lines.append({"layer": Site.parse(s).layer, "position": position, **scores})
            directions.append((s, r))
    return pd.DataFrame(lines), directions


def directional_ablation(
    m: Any, direction: Tensor, *, scope: Any = "all", record: dict[str, Any] | None = None
) -> SteeringMap:
    """``h -> h - r r' h`` (r of unit length) at every block input and at attention's and the MLP's output.

    direction: [d_model], or several [k, d_model], whose span goes. Where a family has no such output (parallel
    blocks in one), the sites that it has.
    """
    map_ = projection(direction.float().cpu())
    sites = [str(s) for name in WRITES if m.anatomy.having(name) for s in m.resolve(f"{name}[*]")]
    maps = dict.fromkeys(sites, map_)
    return SteeringMap.of(m, maps, method="directional_ablation", scope=scope, record=record)


_NAMES = ("present", "absent", "present_val", "absent_val")


def tail(passages: Sequence[Passage]) -> list[int]:
    """Positions from the end, as [-k, ..., -1], at which all passages have the same tokens; at least the last."""
    k = 0
    shortest = min(len(p.ids) for p in passages)
    while k < shortest and len({p.ids[-k - 1] for p in passages}) == 1:
        k += 1
    # passages that are all equal would agree everywhere; what is behind the instruction is what differs least
    return list(range(-max(1, min(k, shortest - 1)), 0))


def score(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """log P(R) - log(1 - P(R)) [batch] from logits [batch, vocab]."""
    p = logits.double().softmax(-1)[:, list(tokens)].sum(-1)
    return p.clamp_min(1e-300).log() - (1 - p).clamp_min(1e-300).log()


def last_logits(m: Any, passages: Sequence[Passage], changes: Sequence[Any], batch_tokens: int = 1024) -> Tensor:
    """Logits at the last token of each passage under edits [passage, vocab], on the CPU."""
    out: list[Tensor] = [torch.zeros(0)] * len(passages)
    order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))
    while order:
        n = max(1, min(len(order), batch_tokens // len(passages[order[-1]].ids)))
        chosen, order = order[:n], order[n:]
        tokens = m.tokens([list(passages[i].ids) for i in chosen])
        with m.intervene(*changes):
            logits = m(tokens)
        for row, i in enumerate(chosen):
            out[i] = logits[row, tokens.last[row]].float().cpu()
    return torch.stack(out)


def opening(m: Any, tokens: Sequence[str | int]) -> list[int]:
    """Ids of the tokens with which the behaviour begins."""
    if not len(tokens):
        raise SteeringError("tokens: give the first tokens of the behaviour, e.g. ['I cannot', 'Sorry']")
    ids = [t if isinstance(t, int) else int(m.tokens(t, special=False).row(0)[0]) for t in tokens]
    size = m.hf.get_input_embeddings().num_embeddings
    if not all(0 <= t < size for t in ids):
        raise SteeringError(f"tokens={list(tokens)}: {m.name} has tokens 0..{size - 1}")
    return list(dict.fromkeys(ids))


def _expected(m: Any, name: str, rows: list[Passage], first: list[int], batch_tokens: int) -> list[Passage]:
    scores = score(last_logits(m, rows, [], batch_tokens), first)
    kept = [r for r, s in zip(rows, scores.tolist(), strict=True) if (s > 0) == name.startswith("present")]
    if not kept:
        what = "shows" if name.startswith("present") else "withholds"
        raise SteeringError(
            f"{name}: on none of {len(rows)} prompts {m.name} {what} the behaviour (mean score "
            f"{float(scores.mean()):.2f}); check `tokens`, or pass filtered=False"
        )
    return kept


def _scores(
    m: Any, site: str, r: Tensor, rows: dict[str, list[Passage]], first: list[int], plain: Tensor, batch_tokens: int
) -> dict[str, float]:
    ablate: list[Edit] = directional_ablation(m, r).as_edits(m)
    add = SteeringVector.of(m, {site: r}, scope="all").as_edits(m)
    bypass = score(last_logits(m, rows["present_val"], ablate, batch_tokens), first).mean()
    induce = score(last_logits(m, rows["absent_val"], add, batch_tokens), first).mean()
    log_p, log_q = plain.log_softmax(-1), last_logits(m, rows["absent_val"], ablate, batch_tokens).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return {"bypass": float(bypass), "induce": float(induce), "kl": float(kl)}


@recorded
def projections(
    m: Any, texts: dict[str, Any], direction: SteeringVector | Tensor, *, layer: Any = "*", site: str = "resid_post",
    at: At = "last", chat: bool = False, batch_tokens: int = 2048,
) -> pd.DataFrame:  # fmt: skip
    """How much of a direction each kind of text has, layer by layer: what a suffix or a persona does to it.

    Columns: layer, label, value (mean cosine with the direction), low, high (its 95% interval, normal approximation).
    """
    import pandas as pd

    vector = direction.vector if isinstance(direction, SteeringVector) else direction
    sites = sites_at(m, layer, site)
    lines = []
    for label, given in texts.items():
        rows = read(m, _pairs.texts(m, given, chat=chat, name=label), sites, at, batch_tokens)
        for s in sites:
            cosine = torch.nn.functional.cosine_similarity(rows[s], vector[None], dim=-1).double()
            error = 1.96 * float(cosine.std()) / len(cosine) ** 0.5 if len(cosine) > 1 else float("nan")
            mean = float(cosine.mean())
            interval = {"value": mean, "low": mean - error, "high": mean + error}
            lines.append({"layer": Site.parse(s).layer, "label": label, **interval})
    table = pd.DataFrame(lines)
    table.attrs = {"model": m.name, "metric": "cosine with the direction", "at": at}
    return table
