"""Taking features out at equal damage: planted directions that one label lives by, and curves worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import interp
from interp import edits, sae
from interp.sae.resection import Removals, resection

SITE, A, B = "resid_post[2]", 10, 20


@pytest.fixture(scope="module")
def planted() -> tuple[interp.Model, torch.Tensor]:
    """A model that repeats the words A and B, each by a direction of its own; and 8 directions, those two first."""
    m = interp.load("tiny:llama")
    g = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(m.d_model, 8, generator=g))[0].T.contiguous()
    words, heads = m.hf.get_input_embeddings().weight, m.hf.get_output_embeddings().weight
    with torch.no_grad():
        for word, direction in zip((A, B), directions, strict=False):
            words[word] = 40 * direction
            heads[word] = 1.5 * direction
    return m, directions


def texts(word: int, n: int, seed: int) -> list[list[int]]:
    """The word again and again, seldom another."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, 100, (n, 12), generator=g)
    ids[torch.rand(n, 12, generator=g) < 0.95] = word
    return ids.tolist()


def test_a_labels_own_direction_costs_it_and_nobody_else(planted: tuple[interp.Model, torch.Tensor]) -> None:
    m, directions = planted
    off = {"directions": lambda ids: edits.project_out(SITE, directions[ids])}
    held_out = {"a": texts(A, 8, 1), "b": texts(B, 8, 2), "c": torch.randint(30, 100, (8, 12)).tolist()}
    done = resection(m, off, {"directions": {"a": [0, 2], "b": [1, 3]}}, held_out, sizes=(1, 2),
                     alive={"directions": range(2, 8)})  # fmt: skip
    begun = resection(m, off, {"directions": {"a": [0, 2], "b": [1, 3]}}, held_out, sizes=(1, 2), first=2,
                      alive={"directions": range(2, 8)})  # fmt: skip
    torch.testing.assert_close(begun.after, done.after, atol=1e-4, rtol=1e-5)  # from the edited layer on: the same
    curve = done.curve(resamples=50).set_index(["baseline", "features"])
    own, random = curve.loc[("none", 1)], curve.loc[("random", 1)]
    assert own.damage > 1
    assert own.low <= own.damage <= own.high
    assert own.selectivity > 5 * random.selectivity
    # the numbers are the model's own losses
    with m.intervene(edits.project_out(SITE, directions[[0]])):
        after = m(torch.tensor(held_out["a"]))[:, :-1].log_softmax(-1)
    before = m(torch.tensor(held_out["a"]))[:, :-1].log_softmax(-1)
    at = torch.tensor(held_out["a"])[:, 1:, None]
    expected = (before - after).gather(-1, at).mean()
    change = (done.after - done.clean)[0, 0, 0, :8].sum() / done.tokens[:8].sum()
    assert float(change) == pytest.approx(float(expected), abs=1e-5)


def test_equal_damage_is_read_off_the_curve() -> None:
    """Damage .2, .4 and spill .1, .4 by hand: at .3 the spill is .25; a kind that stays at .1 has none."""
    clean, tokens = torch.zeros(4), torch.full((4,), 10.0)
    own, weak = torch.tensor([[2.0, 4.0]]).T, torch.tensor([[0.5, 1.0]]).T  # nats of ten tokens [size, text]
    after = torch.stack([torch.cat([own, own, torch.tensor([[1.0], [4.0]]).expand(2, 2)], 1),
                         torch.cat([weak, weak, weak, weak], 1)])[:, None]  # fmt: skip
    done = Removals([("x", "none"), ("y", "none")], ["a"], [10, 20], ["a", "a", "b", "b"], tokens.double(),
                    clean.double(), after.double(), {})  # fmt: skip
    at = done.at_damage(0.3, resamples=5).set_index("method")
    assert at.spill["x"] == pytest.approx(0.25)
    assert at.selectivity["x"] == pytest.approx(1.2)
    assert at.features["x"] == pytest.approx(15)
    assert math.isnan(at.spill["y"])
    below = done.at_damage(0.1, resamples=5).set_index("method")  # between nothing removed and the smallest set
    assert below.spill["x"] == pytest.approx(0.05)
    assert below.low["x"] == pytest.approx(2)  # every text of a label is the same, so is every draw


def test_what_is_missing_is_said(planted: tuple[interp.Model, torch.Tensor]) -> None:
    m, directions = planted
    off = {"directions": lambda ids: edits.project_out(SITE, directions[ids])}
    given = {"a": texts(A, 2, 1), "b": texts(B, 2, 2)}
    with pytest.raises(sae.SAEError, match="texts: none of 'c'"):
        resection(m, off, {"directions": {"c": [0]}}, given)
    with pytest.raises(sae.SAEError, match="no features for 'b'"):
        resection(m, off, {"directions": {"a": [0]}}, given, removed=["a", "b"])
    with pytest.raises(sae.SAEError, match="sizes"):
        resection(m, off, {"directions": {"a": [0]}}, given, sizes=())
    done = resection(m, off, {"directions": {"a": [0]}}, given, sizes=(1, 5))  # five there are not
    assert done.curve(resamples=3).damage.isna().tolist() == [False, True]
