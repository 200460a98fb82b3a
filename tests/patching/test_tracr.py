"""Programs with known circuits (Tracr): exact patching finds them; what each estimator finds, as a table (run with -s).

True nodes are those with an exact effect, and they are the parts that the program is made of. The pairs make attention
look elsewhere, which is where plain AtP is blind: Tracr's attention is so sharp that its slope is gone.

* `lookup` and the last attention of `sort` choose where to look by their queries and keys. AtP* has every true node
  among its first |circuit|, with at least a tenth of its effect; plain AtP gives queries and keys next to nothing, and
  where the lead of a score passes 100 nats exactly nothing, so that it misses them by rank too.
* What acts only *through* a saturated query or key (all of `sort`'s first layer, the MLPs that compute where `reverse`
  looks) stays invisible to AtP* as well: the fix replaces the derivative at queries and keys, not behind them. So does
  what acts through an MLP that makes steps (`hist`): those have no slope, and AtP* has no fix for them.
* Secants between the two runs see both. `secant+qk` has every true node of all four programs among its first |circuit|.
  In `reverse` the runs differ in what is masked; a key that one run cannot see has no slope between them, and what acts
  by way of it keeps its rank by a trace only.
* `frac_prevs` has two layers, and its map acts only by way of the second. GradDrop drops each layer in turn, so in two
  layers it cuts every such path, and AtP* gives that node 0 where AtP is exact. The QK fix alone (atp+qk) keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from interp import patching
from interp.metrics import Metric
from tests.patching.planted import opened
from tests.patching.tracr_programs import Compiled

for package in ("tracr", "jax", "haiku"):
    pytest.importorskip(package, reason="known circuits need tracr-pypi, jax and dm-haiku")

METHODS = ("atp", "atp+qk", "atp*", "secant", "secant+qk")
#: What AtP* is about, in the layer that chooses tokens and in all others.
NODES = ["q[*]", "k[*]", "v[*]", "z[*]"]


@pytest.fixture(scope="module")
def reverse() -> Compiled:
    return Compiled("reverse")


@pytest.fixture(scope="module")
def frac_prevs() -> Compiled:
    return Compiled("frac_prevs")


@pytest.mark.parametrize("words", [["a", "b", "c"], ["d", "d", "a", "b", "c"], ["a", "b", "c", "compiler_pad"]])
def test_the_converted_model_computes_what_tracrs_does(reverse: Compiled, words: list[str]) -> None:
    row = ["BOS", *words]
    ours = reverse.torch(reverse.ids(row)).logits[0].argmax(-1)
    assert [reverse.values[i] for i in ours[1:]] == reverse.reference.apply(row).decoded[1:]


def test_so_does_a_causal_numerical_one(frac_prevs: Compiled) -> None:
    row = ["BOS", "z", "x", "x", "y"]
    ours = frac_prevs.torch(frac_prevs.ids(row)).logits[0, 1:, 0].tolist()
    assert ours == pytest.approx(frac_prevs.reference.apply(row).decoded[1:], abs=1e-5)


def measured(
    made: Compiled,
    clean: list[str],
    corrupt: list[str],
    metric: Callable[[Tensor], Tensor],
    direction: str,
    nodes: list[str],
) -> pd.DataFrame:
    """Exact effect, and the score and rank that each estimator gives, of every node."""
    m = opened(made.torch, "tracr")
    a, b = made.ids(["BOS", *clean]), made.ids(["BOS", *corrupt])
    named = Metric(lambda logits, tokens: metric(logits), "output")
    table = patching.patch(m, a, b, named, nodes, direction)  # type: ignore[arg-type]
    out = table[["node", "position"]].assign(exact=table["value"])
    for method in METHODS:
        found = patching.attribute(m, a, b, named, nodes, method, direction=direction)  # type: ignore[arg-type]
        out = out.merge(found[["node", "position", "score"]].rename(columns={"score": method}), on=["node", "position"])
        out[f"{method} rank"] = out[method].rank(ascending=False, method="max").astype(int)
    return out


def truth(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["exact"].abs() > 0.01]


def places(rows: pd.DataFrame) -> set[str]:
    return {f"{n}@{p}" for n, p in zip(rows["node"], rows["position"], strict=True)}


def shown(name: str, table: pd.DataFrame) -> None:
    true = truth(table)
    for method in METHODS:
        top = int((true[f"{method} rank"] <= len(true)).sum())
        seen = int((true[method] >= 0.1 * true["exact"].abs()).sum())
        found = f"{top} of {len(true)} true nodes in the top {len(true)}, {seen} with a tenth of their effect"
        print(f"{name}, {method}: {found}")  # noqa: T201 - the table of what each estimator finds
    print(true.to_string(index=False))  # noqa: T201


#: Clean and corrupt words, and the position that is asked for. "P" stands for padding, which is not attended to.
WORDS = {
    "lookup": [("abcde", "acbde", 1), ("eabcd", "ebacd", 2), ("dbeca", "dceba", 2), ("cadbe", "cadeb", 3)],
    "sort": [("2514", "5314", 2), ("4123", "2145", 4), ("5342", "1453", 1), ("3215", "5241", 3)],
    "hist": [("aabc", "abbc", 1), ("abca", "abcd", 1), ("ccba", "cdba", 1), ("dadd", "dadb", 1)],
    "reverse": [("abcd", "abcP", 1), ("dbac", "dbaP", 2), ("cadb", "cadP", 3)],
}


def read(name: str, word: str) -> list[Any]:
    """A word as the tokens of a program."""
    return ["BOS", *(int(x) if name == "sort" else "compiler_pad" if x == "P" else x for x in word)]


def asked(name: str, strength: float, direction: str, nodes: list[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Effects and scores over several pairs, and how many true nodes each method has among its first |circuit|."""
    made = Compiled(name, strength)
    rows = [(read(name, a), read(name, b), at) for a, b, at in WORDS[name]]
    right, wrong = (
        torch.tensor([made.output(str(made.reference.apply(row[i]).decoded[row[2]])) for row in rows]) for i in (0, 1)
    )
    at, each = torch.tensor([row[2] for row in rows]), torch.arange(len(rows))
    assert (right != wrong).all()
    clean, corrupt = (made.ids(*(row[i] for row in rows)) for i in (0, 1))
    for ids, answer in ((clean, right), (corrupt, wrong)):
        assert (made.torch(ids).logits[each, at].argmax(-1) == answer).all()  # at any strength
    metric = Metric(lambda x, tokens: x[each, at, right] - x[each, at, wrong], "output")
    m = opened(made.torch, "tracr")
    table = patching.patch(m, clean, corrupt, metric, nodes, direction)  # type: ignore[arg-type]
    out = table[["node", "site", "layer", "position"]].assign(exact=table["score"])
    true, found = table["score"] > 0.01, dict[str, int]()
    for method in METHODS:
        out[method] = patching.attribute(m, clean, corrupt, metric, nodes, method, direction)["score"]  # type: ignore[arg-type]
        found[method] = int((out[method].rank(ascending=False, method="max")[true] <= true.sum()).sum())
    out = out[true]
    seen = {method: int((out[method] >= 0.1 * out["exact"]).sum()) for method in METHODS}
    what = f"| {name} x {strength:g} | {direction} | {' '.join(nodes)} | {len(out)} of {len(table)} |"
    cells = " | ".join(f"{found[method]} ({seen[method]})" for method in METHODS)
    print(f"\n{what} {cells} |")  # noqa: T201 - a line of the table
    return out, found


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("strength", [1.0, 5.0])
@pytest.mark.parametrize(
    ("name", "nodes"), [("lookup", ["q[0]", "k[0]", "v[0]", "z[0]"]), ("sort", ["q[1]", "k[1]", "v[1]", "z[1]"])]
)
def test_where_attention_looks_is_found_by_atp_star_and_missed_by_atp(
    name: str, nodes: list[str], strength: float, direction: str
) -> None:
    true, found = asked(name, strength, direction, nodes)
    assert found["atp*"] == found["atp+qk"] == len(true) >= 4
    assert (true["atp*"] >= 0.1 * true["exact"]).all()
    saturated = true[true["site"].isin(["q", "k"])]
    assert len(saturated) >= 2
    assert (saturated["atp"] < 1e-3 * saturated["exact"]).all()
    if strength > 1:
        assert found["atp"] == len(true) - len(saturated)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("strength", [1.0, 5.0])
