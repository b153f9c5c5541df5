"""Where the calls of a fitted plan are made: chosen by dynamic programming over a model's own trajectories.

On trajectories of n steps, with latents x_i before call i and outputs out_i, a row from call i to call j is the least
squares fit of x_j to x_i, out_i and the outputs of up to four calls before; its error e_ij is known without any call of
the network, from the inner products of all of these. What an error at x_j does to the picture is measured: the gain g_j
is how much larger a small change of x_j is at the end. The calls are those with the least sum of (g_j e_ij)^2.

GITS (2409.18114, section 4) chooses timesteps by dynamic programming likewise, with the errors of Euler's method for
costs and no gains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ldm_export.plan import MAX_HISTORY
from ldm_export.runtime.graph import Array
from ldm_export.tune.trajectories import Trajectories

Matrix = npt.NDArray[np.float64]

RIDGE = 1e-3
"""Weight of the regularisation, against regressors that were scaled to a mean square of 1."""
NEARLY_NONE = 1e-9
OLDER = MAX_HISTORY - 1
"""Outputs of earlier calls that a row may weigh."""
WIDEST = 2.5
"""Longest gap between calls, as a multiple of the mean one."""
PICTURES = 8


def inner_products(trajectories: Trajectories) -> Matrix:
    """Mean products of all latents x_0 to x_n and outputs out_0 to out_(n-1) with one another: (2 n + 1, 2 n + 1)."""
    count = trajectories.latents.shape[1]
    total = np.zeros((1, 1))
    for start in range(0, count, PICTURES):
        part = slice(start, start + PICTURES)
        both = np.concatenate([trajectories.latents[:, part], trajectories.outputs[:, part]])
        rows = both.reshape(len(both), -1).astype(np.float64)
        total = total + rows @ rows.T
    return np.asarray(total / trajectories.latents[0].size)


def regressors(calls: Sequence[int], steps: int) -> list[int]:
    """Numbers, among `inner_products`, of what a row is made of: latents and output of the last of these calls, then
    the outputs of those before, newest first."""
    newest = list(calls[::-1][: OLDER + 1])
    return [newest[0], *(steps + 1 + call for call in newest)]


def least_squares(products: Matrix, right: Matrix) -> Matrix:
    """Coefficients of a fit, from the regressors' inner products (p, p) and those with the goal (p,).

    Those of the latents and the newest output, the first two, are fitted alone; then all, with a ridge towards that: a
    row leaves a one-step method by as much as the data ask for, and no more (Tikhonov).
    """
    scale = np.sqrt(np.diag(products).clip(1e-30))
    products, right = products / np.outer(scale, scale), right / scale
    prior = np.zeros(len(right))
    prior[:2] = np.linalg.solve(products[:2, :2] + NEARLY_NONE * np.eye(2), right[:2])
    found = prior + np.linalg.solve(products + RIDGE * np.eye(len(right)), right - products @ prior)
    return np.asarray(found / scale)


def choose_calls(products: Matrix, gains: Array, count: int) -> list[int]:
    """Numbers of the calls, from 0 on, of ``count``.

    Parameters
    ----------
    products : `inner_products` of trajectories of n steps
    gains : (n + 1,), of a change of x_0 to x_n
    """
    steps = len(gains) - 1
    furthest = max(2, int(WIDEST * steps / count))

    def cost(path: list[int], end: int) -> float:
        chosen = regressors(path, steps)
        right = products[chosen, end]
        coefficients = least_squares(products[np.ix_(chosen, chosen)], right)
        error = (
            products[end, end]
            - 2 * coefficients @ right
            + coefficients @ products[np.ix_(chosen, chosen)] @ coefficients
        )
        return float(gains[end] ** 2 * max(error, 0.0))

    # the best way to each pair of last calls, which say most of what the next row is made of
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for left in reversed(range(1, count + 1)):
        longer: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for total, path in best.values():
            last = path[-1]
            ends = range(last + 1, min(last + furthest, steps - left + 1) + 1) if left > 1 else [steps]
            for end in ends:
                reached = total + cost(path, end)
                if end - last <= furthest and reached < longer.get((last, end), (np.inf, []))[0]:
                    longer[last, end] = reached, [*path, end]
        best = longer
    return min(best.values())[1][:-1]
