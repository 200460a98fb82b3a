"""Toxification reversal: what a bad prefix would do to each head at the last token, done the other way round.

    delta = z(bad prefix + text) - z(good prefix + text)                      at the last token, per head
    z <- z - (1 + |delta|)^.4 (1 + relu cos(z_bad, z))^.6 delta               z_bad: at the end of the bad prefix
    itself z <- z |z before| / |z|                                                   over all heads of the layer

z is a head's output before the output projection. Nothing is trained and no parameter is added; each new token costs
one more pass over the two prefixed texts. Source: Leong et al. 2023 (arXiv:2310.09573), sec. 4, eq. 4-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.edits import Where
from interp.results import Generation
from interp.scope import Scope
from interp.tokens import pad
from steering.errors import SteeringError
from steering.maps import Map, savable
from steering.pairs import Passage, Text, passage
from steering.reading import read, sites_at
from steering.vector import SteeringMap


@savable("reverse")
@dataclass(frozen=True, eq=False)
class Reverse(Map):
    """The formula above at token positions start, start + 1, ...

    Attributes:
        delta: one step per token, [token, head, d_head].
        bad: z at the end of the bad prefix, [head, d_head].
        start: position of delta's first token.
        norm_power, cosine_power: the exponents .4 and .6.
    """

    delta: Tensor
    bad: Tensor
    start: int = 0
    norm_power: float = 0.4
    cosine_power: float = 0.6

    def apply(self, h: Tensor, where: Where) -> Tensor:
        row = (where.position - self.start).clamp(0, len(self.delta) - 1)
        here = (where.position >= self.start) & (where.position < self.start + len(self.delta))
        delta = self.delta[row]  # [batch, pos, head, d_head]
        cosine = torch.nn.functional.cosine_similarity(h, self.bad.expand_as(h), dim=-1)
        size = (1 + delta.norm(dim=-1)) ** self.norm_power * (1 + cosine.relu()) ** self.cosine_power
        new = h - size[..., None] * delta
        old_norm, new_norm = (x.flatten(2).norm(dim=-1)[..., None, None] for x in (h, new))
        return torch.where(here[..., None, None], new * (old_norm / new_norm.clamp_min(1e-12)), h)

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.bad.shape)


def reversal(
    m: Any, text: Text, bad: Text, good: Text, *, layer: Any = "*", norm_power: float = 0.4, cosine_power: float = 0.6
) -> SteeringMap:
    """The reversal for the last token of one text, at every head of the layers; apply it to that text.

    Args:
        m: the model.
        text: the prompt, or token ids.
        bad: a prefix put before it, e.g. "The following text is rude."
        good: the opposite prefix, e.g. "The following text is kind."
        layer: layers whose heads are steered; all, in the paper.
        norm_power: the exponent .4.
        cosine_power: the exponent .6.
    """
    sites = sites_at(m, layer, "z")
    ids = list(passage(m, text).ids)
    deltas = _deltas(m, [ids], *_prefixes(m, bad, good), sites)
    bads = _ends(m, bad, sites)
    maps = {s: Reverse(deltas[s], bads[s], len(ids) - 1, norm_power, cosine_power) for s in sites}
    scope = Scope.window(len(ids) - 1, len(ids))
    return SteeringMap.of(m, maps, method="reversal", scope=scope, record={"text": text, "bad": bad, "good": good})


def reversed_generation(
    m: Any,
    prompts: Sequence[Text],
    bad: Text,
    good: Text,
    *,
    max_new_tokens: int = 20,
    layer: Any = "*",
    strength: float = 1.0,
    sample: bool = False,
    seed: int = 0,
) -> Generation:
    """Continues each prompt with the reversal renewed at every token; earlier tokens keep what was done to them.

    Greedy, or with `sample` drawn from the model's distribution. Passes run without a cache, so the cost grows with
    the square of the length. Rows stop at the tokenizer's end token.
    """
    sites = sites_at(m, layer, "z")
    prefixes, bads = _prefixes(m, bad, good), _ends(m, bad, sites)
    generator = torch.Generator().manual_seed(seed)
    stop = getattr(m.tokenizer, "eos_token_id", None)
    rows = [[*passage(m, p).ids] for p in ([prompts] if isinstance(prompts, str) else prompts)]
    made = []
    for ids in rows:
        start, steps = len(ids), dict[str, Tensor]()
        for _ in range(max_new_tokens):
            delta = _deltas(m, [ids], *prefixes, sites)
            steps = {s: torch.cat([steps[s], delta[s]]) if s in steps else delta[s] for s in sites}
            maps = {s: Reverse(steps[s], bads[s], start - 1).scaled(strength) for s in sites}
            with m.intervene(SteeringMap.of(m, maps, method="reversal", scope=Scope.window(start - 1))):
                logits = m(torch.tensor([ids]))[0, -1].float()
            if sample:
                ids.append(int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)))
            else:
                ids.append(int(logits.argmax()))
            if ids[-1] == stop:
                break
        made.append((start, ids))
    texts = [
        m.tokenizer.decode(ids[start:], skip_special_tokens=True) if m.tokenizer is not None else str(ids[start:])
        for start, ids in made
    ]
    width = max(start for start, _ in made)
    # laid out as Model.generate does: prompts padded on the left so that they end together
    tokens = pad([ids[start:] for start, ids in made], 0)
    left = pad([ids[:start][::-1] for start, ids in made], 0)
    whole = type(tokens)(
        torch.cat([left.ids.flip(1), tokens.ids], 1), torch.cat([left.mask.flip(1), tokens.mask], 1)
    )  # fmt: skip
    return Generation(texts, whole, width)


def _prefixes(m: Any, bad: Text, good: Text) -> tuple[list[int], list[int]]:
    if (bad == good) or not len(bad) or not len(good):
        raise SteeringError(f"bad, good: expected two different prefixes, got {bad!r:.40} and {good!r:.40}")
    return list(passage(m, bad).ids), list(passage(m, good).ids)


def _ends(m: Any, bad: Text, sites: Sequence[str]) -> dict[str, Tensor]:
    return {s: x[0] for s, x in read(m, [passage(m, bad)], sites, "last").items()}


def _deltas(
    m: Any, rows: list[list[int]], bad: list[int], good: list[int], sites: Sequence[str]
) -> dict[str, Tensor]:  # fmt: skip
    """z behind the bad prefix less z behind the good one, at each row's last token: site -> [row, head, d_head]."""
    first = getattr(m.tokenizer, "bos_token_id", None)
    passages = []
    for prefix in (bad, good):
        for ids in rows:
            rest = ids[1:] if ids[0] == first and prefix[0] == first else ids  # one start of text, not two
            passages.append(Passage((*prefix, *rest), len(prefix) + len(rest)))
    got = read(m, passages, sites, "last")
    return {s: x[: len(rows)] - x[len(rows) :] for s, x in got.items()}
