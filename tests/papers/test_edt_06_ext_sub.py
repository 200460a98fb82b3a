"""EDT-06, Ext-Sub (Hu et al. 2024, arXiv:2308.08090): only what is deficient in the anti-expert is subtracted.

Check: on planted low-rank adapters whose rows are shared +- deficient, the shared part is kept to 1e-5 and the
deficient part found; plain negation, beside it, loses the shared part. On LoRA weights merged into a model the
numbers are the same, and the model is put back.
"""

from __future__ import annotations

import pytest
import torch

import interp
from steering import SteeringError
from steering.ext_sub import deltas, ext_sub, extract, merged, negation


def planted(rows: int = 12, columns: int = 20, rank: int = 3):
    """Low-rank S (shared) and D (deficient), orthogonal row by row; W+ = S + D/2... of equal row norms: S +- D."""
    g = torch.Generator().manual_seed(41)
    basis = torch.linalg.qr(torch.randn(columns, 2 * rank, generator=g))[0].T
    s = torch.randn(rows, rank, generator=g) @ basis[:rank]
    d = 0.5 * torch.randn(rows, rank, generator=g) @ basis[rank:]
    return s, d


def test_shared_and_deficient_are_told_apart():
    s, d = planted()
    assert torch.linalg.matrix_rank(s) == 3
    common, deficient = extract(s + d, s - d)
    torch.testing.assert_close(common, s, atol=1e-5, rtol=0)
    torch.testing.assert_close(deficient, -d, atol=1e-5, rtol=0)
    out = ext_sub({"m": s + d}, {"m": s - d})["m"]
    torch.testing.assert_close((out * s).sum(-1) / (s * s).sum(-1), torch.ones(len(s)), atol=1e-5, rtol=0)
    plain = negation({"m": s + d}, {"m": s - d})["m"]
    left = float((plain * s).sum(-1).abs().max())
    print(f"\nshared part left by Ext-Sub: 1.000, by plain negation: {left:.1e}")
    assert left < 1e-4  # negation takes what is shared with it
    gone = ext_sub({"m": s}, {"m": s})["m"]
    torch.testing.assert_close(gone, s, atol=1e-6, rtol=0)  # alike adapters have nothing deficient
    torch.testing.assert_close(ext_sub({"m": s + d}, {"m": s - d}, 0.0)["m"], s + d)


def test_the_parts_are_those_of_the_formula():
    g = torch.Generator().manual_seed(42)
    plus, minus = torch.randn(2, 5, 7, generator=g)
    common, deficient = extract(plus, minus)
    for row in range(5):
        c = plus[row] / plus[row].norm() + minus[row] / minus[row].norm()
        c = c / c.norm()
        torch.testing.assert_close(common[row], minus[row].dot(c) * c)
    torch.testing.assert_close(common + deficient, minus)
    torch.testing.assert_close((common * deficient).sum(-1), torch.zeros(5), atol=1e-5, rtol=0)


def test_rows_without_a_common_direction():
    w = torch.randn(2, 6)
    common, deficient = extract(w, -w)
    assert common.abs().max() == 0
    torch.testing.assert_close(deficient, -w)
    assert bool(torch.isfinite(extract(torch.zeros(2, 6), w)[0]).all())


def lora(m, seed: int, rank: int = 2):
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        w = dict(m.hf.named_modules())[name].weight
        out[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, w.shape[1], generator=g) * 0.1
        out[f"base_model.model.{name}.lora_B.weight"] = torch.randn(w.shape[0], rank, generator=g) * 0.1
    return out


def test_on_lora_weights_of_a_model():
    m = interp.load("tiny:llama")
    plus, minus = lora(m, 1), lora(m, 2)
    changes = ext_sub(plus, minus, 0.7)
    for name, change in changes.items():
        full = [adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
                for adapter in (plus, minus)]  # fmt: skip
        torch.testing.assert_close(change, full[0] - 0.7 * extract(*full)[1])
    before, fingerprint = m([[5, 9, 3]]), m.fingerprint
    with merged(m, changes):
        inside = m([[5, 9, 3]])
        weight = dict(m.hf.named_modules())["model.layers.1.mlp.down_proj"].weight
        torch.testing.assert_close(
            weight.detach() - changes["model.layers.1.mlp.down_proj"],
            interp.load("tiny:llama").hf.model.layers[1].mlp.down_proj.weight.detach(), atol=1e-6, rtol=0,
        )  # fmt: skip
    assert not torch.equal(inside, before)
    assert torch.equal(m([[5, 9, 3]]), before)
    assert m.fingerprint == fingerprint


def test_bad_input():
    m = interp.load("tiny:llama")
    with pytest.raises(SteeringError, match="equal"):
        extract(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(SteeringError, match="different modules"):
        ext_sub({"a": torch.ones(2, 2)}, {"b": torch.ones(2, 2)})
    with pytest.raises(SteeringError, match="no lora_A"):
        deltas({"x.lora_B.weight": torch.ones(2, 2)})
    with pytest.raises(SteeringError, match="no module of that name"), merged(m, {"nowhere": torch.ones(2, 2)}):
        pass
