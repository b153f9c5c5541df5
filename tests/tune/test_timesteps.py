"""Choice of calls and least squares, against brute force and numpy's own solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ldm_export.tune import timesteps
from ldm_export.tune.timesteps import choose_calls, inner_products, least_squares, regressors
from ldm_export.tune.trajectories import Trajectories

STEPS = 9


@pytest.fixture(scope="module")
def trajectories() -> Trajectories:
    """Smooth curves of a linear system: latents that outputs move."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((6, 6)) / 6
    x = generator.standard_normal((5, 6))
    latents, outputs = [x], []
    for step in range(STEPS):
        outputs.append(np.tanh(latents[-1] @ mixing + np.cos(step / 3)))
        latents.append(latents[-1] * 0.95 + 0.2 * outputs[-1])
    shape = (-1, 5, 6, 1, 1)
    return Trajectories(np.array(latents, np.float32).reshape(shape), np.array(outputs, np.float32).reshape(shape))


def test_inner_products_are_means_over_all_values(trajectories: Trajectories) -> None:
    products = inner_products(trajectories)
    x, out = trajectories.latents[3].ravel().astype(float), trajectories.outputs[7].ravel().astype(float)
    assert products.shape == (2 * STEPS + 1, 2 * STEPS + 1)
    assert products[3, STEPS + 1 + 7] == pytest.approx(x @ out / x.size, rel=1e-12)


def test_a_row_is_made_of_the_latents_and_the_last_five_outputs() -> None:
    assert regressors([0], 9) == [0, 10]
    assert regressors([0, 2, 3, 4, 5, 7, 8], 9) == [8, 18, 17, 15, 14, 13]


def test_least_squares_without_a_ridge_are_numpys(trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timesteps, "RIDGE", 0.0)
    products, chosen = inner_products(trajectories), regressors([0, 2], STEPS)
    found = least_squares(products[np.ix_(chosen, chosen)], products[chosen, 5])
    values = np.stack(
        [trajectories.latents[2].ravel(), trajectories.outputs[2].ravel(), trajectories.outputs[0].ravel()]
    )
    expected = np.linalg.lstsq(values.T.astype(float), trajectories.latents[5].ravel().astype(float), rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_ridge_holds_a_row_to_a_one_step_method() -> None:
    """Three regressors of which two are nearly the same: the third is left out rather than weighed hugely."""
    generator = np.random.default_rng(1)
    x, out = generator.standard_normal((2, 1000))
    values = np.stack([x, out, out + 1e-7 * generator.standard_normal(1000)])
    goal = 0.9 * x + 0.3 * out + 1e-3 * generator.standard_normal(1000)
    found = least_squares(values @ values.T / 1000, values @ goal / 1000)
    assert np.abs(found).max() < 1
    np.testing.assert_allclose(found @ values, goal, atol=5e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_calls_are_the_best_of_all(trajectories: Trajectories, count: int) -> None:
    """The last two calls say all of a row where it remembers one output, and so the search is exact there."""
    products, gains = inner_products(trajectories), np.linspace(0.3, 1.0, STEPS + 1)

    def total(calls: tuple[int, ...]) -> float:
        cost = 0.0
        for number, end in enumerate([*calls[1:], STEPS]):
            chosen = regressors(calls[: number + 1], STEPS)
            solved = least_squares(products[np.ix_(chosen, chosen)], products[chosen, end])
            values = np.concatenate([trajectories.latents, trajectories.outputs]).reshape(2 * STEPS + 1, -1)
            cost += gains[end] ** 2 * float(np.mean((solved @ values[chosen] - values[end]) ** 2))
        return cost

    found = choose_calls(products, gains, count)
    every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
    allowed = [c for c in every if max(np.diff([*c, STEPS])) <= max(2, int(timesteps.WIDEST * STEPS / count))]
    best = min(allowed, key=total)
    assert total(tuple(found)) <= total(best) * (1.0 if count < 4 else 1.1) + 1e-12


def test_calls_crowd_where_an_error_counts() -> None:
    """With errors alike everywhere, gains that grow pull calls to where they are large."""
    generator = np.random.default_rng(2)
    outputs = generator.standard_normal((20, 4, 8, 1, 1)).astype(np.float32)
    latents = np.concatenate([np.zeros((1, 4, 8, 1, 1), np.float32), np.cumsum(outputs, 0)])
    products = inner_products(Trajectories(latents, outputs))
    late = choose_calls(products, np.linspace(0.01, 1.0, 21) ** 2, 8)
    early = choose_calls(products, np.linspace(1.0, 0.01, 21) ** 2, 8)
    assert np.mean(late) > np.mean(early) + 1
