"""What leaves the dataset is what is in it, and other people's readers agree."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from interp import store
from interp.store import disk


@pytest.fixture(scope="module")
def ds(fake, tmp_path_factory):
    sites = ["resid_post[0]", "z[1]", "expert_ids[1]", "expert_hidden[1]"]
    return store.write(fake.FakeModel(), fake.texts(40), sites, tmp_path_factory.mktemp("export"), progress=False,
                       labels=[f"l{i % 3}" for i in range(40)], context=8, batch_size=3, documents_per_range=15)


def test_parquet_has_every_row_and_every_expert(ds, tmp_path):
    import pyarrow.dataset as pad

    out = ds.to_parquet(tmp_path / "parquet")
    table = pad.dataset(sorted((out / "data").glob("*.parquet"))).to_table().to_pandas()
    tokens = ds.frame()
    for column in ("document", "window", "position", "token_id", "char_start", "char_end", "special", "label"):
        assert table[column].tolist() == tokens[column].tolist(), column
    for site in ("resid_post[0]", "z[1]", "expert_ids[1]"):
        assert np.array_equal(np.stack(table[site]), ds[site][:].flatten(1).float().numpy()), site
    experts = pad.dataset(sorted((out / "experts" / "expert_hidden.1").glob("*.parquet"))).to_table().to_pandas()
    for expert in range(5):
        rows, got = experts[experts.expert == expert], ds.expert(1, expert)
        assert rows.row.tolist() == got.token_row.tolist()
        assert rows.slot.tolist() == got.slot.tolist()
        assert np.array_equal(np.stack(rows.hidden), got.hidden.float().numpy())
        assert np.array_equal(rows.weight.to_numpy(), got.weight.numpy())
    assert (out / "README.md").exists()


def test_parquet_of_some_sites(ds, tmp_path):
    out = ds.to_parquet(tmp_path / "some", ["z[1]"])
    assert not (out / "experts").exists()
    import pyarrow.parquet as pq

    assert pq.read_schema(next((out / "data").iterdir())).names[-1] == "z[1]"


def test_an_export_needs_an_empty_directory_and_leaves_no_half(ds, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for export in (lambda d: ds.to_parquet(d), lambda d: ds.to_sae_lens(d, "resid_post[0]")):
        with pytest.raises(store.StoreError, match="not empty"):
            export(tmp_path / "full")

    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "write", full)
        with pytest.raises(store.DiskError, match="the disk is full"):
            ds.to_parquet(tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
    assert (ds.to_parquet(tmp_path / "out") / "data").exists()


@pytest.mark.parametrize("shuffle", [False, True])
def test_sae_lens_layout_holds_our_rows(ds, tmp_path, shuffle):
    import datasets

    out = ds.to_sae_lens(tmp_path / "sae", "z[1]", shuffle=shuffle)
    cached = datasets.load_from_disk(str(out))
    name = "blocks.1.attn.hook_z"
    assert cached.features[name].shape == (8, 6)
    cached.set_format("torch")
    rows, ids = cached[:][name].reshape(-1, 6), cached[:]["token_ids"].reshape(-1)
    assert len(rows) == len(ds) // 8 * 8
    expected, tokens = ds["z[1]"][:].flatten(1).float(), torch.tensor(ds.frame().token_id.to_numpy())
    if shuffle:
        order = torch.randperm(len(ds), generator=torch.Generator().manual_seed(ds.plan.seed))[: len(rows)]
        expected, tokens = expected[order], tokens[order]
    assert torch.equal(rows, expected[: len(rows)])
    assert torch.equal(ids.long(), tokens[: len(rows)].long())
    with pytest.raises(store.StoreError, match="choose a smaller context"):
        ds.to_sae_lens(tmp_path / "wide", "z[1]", context=100_000)


def test_sae_lens_trains_from_it(tmp_path):
    """SAELens's own runner with its own `use_cached_activations`, for some steps: the loss goes down on our rows."""
    sae_lens = pytest.importorskip("sae_lens")
    import datasets
    from sae_lens.load_model import HookedProxyLM

    from interp import Model
    from interp.zoo.tiny import tiny

    class Tokenizer:  # what the runner wants to know of one
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    hf = tiny("llama")
    ids, site, name = torch.randint(0, 101, (64, 16)), "resid_post[1]", "model.layers.1"
    ds = store.write(Model(hf), ids, [site], tmp_path / "ds", context=16, progress=False)
    cache = ds.to_sae_lens(tmp_path / "cache", site, hook_name=name, shuffle=True)
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.TopKTrainingSAEConfig(d_in=32, d_sae=64, k=8, device="cpu"), model_name="tiny", hook_name=name,
        model_class_name="AutoModelForCausalLM", dataset_path="unused", use_cached_activations=True,
        cached_activations_path=str(cache), context_size=16, training_tokens=64 * 100, train_batch_size_tokens=64,
        store_batch_size_prompts=8, n_batches_in_buffer=16, lr=1e-2, lr_warm_up_steps=0, n_checkpoints=0,
        checkpoint_path=None, output_path=None, device="cpu",
        logger=sae_lens.LoggingConfig(log_to_wandb=False))
    runner = sae_lens.LanguageModelSAETrainingRunner(
        config, override_model=HookedProxyLM(hf, Tokenizer()),
        override_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist()}))
    order = torch.randperm(len(ds), generator=torch.Generator().manual_seed(ds.plan.seed))
    first = runner.activations_store.get_raw_llm_batch()[0]
    assert torch.equal(first, ds[site][order[: len(first)]].float()), "it reads our rows, in our order"

    rows = ds[site][:].float()

    def loss(sae) -> float:
        with torch.no_grad():
            return float((sae(rows) - rows).square().mean())

    before = loss(runner.sae)
    assert loss(runner.run()) < 0.5 * before
