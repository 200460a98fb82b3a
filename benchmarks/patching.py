"""Activation patching: our exact sweep against TransformerLens's, and what the estimators cost and miss.

    python benchmarks/patching.py                      # SmolLM2, heads x positions of z, peer on a sample of patches
    python benchmarks/patching.py --whole              # the peer's whole sweep too (thousands of forward passes)
    python benchmarks/patching.py --card --pairs 8     # recall and relative cost of every estimator, with intervals
    python benchmarks/patching.py --shapes             # the same on random models of three shapes

Both sweeps run in one process, on the same weights and prompts, in turns: in each round ours runs whole and the peer
runs a random sample of the same patches, so the ratio compares seconds per patch of one round. Values are compared
patch by patch. Peak memory is that of all tensors made, as `interp.patching.memory.Meter` counts it, in its own run.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="rounds of the sweep")] = 3,
    sample: Annotated[int, typer.Option(min=2, help="patches that the peer runs in a round")] = 40,
    whole: Annotated[bool, typer.Option("--whole", help="the peer runs all patches, once")] = False,
    budget: Annotated[int, typer.Option(help="bytes that our sweep may use")] = 2**28,
    threads: Annotated[int, typer.Option(help="torch threads; 0: torch's own choice")] = 0,
    card: Annotated[bool, typer.Option("--card", help="compare the estimators instead, on SmolLM2")] = False,
    shapes: Annotated[bool, typer.Option("--shapes", help="compare the estimators on random models instead")] = False,
    pairs: Annotated[int, typer.Option(min=1, help="prompt pairs of the comparison")] = 8,
    nodes: Annotated[int, typer.Option(min=2, help="nodes patched exactly for the comparison")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Time the sweep, or grade the estimators."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if card or shapes:
        document = graded_shapes(pairs, nodes) if shapes else graded_smollm2(pairs, nodes)
    else:
        document = sweep(rounds, sample, whole, budget)
    print(json.dumps(document) if as_json else text(document))


def sweep(rounds: int, sample: int, whole: bool, budget: int) -> dict[str, Any]:
    """z of every head at every position, denoising: ours whole, the peer's on a sample."""
    import pandas as pd
    import torch
    from transformer_lens import patching as peer
    from transformer_lens.model_bridge import TransformerBridge

    import interp
    from interp import metrics
    from interp.patching import patch
    from interp.patching.memory import Meter

    m = interp.load("smollm2")
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=interp.load("smollm2").hf, tokenizer=m.tokenizer, device="cpu", dtype=torch.float32)
    clean, corrupt = m.tokens(CLEAN).ids, m.tokens(CORRUPT).ids
    right, wrong = (m.tokenizer(w, add_special_tokens=False).input_ids[0] for w in (" Mary", " John"))
    metric, length = metrics.logit_diff(right, wrong), clean.shape[1]
    rows = [(i, p, h) for i in range(m.n_layers) for p in range(length) for h in range(m.n_heads)]
    draw, ours, theirs, gaps = torch.Generator().manual_seed(0), [], [], []
    patch(m, clean, corrupt, metric, "z[0]@-1")  # the map of the model's parts is made once
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        for _ in range(1 if whole else rounds):
            start = time.perf_counter()
            table = patch(m, clean, corrupt, metric, "z[*]", budget=budget)
            ours.append(time.perf_counter() - start)
            chosen = range(len(rows)) if whole else torch.randperm(len(rows), generator=draw)[:sample].tolist()
            index = pd.DataFrame([rows[i] for i in chosen], columns=["layer", "pos", "head_index"])
            start = time.perf_counter()
            values = peer.generic_activation_patch(
                bridge, corrupt, cache, lambda x: metric(x)[0], peer.layer_pos_head_vector_patch_setter, "z",
                index_df=index)
            theirs.append((time.perf_counter() - start) / len(index) * len(rows))
            ordered = table.set_index(["layer", "position", "head"]).value
            made = torch.tensor([ordered[tuple(r)] for r in index.to_numpy().tolist()])
            gaps.append(float((made + table.attrs["baseline"]["corrupt"] - values).abs().max()))
    with Meter() as meter:
        patch(m, clean, corrupt, metric, "z[*]", budget=budget)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "what": "z of every head at every position, SmolLM2, denoise", "patches": len(rows), "tokens": length,
        "ours_s": ours, "peer_s": theirs, "peer_ran": len(rows) if whole else sample,
        "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
        "largest_gap": max(gaps), "rows": table.attrs["rows"], "forward_passes": table.attrs["forward_passes"],
        "shortcuts": table.attrs["shortcuts"], "budget": budget, "peak_bytes": meter.peak,
        "threads": torch.get_num_threads(),
    }


