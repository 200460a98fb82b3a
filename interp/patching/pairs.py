"""Prompt pairs: a clean prompt, its corrupt twin, and the answers that tell the two apart.

Patching compares two runs position by position, so a pair is only a pair if its two prompts have the same tokens in the
same places but for those that are meant to differ::

    p = pairs.of(m, "When Mary and John went out, John waved to", "When Mary and John went out, Mary waved to",
                 answers=" Mary", wrong=" John")
    p.frame()        which tokens differ
    p.metric()       logit(answers) - logit(wrong), the metric that the pair is made for

Replacing tokens is the default corruption, since it keeps the model on text it knows; Gaussian noise on the embeddings
is there for comparison, and labelled (`Pairs.noised`). Zhang & Nanda 2023 (arXiv 2309.16042) show how the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from interp.activations import Tokens
from interp.calls import recorded
from interp.metrics import Metric, last_logits
from interp.model import Model
from interp.tokens import Text

if TYPE_CHECKING:
    import pandas as pd

Answer = str | int | Sequence[int]
MetricName = Literal["logit_diff", "probability", "log_prob", "kl"]


class PairError(ValueError):
    """Prompts that do not pair, or an answer that is no single token."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Clean and corrupt prompts of equal length, row by row.

    Attributes:
        clean: [pair, pos], padded on the right.
        corrupt: [pair, pos], the same layout.
        answers: per pair the token ids that continue the clean prompt.
        wrong: per pair the token ids that continue the corrupt one.
        name: what tables call them.
        corruption: "token replacement", or "gaussian noise" (see `noised`).
        noise: embeddings of the corrupt run [pair, pos, d_model] where the corruption is noise, else None.
        noised_at: True at the tokens that got noise [pair, pos], else None.
        notes: what the builder checked or left out, in words.
        pieces: text of each token of (clean, corrupt), by pair, without padding.
    """

    clean: Tokens
    corrupt: Tokens
    answers: list[list[int]]
    wrong: list[list[int]]
    name: str = "pairs"
    corruption: str = "token replacement"
    noise: Tensor | None = None
    noised_at: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    pieces: tuple[list[list[str]], list[list[str]]] = ((), ())  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def differing(self) -> Tensor:
        """True at the tokens that the corruption touches [pair, pos]."""
        if self.noised_at is not None:
            return self.noised_at
        return (self.clean.ids != self.corrupt.ids) & self.clean.mask

    @recorded
    def frame(self) -> pd.DataFrame:
        """The alignment: one line per token with columns pair, position, clean, corrupt (texts) and differs."""
        import pandas as pd

        differs = self.differing
        rows = [
            {"pair": i, "position": p, "clean": a, "corrupt": b, "differs": bool(differs[i, p])}
            for i, (left, right) in enumerate(zip(*self.pieces, strict=True))
            for p, (a, b) in enumerate(zip(left, right, strict=True))
        ]
        frame = pd.DataFrame(rows, columns=["pair", "position", "clean", "corrupt", "differs"])
        frame.attrs |= {"name": self.name, "corruption": self.corruption, "notes": list(self.notes)}
        return frame

    def show(self, pair: int = 0) -> str:
        """One pair as two rows of tokens, the differing ones marked."""
        return aligned(self.pieces[0][pair], self.pieces[1][pair])

    @recorded
    def metric(self, name: MetricName = "logit_diff", reference: Tensor | None = None) -> Metric:
        """The metric that these pairs are made for, read at each row's last token.

        Args:
            name: ``logit_diff``: mean logit of the answers minus mean logit of the wrong ones, linear in the logits
                and so the one to begin with. ``probability``: summed probability of the answers; it hides what lowers
                them further once they are small. ``log_prob``: its logarithm. ``kl``: KL(reference || run) in nats.
            reference: logits of the clean run [pair, pos, vocab], for ``kl``.
        """
        right, wrong = self.answers, self.wrong

        def fn(logits: Tensor, tokens: Tokens | None) -> Tensor:
            final = last_logits(logits, tokens if tokens is not None else self._fitting(logits))
            if name == "kl":
                assert reference is not None
                p, q = last_logits(reference, self.clean).to(final).log_softmax(-1), final.log_softmax(-1)
                return (p.exp() * (p - q)).sum(-1)
            if len(final) != len(right):
                raise PairError(f"{self.name}: these pairs have {len(right)} rows, the logits {len(final)}")
            values = final if name == "logit_diff" else final.softmax(-1)
            yes = _pooled(values, right, "mean" if name == "logit_diff" else "sum")
            if name == "logit_diff":
                return yes - _pooled(values, wrong, "mean")
            return yes if name == "probability" else yes.log()

        if name == "kl" and reference is None:
            raise PairError("metric='kl' needs reference=, the logits of the clean run: m(pairs.clean)")
        if name not in ("logit_diff", "probability", "log_prob", "kl"):
            raise PairError(f"metric {name!r}: expected logit_diff, probability, log_prob or kl")
        if (name != "kl" and not all(right)) or (name == "logit_diff" and not all(wrong)):
            raise PairError(f"{self.name}: metric {name!r} needs answers= (and wrong= for logit_diff) for every pair")
        return Metric(fn, name, larger_is_more=name != "kl")

    def _fitting(self, logits: Tensor) -> Tokens | None:
        return self.clean if logits.shape[:2] == self.clean.ids.shape else None

    def rows(self, chosen: Sequence[int]) -> Pairs:
        """Some of the pairs, in the given order."""
        at = list(chosen)
        if not at:
            raise PairError(f"{self.name}: no rows were chosen")
        return replace(
            self,
            clean=Tokens(self.clean.ids[at], self.clean.mask[at]),
            corrupt=Tokens(self.corrupt.ids[at], self.corrupt.mask[at]),
            answers=[self.answers[i] for i in at],
            wrong=[self.wrong[i] for i in at],
            noise=None if self.noise is None else self.noise[at],
            noised_at=None if self.noised_at is None else self.noised_at[at],
            pieces=([self.pieces[0][i] for i in at], [self.pieces[1][i] for i in at]),
        )

    def split(self, share: float = 0.5) -> tuple[Pairs, Pairs]:
        """(pairs to choose on, pairs to score on): the first `share` of the rows, and the rest."""
        cut = min(max(int(len(self) * share), 1), len(self) - 1)
        if len(self) < 2:
            raise PairError(f"{self.name}: one pair cannot be split in two")
        return self.rows(range(cut)), self.rows(range(cut, len(self)))

    def noised(self, m: Model, factor: float = 3.0, seed: int = 0) -> Pairs:
        """The same clean prompts, corrupted by Gaussian noise on the embeddings of the tokens that differ.

        The noise has `factor` times the standard deviation of the entries of the embedding matrix (Meng et al. 2022,
        arXiv 2202.05262, use 3). Such inputs belong to no text; the corruption is labelled so, and results warn.
        """
        differs = self.differing
        embed = m.capture(self.clean, "embed")["embed"]
        std = factor * float(m.hf.get_input_embeddings().weight.detach().float().std())
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(embed.shape, generator=generator).to(embed)
        value = torch.where(differs[..., None].to(embed.device), embed + std * draw, embed)
        note = f"gaussian noise of standard deviation {std:.3g} ({factor:g} x the embeddings'), seed {seed}"
        return replace(
            self, corrupt=self.clean, corruption="gaussian noise", noise=value, noised_at=differs,
            notes=[*self.notes, note], pieces=(self.pieces[0], self.pieces[0]),
        )  # fmt: skip

    def __repr__(self) -> str:
        width = self.clean.ids.shape[1]
        return f"Pairs({self.name}: {len(self)} pairs of up to {width} tokens, {self.corruption})"


def of(
    m: Model,
    clean: Text,
    corrupt: Text,
    answers: Answer | Sequence[Answer] | None = None,
    wrong: Answer | Sequence[Answer] | None = None,
    *,
    name: str = "pairs",
    notes: Sequence[str] = (),
) -> Pairs:
    """Pairs from prompts, their alignment checked.

    Args:
        m: the model whose tokenizer decides what a token is.
        clean: the prompt(s) that show the behaviour: texts, ids or Tokens.
        corrupt: as many prompts that do not, token for token as long.
        answers: what continues each clean prompt: one token as text or id, or several ids (they count alike). One
            answer for all, or one per pair.
        wrong: the same for the corrupt prompts.
        name: what tables call the pairs.
        notes: carried along.

    Raises:
        PairError: rows of different number or length (the message shows them aligned), a pair without a difference, or
            an answer that is not one token.
    """
    left, right = m.tokens(clean).padded("right"), m.tokens(corrupt).padded("right")
    if len(left) != len(right):
        raise PairError(f"clean and corrupt: {len(left)} clean prompts and {len(right)} corrupt ones; give pairs")
    pieces = ([_pieces(m, row) for row in _rows(left)], [_pieces(m, row) for row in _rows(right)])
    for i, (a, b) in enumerate(zip(*pieces, strict=True)):
        if len(a) != len(b):
            raise PairError(
                f"pair {i}: the clean prompt has {len(a)} tokens, the corrupt one {len(b)}; patching goes by position, "
                f"so they must have the same number. Aligned:\n{aligned(a, b)}"
            )
        if bool((left.ids[i][left.mask[i]] == right.ids[i][right.mask[i]]).all()):
            raise PairError(f"pair {i}: the two prompts are the same tokens, so there is nothing to patch: {a}")
    return Pairs(
        left, right, _answers(m, answers, len(left), "answers"), _answers(m, wrong, len(left), "wrong"), name,
        notes=list(notes), pieces=pieces,
    )  # fmt: skip


def aligned(clean: Sequence[str], corrupt: Sequence[str]) -> str:
    """Two rows of tokens one below the other, gaps as ``-``, with ``^`` under what differs.

    >>> print(aligned(["the", " cat"], ["the", " tom", "cat"]))
    clean   | the |  cat | -   |
    corrupt | the |  tom | cat |
                    ^^^^   ^^^
    """
    if len(clean) == len(corrupt):  # position by position, as patching goes
        return _table([(_shown(clean, i, i + 1), _shown(corrupt, i, i + 1)) for i in range(len(clean))])
    cells: list[tuple[str, str]] = []
    for _, a0, a1, b0, b1 in SequenceMatcher(None, list(clean), list(corrupt), autojunk=False).get_opcodes():
        for k in range(max(a1 - a0, b1 - b0)):
            cells.append((_shown(clean, a0 + k, a1), _shown(corrupt, b0 + k, b1)))
    return _table(cells)


def _table(cells: list[tuple[str, str]]) -> str:
    widths = [max(len(a), len(b)) for a, b in cells]
    lines = [
        f"{label:<7} | " + " | ".join(cell[row].ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"
        for row, label in enumerate(("clean", "corrupt"))
    ]
    marks = "   ".join(("" if a == b else "^" * w).ljust(w) for (a, b), w in zip(cells, widths, strict=True))
    return "\n".join([*lines, f"{'':<7}   {marks}".rstrip()])


def token_id(m: Model, answer: str | int, what: str = "answer") -> int:
    """The id of an answer that is one token for this tokenizer. PairError, with its tokens, if it is several."""
    if isinstance(answer, int):
        if not 0 <= answer < m.d_vocab:
            raise PairError(f"{what} {answer}: the vocabulary is 0..{m.d_vocab - 1}")
        return answer
    if m.tokenizer is None:
        raise PairError(f"{what} {answer!r}: this model has no tokenizer; give token ids")
    ids = m.tokens(answer, special=False).row(0).tolist() if answer.strip() else []
    if len(ids) != 1:
        raise PairError(
            f"{what} {answer!r} is {len(ids)} tokens here ({_pieces(m, ids)}); give one that is a single token (often "
            "with a leading space), or its first token's id"
        )
    return int(ids[0])


def _answers(m: Model, given: Any, n: int, what: str) -> list[list[int]]:
    if given is None:
        return [[] for _ in range(n)]
    each = [given] * n if isinstance(given, (str, int)) else list(given)
    if len(each) != n:
        raise PairError(f"{what}: {len(each)} given for {n} pairs; give one for all, or one per pair")
    return [[token_id(m, a, what)] if isinstance(a, (str, int)) else [token_id(m, i, what) for i in a] for a in each]


def _pooled(values: Tensor, ids: list[list[int]], how: str) -> Tensor:
    """Mean or sum of each row's values at its ids [row]."""
    rows = [values[i, torch.tensor(at, device=values.device)] for i, at in enumerate(ids)]
    return torch.stack([row.mean() if how == "mean" else row.sum() for row in rows])


def _rows(tokens: Tokens) -> list[list[int]]:
    return [tokens.row(i).tolist() for i in range(len(tokens))]


def _pieces(m: Model, ids: Sequence[int]) -> list[str]:
    """The text of each token; ids where there is no tokenizer."""
    if m.tokenizer is None:
        return [str(i) for i in ids]
    return [m.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]


def _shown(row: Sequence[str], at: int, end: int) -> str:
    return row[at].replace("\n", "\\n") if at < end else "-"
