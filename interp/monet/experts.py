"""n^2 experts built from 2n parts: the two ways in which Monet shares their parameters.

Expert (i, j) is a small MLP with m hidden neurons and s(t) = max(t, 0)^2. A layer adds

    y(x) = sum_ij W_ij E_ij(x)         W_ij = M_ij sum_h g1_hi g2_hj      (M: the mask, all ones at first)

**Horizontal**: the bottom layer comes from part i, the top layer from part j.

    E_ij(x) = V_j z_i + b_j                     z_i = s(U_i x + a_i)  [m]
    y       = sum_j V_j (W^T z)_j + c_j b_j     c = W^T 1

**Vertical**: part i computes one half of the hidden neurons, part j the other, and each also owns half of the output.

    E_ij(x) = [ V11_i z1_i + V12_i z2_j + b1_i ;         z1_i = s(U1_i x + a1_i)  [m/2]
                V21_j z1_i + V22_j z2_j + b2_j ]         z2_j = s(U2_j x + a2_j)  [m/2]
    y_top    = sum_i V11_i r_i z1_i + V12_i (W z2)_i + r_i b1_i              r = W 1
    y_bottom = sum_j V21_j (W^T z1)_j + V22_j c_j z2_j + c_j b2_j

So the parameters grow with n, the square root of the number of experts, and one pass over 2n parts evaluates all n^2 of
them. (`interp.monet.mixing` has the products of W.) The other side of the same coin: an expert has no parameters of its
own. Zeroing the weights of part i removes n experts at once; to remove single experts, mask them.

Source: Monet, arXiv 2412.04139, which has them without a mask. The masked forms are derived here and tested
against the sum over every (i, j).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from interp.monet.config import MonetConfig
from interp.monet.mixing import Kept, Mixed, mix, structure


class Experts(nn.Module):
    """What both decompositions share: the mask, and from per-token key weights to products of W.

    Buffers:
        keep: [n, n], True = expert (i, j) is kept; None (and absent from checkpoints) when all are.
    """

    keep: Tensor | None

    def __init__(self, config: MonetConfig, masked: bool = False) -> None:
        super().__init__()
        self.n = config.moe_experts
        self.register_buffer("keep", torch.ones(self.n, self.n, dtype=torch.bool) if masked else None)
        self._structure: tuple[Tensor, int, Kept | None] | None = None

    def kept(self) -> Kept | None:
        """The mask's structure, worked out again only when the mask has changed."""
        if self.keep is None:
            return None
        version = 0 if self.keep.is_inference() else self.keep._version
        if self._structure is None or self._structure[0] is not self.keep or self._structure[1] != version:
            self._structure = (self.keep, version, structure(self.keep))
        return self._structure[2]

    def mix(self, g1: Tensor, g2: Tensor, z1: Tensor | None, z2: Tensor | None) -> Mixed:
        """`mixing.mix` with [batch, pos, ...] for [token, ...], under this layer's mask."""
        frame, dtype = g1.shape[:2], next(z.dtype for z in (z1, z2) if z is not None)
        z1, z2 = (z if z is None else z.flatten(0, 1) for z in (z1, z2))
        mixed = mix(g1.flatten(0, 1).to(dtype), g2.flatten(0, 1).to(dtype), z1, z2, self.kept())
        return Mixed._make(t if t is None else t.unflatten(0, frame) for t in mixed)

    def forward(self, x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        """y = sum_ij W_ij E_ij(x): x [batch, pos, d_model], g1 and g2 [batch, pos, head, n] -> as x."""
        raise NotImplementedError

    def expert(self, x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """E_ij(x) of some experts, before weight and mask: x [..., d_model], i, j [pair] -> [..., pair, d_model]."""
        raise NotImplementedError


class HorizontalExperts(Experts):
    """Bottom layers U_i, top layers V_j. Parameters: 2 d n m + n m + n d."""

    def __init__(self, config: MonetConfig, masked: bool = False) -> None:
        super().__init__(config, masked)
        self.u = nn.Linear(config.hidden_size, self.n * config.moe_dim)
        self.v = nn.Linear(self.n * config.moe_dim, config.hidden_size, bias=False)
        self.b = nn.Parameter(torch.zeros(self.n, config.hidden_size))
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        z = self.act(self.u(x)).unflatten(-1, (self.n, -1))
        w = self.mix(g1, g2, z, None)
        return self.v(w.wt_z1.flatten(-2)) + w.c @ self.b

    def expert(self, x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        z = self.act(self.u(x)).unflatten(-1, (self.n, -1))[..., i, :]
        v = self.v.weight.unflatten(1, (self.n, -1))[:, j]  # [d_model, pair, m]
        return torch.einsum("...pm,dpm->...pd", z, v) + self.b[j]


class VerticalExperts(Experts):
    """Halves of both layers: U1_i, V11_i, V12_i and U2_j, V21_j, V22_j. Parameters: 2 d n m + n m + n d."""

    def __init__(self, config: MonetConfig, masked: bool = False) -> None:
        super().__init__(config, masked)
        d, d_half, parts = config.hidden_size, config.hidden_size // 2, self.n * config.moe_dim // 2
        self.u1 = nn.Linear(d, parts)
        self.u2 = nn.Linear(d, parts)
        self.v11 = nn.Linear(parts, d_half, bias=False)
        self.v12 = nn.Linear(parts, d_half, bias=False)
        self.v21 = nn.Linear(parts, d_half, bias=False)
        self.v22 = nn.Linear(parts, d_half, bias=False)
        self.b1 = nn.Parameter(torch.zeros(self.n, d_half))
        self.b2 = nn.Parameter(torch.zeros(self.n, d_half))
        self.act1 = ACT2FN[config.hidden_act]  # two modules, so that a hook can tell z1 from z2
        self.act2 = ACT2FN[config.hidden_act]

    def _neurons(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = self.act1(self.u1(x)), self.act2(self.u2(x))
        return z1.unflatten(-1, (self.n, -1)), z2.unflatten(-1, (self.n, -1))

    def forward(self, x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        z1, z2 = self._neurons(x)
        w = self.mix(g1, g2, z1, z2)
        top = self.v11((w.r[..., None] * z1).flatten(-2)) + self.v12(w.w_z2.flatten(-2)) + w.r @ self.b1
        bottom = self.v21(w.wt_z1.flatten(-2)) + self.v22((w.c[..., None] * z2).flatten(-2)) + w.c @ self.b2
        return torch.cat((top, bottom), -1)

    def expert(self, x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        z1, z2 = self._neurons(x)
        z1, z2 = z1[..., i, :], z2[..., j, :]

        def through(v: nn.Linear, part: Tensor, z: Tensor) -> Tensor:
            return torch.einsum("...pm,dpm->...pd", z, v.weight.unflatten(1, (self.n, -1))[:, part])

        top = through(self.v11, i, z1) + through(self.v12, i, z2) + self.b1[i]
        bottom = through(self.v21, j, z1) + through(self.v22, j, z2) + self.b2[j]
        return torch.cat((top, bottom), -1)


def make_experts(config: MonetConfig, masked: bool = False) -> Experts:
    """The experts of one layer, as the configuration decomposes them."""
    return (VerticalExperts if config.moe_decompose == "vertical" else HorizontalExperts)(config, masked)
