"""Tiny models that read words, for what needs a tokenizer: one token per word or sign, a chat template if wanted."""

from __future__ import annotations

import re
from typing import Any

import interp

FILLERS = [f"w{i}" for i in range(10)]  # so that no word has one of the ids 0..9, which planted models keep apart
TEXT = (
    "( ) A B : ? . , Answer Choices user assistant How was the film soup trip job today It we loved hated every day "
    "good bad bland cold fine dull great poor Is this right yes no wonderful dreadful nice weather rain sun "
    "cat dog runs sleeps"
)
CHAT = (
    "{% for t in messages %}{{ t.role }} : {{ t.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(chat: bool = False) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(dict.fromkeys([*FILLERS, *re.findall(r"\w+|[^\w\s]", TEXT)]))
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w1")
    if chat:
        fast.chat_template = CHAT
    return fast


def worded(family: str = "llama", chat: bool = False, **sizes: Any) -> interp.Model:
    return interp.load(f"tiny:{family}", tokenizer(chat), max_position_embeddings=256, **sizes)


PAIRS = [
    ("How was the film ?", "It was wonderful .", "It was dreadful ."),
    ("How was the soup ?", "It was good .", "It was bland , cold ."),
    ("How was the trip ?", "we loved every day .", "we hated every day ."),
    ("How was the job ?", "great .", "poor ."),
    ("How was the day ?", "fine .", "bad , dull ."),
    ("How was today ?", "It was nice .", "It was cold ."),
]
