"""Patterns become nodes: one per layer, part and position; what a family lacks is refused with its reason."""

from __future__ import annotations

import pytest
import torch

import interp
from interp.patching.nodes import Node, expand, frame, window
from interp.sites import Site, SiteError


@pytest.fixture(scope="module")
def m() -> interp.Model:
    return interp.load("tiny:qwen3_moe")


@pytest.fixture(scope="module")
def tokens(m: interp.Model) -> interp.Tokens:
    return m.tokens(torch.arange(3, 17).reshape(2, 7))


@pytest.mark.parametrize(
    ("pattern", "count", "last"),
    [
        ("q[*]", 3 * 4 * 7, "q[2, head=3]"),
        ("k[*]", 3 * 2 * 7, "k[2, head=1]"),  # key-value heads as they are
        ("z[1, head=2]", 7, "z[1, head=2]"),
        ("resid_post[1:]", 2 * 7, "resid_post[2]"),
        ("router_logits[0]", 8 * 7, "router_logits[0, expert=7]"),
        ("expert_weight[0]", 8 * 7, "expert_weight[0, expert=7]"),
        ("expert_out[2, expert=3]", 7, "expert_out[2, expert=3]"),
        ("embed", 7, "embed"),
        ("z[*]@-1", 12, "z[2, head=3]"),
        ("mlp_out[*]@all", 3, "mlp_out[2]"),
    ],
)
def test_a_row_per_layer_part_and_position(
    m: interp.Model, tokens: interp.Tokens, pattern: str, count: int, last: str
) -> None:
    nodes = expand(m, pattern, tokens)
    assert len(nodes) == len(set(nodes)) == count
    assert str(nodes[-1]) == last


def test_positions(m: interp.Model, tokens: interp.Tokens) -> None:
    assert [n.position for n in expand(m, "embed", tokens, [0, -1])] == [0, 6]
    assert [n.position for n in expand(m, "embed", tokens, "all")] == [None]
    assert [n.position for n in expand(m, [Node(Site("embed"), -2), "embed@3"], tokens, "all")] == [5, 3]


def test_windows_are_joint_and_say_so(m: interp.Model, tokens: interp.Tokens) -> None:
    nodes = window(m, "z[*, head=1]", tokens, 2, positions=[4])
    assert [str(n) for n in nodes] == ["z[0:2, head=1]", "z[1:3, head=1]"]
    assert frame(nodes)["joint"].tolist() == [2, 2]
    with pytest.raises(SiteError, match=r"size=4, expected 1\.\.3"):
        window(m, "z[*, head=1]", tokens, 4)


def test_the_frame_has_the_contracts_columns(m: interp.Model, tokens: interp.Tokens) -> None:
    table = frame(expand(m, ["z[1]@2", "expert_weight[0, expert=5]@all"], tokens))
    assert [*table] == ["node", "site", "layer", "head", "neuron", "expert", "position", "joint"]
    first, last = table.iloc[0], table.iloc[-1]
    assert (first.node, first.layer, first["head"], first.position) == ("z[1, head=0]", 1, 0, 2)
    assert last.expert == 5
    assert table.position.isna().tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("mlp_hidden[1]", "layer 1 is a mixture of experts"),
        ("expert_ids[1]", "is no quantity"),
        ("expert_hidden[1, expert=2]", "belong to no fixed tokens"),
        ("expert_out[1, slot=0]", "slots hold other experts in another run"),
        ("logits", "give the metric instead"),
        ("z[9]", r"has layers 0\.\.2"),
        ("z[0, head=4]", r"head=4 is out of range; layer 0 has head 0\.\.3"),
        ("z[0]@7", r"position 7 is out of range; these tokens have positions 0\.\.6"),
        ("z[0]@last", "'last' is no position"),
        ([], "the list is empty"),
    ],
)
def test_what_is_no_node_is_refused(m: interp.Model, tokens: interp.Tokens, pattern: object, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        expand(m, pattern, tokens)  # type: ignore[arg-type]


def test_experts_outside_the_interface_are_refused() -> None:
    m = interp.load("tiny:dbrx")
    with pytest.raises(SiteError, match="outside transformers' experts interface"):
        expand(m, "expert_weight[*]", m.tokens([[5, 6, 7]]))


def test_positions_from_the_end_need_one_length(m: interp.Model) -> None:
    with pytest.raises(SiteError, match=r"the pairs differ in length \(3\.\.5 tokens\)"):
        expand(m, "z[0]@-1", m.tokens([[3, 4, 5], [3, 4, 5, 6, 7]]))
