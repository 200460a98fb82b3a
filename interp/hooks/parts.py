"""The roles of the modules inside one decoder layer, read off the tensors that passed between them.

Called by `anatomy.dissect` with every call of one tiny forward pass. Names are used for one thing only: to tell which
child mixes tokens (attention, Mamba, ...) and which is the MLP or MoE block. Everything else is dataflow.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from interp.hooks.anatomy import PROBE_TOKENS, Anatomy, Call, Place, same, text_config
from interp.sites import KINDS

_NORM = re.compile(r"norm", re.I)
_NEITHER = re.compile(
    r"norm|residual|dropout|hyperconn|rotary|embedding|^identity$|droppath|activation$|gelu|silu|relu", re.I
)
_MIXER_CLASS = re.compile(r"attention|attn|mamba|deltanet|conv|lightning|recurrent", re.I)
_MLP_CLASS = re.compile(r"mlp|moe|feed_?forward|ffn|experts|sparse", re.I)
_MIXER_NAME = re.compile(r"attn|attention|mamba|conv|temporal", re.I)
_MLP_NAME = re.compile(r"mlp|ffn|feed_?forward|(^|_)moe|experts", re.I)
SHARED = re.compile(r"^(shared_experts?|shared_mlp|shared_moe)$")


class Layer:
    """One layer's calls, and the questions that the roles follow from."""

    def __init__(self, index: int, module: nn.Module, calls: list[Call]) -> None:
        self.index, self.module = index, module
        self.calls = calls
        self.by_module = {id(c.module): c for c in calls}
        self.top = self.by_module.get(id(module))
        self.children = self._parts(module)
        self.norms = [c for _, m, c in self.children if _NORM.search(type(m).__name__)]
        roles = [(c, role) for name, m, c in self.children if (role := _role(name, m))]
        heads = [
            (c, role)
            for c, role in roles
            if not any(same(c.source, other.output) for other, _ in roles if other is not c)
        ]
        self.mixers = [c for c, role in heads if role == "mixer"]
        self.mlps = [c for c, role in heads if role == "mlp"]

    def _parts(self, module: nn.Module) -> list[tuple[str, nn.Module, Call]]:
        """Children that ran. A wrapper around norms and attention (DBRX) counts as the parts it wraps."""
        found = [(name, m, self.by_module[id(m)]) for name, m in module.named_children() if id(m) in self.by_module]
        if any(_role(name, m) == "mixer" for name, m, _ in found):
            return found
        wrapped = [
            self._parts(m) if any(_role(n, c) == "mixer" for n, c in m.named_children()) else [(name, m, call)]
            for name, m, call in found
        ]
        return [part for parts in wrapped for part in parts]

    def inside(self, module: nn.Module) -> list[Call]:
        """Calls of `module`'s submodules, in order of return."""
        members = {id(m) for m in module.modules()} - {id(module)}
        return [c for c in self.calls if id(c.module) in members]

    def last_linear(self, module: nn.Module) -> Call | None:
        """The last linear map that runs inside `module`: its output projection."""
        found = [c for c in self.inside(module) if is_linear(c.module)]
        return found[-1] if found else None

    def norm_before(self, call: Call) -> Call | None:
        return next((n for n in self.norms if call.reads(n.output)), None)

    def after(self, call: Call, stop: Call | None) -> Call:
        """The call itself, or the last module (norm, convolution) that its output goes through before it is added."""
        rest = self.calls[self.calls.index(call) + 1 :]
        own = {id(m) for _, m, _ in self.children}
        post = next(
            (
                c
                for c in rest
                if id(c.module) in own
                and c is not stop
                and c.source is not None
                and same(c.source, call.output)
                and not same(c.output, call.output)
                and not any(t.shape == c.source.shape for t in c.inputs[1:])
            ),
            None,
        )  # two streams in: that is the sum itself
        return self.after(post, stop) if post is not None else call


def is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and not isinstance(module, nn.Embedding)
        and not list(module.children())
    )


