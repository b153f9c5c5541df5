"""Every figure against another way to compute it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_export.errors import InputError
from ldm_export.verify import metrics
from ldm_export.verify.metrics import (
    cosines,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    over_hits,
    over_pictures,
    over_sets,
    psnr,
    recalled,
    ssim,
)


def pictures(seed: int, count: int = 2, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 18, channels), np.uint8)


def test_psnr_of_a_known_difference() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    other = black.copy()
    other[1] = 10
    assert psnr(black, other) == pytest.approx([100.0, 20 * math.log10(255 / 10)])


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_paper_s_window_by_window(channels: int) -> None:
    a, b = pictures(0, channels=channels), pictures(1, channels=channels)
    b = (0.7 * a + 0.3 * b).astype(np.uint8)
    weights = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weights /= weights.sum()
    luma = np.array([1.0]) if channels == 1 else np.array([0.299, 0.587, 0.114])
    for k, value in enumerate(ssim(a, b)):
        x, y, found = a[k] @ luma, b[k] @ luma, []
        for row in range(6):
            for column in range(8):
                p, q = (z[row : row + 11, column : column + 11] for z in (x, y))
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                c = (weights * (p - mp) * (q - mq)).sum()
                above = (2 * mp * mq + 6.5025) * (2 * c + 58.5225)
                found.append(above / ((mp**2 + mq**2 + 6.5025) * (vp + vq + 58.5225)))
        assert value == pytest.approx(np.mean(found), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"16 x 10 are too small for SSIM; 11 is the least\."):
        ssim(a[:, :, :10], b[:, :, :10])


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def test_frechet_is_the_paper_s_with_matrix_roots() -> None:
    draw = np.random.default_rng(0)
    a = draw.normal(size=(50, 6)) @ draw.normal(size=(6, 6))
    b = draw.normal(size=(70, 6)) @ draw.normal(size=(6, 6)) + 0.5
    ca, cb = np.cov(a.T), np.cov(b.T)
    half = root(ca)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root(half @ cb @ half))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_of_fewer_pictures_than_dimensions() -> None:
    """Two normal distributions on different axes: distances of means and all of both variances."""
    draw = np.random.default_rng(1)
    a, b = np.zeros((20, 100)), np.zeros((30, 100))
    a[:, 0], b[:, 1] = draw.normal(size=20) + 3, draw.normal(size=30) + 4
    means = a[:, 0].mean() ** 2 + b[:, 1].mean() ** 2
    variances = a[:, 0].var(ddof=1) + b[:, 1].var(ddof=1)
    assert frechet_distance(a, b) == pytest.approx(means + variances)


def test_kernel_distance_is_the_double_loop() -> None:
    draw = np.random.default_rng(2)
    a, b = draw.normal(size=(7, 5)), draw.normal(size=(9, 5)) + 1

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 5 + 1) ** 3)

    within = [
        sum(kernel(x, y) for i, x in enumerate(z) for j, y in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
        for z in (a, b)
    ]
    across = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 12), st.integers(1, 8))
def test_a_set_is_at_no_distance_from_itself(seed: int, count: int, width: int) -> None:
    a = np.random.default_rng(seed).normal(size=(count, width))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert nearest_distance(a, a) == pytest.approx(np.zeros(count), abs=1e-12)
    assert np.diag(cosines(a, a)) == pytest.approx(1)


def test_distances_grow_as_sets_part() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=(80, 4)), draw.normal(size=(60, 4))
    for distance in (frechet_distance, kernel_distance):
        values = [distance(a, b + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
        assert values == sorted(values)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 9))
def test_retrieval_is_counted_by_rank_and_grows_with_k(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    drawn, gallery = draw.normal(size=(4, 3)), draw.normal(size=(count, 3))
    own = np.zeros((4, count), bool)
    own[np.arange(4), draw.integers(count, size=4)] = True
    hits = [recalled(drawn, gallery, own, k) for k in range(1, count + 1)]
    near = cosines(drawn, gallery)
    ranks = [(near[i] > near[i][own[i]].max()).sum() for i in range(4)]
    for k, hit in enumerate(hits, start=1):
        assert hit.tolist() == [float(rank < k) for rank in ranks]
    assert hits[-1].tolist() == [1.0] * 4


def test_retrieval_takes_any_picture_of_the_prompt() -> None:
    gallery = np.eye(4)
    own = np.array([[True, False, False, True]])
    assert recalled(np.array([[0.1, 0.5, 0.2, 0.9]]), gallery, own, 1).tolist() == [1.0]
    assert recalled(np.array([[0.1, 0.9, 0.2, 0.3]]), gallery, own, 1).tolist() == [0.0]


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        figure = over_pictures(draw.exponential(size=60), seed=trial)
        assert figure.low <= figure.value <= figure.high
        covered += figure.low <= 1.0 <= figure.high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_wilson_covers_a_share_as_often_as_it_says(share: float) -> None:
    draw = np.random.default_rng(7)
    figures = [over_hits(draw.random(60) < share) for _ in range(400)]
    covered = sum(figure.low <= share <= figure.high for figure in figures)
    assert 0.92 <= covered / 400 <= 1.0


def test_no_hits_are_not_certain() -> None:
    """Wilson (1927): with no hit in n, the interval is from 0 to z^2 / (n + z^2)."""
    none, all_of_them = over_hits(np.zeros(16)), over_hits(np.ones(16))
    assert none == pytest.approx((0.0, 0.0, 1.96**2 / (16 + 1.96**2)))
    assert all_of_them == pytest.approx((1.0, 16 / (16 + 1.96**2), 1.0))


def test_nearest_does_not_depend_on_the_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(8)
    a, b = draw.normal(size=(11, 4)), draw.normal(size=(9, 4))
    whole = nearest_distance(a, b)
    monkeypatch.setattr(metrics, "ROWS", 3)
    np.testing.assert_allclose(nearest_distance(a, b), whole, rtol=1e-12, atol=1e-15)


def test_jackknife_of_a_distance_covers_its_spread() -> None:
    """Of the squared distance of two means, whose value between the distributions is 1."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.mean() - b.mean()) ** 2)

    draw = np.random.default_rng(5)
    covered = 0
    for trial in range(100):
        figure = over_sets(distance, draw.normal(size=(80, 1)), draw.normal(size=(60, 1)) + 1, seed=trial)
        covered += figure.low <= 1.0 <= figure.high
    assert 0.85 <= covered / 100 <= 1.0


def test_intervals_are_the_same_each_time() -> None:
    values = np.random.default_rng(6).normal(size=30)
    assert over_pictures(values) == over_pictures(values)
    assert over_pictures(values, np.median).value == np.median(values)
