"""Sites: the names of the places where activations live.

One grammar serves every model::

    resid_post[5]              the residual stream after layer 5
    z[5, head=3]               what head 3 of layer 5 reads out, before the output projection
    mlp_hidden[-1, neuron=17]  one neuron of the last layer
    expert_out[3, expert=17]   what expert 17 of layer 3 puts out, for the tokens routed to it
    g1[3, key=17]              Monet: how much each routing head uses key 17 of the first axis, part of n experts
    q[*]                       a pattern: every layer;  q[2:6] a slice of layers;  z[*, head=*] every head
    embed, logits              places that have no layer
    sae[resid_post[5], latent=9]   a latent of the sparse autoencoder attached there (``m.attach(s)``)
    sae_error[resid_post[5]]       and what none of its latents explains

The residual and attention names are TransformerLens's, and its long form parses too
(``blocks.5.hook_resid_post``). The expert names are ours, because nobody has them.

Two steps, as in a compiler: a text is parsed once into a `Site` or a `Pattern` (nothing about any model is
known here), and a model then *resolves* patterns into the concrete sites that it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache


class SiteError(ValueError):
    """A text that names no site, or a site that this model does not have."""


@dataclass(frozen=True)
class Kind:
    """What one site name means, for every model.

    Attributes:
        name: the name in the grammar.
        axes: names of the tensor's axes. ``slot`` counts the experts chosen for a token, best first as the router
            returns them.
        index: which keys may narrow the site, each with the axis it picks from. The key ``expert`` at a routed site
            picks *rows* (the slots that hold this expert), since experts are never stored densely.
        tl: TransformerLens's name, with ``{l}`` for the layer; None where it has none.
        what: one line for humans.
        layered: False for the places outside the layers.
    """

    name: str
    axes: tuple[str, ...]
    index: dict[str, str]
    tl: str | None
    what: str
    layered: bool = True

    @property
    def pos_axis(self) -> int:
        """The axis that runs over tokens (for ``pattern``: over the queries)."""
        return self.axes.index("query" if "query" in self.axes else "pos")

    @property
    def routed(self) -> bool:
        """True where the tensor has one row per (token, slot)."""
        return "slot" in self.axes


_D = ("batch", "pos", "d_model")
_HEAD = ("batch", "pos", "head", "d_head")
_KEY = ("batch", "pos", "head", "key")
_PART = ("batch", "pos", "key", "neuron")


def _kinds() -> Iterator[Kind]:
    dim, head = {"dim": "d_model"}, {"head": "head", "dim": "d_head"}
    key, part = {"head": "head", "key": "key"}, {"key": "key", "neuron": "neuron"}
    yield Kind("embed", _D, dim, "hook_embed", "output of the token embedding", layered=False)
    yield Kind("resid_pre", _D, dim, "blocks.{l}.hook_resid_pre", "residual stream entering the layer")
    yield Kind("ln1_scale", ("batch", "pos", "one"), {}, "blocks.{l}.ln1.hook_scale",
               "divisor of the norm before attention (RMS, or standard deviation for LayerNorm)")
    yield Kind("q", _HEAD, head, "blocks.{l}.attn.hook_rot_q", "queries as they meet the keys (after rotary)")
    yield Kind("k", _HEAD, head, "blocks.{l}.attn.hook_rot_k", "keys as they meet the queries; key-value heads as is")
    yield Kind("v", _HEAD, head, "blocks.{l}.attn.hook_v", "values; key-value heads as they are (GQA)")
    yield Kind("pattern", ("batch", "head", "query", "key"), {"head": "head"}, "blocks.{l}.attn.hook_pattern",
               "attention probabilities")
    yield Kind("z", _HEAD, head, "blocks.{l}.attn.hook_z", "pattern-weighted values, before the output projection")
    yield Kind("attn_out", _D, dim, "blocks.{l}.hook_attn_out", "what attention hands to the residual stream")
    yield Kind("resid_mid", _D, dim, "blocks.{l}.hook_resid_mid", "residual stream between attention and MLP")
    yield Kind("ln2_scale", ("batch", "pos", "one"), {}, "blocks.{l}.ln2.hook_scale",
               "divisor of the norm before the MLP")
    yield Kind("mlp_hidden", ("batch", "pos", "neuron"), {"neuron": "neuron"}, "blocks.{l}.mlp.hook_post",
               "neurons of a dense MLP: the input of its down projection")
    yield Kind("key_logits1", _KEY, key, None, "Monet: router scores of the keys of axis 1, before the threshold")
    yield Kind("key_logits2", _KEY, key, None, "Monet: the same for axis 2; both where a group of layers begins")
    yield Kind("g1", _KEY, key, None, "Monet: weights of the keys of axis 1 as this layer is given them")
    yield Kind("g2", _KEY, key, None, "Monet: of axis 2; expert (i, j) has weight sum over heads of g1_i g2_j")
    yield Kind("z1", _PART, part, None, "Monet: neurons of the parts of axis 1")
    yield Kind("z2", _PART, part, None, "Monet: neurons of the parts of axis 2 (vertical decomposition only)")
    yield Kind("router_logits", ("batch", "pos", "expert"), {"expert": "expert"}, None,
               "router scores of all experts, before softmax, bias and top-k")
    yield Kind("expert_ids", ("batch", "pos", "slot"), {"slot": "slot"}, None, "experts chosen for each token")
    yield Kind("expert_weight", ("batch", "pos", "slot"), {"expert": "slot", "slot": "slot"}, None,
               "weight with which each chosen expert's output is added")
    yield Kind("expert_hidden", ("batch", "pos", "slot", "neuron"),
               {"expert": "slot", "slot": "slot", "neuron": "neuron"}, None,
               "neurons of each chosen expert: the input of its down projection")
    yield Kind("expert_out", ("batch", "pos", "slot", "d_model"), {"expert": "slot", "slot": "slot", "dim": "d_model"},
               None, "output of each chosen expert, before its weight")
    yield Kind("shared_weight", ("batch", "pos", "one"), {}, None, "gate of the shared expert, where it has one")
    yield Kind("shared_out", _D, dim, None, "output of the always-on (shared) expert, before its gate if it has one")
    yield Kind("mlp_out", _D, dim, "blocks.{l}.hook_mlp_out", "what the MLP or MoE block hands to the residual stream")
    yield Kind("resid_post", _D, dim, "blocks.{l}.hook_resid_post", "residual stream leaving the layer")
    yield Kind("ln_final_scale", ("batch", "pos", "one"), {}, "ln_final.hook_scale", "divisor of the final norm",
               layered=False)
    yield Kind("logits", ("batch", "pos", "vocab"), {"token": "vocab"}, None, "the model's output", layered=False)


#: Every site name, in the order in which a forward pass reaches them.
KINDS: dict[str, Kind] = {kind.name: kind for kind in _kinds()}

#: What a sparse autoencoder takes an activation apart into, in the order in which edits reach it.
SPLICED = {
    "sae_error": "what no latent of the sparse autoencoder explains: x - x'",
    "sae": "latents of the sparse autoencoder",
}


@lru_cache(maxsize=512)
def kind_of(name: str) -> Kind:
    """The kind that a name stands for; ``sae.resid_post`` is what ``sae[resid_post[5]]`` is called inside."""
    if name in KINDS:
        return KINDS[name]
    word, _, host = name.partition(".")
    at = KINDS[host]
    axes = ("batch", "pos", "latent") if word == "sae" else at.axes
    index = {"latent": "latent"} if word == "sae" else at.index
    return Kind(name, axes, index, None, f"{SPLICED[word]} attached at {host}", at.layered)


def written(name: str, layer: str, index: str) -> str:
    """The text of a site from its parts: ``z``, ``5``, ``head=3`` give ``z[5, head=3]``."""
    word, _, host = name.rpartition(".")
    if word:
        return f"{word}[{', '.join(filter(None, (written(host, layer, ''), index)))}]"
    inside = ", ".join(filter(None, (layer, index)))
    return f"{name}[{inside}]" if inside else name


@dataclass(frozen=True)
class Site:
    """One concrete place: ``Site("z", 5, (("head", 3),))`` prints as ``z[5, head=3]``.

    >>> Site.parse("blocks.5.hook_resid_post")
    Site('resid_post[5]')
    >>> Site.parse("z[5, head=3]").base
    Site('z[5]')
    >>> Site.parse("g1[3, key=17, head=0]"), Site.parse("z1[3, key=17]").axes
    (Site('g1[3, head=0, key=17]'), ('batch', 'pos', 'neuron'))
    """

    name: str
    layer: int | None = None
    index: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.index) > 1:  # one order, so that one place has one name
            order = list(self.kind.index)
            object.__setattr__(self, "index", tuple(sorted(self.index, key=lambda pair: order.index(pair[0]))))

    @classmethod
    def parse(cls, text: str | Site, *, rotary: bool | None = None) -> Site:
        """The site that `text` names. Raises SiteError for an unknown name or for a pattern (see `Pattern.parse`)."""
        if isinstance(text, Site):
            return text
        pattern = Pattern.parse(text, rotary=rotary)
        if not pattern.concrete:
            raise SiteError(f"{text!r} names many sites; here one is needed, such as '{pattern.name}[0]'")
        return cls(pattern.name, pattern.layers, tuple((k, int(v)) for k, v in pattern.index))  # type: ignore[arg-type]

    @property
    def kind(self) -> Kind:
        return kind_of(self.name)

    @property
    def host(self) -> Site | None:
        """Where the sparse autoencoder reads, for its latents and its error; None for a place of the model itself."""
        word, _, host = self.name.rpartition(".")
        return Site(host, self.layer) if word else None

    @property
    def base(self) -> Site:
        """The same place without its index: the whole tensor."""
        return Site(self.name, self.layer) if self.index else self

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names of the tensor read here; an indexed axis is gone, and a chosen expert gives flat rows."""
        picked = dict(self.index)
        if self.kind.routed and "expert" in picked:
            return ("row", *(a for a in self.kind.axes[3:] if a not in {self.kind.index[k] for k in picked}))
        gone = {self.kind.index[key] for key in picked}
        return tuple(a for a in self.kind.axes if a not in gone)

    @property
    def tl_name(self) -> str | None:
        """TransformerLens's name of the whole tensor (rotary form for q and k), or None."""
        return self.kind.tl.format(l=self.layer) if self.kind.tl else None

    def at(self, **index: int) -> Site:
        """This site narrowed further: ``Site.parse("z[5]").at(head=3)``."""
        return Site(self.name, self.layer, (*self.index, *index.items()))

    def __str__(self) -> str:
        index = ", ".join(f"{key}={value}" for key, value in self.index)
        return written(self.name, "" if self.layer is None else str(self.layer), index)

    def __repr__(self) -> str:
        return f"Site('{self}')"

    def __lt__(self, other: Site) -> bool:
        return self.order < other.order

    @property
    def order(self) -> tuple[int, int, tuple[tuple[str, int], ...]]:
        """Sorts sites in the order in which a forward pass reaches them."""
        word, _, name = self.name.rpartition(".")
        place = 4 * list(KINDS).index(name) + (1 + list(SPLICED).index(word) if word else 0)
        if self.layer is None:
            return (-1 if name == "embed" else 1 << 30, place, self.index)
        return (self.layer, place, self.index)