def _role(name: str, module: nn.Module) -> str | None:
    cls = type(module).__name__
    if _NEITHER.search(cls):
        return None
    if is_linear(module) or (not list(module.modules())[1:] and not list(module.parameters(recurse=False))):
        return None
    for pattern, text, role in (
        (_MIXER_NAME, name, "mixer"),
        (_MLP_NAME, name, "mlp"),
        (_MIXER_CLASS, cls, "mixer"),
        (_MLP_CLASS, cls, "mlp"),
    ):
        if pattern.search(text):
            return role
    return None


def read_layer(
    anatomy: Anatomy,
    index: int,
    module: nn.Module,
    calls: list[Call],
    heads: dict[int, dict[str, Any]],
    by_hand: dict[int, dict[str, Any]],
    routed: dict[int, dict[str, int]],
) -> None:
    """Enters every site of one layer.

    `heads`, `by_hand`, `routed`: sizes seen at each module that called the attention interface, wrote attention out,
    and that called the experts interface.
    """
    layer = Layer(index, module, calls)
    if layer.top is None or layer.top.source is None:
        for name in (n for n, kind in KINDS.items() if kind.layered):
            anatomy.put(name, index, None, "this layer was not called in a plain forward pass")
        return
    shape = layer.top.source.shape
    blocks = any(t.dim() == 4 and t.shape[:2] == shape[:2] and t.shape[-1] == shape[-1] for t in layer.top.inputs[1:])
    one_stream = (
        not blocks and len(shape) == 3 and shape[-1] == getattr(text_config(anatomy.hf), "hidden_size", shape[-1])
    )
    why = (
        "layers also read the streams of earlier blocks"
        if blocks
        else f"this family carries several residual streams ({'x'.join(map(str, shape[1:]))} a row), not one of d_model"
    )
    anatomy.put("resid_pre", index, Place("input", module) if one_stream else None, why)
    anatomy.put("resid_post", index, Place("output", module) if one_stream else None, why)
    mixer = layer.mixers[0] if len(layer.mixers) == 1 else None
    entry, body, exit_ = _mlp(layer)
    before_mlp = layer.norm_before(entry) if entry else None
    _attention(anatomy, layer, mixer, entry, before_mlp, heads, by_hand)
    _middle(anatomy, layer, mixer, entry, before_mlp, why if not one_stream else "")
    _feed_forward(anatomy, layer, entry, body, exit_, before_mlp, routed)


def _mlp(layer: Layer) -> tuple[Call | None, nn.Module | None, Call | None]:
    """(call that reads the MLP's input, the MLP module if it is one, call that gives its output)."""
    main = [c for c in layer.mlps if not SHARED.match(c.path.rpartition(".")[2])]
    if len(main) > 1:  # a dense MLP beside experts (Gemma 4): the block is the part that comes first
        main = sorted(main, key=lambda c: bool(_experts_of(c.module)))[:1]
    if main:
        return main[0], main[0].module, main[0]
    linears = [c for _, m, c in layer.children if is_linear(m)]
    if len(linears) >= 2:  # OPT and its kin: the MLP is two linears of the layer itself
        return linears[0], None, linears[-1]
    return None, None, None


