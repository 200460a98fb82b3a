"""Autoencoders of experts: the loss written out densely, planted directions found, rows drawn as said, edits exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import interp
from interp import sae
from interp.sae import per_expert
from interp.sae.per_expert import Shape


def literal(w: dict[str, Tensor], x: Tensor, owner: Tensor, k: int, shape: Shape, dead: Tensor) -> Tensor:
    """Row by row, over that expert's own dictionary."""
    error, rows, auxiliary = 0.0, [], 0.0
    spread = x.square().sum()

    def usable(e: int, only: Tensor | None) -> Tensor:
        ids = [*range(shape.shared), *range(shape.shared + e * shape.own, shape.shared + (e + 1) * shape.own)]
        return torch.tensor([i for i in ids if only is None or bool(only[i])], dtype=torch.long)

    for row, e in zip(x, owner.tolist(), strict=True):
        ids = usable(e, None)
        p = w["encoder"][ids] @ row + w["b_enc"][ids]
        top = p.topk(k)
        rows.append(row - top.values.relu() @ w["decoder"][ids[top.indices]])
        error = error + rows[-1].square().sum()
    for row, left, e in zip(x, rows, owner.tolist(), strict=True):
        ids = usable(e, dead)
        p = w["encoder"][ids] @ row + w["b_enc"][ids]
        top = p.topk(min(x.shape[1] // 2, len(ids)))
        auxiliary = auxiliary + (left.detach() - top.values @ w["decoder"][ids[top.indices]]).square().sum()
    total = torch.as_tensor(error) / spread
    return total + torch.as_tensor(auxiliary) / torch.as_tensor(error).detach() / 32


def test_loss_and_gradients_are_the_dense_ones() -> None:
    g = torch.Generator().manual_seed(0)
    shape = Shape(5, 3, 4)
    w = {"decoder": torch.randn(shape.d_sae, 8, generator=g, dtype=torch.float64),
         "encoder": torch.randn(shape.d_sae, 8, generator=g, dtype=torch.float64),
         "b_enc": torch.randn(shape.d_sae, generator=g, dtype=torch.float64)}  # fmt: skip
    w = {name: t.requires_grad_(True) for name, t in w.items()}
    x = torch.randn(40, 8, generator=g, dtype=torch.float64)
    owner = torch.randint(4, (40,), generator=g)
    dead = torch.zeros(shape.d_sae, dtype=torch.bool)
    dead[[1, 6, 7, 16]] = True  # a shared one, two of expert 0, one of expert 3: experts reach different numbers
    names = list(w)
    fast = per_expert.loss(w, x, owner, 2, shape, dead).loss
    slow = literal(w, x, owner, 2, shape, dead)
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), rel=1e-9)
    for name, a, b in zip(names, torch.autograd.grad(fast, [*w.values()]), torch.autograd.grad(slow, [*w.values()]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, msg=name)


def planted(rows: int = 6000, experts: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [row, 24] of three experts with 6 directions in common and 6 of their own each, two of which are on; the
    last expert is rare."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(6 * (1 + experts), 24, generator=g), dim=1)
    means = torch.randn(experts, 24, generator=g)  # each has a mean of its own, too
    owner = torch.multinomial(torch.tensor([0.6, 0.36, 0.04]), rows, replacement=True, generator=g)
    on = torch.rand(rows, 12, generator=g).argsort(1) < 2
    codes = on * (1 + torch.rand(rows, 12, generator=g))
    own = directions[6:].view(experts, 6, 24)
    y = codes[:, :6] @ directions[:6] + torch.einsum("rj,rjd->rd", codes[:, 6:], own[owner])
    return y + means[owner], owner, own


def test_planted_directions_are_found_where_they_belong() -> None:
    y, owner, own = planted()
    how = {"own": 6, "shared": 6, "k": 2, "n_rows": 60_000, "batch_size": 512, "lr": 3e-3}
    s = per_expert.train((y, owner), "expert_out[1]", balance=0.0, **how)
    rows = torch.nn.functional.normalize(s.decoder, dim=1)
    held, whose, _ = planted(3000)  # other rows of the same experts
    quality = s.quality(held, whose).set_index("expert")
    assert (quality.fvu < 0.2).all()
    for e in range(3):  # an expert's directions lie among the latents that it can use
        mine = torch.cat([rows[:6], rows[6 + 6 * e : 12 + 6 * e]])
        theirs = torch.cat([rows[6 + 6 * f : 12 + 6 * f] for f in range(3) if f != e])
        assert (own[e] @ mine.T).amax(1).mean() > 0.9 > (own[e] @ theirs.T).amax(1).mean()
    # told the wrong experts, it explains less: own latents are no use to others
    wrong = s.quality(held, (whose + 1) % 3)
    assert wrong.fvu.mean() > 2 * quality.fvu.mean()


def test_rows_are_drawn_as_balance_says() -> None:
    counts = torch.tensor([6000, 0, 3000, 1000])
    for balance, share in ((1.0, [0.6, 0, 0.3, 0.1]), (0.0, [1 / 3, 0, 1 / 3, 1 / 3])):
        at = per_expert.draw(counts, 30_000, balance, torch.Generator().manual_seed(0))
        owner = torch.tensor([0, 2, 3]).repeat_interleave(counts[counts > 0])[at]
        found = torch.bincount(owner, minlength=4) / 30_000
        assert found.tolist() == pytest.approx(share, abs=0.015)


@pytest.fixture(scope="module")
def m() -> interp.Model:
    return interp.load("tiny:olmoe")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(4, 100, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("site", ["expert_out[1]", "expert_hidden[1]"])
def test_edits_take_away_what_latents_add(m: interp.Model, ids: Tensor, site: str) -> None:
    s = per_expert.train((m, ids.tolist()), site, own=4, shared=4, k=3, n_rows=2000, batch_size=64)
    before = m.capture(ids, site)
    y, owner, weight, token = per_expert.rows(before, site)
    assert len(y) == ids.numel() * m.top_k
    latents = [1, s.shape.shared + int(owner[0]) * 4]
    with m.intervene(s.ablate(latents)):
        after = per_expert.rows(m.capture(ids, site), site)[0]
    z = torch.zeros(len(y), s.d_sae)
    support, values = s.codes(y, owner)
    z[support.rows, support.ids] = values
    torch.testing.assert_close(after, y - z[:, latents] @ s.decoder[latents], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, y)
    # a token's code is the weighted sum of its slots' codes
    total = torch.zeros(ids.numel(), s.d_sae).index_add_(0, token, z * weight[:, None])
    torch.testing.assert_close(s.tokens(before), total)


def test_there_and_back(tmp_path: Path) -> None:
    y, owner, _ = planted(600)
    s = per_expert.train((y, owner), "expert_out[2]", own=4, k=2, n_rows=2000, batch_size=128)
    back = per_expert.load(s.save(tmp_path / "s"))
    assert torch.equal(back.reconstruct(y, owner), s.reconstruct(y, owner))
    assert (back.site, back.owner(0), back.owner(11)) == ("expert_out[2]", 0, 2)
    with pytest.raises(sae.SAEError, match=r"config\.json"):
        per_expert.load(tmp_path)


def test_bad_input_is_refused(m: interp.Model, ids: Tensor) -> None:
    y, owner, _ = planted(50)
    good = {"own": 4, "k": 2}
    with pytest.raises(sae.SAEError, match="k=9"):
        per_expert.train((y, owner), "expert_out[1]", own=4, shared=4, k=9)
    with pytest.raises(sae.SAEError, match="expected expert_out"):
        per_expert.train((y, owner), "resid_post[1]", **good)
    with pytest.raises(sae.SAEError, match="one number"):
        per_expert.train((y, owner[1:]), "expert_out[1]", **good)
    with pytest.raises(sae.SAEError, match="1 of 50 rows"):
        per_expert.train((y.index_fill(0, torch.tensor([3]), torch.nan), owner), "expert_out[1]", **good)
    with pytest.raises(sae.SAEError, match="not captured"):
        per_expert.rows(m.capture(ids, "expert_weight[1]"), "expert_out[1]")
    s = per_expert.train((y, owner), "expert_out[1]", n_rows=100, batch_size=50, **good)
    with pytest.raises(sae.SAEError, match="latent=12"):
        s.ablate([12])
    with pytest.raises(sae.SAEError, match="rows"):
        s.codes(y[:, 1:], owner)


def test_an_interrupted_training_leaves_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    y, owner = torch.randn(200, 6), torch.arange(200) % 3
    steps, kept = [], per_expert.renormalise

    def stop(decoder: Tensor) -> None:
        kept(decoder)
        steps.append(decoder.detach().clone())
        if len(steps) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(per_expert, "renormalise", stop)
    with pytest.raises(KeyboardInterrupt):
        per_expert.train((y, owner), "expert_out[1]", own=4, shared=2, k=2, n_rows=2000, batch_size=50, log_every=1)
    found = interp.unfinished()
    assert isinstance(found, per_expert.ExpertSAE)
    assert found.about["rows_seen"] == 6 * 50
    torch.testing.assert_close(torch.nn.functional.normalize(found.decoder, dim=1), steps[-1])
    assert found.reconstruct(y, owner).isfinite().all()
