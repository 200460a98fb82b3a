"""Path patching: what it freezes, what it lets answer, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import interp
from interp import edits
from interp.patching.patch import patch
from interp.patching.paths import path_patch
from interp.patching.task import PatchError
from tests.patching.planted import induction

CLEAN, CORRUPT = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[5, 20, 7, 8, 9]])


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


@pytest.fixture(scope="module")
def m() -> interp.Model:
    return interp.load("tiny:llama", dtype=torch.float64)


@pytest.mark.parametrize("through", ["nothing", "mlp"])
@pytest.mark.parametrize("receiver", ["v[2, head=1]", "z[2, head=3]", "mlp_out[2]", "resid_post[2]"])
def test_it_equals_the_four_runs_written_out(m: interp.Model, receiver: str, through: str) -> None:
    names = ["z[*]"] if through == "mlp" else ["z[*]", "mlp_out[*]"]
    table = path_patch(m, CLEAN, CORRUPT, metric, ["z[0, head=2]", "mlp_out[1]"], receiver, through=through)  # type: ignore[arg-type]
    with torch.no_grad():
        base, source = (m.capture(t, ["z[*]", "mlp_out[*]"]) for t in (CLEAN, CORRUPT))
        plain = metric(m(CLEAN))
        for row in table.itertuples():
            frozen = []
            for site in m.resolve(names):
                if site.name == "z":
                    frozen += [
                        edits.replace(site.at(head=h), base[site.at(head=h)])
                        for h in range(4)
                        if str(site.at(head=h)) not in (receiver, row.sender)
                    ]
                elif str(site) not in (receiver, row.sender):
                    frozen.append(edits.replace(site, base[site]))
            with m.intervene(*frozen, edits.replace(row.sender, source[row.sender])):
                read = m.capture(CLEAN, receiver)[receiver]
            with m.intervene(edits.replace(receiver, read)):
                literal = metric(m(CLEAN)) - plain
            assert row.value == pytest.approx(float(literal), abs=1e-10)


def test_mlps_that_answer_make_a_difference(m: interp.Model) -> None:
    direct, by_mlp = (
        path_patch(m, CLEAN, CORRUPT, metric, "z[0, head=*]", "resid_post[2]", through=through)["value"]  # type: ignore[arg-type]
        for through in ("nothing", "mlp")
    )
    assert float((direct - by_mlp).abs().max()) > 1e-4


def test_a_later_sender_has_no_path(m: interp.Model) -> None:
    table = path_patch(m, CLEAN, CORRUPT, metric, "z[2, head=0]", "q[1, head=0]")
    assert float(table["value"].abs().max()) < 1e-12


def test_parallel_families_work_too() -> None:
    m = interp.load("tiny:gpt_neox")
    table = path_patch(m, CLEAN, CORRUPT, metric, "z[*, head=*]", "resid_post[-1]")
    assert len(table) == 12
    assert table["value"].abs().max() > 0


@pytest.mark.parametrize(
    ("senders", "receivers", "through", "message"),
    [
        ("q[0, head=0]", "resid_post[2]", "nothing", "senders: q"),
        ("z[0]", "attn_out[1]", "nothing", "receivers: attn_out"),
        ("z[0]", "resid_post[1]", "nothing", "last layer only"),
        ("resid_pre[1]", "resid_post[2]", "nothing", "layer 0 only"),
        ("z[0]", "resid_post[2]", "heads", "through='heads'"),
    ],
)
def test_what_is_no_path_is_refused(m: interp.Model, senders: str, receivers: str, through: str, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        path_patch(m, CLEAN, CORRUPT, metric, senders, receivers, through=through)  # type: ignore[arg-type]


def test_induction_goes_from_the_previous_token_head_to_the_induction_heads_keys() -> None:
    """[_ A B C A] -> B, against [_ D B C A]: the planted path is the only one, and patching finds each of its ends."""
    toy = induction()
    clean, corrupt = torch.tensor([[5, 1, 2, 3, 1]]), torch.tensor([[5, 4, 2, 3, 1]])

    def copied(logits: Tensor) -> Tensor:
        return logits[:, -1, 2] - logits[:, -1, 3]

    effect = {}
    for part in "qkv":
        table = path_patch(toy, clean, corrupt, copied, "z[0, head=*]", f"{part}[1, head=0]")
        effect |= {(row.sender, part): row.value for row in table.itertuples()}
    assert effect.pop(("z[0, head=0]", "k")) == pytest.approx(-1.0, abs=1e-4)
    assert list(effect.values()) == pytest.approx([0.0] * 5, abs=1e-6)
    nodes = patch(toy, clean, corrupt, copied, ["q[*]", "k[*]", "v[*]", "z[*]"], "noise")
    large = nodes[nodes["value"].abs() > 0.5]
    found = {f"{n}@{p}" for n, p in zip(large["node"], large["position"], strict=True)}
    assert found == {"v[0, head=0]@1", "z[0, head=0]@2", "k[1, head=0]@2", "z[1, head=0]@4"}
