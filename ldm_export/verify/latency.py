"""How long a picture takes, in turn: every round times each variant once, so that a slow minute slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends.auto import SETTLE_S
from ldm_export.runtime.results import Timings


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one picture, medians over the rounds; ``denoiser_ms`` is of one of ``calls`` calls."""

    total_ms: float
    text_ms: float
    denoiser_ms: float
    decode_ms: float
    calls: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Latency:
        """Reads a record; older ones, in checkpoints and work folders, have ``unet_ms``."""
        renamed = {"unet_ms": "denoiser_ms"}
        return cls(**{renamed.get(name, name): value for name, value in values.items()})


Draw = Callable[[int], Timings]
"""Draws one picture with a seed and tells how long each stage took."""


def draw_with(pipeline: Pipeline, prompts: list[str] | None) -> Draw:
    """One picture of a bundle a call, as it is drawn by default, prompt after prompt; None for models without text,
    of which those with classes draw class after class."""
    roles, manifest = pipeline.bundle.roles, pipeline.bundle.manifest
    labelled = "class_labels" in roles.sources(manifest.graphs)

    def draw(seed: int) -> Timings:
        if prompts:  # a prompt that is new each time, as the cache of encoded prompts would make text free
            return pipeline.generate(f"{prompts[seed % len(prompts)]} {seed}", seed=seed).timings
        if labelled:
            return pipeline.generate(class_labels=[seed % (manifest.model["class_count"] or 1)], seed=seed).timings
        return pipeline.generate(seed=[seed]).timings

    return draw


def time_in_turn(variants: Mapping[str, Draw], rounds: int) -> dict[str, Latency]:
    """Time every variant once a round, after a round that is not counted."""
    return {name: _medians(runs) for name, runs in runs_in_turn(variants, rounds).items()}


def runs_in_turn(
    variants: Mapping[str, Draw], rounds: int, warm_up: int = 1, progress: Callable[[int], None] = lambda done: None
) -> dict[str, list[Timings]]:
    """Time every variant once a round, after ``warm_up`` rounds that are not counted.

    ``progress`` is called with the number of each round, from 0, before it.
    """
    timed: dict[str, list[Timings]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        progress(number)
        for name, draw in variants.items():
            time.sleep(SETTLE_S)
            timings = draw(number)
            if number >= warm_up:
                timed[name].append(timings)
    return timed


def stages(runs: list[Timings]) -> dict[str, dict[str, float]]:
    """Median and 90th percentile of each stage over the runs, in ms.

    ``denoiser_call`` is over single calls, and 0 of pictures that one call of a loop graph makes, which is ``whole``.
    """
    values = {
        "text": [run.text_ms for run in runs],
        "denoiser_call": [call for run in runs for call in run.denoiser_ms] or [0.0],
        "denoiser": [sum(run.denoiser_ms) for run in runs],
        "loop": [run.loop_ms for run in runs],
        "decode": [run.decode_ms for run in runs],
        "whole": [run.whole_ms for run in runs],
        "total": [run.total_ms for run in runs],
    }
    return {name: {"median_ms": statistics.median(ms), "p90_ms": _p90(ms)} for name, ms in values.items()}


def times_as_fast(theirs: list[Timings], ours: list[Timings]) -> float:
    """How many times ours is as fast: the median of the ratios of each round, so that a slow minute cancels out."""
    return statistics.median(a.total_ms / b.total_ms for a, b in zip(theirs, ours, strict=True))


def _p90(values: list[float]) -> float:
    """90th percentile, interpolated linearly, as numpy's."""
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=10, method="inclusive")[-1]


def _medians(runs: list[Timings]) -> Latency:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    return Latency(
        total_ms=median([run.total_ms for run in runs]),
        text_ms=median([run.text_ms for run in runs]),
        denoiser_ms=median([call for run in runs for call in run.denoiser_ms] or [0.0]),
        decode_ms=median([run.decode_ms for run in runs]),
        calls=len(runs[0].denoiser_ms),
    )
