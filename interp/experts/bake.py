"""Taking it away: a checkpoint in which a change of experts is made for good.

    experts.resect(m, law, "without-law")                               zeroed: what `switched_off` does
    experts.resect(m, experts.ablate(law, "reroute"), "without-law")    cut out: smaller, runners-up take the slots

A checkpoint needs nothing of ours to run, Monet's apart, which carries its mask (a bool matrix per layer). What a mode
becomes in the weights is in `interp.experts.surgery` and `interp.experts.smaller`. The saved model is opened again and
compared with the masked one; the largest difference of their logits goes into its card, and too large a one is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from interp.cards import NOT_MEASURED, Card
from interp.experts import smaller
from interp.experts.ablate import Ablation, ablate
from interp.experts.evaluate import switched_off
from interp.experts.sets import ExpertSet
from interp.experts.surgery import operated
from interp.experts.units import ExpertError
from interp.progress import bar
from interp.quiet import quiet
from interp.version import __version__

How = Literal["auto", "weights", "smaller"]

#: What the card says was done.
_DONE = {
    "zero": "zeroed output weights", "scale": "scaled output weights", "swap": "weights of the partner",
    "mean": "zeroed output weights, the mean as output bias", "reroute": "a bias that keeps them out of the choice",
    "smaller": "cut out, with their rows of the router", "monet": "a mask in the checkpoint",
}  # fmt: skip


def resect(
    model: Any,
    chosen: ExpertSet | Ablation,
    out: str | os.PathLike[str],
    *,
    how: How = "auto",
    evaluation: Any = None,
    description: str = "",
) -> Path:
    """Writes a checkpoint that equals `model` under an ablation, its tokenizer, and a card.

    Args:
        model: the model the set belongs to.
        chosen: an `ablate` of all tokens: "zero", "scale", "swap", "mean" or "reroute"; a set means "zero".
        out: a new directory.
        how: "weights" keeps the model's shape; "smaller" cuts experts out, which is what "reroute" computes. "auto"
            cuts out for "reroute" where every layer loses as many, and else keeps the shape.
        evaluation: a Table of `evaluate`, or anything a card can hold, for the card.
        description: one sentence for the card.

    Returns the directory. Raises ExpertError where `out` exists and is not empty, where the set is empty, or where this
    change cannot be baked, with the reason; nothing is left behind then. The model in memory is as before.
    """
    target = Path(out)
    ablation = chosen if isinstance(chosen, Ablation) else ablate(chosen)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExpertError(f"{target}: exists and is not empty; choose a new directory")
    if not len(ablation.chosen):
        raise ExpertError("the set is empty: there is nothing to take out")
    if ablation.scope.text != "all" or ablation.gate is not None:
        raise ExpertError(f"scope={ablation.scope.text!r}: a checkpoint acts on all tokens alike, without a gate")
    ablation.chosen.check(model)
    cut = _cuts(model, ablation, how)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with quiet(), bar("resecting: measuring, writing, comparing", 3) as advance:
            probe = _probe(model)
            off = ablation.mode == "zero"
            with switched_off(model, ablation.chosen) if off else model.intervene(ablation):
                wanted = model(probe)
            advance()
            if cut:
                smaller.cut(model, ablation.chosen).save_pretrained(fresh)
            elif ablation.chosen.kind == "monet":
                with switched_off(model, ablation.chosen):
                    model.hf.save_pretrained(fresh)
            else:
                with model.intervene(ablation):
                    rerouted = _routing(model, ablation, probe)
                with operated(model, ablation):
                    _same(rerouted, _routing(model, ablation, probe), model)
                    model.hf.save_pretrained(fresh)
            advance()
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(fresh)
            error = _parity(fresh, probe, wanted, model)
            advance()
            ablation.chosen.save(fresh / "experts.json")
            done = _DONE["smaller" if cut else "monet" if ablation.chosen.kind == "monet" else ablation.mode]
            card = _card(model, ablation, done, error, evaluation, description)
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


def _cuts(model: Any, ablation: Ablation, how: str) -> bool:
    """Whether experts are cut out. Raises ExpertError where that is asked for and cannot be."""
    if how not in ("auto", "weights", "smaller"):
        raise ExpertError(f"how={how!r}: expected auto, weights or smaller")
    if ablation.chosen.kind == "monet" and ablation.mode != "zero":
        raise ExpertError(f"mode={ablation.mode!r} cannot be baked into Monet: its checkpoint holds a mask, on or off")
    if how == "weights" or (ablation.mode != "reroute" and how == "auto"):
        return False
    if ablation.mode != "reroute":
        raise ExpertError(
            f"how='smaller' is mode='reroute': experts cut out are not chosen; got mode={ablation.mode!r}"
        )
    reason = smaller.why_not(model, ablation.chosen)
    if reason and how == "smaller":
        raise ExpertError(f"{model.name}: its experts cannot be cut out: {reason}")
    return not reason


def _probe(model: Any) -> Tensor:
    """Random token ids [4, 32], always the same for a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.d_vocab, (4, min(32, model.n_ctx or 32)), generator=generator)


