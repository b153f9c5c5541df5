"""Flow matching: noise levels and solvers of networks that predict the velocity from data to noise.

The latents are ``x = (1 - sigma) * x0 + sigma * eps`` and the network's output is ``eps - x0`` (rectified flow,
2209.03003; flow matching, 2210.02747), so that ``x0 = x - sigma * out`` and ``eps = x + (1 - sigma) * out``, and
``dx / dsigma = out``. The network is given the timestep ``sigma * num_train_timesteps``.

A shift moves noise levels up, as larger pictures need it (SD3, 2403.03206, eq. 23):

    sigma  ->  shift * sigma / (1 + (shift - 1) * sigma)

With dynamic shifting ``shift`` is ``exp(mu)``, or ``mu`` itself (``time_shift_type`` linear), where ``mu`` is linear in
the number of tokens of the picture, so that a plan is of pictures of one size (`picture_tokens`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_export.errors import InputError
from ldm_export.plan.schedule import Grid, Level, SchedulerConfig, Vector, karras_levels
from ldm_export.plan.table import Row

PREDICTION = "flow_prediction"
"""What ``prediction_type`` says of such networks in the classes of diffusers that have the key."""
NEARLY_ALL_NOISE = 1e-6
"""How much below 1 UniPC begins where it would begin at 1, whose log SNR is infinite."""


def shifts_dynamically(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config asks for noise levels by the number of a picture's tokens."""
    return bool(config.get("use_dynamic_shifting"))


def picture_tokens(model: Mapping[str, Any], height: int, width: int) -> int:
    """Tokens of a picture of so many pixels, by the manifest's ``model``: without a ``patch_size`` one a latent."""
    patch = model.get("patch_size", 1)
    rows, columns = (side // model["pixels_per_latent"] // patch for side in (height, width))
    return int(rows * columns)


def euler_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Noise levels of FlowMatchEuler and FlowMatchHeun, the last step to none.

    diffusers spaces them evenly between levels that are shifted, and then shifts them, so a ``shift`` counts twice.
    """
    lowest = 1 / config.num_train_timesteps
    if not config.use_dynamic_shifting:
        lowest = config.shift * lowest / (1 + (config.shift - 1) * lowest)
    sigmas = _stretched(config, _moved(config, np.linspace(1.0, lowest, steps), config.shift))
    first, last = float(sigmas[0]), float(sigmas[-1])
    if config.use_karras_sigmas:
        if min(first, last) < 0:
            raise ArithmeticError("a noise level below 0 has no root")
        sigmas = karras_levels(first, last, steps)
    elif config.use_exponential_sigmas:
        sigmas = np.exp(np.linspace(math.log(first), math.log(last), steps))
    elif config.use_beta_sigmas:
        shares = [beta_quantile(1 - share) for share in np.linspace(0, 1, steps)]
        sigmas = last + np.array(shares) * (first - last)
    return _grid(sigmas, sigmas * config.num_train_timesteps)


def solver_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Noise levels of DPM-Solver++ with ``use_flow_sigmas``, below 1; the network is given whole timesteps."""
    sigmas = (1 - np.linspace(1.0, 1 / config.num_train_timesteps, steps + 1))[:0:-1]
    shift = _dynamic_shift(config) if config.use_dynamic_shifting else config.flow_shift
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return _grid(sigmas, np.floor(sigmas * config.num_train_timesteps))


def unipc_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Noise levels of UniPC with ``use_flow_sigmas``, from nearly 1; the network is given whole timesteps."""
    sigmas = np.linspace(1.0, 1 / config.num_train_timesteps, steps + 1)[:-1]
    sigmas = _stretched(config, _moved(config, sigmas, config.flow_shift))
    if abs(sigmas[0] - 1) < NEARLY_ALL_NOISE:
        sigmas[0] -= NEARLY_ALL_NOISE
    return _grid(sigmas, np.floor(sigmas * config.num_train_timesteps))


def euler(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Euler's method on dx / dsigma = out; with ``stochastic_sampling`` x0 is noised anew to the next level."""
    here, there = grid.here[step], grid.there[step]
    if config.stochastic_sampling:
        direct = -there.alpha * here.sigma
        return [Row(grid.timesteps[step], keep=there.alpha, direct=direct, noise=there.sigma)]
    return [Row(grid.timesteps[step], keep=1.0, direct=there.sigma - here.sigma)]


def heun(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Euler's step to x', then the trapezoid over both ends, x' + (n - s) / 2 (out' - out); outputs are remembered."""
    here, there = grid.here[step], grid.there[step]
    span = there.sigma - here.sigma
    rows = [Row(grid.timesteps[step], from_output=1.0, keep=1.0, weights=(span,))]
    if there.sigma > 0:
        half = span / 2
        rows.append(Row(grid.timesteps[step + 1], from_output=1.0, keep=1.0, weights=(half, -half)))
    return rows


def beta_quantile(share: float) -> float:
    """Where the distribution Beta(0.6, 0.6) has this share, in [0, 1], below (Beta sampling, 2407.12173).

    Bisects the series ``I_x = x**a / B(a, a) * sum_n (1 - a)_n / (n! (a + n)) * x**n``, up to 1/2 and mirrored beyond.
    """
    if share > 0.5:
        return 1 - beta_quantile(1 - share)
    a = 0.6
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    low, high = 0.0, 0.5
    for _ in range(64):
        x = (low + high) / 2
        term, total = 1.0, 1 / a
        for n in range(1, 64):
            term *= (n - a) / n * x
            total += term / (a + n)
        if x**a * total / whole < share:
            low = x
        else:
            high = x
    return (low + high) / 2


def _dynamic_shift(config: SchedulerConfig) -> float:
    """The shift of a picture by the number of its tokens, as diffusers' pipelines calculate it."""
    if not config.tokens:
        raise InputError(
            "the scheduler config has use_dynamic_shifting = true, which is by the number of a picture's tokens, and "
            "none were given. Give the tokens of the picture."
        )
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.tokens * slope + (config.base_shift - slope * config.base_image_seq_len)  # in diffusers' order
    return mu if config.time_shift_type == "linear" else math.exp(mu)


def _moved(config: SchedulerConfig, sigmas: Vector, fixed: float) -> Vector:
    """Noise levels moved up by the shift ``fixed``, or by that of the picture; in diffusers' order of operations, since
    solvers cut whole timesteps from them."""
    if not config.use_dynamic_shifting:
        moved: Vector = fixed * sigmas / (1 + (fixed - 1) * sigmas)
    else:
        shift = _dynamic_shift(config)
        moved = shift / (shift + (1 / sigmas - 1))
    return moved


def _stretched(config: SchedulerConfig, sigmas: Vector) -> Vector:
    """Noise levels stretched below 1, so that the last is ``shift_terminal``, where there is one."""
    if not config.shift_terminal:
        return sigmas
    stretched: Vector = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - config.shift_terminal))
    return stretched


def _grid(sigmas: Vector, timesteps: Vector) -> Grid:
    levels = [Level(1 - sigma, sigma) for sigma in sigmas.tolist()]
    return Grid(tuple(timesteps.tolist()), tuple(levels), (*levels[1:], Level(1.0, 0.0)))
