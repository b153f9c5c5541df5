"""How long a picture takes, in turn: every round times each side once, so that a slow minute slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends.auto import SETTLE_S
from ldm_export.runtime.pipeline import Timings


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one picture, medians over the rounds; ``unet_ms`` is one call, ``calls`` how many there are."""

    total_ms: float
    text_ms: float
    unet_ms: float
    decode_ms: float
    calls: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


Draw = Callable[[int], Timings]
"""Draws one picture with a seed and tells how long each stage took."""


def draw_with(pipeline: Pipeline, prompts: list[str] | None) -> Draw:
    """One picture of a bundle a call, as it is drawn by default, prompt after prompt; None for models without text."""

    def draw(seed: int) -> Timings:
        if prompts:  # a prompt that is new each time, as the cache of encoded prompts would make text free
            return pipeline.generate(f"{prompts[seed % len(prompts)]} {seed}", seed=seed).timings
        return pipeline.generate(seed=[seed]).timings

    return draw


def time_in_turn(sides: Mapping[str, Draw], rounds: int) -> dict[str, Latency]:
    """Time every side once a round, after a round that is not counted."""
    timed: dict[str, list[Timings]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, draw in sides.items():
            time.sleep(SETTLE_S)
            timings = draw(number)
            if number:
                timed[name].append(timings)
    return {name: _medians(runs) for name, runs in timed.items()}


def _medians(runs: list[Timings]) -> Latency:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    return Latency(
        total_ms=median([run.total_ms for run in runs]),
        text_ms=median([run.text_ms for run in runs]),
        unet_ms=median([call for run in runs for call in run.unet_ms]),
        decode_ms=median([run.decode_ms for run in runs]),
        calls=len(runs[0].unet_ms),
    )
