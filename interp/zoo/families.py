"""The transformers families that `tiny` can shrink, and what each one needs beyond the general recipe.

Most need nothing: their config names its sizes as everybody does. An override has one of three reasons, said
beside it: a size with a name of its own; a default config that the family's own model refuses, or that leaves
out what the family is known for (a mixture of experts whose default has no experts); a switch or factor that
its checkpoints set and the default does not, so that a bug in handling it would not show.

`FAMILIES` is keyed by the name that users know; for the text part of a model for images or sound it is that
model's. A second style of checkpoint of one family has a key of its own (`falcon_40b` and `falcon_rw` beside
`falcon`).
"""

from __future__ import annotations

from typing import Any

from interp.zoo.families_common import FACTORED, Family
from interp.zoo.families_dense import DENSE_FAMILIES
from interp.zoo.families_moe import MOE_FAMILIES, UNDECORATED_FAMILIES

__all__ = ["FAMILIES", "NO_ATTENTION", "UNBUILT", "Family", "families"]

# Monet, our own: n^2 experts made of 2n parts, shared in either of two ways.
_MONET: dict[str, Any] = {"moe_experts": 6, "moe_dim": 4, "moe_heads": 3, "moe_groups": 2}
FACTORED_FAMILIES: dict[str, Family] = {
    "monet": Family("monet", FACTORED, _MONET | {"moe_decompose": "vertical"}),
    "monet_horizontal": Family("monet", FACTORED, _MONET | {"moe_decompose": "horizontal"}),
}

FAMILIES: dict[str, Family] = MOE_FAMILIES | UNDECORATED_FAMILIES | FACTORED_FAMILIES | DENSE_FAMILIES


def families(kind: str | None = None) -> list[str]:
    """Names of the families that can be built; of one `kind` ("moe", "moe-undecorated", "factored", "dense") or all."""
    return [name for name, family in FAMILIES.items() if kind in (None, family.kind)]


# Recurrent language models: nothing attends to anything.
NO_ATTENTION: tuple[str, ...] = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")

_ENCODER = "an encoder that reads in both directions, not a causal language model"
_DECODER = "the decoder half of an encoder-decoder, not a causal language model of its own"
_ENCODERS = """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"""
_DECODERS = """bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet
trocr whisper"""
_DRAFTER = "a drafter that reads the states of a larger Gemma 4: it cannot run by itself"
_COMPOSER = "generates sound: its decoder continues codes of sound, not text"

UNBUILT: dict[str, str] = {
    **dict.fromkeys(_ENCODERS.split(), _ENCODER),
    **dict.fromkeys(_DECODERS.split(), _DECODER),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTER),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _COMPOSER),
    # of the families with decorated experts
    "diffusion_gemma": "writes text by diffusion, refining all positions of a block at once: not causal",
    "openai_privacy_filter": "labels tokens and reads in both directions: not a causal language model",
    # of the mixtures of experts with code of their own
    "nllb_moe": "an encoder-decoder (translation): not a causal language model",
    "switch_transformers": "an encoder-decoder (T5's kind): not a causal language model",
    # others that transformers lists as causal language models
    "blt": "reads bytes in patches that a second model cuts: its layers see patches, not tokens",
    "cpmant": "attends in both directions over its input: not causal",
    "git": "BERT's kind of layers over a picture and its caption: not used without a picture",
    "got_ocr2": "its language model is Qwen 2: use tiny('qwen2')",
    "moss_transcribe_diarize": "its language model is Qwen 3: use tiny('qwen3')",
    "reformer": "attends to positions that it draws by random hashing: two runs see different patterns",
    "xlnet": "predicts tokens in permuted order and reads in both directions by default: not causal",
}
