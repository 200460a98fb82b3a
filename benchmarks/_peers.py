"""The libraries that we compare with, each used as its documentation shows, on the very same parameters.

Two of them cannot share an environment with the others, so the benchmark runs itself again with their version in front
on the path (`ENVIRONMENTS`), with its own plain baseline: TransformerLens 4 (sae-lens holds the 3.9 line) and nnterp
(which does not import with nnsight 0.8).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _methods import Method, Subject, Values, routing
from torch import Tensor

_LENS = {  # our site name -> TransformerLens's, in the forms that do not copy
    "resid_post": "hook_resid_post", "q": "attn.hook_rot_q", "k": "attn.hook_rot_k", "v": "attn.hook_v",
    "z": "attn.hook_z", "mlp_hidden": "mlp.hook_post", "router_logits": "mlp.gate.hook_out",
    "expert_weight": "mlp.gate.hook_expert_weights", "expert_ids": "mlp.gate.hook_expert_indices",
}


def transformer_lens(subject: Subject) -> Iterator[Method]:
    """`TransformerBridge.run_with_cache`, asked for these names only."""
    from transformer_lens.model_bridge import TransformerBridge

    name = "allenai/OLMoE-1B-7B-0924" if subject.moe else "HuggingFaceTB/SmolLM2-135M-Instruct"
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=subject.twin(), tokenizer=subject.m.tokenizer or _no_tokenizer(),
        device=str(subject.m.device), dtype=subject.m.dtype)
    title = f"TransformerLens {version('transformer-lens')}"
    layers = range(subject.m.n_layers)
    for case in subject.cases:
        sites = [name.partition("[")[0] for name in subject.cases[case].sites]
        names = {f"blocks.{i}.{_LENS[site]}": f"{site}[{i}]" for i in layers for site in sites if site in _LENS}
        names = {theirs: site for theirs, site in names.items() if theirs in bridge.hook_dict}
        if not names:
            continue

        def run(names: dict[str, str] = names) -> Any:
            with torch.no_grad():
                return bridge.run_with_cache(subject.ids, names_filter=list(names))[1]

        def read(cache: Mapping[str, Tensor], names: dict[str, str] = names) -> Values:
            values = {site: _in_frame(subject, cache[theirs]) for theirs, site in names.items()}
            for site in values:
                if site.startswith("expert_weight"):  # over all experts there, over the chosen ones here
                    values[site] = values[site].gather(-1, values[site.replace("weight", "ids")])
            return values

        missing = sorted(set(sites) - {site.partition("[")[0] for site in names.values()})
        yield Method(case, title, run, read, f"has no {', '.join(missing)}" if missing else "")


def _no_tokenizer() -> Any:
    """A tokenizer for models that have none; TransformerLens wants one to start, and only token ids are run."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a")


def _in_frame(subject: Subject, tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, tuple(subject.ids.shape)) if tensor.dim() == 2 else tensor


def nnsight(subject: Subject) -> Iterator[Method]:
    """`trace` and `save`; q, k (after rotary), v and z are at the call of the attention function inside `.source`."""
    import nnsight
    from nnsight import NNsight

    lens, inputs, moe = NNsight(subject.twin()), subject.inputs, subject.moe
    title = f"nnsight {version('nnsight')}"

    def residual() -> Any:
        with torch.no_grad(), lens.trace(**inputs):
            kept = nnsight.save([])
            for layer in lens.model.layers:
                kept.append(layer.output)
        return kept

    def attention() -> Any:
        with torch.no_grad(), lens.trace(**inputs):
            kept = nnsight.save([])
            for layer in lens.model.layers:
                call = layer.self_attn.source.attention_interface_1
                arguments = call.inputs[0]
                kept.append([arguments[1], arguments[2], arguments[3], call.output[0]])
                if not moe:
                    kept[-1].append(layer.mlp.down_proj.input)
        return kept

    def routers() -> Any:
        with torch.no_grad(), lens.trace(**inputs):
            kept = nnsight.save([])
            for layer in lens.model.layers:
                kept.append(layer.mlp.gate.output)
        return kept

    def read_attention(kept: list[list[Tensor]]) -> Values:
        values: Values = {}
        for name, column in zip(("q", "k", "v", "z", "mlp_hidden"), zip(*kept, strict=True), strict=False):
            values |= subject.stacked(name, list(column))
        return values

    yield Method("residual", title, residual, lambda kept: subject.stacked("resid_post", kept))
    yield Method("attention", title, attention, read_attention)
    if moe:
        yield Method("routing", title, routers, lambda kept: routing(subject, kept))


def nnterp(subject: Subject) -> Iterator[Method]:
    """`StandardizedTransformer.layers_output`; it has no accessor for the inside of attention, or for routing."""
    import nnsight
    from nnterp import StandardizedTransformer  # type: ignore[import-not-found]

    tokenizer = subject.m.tokenizer or _no_tokenizer()
    lens = StandardizedTransformer(subject.twin(), tokenizer=tokenizer, check_renaming=False)
    inputs = subject.inputs

    def residual() -> Any:
        with torch.no_grad(), lens.trace(**inputs):
            kept = nnsight.save([])
            for i in range(lens.num_layers):
                kept.append(lens.layers_output[i])
        return kept

    yield Method("residual", f"nnterp {version('nnterp')} (nnsight {version('nnsight')})", residual,
                 lambda kept: subject.stacked("resid_post", kept))


@dataclass(frozen=True)
class Environment:
    """A second environment: packages put in front of the path.

    Attributes:
        method: which peer is measured in it, and `shown` the name its rows begin with.
        cases: what that peer offers.
        alone: pinned packages, installed without their dependencies, so that torch and transformers stay ours.
        small: what those need beyond ours, installed with dependencies.
    """

    method: str
    shown: str
    cases: tuple[str, ...]
    alone: tuple[str, ...]
    small: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return self.alone[0].replace("==", " ")

    def folder(self) -> Path:
        """Where it is installed; made on first use, whole or not at all. RuntimeError if it cannot be had."""
        from interp.zoo.cache import cache_dir

        place = cache_dir() / "benchmarks" / "-".join(self.alone).replace("==", "-")
        if place.is_dir():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=place.parent))
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(work)]
            for packages in (("--no-deps", *self.alone), self.small):
                if packages:
                    subprocess.run([*pip, *packages], check=True, capture_output=True, text=True)
            os.replace(work, place)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR")] or [error.stderr[-200:]]
            raise RuntimeError(f"{self.title} cannot be installed: {lines[0]}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return place


ENVIRONMENTS = (
    Environment("transformer_lens", "TransformerLens", ("residual", "attention", "routing"),
                ("transformer-lens==4.3.0",)),
    Environment("nnterp", "nnterp", ("residual",), ("nnterp==1.3.0", "nnsight==0.7.0"),
                small=("ipython", "python-socketio[client]", "astor", "toml")),
)
