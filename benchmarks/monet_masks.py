"""What an exact expert mask costs in a Monet layer: time and memory against the same layer without one.

    python benchmarks/monet_masks.py                  # the 850M model's layer: d_model 1536, moe_dim 12, 6 heads
    python benchmarks/monet_masks.py --n 512 --d-model 768 --json

A row is one experts module (after its router, which masks do not touch), float32, without gradients. Routing comes
from a router whose logits are normal, so about `topk` keys survive per head and axis. Masked and unmasked layer take
turns; `ratio` is the median over the turns, `us/token` the masked layer's best. `extra` is the masked layer's peak of
live tensors minus that of the unmasked one: it must not grow with n^2 x tokens (`dense W` is what one tensor of that
size would take).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interp.monet import MonetConfig
from interp.monet.experts import Experts, make_experts
from interp.monet.router import MonetRouter

MASKS = ("random 2%", "random 25%", "rows 25%", "columns 25%")


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known | self.seen:
                storage = tensor.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes()
                self.seen.add(pointer)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, pointer, size)
        return out

    def _free(self, pointer: int, size: int) -> None:
        self.seen.discard(pointer)
        self.now -= size


def keep_matrix(kind: str, n: int) -> Tensor:
    """True = kept."""
    share = float(kind.split()[1].rstrip("%")) / 100
    if kind.startswith("random"):
        return torch.rand(n, n) >= share
    keep = torch.ones(n, n, dtype=torch.bool)
    chosen = torch.randperm(n)[: round(share * n)]
    keep[chosen] = False
    return keep if kind.startswith("rows") else keep.T.contiguous()


def seconds(call: Any) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(call: Any) -> int:
    """Peak of live bytes that a call makes."""
    with LiveBytes() as live:
        call()
    return live.peak


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--decompose", nargs="+", default=["horizontal", "vertical"])
    parser.add_argument("--d-model", type=int, default=1536)
    parser.add_argument("--moe-dim", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for n in args.n:
        for decompose in args.decompose:
            config = MonetConfig(
                hidden_size=args.d_model, num_attention_heads=1, num_hidden_layers=1, moe_experts=n, moe_groups=1,
                moe_dim=args.moe_dim, moe_heads=args.heads, moe_topk=args.topk, moe_decompose=decompose,
            )  # fmt: skip
            layer, router = make_experts(config).to(args.device).eval(), MonetRouter(config).to(args.device).eval()
            router.w1.weight.normal_(std=args.d_model**-0.5)  # unit normal logits for unit normal x
            router.w2.weight.normal_(std=args.d_model**-0.5)
            for tokens in args.tokens:
                x = torch.randn(1, tokens, args.d_model, device=args.device)
                rows += measure(layer, x, *router(x), args.runs, {"decompose": decompose, "tokens": tokens})
    if args.json:
        print(json.dumps({"settings": vars(args), "threads": torch.get_num_threads(), "rows": rows}))
        return
    print(
        f"d_model {args.d_model}, moe_dim {args.moe_dim}, heads {args.heads}, topk {args.topk}, {args.device}, "
        f"{torch.get_num_threads()} threads"
    )
    print("  n  decompose   tokens  mask          us/token  ratio  extra MiB  dense W MiB")
    for r in rows:
        print(
            f"{r['n']:4d} {r['decompose']:>10s} {r['tokens']:8d}  {r['mask']:12s} {r['us_per_token']:9.1f} "
            f"{r['ratio']:6.2f} {r['extra_mib']:10.1f} {r['dense_w_mib']:12.1f}"
        )


def measure(
    layer: Experts, x: Tensor, g1: Tensor, g2: Tensor, runs: int, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per kind of mask."""
    tokens = x.shape[1]
    rows = []
    for kind in MASKS:
        keep = keep_matrix(kind, layer.n).to(x.device)

        def plain() -> None:
            layer.keep = None
            layer(x, g1, g2)

        def masked(keep: Tensor = keep) -> None:
            layer.keep = keep
            layer(x, g1, g2)

        plain(), masked()
        turns = [(seconds(masked), seconds(plain)) for _ in range(runs)]
        extra = peak(masked) - peak(plain)
        rows.append(
            {
                "n": layer.n,
                **about,
                "mask": kind,
                "us_per_token": 1e6 * min(turns)[0] / tokens,
                "ratio": statistics.median(a / b for a, b in turns),
                "extra_mib": extra / 2**20,
                "dense_w_mib": tokens * layer.n**2 * x.element_size() / 2**20,
            }
        )
    return rows


if __name__ == "__main__":
    main()
