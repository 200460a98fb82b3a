"""How each layer of a model makes its attention scores, found out by asking it.

The QK fix needs the scores, masks, biases and sinks themselves: a probability that has underflowed to 0 does not tell
what its score was. Families keep these in many places. But whatever they add to q.k depends on positions alone, so one
run with all queries zeroed shows it: there the pattern is the softmax of masks, biases and sinks, and its logarithm is
what is added, up to a constant per row. The factor and the soft cap are what the attention interface is told, or one of
the two that families use who write attention out by hand.

The recipe is then checked: it must give back the pattern of the base run. A layer where it does not (keys chosen by
content, a pattern that is changed after the softmax) keeps the plain estimate, and the result says which and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp import edits
from interp.activations import Tokens
from interp.patching.qk_fix import Scores
from interp.sites import Site

if TYPE_CHECKING:
    from interp.model import Model


def added(m: Model, tokens: Tokens, layers: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer what is added to the scores [pair, head, query, key], and the sink's score [pair, head, query, 1].

    One forward pass, with the queries of all layers zeroed. Both up to a constant per row.
    """
    zeroed = [edits.zero(f"q[{i}]") for i in m.anatomy.having("q")]
    with torch.no_grad(), m.intervene(*zeroed):
        acts = m.capture(tokens, [Site("pattern", i) for i in layers])
    found = {}
    for i in layers:
        p = acts[Site("pattern", i)].float()
        left = 1 - p.sum(-1, keepdim=True)
        noise = 1e-5 if m.dtype in (torch.float32, torch.float64) else 3e-2  # what rounding alone leaves over
        found[i] = (p.log(), left.where(left > noise, torch.zeros_like(left)).log())
    return found


def explain(
    m: Model, layer: int, bias: Tensor, sink: Tensor, q: Tensor, k: Tensor, pattern: Tensor, real: Tensor
) -> Scores | str:
    """The recipe of one layer's scores, or why there is none.

    Args:
        m: the model.
        layer: the layer.
        bias: see `added`.
        sink: see `added`.
        q: queries of the base run [pair, pos, head, d].
        k: keys of the base run [pair, pos, kv head, d].
        pattern: the base run's pattern, which the recipe must give back [pair, head, query, key].
        real: True at queries that are tokens and not padding, which edits leave alone [pair, query].
    """
    known = m.anatomy.scores.get(layer)
    gaps = []
    for factor, cap in [known] if known else [(q.shape[-1] ** -0.5, None), (1.0, None)]:
        scores = Scores(float(factor), cap, bias, sink)
        gaps_here = (scores.pattern(scores(q, k)).nan_to_num(0.0) - pattern).abs().amax((1, 3))
        gap = float(gaps_here[real].max())
        if gap <= (1e-4 if m.dtype in (torch.float32, torch.float64) else 3e-2):
            return scores
        gaps.append(gap)
    return f"q.k, masks and sinks do not give this layer's pattern back (off by {min(gaps):.2g})"
