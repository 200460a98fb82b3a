"""Training steps of other libraries' sparse autoencoders, from a folder that has them.

    pip install --no-deps --target FOLDER dictionary-learning eai-sparsify natsort schedulefree

dictionary-learning's step is its trainer's own `update`. sparsify's trainer runs a language model in every step, so its
step is written out here as its `fit` has it: its autoencoder's forward pass, backward, gradients along the decoder's
rows removed, and Adam (of the optimizers it offers, the one that all others use). Both start from weights of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor], Any]
TRAINERS = {"topk": ("top_k", "TopKTrainer"), "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
            "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
            "panneal": ("p_anneal", "PAnnealTrainer")}  # fmt: skip


def peers(folder: Path, arch: str, d_in: int, d_sae: int, k: int, x: Tensor, fires: int) -> dict[str, Step]:
    """The steps of those that offer this architecture, by name.

    Those with a ReLU are given a bias under which `fires` latents of an activation in `x` exceed 0 (0: as they are).
    """
    sys.path.append(str(folder))
    found: dict[str, Step] = {}
    if arch in TRAINERS:
        found["dictionary-learning"] = _dictionary_learning(arch, d_in, d_sae, k, x, fires)
    if arch == "topk":
        found["sparsify"] = _sparsify(d_in, d_sae, k)
    return found


def _dictionary_learning(arch: str, d_in: int, d_sae: int, k: int, x: Tensor, fires: int) -> Step:
    import importlib

    module, name = TRAINERS[arch]
    options: dict[str, Any] = {} if arch == "panneal" else {"k": k}
    if arch == "matryoshka":
        options["group_fractions"] = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)(
        steps=10**6, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="", lr=3e-4, warmup_steps=0, seed=0,
        device="cpu", **options
    )  # fmt: skip
    if fires and arch == "panneal":
        with torch.no_grad():
            p = trainer.ae.encoder(x - trainer.ae.bias)
            trainer.ae.encoder.bias -= p.flatten().topk(fires * len(p)).values[-1]
    return lambda x: trainer.update(1, x)  # step 0 looks for the median first


def _sparsify(d_in: int, d_sae: int, k: int) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k))
    adam = torch.optim.Adam(sae.parameters(), lr=3e-4)

    def step(x: Tensor) -> None:
        sae(x, dead_mask=None).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        sae.set_decoder_norm_to_unit_norm()  # as its trainer does before each pass

    return step