@pytest.mark.parametrize(("name", "seen"), [("lookup", 1.0), ("sort", 0.96), ("hist", 1.0), ("reverse", 0.7)])
def test_secants_have_every_true_node_of_a_whole_program_on_top(
    name: str, seen: float, strength: float, direction: str
) -> None:
    """`seen`: the share of true nodes that are given a tenth of their effect, too."""
    true, found = asked(name, strength, direction, [*NODES, "mlp_out[*]"])
    assert found["secant+qk"] == len(true) >= 4
    assert (true["secant+qk"] >= 0.1 * true["exact"]).mean() >= seen
    behind = true[true["atp*"] < 1e-3 * true["exact"]]
    assert (len(behind) >= 3) is (name != "lookup")  # whose only layer chooses: nothing is upstream of it
    if strength > 1:
        assert found["atp"] <= found["atp*"] == len(true) - len(behind)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_query_that_chooses_is_missed_by_atp_and_found_by_the_qk_fix(reverse: Compiled, direction: str) -> None:
    right, wrong = reverse.output("d"), reverse.output("c")
    table = measured(
        reverse, ["a", "b", "c", "d"], ["a", "b", "c", "compiler_pad"], lambda x: x[:, 1, right] - x[:, 1, wrong],
        direction, ["q[3]", "k[3]", "v[3]", "z[3]"],
    )  # fmt: skip
    shown(f"reverse, last attention, {direction}", table)
    true = truth(table)
    expected = {"q[3, head=0]@1", "z[3, head=0]@1"} | ({"v[3, head=0]@4"} if direction == "noise" else set())
    assert places(true) == expected  # position 1 asks for the token opposite, position 4
    assert (true["atp* rank"] <= len(true)).all()
    assert true["atp*"].to_numpy() == pytest.approx(true["exact"].abs().to_numpy(), abs=0.05)
    query = true[true["node"] == "q[3, head=0]"].iloc[0]
    assert query["atp"] < 1e-3 * abs(query["exact"])  # what plain AtP makes of it


