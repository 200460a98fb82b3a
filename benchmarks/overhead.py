"""What reading costs whatever the model's size, in milliseconds a pass: all residual streams of 30 narrow layers, and
the routing of 16 narrow Mixture-of-Experts layers.

    python benchmarks/overhead.py

On a wide model a few milliseconds drown in the noise of the pass itself; on a model with as many modules and little
arithmetic they can be told. Methods alternate in shuffled order, one thread; medians over `ROUNDS` rounds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import interp

ROUNDS = 100


def main() -> None:
    torch.set_num_threads(1)
    narrow = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = interp.load("tiny:llama", num_hidden_layers=30, intermediate_size=128, head_dim=16, **narrow)
    moe = interp.load("tiny:olmoe", num_hidden_layers=16, intermediate_size=32, num_experts=64, num_experts_per_tok=8,
                      **narrow)
    compare("all residual streams, 30 layers", dense, ["resid_post[*]"], lambda layer: layer)
    compare("routing, 16 layers", moe, ["router_logits[*]", "expert_ids[*]", "expert_weight[*]"],
            lambda layer: layer.mlp.gate)


def compare(title: str, m: interp.Model, sites: list[str], place: Callable[[Any], Any]) -> None:
    """Prints what each way of reading adds to a plain pass; the output of a layer's `place` says as much as `sites`."""
    ids = torch.randint(0, 50, (1, 32))
    traced = m.nnsight()

    @torch.no_grad()
    def plain() -> None:
        m.hf(input_ids=ids, use_cache=False)

    def bare() -> None:
        kept: list[Any] = []
        handles = [place(la).register_forward_hook(lambda mod, args, out: kept.append(out)) for la in m.hf.model.layers]
        plain()
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def nnsight() -> None:
        with traced.trace(ids):
            for layer in traced.model.layers:
                place(layer).output.save()

    methods: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "interp": lambda: m.capture(ids, sites, logits=True),
        "interp, check=False": lambda: m.capture(ids, sites, logits=True, check=False),
        "bare hooks": bare,
        "nnsight": nnsight,
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(ROUNDS + 2):  # two to warm up
        for name in random.sample(list(methods), len(methods)):
            start = time.perf_counter()
            methods[name]()
            if round_ >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    base = statistics.median(times["plain"])
    print(title)
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"  {name:20s} {middle:6.1f} ms  {middle - base:+5.1f}")


if __name__ == "__main__":
    main()
