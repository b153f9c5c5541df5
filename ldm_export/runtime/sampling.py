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
from ldm_export.runtime.control import Residuals
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.inpainting import KeptArea


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
    image_guidance : how the prediction with a picture is weighed against that with nothing; None where each picture
        has two rows or one
    every : the whole denoiser runs in every so many steps (DeepCache)
    kept : what of the latents is put back after each row, or None
    residuals : what controls add to the denoiser, or None
    """

    rows: Sequence[Row]
    latents: Array
    conditions: Mapping[str, Array]
    guidance: float | None
    draw: Callable[[], Array]
    every: int = 1
    kept: KeptArea | None = None
    image_guidance: float | None = None
    residuals: Residuals | None = None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of the denoiser's input and output: (B, C, h, w), or with guidance (2 B, C, h, w) or (3 B, C, h, w)."""
        batch, *sizes = self.latents.shape
        return (batch * _rows(self.guidance, self.image_guidance), *sizes)


class Sampling(Protocol):
    """A loop that runs; ``load_ms`` is what of making it was for a size that is new to its backend."""

    load_ms: float

    def step(self) -> float:
        """Make the next network call and its update, in the task's latents; gives the call's time, ms."""
        ...

    def close(self) -> None:
        """Give back what the loop holds, whether or not it came to its end."""
        ...


class GuidedDenoiser:
    """Predictions of a denoiser for one batch of pictures, under their conditions and with their guidance.

    Its input and output stay where they are, and it reads and writes them in place.

    Parameters
    ----------
    denoiser : a loaded graph
    shape : (B, C, h, w) of the latents
    conditions, guidance, every, image_guidance, residuals : as in `SamplingTask`

    Attributes
    ----------
    sample : float32 (1 to 3, B, C, h, w), what the network is given: with guidance the same two or three times
    """

    def __init__(
        self,
        denoiser: Graph,
        shape: tuple[int, ...],
        conditions: Mapping[str, Array],
        guidance: float | None,
        every: int = 1,
        image_guidance: float | None = None,
        residuals: Residuals | None = None,
    ):
        self._guidance, self._image_guidance, self._batch = guidance, image_guidance, shape[0]
        sample = np.empty((shape[0] * _rows(guidance, image_guidance), *shape[1:]), np.float32)
        self.sample = sample.reshape(-1, *shape)
        self._out = np.empty_like(sample)
        self._timestep = np.empty(len(sample), np.float32)
        self._inputs = {"sample": sample, "timestep": self._timestep, **conditions}
        self._call = denoiser.bind(self._inputs, {"out_sample": self._out}, tuple(conditions), every)
        self._denoiser, self._residuals = denoiser, residuals
        self._added: dict[str, Array] = {}

    def __call__(self, timestep: float) -> tuple[Array, float]:
        """Call the network on what is in ``sample``.

        Returns
        -------
        The guided prediction, float32 (B, C, h, w), which the next call overwrites, and the time of the call, with that
        of controls, ms
        """
        out, batch = self._out, self._batch
        self._timestep[...] = timestep
        called = time.perf_counter()
        self._chosen_call()()
        call_ms = (time.perf_counter() - called) * 1000.0
        with np.errstate(over="ignore", invalid="ignore"):  # who asked looks at what it gave
            if self._image_guidance is not None:
                _combine_three(out.reshape(3, batch, *out.shape[1:]), self._guidance, self._image_guidance)
            elif self._guidance is not None:  # negative + guidance * (prompt - negative)
                prediction = out[batch:]
                prediction -= out[:batch]
                prediction *= self._guidance
                prediction += out[:batch]
        return out[-batch:], call_ms

    def _chosen_call(self) -> Callable[[], None]:
        """The call of the network; with what controls add where some are in use."""
        given = None if self._residuals is None else self._residuals.next(self._inputs["sample"], self._timestep)
        if given is None:
            return self._call
        if not self._added:
            self._added = {name: np.empty_like(value) for name, value in given.items()}
            fixed = self._inputs.keys() - {"sample", "timestep"} - given.keys()
            inputs = {**self._inputs, **self._added}
            self._controlled_call = self._denoiser.bind(inputs, {"out_sample": self._out}, tuple(fixed))
        for name, value in given.items():
            np.copyto(self._added[name], value)  # where it is bound
        return self._controlled_call


def _rows(guidance: float | None, image_guidance: float | None) -> int:
    """Rows of a call for each picture."""
    return 1 + (guidance is not None) + (image_guidance is not None)


def _combine_three(out: Array, guidance: float | None, image_guidance: float) -> None:
    """Combine predictions with nothing, with a picture, and with picture and prompt, (3, B, C, h, w), in the last::

    nothing + guidance (prompt - picture) + image_guidance (picture - nothing)      (2211.09800, eq. 3)
    """
    nothing, picture, prediction = out
    prediction -= picture
    prediction *= guidance
    picture -= nothing
    picture *= image_guidance
    nothing += prediction
    np.add(nothing, picture, out=prediction)


class HostSampling:
    """The loop in numpy, on latents that stay where they are."""

    load_ms = 0.0

    def __init__(self, denoiser: Graph, run: SamplingTask):
        self._run = run
        self._rows, self._done = iter(run.rows), 0
        self._stepper = Stepper(run.rows, run.latents)
        self._denoiser = GuidedDenoiser(
            denoiser, run.latents.shape, run.conditions, run.guidance, run.every, run.image_guidance, run.residuals
        )

    def step(self) -> float:
        self._stepper.network_input(out=self._denoiser.sample)
        out, call_ms = self._denoiser(next(self._rows).timestep)
        with np.errstate(over="ignore", invalid="ignore"):  # who asked for the step looks at what it gave
            self._stepper.advance(out, self._run.draw)
            self._done += 1
            if self._run.kept is not None:
                self._run.kept.restore(self._run.latents, self._done)
        return call_ms

    def close(self) -> None:
        """There is nothing to give back."""
