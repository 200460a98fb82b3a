"""What is measured: cases (which activations), methods (who reads them), and the model that all of them read.

Here are our own method and the two that need no library: hooks written by hand, and the outputs that transformers
returns itself. The libraries are in `_peers`. Every method makes the whole forward pass, up to the logits, except the
one that says it stops early.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from _clock import interleave
from torch import Tensor, nn

import interp

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Activations that somebody wants, and how much slower than the plain forward pass we allow ourselves to be."""

    title: str
    sites: tuple[str, ...]
    target: float | None = None


@dataclass(frozen=True)
class Method:
    """One way to get a case's activations.

    Attributes:
        run: the run that is timed.
        read: from what `run` returned, the tensors under our site names and in our axes; not timed. A method that has
            only some of the sites, or other values at some, gives only those that can be compared.
        note: what it gives instead where it cannot give all.
    """

    case: str
    name: str
    run: Callable[[], Any]
    read: Callable[[Any], Mapping[str, Tensor]]
    note: str = ""


class Subject:
    """The model and the batch that everybody reads."""

    def __init__(self, model: interp.Model, batch: int, length: int) -> None:
        """A batch of `batch` x `length` random tokens; 0 for the largest up to 8 that runs in half a second."""
        self.m, self.hf = model, model.hf
        for rows in [batch] if batch else (8, 4, 2, 1):
            self.use(rows, length)
            if batch or interleave({"plain": self.plain}, 2)["plain"].best < 0.5:
                break

    def use(self, batch: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, self.m.d_vocab, (batch, length), generator=generator).to(self.m.device)
        self.inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), "use_cache": False}

    def twin(self) -> Any:
        """The same model for a library that rebuilds modules: new modules, the same parameters in memory."""
        return copy.deepcopy(self.hf, {id(p): p for p in self.hf.parameters()})

    @property
    def layers(self) -> list[Any]:
        return list(self.hf.model.layers)

    @cached_property
    def moe(self) -> bool:
        return bool(self.m.n_experts)

    @cached_property
    def cases(self) -> dict[str, Case]:
        attention = ("q[*]", "k[*]", "v[*]", "z[*]")
        found = {"residual": Case("all residual streams", ("resid_post[*]",), 1.05)}
        if self.moe:
            middle = self.m.n_layers // 2
            found["attention"] = Case("all q, k, v, z", attention, 1.25)
            routed = ("router_logits[*]", "expert_ids[*]", "expert_weight[*]")
            found["routing"] = Case("routing of every layer", routed, 1.10)
            found["experts"] = Case(f"per-expert hidden of layer {middle}", (f"expert_hidden[{middle}]",))
        else:
            found["attention"] = Case("all q, k, v, z and MLP neurons", (*attention, "mlp_hidden[*]"), 1.25)
        return found

    def plain(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.hf(**self.inputs).logits
        return logits

    def stacked(self, name: str, tensors: list[Tensor]) -> Values:
        """One tensor per layer as sites, with (batch, pos) in front where tokens are flattened or heads come first."""
        batch, length = self.ids.shape
        out = {}
        for i, t in enumerate(tensors):
            if t.dim() == 2:
                t = t.unflatten(0, (batch, length))
            elif t.dim() == 4 and t.shape[1] != length:
                t = t.transpose(1, 2)
            out[f"{name}[{i}]"] = t
        return out


def smollm2(dtype: torch.dtype, device: str) -> interp.Model:
    """SmolLM2-135M-Instruct: 30 layers, d_model 576, 9 heads."""
    return interp.load("smollm2", dtype=dtype, device=device)


def olmoe(dtype: torch.dtype, device: str) -> interp.Model:
    """A random model of OLMoE's shape, small: 16 layers, d_model 512, 8 heads, 64 experts of width 256, top-8."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(vocab_size=8192, hidden_size=512, intermediate_size=256, num_hidden_layers=16,
                         num_attention_heads=8, num_key_value_heads=8, num_experts=64, num_experts_per_tok=8,
                         max_position_embeddings=512, architectures=["OlmoeForCausalLM"])
    return interp.load(OlmoeForCausalLM(config).to(device, dtype).eval())


MODELS = {"smollm2": smollm2, "olmoe": olmoe}


def ours(subject: Subject) -> Iterator[Method]:
    """interp, with the logits (so that it runs what the others run), and stopping behind the last site."""
    m, ids = subject.m, subject.ids

    def method(name: str, case: str, logits: bool) -> Method:
        sites = subject.cases[case].sites
        return Method(case, name, lambda: m.capture(ids, sites, logits=logits), lambda acts: acts)

    for case in subject.cases:
        yield method("interp", case, True)
        yield method("interp, stopping early", case, False)


def by_hooks(subject: Subject) -> Iterator[Method]:
    """Forward hooks written by hand, which keep references: what one does without a library."""
    layers = subject.layers

    def method(case: str, places: dict[str, tuple[list[nn.Module], str]], note: str = "") -> Method:
        def run() -> dict[str, list[Any]]:
            kept: dict[str, list[Any]] = {name: [] for name in places}
            handles = []
            for name, (modules, way) in places.items():
                for module in modules:
                    if way == "output":
                        handles.append(module.register_forward_hook(
                            lambda _module, _args, output, kept=kept[name]: kept.append(output)))
                    else:
                        handles.append(module.register_forward_pre_hook(
                            lambda _module, args, kept=kept[name]: kept.append(args[0])))
            try:
                subject.plain()
            finally:
                for handle in handles:
                    handle.remove()
            return kept

        return Method(case, "bare hooks", run, lambda kept: _from_hooks(subject, kept), note)

    yield method("residual", {"resid_post": (layers, "output")})
    attention: dict[str, tuple[list[nn.Module], str]] = {
        "q projected": ([layer.self_attn.q_proj for layer in layers], "output"),
        "k projected": ([layer.self_attn.k_proj for layer in layers], "output"),
        "v": ([layer.self_attn.v_proj for layer in layers], "output"),
        "z": ([layer.self_attn.o_proj for layer in layers], "input"),
    }
    if not subject.moe:
        attention["mlp_hidden"] = ([layer.mlp.down_proj for layer in layers], "input")
    yield method("attention", attention, "q and k before rotary, not compared")
    if subject.moe:
        yield method("routing", {"router": ([layer.mlp.gate for layer in layers], "output")})


def _from_hooks(subject: Subject, kept: dict[str, list[Any]]) -> Values:
    values: Values = {}
    for name, tensors in kept.items():
        if name == "router":
            values |= routing(subject, tensors)
        elif name in ("v", "z"):
            values |= subject.stacked(name, [t.unflatten(-1, (-1, subject.m.d_head)) for t in tensors])
        elif not name.endswith("projected"):
            values |= subject.stacked(name, tensors)
    return values


def routing(subject: Subject, outputs: list[tuple[Tensor, Tensor, Tensor]]) -> Values:
    """What OLMoE's routers return, (logits, weights, ids) per layer, as sites."""
    logits, weights, ids = (list(column) for column in zip(*outputs, strict=True))
    return (subject.stacked("router_logits", logits) | subject.stacked("expert_weight", weights)
            | subject.stacked("expert_ids", ids))


def by_transformers(subject: Subject) -> Iterator[Method]:
    """The flags of transformers' own forward."""
    last = subject.m.n_layers - 1

    def run(**flags: bool) -> Any:
        with torch.no_grad():
            return subject.hf(**subject.inputs, **flags)

    yield Method("residual", "output_hidden_states", lambda: run(output_hidden_states=True),
                 lambda out: subject.stacked("resid_post", list(out.hidden_states[1:last + 1])),
                 "the last one is normalised, not compared")
    if subject.moe:
        yield Method("routing", "output_router_logits", lambda: run(output_router_logits=True),
                     lambda out: subject.stacked("router_logits", list(out.router_logits)),
                     "logits only; computes a balancing loss too")