@dataclass(frozen=True)
class Pattern:
    """A text of the grammar, taken apart: layers and indices may be ``*`` or slices."""

    name: str
    layers: int | slice | None
    index: tuple[tuple[str, int | str], ...] = ()
    text: str = field(default="", compare=False)

    @property
    def concrete(self) -> bool:
        return not isinstance(self.layers, slice) and all(v != "*" for _, v in self.index)

    @classmethod
    def parse(cls, text: str, *, rotary: bool | None = None) -> Pattern:
        """Takes a text apart. `rotary` says whether the model rotates q and k, for TransformerLens's ``hook_q``."""
        if not isinstance(text, str):
            raise SiteError(f"site {text!r}: a site is a text such as 'resid_post[5]', not {type(text).__name__}")
        return _parse(text.strip(), rotary)

    def expand(self, layers: list[int], size: Callable[[str, int | None, str], int]) -> list[Site]:
        """The concrete sites meant, given the layers that have this name and the size of each indexed axis."""
        if isinstance(self.layers, slice):
            span = range(max(layers) + 1)[self.layers] if layers else range(0)
            chosen: list[int | None] = [i for i in layers if i in span]
        else:
            chosen = [self.layers]
        out: list[Site] = []
        for layer in chosen:
            rows: list[tuple[tuple[str, int], ...]] = [()]
            for key, value in self.index:
                values = range(size(self.name, layer, key)) if value == "*" else [int(value)]
                rows = [(*row, (key, v)) for row in rows for v in values]
            out += [Site(self.name, layer, row) for row in rows]
        return out


