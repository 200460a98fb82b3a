"""Training: from activations to SAEs.

    s = sae.train(ds, site="resid_post[5]", arch="batchtopk", d_sae=4608, k=32)     an activation dataset
    s = sae.train((m, texts), site="resid_post[5]", arch="topk", d_sae=4608, k=32)  a model, run no further than needed
    s = sae.train(x, d_sae=512, k=8)                                                a tensor [row, d]
    a, b = sae.train_many(ds, [{"site": "resid_post[5]", "k": 16, ...}, {"site": "resid_post[9]", ...}])

Reading activations costs more than learning from them, so `train_many` trains any number of SAEs, at any sites, in one
pass over the data.

**Several processes** (``torchrun --nproc-per-node 2 train.py``): where ``torch.distributed`` has been initialised,
every process makes the same call, and all end with the same SAE. With ``parallel="data"`` each takes its share of every
batch and gradients are averaged; batchtopk then chooses within each share, and only the first writes checkpoints. With
``parallel="latents"`` all read the same batch and each has its share of the latents (`interp.sae.shards`): the numbers
of one process, for dictionaries too large for one device; each writes its own checkpoint. Only the first shows the bar.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.interrupted import salvaged
from interp.progress import bar
from interp.sae import checkpoint as checkpoints
from interp.sae.autoencoder import SAE
from interp.sae.settings import Settings, complete
from interp.sae.shards import WHOLE, Shard
from interp.sae.sources import UNNAMED, Live, Source, open_source, site_name
from interp.sae.trainer import Trainer, warn_if_few

_SAMPLE = 8192  # tokens from which scales and b_dec are estimated
_OWN = {"d_in", "d_out", "shape", "blocks", "batch_size", "tokens", "seed"}  # of Settings, not for users to give
_OPTIONS = {f.name for f in fields(Settings)} - _OWN


def train(
    source: Any,
    site: Any = None,
    *,
    arch: str = "batchtopk",
    d_sae: int,
    k: float | None = None,
    target: Any = None,
    tokens: int | None = None,
    batch_size: int = 4096,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    progress: bool = True,
    device: str | torch.device = "cpu",
    parallel: str = "data",
    live: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SAE:
    """One SAE.

    Args:
        source: a tensor [row, d]; a mapping from site to tensors; an `interp.store` dataset or its directory; or
            ``(model, texts)``.
        site: what to read. A list of sites makes a crosscoder (Lindsey et al. 2024). Only a tensor needs none, and its
            SAE then does not know where it belongs.
        arch: standard | gated | panneal | jumprelu | topk | batchtopk | matryoshka | mp; see `interp.sae.settings`.
        d_sae: latents.
        k: latents per token.
        target: what to predict instead: a transcoder (Dunefsky et al. 2024); with ``skip=True`` a skip transcoder.
        tokens: how many tokens to train on, by default those that there are, once.
        batch_size: tokens per step.
        seed: of the weights and the order of the data.
        checkpoint: a directory: the training writes there where it is, and goes on from it when called again.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two rows of the table of metrics, ``s.history``.
        progress: show a bar on standard error.
        device: where to train.
        live: for a model: ``context``, ``run`` (texts per pass), ``buffer`` (tokens mixed); see `sources.Live`.
        parallel: what several processes share: "data" or "latents".
        **settings: any other field of `Settings`: lr, sparsity, decoder_norm, aux, ...

    Returns:
        The SAE in the model's own units. Its `history` is the Table of the training: step, tokens, loss, fvu (of the
        batch), l0, dead, lr, threshold, outliers, and the parts of the loss.

    Raises:
        SAEError: k > d_sae, unknown settings, NaN in the activations, a batch larger than the data, all latents dead,
            or a checkpoint of another training (with the differences).
    """
    run = {"site": site, "target": target, "arch": arch, "d_sae": d_sae, "k": k, **settings}
    return train_many(
        source, [run], tokens=tokens, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        checkpoint_every=checkpoint_every, log_every=log_every, progress=progress, device=device, live=live,
        parallel=parallel,
    )[0]  # fmt: skip


def train_many(
    source: Any,
    runs: Sequence[Mapping[str, Any]],
    *,
    tokens: int | None = None,
    batch_size: int = 4096,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    progress: bool = True,
    device: str | torch.device = "cpu",
    parallel: str = "data",
    live: Mapping[str, Any] | None = None,
) -> list[SAE]:
    """Several SAEs in one pass over the activations.

    Args:
        source: as in `train`.
        runs: for each SAE what it is: ``site``, ``target``, ``arch``, ``d_sae``, ``k`` and other settings of `train`.
        tokens: this and what follows as in `train`, the same for all.
        batch_size: tokens per step.
        seed: of weights and order.
        checkpoint: directory to write to and to go on from.
        checkpoint_every: steps.
        log_every: steps.
        progress: show a bar.
        device: where to train.
        live: options of a live model.
        parallel: "data" or "latents".
    """
    if parallel not in ("data", "latents"):
        raise SAEError(f"parallel={parallel!r}: expected 'data' or 'latents'")
    if not runs:
        raise SAEError("runs is empty; give at least one SAE to train")
    plans = [_plan(run, source) for run in runs]
    wanted = list(dict.fromkeys(name for sites, targets, _ in plans for name in (*sites, *targets)))
    opened = open_source(source, wanted, seed, **(live or {}))
    total = tokens or opened.rows
    if not total:
        raise SAEError("tokens: a live model has no end; say on how many tokens to train")
    sample = opened.peek(_SAMPLE)
    trainers = []
    for sites, targets, options in plans:
        s = _settings(sites, targets, options, sample, total, batch_size, seed)
        warn_if_few(opened.rows, s)
        part = Shard.here(s.d_sae, device) if parallel == "latents" else WHOLE
        if part.world > 1 and s.arch == "mp":
            raise SAEError("parallel='latents': matching pursuit chooses one atom after another; use parallel='data'")
        trainers.append(Trainer(s, sites, targets, sample, device, part))
        trainers[-1].state.scratch = trainers[0].state.scratch  # they step one after the other
    if checkpoint is not None and checkpoints.begun(checkpoint, trainers[0].state.part):
        checkpoints.read(checkpoint, trainers, opened)
    about = _about(opened)

    def made() -> list[SAE] | None:
        if not trainers[0].state.steps or trainers[0].state.part.world > 1:  # joining needs the others, who go on
            return None
        return [t.finished(about) for t in trainers]

    with salvaged("sae.train", made):
        _loop(trainers, opened, batch_size, checkpoint, checkpoint_every, log_every, progress)
    return [t.finished(about) for t in trainers]


def _plan(run: Mapping[str, Any], source: Any) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """(sites, targets, other settings) of one SAE."""
    options = dict(run)
    site, target = options.pop("site", None), options.pop("target", None)
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise SAEError(
            f"{unknown[0]}={options[unknown[0]]!r}: no such setting; there are {', '.join(sorted(_OPTIONS))}"
        )
    options.setdefault("arch", "batchtopk")
    resolve = getattr(source[0], "resolve", None) if isinstance(source, tuple) and source else None

    def names(given: Any) -> tuple[str, ...]:
        listed = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
        if resolve is not None:
            return tuple(str(found) for found in resolve(listed))
        return tuple(site_name(one) for one in listed)

    if site is None:
        if not isinstance(source, Tensor) or target is not None:
            raise SAEError("site: say what to read, such as site='resid_post[5]'")
        return (UNNAMED,), (UNNAMED,), options
    sites = names(site)
    return sites, sites if target is None else names(target), options


def _settings(sites: tuple[str, ...], targets: tuple[str, ...], options: dict[str, Any], sample: dict[str, Tensor],
              tokens: int, batch_size: int, seed: int) -> Settings:  # fmt: skip
    shape = "transcoder" if targets != sites else "crosscoder" if len(sites) > 1 else "autoencoder"
    if options.get("skip") and shape != "transcoder":
        raise SAEError("skip=True: a linear path would copy the input; it belongs to a transcoder (target=...)")
    if "d_sae" not in options:
        raise SAEError("d_sae: say how many latents the SAE should have")
    blocks = tuple(sample[site].shape[1] for site in targets)
    widths = tuple(options.pop("widths", ()) or ())
    return complete(Settings(
        d_in=sum(sample[site].shape[1] for site in sites), d_out=sum(blocks), blocks=blocks, shape=shape,
        batch_size=batch_size, tokens=tokens, seed=seed, widths=widths, **options,
    ))  # fmt: skip


def _loop(trainers: list[Trainer], source: Source, batch_size: int, checkpoint: Any, checkpoint_every: int,
          log_every: int, progress: bool) -> None:  # fmt: skip
    steps = trainers[0].settings.steps
    first = trainers[0].state.steps
    if first >= steps:
        return
    rank, world = _place()
    split = trainers[0].copies > 1  # the tokens; else the latents, or nothing
    shown = bar("training", total=steps) if progress and rank == 0 else nullcontext(lambda n, note: None)
    with shown as advance:
        advance(first, _note(trainers[0]))
        for step, batch in zip(range(first, steps), source.batches(batch_size), strict=False):
            part = {site: rows[rank::world] for site, rows in batch.items()} if split else batch
            log = step % log_every == 0 or step + 1 == steps
            for t in trainers:
                t.step(part, log=log)
            advance(1, _note(trainers[0]))
            writes = rank == 0 or not split
            if checkpoint is not None and writes and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                checkpoints.write(checkpoint, trainers, source)


def _place() -> tuple[int, int]:
    """(rank, processes), where ``torch.distributed`` has been set up."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _note(t: Trainer) -> str:
    """How it goes: the last row of the metrics, for the bar."""
    row = t.rows[-1] if t.rows else None
    return f"fvu {row['fvu']:.4f}  l0 {row['l0']:.1f}  dead {row['dead']:.0f}" if row else ""


def _about(source: Source) -> dict[str, Any]:
    about: dict[str, Any] = {"source": source.name}
    if isinstance(source, Live):
        about |= {"model_name": source.model.name, "model_hash": source.model.fingerprint,
                  "context_size": source.context}  # fmt: skip
    return about
