"""Weights: making a steering map permanent, with the measured error, or saying why it cannot be.

    steering.bake(m, v.within("all"), "steered")        a checkpoint that needs nothing of ours to run

What folds, and into what:

    resid_post[l] + b, mlp_out[l]     the last linear map of block l's MLP: W' = A W, bias' = A bias + b
    resid_mid[l] + b, attn_out[l]     attention's output projection, likewise
    z[l, head=h], mlp_hidden[l]       the projection that reads it: W' = W A, bias' = bias + W b
    embed, resid_pre[0]               the embedding's rows, and those of learned positions
    a projection at every write       all of the above: W' = (I - r rᵀ) W (Arditi et al. 2024, arXiv:2406.11717, eq. 5)

Weights act on every token alike, so the scope must be "all" and there is no gate. A bias that the family lacks is
switched on in the configuration where it has such a switch (Llama: mlp_bias, attention_bias). Where the linear map's
output is not what reaches the stream (a norm behind it, weighted experts), or an embedding is also the unembedding,
it is refused. And whatever was folded, the checkpoint is opened again, and its logits are compared with the steered
model's.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.cards import NOT_MEASURED, Card
from interp.quiet import quiet
from interp.sites import Site
from interp.version import __version__
from steering.errors import SteeringError
from steering.folding import Folder
from steering.maps import LowRank, Map
from steering.vector import Part, SteeringMap

#: Where the stream itself is edited.
STREAM = ("resid_pre", "resid_mid", "resid_post")


def bake(
    m: Any, v: SteeringMap, out: str | os.PathLike[str], *, untie: bool = False, description: str = "", **card: Any
) -> Path:
    """Writes a checkpoint that equals `m` under `v`, its tokenizer, and a card with the measured difference.

    Args:
        m: the model.
        v: what to bake; its scope must be "all".
        out: a new directory.
        untie: where embedding and unembedding are one matrix and only the former may change, store both.
        description: one sentence for the card.
        **card: further fields of the card.

    Returns the directory. Raises SteeringError, and leaves nothing behind, where a part cannot be folded or the
    checkpoint's logits differ from the steered model's by more than 1e-4 (relative to their size; float32).
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SteeringError(f"{target}: exists and is not empty; choose a new directory")
    v.as_edits(m)  # refuses another model's
    config, state = folded(m, v, untie=untie)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write(m, config, state, fresh)
        error, size = _parity(m, v, fresh)
        _card(m, v, error, size, description, card).save(fresh / "card.json")
        fresh.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


