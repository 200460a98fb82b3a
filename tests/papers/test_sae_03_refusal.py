"""SAE-03, O'Brien et al. 2024 (arXiv:2411.11296): refusal steered by a latent, beside its damage.

Planted: prompts that end in a flag token carry a direction that the word of refusal reads. An SAE is trained on other
prompts, the latent is chosen on a training split, and steering is scored on held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import interp
from interp import sae
from interp.sae import behaviour

FLAG, REFUSE, SITE = 90, 17, "resid_post[1]"


@pytest.fixture(scope="module")
def planted() -> tuple[interp.Model, sae.SAE]:
    m = interp.load("tiny:llama")
    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(m.d_model, generator=g), dim=0)
    embedding, unembedding = m.hf.get_input_embeddings().weight, m.hf.get_output_embeddings().weight
    with torch.no_grad():
        embedding[FLAG] += 4 * float(embedding.norm(dim=1).mean()) * direction
        unembedding[REFUSE] += 2 * float(unembedding.norm(dim=1).mean()) * direction
    x = m.capture(torch.cat([prompts(150, True, 1), prompts(150, False, 2)]), SITE)[SITE].flatten(0, 1)
    s = sae.train(x, SITE, arch="topk", d_sae=64, k=4, tokens=12_000, batch_size=100, lr=5e-3, dead_after=2000,
                  progress=False)  # fmt: skip
    return m, s


def prompts(n: int, flagged: bool, seed: int) -> torch.Tensor:
    ids = torch.randint(0, 80, (n, 8), generator=torch.Generator().manual_seed(seed))
    if flagged:
        ids[:, -1] = FLAG
    return ids


def refuses(m: Any, texts: Sequence[Any]) -> torch.Tensor:
    """Probability of the word of refusal after the prompt."""
    return m(list(texts))[:, -1].softmax(-1)[:, REFUSE]


def test_the_chosen_latent_raises_refusal_and_the_table_shows_the_cost(planted: tuple[interp.Model, sae.SAE]) -> None:
    m, s = planted
    (latent,) = behaviour.choose(m, s, prompts(60, True, 3).tolist(), prompts(60, False, 4).tolist())
    table = behaviour.steer(
        m, s, [latent], [2.0, 4.0], flagged=prompts(40, True, 5).tolist(), harmless=prompts(40, False, 6).tolist(),
        neutral=prompts(40, False, 7).tolist(), measure=refuses, resamples=100,
    )  # fmt: skip
    print(table.drop(columns="node").round(4).to_string())
    top = table[(table.multiplier == 4) & (table.baseline == "none")].set_index("metric")
    random = table[(table.multiplier == 4) & (table.baseline == "random")]
    assert top.change["flagged"] > 0.02
    assert top.change["flagged"] > random[random.metric == "flagged"].change.max()
    assert set(top.index) == {"flagged", "harmless", "neutral_loss"}  # over-refusal and loss stand in the same table
    assert top.change["harmless"] > 0
    assert top.change["neutral_loss"] != 0
    assert table.value.notna().all()
    assert table[table.multiplier == 0].change.abs().max() == 0


def test_an_empty_damage_column_is_refused(planted: tuple[interp.Model, sae.SAE]) -> None:
    m, s = planted
    texts: dict[str, Any] = {name: prompts(4, False, 8).tolist() for name in ("flagged", "harmless", "neutral")}
    for name in texts:
        with pytest.raises(sae.SAEError, match=f"{name} is empty"):
            behaviour.steer(m, s, [0], [1.0], measure=refuses, **{**texts, name: []})
