"""Features whose quality is known, compared on like terms."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import sae
from interp.sae import versus


def features() -> tuple[dict[str, torch.Tensor], torch.Tensor, list[str], torch.Tensor]:
    """Pure features tell three labels apart and fire twice per token; blurred ones are shared by two labels."""
    g = torch.Generator().manual_seed(0)
    n, per = 60, 10
    labels = [("law", "code", "bio")[i % 3] for i in range(n)]
    documents = torch.arange(n).repeat_interleave(per)
    kind = torch.tensor([i % 3 for i in range(n)])[documents]
    pure = torch.zeros(n * per, 12)
    pure[torch.arange(n * per), kind] = 1 + torch.rand(n * per, generator=g)
    pure[torch.arange(n * per), 3 + torch.randint(9, (n * per,), generator=g)] = 1
    blurred = pure.clone()
    blurred[:, :3] = pure[:, :3] + pure[:, [1, 2, 0]]  # each label's feature fires for another label too
    x = pure @ torch.randn(12, 20, generator=g)
    return {"pure": pure, "blurred": blurred}, x, labels, documents


def test_pure_features_win_and_controls_lose() -> None:
    codes, x, labels, documents = features()
    table = versus.compare(codes, x, labels, documents, l0=2, resamples=40)
    at = table.set_index(["method", "baseline", "metric"]).value
    assert at["pure", "none", "auroc"] == pytest.approx(1)
    assert at["pure", "none", "selectivity"] > 0.95
    assert at["pure", "none", "fvu"] < 0.1
    assert at["pure", "none", "l0"] == pytest.approx(2, abs=0.01)
    assert at["blurred", "none", "selectivity"] < 0.8
    assert at["blurred", "none", "fvu"] > at["pure", "none", "fvu"] + 0.1
    assert abs(at["pure", "permuted", "auroc"] - 0.5) < 0.2
    assert at["pure", "permuted", "fvu"] > 0.95
    rows = table[(table.metric == "auroc") & (table.baseline == "none")]
    assert ((rows.low <= rows.value) & (rows.value <= rows.high)).all()


def test_routing_is_the_sparse_experts() -> None:
    m = interp.load("tiny:olmoe")
    ids = torch.randint(0, 100, (4, 6), generator=torch.Generator().manual_seed(0))
    acts = m.capture(ids, ["expert_out[1]", "expert_weight[1]"])
    plain, sized = versus.routing(acts, 1), versus.routing(acts, 1, norm=True)
    found = acts.experts(1)
    assert plain.shape == (24, m.n_experts)
    assert int((plain > 0).sum(1).max()) == m.top_k
    row = found.ids.flatten(0, 1)[5]
    assert torch.allclose(plain[5, row], found.weights.flatten(0, 1)[5])
    assert torch.allclose(sized[5, row], found.weights.flatten(0, 1)[5] * found.out.flatten(0, 1)[5].norm(dim=-1))
    with pytest.raises(sae.SAEError, match="expert_out"):
        versus.routing(m.capture(ids, "expert_weight[1]"), 1, norm=True)


def test_monets_experts_are_named() -> None:
    from interp.monet import MonetConfig, MonetForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"moe_experts": 8, "moe_heads": 2, "moe_dim": 4, "moe_topk": 2, "moe_groups": 1}
    config = MonetConfig(**sizes, num_key_value_heads=2, **experts)
    m = interp.load(MonetForCausalLM(config).eval())
    acts = m.capture(torch.randint(0, 50, (3, 5)), ["g1[1]", "g2[1]"])
    codes = versus.routing(acts, 1, experts=[0, 9, 63])
    expected = (acts["g1[1]"][..., 1] * acts["g2[1]"][..., 1]).sum(-1).flatten()  # expert 9 is (1, 1) of 8 x 8
    assert torch.allclose(codes[:, 1], expected)
    with pytest.raises(sae.SAEError, match="64 experts of two factors"):
        versus.routing(acts, 1)


def test_the_best_features_are_named_and_each_aim_has_its_number() -> None:
    codes, x, labels, documents = features()
    table = versus.compare(codes, {"a": x, "b": 3 * x}, labels, documents, l0=2, resamples=0)
    pure = table.attrs["chosen"]["pure"]
    assert [pure[label][0] for label in ("law", "code", "bio")] == [0, 1, 2]
    at = table.set_index(["method", "baseline", "metric"]).value
    assert at["pure", "none", "fvu a"] == pytest.approx(at["pure", "none", "fvu b"], abs=1e-6)
    alone = versus.compare(codes, x, labels, documents, l0=2, resamples=0).set_index(["method", "baseline", "metric"])
    assert alone.value["pure", "none", "fvu"] == pytest.approx(at["pure", "none", "fvu a"], abs=1e-9)


def test_passages_of_one_text_stay_together() -> None:
    """A feature that knows each text by heart, and nothing of labels, tells them only where texts are torn apart."""
    g = torch.Generator().manual_seed(0)
    texts, per = 24, 8
    labels = [("law", "code")[i % 2] for i in range(texts) for _ in range(per)]
    owner = torch.arange(texts).repeat_interleave(per)
    z = torch.nn.functional.one_hot(owner, texts).float() + 0.01 * torch.rand(len(owner), texts, generator=g)
    table = {
        name: versus.compare({"by heart": z}, z, labels, torch.arange(len(owner)), l0=1, resamples=20, groups=groups)
        for name, groups in (("torn", None), ("whole", owner.tolist()))
    }
    unexplained = {n: t[(t.metric == "fvu") & (t.baseline == "none")].value.item() for n, t in table.items()}
    assert unexplained["torn"] < 0.3
    assert unexplained["whole"] > 0.9
    assert table["whole"].attrs["groups"] == texts
    with pytest.raises(sae.SAEError, match="groups: 2 for"):
        versus.compare({"by heart": z}, z, labels, torch.arange(len(owner)), groups=[0, 1])


def test_codes_are_gathered_text_by_text_and_removal_is_the_change_of_the_loss() -> None:
    from interp import edits

    m = interp.load("tiny:olmoe")
    ids = torch.randint(4, 100, (5, 7), generator=torch.Generator().manual_seed(0))
    texts = [row[: 3 + i].tolist() for i, row in enumerate(ids)]
    read = {"routing": lambda acts: versus.routing(acts, 1), "x": lambda acts: acts["resid_post[1]"][acts.mask]}
    found, documents = versus.gather(m, texts, ["resid_post[1]", "expert_weight[1]"], read, run=2)
    assert documents.tolist() == [i for i, text in enumerate(texts) for _ in text]
    alone = m.capture([texts[3]], "resid_post[1]")["resid_post[1]"][0]
    torch.testing.assert_close(found["x"][documents == 3], alone, atol=1e-5, rtol=1e-4)
    assert found["routing"].shape == (len(documents), m.n_experts)

    off = {"nothing": edits.scale("resid_post[1]", 1.0), "everything": [edits.zero("resid_post[1]")]}
    table = versus.removal(m, off, {"a": texts[:2], "b": texts[2:]}).set_index(["method", "label"])
    assert table.value["nothing"].abs().max() < 1e-6
    with m.intervene(edits.zero("resid_post[1]")):
        after = m(ids[2:3, :5])[0, :-1].log_softmax(-1)
    before = m(ids[2:3, :5])[0, :-1].log_softmax(-1)
    one = versus.removal(m, off, {"c": [texts[2]]}).set_index(["method"]).value["everything"]
    at = ids[2, 1:5, None]
    assert one == pytest.approx(float((before - after).gather(1, at).mean()), abs=1e-4)


def test_bad_codes_are_refused() -> None:
    codes, x, labels, documents = features()
    with pytest.raises(sae.SAEError, match="negative"):
        versus.compare({"a": -codes["pure"]}, x, labels, documents)
    with pytest.raises(sae.SAEError, match="one per token"):
        versus.compare({"a": codes["pure"][1:]}, x, labels, documents)
    with pytest.raises(sae.SAEError, match="at least two"):
        versus.compare(codes, x, ["law"] * len(labels), documents)
