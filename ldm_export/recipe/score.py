"""What a stage of a recipe is worth: how fast, how large, how good, all on its bundle; and whether it may stay."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.passes.base import Purpose
from ldm_export.recipe.settings import Budget
from ldm_export.runtime import Pipeline
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings
from ldm_export.verify.image_text_alignment import AlignmentJudge
from ldm_export.verify.latency import Latency, draw_with, time_in_turn
from ldm_export.verify.metrics import psnr
from ldm_export.verify.quality import Progress, evaluate

ROUNDS = 9
FASTER = 0.98
"""A pass for speed must take at most this share of the time of the stage before: less is within the noise."""


@dataclass(frozen=True)
class Score:
    """One stage.

    Attributes
    ----------
    bytes : of the whole bundle
    latency : of one picture, timed in turn with the stage before
    steps, guidance, sampler : how it was drawn
    frechet_distance : to the pictures that the recipe is judged by
    retrieval_at_1, retrieval_at_5 : shares; None for an unconditional model
    psnr_to_teacher_db : median over pictures of the same prompts and seeds
    """

    bytes: int
    latency: Latency
    sampler: str
    steps: int
    guidance: float
    frechet_distance: float
    retrieval_at_1: float | None
    retrieval_at_5: float | None
    psnr_to_teacher_db: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        return cls(**{**values, "latency": Latency.from_dict(values["latency"])})


@dataclass(frozen=True)
class Judge:
    """What every stage is judged by.

    Attributes
    ----------
    gallery, reference : folders of pictures with captions: what prompts are taken from and retrieval looks in, and
        what distances are to
    """

    gallery: Path
    reference: Path
    alignment: AlignmentJudge | None
    pictures: int
    progress: Progress

    @property
    def name(self) -> str:
        """What tells one set of pictures from another: file names and captions of both folders, and how many."""
        files = [folder / "metadata.jsonl" for folder in (self.gallery, self.reference)]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file.parent} has no metadata.jsonl; one line a picture is needed.")
        texts = [file.read_bytes() for file in files]
        return f"{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}, {self.pictures} pictures"

    def score(
        self, bundle: Bundle, beside: Bundle | None, teacher: npt.NDArray[Any] | None
    ) -> tuple[Score, float | None, npt.NDArray[Any]]:
        """The score of a bundle; by how much it is faster than ``beside``, timed in turn; and its pictures."""
        model = bundle.manifest.model
        settings = SamplingSettings(
            prompts=self.pictures,
            sampler=model["default_sampler"],
            steps=model["default_steps"],
            guidance=bundle.roles.guidance.scale,
        )
        report = evaluate(
            BundleImageGenerator(bundle), self.gallery, self.reference, settings, self.alignment, self.progress
        )
        prompts = [str(prompt) for prompt in report.prompts]
        bundles = {"this": bundle, **({} if beside is None else {"beside": beside})}
        reads_text = bool(bundle.roles.text_encoders)
        latencies = time_in_turn(
            {name: draw_with(Pipeline(each, "cpu"), prompts if reads_text else None) for name, each in bundles.items()},
            ROUNDS,
        )
        figures = {name: figure.value for name, figure in report.figures.items()}
        score = Score(
            bytes=bundle.size_bytes,
            latency=latencies["this"],
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            frechet_distance=figures["frechet_distance"],
            retrieval_at_1=figures.get("retrieval_at_1"),
            retrieval_at_5=figures.get("retrieval_at_5"),
            psnr_to_teacher_db=None if teacher is None else float(np.median(psnr(report.images, teacher))),
        )
        faster = None if beside is None else latencies["beside"].total_ms / latencies["this"].total_ms
        return score, faster, report.images


def verdict(
    purpose: Purpose,
    budget: Budget,
    teacher: Score,
    before: Score,
    after: Score,
    faster: float,
) -> str | None:
    """Why a pass is undone, with its numbers; None where it stays."""
    ratio = after.frechet_distance / max(teacher.frechet_distance, 1e-12)  # a teacher may draw what it is judged by
    if not ratio <= budget.frechet_ratio:  # true for NaN, as below
        return (
            f"Fréchet distance {after.frechet_distance:.1f} is {ratio:.2f} times the teacher's "
            f"{teacher.frechet_distance:.1f}; {budget.frechet_ratio:g} times is allowed"
        )
    if teacher.retrieval_at_5 is not None and after.retrieval_at_5 is not None:
        drop = teacher.retrieval_at_5 - after.retrieval_at_5
        if not drop <= budget.retrieval_drop + 1e-9:
            return (
                f"R@5 fell from the teacher's {teacher.retrieval_at_5:.3f} to {after.retrieval_at_5:.3f}; "
                f"a drop of {budget.retrieval_drop:g} is allowed"
            )
    if purpose == "speed" and not faster >= 1 / FASTER:
        return f"it is meant to be faster, and is {faster:.2f} times as fast as the stage before"
    if purpose == "bytes" and after.bytes >= before.bytes:
        return f"it is meant to be smaller, and has {after.bytes:,} bytes where the stage before has {before.bytes:,}"
    return None
