"""The whole chain on one model: export it, draw the same prompts with PyTorch and with the bundle, compare.

Where a student of the model is shipped, a network that the recipe cpu-fast taught to draw the same in few steps, it is
exported too and draws beside its teacher."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.bench.parity import psnr_db
from ldm_export.checkpoint import LatentDiffusion, shipped_checkpoints
from ldm_export.export.chain import export_bundle
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.runtime import Pipeline, Tokenizer
from ldm_export.torch_reference import TorchReference

PROMPTS = (
    "grinning face with smiling eyes",
    "red apple",
    "black cat",
    "heavy black heart",
    "pizza",
    "sunflower",
    "automobile",
    "rocket",
    "snowman",
    "strawberry",
    "octopus",
    "soccer ball",
    "crescent moon",
    "birthday cake",
    "frog face",
    "smiling face with sunglasses",
)
STEPS, GUIDANCE, BATCH = 20, 4.0, 4
STAGES = ("text", "unet", "loop", "decode")
SAME_PICTURE_DB = 45.0
SETTLE_S = 0.5
"""Between the sides: threads of one library that still wait, spinning, for more work would slow the other."""


STUDENT = "{}-fast"
"""Of a shipped model, what its student is called."""

Drawn = tuple[npt.NDArray[Any], dict[str, float]]
Draw = Callable[[tuple[str, ...], range], Drawn]
"""Prompts and seeds to pictures, and milliseconds by stage."""


@dataclass(frozen=True)
class Student:
    """The same prompts and seeds, drawn by the model's student: ``images`` uint8 (16, H, W, 3), in ``steps`` calls."""

    name: str
    images: npt.NDArray[Any]
    steps: int


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes
    ----------
    torch_images, bundle_images : uint8 (16, H, W, 3), the same prompts and seeds
    psnr : dB, one a picture
    milliseconds : side -> stage -> median over the batches of :data:`BATCH` pictures
    student : if there is one
    """

    bundle: Path
    backend: str
    parity: tuple[Mapping[str, Any], ...]
    torch_images: npt.NDArray[Any]
    bundle_images: npt.NDArray[Any]
    psnr: tuple[float, ...]
    milliseconds: dict[str, dict[str, float]]
    student: Student | None = None

    @property
    def passed(self) -> bool:
        return all(record["passed"] for record in self.parity) and min(self.psnr) >= SAME_PICTURE_DB

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "prompts": list(PROMPTS),
            "steps": STEPS,
            "guidance": GUIDANCE,
            "batch": BATCH,
            "parity": list(self.parity),
            "psnr_db": [min(value, 999.0) for value in self.psnr],  # JSON has no infinity
            "milliseconds": self.milliseconds,
            "student": None if self.student is None else {"name": self.student.name, "steps": self.student.steps},
            "passed": self.passed,
        }


def run_demo(checkpoint: LatentDiffusion, folder: Path, progress: Callable[[str], None]) -> Demo:
    """Export ``checkpoint`` to ``folder/bundle`` and draw :data:`PROMPTS` with both, in turn, batch by batch; and with
    its student, from ``folder/fast.bundle``, if one is shipped."""
    reference = TorchReference(checkpoint)  # first: it refuses what it cannot draw
    bundle = export_bundle(
        checkpoint, folder / "bundle", force=True, progress=lambda stage: progress(f"export: {stage}")
    )
    build_ort_cpu(bundle, progress)
    pipeline = Pipeline(bundle, "cpu")
    tokenizer = Tokenizer(bundle.path / "tokenizer")
    size = (bundle.manifest.model["height"], bundle.manifest.model["width"])

    def draw_with_torch(prompts: tuple[str, ...], seeds: range) -> Drawn:
        ids, negative_ids = tokenizer(prompts), tokenizer([""] * len(prompts))
        return reference.draw(ids, negative_ids, seeds, steps=STEPS, guidance=GUIDANCE, size=size)

    sides: dict[str, Draw] = {
        "PyTorch": draw_with_torch,
        "bundle": _draw_with(pipeline, steps=STEPS, guidance=GUIDANCE),
    }
    student, name = None, STUDENT.format(checkpoint.name)
    if name in shipped_checkpoints():
        taught = export_bundle(
            LatentDiffusion.open(name),
            folder / "fast.bundle",
            force=True,
            progress=lambda stage: progress(f"export of the student: {stage}"),
        )
        build_ort_cpu(taught, progress)
        sides["student"] = _draw_with(Pipeline(taught, "cpu"))
    for draw in sides.values():
        progress("warming up")
        draw(("warm up",) * BATCH, range(BATCH))
    images: dict[str, list[npt.NDArray[Any]]] = {side: [] for side in sides}
    times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for start in range(0, len(PROMPTS), BATCH):
        for side, draw in sides.items():
            progress(f"drawing {start + BATCH} of {len(PROMPTS)} with {side}")
            time.sleep(SETTLE_S)
            drawn, milliseconds = draw(PROMPTS[start : start + BATCH], range(start, start + BATCH))
            images[side].append(drawn)
            times[side].append(milliseconds)
    whole = {side: np.concatenate(parts) for side, parts in images.items()}
    if "student" in sides:
        student = Student(name, whole["student"], taught.manifest.model["default_steps"])
    return Demo(
        bundle=bundle.path,
        backend=pipeline.backend,
        parity=tuple(bundle.manifest.parity),
        torch_images=whole["PyTorch"],
        bundle_images=whole["bundle"],
        psnr=tuple(psnr_db(ours, theirs) for ours, theirs in zip(whole["bundle"], whole["PyTorch"], strict=True)),
        milliseconds={
            side: {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
            for side, runs in times.items()
        },
        student=student,
    )


def _draw_with(pipeline: Pipeline, **options: Any) -> Draw:
    def draw(prompts: tuple[str, ...], seeds: range) -> Drawn:
        result = pipeline.generate(prompts, seed=list(seeds), **options)
        times = result.timings
        values = (times.text_ms, sum(times.unet_ms), times.loop_ms, times.decode_ms)
        return result.images, dict(zip(STAGES, values, strict=True))

    return draw
