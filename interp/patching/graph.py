"""The residual graph: who writes into the residual stream, who reads it, and which edges join them.

A transformer's blocks talk through one sum. Each *writer* adds a vector to it (the embedding, a head, an MLP), and each
*reader* gets the sum of all writers before it, through its own norm (a head's queries, keys or values, an MLP, the
logits). So every edge writer -> reader carries one term of one sum, and can be patched alone (`interp.patching.wiring`)
or scored by a gradient (`interp.patching.edges`).

========================  =========================  ================================
writers                   readers                    written by EAP and MIB as
========================  =========================  ================================
``embed``                                            input
``z[3, head=5]``          ``q[3, head=5]`` (k, v)    a3.h5, a3.h5<q>
``mlp_out[3]``            ``mlp_in[3]``              m3
                          ``logits``                 logits
========================  =========================  ================================

Keys and values have their own, fewer heads under GQA, as the model has them. With ``level="block"`` attention is one
writer ``attn_out[3]`` and one reader ``attn_in[3]``: the finest where a norm stands behind attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from interp import edits
from interp.activations import Activations, Tokens
from interp.hooks.anatomy import Place
from interp.hooks.modules import place_tap
from interp.sites import Site

if TYPE_CHECKING:
    from interp.model import Model

Level = Literal["head", "block"]
ATTENTION_READERS = ("q", "k", "v")


class GraphError(ValueError):
    """A family whose residual stream is not the sum of its blocks' writes."""


@dataclass(frozen=True)
class Writer:
    """One term of the sum. `stage` orders writers and readers: attention of layer l is 2l, its MLP 2l + 1."""

    name: str
    layer: int
    stage: int
    head: int | None = None

    @property
    def mib(self) -> str:
        if self.name == "embed":
            return "input"
        return f"m{self.layer}" if self.name.startswith("mlp") else _mib_head(self.layer, self.head)


@dataclass(frozen=True)
class Reader:
    """One place where the sum is read. `part` is q, k, v, attn, mlp or logits."""

    name: str
    layer: int
    stage: int
    part: str
    head: int | None = None

    @property
    def mib(self) -> str:
        if self.part == "logits":
            return "logits"
        if self.part == "mlp":
            return f"m{self.layer}"
        return _mib_head(self.layer, self.head) + (f"<{self.part}>" if self.head is not None else "")


def _mib_head(layer: int, head: int | None) -> str:
    return f"a{layer}" if head is None else f"a{layer}.h{head}"


