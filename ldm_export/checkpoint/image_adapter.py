"""An IP-Adapter (2308.06721) beside a checkpoint: its file, and the image encoder that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ldm_export.checkpoint.added import AddedNetwork
from ldm_export.checkpoint.weights import FLOATS, opened
from ldm_export.errors import CheckpointError
from ldm_export.reading.hashes import sha256_of
from ldm_export.reading.weight_files import HOW_TO_CONVERT, PICKLES


@dataclass(frozen=True)
class ImageAdapter:
    """A safetensors file with ``image_proj.*`` and ``ip_adapter.*``, and an image encoder of CLIP's kind."""

    file: Path
    encoder: AddedNetwork

    @cached_property
    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Weights as float32, by part (``image_proj``, ``ip_adapter``) and their names in it.

        Raises
        ------
        CheckpointError
            If the file is a pickle, cannot be read, or is no IP-Adapter.
        """
        if self.file.suffix in (*PICKLES, ".bin"):
            raise CheckpointError(f"{self.file} is a pickle, which can run code when it is opened. {HOW_TO_CONVERT}")
        parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        with opened(self.file) as content:
            for key in content.keys():  # noqa: SIM118 - it is no mapping
                part, _, name = key.partition(".")
                if part not in parts:
                    raise CheckpointError(
                        f"{self.file} has the weight {key[:60]!r}; an IP-Adapter has image_proj.* and ip_adapter.*. "
                        "Give the file of an IP-Adapter."
                    )
                tensor = content.get_tensor(key)
                if tensor.dtype not in FLOATS or not torch.isfinite(tensor).all():
                    raise CheckpointError(
                        f"{self.file}: {key!r} holds NaN or infinity, or no floating-point numbers. Download it again."
                    )
                parts[part][name] = tensor.float()
        if missing := [part for part, found in parts.items() if not found]:
            raise CheckpointError(f"{self.file} has no {missing[0]}.*. Give the file of an IP-Adapter.")
        return parts

    @property
    def weights_bytes(self) -> int:
        """What all weights take in float32."""
        own = sum(4 * tensor.numel() for part in self.tensors.values() for tensor in part.values())
        return own + self.encoder.weights_bytes

    @property
    def sha256(self) -> str:
        """SHA-256 of the file and of the encoder's weights, hex."""
        return sha256_of(self.file, *self.encoder.weight_files)
