"""The report: one table, one page, nothing of the user's text let loose in it, and refused where it would mislead."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

import interp
import steering
from interp import progress
from steering import SteeringError, SteeringVector, plots
from steering.lettered import ab
from steering.report import COLUMNS, Report, report
from tests.steering.words import PAIRS, worded

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def found() -> Report:
    m = worded()
    m.name = EVIL
    v = steering.caa(m, PAIRS, layer=1)
    others = steering.shuffled(lambda pairs: steering.caa(m, pairs, layer=1), PAIRS, 2)
    return report(
        m, v, PAIRS[:4], [-1, 1], off_target={EVIL: PAIRS[4:]}, texts=["the cat sleeps , the dog runs", "rain sun"],
        questions=[("How was the film ?", ["good", "cat"], 0), (EVIL, ["yes", "no"], 1)], controls=3,
        prompt=("yes ", "no "), lettered=True, max_new_tokens=4, baselines={"shuffled": others},
    )  # fmt: skip


def test_one_table_holds_everything(found):
    table = found.table
    assert list(table.columns) == list(COLUMNS)
    sections = {"on target", "lettered options", "off target", "neutral text", "multiple choice", "generations"}
    assert set(table.section) == sections
    own = table[table.section == "on target"]
    assert {"propensity", "promotes", "demotes", "slope", "flipped"} == set(own.metric)
    assert {"none", "random", "prompt", "shuffled"} == set(own[own.metric == "propensity"].baseline)
    assert set(own[own.metric == "propensity"].multiplier) == {-1.0, 0.0, 1.0}
    assert set(table[table.section == "generations"].metric) == {"output_perplexity", "distinct"}
    assert not table[["metric", "value"]].isna().any().any()
    kl = table[(table.metric == "kl") & (table.multiplier == 0)]
    assert (kl.value == 0).all()
    assert len(found.generations) == 9
    assert found.about["items"] == 4


def test_numbers_are_those_of_the_measures(found):
    m = worded()
    v = steering.caa(m, PAIRS, layer=1)
    dose = steering.evaluate(m, v, PAIRS[:4], [-1, 0, 1], controls=3)
    own = found.table[(found.table.section == "on target") & (found.table.metric == "propensity")]
    for row in dose.to_dict("records"):
        twin = own[(own.baseline == row["baseline"]) & (own.multiplier == row["multiplier"])].iloc[0]
        assert twin.value == pytest.approx(row["value"], abs=1e-5)
        assert twin.low == pytest.approx(row["low"], abs=1e-5)


def test_the_page_is_whole_offline_and_escaped(found, tmp_path):
    text = found.save(tmp_path / "sub" / "report.html").read_text()
    assert EVIL not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", text)
    for word in ("Neutral text", "Off target", "Multiple choice", "What it writes", "Settings"):
        assert word in text
    for line in found.about["verdict"]:
        assert line in text


def test_without_baseline_scale_likelihood_or_context_there_is_no_page(found):
    table, rest = found.table, (found.generations, found.about)
    own = table.section == "on target"
    lacking = {
        "baseline": Report(table[~(own & (table.baseline == "random"))], *rest),
        "common scale": Report(table[~(own & (table.metric == "demotes"))], *rest),
        "likelihood": Report(table[~(own & (table.metric == "propensity"))], *rest),
        "context": Report(table, found.generations, {**found.about, "context": ""}),
    }
    assert found.missing() == []
    for name, broken in lacking.items():
        assert name in broken.missing()
        with pytest.raises(SteeringError, match=name):
            broken.to_html()


def test_a_vector_that_does_nothing_is_said_to_do_nothing():
    m = worded()
    v = SteeringVector.of(m, {"resid_post[1]": 1e-6 * torch.randn(m.d_model)})
    flat = report(m, v, PAIRS[:4], [-1, 1], texts=["the cat sleeps every day"], controls=4, prompts=[])
    assert any("they do as much" in line for line in flat.about["verdict"])
    assert len(flat.generations) == 0
    with pytest.raises(SteeringError, match="other than 0"):
        report(m, v, PAIRS[:4], [0])


def test_figures_hold_the_tables_numbers(found):
    m = worded()
    dose = steering.evaluate(m, steering.caa(m, PAIRS, layer=1), PAIRS[:4], [-1, 0, 1], controls=3)
    figure = plots.dose_response(dose, EVIL)
    line = next(t for t in figure.data if (t.name or "").startswith("the vector"))
    assert list(line.y) == dose[dose.baseline == "none"].sort_values("multiplier").value.tolist()
    assert figure.data[-1] is line  # on top
    assert EVIL not in figure.to_json()
    sweep = steering.sweep(m, steering.caa(m, PAIRS, layer="*"), PAIRS[:3], [-1, 0, 1])
    grid = plots.layers(sweep, "x").data[0]
    title = plots.layers(sweep).layout.title.text.replace("<br>", " ")
    strongest = sweep.set_index(["layer", "multiplier"])["value"].unstack()
    shift = strongest.sub(strongest[0.0], axis=0).drop(columns=0.0).stack()
    layer, k = shift.abs().idxmax()
    assert title.startswith(f"layer {layer} at {k:+g} changes the propensity most, by {shift[layer, k]:+.2f} nats")
    assert grid.z.shape == (2, m.n_layers)
    top = sweep[(sweep.layer == 0) & (sweep.multiplier == 1)].value.iloc[0]
    base = sweep[(sweep.layer == 0) & (sweep.multiplier == 0)].value.iloc[0]
    assert grid.z[0, 0] == pytest.approx(top - base)


def test_letters_must_be_one_token_and_templates_there():
    m = worded()
    v = SteeringVector.of(m, {"resid_post[1]": torch.ones(m.d_model)})
    items = [("How was the film ?", "good", "bad")]
    table = ab(m, v, items, [0, 1])
    assert set(table.metric) == {"p_positive", "letter_bias", "letter_mass"}
    with pytest.raises(SteeringError, match="not one token"):
        ab(m, v, items, [0], letters=("good day", "bad"))
    for wrong in (("good", "good"), ("good",), "AB"):
        with pytest.raises(SteeringError, match="expected two different ones"):
            ab(m, v, items, [0], letters=wrong)  # type: ignore[arg-type]
    with pytest.raises(SteeringError, match="chat template"):
        ab(m, v, items, [0], chat=True)
    chatty = worded(chat=True)
    w = SteeringVector.of(chatty, {"resid_post[1]": torch.ones(chatty.d_model)})
    assert len(ab(chatty, w, items, [0], chat=True)) == 5


def test_chat_and_prompts_are_the_texts_they_say():
    m = worded(chat=True)
    v = steering.caa(m, PAIRS, layer=1, chat=True)
    a = steering.evaluate(m, v, PAIRS, [0], controls=0, chat=True)
    written = [(f"user : {q} assistant :", p, n) for q, p, n in PAIRS]
    b = steering.evaluate(m, v, written, [0], controls=0)
    assert a.value.tolist() == pytest.approx(b.value.tolist(), abs=1e-6)
    told = steering.evaluate(m, v, PAIRS, [-1, 0, 1], controls=0, prompt=("yes ", "no "))
    asked = told[told.baseline == "prompt"].set_index("multiplier").value
    for k, word in ((-1.0, "no "), (0.0, ""), (1.0, "yes ")):
        plain = steering.evaluate(m, v, [(word + q, p, n) for q, p, n in PAIRS], [0], controls=0)
        assert asked[k] == pytest.approx(plain.value[0], abs=1e-6)


def test_tables_can_be_kept(found, tmp_path):
    table = found.table.copy()
    table.attrs = {}
    table.to_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)
    assert interp.__version__


def test_another_model_judges_in_its_own_tokens():
    """The judge's perplexity is that of its own reading of the text; a model judges itself by the tokens it wrote."""
    m, judge = worded(), worded("gpt2")
    v = SteeringVector.of(m, {"resid_post[1]": torch.zeros(m.d_model)})
    prompts = ["How was the film ?", "Is this right ?"]
    table, written = steering.fluency(m, v, prompts, [0], judge=judge, max_new_tokens=4)
    loss = []
    for prompt, text in zip(prompts, written.text, strict=True):
        ids = judge.tokens(f"{prompt} {text}").row(0)
        start = len(judge.tokens(prompt).row(0))
        logp = judge(ids[None])[0].log_softmax(-1)
        loss.append(-float(torch.stack([logp[i - 1, ids[i]] for i in range(start, len(ids))]).mean()))
    value = table[table.metric == "output_perplexity"].value.iloc[0]
    assert value == pytest.approx(float(torch.tensor(loss).mean().exp()), rel=1e-3)


