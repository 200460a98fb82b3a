"""Killed at any moment, shared by any number of workers: the dataset is the one that an unbroken run makes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from interp import store

SITES = ["resid_post[0]", "expert_hidden[1]"]
OPTIONS = {"context": 8, "batch_size": 3, "shard_tokens": 32, "documents_per_range": 4, "progress": False}


@pytest.fixture(autouse=True)
def _one_thread():
    """A forked child has none of its parent's threads, so torch must not count on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def files(path: Path) -> dict[str, bytes]:
    """Everything that counts: names and bytes of all data files."""
    folders = (path / name for name in ("shards", "tokens", "ranges"))
    return {str(p.relative_to(path)): p.read_bytes() for folder in folders for p in folder.iterdir()}


def spawn(work) -> int:
    """Run `work` in a forked process, which dies with it; gives the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def test_resume_after_kill_9_at_30_random_moments(fake, tmp_path):
    """Each time: some runs are killed somewhere, one is let through, and nothing differs from the unbroken run."""
    texts = fake.texts(48)
    labels = [f"label {i % 3}" for i in range(48)]
    whole = store.write(fake.FakeModel(), texts, SITES, tmp_path / "whole", labels=labels, **OPTIONS)
    expected = files(whole.path)
    begun = time.monotonic()
    store.write(fake.FakeModel(pause=0.002), texts, SITES, tmp_path / "timed", labels=labels, **OPTIONS)
    duration = time.monotonic() - begun

    rng = random.Random(0)
    midway = 0
    for trial in range(30):
        path = tmp_path / f"killed-{trial}"

        def work(path: Path = path) -> None:
            store.write(fake.FakeModel(pause=0.002), texts, SITES, path, labels=labels, **OPTIONS)

        pid = spawn(work)
        time.sleep(rng.uniform(0.0, 1.0) * duration)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done = len(list((path / "ranges").glob("*.json"))) if path.exists() else 0
        midway += 0 < done < 12
        model = fake.FakeModel()
        ds = store.write(model, texts, SITES, path, labels=labels, **OPTIONS)
        assert ds.complete
        assert files(path) == expected, f"trial {trial}, killed after {done} of 12 ranges"
        assert ds.content_sha256 == whole.content_sha256
        assert not (path / ".tmp").exists()
        assert store.verify(path).empty
    assert midway >= 5, "the kills must fall into the work, or the test shows nothing"


def test_resume_does_only_what_is_missing(write, fake):
    texts = fake.texts(40)
    first, again = fake.FakeModel(), fake.FakeModel()
    ds = write(texts, model=first, documents_per_range=10)
    record = sorted((ds.path / "ranges").iterdir())[2]
    record.unlink()
    (ds.path / "manifest.json").unlink()
    resumed = write(texts, model=again, documents_per_range=10)
    assert 0 < again.calls < first.calls / 2
    assert resumed.content_sha256 == ds.content_sha256
    finished = fake.FakeModel()
    write(texts, model=finished, documents_per_range=10)
    assert finished.calls == 0


def test_an_interrupted_write_keeps_its_ranges_and_leaves_no_scraps(write, fake, tmp_path):
    def stream():
        yield from fake.texts(25)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(stream(), documents_per_range=10)
    path = tmp_path / "ds"
    assert len(list((path / "ranges").iterdir())) == 2
    assert not (path / ".tmp").exists()
    with pytest.raises(store.NotADataset, match="unfinished"):
        store.open(path)
    part = store.open(path, partial=True)
    assert not part.complete
    assert part.frame().document.max() == 19
    assert len(part["resid_post[1]"][:]) == len(part)
    ds = write(iter(fake.texts(40)), documents_per_range=10)
    assert ds.content_sha256 == write(dir="other", documents_per_range=10).content_sha256


def test_two_processes_share_one_dataset(fake, tmp_path):
    texts = fake.texts(60)
    whole = store.write(fake.FakeModel(), texts, SITES, tmp_path / "whole", **OPTIONS)

    def work(worker: int) -> None:
        model = fake.FakeModel(pause=0.005)
        store.write(model, texts, SITES, tmp_path / "shared", worker=worker, n_workers=2, **OPTIONS)

    pids = [spawn(lambda w=w: work(w)) for w in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0, 0]
    ds = store.open(tmp_path / "shared")
    assert ds.content_sha256 == whole.content_sha256
    assert files(ds.path) == files(whole.path)


def test_one_worker_alone_leaves_the_dataset_open_until_the_rest_is_done(write, fake):
    texts = fake.texts(40)
    first = write(texts, worker=0, n_workers=2, documents_per_range=5)
    assert not first.complete
    assert set(first.frame().document) == {i for i in range(40) if (i // 5) % 2 == 0}
    last = write(texts, documents_per_range=5)  # alone: takes over what the missing worker would have done
    assert last.complete
    assert last.content_sha256 == write(texts, dir="other", documents_per_range=5).content_sha256


def test_a_range_that_two_workers_did_is_kept_once(write, fake):
    """Two divisions of the work can meet in one range; who commits second gives way, whatever its numbers."""
    texts = fake.texts(12)

    class Late(fake.FakeModel):
        def capture(self, x, sites, **options):
            if not self.calls:
                write(texts, worker=1, n_workers=3, documents_per_range=4)  # range 1, while this one is at it
            acts = super().capture(x, sites, **options)
            for tensor in acts.tensors.values():
                tensor += 1
            return acts

    ds = write(texts, model=Late(), worker=1, n_workers=2, documents_per_range=4)
    assert not ds.complete
    whole = write(texts, dir="whole", documents_per_range=4)
    assert write(texts, documents_per_range=4).content_sha256 == whole.content_sha256
    assert store.verify(ds.path).empty


def in_background(fake, tmp_path, **options) -> int:
    """A writer that is certainly at work when this returns."""
    flag = tmp_path / "at-work"

    def texts():
        for i, text in enumerate(fake.texts(1000)):
            if i == 10:
                flag.touch()
                time.sleep(60)
            yield text

    pid = spawn(lambda: store.write(fake.FakeModel(), texts(), SITES, tmp_path / "ds", **OPTIONS, **options))
    while not flag.exists():
        time.sleep(0.01)
    return pid


def test_a_second_writer_is_refused_and_the_lock_dies_with_its_process(fake, tmp_path):
    pid = in_background(fake, tmp_path)
    try:
        for options in ({}, {"worker": 1, "n_workers": 2}):
            with pytest.raises(store.Locked, match=rf"process {pid} on "):
                store.write(fake.FakeModel(), fake.texts(1000), SITES, tmp_path / "ds", **OPTIONS, **options)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert store.write(fake.FakeModel(), fake.texts(30), SITES, tmp_path / "ds", **OPTIONS).complete


def test_the_same_share_is_refused_twice_and_another_share_is_not(fake, tmp_path):
    pid = in_background(fake, tmp_path, worker=0, n_workers=2)
    try:
        for options in ({}, {"worker": 0, "n_workers": 2}):
            with pytest.raises(store.Locked):
                store.write(fake.FakeModel(), iter(fake.texts(30)), SITES, tmp_path / "ds", **OPTIONS, **options)
        share = {"worker": 1, "n_workers": 2}
        other = store.write(fake.FakeModel(), iter(fake.texts(30)), SITES, tmp_path / "ds", **share, **OPTIONS)
        assert not other.complete
        assert (tmp_path / "ds" / ".tmp" / "0-of-2").is_dir(), "the scraps of a living worker are its own"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(("change", "named"), [
    ({"sites": ["resid_post[2]"]}, r"sites: the dataset has resid_post\[1\], asked for is resid_post\[2\]"),
    ({"dtype": "float32"}, "dtype: the dataset has bfloat16, asked for is float32"),
    ({"context": 16}, "context: the dataset has 8, asked for is 16"),
    ({"batch_size": 4}, "batch_size: the dataset has 3"),
    ({"shard_tokens": 32}, "shard_tokens: the dataset has 64"),
    ({"seed": 1}, "seed: the dataset has 0"),
    ({"texts": 39}, "number of documents: the dataset has 40, asked for is 39"),
])
def test_resuming_with_other_settings_is_refused_and_named(write, fake, change, named):
    ds = write()
    before = files(ds.path)
    if "texts" in change:
        change = {"texts": fake.texts(change["texts"])}
    with pytest.raises(store.Mismatch, match=named):
        write(**change)
    assert files(ds.path) == before


def test_resuming_with_another_model_tokenizer_or_text_is_refused(write, fake):
    ds = write(documents_per_range=10)
    before = files(ds.path)
    for model, named in ((fake.FakeModel(seed=1), "model"), (fake.FakeModel(salt="x"), "tokenizer"),
                         (fake.FakeModel(dtype=torch.float64), "dtype of the model")):
        with pytest.raises(store.Mismatch, match=named):
            write(model=model, documents_per_range=10)
    changed = fake.texts(40)
    changed[17] += " more"
    with pytest.raises(store.Mismatch, match="documents 10 to 19"):
        write(changed, documents_per_range=10)
    with pytest.raises(store.Mismatch, match="documents 0 to 9 of texts, or their labels"):
        write(labels=["a"] * 40, documents_per_range=10)
    with pytest.raises(store.Mismatch, match="fewer documents than texts"):
        write(iter(fake.texts(50)), documents_per_range=10)
    with pytest.raises(store.Mismatch, match="more documents than texts"):
        write(iter(fake.texts(30)), documents_per_range=10)
    assert files(ds.path) == before


def test_finishing_twice_changes_nothing(write, fake):
    ds = write()
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in ds.path.iterdir() if p.is_file()}
    write()
    write(worker=0, n_workers=2)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in ds.path.iterdir() if p.is_file()}
    del before[".lock"], after[".lock"], after[".lock.0-of-2"]
    assert before == after


def test_files_of_a_crash_between_rename_and_record_are_removed(write):
    ds = write()
    (ds.path / "manifest.json").unlink()
    stray = ds.path / "shards" / f"00000000.0000.resid_post.1-{'0' * 64}.safetensors"
    stray.write_bytes(b"orphan")
    note = ds.path / "shards" / "note.txt"
    note.write_text("of somebody else")
    again = write()
    assert not stray.exists()
    assert note.exists()
    assert again.content_sha256 == ds.content_sha256
