"""Scoring given answers under many edits, computing only what differs between them.

A report scores the same answers under dozens of edits: multipliers, layers, random controls. The literal way runs
prompt and answer through the whole model each time. Here, for each batch, once:

    the prompt, up to the first token that any of the edits touches      kept as keys and values
    the rest, unedited                                                   kept as what each layer returned

and then, for each edit, only the layers from the edit's first one on, only for the tokens behind the kept ones. An
answer is scored as if the model had written it: scopes see the prompt's end where it is, so "last | generated" edits
the tokens that it would edit in a generation. Equal prompts (an item's two answers) are run once.

A few rows are also run the literal way; where the two disagree (a family whose cache or layers hold more than
keys and values) everything is run the literal way, and the result says so.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp.activations import Tokens
from interp.edits import Edit
from interp.hooks.resume import copied, forms, outputs, resumed
from interp.interrupted import carried
from interp.model import Use
from interp.progress import bar
from interp.scope import Columns
from steering.errors import SteeringError
from steering.pairs import Passage

#: Largest difference of log-probabilities (nats, one token) between the quick and the literal way, by precision.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}


@dataclass
class Scores:
    """What `log_likelihoods` gives.

    Attributes:
        nats: run -> log-probability of each row's answer [row], float64.
        tokens: number of answer tokens [row].
        literal: "" where the shared way was taken, else why not.
        done: True where a row had all runs [row]; None for everywhere, as it is unless the call was interrupted.
    """

    nats: dict[Any, Tensor]
    tokens: Tensor
    literal: str = ""
    done: Tensor | None = None

    def per_token(self, run: Hashable) -> Tensor:
        """Mean log-probability of each row's answer tokens [row], nats."""
        return self.nats[run] / self.tokens

    def items(self) -> list[int]:
        """The items, each two rows (positive, negative), that had all runs."""
        done = torch.ones(len(self.tokens), dtype=torch.bool) if self.done is None else self.done
        return (done[0::2] & done[1::2]).nonzero()[:, 0].tolist()

    def differences(self, run: Hashable) -> Tensor:
        """Per-token log-probability of the positive answer less that of the negative one [item], nats."""
        each = self.per_token(run)
        return (each[0::2] - each[1::2])[self.items()]


@dataclass
class Scored:
    """One batch under one run: ``logits[i, j]`` predicts ``targets[i, j]`` where ``mask[i, j]``.

    Attributes:
        rows: which passages [row].
        run: the run's key.
        logits: [row, answer, vocab].
        targets: the answers' token ids [row, answer].
        mask: True at answer tokens [row, answer].
    """

    rows: list[int]
    run: Any
    logits: Tensor
    targets: Tensor
    mask: Tensor

    @property
    def nats(self) -> Tensor:
        """Log-probability of every answer token [row, answer], 0 where there is none."""
        flat = torch.nn.functional.cross_entropy(
            self.logits.flatten(0, 1).float(), self.targets.flatten(), reduction="none"
        )
        return -flat.view_as(self.targets).masked_fill(~self.mask, 0)


@dataclass
class Continued:
    """The runs of `continued`, to be iterated once; `literal` tells in the end why no work was shared, if so."""

    m: Any
    passages: Sequence[Passage]
    runs: Mapping[Any, Sequence[Edit]]
    batch_tokens: int
    share: bool
    literal: str = field(default="", init=False)

    def __iter__(self) -> Iterator[Scored]:
        if not self.share or self.m.uses:
            self.literal = "asked for" if not self.share else "other edits are in force"
        for number, rows in enumerate(_batches(self.passages, self.batch_tokens)):
            if number == 0 and not self.literal:
                few = [self.passages[i] for i in rows[:4]]
                self.literal = _Batch(self.m, few, list(self.runs.values())).trouble()
            batch = _Batch(self.m, [self.passages[i] for i in rows], list(self.runs.values()))
            with batch.opened(bool(self.literal)):
                for key, edits in self.runs.items():
                    logits = batch.literally(edits) if self.literal else batch.shared(edits)
                    if bool(logits[..., 0][batch.target_mask].isnan().any()):  # NaN in a stream is in its every logit
                        way = f"under {edits[0].name}" if edits else "unsteered"
                        raise SteeringError(f"{self.m.name} gives NaN as logits, {way}; there is nothing to score")
                    yield Scored(rows, key, logits, batch.targets, batch.target_mask)


