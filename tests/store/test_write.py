"""What is written is what the model had: row by row, site by site."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from interp.sites import Site

SITES = ["resid_post[*]", "z[1]", "z[1, head=1]", "expert_ids[2]", "embed", "ln1_scale[0]"]


def expected(fake, ds, site, dtype=torch.bfloat16):
    """The rows of a site, computed from the token table alone."""
    frame = ds.frame()
    ids, position = torch.tensor(frame.token_id.to_numpy()), torch.tensor(frame.position.to_numpy())
    value = fake.FakeModel().value(Site.parse(site), ids[None].long(), position[None].long())[0]
    return value.to(dtype) if value.is_floating_point() else value.int()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_row_is_what_the_model_had(write, fake, dtype):
    ds = write(sites=SITES, dtype=dtype)
    for site in ds.sites:
        assert torch.equal(ds[site][:], expected(fake, ds, site, getattr(torch, dtype))), site
    assert ds.sites == ["resid_post[0]", "resid_post[1]", "resid_post[2]", *SITES[1:]]


def test_tokens_are_those_of_the_texts(write, fake):
    texts = fake.texts(40)
    ds = write(texts, labels=[f"label {i % 3}" for i in range(40)])
    frame = ds.frame()
    assert len(frame) == len(ds) == ds.manifest["rows"]
    for i, text in enumerate(texts):
        rows = frame[(frame.document == i) & ~frame.special]
        assert [text[a:b] for a, b in zip(rows.char_start, rows.char_end, strict=True)] == text.split()
        assert set(rows.label) == {f"label {i % 3}"}
    starts = frame[frame.position == 0]
    assert starts.special.all(), "every window starts as the tokenizer starts a text"
    assert (frame.groupby(["document", "window"]).size() <= 8).all()


def test_a_long_text_becomes_windows_that_start_like_texts(write):
    ds = write(["one " * 20], context=8)
    frame = ds.frame()
    assert frame.groupby("window").size().tolist() == [8, 8, 7]
    assert frame[frame.special].position.tolist() == [0, 0, 0]
    words = frame[~frame.special]
    assert words.char_start.tolist() == [4 * i for i in range(20)], "no word is lost or doubled at a cut"


@pytest.mark.parametrize("kind", ["list", "generator", "dataset", "stream", "ids", "tensor", "tokens", "numpy"])
def test_every_kind_of_input_gives_the_same_dataset(write, fake, kind):
    import datasets

    from interp.activations import Tokens

    texts = [" ".join(f"w{i}x{j}" for j in range(5)) for i in range(30)]
    ids = [row[1:] for row in fake.FakeTokenizer()(texts)["input_ids"]]
    hf = datasets.Dataset.from_dict({"body": texts})
    forms = {
        "list": texts, "generator": (t for t in texts), "dataset": hf, "stream": hf.to_iterable_dataset(),
        "numpy": np.array(texts), "ids": ids, "tensor": torch.tensor(ids),
        "tokens": Tokens(torch.tensor([[*row, 0] for row in ids]), torch.tensor([[True] * 5 + [False]] * 30)),
    }
    ds = write(forms[kind], dir=kind, text_column="body")
    got = ds.frame()[["document", "window", "token_id"]]
    as_text = kind not in ("ids", "tensor", "tokens")
    assert got[got.token_id != 1].token_id.tolist() == [i for row in ids for i in row]
    assert bool((got.token_id == 1).any()) == as_text, "ids are taken as they are, without a BOS"
    reference = write(texts if as_text else ids, dir="reference")
    assert ds.content_sha256 == reference.content_sha256


def test_labels_from_a_column(write, fake):
    import datasets

    data = datasets.Dataset.from_dict({"text": fake.texts(10), "topic": list(range(10))})
    ds = write(data, labels="topic")
    frame = ds.frame()
    assert (frame.label == frame.document).all()
    assert ds.manifest["label_type"] == "int"


@pytest.mark.parametrize("labels", [[0.5, None] * 5, [True, False] * 5, ["a"] * 10, [None] * 10])
def test_labels_of_every_type_come_back(write, fake, labels):
    ds = write(fake.texts(10), labels=labels, documents_per_range=2)
    got = ds.tokens(["document", "label"]).to_pylist()
    assert [labels[r["document"]] for r in got] == [r["label"] for r in got]


def test_the_reference_reader_opens_the_shards(write):
    ds = write(sites=["resid_post[0]", "expert_hidden[1]"])
    for part in ds.manifest["parts"]:
        for site, entry in part["sites"].items():
            tensors = load_file(ds.path / entry["file"])
            assert set(tensors) == ({"rows"} if site == "resid_post[0]" else
                                    {"offsets", "token_row", "weight", "hidden", "slot"})
    joined = torch.cat([load_file(ds.path / p["sites"]["resid_post[0]"]["file"])["rows"] for p in ds.manifest["parts"]])
    assert torch.equal(joined, ds["resid_post[0]"][:])


def test_shards_are_named_by_content_and_bounded(write):
    from interp.store.disk import file_sha256

    ds = write(["one " * 500, *["two three"] * 9], shard_tokens=64)
    assert len(ds.manifest["parts"]) > 8
    for part in ds.manifest["parts"]:
        assert part["rows"] <= 64
        for entry in part["sites"].values():
            path = ds.path / entry["file"]
            assert file_sha256(path) == entry["sha256"]
            assert entry["sha256"] in path.name
            assert path.stat().st_size == entry["bytes"]
    assert len({p["sites"]["resid_post[1]"]["file"] for p in ds.manifest["parts"]}) == len(ds.manifest["parts"])


def test_the_manifest_tells_what_is_there(write, fake):
    ds = write(sites=["resid_post[1]", "z[0]", "expert_hidden[1]"], seed=7)
    manifest = json.loads((ds.path / "manifest.json").read_text())
    assert manifest["format"] == "interp-activations"
    assert manifest["model"] == fake.FakeModel().fingerprint
    assert len(manifest["tokenizer"]) == len(manifest["text_sha256"]) == len(manifest["content_sha256"]) == 64
    assert (manifest["dtype"], manifest["context"], manifest["seed"], manifest["documents"]) == ("bfloat16", 8, 7, 40)
    assert manifest["sites"]["resid_post[1]"] | {"rms": 0, "mean_norm": 0} == {
        "transformer_lens": "blocks.1.hook_resid_post", "axes": ["row", "d_model"], "shape": [6], "dtype": "bfloat16",
        "layout": "rows", "rows": len(ds), "nonfinite_rows": 0, "rms": 0, "mean_norm": 0}
    assert manifest["sites"]["z[0]"]["axes"] == ["row", "head", "d_head"]
    assert manifest["sites"]["expert_hidden[1]"] | {"rms": 0, "mean_norm": 0} == {
        "transformer_lens": None, "axes": ["row", "neuron"], "shape": [4], "dtype": "bfloat16", "layout": "experts",
        "rows": 2 * len(ds), "nonfinite_rows": 0, "experts": 5, "rms": 0, "mean_norm": 0}
    assert "padding" in manifest["masks"]


def test_statistics_are_those_of_the_stored_rows(write):
    ds = write(sites=["resid_post[0]", "z[2]", "expert_hidden[1]"])
    for site in ("resid_post[0]", "z[2]"):
        rows, got = ds[site][:].double(), ds.statistics(site)
        assert got.count == len(ds)
        assert got.mean.dtype == torch.float64
        torch.testing.assert_close(got.mean, rows.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.second_moment, rows.square().mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.std, rows.std(0, correction=0), rtol=1e-5, atol=1e-6)
        assert got.rms == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-6)
    everything = torch.cat([ds.expert(1, e).hidden for e in range(5)]).double()
    torch.testing.assert_close(ds.statistics("expert_hidden[1]").mean, everything.mean(0), rtol=1e-6, atol=1e-7)


def test_statistics_of_many_rows_keep_their_digits():
    from interp.store.moments import Moments

    rows = torch.randn(50_000, 3) * torch.tensor([1e-3, 1.0, 1e3]) + torch.tensor([1.0, 0.0, 1e3])
    whole, merged = Moments(), Moments()
    whole.add(rows)
    for piece in rows.split(7001):
        part = Moments()
        part.add(piece)
        merged.merge(part)
    exact = rows.double().sum(0)
    torch.testing.assert_close(whole.total, exact, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(merged.total, exact, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(merged.squares, rows.double().square().sum(0), rtol=1e-6, atol=0)
    assert merged.count == 50_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 3, 576, 40_000])
def test_sums_are_those_of_float64_in_every_type(dtype, width):
    """Also where a block is cut, and where the buffer of one call is larger than the next call's rows."""
    from interp.store.moments import Moments

    for rows in (700 if width < 1000 else 9, 5):
        x = (torch.randn(rows, width) * 3 + 1).to(dtype)
        got = Moments()
        got.add(x)
        torch.testing.assert_close(got.total, x.double().sum(0), rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(got.squares, x.double().square().sum(0), rtol=1e-6, atol=0)


def test_squares_that_float32_cannot_hold_are_kept_apart_from_infinity():
    from interp.store.moments import Moments

    rows = torch.tensor([[1e30, 1.0], [float("inf"), 1.0], [2e30, 3.0], [float("nan"), 1.0]]).bfloat16()
    got = Moments()
    got.add(rows)
    kept = rows[[0, 2]].double()
    assert (got.count, got.nonfinite, got.first_nonfinite) == (2, 2, 1)
    torch.testing.assert_close(got.squares, kept.square().sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(got.total, kept.sum(0), rtol=1e-9, atol=0)


def test_expert_tables_of_uneven_batches_are_sorted_by_expert(write, fake):
    """Batches of 1 to 9 tokens, whose runs are cut by the blocks in which they are written."""
    ds = write([" ".join(f"w{i}x{j}" for j in range(i % 9)) + " end" for i in range(60)], sites=["expert_hidden[1]"],
               batch_size=1, shard_tokens=4096, dtype="float32")
    frame = ds.frame()
    ids, position = torch.tensor(frame.token_id.to_numpy()), torch.tensor(frame.position.to_numpy())
    model, site = fake.FakeModel(), Site.parse("expert_hidden[1]")
    hidden = model.value(site, ids[None].long(), position[None].long())[0]
    chosen = model.value(Site("expert_ids", 1), ids[None].long(), position[None].long())[0]
    for expert in range(fake.N_EXPERTS):
        row, slot = (chosen == expert).nonzero(as_tuple=True)
        got = ds.expert(1, expert)
        assert torch.equal(got.token_row.long(), row)
        assert torch.equal(got.hidden, hidden[row, slot])


def test_text_is_the_only_thing_that_matters_not_how_it_came(write, fake):
    """Batches follow from the range, so the number of workers and the moment of writing change nothing."""
    texts = fake.texts(40)
    a = write(texts, dir="a")
    for worker in (1, 0, 2):
        b = write(iter(texts), dir="b", worker=worker, n_workers=3)
    assert b.complete
    assert a.content_sha256 == b.content_sha256
    names = [sorted(p.name for p in (ds.path / "shards").iterdir()) for ds in (a, b)]
    assert names[0] == names[1]


def test_nothing_but_the_dataset_is_left(write):
    ds = write(sites=["resid_post[0]", "expert_hidden[1]"])
    assert sorted(p.name for p in ds.path.iterdir() if p.name != ".lock") == [
        "README.md", "croissant.json", "manifest.json", "plan.json", "ranges", "shards", "statistics.safetensors",
        "tokens"]
    known = {e["file"] for p in ds.manifest["parts"] for e in (p["tokens"], p["statistics"], *p["sites"].values())}
    assert known == {f"{f}/{p.name}" for f in ("shards", "tokens") for p in (ds.path / f).iterdir()}