def folded(m: Any, v: SteeringMap, *, untie: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """(configuration, weights) of the model with `v` in them; `m` is untouched. Raises as `bake` does."""
    for part in v.parts:
        if part.scope.text != "all":
            raise SteeringError(
                f"{part.site}: weights act on every token, and this map's scope is {part.scope.text!r}; if all tokens "
                "are meant, bake v.within('all')"
            )
        if part.gate is not None:
            raise SteeringError(f"{part.site}: a gate decides per token, and weights do not; bake v.gated(None)")
    folder = Folder(m, untie=untie)
    for site, map_ in _writes(m, v):
        a, b = map_.affine()
        folder.fold(site, a, b)
    return folder.config, folder.state


def _writes(m: Any, v: SteeringMap) -> list[tuple[Site, Map]]:
    """The parts as (site, map), each at a place that has weights of its own.

    A shift of the stream is one of the block that wrote last. A projection of the stream is nothing more where every
    write before it has lost the direction already.
    """
    found: list[tuple[Site, Map]] = []
    for part in v.parts:
        site, map_ = Site.parse(part.site), part.map
        if site.name not in STREAM:
            found.append((site, map_))
        elif map_.affine()[0] is None:
            found.append((_writer_of(site), map_))
        elif site.name == "resid_pre" and site.layer == 0:
            found.append((Site("embed"), map_))
        elif not _implied(m, v, part):
            raise SteeringError(
                f"{part.site}: what multiplies the whole stream is no weight of the model. A projection can be baked "
                "if it stands at every write: embed (or resid_pre[0]), attn_out[*] and mlp_out[*]"
            )
    return found


def _writer_of(site: Site) -> Site:
    layer = site.layer or 0
    if site.name == "resid_pre":
        return Site("mlp_out", layer - 1) if layer else Site("embed")
    return Site("attn_out" if site.name == "resid_mid" else "mlp_out", layer)


def _implied(m: Any, v: SteeringMap, part: Part) -> bool:
    """True where `part` projects the stream, and the same projection stands at all writes of all layers before."""
    layer = Site.parse(part.site).layer or 0
    last = layer if part.site.startswith("resid_pre") else layer + 1
    before = {f"{name}[{i}]" for i in range(last) for name in ("attn_out", "mlp_out")}
    if part.site.startswith("resid_mid"):
        before.discard(f"mlp_out[{layer}]")
    same = {p.site for p in v.parts if _same_projection(p.map, part.map)}
    return before <= same and bool(same & {"embed", "resid_pre[0]"})


def _same_projection(a: Map, b: Map) -> bool:
    """Both the same ``h -> h + L R h`` that changes nothing the second time, at full strength."""
    if not (isinstance(a, LowRank) and isinstance(b, LowRank)) or a.b is not None or b.b is not None:
        return False
    if a.strength != 1 or b.strength != 1 or a.left.shape != b.left.shape:
        return False
    close = torch.allclose(a.left, b.left, atol=1e-6) and torch.allclose(a.right, b.right, atol=1e-6)
    return close and torch.allclose(a.right @ a.left, -torch.eye(len(a.right)), atol=1e-4)


def _write(m: Any, config: Any, state: dict[str, Tensor], out: Path) -> None:
    """The checkpoint; weights that `state` lacks are biases just switched on, and zero."""
    with torch.device("meta"):
        fresh = type(m.hf)(config)
    for name, value in fresh.state_dict().items():
        if name not in state:
            state[name] = torch.zeros(value.shape, dtype=m.dtype)
    fresh.load_state_dict(state, assign=True)
    if getattr(m.hf, "generation_config", None) is not None:
        fresh.generation_config = copy.deepcopy(m.hf.generation_config)
    with quiet():
        fresh.save_pretrained(out)
    if m.tokenizer is not None:
        m.tokenizer.save_pretrained(out)


def _parity(m: Any, v: SteeringMap, path: Path) -> tuple[float, float]:
    """(largest difference of logits between the checkpoint and the steered model, largest logit), on random tokens."""
    from interp.zoo.load import load

    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(m.d_vocab, (4, min(32, m.n_ctx or 32)), generator=generator)
    with m.intervene(v):
        wanted = m(probe).float()
    saved = load(str(path), dtype=m.dtype, device=m.device)
    error, size = float((saved(probe).float() - wanted).abs().max()), float(wanted.abs().max())
    allowed = (1e-4 if m.dtype in (torch.float32, torch.float64) else 2e-2) * max(size, 1.0)
    if not error <= allowed:
        raise SteeringError(
            f"the baked checkpoint's logits differ from the steered model's by {error:.3g} (logits reach {size:.3g}); "
            "something between these weights and the stream is not linear here (a norm, a factor), so it was not kept"
        )
    return error, size


def _card(m: Any, v: SteeringMap, error: float, size: float, description: str, given: dict[str, Any]) -> Card:
    import transformers

    fields = {
        "description": description or f"{m.name} with a steering map in its weights: {v!r}.",
        "model": m.name,
        "model_hash": v.fingerprint,
        "site": v.sites,
        "method": {
            "method": v.method, **{k: str(x) for k, x in v.record.items()},
            "parity": f"logits within {error:.2g} of the steered model's on 128 random tokens (they reach {size:.3g})",
        },
        "training_data": str(v.record or NOT_MEASURED),
        "metrics": "Difference of logits from the model steered while it runs.",
        "evaluation": NOT_MEASURED,
        "limits": "Acts on every token of every text; what it damages was not measured unless said above.",
        "licence": "As the original model's.",
        "versions": {"interp": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    return Card("checkpoint", f"{m.name}, steered", {**fields, **given})
