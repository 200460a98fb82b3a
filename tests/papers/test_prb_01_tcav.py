"""PRB-01. Kim et al. 2018, TCAV (arXiv:1711.11279): known gradients, random concepts, any captured site.

The simulation of random concepts (at most 8 % significant at the 5 % level) is in tests/probes/test_tcav.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
import probes
from interp.activations import Tokens


@pytest.mark.parametrize(("family", "site"), [("tiny:llama", "resid_post[1]"), ("tiny:llama", "mlp_hidden[0]"),
                                              ("tiny:olmoe", "attn_out[0]"), ("tiny:gpt2", "z[1]")])  # fmt: skip
def test_works_at_any_site_and_knows_its_sign(family, site):
    """Concept texts end in one token, random ones do not; the metric is, and is minus, a probe's own reading of it."""
    m = interp.load(family)
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, last: int | None) -> Tokens:
        ids = torch.randint(6, 30, (n, 4), generator=generator)
        if last is not None:
            ids[:, -1] = last
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    concept, random, inputs = rows(12, 5), rows(60, None), rows(10, None)
    metric = interp.metrics.logit_diff(3, 9)
    up = probes.tcav(m, concept, random, inputs, metric, site, at="last", runs=3, random_sets=6)
    down = probes.tcav(
        m, concept, random, inputs, interp.metrics.logit_diff(9, 3), site, at="last", runs=3, random_sets=6
    )
    print(f"\n{family} {site}: {up.score:.2f} (p = {up.p_value:.2f}); metric turned round {down.score:.2f}")
    np.testing.assert_allclose(up.scores, 1 - down.scores, atol=1e-12)
    assert 0 <= up.p_value <= 1
    assert up.directions.shape[0] == 3
