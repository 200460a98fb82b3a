"""Training steps of sparse autoencoders: interp against SAELens, in one process, by turns.

    python benchmarks/sae.py                                    # topk and batchtopk at 4608 and 18432 latents
    python benchmarks/sae.py --arch standard gated jumprelu --d-sae 4608 --fires 64     # as far on in their training
    python benchmarks/sae.py --peers FOLDER                     # also dictionary-learning and sparsify (`_sae_peers`)
    python benchmarks/sae.py --curve --steps 200 --seeds 3      # the same loss curve: final FVU of both

Both train the same SAE: SAELens's initial weights, its parameterisation (free decoder norms, choices made as if they
were 1), its learning rate, its clipping of gradients, Adam and batches of 4096 activations of width 576 (sums of 24 of
2048 random directions, with exponential amounts). SAELens's step is its own `SAETrainer.step`; with ``--bfloat16`` also
with autocast, beside our `encode="bfloat16"`, and the best of each counts. In each round every method makes
one step, in shuffled order. Fresh autoencoders with a ReLU fire at half of their latents, and trained ones at a few
dozen: ``--fires`` moves the encoder's bias, for both, so that so many do. What counts is the ratio of the fastest
rounds and of the medians; CPU time (all threads) is beside it, since it does not grow while a neighbour has the
processor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from _clock import interleave
from _sae_peers import peers
from torch import Tensor

from interp.sae.settings import Settings, complete
from interp.sae.trainer import Trainer

D_IN, K = 576, 32
THEIRS = {"topk": "TopK", "batchtopk": "BatchTopK", "standard": "Standard", "gated": "Gated", "jumprelu": "JumpReLU",
          "matryoshka": "MatryoshkaBatchTopK", "mp": "MatchingPursuit",
          "panneal": "Standard"}  # it has no p-annealing; dictionary-learning has  # fmt: skip
TOPK = ("topk", "batchtopk", "matryoshka")


def activations(n: int, seed: int = 0, features: int = 2048, active: int = 24) -> Tensor:
    """Sparse sums of random directions, of mean norm sqrt(d) [n, D_IN]."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, D_IN, generator=g), dim=-1)
    out = torch.empty(n, D_IN)
    for part in out.split(4096):
        ids = torch.randint(0, features, (len(part), active), generator=g)
        amounts = torch.empty(len(part), active).exponential_(1.0, generator=g)
        part.copy_(torch.nn.functional.embedding_bag(ids, directions, mode="sum", per_sample_weights=amounts))
    return out * (D_IN**0.5) / out.norm(dim=-1).mean()


def deal(pool: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(pool), generator=g).split(batch):
            if len(rows) == batch:
                yield pool[rows]


def theirs(arch: str, d_sae: int, tokens: int, batch: int, seed: int, autocast: bool = False) -> Any:
    """SAELens's trainer with its defaults and a constant learning rate of 3e-4."""
    import sae_lens
    from sae_lens import LoggingConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig

    torch.manual_seed(seed)
    options: dict[str, Any] = {"k": K} if arch in TOPK else {}
    if arch == "matryoshka":
        options["matryoshka_widths"] = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    if arch == "mp":
        options |= {"max_iterations": K, "decoder_init_norm": 1.0}
    config = getattr(sae_lens, f"{THEIRS[arch]}TrainingSAEConfig", None) or getattr(
        __import__("sae_lens.saes.matching_pursuit_sae", fromlist=["x"]), f"{THEIRS[arch]}TrainingSAEConfig"
    )
    cls = getattr(sys.modules[config.__module__], f"{THEIRS[arch]}TrainingSAE")
    model = cls(config(d_in=D_IN, d_sae=d_sae, device="cpu", dtype="float32", **options))
    setting = SAETrainerConfig(total_training_samples=tokens, train_batch_size_samples=batch, lr=3e-4, lr_end=3e-5,
                               autocast=autocast, logger=LoggingConfig(log_to_wandb=False))  # fmt: skip
    return SAETrainer(setting, model, iter(()))


def ours(
    arch: str, d_sae: int, tokens: int, batch: int, seed: int, like: Any, pool: Tensor, encode: str = "float32"
) -> Trainer:
    """Our trainer with the weights and the parameterisation of SAELens's trainer `like`."""
    free = arch != "mp"
    # SAELens clips every gradient to norm 1; our loss of these is its divided by the variance
    variance = float((pool - pool.mean(0)).square().sum(1).mean()) if arch in (*TOPK, "mp") else 1.0
    s = complete(Settings(
        arch, D_IN, D_IN, d_sae, k=K if arch in (*TOPK, "mp") else None, lr=3e-4, beta1=0.9, eps=1e-8, decay=0.0,
        batch_size=batch, tokens=tokens, decoder_norm="free" if free else "unit", init_norm=0.1 if free else 1.0,
        centre="zero", aux=1.0, dead_after=1000 * batch, scale=False, outliers=None, clip=1 / variance, seed=seed,
        encode=encode, sparsity=1.0 if arch not in TOPK else None, sparsity_warmup=0.0, bandwidth=0.05, threshold=0.01,
    ))  # fmt: skip
    trainer = Trainer(s, ("x",), ("x",), {"x": pool[:8192]})
    names = {"decoder": "W_dec", "b_dec": "b_dec", "b_enc": "b_gate" if arch == "gated" else "b_enc"}
    with torch.no_grad():
        for name, weight in trainer.weights.items():
            found = like.sae.W_enc.T if name == "encoder" else getattr(like.sae, names.get(name, name))
            weight.copy_(found)
    return trainer


