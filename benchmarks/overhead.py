"""What reading costs whatever the model's size: all residual streams of 30 narrow layers, in milliseconds a pass.

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
    narrow = {"num_hidden_layers": 30, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    m = interp.load("tiny:llama", num_attention_heads=4, num_key_value_heads=2, **narrow)
    ids = torch.randint(0, 50, (1, 32))
    traced = m.nnsight()

    @torch.no_grad()
    def plain() -> None:
        m.hf(input_ids=ids, use_cache=False)

    def bare() -> None:
        kept: list[Any] = []
        handles = [la.register_forward_hook(lambda mod, args, out: kept.append(out)) for la in m.hf.model.layers]
        plain()
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def nnsight() -> None:
        with traced.trace(ids):
            for layer in traced.model.layers:
                layer.output.save()

    methods: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "interp": lambda: m.capture(ids, "resid_post[*]", logits=True),
        "interp, check=False": lambda: m.capture(ids, "resid_post[*]", logits=True, check=False),
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
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:20s} {middle:6.1f} ms  {middle - base:+5.1f}")


if __name__ == "__main__":
    main()
