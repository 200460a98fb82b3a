"""Nets in which the truth is known: linear but for one softmax, with paths that cancel, with sharp attention."""

from __future__ import annotations

from typing import Any

import torch

import interp


def linear_net(strength: float = 0.0, layers: int = 2, seed: int = 0) -> interp.Model:
    """A GPT-2 without norms and with linear neurons: only attention is nonlinear, and that in the last layer only.

    `strength` is the size of the last layer's queries and keys; with 0 every pattern is uniform and the net is linear.
    """
    hf: Any = interp.load("tiny:gpt2", activation_function="linear", n_layer=layers, seed=seed).hf
    with torch.no_grad():
        for i, block in enumerate(hf.transformer.h):
            block.ln_1, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
            d = hf.config.n_embd
            for part in (block.attn.c_attn.weight, block.attn.c_attn.bias):
                part[..., : 2 * d] *= strength**0.5 if i == layers - 1 else 0
    hf.transformer.ln_f = torch.nn.Identity()
    return interp.Model(hf, name="linear net")


def cancelling() -> interp.Model:
    """Three linear layers in which layer 1's neurons take away again what layer 0's add, but for a kink.

    Layer 0's MLP writes c of the token along u. Layer 1's MLP reads u and writes -relu(u . x) along u, so that where
    u . x > 0 the gradient through both paths is 1 - 1 = 0. The corrupt run has u . x > 0, the clean one u . x < 0.
    """
    m = linear_net(layers=3)
    hf: Any = m.hf
    d, u = hf.config.n_embd, 0
    with torch.no_grad():
        for block in hf.transformer.h:
            for p in (*block.attn.parameters(), *block.mlp.parameters()):
                p.zero_()
        hf.transformer.wpe.weight.zero_()
        hf.transformer.wte.weight[:, u] = 0
        hf.transformer.wte.weight[:, 1] = torch.linspace(-1, 1, 101)  # what the token says
        first, second, _ = (block.mlp for block in hf.transformer.h)
        first.c_fc.weight[1, 0], first.c_proj.weight[0, u] = 1, 1
        second.c_fc.weight[u, 0], second.c_proj.weight[0, u] = 1, -1
        second.act = torch.nn.ReLU()
        head = torch.zeros(101, d)
        head[5, u], head[7, u] = 1, -1
        hf.lm_head.weight = torch.nn.Parameter(head)
    return m


def sharpen(family: str, factor: float, **config: Any) -> interp.Model:
    """A tiny random model whose attention scores are multiplied, so that attention is as peaked as in a trained one."""
    hf: Any = interp.load(f"tiny:{family}", **config).hf
    for module in hf.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling *= factor
    return interp.Model(hf, name=f"{family}, sharp")
