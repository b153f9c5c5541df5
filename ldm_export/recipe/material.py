"""What passes learn from and are calibrated with: latents that the teacher makes, and inputs of a stage's graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.families.tokenizers import open_tokenizer
from ldm_export.passes.teacher import TeacherData, draw_latents, encode_conditions, encode_pictures
from ldm_export.recipe.settings import Teacher
from ldm_export.recipe.stages import Stage
from ldm_export.verify.calibration import calibration_calls, calibration_conditions
from ldm_export.verify.image_text_alignment import Pictures
from ldm_export.verify.quality import Progress

LATENTS_SEED = 0


@dataclass
class Material:
    """What is made when the first pass asks for it.

    Attributes
    ----------
    teacher : the checkpoint that the recipe began with
    options : the recipe's, on the teacher
    conditions : prompts or classes that the teacher is asked for
    pictures : what students learn from, if that is not what the teacher generates
    file : keeps what the teacher has generated
    """

    teacher: LatentDiffusion
    options: Teacher
    conditions: Sequence[str | int]
    pictures: Pictures | None
    file: Path
    progress: Progress
    _calibration: tuple[str, dict[str, Any]] = field(default=("", {}))

    @cached_property
    def data(self) -> TeacherData:
        """What students learn from."""
        reads_text = self.teacher.reads_text
        tokenize = open_tokenizer(self.teacher.tokenizer_folder("text_encoder")) if reads_text else None
        conditions, empty = encode_conditions(
            self.teacher,
            self.conditions,
            None if tokenize is None else lambda prompts: torch.from_numpy(tokenize(prompts)),
        )
        if self.teacher.drawing.guidance <= 1:
            empty = {}
        if self.pictures is not None:
            owner = [number for number, _ in self.pictures.conditions] or list(range(len(self.pictures.images)))
            latents = encode_pictures(self.teacher, self.pictures.images)[owner]
            own = torch.arange(len(latents)) if conditions else torch.zeros(len(latents), dtype=torch.int64)
            return TeacherData(conditions, empty, latents, own, self.teacher.drawing.guidance)
        count = self.options.latents
        return draw_latents(
            self.teacher,
            conditions,
            empty,
            self.teacher.drawing,
            min(count, len(self.conditions)) if reads_text else count,
            LATENTS_SEED,
            self.file,
            self.progress,
            self.options.mixed_precision,
        )

    @property
    def calibration_conditions(self) -> list[str | int]:
        """Prompts or classes of the pictures that graphs are calibrated on."""
        return calibration_conditions(self.conditions)

    def calls(self, stage: Stage) -> dict[str, Any]:
        """Inputs of each of a stage's graphs while those pictures are generated."""
        if self._calibration[0] != stage.key:
            self.progress("calibration pictures", 0, 1)
            self._calibration = stage.key, calibration_calls(stage.bundle, self.calibration_conditions)
        return self._calibration[1]
