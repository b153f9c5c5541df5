"""Samplers that remember nothing: DDPM, DDIM, LCM, Euler and Euler ancestral.

Each step is ``x <- sample * x + x0 * (predicted x0) + eps * (predicted eps) + noise * z`` with four coefficients from
the sampler's paper; the network's output gives x0 and eps by its prediction type.
"""

from __future__ import annotations

import math

from ldm_export.errors import InputError
from ldm_export.plan.schedule import Grid, Level, SchedulerConfig
from ldm_export.plan.table import Row


def x0_form(prediction_type: str, level: Level) -> tuple[float, float]:
    """Coefficients (of x, of the network's output) that give the predicted x0; v is 2202.00512, appendix D.

    That of a flow is of latents with alpha + sigma = 1.
    """
    alpha, sigma = level
    if prediction_type == "epsilon" and alpha == 0:
        raise InputError(
            "prediction_type 'epsilon' cannot start at zero terminal SNR, where the noise says nothing about the "
            "image; v_prediction and sample can. Switch rescale_betas_zero_snr off or use leading spacing."
        )
    return {
        "epsilon": lambda: (1 / alpha, -sigma / alpha),
        "v_prediction": lambda: (alpha, -sigma),
        "sample": lambda: (0.0, 1.0),
        "flow_prediction": lambda: (1.0, -sigma),
    }[prediction_type]()


def eps_form(prediction_type: str, level: Level) -> tuple[float, float]:
    """Coefficients (of x, of the network's output) that give the predicted noise."""
    alpha, sigma = level
    return {
        "epsilon": (0.0, 1.0),
        "v_prediction": (sigma, alpha),
        "sample": (1 / sigma, -alpha / sigma),
    }[prediction_type]


def one_step_row(
    config: SchedulerConfig,
    grid: Grid,
    step: int,
    *,
    sample: float = 0.0,
    x0: float = 0.0,
    eps: float = 0.0,
    noise: float = 0.0,
    input_scale: float = 1.0,
) -> Row:
    """The row of the module's formula, for latents that are ``1 / input_scale`` of what the network sees.

    Unclipped, x0 and eps fold into the coefficients of x and the output. A clipped x0 has to be made first; eps keeps
    coming from the network, as diffusers has it (``use_clipped_model_output=False``).
    """
    x0_sample, x0_output = x0_form(config.prediction_type, grid.here[step])
    eps_sample, eps_output = eps_form(config.prediction_type, grid.here[step])
    timestep, keep, direct = grid.timesteps[step], sample + eps * eps_sample * input_scale, eps * eps_output
    if not config.clip:
        keep, direct = keep + x0 * x0_sample * input_scale, direct + x0 * x0_output
        return Row(timestep, input_scale, keep=keep, direct=direct, noise=noise)
    return Row(
        timestep, input_scale, x0_sample * input_scale, x0_output, config.clip, keep, direct, weights=(x0,), noise=noise
    )


def ddpm(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Ancestral sampling from the posterior q(x_s | x_t, x0) (DDPM, 2006.11239, eq. 6 and 7)."""
    here, there = grid.here[step], grid.there[step]
    alpha_t = (here.alpha / there.alpha) ** 2
    beta_t = 1 - alpha_t
    variance = beta_t if config.variance_type == "fixed_large" else (there.sigma / here.sigma) ** 2 * beta_t
    row = one_step_row(
        config,
        grid,
        step,
        sample=math.sqrt(alpha_t) * (there.sigma / here.sigma) ** 2,
        x0=there.alpha * beta_t / here.sigma**2,
        noise=math.sqrt(variance) if grid.timesteps[step] > 0 else 0.0,
    )
    return [row]


def ddim(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Generalized non-Markovian sampling (DDIM, 2010.02502, eq. 12 and 16); eta 0 is deterministic, 1 is DDPM's."""
    here, there = grid.here[step], grid.there[step]
    noise = config.eta * (there.sigma / here.sigma) * math.sqrt(max(1 - (here.alpha / there.alpha) ** 2, 0.0))
    direction = math.sqrt(max(there.sigma**2 - noise**2, 0.0))
    return [one_step_row(config, grid, step, x0=there.alpha, eps=direction, noise=noise)]


def lcm(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Multistep consistency sampling (LCM, 2310.04378, algorithm 3): denoise whole, then noise to the next level.

    The consistency function is c_skip * x + c_out * x0 with the boundary scalings of 2303.01469, sigma_data = 0.5.
    """
    there, time, data = grid.there[step], grid.timesteps[step] * config.timestep_scaling, 0.5
    c_skip, c_out = data**2 / (time * time + data**2), time / math.hypot(time, data)
    return [
        one_step_row(config, grid, step, sample=there.alpha * c_skip, x0=there.alpha * c_out, noise=there.sigma),
    ]


def euler(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Euler's method on dx/dsigma = eps, x in EDM's scale (2206.00364, algorithm 1 without churn)."""
    here, there = grid.here[step], grid.there[step]
    return [one_step_row(config, grid, step, sample=1.0, eps=there.ratio - here.ratio, input_scale=here.alpha)]


def euler_ancestral(config: SchedulerConfig, grid: Grid, step: int, age: int) -> list[Row]:
    """Euler down below the next level, then noise up to it: the variance of DDPM's posterior in EDM's scale."""
    here, there = grid.here[step], grid.there[step]
    up = there.ratio * math.sqrt(1 - (there.ratio / here.ratio) ** 2)
    down = there.ratio**2 / here.ratio
    return [one_step_row(config, grid, step, sample=1.0, eps=down - here.ratio, noise=up, input_scale=here.alpha)]
