"""sae_lens: its SAE directory, read and written without it.

The directory holds ``cfg.json`` (what to compute, and in ``metadata`` where) and ``sae_weights.safetensors``. With x
one activation, what is computed is, for each architecture::

    p = (x - b_dec) W_enc + b_enc          (x itself where apply_b_dec_to_input is off)
    standard    z = relu(p)
    topk        z = relu(p) at the k largest p, else 0          (of p |W_dec| where rescale_acts_by_decoder_norm is on)
    jumprelu    z = p where p > threshold, else 0
    x'  = z W_dec + b_dec

A BatchTopK SAE is a jumprelu SAE once it is trained: SAELens saves it with its threshold, and so do we. Directories
from before SAELens 6 are read too. What is not in the list above (gated, transcoders, training checkpoints, ...) is
refused by name, and so is a normalisation whose factors are not in the directory.

Names of places: SAELens says ``blocks.15.hook_resid_post`` where it trains through TransformerLens, and the module
``model.layers.15`` where it trains on a transformers model. `to_site` and `to_hook_name` translate both ways.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges import place_of
from interp.sites import Site, SiteError

if TYPE_CHECKING:
    from interp.model import Model

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "topk", "jumprelu")
#: Normalisations that need nothing but the activation itself.
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
_SETTINGS = ("apply_b_dec_to_input", "normalize_activations", "reshape_activations")
_TOPK_SETTINGS = ("k", "rescale_acts_by_decoder_norm")
_VERSION = "6.0.0"  # of the format; without one SAELens takes a directory for an older one


class SAEError(ValueError):
    """A directory that is no SAE directory, or an SAE that cannot be computed faithfully here."""


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder as SAELens defines it.

    Attributes:
        W_enc: encoder [d_in, d_sae].
        b_enc: its bias [d_sae].
        W_dec: decoder, a direction per latent [d_sae, d_in].
        b_dec: its bias [d_in].
        arch: standard | topk | jumprelu.
        threshold: jumprelu only: what a pre-activation must exceed [d_sae].
        k: topk only: latents kept per token.
        rescale_acts_by_decoder_norm: topk only: choose and report latents as if decoder rows had norm 1.
        apply_b_dec_to_input: the encoder sees x - b_dec.
        normalize_activations: none | layer_norm | constant_norm_rescale (to norm sqrt(d_in)), undone on the way out.
        reshape_activations: none, or hook_z: the activation is [..., head, d_head] and is encoded flat.
        metadata: where it belongs and how it was trained: hook_name, model_name, context_size, prepend_bos, ...
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    arch: str = "standard"
    threshold: Tensor | None = None
    k: int | None = None
    rescale_acts_by_decoder_norm: bool = False
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_settings()
        d_in, d_sae = self.W_enc.shape if self.W_enc.dim() == 2 else (0, 0)
        wanted = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        if self.arch == "jumprelu":
            wanted["threshold"] = (d_sae,)
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not d_in:
                got = list(tensor.shape) if isinstance(tensor, Tensor) else tensor
                raise SAEError(
                    f"{name}: expected {list(shape)} beside W_enc {list(self.W_enc.shape)} [d_in, d_sae], got {got}"
                )
        if self.arch == "topk" and not (isinstance(self.k, int) and 0 < self.k <= d_sae):
            raise SAEError(f"k={self.k!r}: a topk SAE keeps between 1 and d_sae={d_sae} latents")

    def _check_settings(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise SAEError(f"architecture {self.arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
        if self.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
            raise SAEError(
                f"normalize_activations={self.normalize_activations!r}: its factors belong in the weights and are not "
                "in the directory; fold them in SAELens (fold_activation_norm_scaling_factor or "
                "fold_activation_whitening) and save again"
            )
        if self.normalize_activations not in NORMALISATIONS:
            raise SAEError(
                f"normalize_activations={self.normalize_activations!r}: expected one of {', '.join(NORMALISATIONS)}"
            )
        if self.reshape_activations not in ("none", "hook_z"):
            raise SAEError(f"reshape_activations={self.reshape_activations!r}: expected none or hook_z")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def site(self) -> Site | None:
        """Where it belongs; None if its metadata does not say. SiteError if it names a place that we do not have."""
        name = self.metadata.get("hook_name") or self.metadata.get("hf_hook_name")
        if not name:
            return None
        head = self.metadata.get("hook_head_index")
        site = to_site(name)
        return site if head is None else site.at(head=int(head))

    def to(self, *args: Any, **kwargs: Any) -> SAE:
        """The same SAE with its tensors moved or converted as ``Tensor.to`` does."""
        return replace(self, **{name: tensor.to(*args, **kwargs) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def encode(self, x: Tensor) -> Tensor:
        """Latents [..., d_sae] of activations [..., d_in] (hook_z: [..., head, d_head]), none of them negative."""
        x, _ = self._normalised(self._flat(x))
        p = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        if self.arch == "jumprelu":
            assert self.threshold is not None
            return p.relu() * (p > self.threshold)
        if self.arch == "standard":
            return p.relu()
        assert self.k is not None
        if self.rescale_acts_by_decoder_norm:
            p = p * self.W_dec.norm(dim=-1)
        values, kept = p.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(p).scatter(-1, kept, values.relu())

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstructions [..., d_in] of latents [..., d_sae].

        `x` is the activation that they encode. It is needed where activations are normalised, and gives a hook_z SAE
        the shape of its heads.
        """
        if self.rescale_acts_by_decoder_norm:
            z = z * (1 / self.W_dec.norm(dim=-1))
        out = z @ self.W_dec + self.b_dec
        if self.normalize_activations != "none":
            if x is None:
                raise SAEError(
                    f"decode: this SAE normalises activations ({self.normalize_activations}), which takes them to "
                    "undo; call decode(z, x)"
                )
            _, undo = self._normalised(self._flat(x))
            out = undo(out)
        return out if x is None else out.reshape(x.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruction of activations, in their shape."""
        return self.decode(self.encode(x), x)

    def _flat(self, x: Tensor) -> Tensor:
        x = x.flatten(-2) if self.reshape_activations == "hook_z" else x
        if x.shape[-1] != self.d_in:
            raise SAEError(f"activations {list(x.shape)}: this SAE takes d_in={self.d_in}")
        return x.to(self.W_enc.dtype)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return normalised(x, self.normalize_activations)


def normalised(x: Tensor, how: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Activations [..., d_in] as the encoder wants them, and the way back for their reconstructions."""
    if how == "none":
        return x, lambda out: out
    if how == "constant_norm_rescale":
        scale = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return x * scale, lambda out: out / scale
    mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
    return (x - mean) / (std + 1e-5), lambda out: out * std + mean


# -- the directory -----------------------------------------------------------------------------------------------
def load(dir: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> SAE:
    """The SAE in a directory that SAELens, or `save`, has written.

    Raises SAEError for a directory that is none, or an SAE that is not supported, with the name of what is not.
    """
    path = Path(dir)
    cfg, found = read(path, device)
    arch = cfg.get("architecture", "standard")
    if arch not in ARCHITECTURES:
        mend = "; this is a checkpoint of its training, write it with save_inference_model" * (
            "topk_threshold" in found
        )
        raise SAEError(
            f"{path}: architecture {arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}{mend}"
        )
    scaling = found.pop("scaling_factor", None)
    if scaling is not None and not bool((scaling == 1).all()):
        raise SAEError(f"{path}: finetuning scaling factors are not supported")
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["threshold"] * (arch == "jumprelu")
    if set(found) != set(names):
        raise SAEError(f"{path}: a {arch} SAE has the tensors {', '.join(names)}; here are {', '.join(sorted(found))}")
    dtype = _DTYPES.get(str(cfg.get("dtype", "float32")).removeprefix("torch."))
    if dtype is None:
        raise SAEError(f"{path}: dtype {cfg['dtype']!r} is not one of {', '.join(_DTYPES)}")
    tensors: dict[str, Any] = {name: found[name].to(dtype) for name in names}
    settings = {name: cfg[name] for name in (*_SETTINGS, *(_TOPK_SETTINGS if arch == "topk" else ())) if name in cfg}
    return SAE(**tensors, arch=arch, metadata=cfg.get("metadata") or {}, **settings)


def read(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config in today's form, tensors) of a directory, whatever the architecture."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        cfg = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        found = load_file(path / WEIGHTS, device=str(device))
    except (FileNotFoundError, NotADirectoryError):
        missing = WEIGHTS if (path / CONFIG).is_file() else CONFIG
        raise SAEError(f"{path} is no SAE directory: it has no {missing}") from None
    except (ValueError, SafetensorError) as error:
        raise SAEError(f"{path}: {CONFIG} or {WEIGHTS} is damaged: {error}") from None
    if not isinstance(cfg, dict):
        raise SAEError(f"{path}: {CONFIG} is damaged: it holds no table of settings")
    return _modern(cfg), found


def save(sae: SAE, dir: str | os.PathLike[str]) -> Path:
    """Writes an SAE so that ``sae_lens.SAE.load_from_disk(dir)`` and `load` read it; replaces one that is there."""
    settings = {name: getattr(sae, name) for name in (*_SETTINGS, *(_TOPK_SETTINGS if sae.arch == "topk" else ()))}
    cfg = {"architecture": sae.arch, "d_in": sae.d_in, "d_sae": sae.d_sae, **settings, "metadata": sae.metadata}
    return write(cfg, sae._tensors(), dir)


def write(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], dir: str | os.PathLike[str]) -> Path:
    """Writes a config and tensors [by SAELens's names] as an SAE directory; whole files or none."""
    from safetensors.torch import save_file

    path = Path(dir)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    cfg = {
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "device": "cpu",
        **cfg,
        "metadata": {"sae_lens_version": _VERSION, **cfg["metadata"]},
    }
    text = json.dumps(cfg, indent=1)  # before anything is written: metadata that is no JSON fails here
    save_file(tensors, path / f"{WEIGHTS}.tmp")
    (path / f"{CONFIG}.tmp").write_text(text, encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        os.replace(path / f"{name}.tmp", path / name)
    return path


# before version 6: fields that had another name, and fields that have moved into the metadata since
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_METADATA = ("model_name", "hook_name", "hook_head_index", "prepend_bos", "context_size", "dataset_path")


def _modern(cfg: dict[str, Any]) -> dict[str, Any]:
    """A config of any version in the form of SAELens 6, which has everything about the place under ``metadata``."""
    version = cfg.get("sae_lens_version") or (cfg.get("metadata") or {}).get("sae_lens_version") or "0"
    if int(version.partition(".")[0]) >= 6:
        return cfg
    new = {_RENAMED.get(name, name): value for name, value in cfg.items()}
    function, options = new.get("activation_fn", "relu"), new.get("activation_fn_kwargs") or {}
    if function == "topk":
        new |= {"architecture": "topk", "k": options.get("k")}
    elif function != "relu":
        raise SAEError(f"activation_fn={function!r} is not supported; supported are relu and topk")
    if new.get("finetuning_scaling_factor"):
        raise SAEError("finetuning scaling factors are not supported")
    normalize = new.get("normalize_activations") or "none"
    new["normalize_activations"] = "expected_average_only_in" if normalize is True else normalize
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in str(new.get("hook_name", "")) else "none")
    new["metadata"] = {name: new[name] for name in _METADATA if name in new}
    return new


# -- names of places -----------------------------------------------------------------------------------------------
_LAYER = re.compile(r"(?:\w+\.)*(?:layers|h|blocks|block)\.(\d+)\Z")


def to_site(hook_name: str, model: Model | None = None) -> Site:
    """The site that SAELens means by `hook_name`: TransformerLens's name, or the path of the module whose output it is.

    Without a model only whole layers are understood as modules (``model.layers.15`` -> ``resid_post[15]``), since what
    else a module's output is depends on the family: the MLP's is not mlp_out where a norm comes behind it.
    """
    if "[" in hook_name:  # our own name, for places that TransformerLens has none for
        return Site.parse(hook_name)
    if hook_name.startswith(("blocks.", "hook_", "ln_final.")) and not _LAYER.match(hook_name):
        return Site.parse(hook_name, rotary=None if model is None else model.rotary)
    if model is not None:
        paths = {id(module): path for path, module in model.hf.named_modules()}
        for (name, layer), place in model.anatomy.places.items():
            if place.how == "output" and paths.get(id(place.module)) == hook_name:
                return Site(name, layer)
        raise SiteError(f"hook_name {hook_name!r}: no site of {model.name} is this module's output")
    if layer_path := _LAYER.match(hook_name):
        return Site("resid_post", int(layer_path[1]))
    raise SiteError(
        f"hook_name {hook_name!r} is neither TransformerLens's name of a place, nor the path of a decoder layer such "
        "as 'model.layers.15'; pass the model to look up other modules"
    )


def to_hook_name(site: str | Site, model: Model | None = None) -> str:
    """SAELens's `hook_name` of a site: TransformerLens's name; with a model the path of the module that puts it out."""
    if model is not None:
        found, place, path = place_of(model, site)
        if place.how == "output":
            return path
        raise SiteError(
            f"{found}: SAELens hooks the outputs of modules, and this is the {place.how} of {path or 'the model'}; "
            "leave out the model for TransformerLens's name"
        )
    found = Site.parse(site)
    if found.index or found.tl_name is None:
        raise SiteError(f"{found}: SAELens has no name for it; it knows whole tensors that TransformerLens names")
    return found.tl_name
