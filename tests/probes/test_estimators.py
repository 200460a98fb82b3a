"""Probes equal scikit-learn's or a closed form, and keep its interface."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import probes

ALL = [probes.LinearProbe(), probes.MeanDifference(), probes.NearestMean(), probes.LDA(), probes.RidgeProbe(),
       probes.KSparseProbe(k=2)]  # fmt: skip


def data(classes: int, n: int = 1500, d: int = 20, seed: int = 0):
    """Features whose scales differ a thousandfold, as in a residual stream."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, d))
    y = (z @ rng.normal(size=(d, classes)) + rng.gumbel(size=(n, classes))).argmax(1)
    return z * np.logspace(-1, 2, d) + 3, y


@pytest.mark.parametrize("probe", ALL, ids=lambda p: type(p).__name__)
def test_keeps_scikit_learns_contract(probe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = check_estimator(probe, on_fail=None)
    assert [(r["check_name"], str(r["exception"])) for r in done if r["status"] == "failed"] == []
    assert len(done) > 40


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("standardize", [False, True])
def test_logistic_is_scikit_learns_minimum_in_few_passes(classes, standardize):
    X, y = data(classes)
    mine = probes.LinearProbe(C=0.7, standardize=standardize, tol=1e-8).fit(X, y)
    theirs = LogisticRegression(C=0.7, tol=1e-8, max_iter=500, solver="newton-cg" if classes > 2 else "newton-cholesky")
    if standardize:
        pipe = make_pipeline(StandardScaler(), theirs).fit(X, y)
        expected = theirs.coef_ / pipe[0].scale_
        np.testing.assert_allclose(mine.decision_function(X), pipe.decision_function(X), atol=2e-3)
    else:
        expected = theirs.fit(X, y).coef_
    np.testing.assert_allclose(mine.coef_, expected, atol=1e-4 * np.abs(expected).max())
    assert mine.n_iter_ < 60


@pytest.mark.parametrize("classes", [2, 5])
def test_many_float32_rows_give_scikit_learns_minimum_too(classes):
    """100,000 rows, where the fit begins on a sample of them, with means that dwarf the spread."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((100_000, 24), dtype=np.float32)
    y = (z @ rng.normal(size=(24, classes)) + rng.gumbel(size=(len(z), classes))).argmax(1)
    X = (z * np.logspace(-1, 2, 24) + 300).astype(np.float32)
    scale = StandardScaler().fit(X.astype(float))
    theirs = LogisticRegression(C=0.01, tol=1e-8, solver="newton-cholesky").fit(scale.transform(X.astype(float)), y)
    mine = probes.LinearProbe(C=0.01).fit(X, y)
    np.testing.assert_allclose(mine.coef_ * scale.scale_, theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
    assert (mine.predict(X) == theirs.predict(scale.transform(X.astype(float)))).mean() > 0.9995
    assert mine.n_iter_ < 20


def easy(n: int = 60_000, d: int = 24):
    """A question that a probe answers with certainty on nearly all rows, as of the texts that tokens stand in."""
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((n // 100, d)).repeat(100, 0)
    X = texts + 0.2 * rng.standard_normal((n, d))
    return X.astype(np.float32), (texts @ rng.standard_normal(d) > 5).astype(int)


def test_an_easy_question_takes_few_passes_and_ends_no_higher_than_scikit_learn():
    X, y = easy()
    mine = probes.LinearProbe(C=0.1, standardize=False).fit(X, y)
    theirs = LogisticRegression(C=0.1, max_iter=1000).fit(X, y)

    def objective(p):
        score = X.astype(float) @ p.coef_[0].astype(float) + float(p.intercept_[0])
        return 0.5 * (p.coef_.astype(float) ** 2).sum() + 0.1 * np.logaddexp(0, score * (1 - 2 * y)).sum()

    assert objective(mine) <= objective(theirs) * (1 + 1e-7)
    assert mine.n_iter_ < 15
    assert mine.score(X, y) > 0.97


def hard_cases():
    """Many rows, each a way in which a few of them fail to stand for all."""
    rng = np.random.default_rng(0)
    n, d = 20_000, 12
    z = rng.standard_normal((n, d), dtype=np.float32)
    score = z @ rng.standard_normal(d, dtype=np.float32)
    noise = rng.logistic(size=n)
    massive = z.copy()
    massive[::500, 3] = 2000 + 100 * z[::500, 3]  # one dimension, on one row of 500, as of a text's first token
    graded = (z * np.logspace(-3, 3, d)).astype(np.float32)
    sparse = np.where(rng.random((n, d)) < 0.002, 10 * z, 0).astype(np.float32)  # directions that few rows have
    sparse[:, 0] = z[:, 0]
    rare = (score + noise > np.quantile(score + noise, 0.99)).astype(int)
    yield "separable", z, (score > 0).astype(int)
    yield "massive", massive, (score + noise > 0).astype(int)
    yield "graded", graded, (score + noise > 0).astype(int)
    yield "sparse", sparse, (3 * sparse.sum(1) + noise > 0).astype(int)
    yield "one in a hundred", z, rare
    yield "three classes, one in a hundred", z, np.where(rare, 2, score + noise[::-1] > 0)


@pytest.mark.parametrize("standardize", [True, False])
def test_hard_cases_end_where_newtons_method_does(standardize):
    for name, X, y in hard_cases():
        wide = X.astype(float)
        scaled = StandardScaler().fit_transform(wide) if standardize else wide
        theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=500, solver="newton-cholesky").fit(scaled, y)
        mine = probes.LinearProbe(C=0.1, standardize=standardize).fit(X, y)
        scale = wide.std(0) if standardize else 1.0

        def objective(weight, bias, features, scale=1.0, y=y):
            s = features @ weight.T.astype(float) + bias
            s = np.concatenate([0 * s, s], 1) if s.shape[1] == 1 else s
            loss = np.logaddexp.reduce(s, axis=1) - s[np.arange(len(s)), y]
            return 0.5 * ((weight * scale) ** 2).sum() + 0.1 * loss.sum()

        least = objective(theirs.coef_, theirs.intercept_, scaled)
        assert objective(mine.coef_, mine.intercept_, wide, scale) <= least * (1 + 1e-5), name
        assert mine.n_iter_ < 40, name
        assert (mine.predict(X) == theirs.predict(scaled)).mean() > 0.999, name


def test_what_all_classes_share_is_nothing():
    """A vector added to every class's changes no probability, so at the minimum of the penalty their sum is 0."""
    X, y = data(4, n=20_000)
    p = probes.LinearProbe(C=0.1, standardize=False).fit(X.astype(np.float32), y)
    assert np.abs(p.coef_.sum(0)).max() < 1e-5 * np.abs(p.coef_).max()


def test_the_others_too_on_many_float32_rows():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((100_000, 24), dtype=np.float32)
    y = (z @ rng.normal(size=24) + rng.logistic(size=len(z)) > 0).astype(int)
    X = (z * np.logspace(-1, 2, 24) + 300).astype(np.float32)
    for one, other in [
        (probes.RidgeProbe(alpha=3.0), RidgeClassifier(alpha=3.0)),
        (probes.LDA(shrinkage=None), LinearDiscriminantAnalysis(solver="lsqr")),
        (probes.NearestMean(), NearestCentroid()),
    ]:
        same = one.fit(X, y).predict(X) == other.fit(X.astype(float), y).predict(X.astype(float))
        assert same.mean() > 0.9995, one


def test_a_rare_class_that_the_sample_misses_is_fitted_all_the_same():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40_000, 4), dtype=np.float32)
    y = np.zeros(len(X), int)
    y[rng.integers(len(X), size=3)] = 1
    theirs = LogisticRegression(C=1.0, tol=1e-9, solver="newton-cholesky").fit(X, y)
    mine = probes.LinearProbe(C=1.0, standardize=False, tol=1e-8).fit(X, y)
    np.testing.assert_allclose(mine.coef_, theirs.coef_, atol=1e-3)


