"""Programs with known circuits: RASP compiled to weights by Tracr (Lindner et al. 2023, arXiv 2301.05062).

`compiled("reverse")` is a transformer in which every part is there for a known reason. Its weights are put into a
`PlainModel`, which has the same parts (no norms, attention both ways, ReLU), so that our hooks open it.

Needs the packages tracr-pypi, jax and dm-haiku; the tests that use it skip without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.patching.planted import PlainConfig, PlainModel

NEXT = dict(zip("abcde", "bcdea", strict=True))


def program(name: str) -> tuple[Any, set[Any], int]:
    """(RASP program, vocabulary, longest input)."""
    from tracr.compiler import lib
    from tracr.rasp import rasp

    if name == "reverse":
        return lib.make_reverse(rasp.tokens), {"a", "b", "c", "d"}, 5
    if name == "frac_prevs":
        return lib.make_frac_prevs((rasp.tokens == "x").named("is_x")), {"x", "y", "z"}, 5
    if name == "sort":
        return lib.make_sort_unique(rasp.tokens, rasp.tokens), {1, 2, 3, 4, 5}, 4
    if name == "hist":  # how often does this letter occur?
        return lib.make_hist(), {"a", "b", "c", "d"}, 4
    if name == "lookup":  # where does the letter stand that comes next in the alphabet, which is a circle?
        comes_next = rasp.Select(rasp.tokens, rasp.tokens, lambda key, query: key == NEXT[query])
        return rasp.Aggregate(comes_next, rasp.indices).named("lookup"), set(NEXT), 5
    raise ValueError(name)


class Compiled:
    """A compiled program: the torch model, and how inputs and outputs are written.

    Args:
        name: see `program`.
        strength: factor on the queries. Tracr's attention scores lead by 100 / sqrt(d_head); the program is the same
            at any larger lead, but in float32 no slope at all is left of a softmax beyond about 100.

    Attributes:
        reference: Tracr's own model; ``reference.apply(tokens).decoded`` is what ours must give.
        torch: the same weights as a `PlainModel`. Its logits are the coordinates of the output.
    """

    def __init__(self, name: str, strength: float = 1.0) -> None:
        from tracr.compiler import compiling

        expression, vocabulary, longest = program(name)
        self.causal = name == "frac_prevs"
        self.reference = compiling.compile_rasp_to_model(
            expression, vocab=vocabulary, max_seq_len=longest, compiler_bos="BOS", causal=self.causal
        )
        labels = [str(label) for label in self.reference.residual_labels]
        out = [i for i, label in enumerate(labels) if label.partition(":")[0] == expression.label]
        self.values = [labels[i].partition(":")[2] for i in out]
        self.torch = convert(self.reference, self.causal, out)
        with torch.no_grad():
            for layer in self.torch.layers:
                layer.attn.q.weight.mul_(strength)
                layer.attn.q.bias.mul_(strength)

    def ids(self, *rows: list[Any]) -> Tensor:
        """[row, pos]; "BOS" and "compiler_pad" are tokens like others."""
        return torch.tensor([self.reference.input_encoder.encode(row) for row in rows])

    def output(self, value: str) -> int:
        """The logit that stands for an output value."""
        return self.values.index(value)


@torch.no_grad()
def convert(model: Any, causal: bool, out: list[int]) -> PlainModel:
    """Tracr's parameters in a PlainModel; logits are the coordinates `out` of the residual stream."""
    import numpy as np

    params, config = model.params, model.model_config
    vocabulary, d_model = params["token_embed"]["embeddings"].shape
    made = PlainModel(
        PlainConfig(
            layers=config.num_layers, heads=config.num_heads, d_head=config.key_size, d_model=d_model,
            d_mlp=config.mlp_hidden_size, vocab=vocabulary, n_ctx=params["pos_embed"]["embeddings"].shape[0],
            out=len(out), causal=causal, pad=model.input_encoder.encoding_map.get("compiler_pad"),
        )
    ).eval()  # fmt: skip

    def put(weight: Tensor, value: Any) -> None:
        weight.copy_(torch.from_numpy(np.array(value, dtype="float32")))

    put(made.embed.weight, params["token_embed"]["embeddings"])
    put(made.place.weight, params["pos_embed"]["embeddings"])
    for i, layer in enumerate(made.layers):
        attn, mlp = layer.attn, layer.mlp
        for ours, theirs in (
            (attn.q, "attn/query"), (attn.k, "attn/key"), (attn.v, "attn/value"), (attn.o, "attn/linear"),
            (mlp.up, "mlp/linear_1"), (mlp.down, "mlp/linear_2"),
        ):  # fmt: skip
            part = params[f"transformer/layer_{i}/{theirs}"]
            put(ours.weight, part["w"].T)
            put(ours.bias, part["b"])
    made.unembed.weight.copy_(torch.eye(d_model)[out])
    return made
