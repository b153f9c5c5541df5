"""Families of latent diffusion models: one file each says how a checkpoint's networks become the graphs of a bundle."""

from __future__ import annotations

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.families.base import Family
from ldm_export.families.stable_diffusion import StableDiffusion


def family_of(checkpoint: LatentDiffusion) -> Family:
    """The family of a checkpoint, by the networks that its ``model_index.json`` names."""
    return StableDiffusion(checkpoint)
