"""Lettered options, "(A)" and "(B)", as CAA scores them, in both orders.

P(letter) = softmax over the vocabulary at the token behind "(". A small model often does not bind a letter to its
option and says one letter whatever stands there, which half of all single-order items reward. With both orders such
a model gets exactly one half, and its bias is a number of its own (Dominguez-Olmedo et al. 2024, arXiv:2306.07951).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.calls import recorded
from interp.progress import bar
from steering import pairs as _pairs
from steering.continuation import continued
from steering.errors import SteeringError
from steering.intervals import bootstrap
from steering.pairs import Passage
from steering.propensity import MULTIPLIERS, check_multipliers
from steering.vector import SteeringMap

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = "{question}\n\nChoices:\n ({a}) {first}\n ({b}) {second}\n\nAnswer: ("


@recorded
def ab(
    m: Any,
    v: SteeringMap,
    items: Sequence[_pairs.Pair],
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    letters: tuple[str, str] = ("A", "B"),
    template: str = TEMPLATE,
    chat: bool = False,
    seed: int = 0,
    batch_tokens: int = 256,
) -> pd.DataFrame:
    """P(letter of the positive option), each item asked in both orders.

    Args:
        m: the model.
        v: the vector or map.
        items: (question, positive option, negative option).
        multipliers: strengths.
        letters: what the options are called; each must be one token behind the template's end.
        template: with the fields question, a, b (the letters), first, second (the options).
        chat: put the question and choices into the chat template; what follows the last blank line begins the answer.
        seed: of the bootstrap over items.
        batch_tokens: questions run at once.

    Returns columns multiplier, order ("positive first", "negative first", "both"), metric, value, low, high, n.
    Metrics: "p_positive" = P(positive letter) / P(either letter); "letter_bias" = P(first letter) / P(either) - 1/2
    over both orders, 0 where letters do not matter by themselves; "letter_mass" = P(either letter). Raises
    SteeringError for a letter that is not one token.
    """
    import pandas as pd

    ks = check_multipliers(multipliers)
    if isinstance(letters, str) or len(letters) != 2 or letters[0] == letters[1]:
        raise SteeringError(f"letters={letters!r}: expected two different ones, such as ('A', 'B')")
    triples = _pairs.check(items)
    passages, first = [], 0
    for question, positive, negative in triples:
        for options in ((positive, negative), (negative, positive)):
            text = template.format(question=question, a=letters[0], b=letters[1], first=options[0], second=options[1])
            head = _prompt(m, text, chat)
            ids = [_letter(m, text, letter, head, chat) for letter in letters]
            passages.append(Passage((*head, ids[0]), len(head)))
            first = first or ids[0]
            if ids[0] != first:
                raise SteeringError(f"letters={letters}: {letters[0]!r} is not the same token behind every question")
    second = _letter(m, text, letters[1], head, chat)
    runs = {k: (v * k).as_edits(m) if k else [] for k in ks}
    p = {k: np.zeros((len(passages), 2)) for k in ks}
    with bar("asking", len(passages) * len(runs)) as advance:
        for part in continued(m, passages, runs, batch_tokens=batch_tokens):
            probability = part.logits[:, 0].float().softmax(-1)[:, torch.tensor([first, second])]
            p[part.run][part.rows] = probability.double().cpu().numpy()
            advance(len(part.rows))
    rows: list[dict[str, Any]] = []
    for k in ks:
        mass = p[k].sum(1)
        share = p[k][:, 0] / mass  # of the first letter, which is the positive option's in even rows
        in_order = np.stack([share[0::2], 1 - share[1::2]], 1)
        orders = {"positive first": in_order[:, 0], "negative first": in_order[:, 1], "both": in_order.mean(1)}
        rows += [_row(k, order, "p_positive", each, seed) for order, each in orders.items()]
        rows.append(_row(k, "both", "letter_bias", (share[0::2] + share[1::2]) / 2 - 0.5, seed))
        rows.append(_row(k, "both", "letter_mass", (mass[0::2] + mass[1::2]) / 2, seed))
    table = pd.DataFrame(rows)
    table.attrs.update({"model": m.name, "method": v.method, "sites": v.sites, "scope": v.scope.text, "chat": chat})
    return table


def _prompt(m: Any, text: str, chat: bool) -> tuple[int, ...]:
    if not chat:
        return _pairs.passage(m, text).ids
    question, _, start = text.rpartition("\n\n")
    return tuple(m.tokens(_pairs.chat_text(m, question) + start, special=False).row(0).tolist())


def _letter(m: Any, text: str, letter: str, head: tuple[int, ...], chat: bool) -> int:
    """The one token by which `letter` goes on. Its prompt must stay as it was cut, or another token would be scored."""
    whole = _prompt(m, text + letter, chat)
    if whole[: len(head)] != head or len(whole) != len(head) + 1:
        raise SteeringError(
            f"letters: {letter!r} is not one token behind {text[-12:]!r} ({len(whole) - len(head)} tokens); choose "
            "other letters, or a template that ends where a token ends"
        )
    return whole[-1]


def _row(k: float, order: str, metric: str, each: np.ndarray, seed: int) -> dict[str, Any]:
    low, high = bootstrap(each, seed=seed)
    return {"multiplier": k, "order": order, "metric": metric, "value": float(each.mean()), "low": low, "high": high,
            "n": len(each)}  # fmt: skip
