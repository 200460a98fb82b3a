"""Guardrails on circuits that were planted: gates, dormant pathways, backups, saturating metrics, bare tables."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import interp
from interp.patching import builders, pairs, patch
from interp.patching.guardrails import GuardrailWarning, both, cautions, export, subspace_patch, surprise
from interp.patching.self_repair import conditional
from interp.patching.sweeps import sweep
from interp.patching.task import PatchError
from tests.patching.planted import ANSWER, CLEAN, CORRUPT, WRONG, blank, gap, gate, opened
from tests.patching.wordy import wordy


def readings(frame: pd.DataFrame) -> dict[str, str]:
    found = frame[frame["reading"] != ""]
    return {f"{n}@{p}": r for n, p, r in zip(found["node"], found["position"], found["reading"], strict=True)}


def test_and_gates_need_each_head_and_or_gates_are_satisfied_by_each() -> None:
    heads = ("z[0, head=0]@3", "z[0, head=1]@3")
    serial = {"mlp_out[1]@3": "sufficient and needed"}
    assert readings(both(gate("and"), CLEAN, CORRUPT, gap, ["z[0]", "mlp_out[1]"])) == serial | dict.fromkeys(
        heads, "needed only"
    )
    assert readings(both(gate("or"), CLEAN, CORRUPT, gap, ["z[0]", "mlp_out[1]"])) == serial | dict.fromkeys(
        heads, "sufficient only"
    )


def test_both_holds_what_patch_gives_in_either_direction() -> None:
    m = gate("or")
    frame = both(m, CLEAN, CORRUPT, gap, "z[0]")
    for way in ("denoise", "noise"):
        assert frame[way].tolist() == patch(m, CLEAN, CORRUPT, gap, "z[0]", way)["value"].tolist()  # type: ignore[arg-type]
    assert frame.attrs["baseline"] == {"clean": 4.0, "corrupt": 0.0}


def test_a_backup_is_seen_once_its_principal_is_out() -> None:
    frame = conditional(gate("or"), CLEAN, CORRUPT, gap, "z[0]", "z[0, head=0]@3", controls=3).set_index(
        ["node", "position"]
    )
    backup = frame.loc[("z[0, head=1]", 3)]
    assert backup["value"] == pytest.approx(0.0, abs=1e-6)  # alone it does nothing
    assert backup["conditional"] == pytest.approx(-4.0, abs=1e-5)
    assert backup["repair"] == pytest.approx(4.0, abs=1e-5)
    assert backup["random"] < 0.5
    others = frame.drop(index=("z[0, head=1]", 3))
    assert float(others["repair"].abs().max()) < 1e-6
    assert ("z[0, head=0]", 3) not in frame.index
    with pytest.raises(ValueError, match="nothing is left"):
        conditional(gate("or"), CLEAN, CORRUPT, gap, "z[0, head=0]@3", "z[0, head=0]@3")


@torch.no_grad()
def dormant(seed: int) -> tuple[interp.Model, torch.Tensor, torch.Tensor]:
    """(model, true direction, false direction) in the neurons of a linear MLP, in a random basis.

    Of three coordinates of the neurons, one varies with the input and is not read, one is read and never varies, one
    varies and is read. The false direction is the sum of the first two: its patch works through the second.
    """
    generator = torch.Generator().manual_seed(seed)
    model = blank(layers=1, heads=1, d_model=16, n_ctx=8, vocab=8, d_mlp=10, act="none")
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator))[0]
    silent, asleep, live = basis[0], basis[1], basis[2]
    model.embed.weight[1, 0], model.embed.weight[2, 0] = 1.0, -1.0
    model.layers[0].mlp.up.weight[:, 0] = silent + live
    model.layers[0].mlp.down.weight[1] = 2.0 * asleep
    model.layers[0].mlp.down.weight[2] = 1.5 * live
    model.unembed.weight[ANSWER, 1:3] = 1.0
    return opened(model, f"dormant {seed}"), live, (silent + asleep) / 2**0.5


def test_a_dormant_pathway_is_told_from_a_real_one() -> None:
    clean, corrupt = torch.tensor([[3, 3, 1]]), torch.tensor([[3, 3, 2]])
    m, true, false = dormant(0)
    real = subspace_patch(m, clean, corrupt, gap, "mlp_hidden[0]", true, position=2)
    assert real.attrs["verdict"] == "real"
    assert real.attrs["null_share"] == pytest.approx(0.0, abs=1e-6)
    with pytest.warns(GuardrailWarning, match="dormant pathway"):
        fake = subspace_patch(m, clean, corrupt, gap, "mlp_hidden[0]", false, position=2)
    effect = dict(zip(fake["part"], fake["value"], strict=True))
    assert fake.attrs["verdict"] == "illusion"
    assert fake.attrs["null_share"] == pytest.approx(0.5, abs=1e-6)
    assert effect["direction"] == pytest.approx(2.0, abs=1e-5)  # half of the change, times the sleeping weight
    assert effect["row space"] == pytest.approx(0.0, abs=1e-5)
    assert effect["null space"] == pytest.approx(0.0, abs=1e-5)
    assert effect["whole"] == pytest.approx(3.0, abs=1e-5)


def test_a_head_of_z_is_tested_against_its_output_projection() -> None:
    """More coordinates per head than the projection reads: the unread one is all null space."""
    m = gate("and")
    unread = torch.tensor([0.0, 0.0, 1.0, 0.0])
    frame = subspace_patch(m, CLEAN, CORRUPT, gap, "z[0, head=0]", unread, way="noise")
    assert frame.attrs["null_share"] == pytest.approx(1.0)
    assert frame.attrs["verdict"] == "no effect"
    carried = subspace_patch(m, CLEAN, CORRUPT, gap, "z[0, head=0]", torch.tensor([0.0, 1.0, 0.0, 0.0]), way="noise")
    assert carried.attrs["verdict"] == "real"
    assert carried["value"].iloc[0] == pytest.approx(-4.0)


def test_where_nothing_known_reads_the_site_the_table_says_untested() -> None:
    m = gate("and")
    frame = subspace_patch(m, CLEAN, CORRUPT, gap, "resid_post[0]", torch.ones(16), way="noise")
    assert frame.attrs["verdict"] == "untested"
    assert list(frame["part"]) == ["direction", "whole"]
    with pytest.raises(PatchError, match="it has 3 numbers, the site 4"):
        subspace_patch(m, CLEAN, CORRUPT, gap, "z[0, head=0]", torch.ones(3))
    with pytest.raises(PatchError, match="not zero"):
        subspace_patch(m, CLEAN, CORRUPT, gap, "z[0, head=0]", torch.zeros(4))
    with pytest.raises(PatchError, match="names 2 sites"):
        subspace_patch(m, CLEAN, CORRUPT, gap, "z[0, head=*]", torch.ones(4))


def test_cautions_name_what_misleads() -> None:
    m = wordy()
    made = builders.pronoun(m, 4)
    said = " ".join(cautions(m, made, made.metric("probability"), warn=False))
    assert "probability metric" in said
    assert "4 pair(s)" in said
    noisy = made.noised(m, factor=30.0)
    said = " ".join(cautions(m, noisy, made.metric(), warn=False))
    assert "gaussian noise" in said
    assert "probability" not in said
    with pytest.warns(GuardrailWarning) as caught:
        said = cautions(m, made, made.metric())
    assert [str(w.message) for w in caught] == said


def test_surprise_is_the_loss_of_either_prompt(smollm2: interp.Model) -> None:
    from interp.metrics import loss

    made = builders.pronoun(smollm2, 8)
    table = surprise(smollm2, made)
    assert table["clean"].tolist() == pytest.approx(loss(made.clean)(smollm2(made.clean)).tolist(), abs=1e-4)
    assert abs(float((table["corrupt"] - table["clean"]).mean())) < 0.5  # another name is no surprise
    assert cautions(smollm2, made, made.metric(), warn=False) == []
    assert surprise(smollm2, made.noised(smollm2))["clean"].tolist() == pytest.approx(table["clean"].tolist())


def test_a_sweep_is_patch_for_every_corruption_and_metric() -> None:
    m = wordy()
    made = builders.pronoun(m, 2)
    frame = sweep(m, made, "resid_post[*]", metrics=("logit_diff", "probability"))
    assert set(zip(frame["corruption"], frame["metric"], strict=True)) == {
        (c, n) for c in ("token replacement", "gaussian noise") for n in ("logit_diff", "probability")
    }
    one = frame[(frame["corruption"] == "token replacement") & (frame["metric"] == "probability")]
    again = patch(m, made, None, made.metric("probability"), "resid_post[*]")
    assert one["value"].tolist() == again["value"].tolist()
    last = one[(one["layer"] == 2) & (one["position"] == made.clean.ids.shape[1] - 1)]
    assert float(last["share"].iloc[0]) == pytest.approx(1.0, abs=1e-4)  # the last stream is all that the metric sees
    assert "probability metric" in " ".join(frame.attrs["cautions"]["token replacement, probability"])
    with pytest.raises(ValueError, match="corruption 'mean'"):
        sweep(m, made, "z[*]", corruptions=("mean",))


def test_export_refuses_a_result_that_does_not_explain_itself(tmp_path) -> None:
    frame = patch(gate("and"), CLEAN, CORRUPT, gap, "z[0]", "noise")
    for name in ("a.parquet", "b.csv", "c.json"):
        assert export(frame, tmp_path / name).exists()
    kept = pd.read_csv(tmp_path / "b.csv")
    assert set(kept["clean_value"]) == {4.0}
    assert set(kept["direction"]) == {"noise"}
    bare = frame.copy()
    bare.attrs = {}
    with pytest.raises(ValueError, match="baseline"):
        export(bare, tmp_path / "d.csv")
    without = frame.drop(columns=["position"])
    without.attrs = dict(frame.attrs)
    with pytest.raises(ValueError, match="position"):
        export(without, tmp_path / "d.csv")
    with pytest.raises(ValueError, match=r"\.parquet, \.csv or \.json"):
        export(frame, tmp_path / "e.xlsx")
    assert not (tmp_path / "d.csv").exists()


def test_pairs_of_ids_know_their_answers() -> None:
    made = pairs.of(gate("and"), CLEAN, CORRUPT, ANSWER, WRONG)
    frame = patch(gate("and"), made, None, made.metric(), "mlp_out[1]")
    assert float(frame["value"].max()) == pytest.approx(4.0)