def test_a_path_of_penalties_is_each_of_them_alone():
    X, y = data(3)
    for found, C in zip(probes.LinearProbe.path(X, y, [1.0, 0.001, 0.1], tol=1e-8), [1.0, 0.001, 0.1], strict=True):
        alone = probes.LinearProbe(C=C, tol=1e-8).fit(X, y)
        np.testing.assert_allclose(found.coef_, alone.coef_, atol=1e-5 * np.abs(alone.coef_).max())
        assert found.C == C


@pytest.mark.parametrize("probe", [probes.AttentionProbe(steps=3), probes.CCS(starts=2), probes.MultiLabelProbe(C=2.0)],
                         ids=lambda p: type(p).__name__)  # fmt: skip
def test_probes_on_other_shapes_can_be_cloned_and_set(probe):
    """Their data is not [sample, feature] with one label, so scikit-learn's whole check does not apply."""
    copy = clone(probe)
    assert copy.get_params() == probe.get_params()
    name = next(iter(copy.get_params()))
    assert copy.set_params(**{name: 7}).get_params()[name] == 7


@pytest.mark.parametrize("classes", [2, 3])
def test_the_others_equal_scikit_learns(classes):
    X, y = data(classes)
    for mine, theirs in [
        (probes.RidgeProbe(alpha=3.0), RidgeClassifier(alpha=3.0)),
        (probes.LDA(shrinkage="auto"), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")),
    ]:
        mine.fit(X, y)
        theirs.fit(X, y)
        np.testing.assert_allclose(mine.decision_function(X), theirs.decision_function(X), atol=1e-8)
    assert (probes.NearestMean().fit(X, y).predict(X) == NearestCentroid().fit(X, y).predict(X)).all()


def test_ridge_with_fewer_samples_than_features_is_the_same_closed_form():
    X, y = data(2, n=30, d=60)
    with pytest.warns(probes.ProbeWarning, match="30 samples for 60 features"):
        mine = probes.RidgeProbe(alpha=2.0).fit(X, y)
    np.testing.assert_allclose(mine.coef_, np.atleast_2d(RidgeClassifier(alpha=2.0).fit(X, y).coef_), atol=1e-9)


def test_difference_of_means_is_that():
    X, y = data(2)
    p = probes.MeanDifference().fit(X, y)
    gap = X[y == 1].mean(0) - X[y == 0].mean(0)
    np.testing.assert_allclose(p.coef_[0], gap)
    np.testing.assert_allclose(p.direction_, gap / np.linalg.norm(gap))
    middle = (X[y == 1].mean(0) + X[y == 0].mean(0)) / 2
    assert abs(p.decision_function(middle[None])[0]) < 1e-8


def test_k_sparse_finds_the_planted_features_and_uses_only_them():
    rng = np.random.default_rng(1)
    y = rng.integers(2, size=800)
    X = rng.normal(size=(800, 100))
    X[:, [7, 42]] += 1.5 * y[:, None]
    p = probes.KSparseProbe(k=2).fit(X, y)
    assert set(p.support_.tolist()) == {7, 42}
    assert set(np.flatnonzero(p.coef_[0]).tolist()) == {7, 42}
    assert p.score(X, y) > 0.8


def test_attention_probe_looks_where_the_answer_stands():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=300)
    X = rng.normal(size=(300, 12, 16)).astype(np.float32)
    where = rng.integers(12, size=300)
    X[np.arange(300), where, 0] += 6  # a mark, at a place of its own in every text
    X[np.arange(300), where, 1] += 4 * (2 * y - 1)
    p = probes.AttentionProbe().fit(X[:200], y[:200])
    assert p.score(X[200:], y[200:]) > 0.95
    # One head needs to find the mark of one class only; where it finds none, the text is of the other.
    found = p.attention(X[200:])[..., 0].argmax(1) == where[200:]
    assert max(found[y[200:] == c].mean() for c in (0, 1)) > 0.95
    assert probes.LinearProbe().fit(X[:200, -1], y[:200]).score(X[200:, -1], y[200:]) < 0.75


