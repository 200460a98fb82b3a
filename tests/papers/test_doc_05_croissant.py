"""DOC-05, Croissant (Akhtar et al. 2024): the metadata validates, the records read back, the hashes are the files'.

Offline: sockets are forbidden while the reference implementation (mlcroissant) works.
"""

from __future__ import annotations

import hashlib
import json
import socket

import numpy as np
import pytest
import torch

from interp import Model, store
from interp.zoo.tiny import tiny

mlc = pytest.importorskip("mlcroissant")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    model = Model(tiny("olmoe"), name="tiny-olmoe")
    lengths = [3, 9, 5, 12, 7, 4, 10, 8]
    texts = [torch.randint(0, 101, (n,)).tolist() for n in lengths]
    return store.write(
        model,
        texts,
        ["resid_post[0]", "z[1]", "expert_ids[1]", "expert_hidden[1]"],
        tmp_path_factory.mktemp("croissant"),
        labels=[f"l{i % 2}" for i in range(8)],
        context=8,
        documents_per_range=3,
        sources={"licence": "cc0-1.0"},
        progress=False,
    )


def load(path):
    """The dataset as mlcroissant sees it, with everything that it complains about."""
    dataset = mlc.Dataset(jsonld=str(path / "croissant.json"))
    return dataset, dataset.metadata.ctx.issues


def check_hashes(path):
    described = [f for f in json.loads((path / "croissant.json").read_text())["distribution"] if "sha256" in f]
    for entry in described:
        data = (path / entry["contentUrl"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert entry["contentSize"] == f"{len(data)} B"
    return {entry["contentUrl"] for entry in described}


def plain(value):
    return value.decode() if isinstance(value, bytes) else value


def test_a_dataset_validates_and_its_tokens_read_back_row_by_row(ds):
    dataset, issues = load(ds.path)
    assert not issues.errors
    records = list(dataset.records("rows"))
    expected = ds.tokens().to_pylist()
    assert len(ds.manifest["parts"]) > 2
    assert len(records) == len(expected) == len(ds)
    for got, want in zip(records, expected, strict=True):
        assert {key.removeprefix("rows/"): plain(value) for key, value in got.items()} == want
    assert dataset.metadata.license == ["cc0-1.0"]


def test_every_data_file_is_described_with_its_hash(ds):
    files = {
        f"{f}/{p.name}" for f in ("shards", "tokens") for p in (ds.path / f).iterdir() if ".statistics-" not in p.name
    }
    assert check_hashes(ds.path) == files | {"statistics.safetensors"}


def test_a_parquet_export_validates_and_its_activations_read_back_row_by_row(ds, tmp_path):
    out = ds.to_parquet(tmp_path / "parquet")
    dataset, issues = load(out)
    assert not issues.errors
    records = list(dataset.records("rows"))
    assert len(records) == len(ds)
    tokens = ds.tokens().to_pylist()
    sites = {site: ds[site][:].flatten(1).float().numpy() for site in ("resid_post[0]", "z[1]", "expert_ids[1]")}
    for i, got in enumerate(records):
        got = {key.removeprefix("rows/"): plain(value) for key, value in got.items()}
        for site, rows in sites.items():
            assert np.array_equal(np.asarray(got.pop(site), dtype=np.float32), rows[i]), (site, i)
        assert got == tokens[i]
    files = {str(p.relative_to(out)) for p in out.rglob("*.parquet")}
    assert check_hashes(out) == files
    assert any(f.startswith("experts/") for f in files)


def test_a_changed_file_no_longer_fits_its_metadata(ds, tmp_path):
    out = ds.to_parquet(tmp_path / "parquet", ["z[1]"])
    check_hashes(out)
    victim = next((out / "data").iterdir())
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(AssertionError):
        check_hashes(out)


def test_metadata_that_is_wrong_is_refused_by_the_validator(ds, tmp_path):
    """So that "validates" above says something."""
    data = json.loads((ds.path / "croissant.json").read_text())
    data["recordSet"][0]["field"][0]["source"]["fileSet"]["@id"] = "elsewhere"
    (tmp_path / "croissant.json").write_text(json.dumps(data))
    with pytest.raises(mlc.ValidationError):
        load(tmp_path)