_FORM = re.compile(r"(?P<name>[a-z_0-9]+)\s*(?:\[(?P<inside>[^\[\]]*)\])?\Z")
_SPLICED = re.compile(
    r"(?P<word>sae|sae_error)\s*\[\s*(?P<host>[\w.*]+(?:\s*\[[^\[\]]*\])?)\s*(?:,(?P<index>[^\[\]]*))?\]\Z"
)
_LAYERS = re.compile(r"(?P<one>-?\d+)\Z|(?P<all>\*)\Z|(?P<a>-?\d*):(?P<b>-?\d*)(?::(?P<c>-?\d*))?\Z")
_TL = {k.tl.replace("{l}", "L"): k.name for k in KINDS.values() if k.tl}
_TL |= {"blocks.L.attn.hook_q": "q", "blocks.L.attn.hook_k": "k", "blocks.L.hook_out": "resid_post"}


@lru_cache(maxsize=4096)
def _parse(text: str, rotary: bool | None) -> Pattern:
    if text.startswith(("blocks.", "hook_", "ln_final.")):
        return _parse_tl(text, rotary)
    if text.partition("[")[0].strip() in SPLICED:
        return _parse_spliced(text, rotary)
    match = _FORM.match(text)
    if not match:
        raise SiteError(f"{text!r} is not a site; the form is name[layer, key=index], e.g. 'z[5, head=3]'")
    kind = KINDS.get(match["name"])
    if kind is None:
        raise SiteError(f"{match['name']!r} is not a site name{_near(match['name'])}; the names are {', '.join(KINDS)}")
    parts = [p.strip() for p in (match["inside"] or "").split(",") if p.strip()]
    layers: int | slice | None = None
    if kind.layered:
        if not parts or "=" in parts[0]:
            raise SiteError(f"{text!r}: {kind.name} lives in layers; write {kind.name}[5] or {kind.name}[*]")
        layers = _layers(parts.pop(0), text)
    return Pattern(kind.name, layers, _indices(parts, kind, text), text)