def graded_smollm2(pairs: int, nodes: int) -> dict[str, Any]:
    """The report card on IOI, capital swap and random pairs."""
    import interp
    from interp.patching import builders, report_card

    m, cards = interp.load("smollm2"), []
    for build in (builders.ioi, builders.capital_swap, builders.fully_random):
        made = build(m, pairs)
        metric = made.metric() if all(made.answers) and all(made.wrong) else _first_token(m, made)
        graded = report_card(m, made, None, metric, ["q[*]", "k[*]", "v[*]", "z[*]", "mlp_out[*]"], sample=nodes)
        cards.append({"task": build.__name__, **_card(graded)})
    return {"what": "estimators on SmolLM2", "cards": cards}


def _first_token(m: Any, made: Any) -> Any:
    """For unrelated texts: the log-probability of what the model itself says after the clean one."""
    from interp import metrics

    return metrics.log_prob(m(made.clean)[range(len(made)), made.clean.last].argmax(-1))


def graded_shapes(pairs: int, nodes: int) -> dict[str, Any]:
    """The report card on random models, their queries sharpened so that attention is as peaked as in trained ones."""
    import torch

    from interp.patching import report_card

    cards = []
    for family in ("gemma3", "gpt_oss", "qwen3_moe"):
        m = sharpen(family, 10.0)
        clean = torch.randint(3, 100, (pairs, 10), generator=torch.Generator().manual_seed(0))
        corrupt = clean.clone()
        corrupt[:, [2, 6]] = (clean[:, [2, 6]] + 40) % 97 + 3
        graded = report_card(
            m, clean, corrupt, lambda x: x[:, -1, 5] - x[:, -1, 7], ["q[*]", "k[*]", "v[*]", "z[*]"], sample=nodes)
        cards.append({"task": family, **_card(graded)})
    return {"what": "estimators on random models with sharp attention", "cards": cards}


def sharpen(family: str, factor: float) -> Any:
    """A tiny random model whose attention scores are multiplied, so that attention is as peaked as in a trained one."""
    import interp

    hf: Any = interp.load(f"tiny:{family}").hf
    for module in hf.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling *= factor
    return interp.Model(hf, name=f"{family}, sharp")


def _card(graded: Any) -> dict[str, Any]:
    return {"sample": graded.attrs["sample"], "pairs": graded.attrs["pairs"], "cost": graded.attrs["cost"],
            "rows": graded.to_dict("records")}  # fmt: skip


def text(document: dict[str, Any]) -> str:
    """The document for people."""
    if "cards" not in document:
        return "\n".join(f"{key:>15}: {value}" for key, value in document.items())
    lines = [document["what"]]
    for card in document["cards"]:
        lines.append(f"\n{card['task']}: {card['sample']} nodes verified on {card['pairs']} pairs")
        for method, cost in card["cost"].items():
            lines.append(f"  {method:<13} {cost['forward']:.1f} forward + {cost['backward']:.1f} backward passes")
        for row in card["rows"]:
            value = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"  {row['site']:<9} {row['measure']:<17} {row['method']:<13} {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
