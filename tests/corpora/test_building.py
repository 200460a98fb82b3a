from __future__ import annotations

import hashlib
import json
import runpy
import warnings
from pathlib import Path

import pandas as pd
import pytest

from interp import corpora
from interp.corpora import CorpusError, building, catalogue, fetch
from interp.corpora.fallback import GROUPS, fallback_labels
from interp.corpora.split import SPLITS

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "corpora" / "build.py"


def no_network(*_: object) -> None:
    raise CorpusError("no network")


@pytest.fixture
def offline(cache, monkeypatch) -> Path:
    monkeypatch.setattr(fetch, "_run", no_network)
    return cache


def test_files_and_card(fallback):
    card = json.loads((fallback / "corpus.json").read_text())
    assert card["tier"] == "fallback"
    assert card["why"] == "asked for"
    assert set(card["labels"]) == set(fallback_labels())
    for split in SPLITS:
        table = pd.read_parquet(fallback / f"{split}.parquet")
        assert list(table.columns) == ["text", "label", "group", "document", "source"]
        digest = hashlib.sha256()
        for row in table.itertuples():
            digest.update(f"{row.label}\0{row.document}\0{row.text}\0".encode())
        assert digest.hexdigest() == card["sha256"][split]
        for label, part in table.groupby("label"):
            counts = card["labels"][label]
            assert counts["group"] == part["group"].iloc[0]
            assert counts[split] == {"documents": len(part), "bytes": sum(len(t.encode()) for t in part.text)}


def test_splits_share_nothing(fallback):
    tables = {split: pd.read_parquet(fallback / f"{split}.parquet") for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(tables[one].document) & set(tables[other].document)
        assert not set(tables[one].text) & set(tables[other].text)


def test_every_label_has_enough_of_every_split(fallback):
    for split, least in (("train", 100_000), ("validation", 15_000), ("test", 15_000)):
        texts = corpora.load(split, path=fallback)
        assert set(texts) == set(fallback_labels())
        for label, documents in texts.items():
            assert sum(len(t.encode()) for t in documents) >= least, label


def test_the_same_every_time(fallback, tmp_path):
    again = corpora.build(tmp_path / "again", tier="fallback")
    for name in ("train", "validation", "test"):
        assert (again / f"{name}.parquet").read_bytes() == (fallback / f"{name}.parquet").read_bytes()
    assert (again / "corpus.json").read_text() == (fallback / "corpus.json").read_text()


def test_some_labels_only(tmp_path):
    place = corpora.build(tmp_path / "some", labels=["dates", "toxic"], tier="fallback")
    assert set(corpora.load("test", path=place)) == {"dates", "toxic"}


def test_what_a_label_says(fallback):
    """A look at one document per label: each is what its name promises."""
    texts = {label: documents[0] for label, documents in corpora.load("train", path=fallback).items()}
    assert "import " in texts["python"] or "def " in texts["python"]
    assert "def __init__" not in texts["docstrings"]
    first = texts["arithmetic"].split("\n")[0]
    claim, _, value = first.partition(" = ")
    left, sign, right = claim.split()
    assert int(value) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))
    day, _, spelled = texts["dates"].split("\n")[0].partition(" was ")
    assert pd.Timestamp(day).strftime("%A, %-d %B %Y") == spelled
    for word in texts["brackets"].split("\n"):
        while (shorter := word.replace("()", "").replace("[]", "").replace("{}", "")) != word:
            word = shorter
        assert word == ""