def continued(
    m: Any,
    passages: Sequence[Passage],
    runs: Mapping[Any, Sequence[Edit]],
    *,
    batch_tokens: int = 1024,
    share: bool = True,
) -> Continued:
    """Logits at the answers of `passages` under each run, batch by batch, runs inside.

    Args:
        m: the model.
        passages: each with a prompt and an answer of at least one token.
        runs: key -> edits; an empty list is the unedited model.
        batch_tokens: answer tokens in a batch, padding included.
        share: False runs everything the literal way.

    Raises SteeringError for a passage without prompt or answer, or one longer than the context, and, while it is
    iterated, where the model gives NaN.
    """
    for i, p in enumerate(passages):
        if not 0 < p.answer < len(p.ids):
            part = "prompt" if p.answer == 0 else "answer"
            raise SteeringError(f"passage {i} has no {part}; answers are scored behind a prompt of at least one token")
        if m.n_ctx is not None and len(p.ids) > m.n_ctx:
            raise SteeringError(f"passage {i} has {len(p.ids)} tokens, and {m.name} reads {m.n_ctx}; shorten it")
    return Continued(m, passages, runs, batch_tokens, share)


def log_likelihoods(
    m: Any,
    passages: Sequence[Passage],
    runs: Mapping[Any, Sequence[Edit]],
    *,
    batch_tokens: int = 1024,
    share: bool = True,
) -> Scores:
    """Log-probability of each passage's answer under each run; arguments as for `continued`."""
    nats = {key: torch.zeros(len(passages), dtype=torch.float64) for key in runs}
    stream = continued(m, passages, runs, batch_tokens=batch_tokens, share=share)
    tokens, seen = torch.tensor([len(p.ids) - p.answer for p in passages]), torch.zeros(len(passages))

    def so_far() -> Scores:
        return Scores(nats, tokens, stream.literal, seen == len(runs))

    with carried(so_far), bar("scoring", len(passages) * len(runs)) as advance:
        for part in stream:
            nats[part.run][part.rows] = part.nats.double().sum(1).cpu()
            seen[part.rows] += 1
            advance(len(part.rows))
    return Scores(nats, tokens, stream.literal)


def divergences(
    m: Any, passages: Sequence[Passage], runs: Mapping[Any, Sequence[Edit]], *, batch_tokens: int = 512
) -> Iterator[tuple[Scored, Tensor, Tensor]]:
    """For each batch and run: (part, log-probabilities [row, answer, vocab], KL(unsteered || run) [row, answer]).

    `runs` must hold the unsteered model under the key 0.0, first. The KL is in nats, 0 where there is no answer token.
    """
    base = torch.empty(0)
    for part in continued(m, passages, runs, batch_tokens=batch_tokens):
        logp = part.logits.float().log_softmax(-1)
        base = logp if part.run == 0.0 else base
        yield part, logp, (base.exp() * (base - logp)).sum(-1).masked_fill(~part.mask, 0)


def _batches(passages: Sequence[Passage], batch_tokens: int) -> Iterator[list[int]]:
    """Rows of like prompt length, so that little is padding; an item's answers stay together, as their prompt is
    equal.
    """
    order = sorted(range(len(passages)), key=lambda i: (passages[i].answer, passages[i].prompt))
    while order:
        n, longest = 0, 0
        for i in order:
            longest = max(longest, len(passages[i].ids) - passages[i].answer)
            if n and ((n + 1) * longest > batch_tokens or (n + 1) * passages[i].answer > 16 * batch_tokens):
                break
            n += 1
        yield order[:n]
        order = order[n:]