def test_attention_probe_ignores_padding():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 6, 4)).astype(np.float32), np.arange(40) % 2
    mask = np.ones((40, 6), bool)
    mask[:, 4:] = False
    p = probes.AttentionProbe(steps=20).fit(X, y, mask)
    other = X.copy()
    other[:, 4:] = 1e6
    np.testing.assert_array_equal(p.predict_proba(X, mask), p.predict_proba(other, mask))


def test_ccs_finds_truth_without_labels():
    rng = np.random.default_rng(0)
    n, d = 400, 24
    truth, direction, negation = rng.integers(2, size=n), rng.normal(size=d), 5 * rng.normal(size=d)
    base = rng.normal(size=(n, d))
    side = (2 * truth - 1)[:, None] * direction
    X = np.stack([base + side, base - side + negation], 1)  # "not" moves all negations, whatever is true
    p = probes.CCS(steps=400).fit(X[:300])
    hit = p.score(X[300:], truth[300:])
    assert max(hit, 1 - hit) > 0.95
    assert probes.CCS(steps=400).fit(X[:300], truth[:300]).score(X[300:], truth[300:]) > 0.95
    assert p.loss_ < 0.1


def test_multilabel_is_a_probe_per_label():
    X, _ = data(2)
    y = np.stack([X[:, 0] > 3, X[:, 1] > 3], 1).astype(int)
    p = probes.MultiLabelProbe().fit(X, y)
    np.testing.assert_array_equal(p.predict(X)[:, 1], probes.LinearProbe().fit(X, y[:, 1]).predict(X))
    assert p.score(X, y) > 0.95


