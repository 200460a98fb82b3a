"""SAEs on disk: SAELens's directory, with our card beside it.

``cfg.json`` and ``sae_weights.safetensors`` are SAELens's, so ``sae_lens.SAE.load_from_disk(dir)`` gives the same
codes. What only we have is under ``metadata`` (``interp``: sites, targets, how it was trained); SAELens keeps it.

What is lost on the way: batchtopk and matryoshka SAEs are written as jumprelu with their threshold, as SAELens does (a
code then depends on its token alone, and k is the average of the training), p-annealed ones as standard, and the norms
of the decoder are in the encoder. A mp SAE is written as matching_pursuit. The norm above which no latent fires
(`SAE.limit`) is among our metadata, and SAELens computes latents there all the same. For topk transcoders, transcoders
whose encoder does something SAELens does not have, and crosscoders there is no architecture in SAELens: they are
written in the same form under a name of ours (``interp_...``), which it refuses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.bridges import sae_lens as bridge
from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.sae.autoencoder import SAE
from interp.sites import SiteError
from interp.zoo.load import trained_dir

CARD = "card.json"
#: Ours -> SAELens's, for autoencoders.
_PLAIN = {"standard": "standard", "gated": "gated", "topk": "topk", "jumprelu": "jumprelu", "mp": "matching_pursuit"}
#: (ours, has a skip path) -> SAELens's, for transcoders.
_TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
_RENAMED = {"decoder": "W_dec", "b_dec": "b_dec", "encoder": "W_enc", "b_enc": "b_enc", "threshold": "threshold",
            "r_mag": "r_mag", "b_mag": "b_mag", "skip": "W_skip"}  # fmt: skip


def save(s: SAE, dir: str | os.PathLike[str]) -> Path:
    """Writes `s` to a directory, in place of an SAE that is there, and gives its path."""
    arch, tensors = _form(s)
    cfg: dict[str, Any] = {
        "architecture": arch,
        "d_in": s.d_in,
        "d_sae": s.d_sae,
        "apply_b_dec_to_input": s.centred,
        "normalize_activations": s.normalize,
        "reshape_activations": "none",
        "metadata": _metadata(s),
    }
    if s.shape == "transcoder":
        cfg["d_out"] = s.d_out
    if arch == "topk" or (arch.startswith("interp") and s.k is not None):
        cfg |= {"k": s.k, "rescale_acts_by_decoder_norm": False}
    if arch == "matching_pursuit":
        cfg |= {"max_iterations": s.k, "residual_threshold": s.tolerance, "stop_on_duplicate_support": False}
    path = bridge.write(cfg, tensors, dir)
    card(s).save(path / CARD)
    return path


def _form(s: SAE) -> tuple[str, dict[str, Tensor]]:
    """(architecture, tensors) under SAELens's names."""
    if s.shape == "transcoder":
        arch = _TRANSCODERS.get((s.arch, s.skip is not None))
        arch = arch if arch and not s.centred else f"interp_{s.arch}_transcoder"
    elif s.shape == "crosscoder":
        arch = f"interp_{s.arch}_crosscoder"
    else:
        arch = _PLAIN[s.arch]
    tensors = {_RENAMED[name]: tensor for name, tensor in s.tensors().items()}
    tensors["W_enc"] = tensors["W_enc"].T
    if s.arch == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    if s.arch == "mp":
        del tensors["W_enc"], tensors["b_enc"]
    return arch, tensors


def _metadata(s: SAE) -> dict[str, Any]:
    given = {k: v for k, v in s.metadata.items() if k != "interp"}
    about: dict[str, Any] = {"sites": list(s.sites), "targets": list(s.targets)}
    if math.isfinite(s.limit):
        about["limit"] = s.limit
    try:  # the name by which SAELens would hook it; places that it has no name for keep ours
        hook = {"hook_name": bridge.to_hook_name(s.sites[0])} if s.sites else {}
    except SiteError:
        hook = {"hook_name": s.sites[0]}
    return {**hook, **given, "interp": about}


def card(s: SAE) -> Any:
    """The card of an SAE, with what is known; the rest is for its author (see `interp.cards.lint`)."""
    from interp.cards import NOT_MEASURED, Card
    from interp.version import __version__

    m = s.metadata
    where = ", ".join(s.sites) or "an unknown site"
    final = {} if s.history is None or not len(s.history) else s.history.iloc[-1].to_dict()
    measured = {k: final[k] for k in ("fvu", "l0", "dead") if k in final}
    fields = {
        "description": f"A sparse {s.shape} with {s.d_sae} latents of {where}.",
        "model": m.get("model_name", "not known"),
        "model_hash": m.get("model_hash", "not known"),
        "site": where,
        "method": {"trained as": m.get("trained_as", s.arch), **m.get("training", {})},
        "training_data": m.get("source", "not known"),
        "metrics": "fraction of variance unexplained, latents per token, dead latents, of the last training batch",
        "evaluation": [measured] if measured else NOT_MEASURED,
        "versions": f"interp {__version__}, torch {torch.__version__}",
    }
    return Card("sae", f"{m.get('trained_as', s.arch)} SAE, {where}", fields)


def names() -> list[str]:
    """The SAEs that come with the project, by the names that `load` takes: directories of data/models, sorted."""
    return sorted(path.parent.name for path in trained_dir().glob(f"*/{bridge.CONFIG}"))


