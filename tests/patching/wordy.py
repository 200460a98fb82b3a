"""A tiny Llama whose tokenizer knows, as one token each, the words of the project's own prompt pairs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import interp
from interp.patching import builders, words


def tokenizer() -> Any:
    """One token per word, sign and digit."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [str(v) for k, v in vars(words).items() if k.isupper()]
    texts.append(Path(builders.__file__).read_text(encoding="utf-8"))  # the templates stand there
    known = sorted(set(re.findall(r"\d|[^\W\d]+|[^\w\s]", " ".join(texts))))
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *known])}, unk_token="?"))
    steps = [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="?")


def wordy(family: str = "llama", **sizes: Any) -> interp.Model:
    vocabulary = tokenizer()
    return interp.load(f"tiny:{family}", vocabulary, vocab_size=len(vocabulary), max_position_embeddings=128, **sizes)
