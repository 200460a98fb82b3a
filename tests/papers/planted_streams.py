"""A tiny Llama whose layers add nothing: every residual stream is the token's own embedding, written by the test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import interp


def unit_vectors(n: int, d: int = 32, seed: int = 0) -> Tensor:
    """`n` orthonormal vectors [n, d]."""
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))
    return q.T[:n].contiguous()


def streams(table: Tensor | np.ndarray, readout: Tensor | None = None, **config: int) -> interp.Model:
    """The model with these embeddings [token, d]; logits are `readout` [token, d] of the normalised last stream."""
    table = torch.as_tensor(np.asarray(table)).float()
    m = interp.load(
        "tiny:llama", vocab_size=len(table), hidden_size=table.shape[1], tie_word_embeddings=False, **config
    )
    with torch.no_grad():
        for layer in m.hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        m.hf.model.embed_tokens.weight.copy_(table)
        m.hf.model.norm.weight.fill_(1.0)
        if readout is not None:
            m.hf.lm_head.weight.copy_(readout)
    return m


def word_tokenizer(words: list[str]) -> Any:
    """A token per word, cut at blanks; the first word stands for unknown ones and for padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=words[0], pad_token=words[0])
