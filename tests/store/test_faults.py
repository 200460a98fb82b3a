"""Bad input, damaged files, disks that refuse: each says what is wrong, and nothing half-written stays."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from interp import store
from interp.cards import CardError
from interp.sites import SiteError
from interp.store import disk


@pytest.mark.parametrize("texts", [[], iter([])])
def test_no_texts(write, texts, tmp_path):
    with pytest.raises(store.StoreError, match="texts is empty"):
        write(texts)


@pytest.mark.parametrize("nothing", ["", "  \n", []])
def test_an_empty_text_is_named_or_left_out(write, nothing):
    texts = ["one two", "three", nothing, "four"]
    with pytest.raises(store.StoreError, match=r"texts\[2\] is empty.*empty='skip'"):
        write(texts)
    ds = write(texts, dir="skipped", empty="skip")
    assert sorted(set(ds.frame().document)) == [0, 1, 3]
    with pytest.raises(store.StoreError, match="every document is empty"):
        write([nothing], dir="all", empty="skip")


@pytest.mark.parametrize(("texts", "labels", "named"), [
    (["a", "b"], ["x"], "1 labels for 2 texts"),
    (iter(["a", "b"]), iter(["x"]), "labels: they end after 1"),
    (iter(["a"]), iter(["x", "y"]), "more than 1 labels for 1 texts"),
    (["a", "b"], ["x", 3], r"labels\[0\]='x' is str and labels\[1\]=3 is int"),
    (["a"], [{"x": 1}], r"labels\[0\]=\{'x': 1\}: a label is a text"),
    (["a"], "topic", "labels='topic' names a column"),
    ([{"text": "a"}], "topic", "labels='topic': the dataset has the columns text"),
    ([{"words": "a"}], None, "text_column='text': the dataset has the columns words"),
    ([3.5], None, r"texts\[0\] is float"),
    (7, None, "texts=7"),
    ({"law": ["a"], "code": ["b"]}, None, "texts has the parts law, code; give one of them"),
])
def test_labels_and_texts_that_do_not_fit(write, texts, labels, named):
    with pytest.raises(store.StoreError, match=named):
        write(texts, labels=labels)


def test_labels_whose_type_changes_from_range_to_range(write):
    with pytest.raises(store.StoreError, match="of different types"):
        write(["a", "b"], labels=["x", 1], documents_per_range=1)


@pytest.mark.parametrize(("options", "named"), [
    ({"dtype": "int8"}, "dtype='int8'"), ({"context": 0}, "context=0"), ({"context": 1000}, "takes at most 64 tokens"),
    ({"batch_size": -1}, "batch_size=-1"), ({"shard_tokens": 1.5}, "shard_tokens=1.5"), ({"empty": "no"}, "empty='no'"),
    ({"worker": 2, "n_workers": 2}, "worker=2, n_workers=2"), ({"sites": []}, "no site was asked for"),
    ({"context": 1}, "nothing is left"),
])
def test_settings_that_make_no_sense(write, options, named, tmp_path):
    with pytest.raises(store.StoreError, match=named):
        write(**options)
    assert not (tmp_path / "ds" / "manifest.json").exists()


@pytest.mark.parametrize(("site", "named"), [
    ("expert_out[1]", r"store expert_hidden\[1\] and read ds\.expert\(1, e\)\.out\(model\)"),
    ("pattern[0]", "as wide as its text is long"),
    ("expert_hidden[1, expert=2]", r"read ds\.expert\(1, 2\)"),
    ("expert_weight[1, expert=2]", "stored whole"),
])
def test_sites_that_cannot_be_stored(write, site, named, tmp_path):
    with pytest.raises(store.StoreError, match=named):
        write(sites=[site])
    assert not (tmp_path / "ds").exists()


def test_an_unknown_site_or_layer_is_refused_before_anything_is_made(write, tmp_path):
    for site in ("nonsense[0]", "resid_post[9]"):
        with pytest.raises(SiteError):
            write(sites=[site])
    assert not (tmp_path / "ds").exists()


def test_a_model_without_tokenizer_takes_ids_only(write, fake):
    model = fake.FakeModel()
    model.tokenizer = None
    with pytest.raises(store.StoreError, match="no tokenizer"):
        write(["text"], model=model)
    assert write([[5, 6, 7]], model=model).frame().token_id.tolist() == [5, 6, 7]


def test_an_unknown_field_of_the_card_is_refused_at_the_start(write, tmp_path):
    with pytest.raises(CardError, match="no 'source'"):
        write(sources={"source": "somewhere"})
    assert not (tmp_path / "ds").exists()


def test_nan_is_warned_about_with_its_site_and_counted(write, fake):
    texts = fake.texts(40)
    word = fake.FakeTokenizer()([texts[17].split()[2]])["input_ids"][0][1]
    with pytest.warns(UserWarning, match=r": NaN or infinity .* first in document 17\.") as seen:
        ds = write(texts, ["resid_post[0]", "expert_hidden[1]"], model=fake.FakeModel(poison=word))
    assert len([w for w in seen if "resid_post[0]" in str(w.message)]) == 1
    assert any(str(w.message).startswith("expert_hidden[1]: NaN") and "document 17." in str(w.message) for w in seen)
    rows = ds["resid_post[0]"][:]
    bad = ~torch.isfinite(rows).all(1)
    assert int(bad.sum()) == ds.manifest["sites"]["resid_post[0]"]["nonfinite_rows"] == 1
    statistics = ds.statistics("resid_post[0]")
    assert statistics.nonfinite == 1
    assert statistics.count == len(ds) - 1
    torch.testing.assert_close(statistics.mean, rows[~bad].double().mean(0), rtol=1e-6, atol=1e-7)
    assert "NaN" in (ds.path / "README.md").read_text()


def test_what_float16_cannot_hold_is_warned_about(write, fake):
    with pytest.warns(UserWarning, match="float16 ends at 65504, bfloat16 does not"):
        ds = write(model=fake.FakeModel(scale=1e6), dtype="float16")
    assert ds.manifest["sites"]["resid_post[1]"]["nonfinite_rows"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(dir="wide", model=fake.FakeModel(scale=1e6), dtype="bfloat16")


# -- directories -----------------------------------------------------------------------------------------------------
def test_a_directory_that_is_no_dataset(write, tmp_path):
    other = tmp_path / "other"
    for call in (store.open, store.verify, store.repair):
        with pytest.raises(store.NotADataset, match="no such directory"):
            call(other)
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for call in (store.open, store.verify, store.repair):
        with pytest.raises(store.NotADataset, match=r"no plan\.json"):
            call(other)
    with pytest.raises(store.NotADataset, match=r"holds other files \(thesis\.tex"):
        write(dir="other")
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    (tmp_path / "third" / "tokens").mkdir(parents=True)
    (tmp_path / "third" / "tokens" / "mine.txt").write_text("x")
    with pytest.raises(store.NotADataset, match=r"holds other files \(tokens"):
        write(dir="third")
    for content, named in (("{", "not readable"), ('{"format": "x"}', "is of 'x'"), ("[]", "not readable"),
                           ('{"format": "interp-activations", "format_version": 99}', "newer than this interp")):
        (other / "plan.json").write_text(content)
        with pytest.raises(store.NotADataset, match=named):
            store.open(other)


def test_a_file_in_the_way(write, tmp_path):
    (tmp_path / "ds").write_text("x")
    with pytest.raises(store.DiskError, match="there is a file of this name"):
        write()


def failing(monkeypatch, code: int, after: int):
    """The disk refuses to take more than `after` bytes from now on; as the system says it."""
    real, left = os.write, [after]

    def write(fd: int, data) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(fd, data)

    monkeypatch.setattr(disk.os, "write", write)


def test_an_error_of_the_texts_is_not_taken_for_one_of_the_disk(write):
    def texts():
        yield "one"
        raise PermissionError(errno.EACCES, "the corpus is locked")

    with pytest.raises(PermissionError, match="the corpus is locked") as seen:
        write(texts())
    assert not isinstance(seen.value, store.DiskError)


@pytest.mark.parametrize("after", [0, 500, 3000, 9000, 20_000])
def test_a_full_disk_leaves_finished_ranges_and_nothing_half_written(write, tmp_path, monkeypatch, after):
    options = {"sites": ["resid_post[0]", "expert_hidden[1]"], "documents_per_range": 5}
    whole = write(dir="whole", **options)
    with monkeypatch.context() as patch:
        failing(patch, errno.ENOSPC, after)
        with pytest.raises(store.DiskError, match="the disk is full: free some space and run the same command") as seen:
            write(**options)
        assert seen.value.errno == errno.ENOSPC
    path = tmp_path / "ds"
    assert not (path / ".tmp").exists()
    assert not (path / "manifest.json").exists()
    whole_files = {p.name for f in ("shards", "tokens", "ranges") for p in (whole.path / f).iterdir()}
    assert {p.name for f in ("shards", "tokens", "ranges") for p in (path / f).iterdir()} <= whole_files
    assert write(**options).content_sha256 == whole.content_sha256, "goes on when there is space again"


def test_a_disk_that_fills_up_for_real(write, tmp_path):
    """The kernel itself refuses, by a limit on the size of a file."""
    import resource

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
            write(dtype="float32", shard_tokens=1000, documents_per_range=40)
        except store.DiskError as error:
            code = 0 if error.errno == errno.EFBIG and "lower shard_tokens" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    path = tmp_path / "ds"
    assert not (path / ".tmp").exists()
    assert not any((path / "shards").iterdir())
    assert write(dtype="float32", shard_tokens=1000, documents_per_range=40).complete


@pytest.mark.parametrize(("code", "named"), [(errno.EROFS, "read-only"), (errno.EACCES, "may not write here")])
def test_a_read_only_directory(write, monkeypatch, tmp_path, code, named):
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT and str(tmp_path) in str(path):
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(disk.os, "open", refuse)
    with pytest.raises(store.DiskError, match=named) as seen:
        write()
    assert seen.value.errno == code
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_permission(write, tmp_path):
    (tmp_path / "ds").mkdir(mode=0o500)
    with pytest.raises(store.DiskError, match="may not write here"):
        write()


def test_a_place_where_nobody_can_write(write):
    with pytest.raises(store.DiskError):
        write(dir="/sys/interp-activations")


# -- damage ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def ds(write):
    return write(sites=["resid_post[0]", "expert_hidden[1]"], documents_per_range=10)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {"changed": flip, "truncated": cut, "missing": Path.unlink,
          "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0")}
KINDS = ["resid_post", "expert_hidden", "statistics", "tokens"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", DAMAGE)
def test_verify_finds_and_repair_lets_the_writer_mend(ds, write, kind, fault):
    folder = "tokens" if kind == "tokens" else "shards"
    victim = sorted(p for p in (ds.path / folder).glob("00000001.*") if kind in p.name or kind == "tokens")[0]
    assert store.verify(ds.path).empty
    DAMAGE[fault](victim)
    faults = store.verify(ds.path)
    assert faults[["file", "range", "fault"]].values.tolist() == [[f"{folder}/{victim.name}", 1, fault]]
    with pytest.raises(store.Corrupt, match=f"1 faults: {folder}/{victim.name}: {fault}".replace("[", r"\[")):
        store.verify(ds.path, strict=True)

    assert len(store.repair(ds.path)) == 1
    assert not store.open(ds.path, partial=True).complete
    mended = write(sites=["resid_post[0]", "expert_hidden[1]"], documents_per_range=10)
    assert mended.content_sha256 == ds.content_sha256
    assert store.verify(ds.path).empty
    assert store.repair(ds.path).empty


@pytest.mark.parametrize("fault", ["truncated", "missing", "too long"])
def test_reading_a_damaged_shard_says_so(ds, fault):
    for victim in [p for s in ("resid_post", "hidden") for p in (ds.path / "shards").glob(f"00000001.*{s}*")]:
        DAMAGE[fault](victim)
    opened = store.open(ds.path)
    for read in (lambda: opened["resid_post[0]"][:], lambda: list(opened.batches("resid_post[0]", 64)),
                 lambda: opened.expert(1, 0)):
        with pytest.raises(store.Corrupt, match=r"00000001\..*store\.verify\(dir\) lists all damage"):
            read()


def test_reading_damaged_tokens_or_header_says_so(ds):
    cut(next((ds.path / "tokens").glob("00000002.*")))
    with pytest.raises(store.Corrupt, match="missing or damaged"):
        ds.frame()
    shard = next((ds.path / "shards").glob("00000000.0000.resid_post*"))
    data = shard.read_bytes()
    for damaged in (b"", data[:5], b"\xff" * 8 + data[8:], data[:8] + b"x" + data[9:]):
        shard.write_bytes(damaged)
        with pytest.raises(store.Corrupt):
            store.open(ds.path)["resid_post[0]"][0]


@pytest.mark.parametrize("damage", ["record gone", "record garbled", "record edited", "manifest garbled",
                                    "manifest edited", "statistics flipped"])
def test_verify_finds_damage_in_the_descriptions(ds, write, damage):
    record = ds.path / "ranges" / "00000001.json"
    manifest = ds.path / "manifest.json"
    what, _, how = damage.partition(" ")
    if how == "gone":
        record.unlink()
    elif how == "garbled":
        cut_in = record if what == "record" else manifest
        cut_in.write_bytes(cut_in.read_bytes()[:-20])
    elif how == "flipped":
        flip(ds.path / "statistics.safetensors")
    elif what == "record":
        data = json.loads(record.read_text())
        data["text_sha256"] = "0" * 64
        record.write_text(json.dumps(data))
    else:
        data = json.loads(manifest.read_text())
        data["parts"][0]["rows"] += 1
        manifest.write_text(json.dumps(data))
    faults = store.verify(ds.path)
    assert len(faults) == 1
    assert faults.fault[0].split()[0] in ("missing", "unreadable", "changed")
    store.repair(ds.path)
    options = {"sites": ["resid_post[0]", "expert_hidden[1]"], "documents_per_range": 10}
    if damage == "record edited":  # indistinguishable from other texts, and refused as such
        with pytest.raises(store.Mismatch):
            write(**options)
        return
    assert write(**options).content_sha256 == ds.content_sha256
    assert store.verify(ds.path).empty


def test_a_garbled_manifest_is_no_traceback_of_json(ds):
    (ds.path / "manifest.json").write_text("{")
    with pytest.raises(store.Corrupt, match=r"manifest\.json: damaged"):
        store.open(ds.path)
