"""Every Table knows the call that made it; `interp.rerun` makes it again, exactly, or says what is missing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import interp
import probes
import steering
from interp import calls, experts, metrics, patching, recipes, report, sae
from interp.calls import RerunError
from tests.experts.conftest import TEXTS, build

IDS = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(0))
OTHER = IDS.clone()
OTHER[:, 1] = (IDS[:, 1] + 7) % 17 + 3
PAIRS = [("the court ", "shall decide", "x = f(x)"), ("a gene of ", "the cell", "the licence")]
LABELLED = [text[:12] for texts in TEXTS.values() for text in texts] * 6
KINDS = [label for label, texts in TEXTS.items() for _ in texts] * 6


@pytest.fixture(scope="module")
def routed() -> interp.Model:
    return build("routed")


@pytest.fixture(scope="module")
def dense() -> interp.Model:
    return build("neurons")


def fitted(m: interp.Model) -> probes.LinearProbe:
    read = probes.features(m, LABELLED, "resid_post[1]")
    return probes.LinearProbe().fit(read.values["resid_post[1]"], [kind == "law" for kind in KINDS])


METRIC = metrics.logit_diff(5, 7)


def by_rules(m: interp.Model) -> pd.DataFrame:
    stats = experts.routing(m, TEXTS)
    chosen = experts.select(stats, "law", rule="top", count=2)
    return experts.evaluate(m, chosen, TEXTS, controls=2, stats=stats)


def small_sae() -> sae.SAE:
    return interp.sae.load(SAE_DIR)


ROUTED: dict[str, Callable[[Any], Any]] = {
    "experts.routing.frame": lambda m: experts.routing(m, TEXTS).frame(),
    "experts.evaluate": by_rules,
    "experts.remove_each": lambda m: experts.remove_each(
        m, experts.routing(m, TEXTS), TEXTS, rule="top", count=2, controls=1
    ),
    "experts.summary": lambda m: experts.summary(
        experts.remove_each(m, experts.routing(m, TEXTS), TEXTS, rule="top", count=2, controls=0)
    ),
    "experts.sweep": lambda m: experts.sweep(m, TEXTS, layers=[1], max_tokens=60),
    "experts.attribute": lambda m: experts.attribute(m, TEXTS, max_tokens=60),
    "experts.load": lambda m: experts.load(experts.routing(m, TEXTS)),
    "map": lambda m: m.map(),
}
DENSE: dict[str, Callable[[Any], Any]] = {
    "patching.patch": lambda m: patching.patch(m, IDS, OTHER, METRIC, "z[*]", "noise", positions=[-1]),
    "patching.attribute": lambda m: patching.attribute(m, IDS, OTHER, METRIC, ["resid_post[1]", "mlp_out[*]"]),
    "patching.certify": lambda m: (
        patching.certify(
            m, IDS, OTHER, METRIC, patching.attribute(m, IDS, OTHER, METRIC, "resid_post[*]", "atp"), threshold=0.01
        ).frame
    ),
    "probes.by_layer": lambda m: probes.by_layer(m, LABELLED, KINDS, groups=list(range(len(KINDS))), mdl=True),
    "probes.causal": lambda m: probes.causal(
        m, fitted(m), "resid_post[1]", ["the cell", "the court"], METRIC, unit=1.0, controls=2, scope="last"
    ),
    "probes.massive": lambda m: probes.massive(m, LABELLED[:4], floor=0.0, factor=1.0),
    "steering.evaluate": lambda m: steering.evaluate(m, steering.caa(m, PAIRS, layer=1), PAIRS, controls=2),
    "steering.sweep": lambda m: steering.sweep(m, steering.caa(m, PAIRS, layer="*"), PAIRS),
    "steering.compare": lambda m: steering.compare(
        m, {"law": {"caa": steering.caa(m, PAIRS, layer=1).within("last")}}, {"law": PAIRS}, ["the cell"], controls=2
    ),
    "steering.cosines": lambda m: steering.cosines({str(n): steering.caa(m, PAIRS[:n], layer=1) for n in (1, 2)}),
    "sae.evaluate": lambda m: sae.evaluate(small_sae(), m, LABELLED[:6]),
    "sae.evaluate, activations": lambda m: sae.evaluate(small_sae(), acts=torch.randn(64, m.d_model)),
}
SAE_DIR = ""


@pytest.fixture(scope="module", autouse=True)
def _sae(dense: interp.Model, tmp_path_factory: pytest.TempPathFactory) -> None:
    global SAE_DIR
    x = dense.capture(LABELLED, "resid_post[1]")["resid_post[1]"].reshape(-1, dense.d_model)
    made = sae.train(x, site="resid_post[1]", arch="topk", d_sae=16, k=2, batch_size=64, progress=False)
    SAE_DIR = str(tmp_path_factory.mktemp("sae") / "made")
    made.save(SAE_DIR)


@pytest.mark.parametrize("name", [*ROUTED, *DENSE])
def test_a_table_is_made_again_exactly(
    name: str, routed: interp.Model, dense: interp.Model, tmp_path: Path
) -> None:  # fmt: skip
    m = routed if name in ROUTED else dense
    table = (ROUTED | DENSE)[name](m)
    assert table.attrs["call"]["arguments"]
    again = interp.rerun(table, m)
    pd.testing.assert_frame_equal(again, table)
    assert json.dumps(again.attrs["call"]) == json.dumps(table.attrs["call"])
    kept = report.load_table(report.save_table(table, tmp_path / "kept.parquet"))
    pd.testing.assert_frame_equal(interp.rerun(kept, m), table)


def test_a_model_of_the_zoo_is_loaded_by_its_name() -> None:
    m = interp.load("tiny:llama")
    table = patching.patch(m, IDS, OTHER, METRIC, "resid_post[*]")
    pd.testing.assert_frame_equal(interp.rerun(table), table)


def test_another_model_is_refused(routed: interp.Model, dense: interp.Model) -> None:
    table = patching.patch(dense, IDS, OTHER, METRIC, "resid_post[*]")
    with pytest.raises(RerunError, match=r"model: the Table was made on .*llama.*, not on .*olmoe"):
        interp.rerun(table, routed)
    with pytest.raises(RerunError, match=r"gives another .* pass model="):  # its tokenizer and size are our own
        interp.rerun(table)


def test_what_has_no_written_form_is_asked_for(dense: interp.Model) -> None:
    def mine(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 5]

    table = patching.patch(dense, IDS, OTHER, mine, "resid_post[*]")
    with pytest.raises(RerunError, match=r"patch: pass metric= again \(it is a function mine\)"):
        interp.rerun(table, dense)
    pd.testing.assert_frame_equal(interp.rerun(table, dense, metric=mine), table)


def test_large_inputs_are_known_by_their_digest(dense: interp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "LIMIT", 50)
    table = patching.patch(dense, IDS, OTHER, METRIC, "resid_post[*]")
    monkeypatch.undo()
    with pytest.raises(RerunError, match=r"clean= again \(only its digest is kept, of a Tensor \[3, 6\]\); corrupt="):
        interp.rerun(table, dense)
    with pytest.raises(RerunError, match="corrupt: not what the Table was made with"):
        interp.rerun(table, dense, clean=IDS, corrupt=IDS, metric=METRIC)
    again = interp.rerun(table, dense, clean=IDS.clone(), corrupt=OTHER.clone(), metric=METRIC)
    pd.testing.assert_frame_equal(again, table)


def test_other_inputs_than_the_recorded_ones_are_refused(dense: interp.Model) -> None:
    table = patching.patch(dense, IDS, OTHER, METRIC, "resid_post[*]")
    with pytest.raises(RerunError, match=r"clean: not what the Table was made with .* call the function itself"):
        interp.rerun(table, dense, clean=OTHER)
    with pytest.raises(RerunError, match=r"texts: .* has no such argument"):
        interp.rerun(table, dense, texts=["a"])


def test_edits_in_force_are_noticed(dense: interp.Model) -> None:
    v = steering.caa(dense, PAIRS, layer=1)
    with dense.intervene(v):
        table = patching.patch(dense, IDS, OTHER, METRIC, "resid_post[2]")
    with pytest.raises(RerunError, match="made under 1 contexts of edits, now there are 0"):
        interp.rerun(table, dense)
    with dense.intervene(v):
        pd.testing.assert_frame_equal(interp.rerun(table, dense), table)


def test_a_filtered_table_as_argument_is_kept_as_it_is(dense: interp.Model) -> None:
    whole = patching.attribute(dense, IDS, OTHER, METRIC, "resid_post[*]", "atp")
    some = whole[whole["layer"] > 0].reset_index(drop=True)
    frame = patching.certify(dense, IDS, OTHER, METRIC, some, threshold=0.01).frame
    certificate = patching.certify(dense, IDS, OTHER, METRIC, whole, threshold=0.01)
    assert "$call" in calls.call_of(certificate)["arguments"]["table"]
    assert "$frame" in calls.call_of(frame)["arguments"]["table"]
    pd.testing.assert_frame_equal(interp.rerun(frame, dense), frame)
    pd.testing.assert_frame_equal(interp.rerun(some, dense), whole)


def test_an_interrupted_call_can_be_made_whole(dense: interp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, original, count = patching.patch(dense, IDS, OTHER, METRIC, "resid_post[*]"), patching.Patcher._run, [0]

    def run(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(patching.Patcher, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        patching.patch(dense, IDS, OTHER, METRIC, "resid_post[*]")
    part = interp.unfinished()
    assert len(part) < len(whole)
    pd.testing.assert_frame_equal(interp.rerun(part, dense), whole)


def test_only_recorded_functions_of_ours_are_called() -> None:
    for name, why in {
        "os:system": "nothing of interp",
        "interp.experts.bake:resect": "no function that Tables record",
        "interp.gone:gone": "not in interp",
    }.items():
        table = pd.DataFrame({"value": [1]})
        table.attrs["call"] = {"function": name, "arguments": {"command": "true"}}
        with pytest.raises(RerunError, match=why):
            interp.rerun(table)
    table.attrs["call"] = {"function": "interp.metrics:log_prob", "arguments": {"target": {"$function": "os:system"}}}
    with pytest.raises(RerunError, match="target: cannot be read back"):
        interp.rerun(table)
    with pytest.raises(RerunError, match="carries no call"):
        interp.rerun(pd.DataFrame())


@pytest.mark.parametrize("value", [
    None, True, 3, 0.1, "a", [1, [2.5]], (1, ("a",)), {"a": [1]}, {1: {"$a": 2}}, {3, 4}, range(0, 9, 2), slice(1, 3),
    np.arange(6).reshape(2, 3), np.array([0.1, np.pi], dtype=np.float32), np.array(["a", "bc"]), np.float64(0.1),
    torch.tensor([1.0, 0.1], dtype=torch.bfloat16), torch.tensor([[True]]), torch.float16,
    interp.Site.parse("z[5, head=3]"), interp.Scope.parse("window(-3, None) & ~last"),
], ids=str)  # fmt: skip
def test_values_come_back_as_they_were(value: Any) -> None:
    form = json.loads(json.dumps(recipes.write(value)))
    back = recipes.read(form, model=lambda _: None, call=lambda _: None)
    if isinstance(value, interp.Scope):
        assert str(back) == str(value)
    elif isinstance(value, torch.Tensor | np.ndarray):
        assert back.dtype == value.dtype
        assert back.tolist() == value.tolist()
    else:
        assert back == value
        assert type(back) is type(value) or isinstance(value, np.generic)


def test_an_expert_set_comes_back(routed: interp.Model) -> None:
    chosen = experts.ExpertSet(routed, {1: [2, 0]}, record={"rule": "by hand"})
    back = recipes.read(json.loads(json.dumps(recipes.write(chosen))), lambda _: None, lambda _: None)
    assert back == chosen
    assert back.record == chosen.record


def test_the_call_reads_as_a_line_of_python(dense: interp.Model) -> None:
    table = patching.patch(dense, IDS, OTHER, METRIC, "resid_post[*]")
    line = calls.text(table)
    assert line.startswith(f"interp.patching.patch(m=<{dense.name}>, clean=[[")
    assert "metric=interp.logit_diff(correct=5, wrong=7)" in line
    assert "nodes='resid_post[*]'" in line
    probe = calls.text(DENSE["probes.causal"](dense))
    assert "probe=<LinearProbe>" in probe
    assert "scope='last'" in probe
    assert "call" not in calls.settings(table)


def test_recording_keeps_what_a_function_says_of_itself() -> None:
    assert inspect.signature(patching.patch) == inspect.signature(inspect.unwrap(patching.patch))
    assert "Patches every node" in (patching.patch.__doc__ or "")
    with pytest.raises(TypeError, match="patch\\(\\) got an unexpected keyword argument 'nope'"):
        patching.patch(1, 2, 3, 4, 5, nope=6)  # type: ignore[call-arg]


@pytest.mark.parametrize("package", [experts, patching, probes, sae, steering], ids=lambda p: p.__name__)
def test_every_public_function_that_gives_a_table_is_recorded(package: Any) -> None:
    public = {name: getattr(package, name) for name in package.__all__}
    tables = {name for name, f in public.items() if inspect.isfunction(f)
              and str(inspect.signature(f).return_annotation).endswith("DataFrame")}  # fmt: skip
    assert tables
    assert [name for name in tables if not hasattr(public[name], "__recorded__")] == []


def test_settings_are_shown_with_the_call_as_a_line(dense: interp.Model) -> None:
    from interp import display
    from interp.report_page import table_section

    table = patching.patch(dense, ["the <script>"], ["the (script)"], METRIC, "resid_post[1]")
    for shown in (display.html(table), table_section("t", table, 5).body):
        assert "interp.patching.patch(m=&lt;tiny:llama&gt;, clean=[" in shown
        assert "<script>" not in shown
    table.attrs["call"] = {"function": 3}
    assert "function" in display.html(table)


def test_a_callback_is_no_obstacle(routed: interp.Model) -> None:
    said: list[str] = []
    stats = experts.routing(routed, TEXTS)
    how: dict[str, Any] = {"rule": "top", "count": 2, "labels": ["law"], "controls": 0}
    table = experts.remove_each(routed, stats, TEXTS, say=said.append, **how)
    with pytest.raises(RerunError, match="pass say= again"):
        interp.rerun(table, routed)
    pd.testing.assert_frame_equal(interp.rerun(table, routed, say=said.append), table)
    pd.testing.assert_frame_equal(interp.rerun(experts.remove_each(routed, stats, TEXTS, **how), routed), table)


def test_a_large_array_is_known_by_some_of_its_numbers_and_a_smaller_one_by_all() -> None:
    large, small = torch.zeros(recipes.WHOLE + 1), torch.zeros(recipes.WHOLE)
    assert recipes.digest(large) == recipes.digest(large.clone())
    assert recipes.digest(large) != recipes.digest(large + 1)
    assert recipes.digest(large) != recipes.digest(large[:-1])
    assert recipes.digest(large) != recipes.digest(large[None])
    other = small.clone()
    other[12_345] = 1
    assert recipes.digest(small) != recipes.digest(other)
