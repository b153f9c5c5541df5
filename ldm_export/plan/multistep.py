"""Samplers that remember: PLMS, Heun, DPM-Solver++, UniPC and DEIS.

A published update mixes the last few predictions m0 (newest), m1, m2. Here a mixture is its vector of coefficients over
them, so an update is written as in its paper, acts on unit vectors, and what comes out is the row's weights.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Polynomial

from ldm_export.plan.onestep import eps_form, x0_form
from ldm_export.plan.schedule import Grid, Level, SchedulerConfig, Vector
from ldm_export.plan.table import Row

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Linear multistep weights by order, newest first (PNDM, 2202.09778, eq. 9)."""


def plms(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Pseudo linear multistep (PNDM, 2202.09778, eq. 9 and 11) with Stable Diffusion's doubled first step.

    A step is DDIM's with a mixture of the last four outputs for the output. The first step is taken, its end looked
    at, and taken again from its beginning with the mean of both outputs; the second output then leaves the history.
    Whichever step comes first is doubled: diffusers' own image-to-image starts inside its list of doubled timesteps,
    one step early and with the wrong transfer, and is not followed there.
    """

    def transfer(here: Level, there: Level) -> tuple[float, float]:
        """Coefficients of x and of the output in DDIM's deterministic step."""
        x0 = x0_form(config.prediction_type, here)
        eps = eps_form(config.prediction_type, here)
        return there.alpha * x0[0] + there.sigma * eps[0], there.alpha * x0[1] + there.sigma * eps[1]

    keep, gain = transfer(grid.here[step], grid.there[step])
    weights = [gain * weight for weight in ADAMS_BASHFORTH[min(age, 3)]]
    if 0 < age < 4:
        weights.insert(age, 0.0)  # the second output of the doubled step
    row = Row(grid.timesteps[step], from_output=1.0, keep=keep, weights=tuple(weights))
    if age > 0 or step == len(grid.timesteps) - 1:
        return [row]
    again, half = transfer(grid.restart[step], grid.here[step + 1])
    start = again / keep  # the step's beginning is (x - gain * h_1) / keep
    weights = [half / 2, half / 2 - start * gain]
    return [row, Row(grid.timesteps[step + 1], from_output=1.0, keep=start, weights=tuple(weights))]


def heun(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Euler's step, then the trapezoid over both ends (EDM, 2206.00364, algorithm 1 without churn); x0 is remembered.

    With s and n the ratios here and there, Euler ends at x' = (n/s) x + (1 - n/s) h, so the trapezoid's beginning is
    x = (s/n) x' + (1 - s/n) h_1. Its slope is the mean of (x - h_1) / s = (x' - h_1) / n and (x' - h_0) / n, so that
    it ends at x' + (n - s) / 2n (h_1 - h_0).
    """
    here, there = grid.here[step], grid.there[step]
    s, n = here.ratio, there.ratio
    sample, output = x0_form(config.prediction_type, here)
    timestep, scale = grid.timesteps[step], here.alpha
    rows = [Row(timestep, scale, sample * scale, output, config.clip, keep=n / s, weights=(1 - n / s,))]
    if there.sigma > 0:
        sample, output = x0_form(config.prediction_type, there)
        timestep, scale = grid.timesteps[step + 1], there.alpha
        half = (n - s) / (2 * n)
        rows.append(Row(timestep, scale, sample * scale, output, config.clip, keep=1.0, weights=(-half, half)))
    return rows


def dpm_solver_2m(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """DPM-Solver++ multistep, ODE (2211.01095, eq. 8, 9, algorithm 2 and appendix D)."""
    return [_dpm_solver_row(config, grid, step, age, stochastic=False)]


def dpm_solver_2m_sde(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """DPM-Solver++ multistep, SDE (2211.01095, eq. 18 and appendix C)."""
    return [_dpm_solver_row(config, grid, step, age, stochastic=True)]


def _dpm_solver_row(config: SchedulerConfig, grid: Grid, step: int, age: int, *, stochastic: bool) -> Row:
    here, there = grid.here[step], grid.there[step]
    order = min(config.solver_order, age + 1, _order_left(config, grid, step))
    h = there.log_snr - here.log_snr
    if h in (0, math.inf) or (config.euler_at_final and step == len(grid.timesteps) - 1):
        order = 1
    span = 2 * h if stochastic else h
    phi = -math.expm1(-span)
    keep = there.sigma / here.sigma * (math.exp(-h) if stochastic else 1.0)
    noise = there.sigma * math.sqrt(phi) if stochastic else 0.0
    m0, m1, m2 = np.eye(3)
    total = phi * m0
    if order > 1:
        log_snr = [level.log_snr for level in grid.here[step - order + 1 : step + 1]][::-1]
        r0 = (log_snr[0] - log_snr[1]) / h
        slope = (m0 - m1) / r0
        if order == 3:
            r1 = (log_snr[1] - log_snr[2]) / h
            older = (m1 - m2) / r1
            curvature = (slope - older) / (r0 + r1)
            slope = slope + r0 * curvature
            total = total + (1 - phi / h) * slope + (0.5 - (h - phi) / h**2) * curvature
        elif config.solver_type == "heun":
            total = total + (1 - phi / span) * slope
        else:
            total = total + phi / 2 * slope
    return _solver_row(config, grid, step, x0_form(config.prediction_type, here), keep, there.alpha * total, noise)


def unipc(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Unified predictor-corrector on x0 (UniPC, 2302.04867, algorithms 1 and 2, data prediction of appendix E).

    The prediction at x corrects x itself before the next predictor leaves from it. Predictor p and corrector c of the
    step that led here leave from the same place with the same keep, so the corrected sample is x + (c - p) . m.
    """

    def order_of(step: int, age: int) -> int:
        left = len(grid.timesteps) - step if config.lower_order_final else config.solver_order
        return min(config.solver_order, age + 1, left)

    here, there = grid.here[step], grid.there[step]
    total = _unipc_weights(config, grid, step, order_of(step, age), corrector=False)[1:]
    keep = there.sigma / here.sigma
    if age > 0:
        previous = order_of(step - 1, age - 1)
        total += keep * _unipc_weights(config, grid, step - 1, previous, corrector=True)[:-1]
        total -= keep * _unipc_weights(config, grid, step - 1, previous, corrector=False)[:-1]
    return [_solver_row(config, grid, step, x0_form(config.prediction_type, here), keep, total, 0.0)]


def _unipc_weights(config: SchedulerConfig, grid: Grid, step: int, order: int, *, corrector: bool) -> Vector:
    """What UniP or UniC adds to (sigma_t / sigma_s) x in this step, over (m at its end, m0, m1, m2, unused)."""
    here, there = grid.here[step], grid.there[step]
    h = there.log_snr - here.log_snr
    m = np.eye(5)
    r = [(grid.here[step - k].log_snr - here.log_snr) / h for k in range(1, order)]
    slopes = [(m[k + 1] - m[1]) / r[k - 1] for k in range(1, order)]
    if corrector:
        r, slopes = [*r, 1.0], [*slopes, m[0] - m[1]]
    b_of_h = -h if config.solver_type == "bh1" else math.expm1(-h)
    if len(r) < 2:
        rho = np.full(len(r), 0.5)
    else:
        phi, factorial, moments = math.expm1(-h) / -h - 1, 1, []
        for k in range(1, len(r) + 1):
            moments.append(phi * factorial / b_of_h)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rho = np.linalg.solve(np.vander(r, increasing=True).T, moments)
    total: Vector = -there.alpha * math.expm1(-h) * m[1]
    for share, slope in zip(rho, slopes, strict=True):
        total -= there.alpha * b_of_h * share * slope
    return total


def deis(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Exponential integrator with eps interpolated in log ratio (DEIS, 2204.13902, eq. 15, the log-rho variant).

    In EDM's scale dx/dratio = eps. With u = log ratio a Lagrange basis polynomial p(u) integrates in closed form, the
    antiderivative of p(u) e**u being (p - p' + p'') e**u for degree 2.
    """
    here, there = grid.here[step], grid.there[step]
    order = min(config.solver_order, age + 1, _order_left(config, grid, step))
    nodes = [-level.log_snr for level in grid.here[step - order + 1 : step + 1]][::-1]
    weights = []
    for k, node in enumerate(nodes):
        basis = Polynomial([1.0])
        for other in nodes[:k] + nodes[k + 1 :]:
            basis = basis * Polynomial([-other, 1.0]) / (node - other)
        primitive = basis - basis.deriv() + basis.deriv(2)
        weights.append(there.alpha * (primitive(-there.log_snr) * there.ratio - primitive(-here.log_snr) * here.ratio))
    form = eps_form(config.prediction_type, here)
    return [_solver_row(config, grid, step, form, there.alpha / here.alpha, np.array(weights), 0.0)]


def _order_left(config: SchedulerConfig, grid: Grid, step: int) -> int:
    """The order that the end of a short run allows (2211.01095, appendix D: stable under 15 steps)."""
    steps = len(grid.timesteps)
    return steps - step if config.lower_order_final and steps < 15 else config.solver_order


def _solver_row(
    config: SchedulerConfig, grid: Grid, step: int, form: tuple[float, float], keep: float, total: Vector, noise: float
) -> Row:
    """The row of a solver on the variance-preserving latents, trailing zero weights dropped."""
    weights: list[float] = total.tolist()
    while weights and not weights[-1]:
        weights.pop()
    return Row(grid.timesteps[step], 1.0, *form, keep=keep, weights=tuple(weights), noise=noise)
