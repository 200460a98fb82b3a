"""Generating under edits and captures.

Prompts are padded on the left, as generation needs, and the clock is told where the prompt ends and how the caller had
laid it out. So a scope picks the same tokens with a cache (one new column per call) and without (all columns again).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from interp.activations import Tokens
from interp.recorder import Recorder
from interp.results import Generation
from interp.sites import Site

if TYPE_CHECKING:
    from interp.model import Model


def generate(
    m: Model,
    x: Any,
    max_new_tokens: int,
    capture: str | Site | Iterable[str | Site] | None,
    num_return_sequences: int,
    kwargs: dict[str, Any],
) -> Generation:
    """See `Model.generate`."""
    from interp.model import Use

    if kwargs.get("num_beams", 1) != 1 and (m.uses or capture is not None):
        raise ValueError(
            f"generate: num_beams={kwargs['num_beams']} reorders the batch between calls, so scopes would "
            "follow the wrong rows; use greedy decoding or sampling inside a context"
        )
    given = m.tokens(x)
    if num_return_sequences > 1:
        given = Tokens(
            given.ids.repeat_interleave(num_return_sequences, 0), given.mask.repeat_interleave(num_return_sequences, 0)
        )
    left = given.padded("left")
    kwargs.setdefault("do_sample", False)
    kwargs.setdefault("use_cache", True)  # checkpoints saved in training say False: each token would run all before it
    if kwargs.get("pad_token_id") is None:
        ids = (
            getattr(m.tokenizer, "pad_token_id", None),
            getattr(m.tokenizer, "eos_token_id", None),
            getattr(m.hf.generation_config, "eos_token_id", None),
            0,
        )
        kwargs["pad_token_id"] = next(i[0] if isinstance(i, list) else i for i in ids if i is not None)
    recorder = None
    if capture is not None:
        recorder = Recorder(m.with_routing(m.resolve(capture)), m.fragile, m.about(), copy=True)
        if Site("logits") in recorder.wanted and "logits_to_keep" in inspect.signature(m.hf.forward).parameters:
            kwargs.setdefault("logits_to_keep", 0)  # all of them; generation itself asks for the last one only
    m.clock.prompt, m.clock.given = left.ids.shape[1], given.mask
    try:
        with ExitStack() as stack:
            if recorder is not None:
                stack.enter_context(m.using(Use(recorder=recorder)))
            with torch.no_grad():
                ids = m.hf.generate(
                    input_ids=left.ids, attention_mask=left.mask.long(), max_new_tokens=max_new_tokens, **kwargs
                )
    finally:
        m.clock.prompt = m.clock.given = None
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, : left.ids.shape[1]] = left.mask
    new = ids[:, left.ids.shape[1] :]
    texts = (
        [str(row.tolist()) for row in new]
        if m.tokenizer is None
        else m.tokenizer.batch_decode(new, skip_special_tokens=True)
    )
    acts = None
    if recorder is not None:
        acts = recorder.activations(Tokens(ids[:, :-1], mask[:, :-1]))
    return Generation(texts, Tokens(ids, mask, given.texts), left.ids.shape[1], acts)
