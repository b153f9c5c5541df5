"""The figures of a quality report, as functions of pictures and features; numpy, float64.

Features are EfficientNet-Lite0's (1280 a picture), so distances between sets are comparable with one another and not
with a published Inception FID. Intervals are 95 %: the percentile bootstrap (Efron & Tibshirani, 1993, chapter 13) for
means and medians over pictures; Wilson's for shares of pictures, since a bootstrap of no hits at all is certain of it;
for distances between sets the delete-d jackknife (Shao & Wu, 1989), since drawing a
picture twice, as a bootstrap does, makes a set narrower than it is and moves such a distance by more than its spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ldm_export.errors import InputError

Array = npt.NDArray[Any]

RESAMPLES = 1000
JACKKNIFES = 100
DELETED = 0.2
ROWS = 256
"""How many rows of a large matrix are made at a time."""
NORMAL = 1.96
LUMA = (0.299, 0.587, 0.114)
WINDOW, SIGMA = 11, 1.5


class Figure(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


# --- pictures -------------------------------------------------------------------------------------------------------


def psnr_db(ours: Array, theirs: Array) -> float:
    """Peak signal-to-noise ratio of two pictures, uint8 of one shape: 10 log10(255^2 / mean squared error), in dB.

    Infinite for equal pictures; 45 dB is beyond what an eye can tell, 30 dB is a visible difference.
    """
    if ours.shape != theirs.shape or ours.dtype != np.uint8 or theirs.dtype != np.uint8:
        raise InputError(
            f"pictures of shape {ours.shape} {ours.dtype} and {theirs.shape} {theirs.dtype} cannot be compared; "
            "both must be uint8 of one shape. Draw them at the same size."
        )
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def psnr(ours: Array, theirs: Array) -> Array:
    """Peak signal-to-noise ratio of each pair of pictures, uint8 (N, H, W, C): (N,), dB, at most 100."""
    return np.array([min(psnr_db(a, b), 100.0) for a, b in zip(ours, theirs, strict=True)])


def ssim(ours: Array, theirs: Array) -> Array:
    """Structural similarity of each pair of pictures, uint8 (N, H, W, C), on luma: (N,), at most 1.

    Wang et al. (2004), eq. 13 averaged over all whole windows: Gaussian weights, 11 x 11, deviation 1.5;
    C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2.

    Raises
    ------
    InputError
        If the pictures are smaller than one window.
    """
    if min(ours.shape[1:3]) < WINDOW:
        raise InputError(
            f"Pictures of {ours.shape[1]} x {ours.shape[2]} are too small for SSIM; {WINDOW} is the least."
        )
    x, y = _luma(ours), _luma(theirs)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return np.asarray((above / below).mean(axis=(1, 2)))


def _luma(images: Array) -> Array:
    values = images.astype(np.float64, order="C")  # sums round by the order in memory
    return values[..., 0] if images.shape[-1] == 1 else values @ np.array(LUMA)


def _blur(x: Array) -> Array:
    """Weighted means of all whole windows: (N, H, W) -> (N, H - 10, W - 10)."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        x = np.asarray(np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=axis) @ kernel)
    return x


# --- sets of features -----------------------------------------------------------------------------------------------


def frechet_distance(a: Array, b: Array) -> float:
    """Fréchet distance between two sets of features (N, D) and (M, D), taken as normal (Heusel et al., 1706.08500).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). With A and B the centred sets over the root of their size
    less one, C_a = A^T A and C_b = B^T B, and the trace of the root is the sum of the singular values of A B^T, N x M:
    exact for fewer pictures than dimensions, where a root of the D x D product is not.

    Of samples it is larger than of the distributions, the more so the smaller they are: only distances between sets of
    the same sizes can be compared.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    centred_a = (a - mean_a) / np.sqrt(len(a) - 1)
    centred_b = (b - mean_b) / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()
    spread = (centred_a**2).sum() + (centred_b**2).sum()
    return float(((mean_a - mean_b) ** 2).sum() + spread - 2 * cross)


def kernel_distance(a: Array, b: Array) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)^3 (Bińkowski et al., 1801.01401).

    Around 0 for two sets of one distribution, so it may be negative.
    """
    width = a.shape[1]

    def kernel(x: Array, y: Array) -> Array:
        return np.asarray((x @ y.T / width + 1.0) ** 3)

    def within(x: Array) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def cosines(a: Array, b: Array) -> Array:
    """Cosine of every row of ``a`` (N, D) with every row of ``b`` (M, D): (N, M)."""
    return np.asarray(_unit(a) @ _unit(b).T)


