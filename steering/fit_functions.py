"""Function vectors: what the few heads that carry an in-context task write, as one vector.

    fv = steering.function_vector(m, examples)        examples = [("without", "Without"), ...]
    with m.intervene(fv): m.generate("Q: emu\\nA:")    the task without any example

Source: Todd et al. 2024 (arXiv:2310.15213), eq. 2-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from interp import edits
from steering import pairs as _pairs
from steering.continuation import log_likelihoods
from steering.errors import SteeringError
from steering.reading import one_site, read, sites_at, token_mean
from steering.tasks import TEMPLATE, Template, first_token, prompts, right
from steering.vector import AFTER_PROMPT, SteeringVector


def function_vector(
    m: Any,
    examples: Sequence[Any],
    layer: int | None = None,
    *,
    heads: int | Sequence[tuple[int, int]] = 10,
    shots: int = 10,
    n: int = 100,
    trials: int = 25,
    background: Any = None,
    corrupt: Literal["shuffled", "zero_shot"] = "shuffled",
    template: Template = TEMPLATE,
    seed: int = 0,
    scope: Any = AFTER_PROMPT,
    batch_tokens: int = 2048,
) -> SteeringVector:
    """The task that `examples` show, as the sum of what its heads write: FV = sum over heads of W_O,j mean(z_j).

    1. mean(z_j): each head's output at the last token, over `n` prompts of `shots` examples that the model gets right.
    2. Each head's average indirect effect: put its mean into `trials` prompts whose outputs are shuffled, at the last
       token; how much more likely does the right first token become?
    3. The vector is what the `heads` of largest effect write together, added unscaled from the prompt's last token on.

    What heads write is found by running the layer with them and without them, so the output projection's bias is not
    in it (the reference adds it once per head).

    Args:
        m: the model.
        examples: (input, output) texts, or dicts of them.
        layer: behind which the vector is added; by default a third of the way up, as in the paper.
        heads: how many (10 for 6B parameters, 100 for 70B), or the (layer, head) pairs themselves.
        shots: examples in a prompt.
        n: prompts for the means.
        trials: shuffled prompts for the effects.
        background: texts whose mean over all tokens is taken off each head's mean: mean-centring
            (Jorgensen et al. 2023, arXiv:2312.03813).
        corrupt: what the effects are measured in: prompts with shuffled outputs, as in the paper, or without any shot
            (for tasks that the outputs alone give away).
        template: how an input is asked for (`steering.tasks`).
        seed: of the prompts.
        scope: to which tokens it is added.
        batch_tokens: tokens run at once.

    ``record["heads"]`` lists (layer, head, effect).
    """
    layer = round(m.n_layers / 3) if layer is None else layer
    place = one_site(m, layer)
    items = prompts(examples, n, shots, seed=seed, template=template)
    kept = [item for item, ok in zip(items, right(m, items), strict=True) if ok]
    if not kept:
        raise SteeringError(f"examples: {m.name} gets none of {n} prompts right, so it has no such task to read")
    means = head_means(m, kept, batch_tokens)
    if isinstance(heads, int):
        if corrupt not in ("shuffled", "zero_shot"):
            raise SteeringError(f"corrupt={corrupt!r}: expected 'shuffled' or 'zero_shot'")
        bare = 0 if corrupt == "zero_shot" else shots
        broken = prompts(examples, trials, bare, shuffled=True, seed=seed + 1, template=template)
        table = effects(m, broken, means, batch_tokens)
        if not 1 <= heads <= len(table):
            raise SteeringError(f"heads={heads}: {m.name} has {len(table)}")
        chosen = sorted(table.items(), key=lambda x: -x[1])[:heads]
    else:
        chosen = [((int(at), int(head)), float("nan")) for at, head in heads]
    if background is not None:
        base = token_mean(m, _pairs.texts(m, background, name="background"), list(means), batch_tokens)
        means = {s: means[s] - base[s] for s in means}
    vector = written(m, means, [pair for pair, _ in chosen])
    record = {
        "heads": [[*pair, effect] for pair, effect in chosen], "shots": shots, "prompts": len(kept), "of": n,
        "centred": background is not None, "corrupt": corrupt, "seed": seed,
    }  # fmt: skip
    return SteeringVector.of(m, {place: vector}, method="function_vector", scope=scope, record=record)


def layer_mean(
    m: Any, examples: Sequence[Any], layer: int | None = None, *, shots: int = 10, n: int = 100, background: Any = None,
    template: Template = TEMPLATE, seed: int = 0, scope: Any = AFTER_PROMPT, batch_tokens: int = 2048,
) -> SteeringVector:  # fmt: skip
    """The plain rival: the mean residual stream at the last token of the task's prompts, at one layer.

    With `background` the mean over all tokens of those texts is taken off: mean-centring, whose table of six tasks
    compares just these two (Jorgensen et al. 2023, arXiv:2312.03813, sec. 4.3). Arguments as for `function_vector`.
    """
    layer = round(m.n_layers / 3) if layer is None else layer
    place = one_site(m, layer)
    rows = [_pairs.passage(m, p) for p, _ in prompts(examples, n, shots, seed=seed, template=template)]
    vector = read(m, rows, [place], "last", batch_tokens)[place].mean(0)
    if background is not None:
        passages = _pairs.texts(m, background, name="background")
        vector = vector - token_mean(m, passages, [place], batch_tokens)[place]
    record = {"shots": shots, "prompts": n, "centred": background is not None, "seed": seed}
    return SteeringVector.of(m, {place: vector}, method="layer_mean", scope=scope, record=record)


def head_means(m: Any, items: Sequence[tuple[str, str]], batch_tokens: int = 2048) -> dict[str, Tensor]:
    """Mean output of every head at the last token of the prompts: ``z[l]`` -> [head, d_head]."""
    rows = [_pairs.passage(m, prompt) for prompt, _ in items]
    return {s: x.mean(0) for s, x in read(m, rows, sites_at(m, "*", "z"), "last", batch_tokens).items()}


def effects(
    m: Any, items: Sequence[tuple[str, str]], means: dict[str, Tensor], batch_tokens: int = 2048
) -> dict[tuple[int, int], float]:  # fmt: skip
    """Average indirect effect of each head: (layer, head) -> mean of p(answer | head set to its mean) - p(answer)."""
    runs: dict[Any, list[edits.Edit]] = {None: []}
    for site, mean in means.items():
        layer = m.resolve(site)[0].layer
        for head in range(len(mean)):
            value = mean[head].to(m.device, m.dtype)
            runs[layer, head] = [edits.replace(f"z[{layer}, head={head}]", value, scope="last")]
    nats = log_likelihoods(m, first_token(m, items), runs, batch_tokens=batch_tokens).nats
    plain = nats[None].exp()
    return {key: float((value.exp() - plain).mean()) for key, value in nats.items() if key is not None}


def written(m: Any, means: dict[str, Tensor], heads: Sequence[tuple[int, int]]) -> Tensor:
    """What these heads, putting out their means, write to the residual stream together [d_model].

    Per layer: attention's output with z = the chosen means and nought elsewhere, less that with z = 0. Where
    attention's output passes a norm before the stream, this is what the heads write alone.
    """
    total = torch.zeros(m.d_model)
    token = torch.zeros(1, 1, dtype=torch.long)
    for layer in sorted({at for at, _ in heads}):
        place = f"z[{layer}]"
        if place not in means:
            raise SteeringError(f"heads: layer {layer} has none; layers with heads are {[*means]}")
        chosen = [head for at, head in heads if at == layer]
        if not all(0 <= head < len(means[place]) for head in chosen):
            raise SteeringError(f"heads: layer {layer} has heads 0..{len(means[place]) - 1}, got {chosen}")
        z = torch.zeros_like(means[place])
        z[chosen] = means[place][chosen]
        out = []
        for value in (z, torch.zeros_like(z)):
            with m.intervene(edits.replace(place, value.to(m.device, m.dtype))):
                out.append(m.capture(token, f"attn_out[{layer}]")[f"attn_out[{layer}]"][0, 0].float().cpu())
        total += out[0] - out[1]
    return total
