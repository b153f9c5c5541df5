"""What judges pictures: the data they are compared with, EfficientNet-Lite0 features, image-text alignment.

With ``checkpoint``, the seam to ``ldm_reference``. A judge is fixed by its weights and is never part of what it judges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ldm_reference import alignment
from ldm_reference.config import ConfigError
from ldm_reference.data import CaptionedImages
from ldm_reference.features import EfficientNetLite0, feature_network, picture_features
from ldm_reference.losses import perceptual_distance
from ldm_reference.text_encoder import CLIPTextModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import CheckpointError, InputError

Array = npt.NDArray[Any]
Encode = Callable[[Sequence[str]], Array]
"""Prompts to token ids (B, L), int64."""

CHUNK = 64
AT_ONCE = 4
"""Pictures that go through the feature network together: activations of more do not stay in the cache or the heap, and
take three times as long on a CPU."""
SETS = 4
"""Sets of pictures whose features are remembered."""
_remembered: dict[str, Array] = {}


@dataclass(frozen=True)
class Pictures:
    """Real pictures and what is said of them.

    Attributes
    ----------
    images : uint8 (N, H, W, C)
    conditions : (number of the picture, caption or class), one a line of the data's metadata; empty for an
        unconditional model
    """

    images: Array
    conditions: tuple[tuple[int, str | int], ...]


def open_pictures(folder: Path, resolution: int, channels: int, condition: str | None) -> Pictures:
    """Read a folder in the imagefolder convention; ``condition`` is "text", "label" or None.

    Raises
    ------
    InputError
        If a line or a picture cannot be used.
    """
    try:
        data = CaptionedImages.open(folder, resolution, channels, condition=condition)
        indices = range(len(data.files))
        parts = [_bytes(data.load(indices[start : start + CHUNK])) for start in range(0, len(indices), CHUNK)]
    except ConfigError as error:
        raise InputError(f"{error}.") from error
    return Pictures(np.concatenate(parts), data.captions or tuple(enumerate(data.labels)))


def _bytes(pictures: torch.Tensor) -> Array:
    """Pictures (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C)."""
    return np.asarray(((pictures + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _pixels(images: Array) -> torch.Tensor:
    """Pictures uint8 (B, H, W, C) -> (B, C, H, W) in [-1, 1].

    They lie in memory in one order, whatever the array's: a convolution rounds otherwise in another.
    """
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def features_of(images: Array, progress: Callable[[int, int], None] = lambda done, of: None) -> Array:
    """EfficientNet-Lite0 features of pictures uint8 (N, H, W, C): (N, 1280), float64. Those of the last few sets are
    remembered: models that are compared are judged by the same real pictures.

    Raises
    ------
    InputError
        If the package with the weights is not installed.
    """
    key = hashlib.sha256(images.tobytes()).hexdigest()
    if key in _remembered:
        return np.array(_remembered[key])
    parts = []
    for start in range(0, len(images), CHUNK):
        try:
            parts.append(picture_features(_pixels(images[start : start + CHUNK]), AT_ONCE).double().numpy())
        except ConfigError as error:
            raise InputError(f"{error}.") from error
        progress(min(start + CHUNK, len(images)), len(images))
    _remembered[key] = np.concatenate(parts)
    while len(_remembered) > SETS:
        del _remembered[next(iter(_remembered))]
    return np.array(_remembered[key])


def open_feature_network() -> EfficientNetLite0:
    """EfficientNet-Lite0 with its weights.

    Raises
    ------
    InputError
        If the package with the weights is not installed.
    """
    try:
        return feature_network()
    except ConfigError as error:
        raise InputError(f"{error}.") from error


@torch.no_grad()
def perceptual_distances(ours: Array, theirs: Array) -> Array:
    """How different each pair of pictures, uint8 (N, H, W, C), looks to EfficientNet-Lite0: (N,), 0 for equal ones.

    The distance of :func:`ldm_reference.losses.perceptual_distance`, which is made as LPIPS is (1801.03924) of another
    network and without its learned weights: it is not comparable with a published LPIPS.

    Raises
    ------
    InputError
        If the package with the weights is not installed.
    """
    network = open_feature_network()
    pairs = ([_pixels(image[None]) for image in pair] for pair in zip(ours, theirs, strict=True))
    return np.array([float(perceptual_distance(network, *pair)) for pair in pairs])


class AlignmentJudge:
    """The image and text towers of a checkpoint's contrastive stage; ``name`` is the checkpoint's."""

    def __init__(self, name: str, heads: alignment.AlignmentHeads, text_encoder: CLIPTextModel, encode: Encode):
        self.name = name
        self._heads, self._text_encoder, self._encode = heads, text_encoder, encode

    @classmethod
    def open(cls, checkpoint: LatentDiffusion, encode: Encode) -> AlignmentJudge | None:
        """The judge that a checkpoint carries, or None; ``encode`` is its tokenizer.

        Raises
        ------
        CheckpointError
            If its files are damaged.
        """
        if not (checkpoint.path / alignment.FOLDER).is_dir():
            return None
        own = checkpoint.path / alignment.FOLDER / "text_encoder"
        try:
            heads = alignment.load_heads(checkpoint.path)
            text_encoder = _text_encoder(own) if own.is_dir() else checkpoint.load("text_encoder")
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            folder = checkpoint.path / alignment.FOLDER
            raise CheckpointError(f"{folder} is damaged ({error}). Fetch it again, or remove it.") from error
        assert isinstance(text_encoder, CLIPTextModel)
        return cls(checkpoint.name, heads, text_encoder, encode)

    @torch.no_grad()
    def score(self, features: Array, prompts: Sequence[str]) -> Array:
        """Cosine of each picture, by its features (N, 1280), with its prompt: (N,), in [-1, 1]."""
        pooled = self._text_encoder(torch.from_numpy(self._encode(prompts))).pooled
        text, pictures = self._heads.text(pooled), self._heads.pictures(torch.from_numpy(features).float())
        return (text * pictures).sum(dim=1).double().numpy()


def _text_encoder(folder: Path) -> CLIPTextModel:
    text_encoder = CLIPTextModel.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    weights = load_file(folder / "model.safetensors")
    text_encoder.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    return text_encoder.requires_grad_(False).eval()
