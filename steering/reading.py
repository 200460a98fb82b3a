"""Reading activations at stated tokens, batch by batch: the one way in which every fit sees the model.

Which tokens, `at`:

    "last"            the last token of the passage
    "prompt_end"      the last token of the prompt, the one that predicts the answer's first
    "answer"          the mean over the answer's tokens
    "answer_start"    the answer's first token
    "all"             the mean over all tokens
    -2, 5             one token, counted from the end or from the start
    [-5, -4, ..., -1] several tokens; the result gets an axis for them

Each passage gives one row (per position), in float32 on the CPU: memory grows with passages, not with tokens. Where
every token is wanted (`each_token`), the rows come as a stream, for sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.progress import bar
from interp.sites import Site
from steering.errors import SteeringError
from steering.pairs import Passage, sides

At = str | int | Sequence[int]
WORDS = ("last", "prompt_end", "answer", "answer_start", "all")


def sites_at(m: Any, layer: Any, site: str = "resid_post") -> list[str]:
    """The concrete sites meant by a layer (number, several, a slice text such as "4:8", "*") and a site name.

    A site with its own brackets (``"z[5, head=3]"``) is taken as it is, and `layer` may be None. SiteError where the
    model has no such layer.
    """
    if layer is None or "[" in site:
        return [str(s) for s in m.resolve(site if "[" in site else f"{site}[*]")]
    if isinstance(layer, bool) or not isinstance(layer, int | str | Sequence | range):
        raise SteeringError(f"layer={layer!r}: expected a number, several, or a text such as '*' or '4:8'")
    layers = [layer] if isinstance(layer, int | str) else list(layer)
    if not layers:
        raise SteeringError("layer: the list is empty; give at least one")
    return [str(s) for s in m.resolve([f"{site}[{one}]" for one in layers])]


def one_site(m: Any, layer: Any, site: str = "resid_post") -> str:
    """As `sites_at`, for a fit that works at one place."""
    found = sites_at(m, layer, site)
    if len(found) != 1:
        raise SteeringError(f"layer={layer!r}: expected one layer, got {len(found)}")
    return found[0]


def weights(passage: Passage, at: At) -> list[list[tuple[int, float]]]:
    """For each row to be made of a passage: which tokens enter it, with what weight."""
    n, start = len(passage.ids), passage.answer
    if isinstance(at, str):
        spans = {
            "last": range(n - 1, n), "prompt_end": range(start - 1, start), "answer": range(start, n),
            "answer_start": range(start, min(start + 1, n)), "all": range(n),
        }  # fmt: skip
        if at not in spans:
            raise SteeringError(f"at={at!r}: expected one of {', '.join(WORDS)}, a token position or a list of them")
        span = spans[at]
        if not len(span) or span[0] < 0:
            part = "prompt" if at == "prompt_end" else "answer"
            raise SteeringError(
                f"at={at!r}: a passage of {n} tokens has no {part}; give pairs with one, or another `at`"
            )
        return [[(i, 1 / len(span)) for i in span]]
    rows = []
    for i in [at] if isinstance(at, int) else at:
        if not -n <= i < n:
            raise SteeringError(f"at={i}: a passage has only {n} tokens")
        rows.append([(i % n, 1.0)])
    if not rows:
        raise SteeringError("at: the list of positions is empty")
    return rows


def read(
    m: Any, passages: Sequence[Passage], sites: Sequence[str], at: At = "last", batch_tokens: int = 4096
) -> dict[str, Tensor]:
    """Activations of each passage at `sites`: site -> [passage, ...]; [passage, position, ...] where `at` is a list.

    What follows are the site's axes behind the position. Edits of open contexts are in force. SteeringError where an
    activation is not finite.
    """
    out: dict[str, Tensor] = {}
    with bar("reading", len(passages)) as advance:
        for rows, tokens, acts in _batches(m, passages, sites, batch_tokens):
            pick = _picks([weights(passages[i], at) for i in rows], tokens.mask)
            for site in sites:
                h = acts[site].float()
                got = torch.einsum("bop,bp...->bo...", pick, h.masked_fill(~_spread(tokens.mask, h), 0)).cpu()
                if not bool(torch.isfinite(got).all()):
                    raise SteeringError(f"{site}: {m.name} gives activations that are not finite on these texts")
                if site not in out:
                    out[site] = got.new_zeros(len(passages), *got.shape[1:])
                out[site][torch.tensor(rows)] = got
            advance(len(rows))
    return out if isinstance(at, Sequence) and not isinstance(at, str) else {s: v[:, 0] for s, v in out.items()}


def read_pairs(
    m: Any, pairs: Any, sites: Sequence[str], at: At = "last", *, chat: bool = False, system: str | None = None,
    batch_tokens: int = 4096,
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Activations of both sides of contrast pairs: site -> (positive [pair, ...], negative [pair, ...])."""
    positive, negative = sides(m, pairs, chat=chat, system=system)
    got = read(m, [*positive, *negative], sites, at, batch_tokens)
    return {site: (rows[: len(positive)], rows[len(positive) :]) for site, rows in got.items()}


def each_token(
    m: Any, passages: Sequence[Passage], sites: Sequence[str], batch_tokens: int = 4096, skip: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """(site, activations [token, ...] in float32 on the CPU) of every token from position `skip` on, in turn."""
    for _, tokens, acts in _batches(m, passages, sites, batch_tokens):
        wanted = tokens.mask & (tokens.position >= skip)
        for site in sites:
            yield site, acts[site][wanted].float().cpu()


def token_mean(
    m: Any, passages: Sequence[Passage], sites: Sequence[str], batch_tokens: int = 4096, skip: int = 0
) -> dict[str, Tensor]:  # fmt: skip
    """Mean over all tokens from position `skip` on, each counting alike: site -> [...], summed in float64."""
    total: dict[str, Tensor] = {}
    count = sum(max(0, len(p.ids) - skip) for p in passages)
    if skip < 0 or not count:
        raise SteeringError(f"skip={skip}: expected 0 or more, and fewer than the texts have tokens")
    for site, rows in each_token(m, passages, sites, batch_tokens, skip):
        total[site] = total.get(site, 0) + rows.double().sum(0)
    return {site: (value / count).float() for site, value in total.items()}


def _batches(
    m: Any, passages: Sequence[Passage], sites: Sequence[str], batch_tokens: int
) -> Iterator[tuple[list[int], Any, Any]]:
    """(which passages, their tokens, their activations), sorted by length so that little is padding."""
    if not passages:
        raise SteeringError("there is no passage to read; give at least one text")
    for site in sites:
        if (kind := Site.parse(site).kind).axes[:2] != ("batch", "pos") or kind.routed:
            raise SteeringError(f"{site}: vectors are read where there is one activation per token")
    order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))
    while order:
        n = 1
        while n < len(order) and (n + 1) * len(passages[order[n]].ids) <= batch_tokens:
            n += 1
        rows, order = order[:n], order[n:]
        tokens = m.tokens([list(passages[i].ids) for i in rows])
        yield rows, tokens, m.capture(tokens, sites, check=False)


def _picks(rows: list[list[list[tuple[int, float]]]], mask: Tensor) -> Tensor:
    """Weights of the tokens of each row to be made [passage, made, pos]."""
    pick = torch.zeros(len(rows), len(rows[0]), mask.shape[1], device=mask.device)
    for b, lines in enumerate(rows):
        for o, line in enumerate(lines):
            for column, weight in line:
                pick[b, o, column] = weight
    return pick


def _spread(mask: Tensor, h: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (h.dim() - 2))
