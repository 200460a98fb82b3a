"""Taking it away: a checkpoint in which the set's units are off for good.

    experts.resect(m, law, "monet-without-law")

Monet carries its mask in the checkpoint (a bool matrix per layer). A routed expert or a neuron is switched off by
zeroing the weights that put out what it computed, so the checkpoint needs nothing of ours to run. Either way the saved
model is opened again and compared with the masked one; the largest difference of their logits goes into its card.
"""

from __future__ import annotations

import operator
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.cards import NOT_MEASURED, Card
from interp.experts.evaluate import switched_off
from interp.experts.sets import ExpertSet
from interp.experts.units import ExpertError
from interp.version import __version__


def resect(
    model: Any, chosen: ExpertSet, out: str | os.PathLike[str], *, evaluation: Any = None, description: str = ""
) -> Path:
    """Writes a checkpoint that equals `model` with `chosen` switched off, its tokenizer, and a card.

    Args:
        model: the model the set belongs to.
        chosen: what to take out.
        out: a new directory.
        evaluation: a Table of `evaluate`, or anything a card can hold, for the card.
        description: one sentence for the card.

    Returns the directory. Raises ExpertError where `out` exists and is not empty, where the set is empty, or where this
    kind of expert cannot be baked; nothing is left behind then. The model in memory is as before.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExpertError(f"{target}: exists and is not empty; choose a new directory")
    if not len(chosen):
        raise ExpertError("the set is empty: there is nothing to take out")
    chosen.check(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        probe = _probe(model)
        with switched_off(model, chosen):
            wanted = model(probe)
        with _baked(model, chosen):
            model.hf.save_pretrained(fresh)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(fresh)
        error = _parity(fresh, probe, wanted, model)
        chosen.save(fresh / "experts.json")
        card = _card(model, chosen, error, evaluation, description)
        card.save(fresh / "card.json")
        card.save(fresh / "README.md")
        fresh.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


@contextmanager
def _baked(model: Any, chosen: ExpertSet) -> Iterator[None]:
    """The model with the set taken out of its weights; afterwards as before."""
    if chosen.kind == "monet":
        with switched_off(model, chosen):
            yield
        return
    undo: list[Callable[[], Any]] = []
    try:
        with torch.no_grad():
            for layer, ids in chosen.ids.items():
                for weight, index in _outgoing(model, layer, ids, chosen.kind):
                    kept = weight[index].clone()
                    undo.append(partial(operator.setitem, weight, index, kept))
                    weight[index] = 0
        yield
    finally:
        with torch.no_grad():
            for step in reversed(undo):
                step()


def _outgoing(model: Any, layer: int, ids: Tensor, kind: str) -> Iterator[tuple[Tensor, Any]]:
    """The weights by which some units put out what they compute, as (tensor, index)."""
    ids = ids.to(model.device)
    if kind == "neurons":
        module: Any = model.anatomy.places["mlp_hidden", layer].module
        transposed = not isinstance(module, nn.Linear)  # GPT-2's Conv1D keeps [in, out]
        yield module.weight, ids if transposed else (slice(None), ids)
        return
    place = model.anatomy.places["expert_weight", layer]
    module = place.module
    if place.how != "experts" or not isinstance(getattr(module, "down_proj", None), Tensor):
        raise ExpertError(
            f"{model.name}, layer {layer}: {type(module).__name__} does not keep its experts in one tensor, so they "
            "cannot be zeroed here; switched_off works"
        )
    if getattr(module, "has_post_expert_norm", False) and not torch.count_nonzero(_norm_of_zero(module)) == 0:
        raise ExpertError(f"{model.name}, layer {layer}: a norm after each expert makes more than 0 of zero")
    yield module.down_proj, ids
    if module.has_bias:
        yield module.down_proj_bias, ids


def _norm_of_zero(module: Any) -> Tensor:
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    return module.post_expert_norm(torch.zeros(1, width, dtype=module.down_proj.dtype, device=module.down_proj.device))


def _probe(model: Any) -> Tensor:
    """Random token ids [4, 32], always the same for a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.d_vocab, (4, min(32, model.n_ctx or 32)), generator=generator)


def _parity(path: Path, probe: Tensor, wanted: Tensor, model: Any) -> float:
    """Largest difference of logits between the saved checkpoint and the masked model."""
    from interp.zoo.load import load

    saved = load(path, dtype=model.dtype, device=model.device)
    error = float((saved(probe) - wanted).abs().max())
    scale = float(wanted.abs().max())
    if not error <= 1e-3 * max(scale, 1.0):
        raise ExpertError(
            f"{path.name}: the saved checkpoint's logits differ from the masked model's by {error:.3g} (logits reach "
            f"{scale:.3g}); it was not kept"
        )
    return error


def _card(model: Any, chosen: ExpertSet, error: float, evaluation: Any, description: str) -> Card:
    import platform

    import transformers

    what = {"monet": "experts (pairs)", "routed": "experts", "neurons": "MLP neurons"}[chosen.kind]
    per_layer = {f"layer {layer}": len(ids) for layer, ids in chosen.ids.items()}
    rows = evaluation
    if hasattr(evaluation, "to_dict"):
        kept = evaluation[evaluation["metric"] == "loss"] if "metric" in evaluation else evaluation
        rows = kept.round(4).to_dict("records")
    fields = {
        "description": description or f"{model.name} with {len(chosen):,} {what} switched off for good.",
        "model": model.name,
        "model_hash": chosen.fingerprint,
        "site": per_layer,
        "method": {
            "chosen by": chosen.record or "hand",
            "switched off by": "a mask in the checkpoint" if chosen.kind == "monet" else "zeroed output weights",
            "parity": f"logits within {error:.2g} of the masked model's on 128 random tokens",
        },
        "training_data": f"routing statistics over {', '.join(chosen.record.get('labels', [])) or 'no text: by hand'}",
        "intended_use": "Measuring what these units do, and mitigation of what they carry.",
        "out_of_scope": "A proof that the knowledge is gone: it may be left in other units, and may be learnt again.",
        "factors": "Each label of the evaluation is a group of its own.",
        "metrics": "Change of next-token loss (nats per token) per label, beside random sets matched on layer and "
        "frequency.",
        "evaluation_data": NOT_MEASURED if rows is None else "Held-out documents of the labels below.",
        "evaluation": rows if rows is not None else NOT_MEASURED,
        "ethics": "Removing one domain or language harms those who use it; look at every label's line.",
        "limits": "Evaluated on next-token loss only unless said otherwise above.",
        "licence": "As the original model's.",
        "versions": {"interp": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    return Card("checkpoint", f"{model.name}, resected", fields)
