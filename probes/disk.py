"""Linear probes on disk: safetensors and a card, never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from probes.errors import ProbeError

KINDS = ("LinearProbe", "MeanDifference", "NearestMean", "LDA", "RidgeProbe", "KSparseProbe")


def save(probe: Any, path: str | os.PathLike[str], m: Any = None, site: str = "", **card: Any) -> Path:
    """Writes ``path/probe.safetensors`` and ``path/card.json``.

    Args:
        probe: a fitted linear probe.
        path: a directory; it is made.
        m: the model that it reads, for the card and the check on loading.
        site: where it reads.
        card: other fields of the card (intended_use, evaluation, ...); see `interp.cards`.

    Raises ProbeError for a probe that is not linear or not fitted.
    """
    from safetensors.numpy import save_file

    from interp.cards import Card
    from interp.version import __version__

    kind = type(probe).__name__
    if kind not in KINDS or not hasattr(probe, "coef_"):
        raise ProbeError(f"save: {kind} is not a fitted linear probe ({', '.join(KINDS)})")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    settings = probe.get_params()
    about = {"kind": kind, "settings": json.dumps(settings), "classes": json.dumps(np.asarray(probe.classes_).tolist()),
             "classes_dtype": str(np.asarray(probe.classes_).dtype), "site": site,
             "fingerprint": "" if m is None else m.fingerprint}  # fmt: skip
    temporary = folder / ".probe.safetensors.part"
    save_file(
        {"coef": np.ascontiguousarray(probe.coef_), "intercept": np.ascontiguousarray(probe.intercept_)},
        temporary,
        about,
    )
    os.replace(temporary, folder / "probe.safetensors")
    fields = {"description": f"{kind} of {len(probe.classes_)} classes", "model": "" if m is None else m.name,
              "model_hash": about["fingerprint"], "site": site, "method": f"{kind} {settings}",
              "versions": f"interp {__version__}", **card}  # fmt: skip
    Card("probe", f"{kind} at {site or 'unknown site'}", fields).save(folder / "card.json")
    return folder


def load(path: str | os.PathLike[str], m: Any = None) -> Any:
    """The probe that `save` wrote. With a model, ProbeError unless it was fitted on that one."""
    from safetensors import safe_open

    import probes

    file = Path(path) / "probe.safetensors"
    if not file.is_file():
        raise ProbeError(f"{path}: no probe.safetensors there; give the directory that probes.save wrote")
    with safe_open(file, "numpy") as handle:
        about, coef, intercept = handle.metadata(), handle.get_tensor("coef"), handle.get_tensor("intercept")
    if m is not None and about["fingerprint"] and about["fingerprint"] != m.fingerprint:
        raise ProbeError(f"{path}: fitted on model {about['fingerprint'][:12]}, not on {m.name} ({m.fingerprint[:12]})")
    if about["kind"] not in KINDS:
        raise ProbeError(f"{path}: unknown kind of probe {about['kind']!r}")
    probe = getattr(probes, about["kind"])(**json.loads(about["settings"]))
    probe.classes_ = np.array(json.loads(about["classes"]), dtype=about["classes_dtype"])
    probe.coef_, probe.intercept_, probe.n_features_in_ = coef, intercept, coef.shape[1]
    return probe
