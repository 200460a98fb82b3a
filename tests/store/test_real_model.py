"""The store with the real Model, on tiny models of real families: what is stored is what `capture` gives."""

from __future__ import annotations

import pytest
import torch

from interp import Model, edits, store
from interp.zoo.tiny import tiny


@pytest.fixture(scope="module")
def llama():
    return Model(tiny("llama"), name="tiny-llama")


@pytest.fixture(scope="module")
def olmoe():
    return Model(tiny("olmoe"), name="tiny-olmoe")


def documents(n=12):
    return [torch.randint(0, 101, (3 + (5 * i) % 11,)).tolist() for i in range(n)]


def test_rows_are_those_of_capture(llama, tmp_path):
    docs = documents()
    sites = ["embed", "resid_post[*]", "q[1]", "k[1]", "z[0, head=2]", "mlp_hidden[2]", "ln1_scale[0]", "logits"]
    ds = store.write(llama, docs, sites, tmp_path / "ds", dtype="float32", context=16, batch_size=5, progress=False)
    frame = ds.frame()
    for i, doc in enumerate(docs):
        rows = torch.tensor(frame[frame.document == i].row.to_numpy())
        assert frame.token_id[rows.numpy()].tolist() == doc
        acts = llama.capture([doc], sites)
        for site in ds.sites:
            torch.testing.assert_close(ds[site][rows], acts[site][0], rtol=1e-4, atol=1e-5, msg=f"{site} of text {i}")


def test_experts_are_those_of_capture_and_outputs_come_back(olmoe, tmp_path):
    docs = documents()
    ds = store.write(olmoe, docs, ["expert_hidden[1]", "router_logits[1]", "mlp_out[1]"], tmp_path / "ds",
                     dtype="float32", context=16, batch_size=5, progress=False)
    mixed = torch.zeros(len(ds), olmoe.d_model)
    for expert in range(olmoe.n_experts):
        rows = ds.expert(1, expert)
        mixed.index_add_(0, rows.token_row, rows.weight[:, None] * rows.out(olmoe))
    torch.testing.assert_close(mixed, ds["mlp_out[1]"][:], rtol=1e-4, atol=1e-5)
    ids, weights = ds.routing(1)
    frame = ds.frame()
    for i, doc in enumerate(docs):
        rows = torch.tensor(frame[frame.document == i].row.to_numpy())
        experts = olmoe.capture([doc], ["expert_weight[1]"]).experts(1)
        assert torch.equal(ids[rows], experts.ids[0])
        torch.testing.assert_close(weights[rows], experts.weights[0], rtol=1e-4, atol=1e-5)
    assert int(ds.expert_counts(1).sum()) == len(ds) * olmoe.top_k


def test_resumed_is_the_same_with_a_real_model(olmoe, tmp_path):
    docs = documents(20)
    options = {"context": 16, "batch_size": 3, "documents_per_range": 4, "progress": False}
    sites = ["resid_post[*]", "expert_hidden[0]"]
    whole = store.write(olmoe, docs, sites, tmp_path / "whole", **options)
    store.write(olmoe, docs, sites, tmp_path / "parts", worker=1, n_workers=2, **options)
    resumed = store.write(Model(tiny("olmoe"), name="the same"), docs, sites, tmp_path / "parts", **options)
    assert resumed.content_sha256 == whole.content_sha256
    with pytest.raises(store.Mismatch, match="model"):
        store.write(Model(tiny("olmoe", seed=1)), docs, sites, tmp_path / "parts", **options)


def test_bfloat16_model(tmp_path):
    model = Model(tiny("llama", dtype=torch.bfloat16), name="bf16")
    ds = store.write(model, documents(), ["resid_post[1]"], tmp_path / "ds", context=16, progress=False)
    assert ds["resid_post[1]"].dtype == torch.bfloat16
    assert ds.manifest["model_dtype"] == "bfloat16"


def test_sites_that_a_family_lacks_are_refused_before_anything_is_made(llama, tmp_path):
    from interp.sites import SiteError

    for site in ("expert_hidden[0]", "resid_post[9]", "z[0, head=40]"):
        with pytest.raises(SiteError):
            store.write(llama, documents(), [site], tmp_path / "ds", progress=False)
    assert not (tmp_path / "ds").exists()


def test_an_edited_model_stores_edited_activations(llama, tmp_path):
    def write(**where):
        return store.write(llama, documents(4), ["resid_post[1]"], tmp_path / "ds", context=16, progress=False)

    torch.manual_seed(0)
    with llama.intervene(edits.zero("resid_post[1]")):
        ds = write()
    assert not ds["resid_post[1]"][:].any()
    assert len(ds.manifest["edits"]) == 1
    assert "resid_post[1]" in ds.manifest["edits"][0]
    assert ds.manifest["edits"][0] in (ds.path / "README.md").read_text()
    torch.manual_seed(0)
    with pytest.raises(store.Mismatch, match="edits: the dataset has zero"):
        write()


def test_another_vector_is_another_edit(llama, tmp_path):
    docs = documents(2)

    def write(vector):
        with llama.intervene(edits.add("resid_post[0]", vector)):
            return store.write(llama, docs, ["resid_post[1]"], tmp_path / "ds", context=16, progress=False)

    vector = torch.randn(llama.d_model)
    assert write(vector).content_sha256 == write(vector.clone()).content_sha256
    with pytest.raises(store.Mismatch, match="edits"):
        write(vector + 1)


def test_smollm2_from_text(smollm2, tmp_path):
    texts = ["The capital of France is Paris.", "Mary and John went to the shop. " * 20]
    ds = store.write(smollm2, texts, ["resid_post[15]"], tmp_path / "ds", context=32, labels=["short", "long"],
                     dtype="float32", progress=False)
    frame = ds.frame()
    for i, text in enumerate(texts):
        rows = frame[(frame.document == i) & ~frame.special]
        assert "".join(text[a:b] for a, b in zip(rows.char_start, rows.char_end, strict=True)) == text
    rows = frame[frame.document == 0].row.to_numpy()
    acts = smollm2.capture(texts[0], ["resid_post[15]"])
    torch.testing.assert_close(ds["resid_post[15]"][rows], acts["resid_post[15]"][0], rtol=1e-3, atol=1e-2)