class _Batch:
    """One batch: prompts padded on the left so that they end together, answers behind them padded on the right.

    The answers' last token predicts nothing that is asked for, so it is not run.
    """

    def __init__(self, m: Any, rows: Sequence[Passage], runs: Sequence[Sequence[Edit]]) -> None:
        self.m, self.runs = m, runs
        answers = [p.ids[p.answer :] for p in rows]
        self.prompt = max(p.answer for p in rows)
        width = max(map(len, answers))
        ids = torch.zeros(len(rows), self.prompt + width, dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, p in enumerate(rows):
            start = self.prompt - p.answer
            ids[i, start : start + len(p.ids)] = torch.tensor(p.ids)
            mask[i, start : start + len(p.ids)] = True
        ids, mask = ids.to(m.device), mask.to(m.device)
        self.targets, self.target_mask = ids[:, self.prompt :], mask[:, self.prompt :]
        self.ids, self.mask = ids[:, :-1], mask[:, :-1]
        self.position = Tokens(self.ids, self.mask).position
        index: dict[tuple[int, ...], int] = {}
        self.owner = torch.tensor([index.setdefault(p.prompt, len(index)) for p in rows], device=m.device)
        self.keep = self.targets.shape[1]

    @contextmanager
    def opened(self, literal: bool) -> Iterator[None]:
        """Tells the model's clock where the prompt ends, and keeps its hooks' clock running between the calls."""
        clock = self.m.clock
        clock.prompt, clock.given = self.prompt, self.mask[:, : self.prompt]
        try:
            if literal:
                yield
            else:
                with self.m.using(Use()):
                    yield
        finally:
            clock.prompt = clock.given = None

    # -- the literal way ---------------------------------------------------------------------------------------
    def literally(self, edits: Sequence[Edit]) -> Tensor:
        with self.m.intervene(*edits):
            return self.m(Tokens(self.ids, self.mask))[:, -self.keep :]

    # -- the shared way ----------------------------------------------------------------------------------------
    @cached_property
    def first(self) -> int:
        """The first column that any edit touches; at most the prompt's last, which predicts the first answer token."""
        tokenizer = self.m.tokenizer
        decode = None if tokenizer is None else lambda i: tokenizer.decode(i, clean_up_tokenization_spaces=False)
        columns = Columns(self.ids, self.mask, 0, self.prompt, self.mask[:, : self.prompt])
        first = self.prompt - 1
        for scope in {id(e.scope): e.scope for edits in self.runs for e in edits}.values():
            touched = scope.bind(decode)(columns).any(0).nonzero()
            first = min([first, *touched[:1, 0].tolist()])
        return first

    @cached_property
    def prefix(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [row, head, column, d_head] of the columns before `first`, by layer."""
        from transformers import DynamicCache

        n, cache = int(self.owner.max()) + 1, DynamicCache()
        one = torch.stack([(self.owner == i).nonzero()[0, 0] for i in range(n)])
        self._call(
            self.ids[one, : self.first], self.mask[one, : self.first], self.position[one, : self.first], cache, 1
        )
        return [(layer.keys[self.owner], layer.values[self.owner]) for layer in cache.layers]

    @cached_property
    def behind(self) -> tuple[list[Any], list[int]]:
        """What each layer returns, unedited, for the columns from `first` on; and the layers' forms."""
        with outputs(self.m.anatomy.layers) as found, forms(self.m.anatomy.layers) as shapes:
            self._rest()
        return found, shapes

    def shared(self, edits: Sequence[Edit]) -> Tensor:
        """Logits at the answers [row, answer, vocab]."""
        sites = [site for edit in edits for site in self.m.resolve(edit.site)]
        n = len(self.m.anatomy.layers)
        start = min((0 if s.name == "embed" else n if s.layer is None else s.layer for s in sites), default=n)
        behind, shapes = self.behind  # computed here if not before: what is kept is unedited
        stream = copied(behind[start - 1])  # the layers behind it may write into it
        with resumed(self.m.anatomy.layers, start, stream, shapes), self.m.intervene(*edits):
            return self._rest()

    def _rest(self) -> Tensor:
        from transformers import DynamicCache

        first, cache = self.first, None
        if first:
            cache = DynamicCache()
            cache.layers = [_layer(k, v) for k, v in self.prefix]
            self.m.clock.columns = Columns(
                self.ids[:, :first], self.mask[:, :first], 0, self.prompt, self.mask[:, : self.prompt]
            )
        return self._call(self.ids[:, first:], self.mask, self.position[:, first:], cache, self.keep)[:, -self.keep :]

    def _call(self, ids: Tensor, mask: Tensor, position: Tensor, cache: Any, keep: int) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        if self.m._takes_positions:
            inputs["position_ids"] = position
        if _keeps(self.m.hf):
            inputs["logits_to_keep"] = keep
        with torch.no_grad():
            return self.m.hf(**inputs).logits

    def trouble(self) -> str:
        """Why the shared way does not give what the literal one gives; "" if it does."""
        edits = next((e for e in self.runs if e), [])
        with self.opened(literal=True):
            wanted = Scored([], 0, self.literally(edits), self.targets, self.target_mask).nats
        try:
            with self.opened(literal=False):
                found = Scored([], 0, self.shared(edits), self.targets, self.target_mask).nats
        except Exception as error:  # whatever a family's own cache does not like
            return (
                f"{type(self.m.hf).__name__} cannot go on from kept keys and values ({type(error).__name__}: {error})"
            )
        off = float((wanted - found).abs().max())
        if not off <= TOLERANCE.get(self.m.dtype, 0.3):
            return f"going on from kept keys and values changes log-probabilities by {off:.2g}"
        return ""


def _layer(keys: Tensor, values: Tensor) -> Any:
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _keeps(hf: Any) -> bool:
    import inspect

    return "logits_to_keep" in inspect.signature(hf.forward).parameters