def test_an_interrupt_leaves_no_half_page(found, tmp_path, monkeypatch):
    page = found.save(tmp_path / "report.html")
    before, write = page.read_text(), Path.write_text

    def interrupted(self, text, **how):
        write(self, text[:1000], **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.save(page)
    assert page.read_text() == before


def test_long_scoring_shows_how_far_it_is(monkeypatch, capfd):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv(progress.VARIABLE, "1")
    m = worded()
    steering.evaluate(m, steering.caa(m, PAIRS, layer=1), PAIRS[:4], [-1, 0, 1], controls=3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "scoring" in err
    assert "48/48" in err  # four pairs of answers, under nothing, the vector both ways and three draws


@pytest.mark.parametrize(("values", "said"), [
    ([-1.0, 0.0, 1.0], "outside the middle 95 % of random vectors, as meant at every strength"),
    ([-0.1, 0.0, 0.1], "within the middle 95 % of random vectors"),
    ([1.0, 0.0, 1.0], "outside the middle 95 % of random vectors, as meant at +1, the wrong way at -1"),
])  # fmt: skip
def test_a_title_says_what_was_found(values: list[float], said: str) -> None:
    rows = [{"multiplier": k, "baseline": b, "value": v if b == "none" else 0.0, "low": -0.5, "high": 0.5}
            for k, v in zip((-1, 0, 1), values, strict=True) for b in ("none", "random")]  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs = {"method": "caa", "sites": ["resid_post[3]"], "model": "m"}
    change = f"{values[2] - values[0]:+.2f} nats per token from multiplier -1 to 1"
    shown = plots.dose_response(table).layout.title.text.replace("<br>", " ")
    assert shown == f"caa at resid_post[3] of m: {change}; {said}"
    other = table.replace({"baseline": {"random": "random experts"}})
    assert said.replace("random vectors", "random experts") in plots.dose_response(other).layout.title.text.replace(
        "<br>", " "
    )
    drawn = {line.name: line.line for line in plots.dose_response(other).data if line.name}
    assert len({(line.color, line.dash) for line in drawn.values()}) == 2, "controls look unlike the vector"
    assert drawn["random experts (band: the middle 95 % of them)"].dash == "dot"
    alone = table[table["baseline"] == "none"]
    assert "not set beside random vectors" in plots.dose_response(alone).layout.title.text.replace("<br>", " ")