def _routing(model: Any, ablation: Ablation, probe: Tensor) -> Tensor | None:
    """Weight of every expert at every token of the probe [layer, token, expert], where a bias is to decide it."""
    if ablation.mode != "reroute":
        return None
    acts = model.capture(probe, [f"expert_weight[{layer}]" for layer in ablation.chosen.ids])
    rows = []
    for layer in ablation.chosen.ids:
        ids, weights = (acts[f"{name}[{layer}]"].flatten(0, 1) for name in ("expert_ids", "expert_weight"))
        rows.append(weights.new_zeros(len(ids), model.n_experts).scatter_add_(1, ids, weights))
    return torch.stack(rows).float()


def _same(rerouted: Tensor | None, biased: Tensor | None, model: Any) -> None:
    """Raises ExpertError unless a bias makes the router weigh experts as rerouting does.

    A bias for the choice leaves an expert its share of a softmax over all of them. Where others are chosen (ERNIE) or
    weighed (LongCat, ZAYA) by their own shares, these are then smaller than if it were not there.
    """
    if rerouted is None or biased is None:
        return
    gap, size = float((rerouted - biased).abs().max()), float(rerouted.abs().max())
    if not gap <= _tolerance(model) * size:
        raise ExpertError(
            f"mode='reroute' cannot be baked: {model.name}: a bias keeps the experts out of the choice, but not out "
            f"of the sum that the others' weights are shares of (weights differ by {gap:.2g} of {size:.2g})"
        )


def _tolerance(model: Any) -> float:
    """Relative difference that rounding explains in the model's precision."""
    return 1e-4 if model.dtype == torch.float32 else 1e-2


def _parity(path: Path, probe: Tensor, wanted: Tensor, model: Any) -> float:
    """Largest difference of logits between the saved checkpoint and the masked model."""
    from interp.zoo.load import load

    saved = load(path, dtype=model.dtype, device=model.device)
    error = float((saved(probe) - wanted).abs().max())
    scale = float(wanted.abs().max())
    if not error <= _tolerance(model) * max(scale, 1.0):
        raise ExpertError(
            f"{path.name}: the saved checkpoint's logits differ from the masked model's by {error:.3g} (logits reach "
            f"{scale:.3g}); it was not kept"
        )
    return error


def _card(model: Any, ablation: Ablation, done: str, error: float, evaluation: Any, description: str) -> Card:
    import platform

    import transformers

    chosen = ablation.chosen
    what = {"monet": "experts (pairs)", "routed": "experts", "neurons": "MLP neurons"}[chosen.kind]
    per_layer = {f"layer {layer}": len(ids) for layer, ids in chosen.ids.items()}
    rows = evaluation
    if hasattr(evaluation, "to_dict"):
        kept = evaluation[evaluation["metric"] == "loss"] if "metric" in evaluation else evaluation
        rows = kept.round(4).to_dict("records")
    fields = {
        "description": description or f"{model.name} with {len(chosen):,} {what} changed for good: {done}.",
        "model": model.name,
        "model_hash": chosen.fingerprint,
        "site": per_layer,
        "method": {
            "chosen by": chosen.record or "hand",
            "mode": ablation.mode,
            "switched off by": done,
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
