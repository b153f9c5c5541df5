"""Checkpoints as they are trained: folders in diffusers layout, and single files."""

from ldm_export.checkpoint.folder import PASSES, LatentDiffusion
from ldm_export.checkpoint.networks import Autoencoder, Network
from ldm_export.checkpoint.sampling_defaults import SamplingDefaults
from ldm_export.checkpoint.shipped import shipped_checkpoints

__all__ = ["PASSES", "Autoencoder", "LatentDiffusion", "Network", "SamplingDefaults", "shipped_checkpoints"]