@recorded
def load(dir: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> SAE:
    """The SAE in a directory that `save` or SAELens has written, or one that comes with the project, by name.

        sae.load("my-sae"); sae.load("sae-smollm2")           # its card: data/models/sae-smollm2/README.md

    SAELens's ``rescale_acts_by_decoder_norm`` is folded into the weights: the codes are the same.

    Raises SAEError for a directory that is none, or an architecture that is not supported, by name.
    """
    path = Path(dir)
    if not path.exists():
        if str(dir) not in names():
            raise SAEError(f"{dir} is no SAE directory; by name there are {', '.join(names()) or 'none here'}")
        path = trained_dir() / path
    cfg, found = bridge.read(path, device)
    return from_parts(cfg, found, str(path))


def from_parts(cfg: Mapping[str, Any], found: Mapping[str, Tensor], where: str = "SAE") -> SAE:
    """An SAE from SAELens's config and state."""
    arch, transcoder = _ours(str(cfg.get("architecture", "standard")), where)
    tensors = {name: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for name, t in found.items()}
    if "b_gate" in tensors:
        tensors["b_enc"] = tensors.pop("b_gate")
    if arch == "mp":
        tensors |= {"W_enc": tensors["W_dec"].T, "b_enc": tensors["W_dec"].new_zeros(len(tensors["W_dec"]))}
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not bool((scaling == 1).all()):
        raise SAEError(f"{where}: finetuning scaling factors are not supported")
    known = set(_RENAMED.values())
    if missing := [n for n in ("W_dec", "b_dec", "W_enc", "b_enc") if n not in tensors]:
        raise SAEError(f"{where}: it has no {missing[0]}; here are {', '.join(sorted(found))}")
    if unknown := [n for n in tensors if n not in known]:
        raise SAEError(f"{where}: the tensor {unknown[0]!r} is not known in a {cfg.get('architecture')} SAE")
    ours: dict[str, Any] = {name: tensors[theirs] for name, theirs in _RENAMED.items() if theirs in tensors}
    ours["encoder"] = ours["encoder"].T.contiguous()
    norms = ours["decoder"].norm(dim=1)
    if cfg.get("rescale_acts_by_decoder_norm"):
        ours |= {"encoder": ours["encoder"] * norms[:, None], "b_enc": ours["b_enc"] * norms,
                 "decoder": ours["decoder"] / norms[:, None]}  # fmt: skip
    normalize = str(cfg.get("normalize_activations") or "none")
    if normalize not in bridge.NORMALISATIONS:
        raise SAEError(f"{where}: normalize_activations={normalize!r}: fold it into the weights in SAELens, save again")
    metadata = dict(cfg.get("metadata") or {})
    limit = float((metadata.get("interp") or {}).get("limit", math.inf))
    sites, targets = _sites(metadata)
    k = cfg.get("max_iterations") or ours["decoder"].shape[1] if arch == "mp" else cfg.get("k")
    return SAE(
        **ours, arch=arch, k=None if k is None else min(int(k), len(ours["decoder"])), sites=sites, targets=targets,
        centred=not transcoder and bool(cfg.get("apply_b_dec_to_input", True)), normalize=normalize,
        tolerance=float(cfg.get("residual_threshold", 1e-2)), limit=limit, metadata=metadata,
    )  # fmt: skip


def _ours(name: str, where: str) -> tuple[str, bool]:
    """(our architecture, whether it is a transcoder)."""
    for ours, theirs in _PLAIN.items():
        if name == theirs:
            return ours, False
    for (ours, _), theirs in _TRANSCODERS.items():
        if name == theirs:
            return ours, True
    parts = name.split("_")
    if len(parts) == 3 and parts[0] == "interp" and parts[1] in _PLAIN:
        return parts[1], True  # neither kind takes b_dec from its input
    raise SAEError(
        f"{where}: architecture {name!r} is not supported; supported are "
        f"{', '.join((*_PLAIN.values(), *_TRANSCODERS.values()))}"
    )


def _sites(metadata: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    own = metadata.pop("interp", None)
    if isinstance(own, Mapping):
        return tuple(own["sites"]), tuple(own["targets"])
    names = []
    for key in ("hook_name", "hook_name_out"):
        name = metadata.get(key) or (metadata.get("hf_hook_name") if key == "hook_name" else None)
        try:
            site = bridge.to_site(name) if name else None
        except SiteError:  # a place that we do not have: the SAE still encodes what it is given
            site = None
        head = metadata.get("hook_head_index")
        names.append(() if site is None else (str(site if head is None else site.at(head=int(head))),))
    sites, out = names
    return sites, out or sites


def pretrained(release: str, sae_id: str, *, device: str = "cpu") -> SAE:
    """An SAE of one of the public releases that SAELens knows; it needs sae_lens, and fetches what is not cached.

    ``sae.pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")``
    """
    try:
        import sae_lens
    except ImportError as error:
        raise SAEError("releases are found through sae_lens: pip install 'interp[bridges]'") from error
    theirs, cfg, _ = sae_lens.SAE.from_pretrained_with_cfg_and_sparsity(release, sae_id, device=device)
    return from_sae_lens(theirs, cfg)


def from_sae_lens(theirs: Any, cfg: Mapping[str, Any] | None = None) -> SAE:
    """Our form of an SAE object of SAELens (one for inference, not one in training)."""
    made = {**(cfg or {}), **theirs.cfg.to_dict()}
    made["architecture"] = theirs.cfg.architecture()
    state = {name: t.detach().clone() for name, t in theirs.state_dict().items()}
    return from_parts(made, state, f"{type(theirs).__name__}")
