"""Dynamic Activation Composition: how strong each property is steered is worked out anew for each token.

For property j at step t, with alpha_max = 2:

    p   the model's next-token distribution without steering
    q_j the one with property j at alpha_max at every generated position
    S   tokens in the nucleus (top-p) of p or of q_j
    alpha_jt = min(KL(p_S || q_jS), alpha_max)                  both renormalised on S

and position t is steered by sum_j alpha_jt v_j. Where steering would change nothing, because the text has the
property already, alpha is near 0 and the text stays fluent. It costs 2 + j passes per token. Source: Scalena et al.
2024 (arXiv:2406.17563, section 5.1); there one vector per step and layer at the input of attention's output
projection (`z`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.activations import Tokens
from interp.edits import Edit
from interp.model import Use
from interp.scope import Columns
from steering.errors import SteeringError
from steering.vector import SteeringMap

if TYPE_CHECKING:
    import pandas as pd

#: One map for all steps, or one per step (the last for all further ones).
Property = SteeringMap | Sequence[SteeringMap]


@dataclass(frozen=True)
class Composed:
    """What `dac` gives.

    Attributes:
        texts: the continuations (token ids as text where there is no tokenizer).
        ids: new token ids [batch, step].
        strengths: columns batch, step, property, kl (nats), alpha.
    """

    texts: list[str]
    ids: Tensor
    strengths: pd.DataFrame


def dac(
    m: Any,
    x: Any,
    properties: Sequence[Property] | SteeringMap,
    *,
    max_new_tokens: int = 20,
    top_p: float = 0.95,
    most: float = 2.0,
    names: Sequence[str] | None = None,
    sample: bool = False,
    seed: int = 0,
) -> Composed:
    """Continues prompts with each property's strength set per token; batched, each sequence for itself.

    Args:
        m: the model.
        x: prompts.
        properties: one map, or several, each one for all steps or a list with one per step. They act from the prompt's
            last token on, whatever their own scope.
        max_new_tokens: length of the continuations; a sequence ends early at the model's end-of-text token.
        top_p: mass of the nucleus.
        most: alpha_max, at which q is taken and at which alpha is clipped.
        names: of the properties, for the table.
        sample: draw tokens instead of taking the likeliest.
        seed: of the draws.

    Raises SteeringError for no property, or settings out of range.
    """
    import pandas as pd

    found: list[Property] = [properties] if isinstance(properties, SteeringMap) else list(properties)
    if not found:
        raise SteeringError("properties: the list is empty; give at least one steering map")
    if not 0 < top_p <= 1 or not most > 0 or max_new_tokens < 1:
        raise SteeringError(f"top_p={top_p}, most={most}, max_new_tokens={max_new_tokens}: expected (0, 1], > 0, >= 1")
    names = list(names) if names is not None else [f"{i}" for i in range(len(found))]
    if len(names) != len(found):
        raise SteeringError(f"names: {len(names)} for {len(found)} properties")
    if m.uses:
        raise SteeringError(
            "dac: runs several generations side by side, which other open contexts would mix up; close them"
        )
    tokens = m.tokens(x).padded("left")
    generator = torch.Generator().manual_seed(seed)
    ends = _ends(m)
    rows: list[dict[str, Any]] = []
    done = torch.zeros(len(tokens), dtype=torch.bool, device=m.device)
    new: list[Tensor] = []
    feed = tokens.ids
    with m.using(Use()):
        base, final = Stream(m, tokens), Stream(m, tokens)
        steered = [Stream(m, tokens) for _ in found]
        for step in range(max_new_tokens):
            maps = [p if isinstance(p, SteeringMap) else p[min(step, len(p) - 1)] for p in found]
            p = base.step(feed, [])
            edits: list[Edit] = []
            for name, one, stream in zip(names, maps, steered, strict=True):
                q = stream.step(feed, (one * most).within("last | generated").as_edits(m))
                kl = divergence(p, q, top_p)
                alpha = kl.clamp(0, most)
                edits += [_times(e, alpha) for e in one.within("last | generated").as_edits(m)]
                rows += [
                    {"batch": b, "step": step, "property": name, "kl": float(kl[b]), "alpha": float(alpha[b])}
                    for b in range(len(tokens)) if not bool(done[b])
                ]  # fmt: skip
            logits = final.step(feed, edits)
            if sample:
                chosen = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
            else:
                chosen = logits.argmax(-1)
            if ends:
                chosen = torch.where(done, torch.full_like(chosen, ends[0]), chosen)
                done = done | torch.isin(chosen, torch.tensor(ends, device=m.device))
            new.append(chosen)
            feed = chosen[:, None]
            if bool(done.all()):
                break
    ids = torch.stack(new, 1)
    texts = (
        [str(r.tolist()) for r in ids]
        if m.tokenizer is None
        else m.tokenizer.batch_decode(ids, skip_special_tokens=True)
    )
    return Composed(list(texts), ids, pd.DataFrame(rows))


def divergence(p: Tensor, q: Tensor, top_p: float = 0.95) -> Tensor:
    """KL(p || q) in nats of two logits [batch, vocab], on the union of their nuclei, renormalised there: [batch]."""
    keep = nucleus(p, top_p) | nucleus(q, top_p)
    a, b = (x.float().masked_fill(~keep, -torch.inf).log_softmax(-1) for x in (p, q))
    return (a.exp() * (a - b)).masked_fill(~keep, 0).sum(-1).clamp(min=0)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens, up to and with the one that brings their mass above `top_p`: bool [batch, vocab]."""
    order = logits.float().softmax(-1).sort(-1, descending=True)
    before = order.values.cumsum(-1) - order.values
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order.indices, before <= top_p)


class Stream:
    """One generation with a cache of its own, so that several can go on side by side.

    The model's clock knows one sequence at a time; each stream puts its own columns back before it goes on.
    """

    def __init__(self, m: Any, prompt: Tokens) -> None:
        self.m, self.mask = m, prompt.mask
        self.cache: Any = None
        self.columns: Columns | None = None

    def step(self, ids: Tensor, edits: Sequence[Edit]) -> Tensor:
        """Feeds the newest columns; logits behind the last of them [batch, vocab]."""
        if self.columns is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(ids, dtype=torch.bool)], 1)
        inputs: dict[str, Any] = {
            "input_ids": ids, "attention_mask": self.mask.long(), "use_cache": True, "past_key_values": self.cache,
        }  # fmt: skip
        if self.m._takes_positions:
            inputs["position_ids"] = (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        self.m.clock.columns = self.columns
        with torch.no_grad(), self.m.intervene(*edits):
            out = self.m.hf(**inputs)
        self.columns, self.cache = self.m.clock.columns, out.past_key_values
        return out.logits[:, -1]


def _times(edit: Edit, alpha: Tensor) -> Edit:
    gate = edit.gate
    if gate is None:
        return edit.gated(lambda h, where: alpha)
    return edit.gated(lambda h, where: alpha[:, None] * g if (g := gate(h, where)).dim() == 2 else alpha * g)


def _ends(m: Any) -> list[int]:
    given = getattr(m.hf.generation_config, "eos_token_id", None)
    return [] if given is None else [given] if isinstance(given, int) else list(given)
