"""GradDrop against its literal definition, and a net in which plain AtP sees nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import edits
from interp.patching import Patcher, attribute, effects, patch
from interp.patching.attribute import Attribution
from interp.patching.graddrop import score, stacked
from interp.patching.nodes import expand
from interp.sites import Site

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


@pytest.mark.parametrize("family", ["llama", "gemma2", "granitemoe", "falcon", "monet"])
def test_equals_its_literal_definition(family: str) -> None:
    """Plain sums, norms behind the blocks, multipliers and experts, parallel blocks, a router for several layers."""
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
    top = torch.tensor([3.0, 0.0])[:, None, None]  # in layer 2 of 3: the whole one, and its own layer dropped
    assert score(top, 2, 3).item() == (3 + 3 + 0) / 2
    bottom = torch.tensor([-4.0, -5.0, 1.0, 0.0])[:, None, None]  # in layer 0: then layers 2, 1 and 0 dropped
    assert score(bottom, 0, 3).item() == (5 + 1 + 0) / 2
    assert score(torch.cat([bottom, bottom[:1]])[:4], None, 3).item() == (5 + 1 + 0) / 2
    assert score(bottom[:2], 0, 1).item() == 4


def test_layers_that_share_more_than_the_stream_are_noticed() -> None:
    """Monet's layers share the router of their group, so the walk down the stream would miss what passes beside it."""
    m, (clean, corrupt) = interp.load("tiny:monet"), differing(2, 6, changed=(1, 3))
    recorded = Patcher(m, clean, corrupt, logit_gap).recorded
    nodes = expand(m, ["resid_pre[*]", "mlp_out[*]"], m.tokens(clean))
    work = Attribution(recorded, nodes, "atp+graddrop", 1)
    work.run()
    assert work.apart
    walked, whole = work._line(torch.arange(2)), literal(m, clean, corrupt, ["resid_pre[*]", "mlp_out[*]"])
    close = 2e-6 * max(1.0, float(whole.max()))
    assert float((walked.dropped(work.levels, len(nodes))[1] - whole).abs().max()) > 10 * close
    assert float((walked.dropped(work.levels, len(nodes), apart=True)[1] - whole).abs().max()) < close


def test_a_step_that_cannot_be_batched_is_taken_row_by_row() -> None:
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * (2.0 if g.abs().max().item() >= 0 else 0.0)  # looks at values, which batches do not have

    x, site = torch.randn(3, requires_grad=True), Site("embed")
    rows = torch.randn(4, 3)
    assert torch.equal(stacked(Odd.apply(x), rows, {site: x})[site], 2 * rows)


def test_ranks_by_the_absolute_value_inside_the_mean() -> None:
    m, (clean, corrupt) = interp.load("tiny:llama"), differing(4)
    table = attribute(m, clean, corrupt, logit_gap, "z[*]", method="atp*")
    exact = patch(m, clean, corrupt, logit_gap, "z[*]")
    assert table.score.corr(exact.score, method="spearman") > 0.7
