"""GradDrop against its literal definition, and a net in which plain AtP sees nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import interp
from interp import edits
from interp.patching import attribute, effects, patch
from interp.patching.graddrop import score
from interp.patching.nodes import expand

from .conftest import differing, logit_gap
from .nets import cancelling

NODES = ["embed", "resid_pre[*]", "z[*]", "attn_out[*]", "resid_mid[*]", "mlp_out[*]", "resid_post[*]"]


def literal(m: interp.Model, clean: Tensor, corrupt: Tensor, names: list[str]) -> Tensor:
    """1 / (L - 1) sum over l of |I_l| by a whole forward and backward pass per l, the write of l detached by hand."""
    nodes = expand(m, names, m.tokens(clean))
    bases = sorted({n.site.base for n in nodes})
    there, total = m.capture(clean, bases), torch.zeros(len(nodes), len(clean))
    for layer in range(m.n_layers):
        entering: list[Tensor] = []

        def note(h: Tensor, where: edits.Where, entering: list[Tensor] = entering) -> Tensor:
            entering[:] = [h]
            return h

        def detach(h: Tensor, where: edits.Where, entering: list[Tensor] = entering) -> Tensor:
            return entering[0] + (h - entering[0]).detach()

        cut = [edits.Edit(f"resid_pre[{layer}]", note), edits.Edit(f"resid_post[{layer}]", detach)]
        with m.intervene(*cut):
            here = m.capture(corrupt, bases, logits=True, grad=True)
        at = [s for s in bases if here[s].requires_grad]
        assert here.logits is not None
        found = torch.autograd.grad(logit_gap(here.logits).sum(), [here[s] for s in at], allow_unused=True)
        gradient = dict(zip(at, found, strict=True))
        for i, node in enumerate(nodes):
            g = gradient.get(node.site.base)
            if g is not None:
                product = (there[node.site.base] - here[node.site.base].detach()) * g
                product = product[:, node.position]
                head = node.index("head")
                total[i] += (product if head is None else product[:, head]).flatten(1).sum(1).abs()
    return total / (m.n_layers - 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granitemoe", "falcon"])
def test_equals_its_literal_definition(family: str) -> None:
    """Plain sums, norms behind the blocks, residual multipliers and experts, parallel blocks."""
    m, (clean, corrupt) = interp.load(f"tiny:{family}"), differing(2, 6, changed=(1, 3))
    names = [n for n in NODES if n == "embed" or m.anatomy.having(n.removesuffix("[*]"))]
    table = attribute(m, clean, corrupt, logit_gap, names, method="atp+graddrop")
    truth = literal(m, clean, corrupt, names).mean(1)
    assert float(truth.max()) > 0.05
    assert float((torch.tensor(table.score.to_numpy()) - truth).abs().max()) < 2e-6 * max(1.0, float(truth.max()))


def test_a_node_that_only_acts_directly_keeps_its_score() -> None:
    """In the last layer nothing is behind a node: L - 1 equal terms, and its own that is 0."""
    m, (clean, corrupt) = interp.load("tiny:llama"), differing(2)
    plain = attribute(m, clean, corrupt, logit_gap, ["z[-1]", "mlp_out[-1]"], method="atp")
    dropped = attribute(m, clean, corrupt, logit_gap, ["z[-1]", "mlp_out[-1]"], method="atp+graddrop")
    assert dropped.score.to_numpy() == pytest.approx(plain.score.to_numpy(), rel=1e-4, abs=1e-7)
    assert (dropped.value - plain.value).abs().max() < 1e-6


def test_cancelling_paths_hide_a_node_from_atp_and_not_from_graddrop() -> None:
    m, clean, corrupt = cancelling(), torch.tensor([[50, 10]]), torch.tensor([[50, 90]])
    truth = effects(m, clean, corrupt, logit_gap, [[n] for n in expand(m, "mlp_out[0]@1", m.tokens(clean))]).item()
    atp = attribute(m, clean, corrupt, logit_gap, "mlp_out[0]@1", method="atp").score[0]
    dropped = attribute(m, clean, corrupt, logit_gap, "mlp_out[0]@1", method="atp+graddrop").score[0]
    assert abs(truth) > 1
    assert atp < 1e-6
    assert dropped > 0.5


def test_the_average_by_hand() -> None:
    full, layers = torch.tensor([[3.0], [-4.0]]), torch.tensor([2, 0])
    without = [
        (0, torch.tensor([[99.0], [0.0]])),
        (1, torch.tensor([[99.0], [1.0]])),
        (2, torch.tensor([[0.0], [-5.0]])),
    ]
    assert score(full, without, layers, 3).flatten().tolist() == [(3 + 3 + 0) / 2, (0 + 1 + 5) / 2]
    assert score(full, [], layers, 1).flatten().tolist() == [3, 4]


def test_ranks_by_the_absolute_value_inside_the_mean() -> None:
    m, (clean, corrupt) = interp.load("tiny:llama"), differing(4)
    table = attribute(m, clean, corrupt, logit_gap, "z[*]", method="atp*")
    exact = patch(m, clean, corrupt, logit_gap, "z[*]")
    assert table.score.corr(exact.score, method="spearman") > 0.7
