"""The sampling loop with its latents on the GPU: two engines in turn, on memory that they share.

    sample, timestep, conditions -> [denoiser] -> out_sample
    row, latents, remembered, out_sample, noise -> [step] -> next latents, next remembered, next sample and timestep

Latents and what is remembered lie twice, and ``step`` goes to and fro between them. What it computes is a graph
(``ldm_export.export.step``), so that nothing has to be compiled here. Each step the latents are also copied to the
host, a few kilobytes, which is what a step waits for: who watches sees what was drawn, and cancels before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.contract import REMEMBERED, STEP_CELLS, WEIGHT_FIELDS
from ldm_export.plan import Row
from ldm_export.runtime.backends.cuda import Buffer, Event, Stream
from ldm_export.runtime.backends.engine import Engine
from ldm_export.runtime.sampling import SamplingTask

Array = npt.NDArray[Any]


def table_of(rows: Sequence[Row], guidance: float | None) -> Array:
    """The rows as ``step`` takes them, float32 (rows, cells); the columns are ``ldm_export.contract.STEP_CELLS``."""
    table = np.zeros((len(rows), len(STEP_CELLS)), np.float32)
    for number, row in enumerate(rows):
        following = rows[number + 1] if number + 1 < len(rows) else None
        weights = dict(zip(WEIGHT_FIELDS, row.weights, strict=False))
        special = {
            "clip": row.clip or np.inf,
            "guidance_scale": 1.0 if guidance is None else guidance,
            "next_input_scale": following.input_scale if following else 1.0,
            "next_timestep": following.timestep if following else 0.0,
        }
        cells = {**vars(row), **weights, **special}
        table[number] = [cells.get(name, 0.0) for name in STEP_CELLS]
    return table


class DeviceLoop:
    """Both engines with the memory for one batch and size; serves one loop at a time, and then the next."""

    def __init__(self, denoiser: Engine, step: Engine, stream: Stream, run: SamplingTask):
        latents, sample = run.latents.shape, run.sample_shape
        remembered = (REMEMBERED, *latents)
        self.stream, self.key = stream, _key(run)

        def two(shape: tuple[int, ...]) -> list[Buffer]:
            return [Buffer(shape, np.float32, stream) for _ in range(2)]

        self.latents, self.remembered = two(latents), two(remembered)
        self.row = Buffer((len(STEP_CELLS),), np.float32, stream)
        self.noise = Buffer(latents, np.float32, stream)
        timesteps = sample[:1]
        shared = {"sample": Buffer(sample, np.float32, stream), "out_sample": Buffer(sample, np.float32, stream)}
        shared["timestep"] = Buffer(timesteps, np.float32, stream)
        shapes = {
            "sample": sample,
            "timestep": timesteps,
            **{name: array.shape for name, array in run.conditions.items()},
        }
        self.denoiser = denoiser.bound(shapes, shared)
        self.steps = [
            step.bound(
                {"latents": latents, "remembered": remembered, "out_sample": sample, "noise": latents},
                {
                    **shared,
                    "row": self.row,
                    "noise": self.noise,
                    "latents": self.latents[here],
                    "remembered": self.remembered[here],
                    "next_latents": self.latents[1 - here],
                    "next_remembered": self.remembered[1 - here],
                },
            )
            for here in (0, 1)
        ]
        for bound in (self.denoiser, *self.steps):
            bound.prepare()

    def fits(self, run: SamplingTask) -> bool:
        return self.key == _key(run)


class DeviceSampling:
    """A loop that runs; see :class:`ldm_export.runtime.sampling.Sampling`."""

    def __init__(self, loop: DeviceLoop, run: SamplingTask, load_ms: float, close: Callable[[], None]):
        self._loop, self._run, self.load_ms, self._close = loop, run, load_ms, close
        self._index = 0
        self._before, self._after = Event(), Event()
        table = table_of(run.rows, run.guidance)
        self._table = Buffer(table.shape, table.dtype, loop.stream)
        self._table.upload(table)
        loop.latents[0].upload(run.latents)
        for buffer in (*loop.remembered, loop.noise):  # what a row weighs by zero must be a number
            buffer.clear()
        sample, timestep = loop.denoiser.buffers["sample"], loop.denoiser.buffers["timestep"]
        first = run.latents * np.float32(run.rows[0].input_scale)
        sample.upload(np.tile(first, (sample.shape[0] // len(first), 1, 1, 1)))
        timestep.upload(np.full(timestep.shape, run.rows[0].timestep, np.float32))
        for name, array in run.conditions.items():
            loop.denoiser.buffers[name].upload(array)

    def step(self) -> float:
        loop, row, here = self._loop, self._run.rows[self._index], self._index % 2
        loop.row.copy(self._table.address + self._index * loop.row.size_bytes)
        self._before.record(loop.stream)
        loop.denoiser.launch()
        self._after.record(loop.stream)
        if row.noise:
            loop.noise.upload(self._run.draw())  # drawn on the host while the denoiser runs
        loop.steps[here].launch()
        loop.latents[1 - here].download(self._run.latents)
        self._index += 1
        return self._after.ms_since(self._before)

    def close(self) -> None:
        """Give the memory back to the next loop; once."""
        self._close()


def _key(run: SamplingTask) -> Mapping[str, tuple[int, ...]]:
    return {"sample": run.sample_shape, "latents": run.latents.shape} | {
        name: array.shape for name, array in run.conditions.items()
    }
