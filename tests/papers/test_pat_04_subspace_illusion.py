"""PAT-04. Is This the Subspace You Are Looking For? (Makelov et al. 2023, arXiv 2311.17030).

On a planted model with a dormant path, in a random basis, the test that runs with every patch of one direction (repatch
only the part that the outgoing weights read) flags the false direction and passes the true one, for 20 of 20 seeds.
"""

from __future__ import annotations

import warnings

import torch

from interp.patching import subspace_patch
from interp.patching.guardrails import GuardrailWarning
from tests.patching.planted import gap
from tests.patching.test_guardrails import dormant

CLEAN, CORRUPT = torch.tensor([[3, 3, 1]]), torch.tensor([[3, 3, 2]])


def test_the_false_direction_is_flagged_and_the_true_one_passes_in_20_of_20_seeds() -> None:
    passed = flagged = warned = 0
    for seed in range(20):
        m, true, false = dormant(seed)
        verdicts = {}
        for name, direction in (("true", true), ("false", false)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                frame = subspace_patch(m, CLEAN, CORRUPT, gap, "mlp_hidden[0]", direction, position=2)
            verdicts[name] = frame.attrs["verdict"]
            effect = dict(zip(frame["part"], frame["value"], strict=True))
            assert abs(effect["direction"]) > 1.0  # either looks causal by itself
            warned += name == "false" and any(w.category is GuardrailWarning for w in caught)
        passed += verdicts["true"] == "real"
        flagged += verdicts["false"] == "illusion"
    print(f"true direction passed {passed}/20, false one flagged {flagged}/20")
    assert (passed, flagged, warned) == (20, 20, 20)