def _attention(
    anatomy: Anatomy,
    layer: Layer,
    mixer: Call | None,
    entry: Call | None,
    before_mlp: Call | None,
    heads: dict[int, dict[str, Any]],
    by_hand: dict[int, dict[str, Any]],
) -> None:
    i = layer.index
    inner = {id(m): m for m in layer.module.modules() if id(m) in heads or id(m) in by_hand}
    if len(inner) == 1 and _times(heads, by_hand, inner) > 1:
        for name in ("q", "k", "v", "pattern", "z"):
            anatomy.put(
                name,
                i,
                None,
                f"layer {i} computes attention {_times(heads, by_hand, inner)} times over, so it has no one pattern",
            )
    elif len(inner) == 1:
        ((key, attention),) = inner.items()
        size = heads.get(key) or by_hand[key]
        door = "attention" if key in heads else "handmade"
        pooled = size.get("keys", PROBE_TOKENS) != PROBE_TOKENS
        for name in ("q", "k", "v", "pattern", "z"):
            n = size["kv_heads"] if name in "kv" else size["heads"]
            place = (
                None
                if (pooled and name in ("k", "v")) or (name == "pattern" and anatomy.no_pattern)
                else Place(door, attention)
            )
            why = anatomy.no_pattern if name == "pattern" else f"layer {i} attends to pooled keys, not one per token"
            anatomy.put(name, i, place, why, head=n, d_head=size["d_" + ("v" if name in "vz" else "q")])
        if door == "attention":
            anatomy.scores[i] = (size["scaling"] or size["d_q"] ** -0.5, size["softcap"])
    else:
        kind = type(mixer.module).__name__ if mixer else "nothing"
        why = (
            f"layer {i} has {len(inner)} attention modules"
            if inner
            else f"layer {i} mixes tokens with {kind}, which shows no attention pattern"
        )
        for name in ("q", "k", "v", "pattern", "z"):
            anatomy.put(name, i, None, why)
    if mixer is None:
        why = (
            f"layer {i} has no attention of its own"
            if not layer.mixers
            else f"layer {i} has {len(layer.mixers)} token mixers: {', '.join(c.path for c in layer.mixers)}"
        )
        anatomy.put("attn_out", i, None, why)
        anatomy.put("ln1_scale", i, None, why)
        return
    adds_residual = any(c is not None and c.reads(mixer.output) for c in (before_mlp, entry))
    out = layer.last_linear(mixer.module) if adds_residual else layer.after(mixer, before_mlp)
    found = Place("output", out.module) if out else None
    anatomy.put("attn_out", i, found, "attention's output projection was not found")
    norm = layer.norm_before(mixer)
    anatomy.put("ln1_scale", i, _scale(norm), "this family has no norm before attention")


def _times(heads: dict[int, dict[str, Any]], by_hand: dict[int, dict[str, Any]], inner: dict[int, nn.Module]) -> int:
    return max(int((heads.get(key) or by_hand[key]).get("calls", 1)) for key in inner)


def _middle(
    anatomy: Anatomy, layer: Layer, mixer: Call | None, entry: Call | None, before_mlp: Call | None, why: str
) -> None:
    i, top = layer.index, layer.top
    assert top is not None
    anatomy.put(
        "ln2_scale",
        i,
        _scale(before_mlp),
        "this family has no norm before the MLP" if entry else f"layer {i} has no MLP of its own",
    )
    if entry is None or mixer is None:
        anatomy.put("resid_mid", i, None, f"layer {i} is a single block, not attention followed by an MLP")
        return
    reader = before_mlp or entry
    source, norm = reader.source, layer.norm_before(mixer)
    if why:
        anatomy.put("resid_mid", i, None, why)
    elif same(source, top.source) or (norm is not None and same(source, norm.output)) or same(source, mixer.source):
        anatomy.put("resid_mid", i, None, "attention and MLP are parallel in this family: both read resid_pre")
    else:
        anatomy.put("resid_mid", i, Place("stream", reader.module))