def test_calibration_mends_overconfidence_and_keeps_the_direction():
    X, y = data(2)
    p = probes.LinearProbe().fit(X[:700], y[:700])
    loud = probes.calibrated(p, X[700:1100], y[700:1100])
    loud.coef_ *= 8
    loud.intercept_ *= 8
    mended = probes.calibrated(loud, X[700:1100], y[700:1100])
    before = probes.calibration(y[1100:], loud.predict_proba(X[1100:])[:, 1])
    after = probes.calibration(y[1100:], mended.predict_proba(X[1100:])[:, 1])
    assert after["ece"] < 0.06 < before["ece"]
    np.testing.assert_allclose(mended.direction_, p.direction_, atol=1e-6)


@pytest.mark.parametrize("probe", ALL, ids=lambda p: type(p).__name__)
def test_saves_and_loads(probe, tmp_path):
    X, y = data(3)
    names = np.array(["law", "code", "maths"])[y]
    p = probe.__class__(**probe.get_params()).fit(X, names)
    probes.save(p, tmp_path / "p", intended_use="tests")
    again = probes.load(tmp_path / "p")
    assert (again.predict(X) == p.predict(X)).all()
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["card.json", "probe.safetensors"]


@pytest.mark.parametrize("probe", [probes.LinearProbe(), probes.RidgeProbe(), probes.KSparseProbe(k=40)],
                         ids=lambda p: type(p).__name__)  # fmt: skip
def test_fewer_samples_than_features_are_warned_of_and_regularised(probe):
    X, y = data(2, n=30, d=60)
    with pytest.warns(probes.ProbeWarning, match="30 samples for"):
        probe.fit(X, y)
    assert np.isfinite(probe.coef_).all()


@pytest.mark.parametrize("probe", ALL, ids=lambda p: type(p).__name__)
def test_bad_data_is_named_by_every_probe(probe):
    X, y = data(2, n=60)
    with pytest.raises(probes.ProbeError, match="one class only"):
        probe.fit(X, np.zeros(60))
    with pytest.raises(probes.ProbeError, match="59 labels and X 60 rows"):
        probe.fit(X, y[:-1])
    with pytest.raises(ValueError, match="NaN"):
        probe.fit(np.where(X > 3, np.nan, X), y)


def test_bad_input_is_named():
    X, y = data(2, n=60)
    with pytest.raises(probes.ProbeError, match="C=-1"):
        probes.LinearProbe(C=-1).fit(X, y)
    with pytest.raises(probes.ProbeError, match="one vector per class"):
        _ = probes.MeanDifference().fit(*data(3)).direction_
    with pytest.raises(probes.ProbeError, match=r"expected \[pair, 2, feature\]"):
        probes.CCS().fit(X)
    with pytest.raises(probes.ProbeError, match=r"expected \[text, pos, feature\]"):
        probes.AttentionProbe().fit(X, y)
    with pytest.raises(probes.ProbeError, match=r"no probe\.safetensors"):
        probes.load("nowhere")
    with pytest.raises(AttributeError, match="probes has no 'Lienar'"):
        _ = probes.Lienar
