"""From texts to a padded batch of token ids.

Padding is ours, not the tokenizer's: on the right, with a mask, so a tokenizer without a pad token works and the
choice of pad id never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.activations import Tokens

Text = Any  # str | list[str] | LongTensor [batch, pos] | list[list[int]] | Tokens


def tokenize(
    x: Text,
    tokenizer: Any,
    *,
    vocab: int,
    context: int | None,
    device: torch.device,
    max_length: int | None = None,
    truncate: bool = False,
    special: bool = True,
) -> Tokens:
    """A batch of tokens from whatever a user calls text.

    Raises ValueError for no text, an empty one, ids outside the vocabulary, or more tokens than `context` (or
    `max_length`) unless `truncate`.
    """
    limit = min((n for n in (context, max_length) if n is not None), default=None)
    if isinstance(x, Tokens):
        return _checked(x, vocab, limit, truncate, device)
    if isinstance(x, Tensor):
        ids = x[None] if x.dim() == 1 else x
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"tokens: expected integer ids [batch, pos], got {x.dtype} {list(x.shape)}")
        return _checked(Tokens(ids.long(), torch.ones_like(ids, dtype=torch.bool)), vocab, limit, truncate, device)
    if hasattr(x, "keys") and "input_ids" in x:  # what a tokenizer returns
        ids, mask = x["input_ids"], x.get("attention_mask")
        if isinstance(ids, Tensor) and mask is not None:
            x = Tokens(torch.atleast_2d(ids).long(), torch.atleast_2d(mask).bool())
        elif mask is not None and ids and not isinstance(ids[0], int):
            x = [[i for i, real in zip(row, kept, strict=True) if real] for row, kept in zip(ids, mask, strict=True)]
        else:
            x = ids
        return tokenize(
            x, tokenizer, vocab=vocab, context=context, device=device, max_length=max_length, truncate=truncate
        )
    rows = [x] if isinstance(x, str) or (isinstance(x, Sequence) and x and isinstance(x[0], int)) else list(x)
    if not rows:
        raise ValueError("tokens: the list of texts is empty; give at least one text")
    if all(isinstance(row, str) for row in rows):
        return _checked(_encode([str(row) for row in rows], tokenizer, special), vocab, limit, truncate, device)
    if all(isinstance(row, (list, tuple, Tensor)) for row in rows):
        return _checked(pad([[int(i) for i in row] for row in rows], 0), vocab, limit, truncate, device)
    bad = next(row for row in rows if not isinstance(row, str))
    raise ValueError(
        f"tokens: expected texts or lists of ids, got a list that holds {type(bad).__name__} ({bad!r:.60})"
    )


def _encode(texts: list[str], tokenizer: Any, special: bool) -> Tokens:
    if tokenizer is None:
        raise ValueError(
            "tokens: this model has no tokenizer; give token ids, or load it with interp.load(model, tokenizer=...)"
        )
    for i, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"tokens: text {i} is empty ({text!r}); leave it out")
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(
        texts,
        add_special_tokens=special,
        return_attention_mask=False,
        return_offsets_mapping=fast,
        **({"verbose": False} if not fast else {}),
    )
    rows = [list(row) for row in encoded["input_ids"]]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"tokens: the tokenizer makes no token of text {i} ({texts[i]!r:.60}); leave it out")
    offsets = [[(int(a), int(b)) for a, b in row] for row in encoded["offset_mapping"]] if fast else None
    fill = next(
        (
            i
            for i in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
            if i is not None
        ),
        0,
    )
    batch = pad(rows, fill)
    return Tokens(batch.ids, batch.mask, list(texts), offsets)


def pad(rows: list[list[int]], fill: int) -> Tokens:
    """Rows of ids as one batch, padded on the right."""
    width = max(map(len, rows))
    if width == 0:
        raise ValueError("tokens: a row of ids is empty")
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return Tokens(ids, mask)


def _checked(tokens: Tokens, vocab: int, limit: int | None, truncate: bool, device: torch.device) -> Tokens:
    ids, mask = tokens.ids, tokens.mask.bool()
    if mask.shape != ids.shape:
        raise ValueError(f"tokens: the mask is {list(mask.shape)}, the ids are {list(ids.shape)}")
    lengths = mask.sum(1)
    if ids.numel() == 0 or not bool((lengths > 0).all()):
        raise ValueError(f"tokens: row {int(lengths.argmin()) if ids.numel() else 0} holds no token")
    real = ids[mask]
    if int(real.min()) < 0 or int(real.max()) >= vocab:
        bad = int(real.max()) if int(real.max()) >= vocab else int(real.min())
        raise ValueError(
            f"tokens: id {bad} is outside the vocabulary 0..{vocab - 1}; is this the model's own tokenizer?"
        )
    ids = ids.where(mask, ids.clamp(0, vocab - 1))  # padding may hold anything (-100), but an embedding is looked up
    tokens = Tokens(ids, mask, tokens.texts, tokens.offsets)
    longest = int(lengths.max())
    if limit is not None and longest > limit:
        if not truncate:
            row = int(lengths.argmax())
            raise ValueError(
                f"tokens: text {row} has {longest} tokens, the context holds {limit}; shorten it, or pass truncate=True"
            )
        tokens = tokens.padded("right")
        offsets = [row[:limit] for row in tokens.offsets] if tokens.offsets else None
        tokens = Tokens(tokens.ids[:, :limit], tokens.mask[:, :limit], tokens.texts, offsets)
    return tokens.to(device)
