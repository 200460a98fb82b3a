"""MOE-06. Mixture of Hidden-Dimensions Transformer (arXiv 2412.05644), the analysis.

Per token, a dimension is active where its absolute value exceeds a stated threshold (here 1 root mean square of the
token's vector). Planted shared dimensions (active over consecutive tokens) and specific ones (active for some tokens
alone) are recovered exactly; the shares of a layer add up to 1.
"""

from __future__ import annotations

import pytest
import torch

import interp
from interp import experts
from interp.experts import ExpertError
from interp.experts.dimensions import active, shares
from tests.experts.conftest import TEXTS, letters

SHARED, SPECIFIC = [1, 4, 9], {"e": 12, "t": 15, "n": 20}


@pytest.fixture(scope="module")
def planted() -> interp.Model:
    """A Llama whose layers add nothing, so that the stream is the embedding: small, but for the planted dimensions."""
    tokenizer = letters()
    m = interp.load("tiny:llama", tokenizer, vocab_size=len(tokenizer), max_position_embeddings=256)
    with torch.no_grad():
        for layer in m.hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = m.hf.get_input_embeddings().weight
        table.copy_(0.05 * torch.rand(table.shape, generator=torch.Generator().manual_seed(2)))
        table[:, SHARED] = 1.0
        for letter, dimension in SPECIFIC.items():
            table[tokenizer.convert_tokens_to_ids(letter), dimension] = 1.0
    return m


def test_planted_dimensions_are_recovered(planted: interp.Model) -> None:
    table = experts.dimensions(planted, TEXTS, threshold=1.0)
    for layer, part in table.groupby("layer"):
        roles = part.groupby("role")["dimension"].apply(list)
        assert roles["shared"] == SHARED, layer
        assert roles["specific"] == sorted(SPECIFIC.values()), layer
    together = shares(table)
    assert torch.allclose(torch.tensor(together.sum(axis=1).to_numpy()), torch.ones(3, dtype=torch.float64))
    assert float(together["shared"].iloc[0]) == pytest.approx(len(SHARED) / planted.d_model)


def test_rates_are_counted_token_by_token(planted: interp.Model) -> None:
    table = experts.dimensions(planted, TEXTS, threshold=1.0)
    text = [t for texts in TEXTS.values() for t in texts]
    row = table[(table["layer"] == 1) & (table["dimension"] == SPECIFIC["e"])].iloc[0]
    assert row["rate"] == pytest.approx(sum(t.count("e") for t in text) / sum(map(len, text)))
    first = sum(t[:-1].count("e") for t in text)
    assert row["stays"] == pytest.approx(sum(t.count("ee") for t in text) / first, abs=0.02)


def test_the_threshold_is_in_root_mean_squares() -> None:
    h = torch.tensor([[3.0, 0.0, 0.0, -4.0]])  # root mean square 2.5
    assert active(h, 1.0).tolist() == [[True, False, False, True]]
    assert active(h, 1.5).tolist() == [[False, False, False, True]]


def test_a_model_without_the_site_is_told(planted: interp.Model) -> None:
    with pytest.raises(ExpertError, match="site='expert_out': no layer"):
        experts.dimensions(planted, TEXTS, site="expert_out")
