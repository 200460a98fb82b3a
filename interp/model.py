"""Model: a loaded language model, its tokenizer, and the map of where its parts are.

Four ways to use it, all on the same map::

    acts = m.capture("some text", ["resid_post[*]", "expert_out[3]"])      read
    with m.intervene(edits.zero("z[5, head=3]")): m("some text")          write
    with m.recording(["q[*]"]) as rec: m.hf.generate(...)                 read what somebody else runs
    m.generate("prompt", max_new_tokens=20, capture=["resid_post[5]"])    both, while it writes

Nothing of the underlying model is touched until a context is entered, and on leaving it is as it was, bit for bit.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.activations import Activations, Tokens
from interp.edits import Edit
from interp.fingerprint import Fingerprint
from interp.hooks import factored
from interp.hooks.anatomy import Anatomy, dissect, text_config
from interp.hooks.session import install
from interp.hooks.splice import Autoencoder
from interp.hooks.tap import Bound, Clock, Tap
from interp.reach import Reached, expand, fitting, rooted, site_table, stopping
from interp.recorder import Recorder
from interp.results import Generation, Intervention
from interp.sites import Pattern, Site
from interp.tokens import Text, tokenize

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Use:
    """What one open context wants of the model."""

    edits: list[Bound] = field(default_factory=list)
    recorder: Recorder | None = None


class Model:
    """A causal language model opened for reading and writing.

    Args:
        hf: a transformers causal LM. It is used as it is, never copied or changed.
        tokenizer: its tokenizer; without one, token ids still work.
        name: what tables and messages call it.
    """

    def __init__(self, hf: nn.Module, tokenizer: Any = None, name: str | None = None) -> None:
        self.hf: Any = hf
        self.tokenizer = tokenizer
        self.config = text_config(hf)
        self.card: dict[str, Any] = {}  # where it came from, filled in by interp.load
        self.name = name or getattr(hf, "name_or_path", "") or type(hf).__name__
        self.clock = Clock()
        self.uses: list[Use] = []
        self._open: ExitStack | None = None
        self._thread = 0  # that of the open contexts
        self.fragile: set[Site] = set()
        self.saes: dict[Site, Autoencoder] = {}
        self._fingerprint = Fingerprint(hf)

    # -- what it is --------------------------------------------------------------------------------------------
    @cached_property
    def anatomy(self) -> Anatomy:
        """The map of its parts, made on first use by running four tokens."""
        return dissect(self.hf)

    @property
    def device(self) -> torch.device:
        return self.hf.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.hf.parameters() if p.is_floating_point())

    def _number(self, *names: str, default: int = 0) -> int:
        for name in names:
            value = getattr(self.config, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = max((v for v in value if isinstance(v, int)), default=None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return default

    @property
    def n_layers(self) -> int:
        return len(self.anatomy.layers)

    @property
    def d_model(self) -> int:
        return self._number("hidden_size", "n_embd", "d_model", "dim")

    def _seen(self, name: str, axis: str) -> int:
        return max((s.get(axis, 0) for (n, _), s in self.anatomy.sizes.items() if n == name), default=0)

    @property
    def n_heads(self) -> int:
        return self._seen("q", "head") or self._number("num_attention_heads", "n_head", "n_heads")

    @property
    def n_kv_heads(self) -> int:
        return self._seen("k", "head") or self.n_heads

    @property
    def d_head(self) -> int:
        """Width of a head's output z."""
        return self._seen("z", "d_head") or self.d_model // max(self.n_heads, 1)

    @property
    def d_vocab(self) -> int:
        return int(self.hf.get_input_embeddings().weight.shape[0])

    @property
    def n_ctx(self) -> int | None:
        """Longest context, in tokens; None where the family sets no bound."""
        return self._number("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length") or None

    @property
    def n_experts(self) -> int:
        """Experts per MoE layer, n^2 for Monet; 0 for a dense model."""
        return self._seen("expert_weight", "expert") or self._seen("g1", "key") ** 2

    @property
    def top_k(self) -> int:
        """Experts chosen per token; 0 for a dense model, and for Monet, where tokens differ in it."""
        return self._seen("expert_weight", "slot")

    @cached_property
    def rotary(self) -> bool:
        """True if queries and keys are rotated, so that ours (after it) differ from TransformerLens's hook_q."""
        return any("rotary" in name.lower() or "rope" in name.lower() for name, _ in self.hf.named_modules()) or bool(
            getattr(self.config, "rotary_dim", None) or getattr(self.config, "rope_parameters", None)
        )

    @property
    def fingerprint(self) -> str:
        """A hash of the configuration and the weights, masks included: see `interp.fingerprint.fingerprint`."""
        return str(self._fingerprint)

    def __repr__(self) -> str:
        parts = f"{type(self.hf).__name__}, {self.n_layers} layers, d_model {self.d_model}, {self.n_heads} heads"
        top = f" top-{self.top_k}" if self.top_k else ""
        experts = f", {self.n_experts:,} experts{top}" if self.n_experts else ""
        return f"Model({self.name}: {parts}{experts}, {str(self.dtype).removeprefix('torch.')} on {self.device})"

    def _repr_html_(self) -> str:
        from interp.display import html

        return html(self)

    # -- sites -------------------------------------------------------------------------------------------------
    def resolve(self, patterns: str | Site | Iterable[str | Site]) -> list[Site]:
        """The concrete sites that texts or patterns name here, in the given order, each once.

        Raises SiteError for an unknown name, a layer or index out of range, or a site this model does not have (with
        the reason). A wildcard over layers takes the layers that have the site; if none has it, that is an error.
        """
        if isinstance(patterns, (str, Site)):
            patterns = [patterns]
        named = (expand(self, Pattern.parse(str(text), rotary=self.rotary)) for text in patterns)
        return list(dict.fromkeys(site for sites in named for site in sites))

    def map(self) -> pd.DataFrame:
        """Every site of this model: name, layers that have it, axes, how it is reached, or why it is absent."""
        return site_table(self)

    def attach(self, *autoencoders: Autoencoder) -> Model:
        """Lets sites name what sparse autoencoders see: ``sae[resid_post[5], latent=9]``, ``sae_error[resid_post[5]]``.

        The model computes what it did; latents are places to read, edit, patch and attribute like any other. SiteError
        where one does not fit its site, or where one stands already (`detach`). Gives this model.
        """
        for s in autoencoders:
            site = fitting(self, s)
            self.saes[site] = s
        return self

    def detach(self, *sites: str | Site) -> Model:
        """Takes attached autoencoders off again, all of them by default."""
        if self.uses:
            raise RuntimeError("detach: a context is open that may use the autoencoder; leave it first")
        for site in self.resolve(sites) if sites else list(self.saes):
            self.saes.pop(site, None)
        return self

    # -- running -----------------------------------------------------------------------------------------------
    def tokens(self, x: Text, *, max_length: int | None = None, truncate: bool = False, special: bool = True) -> Tokens:
        """A batch of tokens from texts, ids or Tokens; padded on the right. See `interp.tokens.tokenize` for errors."""
        where: dict[str, Any] = {"vocab": self.d_vocab, "context": self.n_ctx, "device": self.device}
        return tokenize(x, self.tokenizer, **where, max_length=max_length, truncate=truncate, special=special)

    def __call__(self, x: Text, *, grad: bool = False) -> Tensor:
        """Logits [batch, pos, vocab]; what stands at padding means nothing."""
        tokens = self.tokens(x)
        with torch.set_grad_enabled(grad):
            return self._forward(tokens).logits

    def _forward(self, tokens: Tokens) -> Any:
        inputs: dict[str, Any] = {"input_ids": tokens.ids, "attention_mask": tokens.mask.long(), "use_cache": False}
        if self._takes_positions and not bool(tokens.mask[:, 0].all()):  # left padding: count from the first token
            inputs["position_ids"] = tokens.position
        return self.hf(**inputs)

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.hf.forward).parameters

    def capture(
        self,
        x: Text,
        sites: str | Site | Iterable[str | Site],
        *,
        logits: bool = False,
        grad: bool = False,
        check: bool = True,
    ) -> Activations:
        """Runs the model and keeps what is at `sites`.

        The run stops as soon as the last of them is reached; with `logits` it goes to the end and keeps the output too.
        With `grad` the tensors stay in the graph, so that ``torch.autograd.grad`` reaches each of them. `check` warns,
        with the site's name, where an activation is not finite.

        Under an open ``intervene`` context, what is read is what the model goes on with after the edits.
        """
        wanted = self.with_routing(self.resolve(sites))
        tokens = self.tokens(x)
        out = None
        while True:
            recorder = Recorder(wanted, self.fragile, self.about(), grad=grad, check=check)
            with (
                self.using(Use(recorder=recorder)),
                stopping(self, wanted, logits),
                rooted(self, grad),
                torch.set_grad_enabled(grad),
                suppress(Reached),
            ):
                out = self._forward(tokens)
            if missed := recorder.missed():
                raise RuntimeError(
                    f"{missed[0]}: the model ran without passing this site ({len(missed)} of {len(wanted)} sites "
                    "were missed). Was the layer skipped, or its attention or experts implementation "
                    "changed meanwhile, by a model that shares its config object?"
                )
            overwritten = recorder.overwritten()
            if not overwritten:
                break
            self.fragile |= overwritten
        acts = recorder.activations(tokens)
        if logits and out is not None:
            acts.logits = out.logits
        return acts

    def about(self) -> dict[str, Any]:
        keep = factored.masks(self.anatomy)
        return {"model": self.name, "n_experts": self.n_experts, "rotary": self.rotary, "keep": keep}

    @staticmethod
    def with_routing(sites: list[Site]) -> list[Site]:
        """Adds the chosen experts and their weights wherever something routed is read."""
        layers = dict.fromkeys(site.layer for site in sites if site.kind.routed)
        routing = [Site(name, layer) for layer in layers for name in ("expert_ids", "expert_weight")]
        return list(dict.fromkeys([*sites, *routing]))

    # -- contexts ----------------------------------------------------------------------------------------------
    @contextmanager
    def intervene(self, *edits: Any) -> Iterator[Intervention]:
        """Runs the model with `edits` in force: Edits, lists of them, or anything that has ``as_edits(model)``.

        Contexts nest; edits at one site act outermost first, then left to right. Gives a handle whose ``trace()`` tells
        which tokens were edited. Under gradient checkpointing layers run again in the backward pass: call it inside.
        """
        bound = [Bound(self._bind(edit), site) for edit in self._flat_edits(edits) for site in self.resolve(edit.site)]
        with self.using(Use(edits=bound)):
            yield Intervention(bound, self)

    def _bind(self, edit: Edit) -> Edit:
        def decode(ids: Any) -> Any:
            return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

        return edit.within(edit.scope.bind(decode if self.tokenizer is not None else None))

    def _flat_edits(self, edits: Iterable[Any]) -> Iterator[Edit]:
        for edit in edits:
            if isinstance(edit, Edit):
                yield edit
            elif hasattr(edit, "as_edits"):
                yield from self._flat_edits(edit.as_edits(self))
            elif isinstance(edit, (list, tuple)):
                yield from self._flat_edits(edit)
            else:
                raise TypeError(
                    f"intervene: expected Edits (interp.edits.zero(...), ...), got {type(edit).__name__}: {edit!r:.80}"
                )

    @contextmanager
    def recording(self, sites: str | Site | Iterable[str | Site], *, check: bool = True) -> Iterator[Recorder]:
        """Records `sites` in whatever runs inside; ``rec.activations()`` is the last sequence, generation included."""
        recorder = Recorder(self.with_routing(self.resolve(sites)), self.fragile, self.about(), check=check, copy=True)
        with self.using(Use(recorder=recorder)):
            yield recorder

    @contextmanager
    def using(self, use: Use) -> Iterator[None]:
        if self.uses and self._thread != threading.get_ident():
            raise RuntimeError(f"{self.name} is in use in another thread; its hooks serve one thread at a time")
        self._thread = threading.get_ident()
        self.uses.append(use)
        try:
            self._reinstall()
            yield
        finally:
            self.uses.remove(use)
            self._reinstall()

    def _reinstall(self) -> None:
        """Puts exactly the taps on the model that the open contexts ask for."""
        if self._open is not None:
            self._open.close()
            self._open = None
        if not self.uses:
            self.clock.columns = None
            return
        taps: dict[Site, Tap] = {}

        def tap(site: Site) -> Tap:
            if site.host is not None:
                return tap(site.host).inner(site, self.saes[site.host])
            return taps.setdefault(site, Tap(site, self.clock))

        for use in self.uses:
            for bound in use.edits:
                tap(bound.site.base).edits.append(bound)
            for site in use.recorder.wanted if use.recorder else ():
                assert use.recorder is not None
                tap(site).readers.append(use.recorder)
        stack = ExitStack()
        stack.enter_context(install(self.hf, self.anatomy, taps, self.clock))
        self._open = stack

    # -- generating --------------------------------------------------------------------------------------------
    def generate(
        self,
        x: Text,
        *,
        max_new_tokens: int = 20,
        capture: str | Site | Iterable[str | Site] | None = None,
        num_return_sequences: int = 1,
        **kwargs: Any,
    ) -> Generation:
        """Continues each prompt; greedy unless ``do_sample=True`` is passed on to transformers' generate.

        Edits of open contexts act on the tokens of their scope, the same with and without ``use_cache``. Beam search
        reorders rows between calls and is refused while a context is open.
        """
        from interp.generation import generate

        return generate(self, x, max_new_tokens, capture, num_return_sequences, kwargs)

    # -- experts -----------------------------------------------------------------------------------------------
    def expert_output(self, layer: int, expert: int | Iterable[int] | Tensor, hidden: Tensor) -> Tensor:
        """What expert `expert` of `layer` makes of its neurons: [row, d_expert] -> [row, d_model].

        On Monet, whose experts share their neurons: what one or several experts i * n + j make of the layer's input
        behind its norm, before weight and mask: [..., d_model] -> [..., expert, d_model] (no axis for a single id).
        """
        from interp.hooks import experts, undecorated

        if self.anatomy.having("g1"):
            site = self.resolve(f"g1[{layer}]")[0]
            return factored.output(self.anatomy.places["g1", site.layer].module, expert, hidden)
        site = self.resolve(f"expert_out[{layer}, expert={expert}]")[0]
        place = self.anatomy.places[site.name, site.layer]
        down = experts.down if place.how == "experts" else undecorated.down
        return down(place.module, dict(site.index)["expert"], hidden)

    # -- bridges -----------------------------------------------------------------------------------------------
    def nnsight(self) -> Any:
        """nnsight's LanguageModel on these very weights, for free-form tracing (NNsight where there is no tokenizer).

        ``interp.bridges.nnsight.proxy(lm, m, "resid_post[5]")`` is a site inside a trace; that module says what works
        together, and for remote execution.
        """
        from interp.bridges.nnsight import open_model

        return open_model(self)
