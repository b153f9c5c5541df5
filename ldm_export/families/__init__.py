"""Families of latent diffusion models: one file each says what a checkpoint consists of and which graphs it becomes."""

from __future__ import annotations

from pathlib import Path

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.families.base import Family
from ldm_export.families.dit import DiT
from ldm_export.families.pixart import PixArt
from ldm_export.families.sd3 import StableDiffusion3
from ldm_export.families.stable_diffusion import StableDiffusion

FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusion3, PixArt, DiT)


def open_checkpoint(
    checkpoint: str | Path, *, sampler: str | None = None, prediction_type: str | None = None
) -> LatentDiffusion:
    """Open a checkpoint of any family: a folder, a single file, or a shipped one by its name.

    Parameters
    ----------
    sampler, prediction_type : in place of what its files say, as :class:`LatentDiffusion` has them

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, it is a pickle, or a component is missing.
    """
    kinds = [family.kind for family in FAMILIES]
    return LatentDiffusion.open(checkpoint, kinds, sampler=sampler, prediction_type=prediction_type)


def family_of(checkpoint: LatentDiffusion) -> Family:
    """The family of a checkpoint."""
    return next(family for family in FAMILIES if family.kind is checkpoint.kind)(checkpoint)