class Graph:
    """The writers and readers of one model, in the order of a forward pass.

    Args:
        m: the model. Each layer must be attention and then an MLP (or MoE), each behind a norm of its own.
        level: "head", or "block" (attention as a whole).

    Raises GraphError where the family is built otherwise, with the reason.
    """

    def __init__(self, m: Model, level: Level = "head") -> None:
        if level not in ("head", "block"):
            raise GraphError(f"level={level!r}: expected 'head' or 'block'")
        self.m, self.level = m, level
        self._refuse()
        self.writers, self.readers = list(self._writers()), list(self._readers())
        self.output: dict[int, Tensor] = output_maps(m) if level == "head" else {}

    def _refuse(self) -> None:
        places, absent = self.m.anatomy.places, self.m.anatomy.absent
        needed = [
            "resid_mid",
            "ln1_scale",
            "ln2_scale",
            "mlp_out",
            "attn_out",
            *(["q", "k", "v", "z"] * (self.level == "head")),
        ]
        for layer in range(self.m.n_layers):
            for name in needed:
                if (name, layer) not in places:
                    why = absent.get((name, layer), "it does not have it")
                    raise GraphError(
                        f"edges need {name}[{layer}], which {self.m.name} has not: {why}. Path patching "
                        "(interp.patching.path_patch) does without"
                    )
        if ("ln_final_scale", None) not in places:
            raise GraphError(f"edges need the norm before the logits, which was not found in {self.m.name}")

    def _writers(self) -> Iterator[Writer]:
        yield Writer("embed", 0, -1)
        for i in range(self.m.n_layers):
            heads = range(self._heads("z", i)) if self.level == "head" else [None]
            for h in heads:
                yield Writer(f"attn_out[{i}]" if h is None else f"z[{i}, head={h}]", i, 2 * i, h)
            yield Writer(f"mlp_out[{i}]", i, 2 * i + 1)

    def _readers(self) -> Iterator[Reader]:
        for i in range(self.m.n_layers):
            if self.level == "block":
                yield Reader(f"attn_in[{i}]", i, 2 * i, "attn")
            for part in ATTENTION_READERS if self.level == "head" else ():
                for h in range(self._heads(part, i)):
                    yield Reader(f"{part}[{i}, head={h}]", i, 2 * i, part, h)
            yield Reader(f"mlp_in[{i}]", i, 2 * i + 1, "mlp")
        yield Reader("logits", self.m.n_layers, 2 * self.m.n_layers, "logits")

    def _heads(self, name: str, layer: int) -> int:
        return self.m.anatomy.sizes[name, layer]["head"]

    @property
    def real(self) -> Tensor:
        """True where there is an edge: the writer comes before the reader [writer, reader]."""
        return torch.tensor([[w.stage < r.stage for r in self.readers] for w in self.writers])

    def norm(self, reader: Reader) -> nn.Module:
        """The norm through which a reader sees the stream."""
        name = {"mlp": "ln2_scale", "logits": "ln_final_scale"}.get(reader.part, "ln1_scale")
        return self.m.anatomy.places[name, None if reader.part == "logits" else reader.layer].module

    @contextmanager
    def reading(self, change: Callable[[Reader, Tensor], Tensor]) -> Iterator[None]:
        """Passes what each norm reads, and only the norm, through `change` (a norm's first reader, x [row, pos, d])."""
        first: dict[nn.Module, Reader] = {}
        for reader in self.readers:
            first.setdefault(self.norm(reader), reader)
        with ExitStack() as stack:
            for module, reader in first.items():
                for handle in place_tap(Place("input", module), _Through(reader, change)):  # type: ignore[arg-type]
                    stack.callback(handle.remove)
            yield

    # -- what writers write ------------------------------------------------------------------------------------
    @property
    def sites(self) -> list[str]:
        """What to capture to know what every writer wrote."""
        attention = "z[*]" if self.level == "head" else "attn_out[*]"
        return ["resid_pre[0]", attention, "mlp_out[*]"]

    def written(self, acts: Activations) -> Tensor:
        """What each writer added, biases of the output projections aside [writer, batch, pos, d_model]."""
        rows = []
        for w in self.writers:
            if w.name == "embed":
                rows.append(acts["resid_pre[0]"])
            elif w.head is not None:
                rows.append(acts[f"z[{w.layer}]"][:, :, w.head] @ self.output[w.layer][w.head])
            else:
                rows.append(acts[w.name])
        return torch.stack(rows)

    def difference(
        self, base: Tokens, source: Tokens, noise: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> Tensor:
        """Source minus base of every writer [writer, pair, pos, d_model], checked to add up to the stream's own.

        `noise`: embeddings [pair, pos, d_model] that stand in for those of (base, source), or None.
        """
        last = f"resid_post[{self.m.n_layers - 1}]"
        runs = []
        for tokens, embeds in zip((base, source), noise, strict=True):
            change = [] if embeds is None else [edits.replace("embed", embeds)]
            with torch.no_grad(), self.m.intervene(*change):
                runs.append(self.m.capture(tokens, [*self.sites, last]))
        difference = self.written(runs[1]) - self.written(runs[0])
        whole = runs[1][last] - runs[0][last]
        real = base.mask[..., None].to(whole)
        gap, size = float(((difference.sum(0) - whole) * real).abs().max()), float((whole * real).abs().max())
        if gap > (1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.05) * max(size, 1e-6):
            raise GraphError(
                f"the writes of {self.m.name} do not add up to its residual stream (off by {gap:.2g} of {size:.2g}): "
                "something scales or normalises them on the way"
            )
        return difference * real


@dataclass
class _Through:
    """Stands where a tap stands, and passes the tensor through a function."""

    reader: Reader
    change: Callable[[Reader, Tensor], Tensor]

    def framed(self, h: Tensor) -> Tensor:
        return self.change(self.reader, h)


@dataclass(eq=False)
class Write:
    """An edit of the whole stacked batch at one site, for `Model.using`."""

    site: Site
    fn: Callable[[Tensor], Tensor]

    def __call__(self, h: Tensor, clock: Any, ids: Tensor | None = None, inputs: Any = ()) -> Tensor:
        return self.fn(h)


def output_maps(m: Model) -> dict[int, Tensor]:
    """What each head's output projection makes of z: layer -> [head, d_head, d_model].

    Found by feeding unit vectors: one token for each coordinate of z, all layers in one run. Whatever the family
    calls the projection and however it stores it, this is the map that the model applies.

    Raises GraphError where a layer's output is not linear in z.
    """
    shape = {i: (s["head"], s["d_head"]) for (n, i), s in m.anatomy.sizes.items() if n == "z" and i is not None}
    most = max(h * d for h, d in shape.values()) + 1
    width = min(most, m.n_ctx or most, 256)
    rows = -(-most // width)
    feed = []
    for i, (heads, d) in shape.items():
        unit = torch.zeros(rows * width, heads * d, device=m.device, dtype=m.dtype)
        unit[: heads * d].fill_diagonal_(1.0)
        feed.append(edits.replace(f"z[{i}]", unit.view(rows, width, heads, d)))
    with torch.no_grad(), m.intervene(*feed):
        acts = m.capture(torch.zeros(rows, width, dtype=torch.long, device=m.device), [f"attn_out[{i}]" for i in shape])
    maps = {}
    for i, (heads, d) in shape.items():
        out = acts[f"attn_out[{i}]"].flatten(0, 1)
        linear = out[: heads * d] - out[heads * d]  # the token after the last coordinate was fed zeros: the bias
        _check_linear(m, i, linear)
        maps[i] = linear.view(heads, d, -1)
    return maps


def _check_linear(m: Model, layer: int, linear: Tensor) -> None:
    """A norm behind attention makes all outputs of one length; a projection does not: twice everything gives twice."""
    heads, d = m.anatomy.sizes["z", layer]["head"], m.anatomy.sizes["z", layer]["d_head"]
    probe = torch.zeros(1, 2, heads, d, device=m.device, dtype=m.dtype)
    probe[0, 0] = 2.0
    site = f"attn_out[{layer}]"
    with torch.no_grad(), m.intervene(edits.replace(f"z[{layer}]", probe)):
        out = m.capture(torch.zeros(1, 2, dtype=torch.long, device=m.device), site)[site][0]
    expected, got = 2.0 * linear.sum(0), out[0] - out[1]
    if float((expected - got).abs().max()) > 1e-2 * max(float(got.abs().max()), 1e-3):
        raise GraphError(
            f"attention's output in layer {layer} of {m.name} is not linear in its heads (a norm stands behind it), so "
            "a head has no write of its own; use level='block'"
        )


def mask_of(graph: Graph, edges: Sequence[tuple[str, str]]) -> Tensor:
    """True at the given edges [writer, reader]. GraphError names an edge that this model has not."""
    writer = {w.name: i for i, w in enumerate(graph.writers)}
    reader = {r.name: i for i, r in enumerate(graph.readers)}
    mask, real = torch.zeros(len(writer), len(reader), dtype=torch.bool), graph.real
    for a, b in edges:
        if a not in writer or b not in reader or not bool(real[writer[a], reader[b]]):
            raise GraphError(
                f"edge {a} -> {b}: {graph.m.name} has no such edge at level={graph.level!r}; writers are embed, "
                f"{graph.writers[1].name}, {graph.writers[-1].name}, ..., readers {graph.readers[0].name}, ..., logits"
            )
        mask[writer[a], reader[b]] = True
    return mask