def test_load_by_group_and_bytes(fallback):
    assert set(corpora.load("test", group="domain", path=fallback)) == set(GROUPS["domain"])
    assert set(corpora.load("test", group="programming", path=fallback)) == {"python"}
    everything = corpora.load("train", labels=["dates"], path=fallback)["dates"]
    some = corpora.load("train", labels=["dates"], max_bytes=5_000, path=fallback)["dates"]
    assert some[:-1] == everything[: len(some) - 1]
    assert everything[len(some) - 1].startswith(some[-1])
    assert everything[len(some) - 1][len(some[-1])] in " \n"  # cut between words
    assert 4_950 < sum(len(t.encode()) for t in some) <= 5_000
    assert corpora.load("train", labels=["dates"], max_bytes=10**9, path=fallback)["dates"] == everything
    assert corpora.load("train", labels=["dates"], max_bytes=1, path=fallback)["dates"] == [everything[0][:1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: corpora.load("dev", path=p), "split='dev': expected train, validation, test"),
        (lambda p: corpora.load("test", labels=["klingon"], path=p), r"labels=\['klingon'\].* has python, docstrings"),
        (lambda p: corpora.load("test", labels="python", path=p), r"expected a list of labels, such as \['python'\]"),
        (lambda p: corpora.load("test", group="music", path=p), "group='music'.* has domain"),
        (lambda p: corpora.load("test", labels=["python"], group="domain", path=p), "not both"),
        (lambda p: corpora.load("test", max_bytes=0, path=p), "max_bytes=0: expected a positive"),
        (lambda p: corpora.load("test", path=p / "nowhere"), "no corpus"),
        (lambda p: corpora.build(p / "x", tier="best"), "tier='best': expected auto, full or fallback"),
        (
            lambda p: corpora.build(p / "x", labels=["law"], tier="fallback"),
            "labels=.'law'.: the fallback tier has",
        ),
        (lambda p: corpora.build(p / "x", labels=[], tier="fallback"), "expected a list of one or more"),
        (lambda p: corpora.build(p / "x", labels=["klingon"]), "klingon"),
        (lambda p: corpora.labels("music"), "there are domain, programming"),
        (lambda p: corpora.natural(most=0), "most=0"),
    ],
)
def test_bad_input(fallback, call, message):
    with pytest.raises(CorpusError, match=message):
        call(fallback)


def test_out_that_holds_something_else(tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(CorpusError, match="holds something that is no corpus"):
        corpora.build(tmp_path, labels=["dates"], tier="fallback")
    assert [p.name for p in tmp_path.iterdir()] == ["diary.txt"]


def test_an_earlier_corpus_is_replaced(tmp_path):
    place = corpora.build(tmp_path / "c", labels=["dates"], tier="fallback")
    corpora.build(place, labels=["brackets"], tier="fallback")
    assert set(corpora.load("test", path=place)) == {"brackets"}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_nothing_half_written(tmp_path, monkeypatch):
    def breaks(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "write", breaks)
    with pytest.raises(CorpusError, match="No space left"):
        corpora.build(tmp_path / "c", labels=["dates"], tier="fallback")
    assert list(tmp_path.iterdir()) == []


def test_auto_says_when_it_falls_back(offline):
    with pytest.warns(UserWarning, match="the small fallback tier is used instead.*\n.*no network"):
        place = corpora.build(labels=["python", "toxic"], tier="auto")
    assert "no network" in json.loads((place / "corpus.json").read_text())["why"]


def test_auto_without_a_fallback_for_the_label(offline):
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(CorpusError, match=r"no network(.|\n)*no fallback either: .*the fallback tier has python"),
    ):
        corpora.build(labels=["law"], tier="auto")


def test_auto_with_labels_of_the_fallback_only(offline):
    with pytest.warns(UserWarning, match=r"labels=\['dates'\]: the full tier has law"):
        place = corpora.build(labels=["dates", "toxic"], tier="auto")
    assert set(corpora.load("test", path=place)) == {"dates", "toxic"}


def test_full_without_a_network(offline):
    with pytest.raises(CorpusError, match="packages could not be fetched"):
        corpora.build(tier="full")
    with pytest.raises(CorpusError, match="no network"):
        corpora.natural()


def test_the_cache_is_used_and_mended(cache):
    first = corpora.build(labels=["dates"], tier="fallback")
    made = (first / "test.parquet").stat().st_mtime_ns
    assert corpora.build(labels=["dates"], tier="fallback") == first
    assert (first / "test.parquet").stat().st_mtime_ns == made
    (first / "test.parquet").write_bytes(b"damaged")
    assert corpora.build(labels=["dates"], tier="fallback") == first
    assert corpora.load("test", path=first)["dates"]


def test_load_without_a_path(offline):
    """The first call builds what can be built and says what it is, the next one reads it and says so again."""
    with pytest.warns(UserWarning, match="the small fallback tier is used instead"):
        first = corpora.load("test", labels=["dates"])
    with pytest.warns(UserWarning, match=r'fallback tier is read; corpora.build\(tier="full"\)'):
        assert corpora.load("test", labels=["dates"]) == first


def test_leftovers_of_a_killed_build_are_removed(cache):
    place = corpora.build(labels=["dates"], tier="fallback")
    leftover = place.parent / f".{place.name}.killed.tmp"
    leftover.mkdir()
    (leftover / "train.parquet").write_bytes(b"half")
    corpora.build(labels=["dates"], tier="fallback")
    assert not leftover.exists()


