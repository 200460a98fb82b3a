"""Reading: rows, batches, experts, tables."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from interp import store
from interp.sites import Site, SiteError
from interp.store.experts import ExpertTable


@pytest.fixture(scope="module")
def ds(fake, tmp_path_factory):
    sites = ["resid_post[*]", "z[1]", "expert_hidden[1]", "expert_ids[1]", "expert_weight[1]"]
    return store.write(fake.FakeModel(), fake.texts(40), sites, tmp_path_factory.mktemp("read"), dtype="float32",
                       labels=[i % 3 for i in range(40)], context=8, batch_size=3, documents_per_range=7,
                       progress=False)


def test_indexing_is_that_of_a_tensor(ds):
    lazy, rows = ds["resid_post[1]"], torch.cat(list(ds["resid_post[1]"].shards()))
    assert len(ds.manifest["parts"]) > 4, "several shards, or the test shows nothing"
    assert lazy.shape == rows.shape
    assert lazy.dtype == rows.dtype
    n = len(rows)
    mask = torch.arange(n) % 5 == 1
    for key in (0, -1, n - 1, slice(None), slice(3, 4), slice(10, 200), slice(-7, None), slice(5, 2), slice(0, n, 13),
                slice(None, None, -3), [5, 1, 1, 300], torch.tensor([-1, 0]), mask, torch.randperm(n), np.int64(7),
                np.array([2, 250]), mask.numpy()):
        expected = rows[list(range(n))[key]] if isinstance(key, slice) else rows[key]
        assert torch.equal(lazy[key], expected), key
    for key in (n, -n - 1, [0, n], torch.ones(3, dtype=torch.bool)):
        with pytest.raises(IndexError):
            lazy[key]


def test_names_of_both_schemes_and_negative_layers(ds):
    assert torch.equal(ds["blocks.2.hook_resid_post"][:], ds["resid_post[2]"][:])
    assert torch.equal(ds["resid_post[-1]"][:], ds["resid_post[2]"][:])
    assert torch.equal(ds[Site("resid_post", 2)][:], ds["resid_post[2]"][:])


@pytest.mark.parametrize("site", ["resid_post[7]", "mlp_out[0]", "logits"])
def test_a_site_that_is_not_there_is_named_with_those_that_are(ds, site):
    for ask in (lambda: ds[site], lambda: ds.statistics(site), lambda: next(iter(ds.batches(site, 2)))):
        with pytest.raises(SiteError, match=r"is not in this dataset; it has resid_post\[0\], "):
            ask()


def test_writing_to_what_was_read_changes_neither_the_disk_nor_the_next_reading(ds):
    before = ds["resid_post[0]"][:]
    for key in (0, slice(0, 2), [0, 1], torch.arange(2)):
        ds["resid_post[0]"][key].zero_()
    ds.expert(1, 0).hidden.zero_()
    assert torch.equal(ds["resid_post[0]"][:], before)
    assert torch.equal(ds.expert(1, 0).hidden, store.open(ds.path).expert(1, 0).hidden)
    assert torch.equal(store.open(ds.path)["resid_post[0]"][:], before)
    assert store.verify(ds.path).empty


@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
def test_a_shuffled_epoch_has_every_row_once_in_an_order_over_all_shards(ds, batch_size):
    rows = ds["resid_post[0]"][:]
    got = list(ds.batches(["resid_post[0]"], batch_size, seed=3))
    order = torch.cat([b["row"] for b in got])
    assert torch.equal(torch.cat([b["resid_post[0]"] for b in got]), rows[order])
    assert torch.equal(order.sort().values, torch.arange(len(ds)))
    assert all(len(b["row"]) == batch_size for b in got[:-1])
    first = order[: len(order) // 2].float()
    assert abs(float(first.mean()) / len(ds) - 0.5) < 0.1, "the first half comes from everywhere"
    assert not torch.equal(order, torch.arange(len(ds)))


def test_sites_share_one_permutation_and_seeds_decide_it(ds):
    sites = ["resid_post[0]", "z[1]", "expert_ids[1]"]
    batches = list(ds.batches(sites, 50, seed=1, epochs=2))
    for batch in batches:
        for site in sites:
            assert torch.equal(batch[site], ds[site][batch["row"]])
    orders = torch.cat([b["row"] for b in batches]).split(len(ds))
    assert not torch.equal(*orders), "each epoch has its own order"
    again = torch.cat([b["row"] for b in ds.batches(sites, 50, seed=1, epochs=2)]).split(len(ds))
    assert torch.equal(orders[1], again[1])
    other = torch.cat([b["row"] for b in ds.batches(sites, 50, seed=2)])
    assert not torch.equal(orders[0], other)
    default = torch.cat([b["row"] for b in ds.batches(sites, 50)])
    assert torch.equal(default, torch.cat([b["row"] for b in ds.batches(sites, 50, seed=ds.plan.seed)]))


@pytest.mark.parametrize("start", [0, 1, 5, 8, 9, 13, 100])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_go_on_where_a_training_stopped(ds, start, drop_last):
    options = {"seed": 4, "epochs": 2, "drop_last": drop_last}
    everything = list(ds.batches("resid_post[2]", 50, **options))
    rest = list(ds.batches("resid_post[2]", 50, start=start, **options))
    assert len(rest) == max(0, len(everything) - start)
    assert all(torch.equal(a, b) for a, b in zip(everything[start:], rest, strict=True))
    if drop_last:
        assert {len(b) for b in everything} == {50}


def test_batches_of_some_rows_in_another_dtype(ds):
    special = torch.tensor(ds.frame().special.to_numpy())
    got = torch.cat(list(ds.batches("resid_post[0]", 33, shuffle=False, where=~special, dtype=torch.float16)))
    assert torch.equal(got, ds["resid_post[0]"][~special].half())
    whole = torch.cat(list(ds.batches("expert_ids[1]", 33, shuffle=False, dtype=torch.float16)))
    assert whole.dtype == torch.int32, "whole numbers stay what they are"


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"epochs": -1}, {"where": torch.ones(3, dtype=torch.bool)},
                                     {"where": torch.ones(10_000)}])
def test_batches_refuse_what_makes_no_sense(ds, options):
    with pytest.raises(store.StoreError, match=next(iter(options))):
        ds.batches("resid_post[0]", **{"batch_size": 4, **options})


def test_an_expert_gives_every_token_routed_to_it(ds, fake):
    ids, weights = ds["expert_ids[1]"][:], ds["expert_weight[1]"][:]
    frame = ds.frame()
    tokens, position = (torch.tensor(frame[c].to_numpy())[None].long() for c in ("token_id", "position"))
    hidden = fake.FakeModel().value(Site("expert_hidden", 1), tokens, position)[0]
    for expert in range(5):
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        got = ds.expert(1, expert)
        assert len(got) == len(rows) > 0
        order = (got.token_row * 10 + got.slot).argsort()
        assert torch.equal(got.token_row[order], rows)
        assert torch.equal(got.slot[order].long(), slots)
        assert torch.equal(got.weight[order], weights[rows, slots])
        assert torch.equal(got.hidden[order], hidden[rows, slots])
        assert torch.allclose(got.out(fake.FakeModel())[order], hidden[rows, slots] @ fake.FakeModel().down[expert].T)
    assert torch.equal(ds.expert_counts(1), torch.bincount(ids.flatten(), minlength=5))
    for expert in (5, -1):
        with pytest.raises(SiteError, match=r"experts 0\.\.4"):
            ds.expert(1, expert)
    with pytest.raises(SiteError, match=r"read ds\.expert\(1, e\)"):
        ds["expert_hidden[1]"]
    with pytest.raises(SiteError, match="not in this dataset"):
        ds.expert(0, 0)


def test_one_expert_is_one_contiguous_piece_of_each_shard(ds):
    for part in range(len(ds.manifest["parts"])):
        table = ds.tensors(part, Site("expert_hidden", 1))
        a, b = table["offsets"][2:4].tolist()
        first = ds.expert(1, 2)
        assert table["offsets"][-1] == len(table["hidden"]) == 2 * ds.manifest["parts"][part]["rows"]
        if part == 0:
            assert torch.equal(first.hidden[: b - a], table["hidden"][a:b])


def test_routing_is_put_back_together(ds):
    ids, weights = ds.routing(1)
    assert torch.equal(ids, ds["expert_ids[1]"][:].long())
    assert torch.equal(weights, ds["expert_weight[1]"][:])


def test_a_dropped_slot_leaves_no_row():
    """Expert-parallel routers write an id beyond the last expert where nothing runs."""
    from interp.activations import ExpertActivations

    ids = torch.tensor([[[0, 3], [2, 1], [3, 2]]])
    table = ExpertTable(3, torch.float32)
    weights, hidden = torch.rand(1, 3, 2), torch.randn(1, 3, 2, 4)
    table.append(ExpertActivations(0, ids, weights, ids[..., 0] >= 0, hidden), torch.ones(1, 3, dtype=torch.bool))
    table.sort()
    columns: dict[str, list[torch.Tensor]] = {}
    for name, piece in table.pieces(32):  # two rows at a time
        columns.setdefault(name, []).append(piece.clone())
    assert torch.cat(columns["offsets"]).tolist() == [0, 1, 2, 4]
    assert torch.cat(columns["token_row"]).tolist() == [0, 1, 1, 2]
    assert torch.cat(columns["slot"]).tolist() == [0, 1, 0, 1]
    flat = hidden[0].flatten(0, 1)
    assert torch.equal(torch.cat(columns["hidden"]), flat[[0, 3, 2, 5]])


def test_frame_and_tokens(ds):
    frame = ds.frame(["resid_post[0]", "z[1]"], start=20, limit=30)
    assert frame.row.tolist() == list(range(20, 50))
    assert (np.stack(frame["z[1]"]) == ds["z[1]"][20:50].float().numpy()).all()
    assert frame.attrs["content_sha256"] == ds.content_sha256
    assert len(ds.frame(start=len(ds) - 3, limit=10)) == 3
    assert len(ds.frame(limit=0)) == 0
    with pytest.raises(store.StoreError, match="limit"):
        ds.frame("resid_post[0]")


def test_hugging_face_dataset(ds):
    for streaming in (True, False):
        hf = ds.to_hf(["resid_post[1]", "z[1]"], streaming=streaming)
        got = list(hf.with_format("torch"))
        assert torch.equal(torch.stack([r["resid_post[1]"] for r in got]), ds["resid_post[1]"][:])
        assert torch.equal(torch.stack([r["z[1]"] for r in got]), ds["z[1]"][:])
        assert not streaming or hf.num_shards == ds.n_parts
        assert [r["label"].item() for r in got] == ds.frame().label.tolist()
        assert [r["token_id"].item() for r in got] == ds.frame().token_id.tolist()


def test_a_copy_opens_the_files_for_itself(ds):
    ds["resid_post[0]"][:]
    other = copy.copy(ds)
    assert other is not ds
    assert not other._open
    assert torch.equal(other["resid_post[0]"][:], ds["resid_post[0]"][:])


def test_repr_tells_size(ds):
    assert f"{len(ds)} tokens of 40 documents, 7 sites" in repr(ds)
    assert "resid_post[0]" in repr(ds["resid_post[0]"])