def _feed_forward(
    anatomy: Anatomy,
    layer: Layer,
    entry: Call | None,
    body: nn.Module | None,
    exit_: Call | None,
    before_mlp: Call | None,
    routed: dict[int, dict[str, Any]],
) -> None:
    from interp.hooks import factored, undecorated

    i, top = layer.index, layer.top
    assert top is not None
    parallel = [c for c in layer.mlps if exit_ is not None and c.module is not exit_.module]
    if exit_ is None:
        anatomy.put("mlp_out", i, None, f"layer {i} has no MLP of its own")
    elif parallel:
        ran = {id(c.module): n for n, c in enumerate(layer.calls)}  # the norm over their sum, if there is one
        last = [
            n
            for n in layer.norms
            if ran[id(n.module)] > max(ran[id(c.module)] for c in layer.mlps)
            and not any(n.reads(c.output) for c in layer.mlps)
        ]
        names = " and ".join(c.path.rpartition(".")[2] for c in layer.mlps)
        two = layer.mlps[0].module, layer.mlps[-1].module
        summed = Place("sum", two[1], other=two[0]) if len(layer.mlps) == 2 and _alike(*layer.mlps) else None
        anatomy.put(
            "mlp_out",
            i,
            Place("output", last[-1].module) if last else summed,
            f"layer {i} adds {names} inside the layer itself; read them by shared_out and expert_out",
        )
    else:
        adds_residual = same(exit_.output, top.output)
        place = (layer.last_linear(body) if body is not None else exit_) if adds_residual else layer.after(exit_, None)
        anatomy.put(
            "mlp_out", i, Place("output", place.module) if place else None, "the MLP's output projection was not found"
        )

    if factored.read(anatomy, layer):
        for name, why in factored.refusals(i, factored.find(layer.module)).items():
            anatomy.put(name, i, None, why)
        return
    experts = _experts_of(layer.module)
    refused = undecorated.refusal(layer.module)
    dense = body is not None and not _experts_of(body) and not hasattr(body, "router") and not refused
    down = layer.last_linear(body) if dense and body is not None else exit_ if body is None else None
    width = down.source.shape[-1] if down is not None and down.source is not None else 0
    anatomy.put(
        "mlp_hidden",
        i,
        Place("input", down.module) if down else None,
        refused or f"layer {i} is a mixture of experts; its neurons are expert_hidden[{i}]"
        if experts or body is not None
        else f"layer {i} has no MLP of its own",
        neuron=width,
    )
    from interp.hooks.routing import read_experts

    read_experts(anatomy, layer, experts, routed)


def _alike(a: Call, b: Call) -> bool:
    """Both read the same tensor and give the same shape: their outputs are added (GraniteMoeShared)."""
    return (
        same(a.source, b.source) and a.output is not None and b.output is not None and a.output.shape == b.output.shape
    )


def _experts_of(module: nn.Module) -> list[nn.Module]:
    """Modules whose class went through transformers' use_experts_implementation."""
    return [
        m
        for m in module.modules()
        if hasattr(m, "has_gate") and hasattr(m, "is_transposed") and hasattr(m, "down_proj")
    ]


def _scale(norm: Call | None) -> Place | None:
    if norm is None or norm.source is None:
        return None
    return Place("scale", norm.module, centred=_centres(norm))


def _centres(norm: Call) -> bool:
    """True if the norm subtracts the mean: adding a constant to its input then changes nothing."""
    assert norm.source is not None
    like = norm.source
    with torch.no_grad():
        x = torch.linspace(-1, 1, like.shape[-1], device=like.device).expand(2, -1).to(like.dtype)
        plain, moved = norm.module(x).float(), norm.module(x + 3).float()
        return bool((moved - plain).norm() < 0.2 * plain.norm())  # a wide margin: x + 3 is rounded in half precision


def read_ends(anatomy: Anatomy, calls: dict[int | None, list[Call]]) -> None:
    """Enters the sites outside the layers."""
    hf: Any = anatomy.hf
    embedding = hf.get_input_embeddings()
    anatomy.put("embed", None, Place("output", embedding), d_model=int(embedding.weight.shape[-1]))
    last = next(
        (c for i in reversed(range(len(anatomy.layers))) for c in calls.get(i, []) if c.module is anatomy.layers[i]),
        None,
    )
    final = [
        c
        for c in calls.get(None, [])
        if last is not None and _NORM.search(type(c.module).__name__) and c.reads(last.output)
    ]
    anatomy.put("ln_final_scale", None, _scale(final[-1] if final else None), "there is no norm behind the last layer")
    anatomy.put("logits", None, Place("logits", hf))
