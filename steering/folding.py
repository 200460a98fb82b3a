"""Folding ``h -> A h + b`` into the linear maps around a site.

Which linear map writes or reads a site is not looked up by name: the model runs on a few tokens, and the map is the one
whose output (or input) is the very tensor that the site holds.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from interp.sites import Site
from steering.errors import SteeringError


class Folder:
    """A copy of a model's weights, into which maps are folded one by one.

    Attributes:
        state: the weights, by name; those that were changed are copies.
        config: the configuration, with biases switched on where they were needed.
    """

    def __init__(self, m: Any, untie: bool = False) -> None:
        self.m, self.untie = m, untie
        self.state: dict[str, Tensor] = {k: t.detach() for k, t in m.hf.state_dict().items()}
        self.config = copy.deepcopy(m.hf.config)
        self.names = {id(module): name for name, module in m.hf.named_modules()}
        self._seen: dict[int, tuple[Tensor, Tensor]] | None = None
        self._held: dict[str, Tensor] = {}

    def fold(self, site: Site, a: Tensor | None, b: Tensor | None) -> None:
        """Puts ``h -> A h + b`` at `site` into the weights; A None is the identity, b None is zero."""
        if site.name in ("attn_out", "mlp_out"):
            self._fold_output(site, a, b)
        elif site.name in ("z", "mlp_hidden"):
            self._fold_input(site, a, b)
        elif site.name == "embed":
            self._fold_embedding(a, b)
        else:
            raise SteeringError(
                f"{site}: no weights write or read this alone; what can be baked are the residual stream's writes "
                "(attn_out, mlp_out, embed, and shifts of resid_*) and what they read (z, mlp_hidden)"
            )

    # -- outputs -----------------------------------------------------------------------------------------------
    def _fold_output(self, site: Site, a: Tensor | None, b: Tensor | None) -> None:
        if site.index:
            raise SteeringError(f"{site}: fold the whole of {site.base}, not one of its dimensions")
        module = self._find(site, output=True)
        if module is not None:
            self._left(self._path(module), module, a, b)
            return
        experts = self._experts(site)
        if experts is None:
            raise SteeringError(
                f"{site}: {self.m.name} puts something between its last linear map there and the stream (a norm, a "
                "weight per token), so the map does not fold; keep it as an edit"
            )
        if b is not None and bool((b != 0).any()):
            raise SteeringError(
                f"{site}: the outputs of {self.m.name}'s experts are weighted per token, so no bias of theirs adds the "
                "same vector to each token; keep it as an edit, or steer at attn_out"
            )
        for path, one in experts:
            self._left(path, one, a, None)

    def _left(self, path: str, module: nn.Module | bool, a: Tensor | None, b: Tensor | None) -> None:
        """W' = A W, bias' = A bias + b for a linear map, or for each expert of a fused tensor.

        For the latter `module` says whether it is kept as [expert, in, out] instead of [expert, out, in].
        """
        fused = isinstance(module, bool)
        weight, bias = (path, f"{path}_bias") if fused else (f"{path}.weight", f"{path}.bias")
        w = self.state[weight]
        if a is not None:
            left = a.to(w.device, torch.float64)
            turned = module is True or _transposed(module)
            new = w.double() @ left.T if turned else left @ w.double()
            self.state[weight] = new.to(w.dtype)
            if bias in self.state:
                self.state[bias] = (self.state[bias].double() @ left.T).to(w.dtype)
        if b is not None:
            self._bias(path, bias)
            self.state[bias] = self.state[bias] + b.to(self.state[bias])

    def _experts(self, site: Site) -> list[tuple[str, nn.Module | bool]] | None:
        """The maps that together write an MoE block: (path, transposed?) of the fused tensor, and shared experts'."""
        place = self.m.anatomy.places.get(("expert_weight", site.layer))
        if site.name != "mlp_out" or place is None or place.how != "experts":
            return None
        module = place.module
        if not isinstance(getattr(module, "down_proj", None), Tensor) or getattr(module, "has_post_expert_norm", False):
            return None
        found: list[tuple[str, nn.Module | bool]] = [(f"{self._path(module)}.down_proj", bool(module.is_transposed))]
        if ("shared_out", site.layer) in self.m.anatomy.places:
            shared = self._find(Site("shared_out", site.layer), output=True)
            if shared is None:
                return None
            found.append((self._path(shared), shared))
        return found

    # -- inputs ------------------------------------------------------------------------------------------------
    def _fold_input(self, site: Site, a: Tensor | None, b: Tensor | None) -> None:
        """W' = W A on the columns that read the site, bias' = bias + W b."""
        module = self._find(site.base, output=False)
        if module is None:
            raise SteeringError(f"{site}: found no linear map that reads it in {self.m.name}; keep it as an edit")
        path = self._path(module)
        w = self.state[f"{path}.weight"].double()
        w = w.T if _transposed(module) else w  # [out, in]
        picked = dict(site.index)
        if "neuron" in picked or "dim" in picked:
            raise SteeringError(f"{site}: fold all of {site.base}, with zeros elsewhere, not one of its numbers")
        columns = torch.arange(w.shape[1])
        if site.name == "z":
            columns = columns.view(self.m.n_heads, -1)
            columns = columns[picked["head"]] if "head" in picked else columns.flatten()
        if b is not None:
            self._bias(path, f"{path}.bias")
            add = w[:, columns] @ b.double().flatten()
            self.state[f"{path}.bias"] = self.state[f"{path}.bias"] + add.to(self.state[f"{path}.bias"])
        if a is not None:
            if a.shape[0] != len(columns):
                raise SteeringError(f"{site}: A is {list(a.shape)}, and {len(columns)} columns read the site")
            w = w.clone()
            w[:, columns] = w[:, columns] @ a.double()
            new = w.T if _transposed(module) else w
            self.state[f"{path}.weight"] = new.to(self.m.dtype).contiguous()

    # -- embeddings --------------------------------------------------------------------------------------------
    def _fold_embedding(self, a: Tensor | None, b: Tensor | None) -> None:
        hf = self.m.hf
        embedding, out = hf.get_input_embeddings(), hf.get_output_embeddings()
        name = f"{self._path(embedding)}.weight"
        if out is not None and out.weight is embedding.weight:
            if not self.untie:
                raise SteeringError(
                    f"{self.m.name} has one matrix for embedding and unembedding, and only the embedding may change; "
                    "bake(..., untie=True) stores both"
                )
            self.config.tie_word_embeddings = False
            if hasattr(self.config, "text_config"):
                self.config.text_config.tie_word_embeddings = False
            self.state[f"{self._path(out)}.weight"] = self.state[name].clone()
        tables = {name: True}
        owners = {id(x) for layer in self.m.anatomy.layers for x in layer.modules()}
        for module in hf.modules():  # learned positions are written to the stream too
            if isinstance(module, nn.Embedding) and module is not embedding and id(module) not in owners:
                tables[f"{self._path(module)}.weight"] = False
        for table, shifted in tables.items():
            rows = self.state[table].double()
            rows = rows if a is None else rows @ a.double().T
            rows = rows + b.double() if b is not None and shifted else rows
            self.state[table] = rows.to(self.m.dtype)

    # -- finding -----------------------------------------------------------------------------------------------
    def _path(self, module: nn.Module) -> str:
        return self.names[id(module)]

    def _find(self, site: Site, output: bool) -> nn.Module | None:
        """The linear map whose output (input) is what the site holds."""
        if self._seen is None:
            self._seen = self._watch()
        self.m.resolve(site)
        wanted = self._held.get(str(site))
        if wanted is None:
            ids = torch.arange(1, 7)[None] % self.m.d_vocab
            wanted = self._held[str(site)] = self.m.capture(ids, site)[str(site)].flatten(2)
        modules = {id(x): x for x in self.m.anatomy.layers[site.layer].modules()}
        for key, (before, after) in self._seen.items():
            tensor = after if output else before
            if key in modules and tensor.numel() == wanted.numel() and torch.equal(tensor.view_as(wanted), wanted):
                return modules[key]
        return None

    def _watch(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Input and output of each linear map on a few tokens, by the module's id."""
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[id(module)] = (args[0].detach().clone(), output.detach().clone())

        linear = [x for x in self.m.hf.modules() if isinstance(x, nn.Linear) or _transposed(x)]
        handles = [x.register_forward_hook(keep) for x in linear]
        try:
            self.m(torch.arange(1, 7)[None] % self.m.d_vocab)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    # -- biases ------------------------------------------------------------------------------------------------
    def _bias(self, path: str, bias: str) -> None:
        """Makes sure that there is a bias, switching it on in the configuration if need be."""
        if bias in self.state:
            return
        for flag in ("mlp_bias", "attention_bias", "use_bias", "bias"):
            if getattr(self.config, flag, None) is False:
                trial = copy.deepcopy(self.config)
                setattr(trial, flag, True)
                with torch.device("meta"):
                    names = type(self.m.hf)(trial).state_dict()
                if bias in names:
                    self.config = trial
                    for name, value in names.items():
                        if name not in self.state:
                            self.state[name] = torch.zeros(value.shape, dtype=self.m.dtype, device=self.m.device)
                    return
        raise SteeringError(
            f"{path} has no bias, and the configuration of {type(self.m.hf).__name__} has no switch for one; keep the "
            "vector as an edit, export it (steering.export_hook), or bake a map without a shift"
        )


def _transposed(module: Any) -> bool:
    """GPT-2's Conv1D keeps [in, out]."""
    return type(module).__name__ == "Conv1D"
