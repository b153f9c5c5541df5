"""Noise schedules, timestep spacing and the grid of noise levels that a solver walks along.

A noise level is ``x = alpha * x0 + sigma * eps`` with ``alpha**2 + sigma**2 == 1`` (DDPM, 2006.11239, eq. 4, where
alpha**2 is alphas_cumprod). The EDM family (2206.00364) scales it to ``x / alpha = x0 + ratio * eps``, and
DPM-Solver (2206.00927) measures it by ``log_snr = log(alpha / sigma)``.

The keys, their meanings and their defaults are those of diffusers' ``scheduler_config.json``; everything here is
float64, where diffusers' tables are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ldm_export.errors import InputError

Vector = npt.NDArray[np.float64]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "time_shift_type": ("exponential", "linear"),
}
"""What a word of the config may be."""

MOST_TIMESTEPS = 100_000
"""Largest ``num_train_timesteps``; a hundred times what networks are trained with."""

SHARED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
          "timestep_spacing", "steps_offset", "rescale_betas_zero_snr")  # fmt: skip
"""Keys that every sampler reads: they describe how the network was trained."""


@dataclass(frozen=True)
class SchedulerConfig:
    """A checked ``scheduler_config.json``, as one sampler reads it.

    ``eta`` and ``tokens``, how many a picture has, are no keys of it: whoever compiles says them.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] = ()
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    shift: float = 1.0
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float = 0.0
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    stochastic_sampling: bool = False
    eta: float = 0.0
    tokens: int = 0

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        only: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
    ) -> SchedulerConfig:
        """Check a parsed ``scheduler_config.json`` and keep what a sampler reads of it.

        Parameters
        ----------
        config : the JSON object; a key that is missing or null takes its default, a key nobody reads is left alone
        defaults : the keys that this sampler reads besides `SHARED`, with the defaults of its diffusers class
        only : keys with the values that this sampler supports

        Raises
        ------
        InputError
            For a value of the wrong type, outside its range or not supported, naming what is allowed.
        """
        for key, allowed in only.items():
            if config.get(key) not in (None, *allowed):
                words = " and ".join(repr(value) for value in allowed)
                raise InputError(_refusal(key, config[key], f"only {words} is supported"))
        taken: dict[str, Any] = dict(defaults)
        for field in fields(cls):
            value = config.get(field.name)
            if value is not None and (field.name in SHARED or field.name in defaults):
                taken[field.name] = _checked(field.name, value, type(field.default))
        options = cls(**taken)
        if options.num_train_timesteps > MOST_TIMESTEPS:
            raise InputError(
                _refusal(
                    "num_train_timesteps", options.num_train_timesteps, f"at most {MOST_TIMESTEPS:,} are supported"
                )
            )
        return options

    @property
    def clip(self) -> float:
        """The bound that x0 is clipped to, 0 for none."""
        return self.clip_sample_range if self.clip_sample else 0.0

    @np.errstate(over="ignore", invalid="ignore")  # what comes of it is judged here
    def betas(self) -> Vector:
        """The variances beta_t of the forward process (DDPM, 2006.11239, section 2), each in (0, 1)."""
        steps = self.num_train_timesteps
        betas: Vector
        if self.trained_betas:
            betas = np.array(self.trained_betas, dtype=np.float64)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, steps)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), steps) ** 2
        elif self.beta_schedule == "sigmoid":
            betas = self.beta_start + (self.beta_end - self.beta_start) / (1 + np.exp(-np.linspace(-6.0, 6.0, steps)))
        else:  # squaredcos_cap_v2: improved DDPM, 2102.09672, eq. 17, capped as there
            alphas_cumprod = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
        betas = _flushed(betas)
        if len(betas) != steps or not np.all((betas > 0) & (betas < 1)):
            raise InputError(
                f"the noise schedule has {len(betas)} betas in [{betas.min():.3g}, {betas.max():.3g}]; it needs "
                f"num_train_timesteps = {steps} of them, inside (0, 1). Mend beta_start, beta_end or trained_betas."
            )
        return betas

    def alphas_cumprod(self) -> Vector:
        """alpha_bar_t, decreasing; with zero terminal SNR the last is 0 (2305.08891, algorithm 1)."""
        alphas_cumprod: Vector = _flushed(np.cumprod(1 - self.betas(), dtype=np.float64))
        if not (np.all(np.diff(alphas_cumprod, prepend=1.0) < 0) and alphas_cumprod[-1] > 0):
            raise InputError(
                f"the noise schedule's alphas_cumprod go from {alphas_cumprod[0]:.3g} to {alphas_cumprod[-1]:.3g}; "
                "each must be smaller than the one before and above 0. Mend beta_start, beta_end or trained_betas."
            )
        if self.rescale_betas_zero_snr:
            if len(alphas_cumprod) < 2:
                raise InputError(
                    "rescale_betas_zero_snr leaves nothing of 1 training timestep; it needs 2. Switch it off."
                )
            root = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alphas_cumprod

    def ratios(self) -> Vector:
        """sigma_t / alpha_t, increasing and finite: zero terminal SNR ends at alpha_bar = 2**-24, as in diffusers."""
        alphas_cumprod = self.alphas_cumprod()
        if self.rescale_betas_zero_snr:
            alphas_cumprod[-1] = 2.0**-24
        ratios: Vector = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
        return ratios

    def spaced_timesteps(self, steps: int, points: int) -> Vector:
        """The first ``steps`` of ``points`` timesteps spread over the training range (2305.08891, table 2).

        Returns
        -------
        (steps,), descending, within [0, num_train_timesteps); fractional with linspace spacing
        """
        trained = self.num_train_timesteps
        timesteps: Vector
        if self.timestep_spacing == "linspace":
            timesteps = np.linspace(0, trained - 1, points)[::-1][:steps]
        elif self.timestep_spacing == "leading":
            timesteps = np.arange(points, dtype=np.float64)[::-1][:steps] * (trained // points) + self.steps_offset
        else:
            timesteps = np.arange(trained, 0, -trained / steps, dtype=np.float64).round()[:steps] - 1.0
        if timesteps[0] >= trained or np.any(np.diff(timesteps.round()) >= 0):
            raise InputError(
                f"{steps} steps of {self.timestep_spacing} spacing with steps_offset {self.steps_offset} do not fit "
                f"into {trained} training timesteps; each must be a different one. Use fewer steps."
            )
        return timesteps


def _refusal(key: str, value: Any, allowed: str) -> str:
    remedy = "Use the config that the network was trained with." if key in SHARED else "Choose another sampler."
    return f"the scheduler config has {key} = {short_repr(value)}; {allowed}. {remedy}"


def short_repr(value: Any) -> str:
    """A value of a config for a message, as Python writes it and cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _checked(key: str, value: Any, kind: type) -> Any:
    """``value`` as ``kind``, or a refusal that says what is allowed."""
    if key in CHOICES and value not in CHOICES[key]:
        raise InputError(_refusal(key, value, f"it must be one of {', '.join(CHOICES[key])}"))
    accepted, words = {
        bool: (value in (True, False), "true or false"),
        str: (isinstance(value, str), "a word"),
        int: (type(value) is int and value >= (key != "steps_offset"), "a positive integer"),
        float: (type(value) in (int, float) and 0 < value < math.inf, "a positive number"),
        tuple: (isinstance(value, list) and all(type(beta) is float for beta in value), "a list of decimal numbers"),
    }[kind]
    if not accepted:
        raise InputError(_refusal(key, value, f"it must be {words}"))
    return kind(value)


class Level(NamedTuple):
    """A noise level ``x = alpha * x0 + sigma * eps``."""

    alpha: float
    sigma: float

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: float) -> Level:
        return cls(math.sqrt(alphas_cumprod), math.sqrt(1 - float(alphas_cumprod)))

    @classmethod
    def from_ratio(cls, ratio: float) -> Level:
        return cls(1 / math.hypot(1, ratio), float(ratio) / math.hypot(1, ratio))

    @property
    def ratio(self) -> float:
        """sigma / alpha, EDM's sigma."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> float:
        """log(alpha / sigma), DPM-Solver's lambda; infinite without noise."""
        return -math.log(self.ratio) if self.sigma else math.inf


@dataclass(frozen=True)
class Grid:
    """Where each of n steps is and where it goes.

    ``timesteps[i]`` is what the network is given, ``here[i]`` the level of the latents then and ``there[i]`` the level
    that the step ends at. ``there[i]`` is ``here[i + 1]`` except where diffusers steps by ``num_train_timesteps //
    num_inference_steps`` whatever the spacing (DDIM, PLMS); ``restart`` is that stride back up from ``here[i + 1]``.
    """

    timesteps: tuple[float, ...]
    here: tuple[Level, ...]
    there: tuple[Level, ...]
    restart: tuple[Level, ...] = ()


def strided_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Integer timesteps, each step going down by ``num_train_timesteps // steps``: DDIM and PLMS."""
    alphas_cumprod = config.alphas_cumprod()
    timesteps = [int(t) for t in config.spaced_timesteps(steps, points=steps).round()]
    stride = config.num_train_timesteps // steps
    final = 1.0 if config.set_alpha_to_one else alphas_cumprod[0]
    return Grid(
        timesteps=tuple(map(float, timesteps)),
        here=tuple(Level.from_alphas_cumprod(alphas_cumprod[t]) for t in timesteps),
        there=tuple(Level.from_alphas_cumprod(alphas_cumprod[t - stride] if t >= stride else final) for t in timesteps),
        restart=tuple(Level.from_alphas_cumprod(alphas_cumprod[t + stride]) for t in timesteps[1:]),
    )


def chained_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Integer timesteps, each step going to the next one and the last to no noise: DDPM."""
    alphas_cumprod = config.alphas_cumprod()
    timesteps = config.spaced_timesteps(steps, points=steps).round()
    return _linked([Level.from_alphas_cumprod(alphas_cumprod[int(t)]) for t in timesteps], timesteps, Level(1.0, 0.0))


def consistency_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Evenly picked from the ``original_inference_steps`` that the consistency model was distilled on (2310.04378)."""
    original = config.original_inference_steps
    if not steps <= original <= config.num_train_timesteps:
        raise InputError(
            f"{steps} steps of lcm with original_inference_steps {original}; steps <= original_inference_steps <= "
            f"num_train_timesteps = {config.num_train_timesteps} must hold. Use fewer steps."
        )
    distilled = np.arange(original, 0, -1) * (config.num_train_timesteps // original) - 1
    timesteps = distilled[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
    alphas_cumprod = config.alphas_cumprod()
    return _linked([Level.from_alphas_cumprod(alphas_cumprod[t]) for t in timesteps], timesteps, Level(1.0, 0.0))


def interpolated_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Fractional timesteps with interpolated noise, the last step to none or to sigma_min: Euler and Heun."""
    table = config.ratios()
    timesteps = config.spaced_timesteps(steps, points=steps)
    ratios = np.interp(timesteps, np.arange(len(table)), table)
    if config.use_karras_sigmas:
        ratios = karras_levels(ratios[0], ratios[-1], steps)
        timesteps = _timesteps_of(ratios, table)
    final = 0.0 if config.final_sigmas_type == "zero" else table[0]
    return _linked([Level.from_ratio(ratio) for ratio in ratios], timesteps, Level.from_ratio(final))


def solver_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Integer timesteps that leave one more for the end: DPM-Solver++ and UniPC."""
    table = config.ratios()
    if config.use_karras_sigmas:
        ratios = karras_levels(table[-1], table[0], steps)
        timesteps = _timesteps_of(ratios, table).round()
    else:
        timesteps = config.spaced_timesteps(steps, points=steps + 1).round()
        ratios = table[timesteps.astype(int)]
    final = 0.0 if config.final_sigmas_type == "zero" else table[0]
    return _linked([Level.from_ratio(ratio) for ratio in ratios], timesteps, Level.from_ratio(final))


def open_ended_grid(config: SchedulerConfig, steps: int) -> Grid:
    """`solver_grid` for a solver that cannot reach zero noise, whatever the config says: DEIS."""
    return solver_grid(replace(config, final_sigmas_type="sigma_min"), steps)


def _flushed(values: Vector) -> Vector:
    """The values, (...) float64, with 0 for all that are too small to be normal numbers.

    Arithmetic on those depends on the thread: a library may have set its processor to take them for 0.
    """
    return np.where(np.abs(values) < np.finfo(np.float64).tiny, 0.0, values)


def _timesteps_of(ratios: Vector, table: Vector) -> Vector:
    """Fractional timesteps (steps,) of noise ratios (steps,), interpolated in the logarithm of those in ``table``.

    Between the last training timestep with no more noise and the one after, as diffusers' ``_sigma_to_t``: a table
    with zero terminal SNR, whose last ratio is capped, need not increase to its end.
    """
    if len(table) == 1:
        return np.zeros(len(ratios))
    logs, wanted = np.log(table), np.log(ratios)
    least_after = np.minimum.accumulate(logs[::-1])[::-1]
    low = np.clip(np.searchsorted(least_after, wanted, side="right") - 1, 0, len(table) - 2)
    shares: Vector = np.clip((wanted - logs[low]) / (logs[low + 1] - logs[low]), 0, 1)
    return low + shares


def _linked(levels: list[Level], timesteps: npt.NDArray[Any], final: Level) -> Grid:
    return Grid(tuple(map(float, timesteps)), tuple(levels), (*levels[1:], final))


def karras_levels(first: float, last: float, steps: int) -> Vector:
    """Noise levels evenly spaced in ratio**(1/7) (EDM, 2206.00364, eq. 5)."""
    ratios: Vector = np.linspace(first ** (1 / 7), last ** (1 / 7), steps) ** 7
    ratios[-1], ratios[0] = last, first  # not off by the rounding of the powers
    return ratios