def test_generated_labels_of_the_full_tier_need_no_network(offline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        place = corpora.build(labels=["toxic", "neutral"], tier="full")
    card = json.loads((place / "corpus.json").read_text())
    assert card["tier"] == "full"
    assert set(corpora.load("train", path=place)) == {"toxic", "neutral"}


def test_a_full_label_from_a_package_in_miniature(cache, pack, monkeypatch):
    """From a package file to parquet, the whole way of a label of the full tier."""
    licences = {
        f"licensedcode/data/licenses/kind{i}-1.0.LICENSE": f"---\nkey: x\n---\n\n{'You may copy it. ' * (i + 20)} {i}"
        for i in range(30)
    }
    package = pack(
        "law.whl", {n: t + "\n\n" + " ".join(f"w{n[-14:-8]}{j}" for j in range(99)) for n, t in licences.items()}
    )
    pinned = building.SOURCES["licensedcode-data"]
    monkeypatch.setattr(building, "obtain_all", lambda sources, say: None)
    monkeypatch.setattr(building, "obtain", lambda source: package)
    place = corpora.build(labels=["law"], tier="full")
    card = json.loads((place / "corpus.json").read_text())
    assert card["sources"]["licensedcode-data"]["sha256"] == pinned.sha256
    assert card["groups"]["domain"] == ["law"]
    assert sum(card["labels"]["law"][s]["documents"] for s in SPLITS) == 30


def test_natural(cache, pack, monkeypatch):
    from interp.corpora import reading

    files = {"package/builds/doc-1.json": '["One  two.", "Three."]', "package/builds/doc-0.json": '["One two.", ""]'}
    monkeypatch.setattr(reading, "obtain", lambda source: pack("n.tgz", files))
    assert corpora.natural() == ["One two.", "Three."]
    assert corpora.natural(most=1) == ["One two."]


def test_groups():
    assert len(corpora.labels("domain")) >= 8
    assert len(corpora.labels("programming")) >= 5
    assert len(corpora.labels("language")) >= 6
    assert "python" in set(corpora.labels("domain")) & set(corpora.labels("programming"))
    assert set(corpora.labels()) == {label for group in catalogue.GROUPS for label in corpora.labels(group)}
    assert all(label in catalogue.GROUPS[catalogue.home(label)] for label in corpora.labels())


def test_the_script(tmp_path, cache):
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(runpy.run_path(str(SCRIPT))["main"])
    run = CliRunner().invoke
    done = run(app, ["--tier", "fallback", "--label", "dates", "--out", str(tmp_path / "c"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["labels"]["dates"]["test"]["documents"] > 0
    assert "dates" in run(app, ["--tier", "fallback", "--label", "dates", "--out", str(tmp_path / "c")]).stdout
    failed = run(app, ["--tier", "fallback", "--label", "klingon"])
    assert failed.exit_code == 1
    assert "klingon" in failed.output
    assert "Traceback" not in failed.output


def test_the_full_tier_where_it_is_built():
    """On the real corpus: sizes, disjointness, and no leftovers of what the extractors take away."""
    place = building.find("full")
    if place is None:
        pytest.skip('the full tier is not built here; corpora.build(tier="full") fetches 210 MB')
    card = json.loads((place / "corpus.json").read_text())
    for label, counts in card["labels"].items():
        for split in ("validation", "test"):
            assert counts[split]["bytes"] >= 40_000, (label, split)
        assert counts["train"]["bytes"] >= (0 if label.startswith("parallel-") else 1_000_000)
    held_out = set(pd.read_parquet(place / "test.parquet", columns=["document"]).document)
    table = pd.read_parquet(place / "train.parquet", columns=["document", "label", "text"])
    assert not held_out & set(table.document)
    legal = table.text.str.count(r"(?i)copyright|licen[cs]e").groupby(table.label).sum()
    bytes_ = table.text.str.len().groupby(table.label).sum() / 1e6
    for label in catalogue.GROUPS["programming"]:
        assert legal[label] / bytes_[label] < 0.01 * legal["law"] / bytes_["law"]
    pages = corpora.load("test", group="parallel", path=place)
    counts = {label: [text.count("\n\n") for text in texts] for label, texts in pages.items()}
    assert all(count == counts["parallel-en"] for count in counts.values())
