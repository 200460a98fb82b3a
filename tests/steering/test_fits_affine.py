"""Affine maps of distributions, against their formulas: act, affine, leace, conceptors."""

from __future__ import annotations

import pytest
import torch

import interp
import steering
from interp.edits import Where
from steering import Conceptor, SteeringError, SteeringVector, affine_map, leace_map, transport_map
from steering.fit_affine import matrix_power


@pytest.fixture(scope="module")
def m():
    return interp.load("tiny:llama")


def where(h):
    batch, pos = h.shape[:2]
    return Where("resid_post[0]", torch.arange(pos).expand(batch, pos), torch.ones(batch, pos, dtype=torch.bool))


def run(map_, rows):
    return map_(rows[None], where(rows[None]))[0]


def gaussian(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + torch.randn(d, generator=g)


ROWS = [[3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13], [14, 15, 16]]
OTHER = [[17, 18, 19], [20, 21, 22, 23], [24, 25], [26, 27, 28], [29, 30]]


# -- Activation Transport --------------------------------------------------------------------------------------
def literal_transport(a, b):
    a, b = a.double(), b.double()
    omega = torch.zeros(a.shape[1], dtype=torch.float64)
    beta = omega.clone()
    for j in range(a.shape[1]):
        x, y = sorted(a[:, j].tolist()), sorted(b[:, j].tolist())
        mx, my = sum(x) / len(x), sum(y) / len(y)
        top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
        omega[j] = top / sum((p - mx) ** 2 for p in x)
        beta[j] = my - omega[j] * mx
    return omega, beta


def test_transport_is_its_formula_and_moves_only_inside_the_source_range():
    a, b = gaussian(30, 6, 0), gaussian(30, 6, 1)
    omega, beta = literal_transport(a, b)
    free, bound = transport_map(a, b, support=False), transport_map(a, b)
    h = 3 * torch.randn(40, 6)
    want = (h.double() * omega + beta).float()
    torch.testing.assert_close(run(free, h), want, atol=1e-5, rtol=1e-5)
    inside = (h >= a.amin(0)) & (h <= a.amax(0))
    assert 0 < int(inside.sum()) < inside.numel()
    torch.testing.assert_close(run(bound, h), torch.where(inside, want, h), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(bound.scaled(0.25), h), 0.75 * h + 0.25 * run(bound, h))
    shift = transport_map(a, b, "mean", support=False)
    torch.testing.assert_close(run(shift, h), h + b.mean(0) - a.mean(0), atol=1e-5, rtol=1e-5)


def test_a_unit_that_never_varies_is_only_shifted():
    a, b = torch.ones(4, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    torch.testing.assert_close(run(transport_map(a, b, support=False), a), torch.full((4, 1), 2.5))


def test_each_layer_is_fitted_with_the_earlier_maps_active(m):
    site, made = "resid_post", steering.act(m, ROWS, OTHER, layer="*", site="resid_post", support=False)

    def means(rows, name):
        return torch.stack([m.capture(torch.tensor([r]), name)[name][0].mean(0) for r in rows])

    for layer in range(3):
        name, earlier = f"{site}[{layer}]", [made.only(i) for i in range(layer)]
        with m.intervene(*earlier):
            source = means(ROWS, name)
        omega, beta = literal_transport(source, means(OTHER, name))
        a, b = made.only(layer).parts[0].map.affine()
        torch.testing.assert_close(a.diagonal().double(), omega, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(b.double(), beta, atol=1e-4, rtol=1e-3)
    target = means(OTHER, "resid_post[2]").mean(0)
    with m.intervene(made):  # the mean lands where it should, behind all three maps
        torch.testing.assert_close(means(ROWS, "resid_post[2]").mean(0), target, atol=1e-4, rtol=1e-3)


def test_samples_of_different_size_are_refused(m):
    with pytest.raises(SteeringError, match="equally many texts"):
        steering.act(m, ROWS, OTHER[:3], layer=1)


# -- mean and covariance ---------------------------------------------------------------------------------------
def test_affine_map_is_the_written_out_one():
    s, t = gaussian(200, 4, 2), gaussian(300, 4, 3)
    cov = [torch.cov(x.double().T) + 1e-5 * torch.eye(4) for x in (s, t)]

    def root(a):
        value, vector = torch.linalg.eigh(a)
        return vector @ torch.diag(value.sqrt()) @ vector.T

    r = root(cov[0])
    w = torch.linalg.inv(r) @ root(r @ cov[1] @ r) @ torch.linalg.inv(r)
    h = torch.randn(7, 4)
    want = (h.double() - s.double().mean(0)) @ w.T + t.double().mean(0)
    torch.testing.assert_close(run(affine_map(s, t), h).double(), want, atol=1e-4, rtol=1e-4)
    shifted = run(affine_map(s, t, "mean"), h)
    torch.testing.assert_close(shifted, h + t.mean(0) - s.mean(0))


def test_affine_reads_the_model_and_may_touch_only_what_looks_like_the_source(m):
    v = steering.affine(m, ROWS, OTHER, layer=1, how="mean")
    assert isinstance(v, SteeringVector)
    site = "resid_post[1]"

    def last(rows):
        return torch.stack([m.capture(torch.tensor([r]), site)[site][0, -1] for r in rows])

    torch.testing.assert_close(v.vector, last(OTHER).mean(0) - last(ROWS).mean(0), atol=1e-5, rtol=1e-5)
    gated = steering.affine(m, ROWS, OTHER, layer=1, how="mean", only_source=True).within("last")
    ids = torch.tensor([[3, 4, 5, 6], [17, 18, 19, 21], [50, 51, 52, 53]])
    plain = m.capture(ids, site)[site][:, -1]
    near = (plain - last(ROWS).mean(0)).norm(dim=1) < (plain - last(OTHER).mean(0)).norm(dim=1)
    with m.intervene(gated):
        got = m.capture(ids, site)[site][:, -1]
    torch.testing.assert_close(got, plain + near[:, None] * v.vector)


def test_gated_affine_survives_the_disk(m, tmp_path):
    made = steering.affine(m, ROWS, OTHER, layer=[0, 1], only_source=True)
    back = steering.load(made.save(tmp_path / "a"), m)
    ids = torch.tensor([[3, 4, 5, 6]])
    with m.intervene(made):
        a = m(ids)
    with m.intervene(back):
        assert torch.equal(m(ids), a)


def test_affine_refuses_one_text_and_unknown_words(m):
    with pytest.raises(SteeringError, match="at least two texts"):
        steering.affine(m, ROWS[:1], OTHER, layer=1)
    with pytest.raises(SteeringError, match="expected 'mean' or 'gaussian'"):
        steering.affine(m, ROWS, OTHER, layer=1, how="cubic")


# -- LEACE -----------------------------------------------------------------------------------------------------
def labelled(n=400, d=6, seed=5, k=2):
    x = gaussian(n, d, seed)
    y = torch.arange(n) % k
    g = torch.Generator().manual_seed(9)
    return x + 2 * torch.randn(k, d, generator=g)[y], y


@pytest.mark.parametrize("k", [2, 3])
def test_leace_is_its_formula(k):
    x, y = labelled(k=k)
    h, z = x.double(), torch.nn.functional.one_hot(y).double()
    hc, zc = h - h.mean(0), z - z.mean(0)
    xx, xz = hc.T @ hc / len(h), hc.T @ zc / len(h)
    w = matrix_power(xx, -0.5)
    wz = w @ xz
    u = torch.linalg.svd(wz)[0][:, : k - 1]
    want = h - (torch.linalg.inv(w) @ (u @ u.T) @ w @ hc.T).T
    got = run(leace_map(x, y, trace_guard=False), x)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guard", [True, False])
def test_nothing_linear_is_left_and_the_trace_is_guarded(guard):
    x, y = labelled(k=3)
    out = run(leace_map(x, y, trace_guard=guard), x).double()
    means = torch.stack([out[y == i].mean(0) for i in range(3)])
    torch.testing.assert_close(means, out.mean(0).expand(3, -1), atol=1e-4, rtol=0)
    if guard:
        assert float(torch.cov(out.T).trace()) <= float(torch.cov(x.double().T).trace()) * (1 + 1e-6)


def test_the_guard_matters_and_still_erases():
    """A covariance so oblique that LEACE alone makes the states vary more."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 2
    base = torch.randn(2000, 2, generator=g) * torch.tensor([1.0, 0.05])
    x = base @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) + (2.0 * y[:, None]) * torch.tensor([1.0, 0.0])
    total = float(torch.cov(x.T).trace())
    loose, tight = (run(leace_map(x, y, trace_guard=g), x) for g in (False, True))
    if float(torch.cov(loose.T).trace()) > total:
        assert float(torch.cov(tight.T).trace()) == pytest.approx(total, rel=1e-4)
    torch.testing.assert_close(tight[y == 0].mean(0), tight[y == 1].mean(0), atol=1e-4, rtol=0)


def test_leace_on_a_model_erases_the_planted_label(planted):
    texts, labels = [[40 + i] for i in range(30)] + [[70 + i] for i in range(30)], ["yes"] * 30 + ["no"] * 30
    made = steering.leace(planted.m, texts, labels, layer=1, shrink=True)
    with planted.m.intervene(made):
        h = torch.stack([planted.m.capture(torch.tensor([t]), "resid_post[1]")["resid_post[1]"][0, 0] for t in texts])
    gap = h[:30].mean(0) - h[30:].mean(0)
    assert float(gap.norm()) < 1e-3
    with pytest.raises(SteeringError, match="all are of one kind"):
        steering.leace(planted.m, texts, ["yes"] * 60, layer=1)
    with pytest.raises(SteeringError, match="there are 2 for 60 texts"):
        steering.leace(planted.m, texts, ["yes", "no"], layer=1)


# -- conceptors ------------------------------------------------------------------------------------------------
def test_conceptor_is_its_formula_and_its_algebra_is_jaegers():
    x, y = gaussian(50, 5, 6), gaussian(50, 5, 7)
    c, b = Conceptor.of(x, 3.0), Conceptor.of(y, 3.0)
    r = x.double().T @ x.double() / 50
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(c.C, r @ torch.linalg.inv(r + eye / 9))
    torch.testing.assert_close((~c).C, eye - c.C)
    torch.testing.assert_close((c & b).C, torch.linalg.inv(torch.linalg.inv(c.C) + torch.linalg.inv(b.C) - eye))
    torch.testing.assert_close((c | b).C, (~(~c & ~b)).C)
    # OR of two conceptors is the conceptor of both data sets put together, R summed (Jaeger, prop. 16)
    both = torch.cat([x, y]).double()
    r2 = both.T @ both / 50
    torch.testing.assert_close((c | b).C, r2 @ torch.linalg.inv(r2 + eye / 9), atol=1e-6, rtol=1e-6)
    value = torch.linalg.eigvalsh((c & b).C)
    assert float(value.min()) >= -1e-9
    assert float(value.max()) <= 1 + 1e-9


def test_and_of_conceptors_that_do_not_fill_the_space_is_their_intersection():
    one, two = (torch.zeros(20, 4).index_copy(1, torch.tensor(i), torch.randn(20, 2)) for i in ([0, 1], [1, 2]))
    both = (Conceptor.of(one, 1e6) & Conceptor.of(two, 1e6)).C
    want = torch.zeros(4, 4, dtype=torch.float64)
    want[1, 1] = 1
    torch.testing.assert_close(both, want, atol=1e-5, rtol=0)


def test_conceptor_steers_with_beta_and_about_a_mean(m):
    c = steering.conceptor(m, ROWS, 1, aperture=0.5)
    h = torch.randn(3, 32)
    torch.testing.assert_close(
        run(steering.conceptor_map(m, c, 1, beta=2.0).parts[0].map, h), 2 * h @ c.C.float(), atol=1e-5, rtol=1e-4
    )
    centre = torch.randn(32)
    about = steering.conceptor_map(m, c, 1, centre=centre).parts[0].map
    torch.testing.assert_close(run(about, h), (h - centre) @ c.C.float() + centre, atol=1e-4, rtol=1e-4)
    with pytest.raises(SteeringError, match="aperture=0"):
        Conceptor.of(h, 0)