def test_what_acts_through_a_saturated_query_stays_hidden(reverse: Compiled) -> None:
    """The known limit: the length, of layer 0, and the positions opposite, of MLPs 0 to 2, have no gradient left."""
    right, wrong = reverse.output("d"), reverse.output("c")
    table = measured(
        reverse, ["a", "b", "c", "d"], ["a", "b", "c", "compiler_pad"], lambda x: x[:, 1, right] - x[:, 1, wrong],
        "denoise", [*NODES, "mlp_out[*]"],
    )  # fmt: skip
    shown("reverse, all nodes, denoise", table)
    true = truth(table)
    behind = {"z[0, head=0]@1", "mlp_out[0]@1", "mlp_out[1]@1", "mlp_out[2]@1"}
    assert places(true) == behind | {"q[3, head=0]@1", "z[3, head=0]@1"}
    hidden = true[[p in behind for p in (f"{n}@{q}" for n, q in zip(true["node"], true["position"], strict=True))]]
    assert (hidden["atp*"] < 1e-3).all()
    assert (true["secant+qk rank"] <= len(true)).all()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_changed_token_is_found_by_every_method(reverse: Compiled, direction: str) -> None:
    """Its value, and the head that carries it: nothing saturates."""
    right, wrong = reverse.output("d"), reverse.output("b")
    table = measured(
        reverse, list("abcd"), list("abcb"), lambda x: x[:, 1, right] - x[:, 1, wrong], direction,
        [*NODES, "mlp_out[*]"],
    )  # fmt: skip
    shown(f"reverse, a token, {direction}", table)
    true = truth(table)
    assert places(true) == {"v[3, head=0]@4", "z[3, head=0]@1"}
    for method in METHODS:
        assert (true[f"{method} rank"] <= len(true)).all()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_changed_count_is_found_but_for_what_graddrop_cuts(frac_prevs: Compiled, direction: str) -> None:
    """The map of a token to 0 or 1, its value, and the mean over what came before."""
    table = measured(frac_prevs, list("xyzx"), list("yyzx"), lambda x: x[:, 3, 0], direction, [*NODES, "mlp_out[*]"])
    shown(f"frac_prevs, {direction}", table)
    true = truth(table)
    assert places(true) == {"mlp_out[0]@1", "v[1, head=0]@1", "z[1, head=0]@3"}
    for method in ("atp", "atp+qk"):
        assert (true[f"{method} rank"] <= len(true)).all()
    cut = true["node"] == "mlp_out[0]"
    assert true["atp*"][cut].iloc[0] == pytest.approx(0.0, abs=1e-6)
    assert (true["atp* rank"][~cut] <= len(true)).all()
