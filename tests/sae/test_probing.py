"""Sparse probes where the answer is planted; stability of equal and of unrelated dictionaries."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import sae
from interp.sae import probing
from tests.sae.test_files import made

SITE = "resid_post[1]"


def test_a_label_with_a_latent_of_its_own_is_found_by_one_latent() -> None:
    m = interp.load("tiny:llama")
    g = torch.Generator().manual_seed(0)
    plain, marked = (torch.randint(0, 80, (24, 8), generator=g) for _ in range(2))
    marked[:, ::2] = 90
    direction = torch.nn.functional.normalize(torch.randn(m.d_model, generator=g), dim=0)
    with torch.no_grad():
        m.hf.get_input_embeddings().weight[90] += 20 * direction
    texts = {"marked": marked.tolist(), "plain": plain.tolist()}
    x = m.capture(torch.cat([plain, marked]), SITE)[SITE].flatten(0, 1)
    s = sae.train(x, SITE, arch="topk", d_sae=32, k=3, tokens=2000, batch_size=64, lr=5e-3, progress=False)
    table = probing.probe(s, m, texts, ks=(1, 3), resamples=100)
    at = table.set_index(["label", "baseline", "k"]).value
    assert at["marked", "none", 1] > 0.9
    assert at["marked", "none", 1] >= at["marked", "random", 1]
    assert (table.low <= table.value).all()
    assert (table.value <= table.high).all()
    with pytest.raises(sae.SAEError, match="at least two labels"):
        probing.probe(s, m, {"marked": texts["marked"]})


def test_the_same_dictionary_in_another_order_is_the_same() -> None:
    s = made("standard")
    order = torch.randperm(s.d_sae)
    mixed = sae.SAE(s.decoder[order], s.b_dec, s.encoder[order], s.b_enc[order], sites=s.sites, targets=s.targets)
    table = probing.stability([s, mixed]).set_index(["baseline", "metric"]).value
    assert table["none", "cosine"] == pytest.approx(1)
    assert table["none", "shared"] == 1
    assert table["random", "cosine"] < 0.7
    with pytest.raises(sae.SAEError, match="at least two SAEs"):
        probing.stability([s])
