"""What an expert is about: its top tokens in context, a description made of them, and how good that description is.

    examples = top_examples(m, texts, chosen, k=10)          the tokens at which each expert weighs most (Monet, fig. 3)
    per_token = experts_per_token(m, "some text")            how many experts a token uses (Monet, appendix)
    scores = detection(m, train, test, chosen)               is the description true of text it was not made from?

Monet leaves its automatic interpretation unquantified. Here a description is a rule that anybody can apply, "the token
is one of ... ", and its quality is a detection F1 (Bills et al. 2023; Paulo et al. 2024, arXiv 2410.13928): on held-out
tokens, half of them ones where the expert is active, who reads only the description says which. The same description
held against a *random* expert of the layer is the baseline: what a description earns by naming frequent tokens.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.sets import ExpertSet
from interp.experts.units import ExpertError, units_of

if TYPE_CHECKING:
    import pandas as pd


@recorded
def top_examples(
    model: Any,
    texts: Labelled | Corpus,
    chosen: ExpertSet,
    *,
    k: int = 10,
    around: int = 6,
    max_tokens: int | None = None,
) -> pd.DataFrame:
    """The `k` tokens at which each unit of the set weighs most.

    Columns layer, expert, rank, weight, token, before, after (text of up to `around` tokens each side), label. Layers
    that share a router show the same examples. A unit that is never used has no lines.
    """
    import pandas as pd

    units = chosen.check(model)
    data = corpus(model, texts, max_tokens)
    best: dict[tuple[int, int], list[Any]] = {}
    routers = _by_router(units, chosen)
    for batch in data.batches(model):
        mask = batch.tokens.mask
        row, column = mask.nonzero(as_tuple=True)
        for router, weights in units.weigh(model, batch.tokens):
            if router not in routers:
                continue
            ids = routers[router]
            for start in range(0, len(ids), 256):
                part = ids[start : start + 256]
                values, places = weights.of(part.to(mask.device)).topk(min(k, len(row)), dim=0)  # [k, unit]
                for u, unit in enumerate(part.tolist()):
                    heap = best.setdefault((router, unit), [])
                    for value, place in zip(values[:, u].tolist(), places[:, u].tolist(), strict=True):
                        if value <= 0 or (len(heap) == k and value <= heap[0][0]):
                            break  # sorted: the rest are smaller
                        r, c = int(row[place]), int(column[place])
                        ids_here = batch.tokens.ids[r][mask[r]].tolist()
                        entry = (value, int(batch.document[r]), c, ids_here, int(batch.label[r]))
                        (heapq.heappush if len(heap) < k else heapq.heapreplace)(heap, entry)
    rows = []
    for layer, ids in chosen.ids.items():
        for unit in ids.tolist():
            found = sorted(best.get((units.layers[layer], unit), []), reverse=True)
            for rank, (weight, _, at, window, label) in enumerate(found):
                context = {"before": window[max(0, at - around) : at], "after": window[at + 1 : at + 1 + around]}
                text = {name: model.tokenizer.decode(piece) for name, piece in context.items()}
                about = {"layer": layer, "expert": unit, "rank": rank, "weight": weight}
                about |= {"token": model.tokenizer.decode([window[at]]), **text, "label": data.labels[label]}
                rows.append(about)
    columns = ["layer", "expert", "rank", "weight", "token", "before", "after", "label"]
    return pd.DataFrame(rows, columns=columns)


@recorded
def experts_per_token(model: Any, texts: Any, threshold: float = 0.01) -> pd.DataFrame:
    """How many experts each token uses: columns batch, position, token, router, experts (weight above `threshold`).

    For Monet the weight is the sum over heads, and only pairs of surviving keys are looked at.
    """
    import pandas as pd

    units = units_of(model)
    tokens = model.tokens(texts)
    mask = tokens.mask
    batch, column = mask.nonzero(as_tuple=True)
    rows = []
    for router, weights in units.weigh(model, tokens):
        about = {"batch": batch.tolist(), "position": tokens.position[batch, column].tolist()}
        about |= {"token": [_decode(model, t) for t in tokens.ids[mask].tolist()]}
        rows.append(pd.DataFrame({**about, "router": router, "experts": weights.above(threshold).tolist()}))
    return pd.concat(rows, ignore_index=True)


@recorded
def detection(
    model: Any,
    describe_on: Labelled | Corpus,
    score_on: Labelled | Corpus,
    chosen: ExpertSet,
    *,
    top: int = 10,
    samples: int = 100,
    max_tokens: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How well a description by top tokens predicts an expert's activity on held-out text.

    The description of a unit is the set of the `top` tokens with the largest summed weight on `describe_on`. On
    `score_on` up to `samples` tokens where the unit is active and as many where it is not are drawn; the rule says
    "active" where the token is in the set.

    Returns columns layer, expert, description, f1, precision, recall, random_f1 (the same description scored on a unit
    of that layer drawn at random among those active), active (share of held-out tokens). Units that are active on fewer
    than 5 held-out tokens are left out; `.attrs["skipped"]` counts them. Raises ExpertError for neurons, which are
    never quite off.
    """
    import pandas as pd

    units = chosen.check(model)
    generator = torch.Generator().manual_seed(seed)
    if units.kind == "neurons":
        raise ExpertError("detection needs units that are on or off; neurons of a dense MLP are always a little on")
    routers = _by_router(units, chosen)
    told = _token_weights(model, units, corpus(model, describe_on, max_tokens), routers, model.d_vocab)
    data = corpus(model, score_on, max_tokens)
    others = {  # a random partner for the baseline
        router: torch.randint(units.size, (4 * len(ids),), generator=generator) for router, ids in routers.items()
    }
    seen, active = _activity(model, units, data, {r: torch.cat([ids, others[r]]) for r, ids in routers.items()})
    rows, skipped = [], 0
    for layer, ids in chosen.ids.items():
        router = units.layers[layer]
        order = {unit: i for i, unit in enumerate(routers[router].tolist())}
        used = active[router].sum(0)
        partners = [j for j in range(len(order), len(used)) if int(used[j]) >= 5]
        for unit in ids.tolist():
            column = order[unit]
            weights = told[router][column]
            words = weights.topk(top).indices[weights.topk(top).values > 0]
            on = active[router][:, column]
            if int(on.sum()) < 5 or not len(words):
                skipped += 1
                continue
            says = torch.isin(seen, words)
            scores = _f1(says, on, samples, generator)
            other = partners[int(torch.randint(len(partners), (1,), generator=generator))] if partners else None
            beside = float("nan")
            if other is not None:
                beside = _f1(says, active[router][:, other], samples, generator)["f1"]
            text = ", ".join(repr(_decode(model, t)) for t in words.tolist())
            about = {"layer": layer, "expert": unit, "description": f"the token is one of {text}"}
            rows.append({**about, **scores, "random_f1": beside, "active": float(on.double().mean())})
    columns = ["layer", "expert", "description", "f1", "precision", "recall", "random_f1", "active"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs = {"model": model.name, "top": top, "samples": samples, "seed": seed, "skipped": skipped}
    return frame


def _by_router(units: Any, chosen: ExpertSet) -> dict[int, Tensor]:
    """router -> the set's units in any of its layers."""
    out: dict[int, list[Tensor]] = {}
    for layer, ids in chosen.ids.items():
        out.setdefault(units.layers[layer], []).append(ids)
    if not out:
        raise ExpertError("the set is empty: there is nothing to describe")
    return {router: torch.cat(parts).unique() for router, parts in out.items()}


def _token_weights(
    model: Any, units: Any, data: Corpus, routers: dict[int, Tensor], vocab: int
) -> dict[int, Tensor]:  # fmt: skip
    """router -> summed weight of each unit at each token of the vocabulary [unit, vocab]."""
    sums = {router: torch.zeros(len(ids), vocab, dtype=torch.float64) for router, ids in routers.items()}
    for batch in data.batches(model):
        seen = batch.tokens.ids[batch.tokens.mask].cpu()
        for router, weights in units.weigh(model, batch.tokens):
            if router in routers:
                values = weights.of(routers[router].to(batch.tokens.ids.device)).cpu()  # [token, unit]
                sums[router].index_add_(1, seen, values.T.contiguous())
    return sums


def _activity(
    model: Any, units: Any, data: Corpus, routers: dict[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
    """Token ids [token], and router -> whether each unit is active there [token, unit]."""
    seen: list[Tensor] = []
    active: dict[int, list[Tensor]] = {router: [] for router in routers}
    for batch in data.batches(model):
        seen.append(batch.tokens.ids[batch.tokens.mask].cpu())
        for router, weights in units.weigh(model, batch.tokens):
            if router in routers:
                active[router].append((weights.of(routers[router].to(batch.tokens.ids.device)) > 0).cpu())
    return torch.cat(seen), {router: torch.cat(parts) for router, parts in active.items()}


def _f1(says: Tensor, on: Tensor, samples: int, generator: torch.Generator) -> dict[str, float]:
    """Scores of a prediction on as many active as inactive tokens."""

    def draw(places: Tensor, n: int) -> Tensor:
        return places[torch.randperm(len(places), generator=generator)[:n]]

    yes, no = on.nonzero()[:, 0], (~on).nonzero()[:, 0]
    n = min(samples, len(yes), len(no))
    hits, alarms = float(says[draw(yes, n)].sum()), float(says[draw(no, n)].sum())
    precision = hits / (hits + alarms) if hits + alarms else 0.0
    recall = hits / n if n else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def _decode(model: Any, token: int) -> str:
    return model.tokenizer.decode([token]) if model.tokenizer is not None else str(token)
