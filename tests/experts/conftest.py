"""Three tiny models that read the same letters: a Monet, a Mixture of Experts, a dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interp
from interp.monet import MonetConfig, MonetForCausalLM

TEXTS = {
    "law": ["the court shall decide the appeal " * 4, "a party may end this licence ", "notice of the court " * 3],
    "code": ["def f(x): return x + 1 " * 4, "for i in range(10): print(i) ", "x = f(x) + f(x) " * 3],
    "bio": ["the cell membrane carries ions " * 3, "a gene of the cell ", "protein binding in the membrane " * 3],
}


def letters() -> Any:
    """A tokenizer with one token per character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted({c for texts in TEXTS.values() for text in texts for c in text} | {"?"})
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(signs)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="?")


def build(kind: str) -> interp.Model:
    tokenizer = letters()
    torch.manual_seed(3)
    if kind == "monet":
        config = MonetConfig(
            vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=4, num_attention_heads=2, moe_experts=8,
            moe_dim=4, moe_heads=2, moe_topk=3, moe_groups=2, moe_decompose="horizontal", max_position_embeddings=256,
            initializer_range=0.3,
        )  # fmt: skip
        return interp.Model(MonetForCausalLM(config).eval(), tokenizer, "monet-tiny")
    family = "olmoe" if kind == "routed" else "llama"
    return interp.load(f"tiny:{family}", tokenizer, vocab_size=len(tokenizer), max_position_embeddings=256)


@pytest.fixture(scope="session", params=["monet", "routed", "neurons"])
def model(request: pytest.FixtureRequest) -> interp.Model:
    return build(request.param)


@pytest.fixture(scope="session")
def monet() -> interp.Model:
    return build("monet")


@pytest.fixture
def kind(model: interp.Model) -> str:
    return "neurons" if "llama" in model.name else "auto"


@pytest.fixture
def texts() -> dict[str, list[str]]:
    return TEXTS