def _unit(x: Array) -> Array:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))


def nearest_distance(a: Array, b: Array) -> Array:
    """Distance, 1 - cosine, from every row of ``a`` to the nearest of ``b``: (N,)."""
    parts = np.array_split(a, -(-len(a) // ROWS))
    return np.concatenate([1.0 - cosines(part, b).max(axis=1) for part in parts])


def recalled(drawn: Array, gallery: Array, own: Array, k: int) -> Array:
    """Whether a picture of its own prompt is among the ``k`` of the gallery nearest to each drawn one: (N,) of 0 and 1.

    Parameters
    ----------
    drawn, gallery : features (N, D) and (M, D); nearness is the cosine
    own : (N, M) bool, which pictures of the gallery are of the prompt
    """
    order = np.argsort(-cosines(drawn, gallery), axis=1, kind="stable")[:, :k]
    return np.asarray(np.take_along_axis(own, order, axis=1).any(axis=1), np.float64)


# --- intervals ------------------------------------------------------------------------------------------------------


def over_pictures(values: Array, statistic: Callable[..., Any] = np.mean, seed: int = 0) -> Figure:
    """Mean (or another statistic that takes an axis) of one value a picture, with its percentile bootstrap interval."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[picks], axis=1), (0.025, 0.975))
    return Figure(float(statistic(values)), float(low), float(high))


def over_hits(hits: Array) -> Figure:
    """Share of the pictures for which something is so, with its score interval (Wilson, 1927); ``hits`` are 0 and 1."""
    share, each = float(np.mean(hits)), NORMAL**2 / len(hits)
    middle = (share + each / 2) / (1 + each)
    half = np.sqrt(share * (1 - share) * each + each**2 / 4) / (1 + each)
    return Figure(share, min(share, float(middle - half)), max(share, float(middle + half)))


def over_sets(distance: Callable[[Array, Array], float], a: Array, b: Array, seed: int = 0) -> Figure:
    """A distance between two sets, with its delete-d jackknife interval."""
    return over_jackknifes(distance(a, b), jackknifes(distance, a, b, seed))


def jackknifes(distance: Callable[[Array, Array], float], a: Array, b: Array, seed: int = 0) -> Array:
    """A distance between two sets a hundred times, each time without a fifth of each: (100,).

    What is left out depends on the sizes of the sets and the seed alone: of sets that are paired, picture by picture,
    the same pictures.
    """
    generator = np.random.default_rng(seed)
    kept = [max(2, round(len(x) * (1 - DELETED))) for x in (a, b)]

    def without() -> float:
        parts = (x[generator.permutation(len(x))[:count]] for x, count in zip((a, b), kept, strict=True))
        return distance(*parts)

    return np.array([without() for _ in range(JACKKNIFES)])


def over_jackknifes(value: float, jackknifed: Array) -> Figure:
    """A value of whole sets, and its interval by the values of what :func:`jackknifes` keeps of them.

    The variance is (1 - f) / f times theirs, f being the share left out. They all have one size and so one bias, which
    drops out.
    """
    deviation = float(np.std(jackknifed) * np.sqrt((1 - DELETED) / DELETED))
    return Figure(value, value - NORMAL * deviation, value + NORMAL * deviation)