@torch.no_grad()
def quietened(like: Any, pool: Tensor, fires: int) -> Any:
    """SAELens's trainer `like` with a bias under which `fires` latents of a token exceed 0, on average."""
    bias = getattr(like.sae, "b_gate", None)
    bias = like.sae.b_enc if bias is None else bias
    p = (pool[:256] - like.sae.b_dec) @ like.sae.W_enc + bias
    bias -= p.flatten().topk(fires * len(p)).values[-1]
    return like


def timed(
    arch: str, d_sae: int, batch: int, rounds: int, seconds: float, half: bool, fires: int, folder: Path | None
) -> dict[str, Any]:
    pool = activations(8 * batch)
    runs: dict[str, Any] = {}
    first = theirs(arch, d_sae, 10**9, batch, 0)
    if fires:
        first = quietened(first, pool, fires)
    mine = ours(arch, d_sae, 10**9, batch, 0, first, pool)
    feed = deal(pool, batch, 0)
    runs["interp"] = lambda: mine.step({"x": next(feed)})
    runs["SAELens"] = lambda: first.step(next(feed))
    if half:
        short = ours(arch, d_sae, 10**9, batch, 0, first, pool, "bfloat16")
        second = theirs(arch, d_sae, 10**9, batch, 0, autocast=True)
        runs["interp, bfloat16"] = lambda: short.step({"x": next(feed)})
        runs["SAELens, autocast"] = lambda: second.step(next(feed))
    others = peers(folder, arch, D_IN, d_sae, K, pool[:256], fires) if folder else {}
    for name, step in others.items():
        runs[name] = lambda step=step: step(next(feed))
    times = interleave(runs, rounds, seconds=seconds, warmups=1)
    best = min((n for n in times if n.startswith("SAELens")), key=lambda n: times[n].best)
    our_best = min((n for n in times if n.startswith("interp")), key=lambda n: times[n].best)
    row: dict[str, Any] = {"arch": arch, "d_sae": d_sae, "batch": batch, "fires": fires or "as initialised",
                           "compared": f"{our_best} against {best}"}  # fmt: skip
    for name, taken in times.items():
        row[f"{name}, ms"] = round(1e3 * taken.best)
        row[f"{name}, median ms"] = round(1e3 * statistics.median(taken.wall))
        row[f"{name}, CPU ms"] = round(1e3 * min(taken.cpu))
    a, b = times[best], times[our_best]
    row |= {"ratio": round(a.best / b.best, 2), "ratio of CPU": round(min(a.cpu) / min(b.cpu), 2),
            "ratio of medians": round(statistics.median(a.wall) / statistics.median(b.wall), 2),
            "rounds": len(b.wall), "activations/s": round(batch / b.best)}  # fmt: skip
    for name in others:
        row[f"ratio to {name}"] = round(times[name].best / b.best, 2)
        row[f"ratio of medians to {name}"] = round(statistics.median(times[name].wall) / statistics.median(b.wall), 2)
    return row


def chosen(z: Tensor) -> Tensor:
    """The K largest per row, on average over the batch."""
    least = z.flatten().topk(K * len(z)).values[-1]
    return z * (z >= least)


def curve(arch: str, d_sae: int, batch: int, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Final FVU on held-out activations after the same steps from the same weights."""
    pool = activations(32 * batch)
    pool, held = pool[batch:], pool[:batch]
    rows = []
    for seed in range(seeds):
        like = theirs(arch, d_sae, steps * batch, batch, seed)
        mine = ours(arch, d_sae, steps * batch, batch, seed, like, pool)
        for _, x in zip(range(steps), deal(pool, batch, seed), strict=False):
            mine.step({"x": x})
            like.step(x)

        def error(out: Tensor) -> float:
            return float((held - out).square().sum() / (held - held.mean(0)).square().sum())

        with torch.no_grad():
            inference = mine.finished()
            if arch in ("batchtopk", "matryoshka"):
                # Both thresholds still move towards the choice that the batch makes, each in its own way, so with them
                # the two differ in how many latents they use. What is trained, and compared, is the batch's own choice.
                z, cut = replace(inference, threshold=torch.zeros(d_sae)).encode(held), inference.threshold
                a = error(inference.decode(chosen(z / cut) * cut))
                z = like.sae.encode_with_hidden_pre(held)[1].relu()
                b = error(like.sae.decode(chosen(z)))
            else:
                a, b = error(inference(held)), error(like.sae(held))
        rows.append({"arch": arch, "d_sae": d_sae, "seed": seed, "steps": steps, "fvu, interp": round(a, 5),
                     "fvu, SAELens": round(b, 5), "relative difference": round(a / b - 1, 5)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=["topk", "batchtopk"], choices=THEIRS)
    parser.add_argument("--d-sae", nargs="*", type=int, default=[4608, 18432])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=240.0, help="after so long no new round begins")
    parser.add_argument("--fires", type=int, default=0, help="latents that fire for a token, of those with a ReLU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bfloat16", action="store_true", help="also both with bfloat16; for processors that have it")
    parser.add_argument("--peers", type=Path, help="a folder that has dictionary-learning and eai-sparsify")
    parser.add_argument("--curve", action="store_true", help="compare the loss instead of the time")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows: list[dict[str, Any]] = []
    for d_sae in a.d_sae:
        for arch in a.arch:
            if a.curve:
                rows += curve(arch, d_sae, a.batch, a.steps, a.seeds)
            else:
                rows.append(timed(arch, d_sae, a.batch, a.rounds, a.seconds, a.bfloat16, a.fires, a.peers))
            for row in rows[-a.seeds if a.curve else -1 :]:
                print(json.dumps(row), flush=True)
    if a.json:
        with open(a.json, "w", encoding="utf-8") as handle:
            json.dump(rows, handle, indent=1)


if __name__ == "__main__":
    main()