def _parse_spliced(text: str, rotary: bool | None) -> Pattern:
    match = _SPLICED.match(text)
    if not match:
        raise SiteError(f"{text!r}: name the place, such as 'sae[resid_post[5], latent=9]' or 'sae_error[mlp_out[*]]'")
    at = _parse(match["host"].strip(), rotary)
    if at.index or kind_of(at.name).axes[:2] != ("batch", "pos") or kind_of(at.name).routed:
        raise SiteError(f"{text!r}: a sparse autoencoder reads a whole site, one vector per token; {at.text} is none")
    kind = kind_of(f"{match['word']}.{at.name}")
    parts = [p.strip() for p in (match["index"] or "").split(",") if p.strip()]
    return Pattern(kind.name, at.layers, _indices(parts, kind, text), text)


def _parse_tl(text: str, rotary: bool | None) -> Pattern:
    found = re.search(r"\.(\d+|\*)\.", text)
    name = _TL.get(re.sub(r"\.(\d+|\*)\.", ".L.", text, count=1))
    if name is None:
        raise SiteError(f"{text!r}: no site stands for this TransformerLens name; known are {', '.join(sorted(_TL))}")
    if text.endswith((".hook_q", ".hook_k")) and rotary is not False:
        raise SiteError(
            f"{text!r} is {name} before rotary in TransformerLens, and interp reads {name} after it: "
            f"write {text.replace('hook_', 'hook_rot_')!r} or '{name}[{found[1] if found else 0}]'"
        )
    layers = None if found is None else (slice(None) if found[1] == "*" else int(found[1]))
    return Pattern(name, layers, (), text)


def _layers(part: str, text: str) -> int | slice:
    match = _LAYERS.match(part)
    if not match:
        raise SiteError(f"{text!r}: layer {part!r} is neither a number, nor '*', nor a slice such as 2:6")
    if match["one"] is not None:
        return int(match["one"])
    if match["all"]:
        return slice(None)
    if match["c"] and not int(match["c"]):
        raise SiteError(f"{text!r}: the step of a slice must not be 0")
    return slice(*(int(match[g]) if match[g] else None for g in "abc"))


def _indices(parts: list[str], kind: Kind, text: str) -> tuple[tuple[str, int | str], ...]:
    index = tuple(_index(p, kind, text) for p in parts)
    for i, (key, _) in enumerate(index):
        rival = next((k for k, _ in index[:i] if kind.index[k] == kind.index[key]), None)
        if rival is not None:
            raise SiteError(f"{text!r}: {rival}= and {key}= both pick from {kind.index[key]!r}; give one")
    return index


def _index(part: str, kind: Kind, text: str) -> tuple[str, int | str]:
    key, equals, value = (s.strip() for s in part.partition("="))
    if not equals or key not in kind.index:
        allowed = ", ".join(f"{k}=" for k in kind.index) or "no index"
        raise SiteError(f"{text!r}: {part!r} does not narrow {kind.name}, which takes {allowed}")
    if value == "*":
        return key, "*"
    if not re.fullmatch(r"-?\d+", value):
        raise SiteError(f"{text!r}: {key}={value!r} is neither a number nor '*'")
    return key, int(value)


def _near(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, KINDS, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
