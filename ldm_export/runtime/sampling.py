"""The sampling loop of one generation, step by step, where its latents lie on the host.

    [ denoiser -> guidance -> one row of the plan ] x rows

A backend whose graphs run elsewhere may have a loop of its own that keeps them there
(:meth:`ldm_export.runtime.backends.Backend.sampling`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ldm_export.plan import Row, Stepper
from ldm_export.runtime.graph import Array, Graph


@dataclass(frozen=True)
class SamplingTask:
    """What a loop is given.

    Attributes
    ----------
    rows : of the trajectory, in order
    latents : float32 (B, C, h, w), where they start; they are overwritten step by step
    conditions : the denoiser's inputs beside latents and timestep; they stay the same
    guidance : how the prediction with the prompt is weighed against that without; None where each picture has one row
    draw : gives N(0, I) noise, float32 (B, C, h, w)
    every : the whole denoiser runs in every so many steps (DeepCache)
    """

    rows: Sequence[Row]
    latents: Array
    conditions: Mapping[str, Array]
    guidance: float | None
    draw: Callable[[], Array]
    every: int = 1

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of the denoiser's input and output: (B, C, h, w), or (2 B, C, h, w) with guidance."""
        batch, *sizes = self.latents.shape
        return (batch * (1 if self.guidance is None else 2), *sizes)


class Sampling(Protocol):
    """A loop that runs; ``load_ms`` is what of making it was for a size that is new to its backend."""

    load_ms: float

    def step(self) -> float:
        """Make the next network call and its update, in the task's latents; gives the call's time, ms."""
        ...

    def close(self) -> None:
        """Give back what the loop holds, whether or not it came to its end."""
        ...


class HostSampling:
    """The loop in numpy. Latents, the denoiser's input and its output stay where they are, and it reads and writes them
    in place."""

    load_ms = 0.0

    def __init__(self, denoiser: Graph, run: SamplingTask):
        self._run = run
        self._rows = iter(run.rows)
        self._stepper = Stepper(run.rows, run.latents)
        sample = np.empty(run.sample_shape, np.float32)
        self._copies = sample.reshape(-1, *run.latents.shape)  # with guidance, the latents twice
        self._out = np.empty_like(sample)
        self._timestep = np.empty(len(sample), np.float32)
        inputs = {"sample": sample, "timestep": self._timestep, **run.conditions}
        self._call = denoiser.bind(inputs, {"out_sample": self._out}, tuple(run.conditions), run.every)

    def step(self) -> float:
        out, batch = self._out, len(self._run.latents)
        self._stepper.network_input(out=self._copies)
        self._timestep[...] = next(self._rows).timestep
        called = time.perf_counter()
        self._call()
        call_ms = (time.perf_counter() - called) * 1000.0
        with np.errstate(over="ignore", invalid="ignore"):  # who asked for the step looks at what it gave
            if self._run.guidance is not None:  # negative + guidance * (prompt - negative)
                prediction = out[batch:]
                prediction -= out[:batch]
                prediction *= self._run.guidance
                prediction += out[:batch]
            self._stepper.advance(out[-batch:], self._run.draw)
        return call_ms

    def close(self) -> None:
        """There is nothing to give back."""
