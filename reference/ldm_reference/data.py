"""A folder of pictures with captions, in the *imagefolder* convention.

``metadata.jsonl`` holds one JSON object a line with ``file_name`` (relative to the folder) and ``text``. A picture may
stand on several lines, one for each of its captions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm_reference.config import ConfigError


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and their captions.

    Attributes
    ----------
    folder : where the files are
    files : file names, each once
    captions : (index into ``files``, text), one a line of the metadata
    resolution : side of the square that :meth:`load` gives, in pixels
    """

    folder: Path
    files: tuple[str, ...]
    captions: tuple[tuple[int, str], ...]
    resolution: int

    @classmethod
    def open(cls, folder: Path, resolution: int) -> CaptionedImages:
        metadata = folder / "metadata.jsonl"
        if not metadata.is_file():
            raise ConfigError(
                f"{folder} has no metadata.jsonl; one line a picture is needed: "
                '{"file_name": "cat.png", "text": "a cat"}'
            )
        try:
            lines = metadata.read_text(encoding="utf-8").split("\n")  # splitlines would cut a caption at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{metadata} is not readable text ({error})") from error
        index: dict[str, int] = {}
        captions = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{metadata}, line {number}"
            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ConfigError(f"{where}: not an object with 'file_name' and 'text' ({error})") from error
            if not isinstance(name, str) or not isinstance(text, str):
                raise ConfigError(f"{where}: 'file_name' and 'text' must be strings")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ConfigError(f"{where}: {name!r} leaves the folder")
            if name not in index and not (folder / name).is_file():
                raise ConfigError(f"{where}: {name!r} is not in {folder}")
            captions.append((index.setdefault(name, len(index)), text))
        if not captions:
            raise ConfigError(f"{metadata} is empty; one line a picture is needed")
        return cls(folder, tuple(index), tuple(captions), resolution)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Pictures as (B, 3, resolution, resolution), float32 in [-1, 1]."""
        return torch.stack([load_picture(self.folder / self.files[i], self.resolution) for i in indices])


def load_picture(path: Path, resolution: int) -> Tensor:
    """One picture, transparency on white, centre-cropped to a square: (3, resolution, resolution) in [-1, 1]."""
    try:
        with Image.open(path) as image:
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise ConfigError(f"{path} is not a readable picture ({error})") from error
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if flat.size != (resolution, resolution):
        flat = ImageOps.fit(flat, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(flat).copy())  # (H, W, 3), uint8
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def batch_indices(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The ``step``-th batch of an endless shuffled pass over ``range(count)``.

    A pure function of its arguments, so that a resumed run sees the batches that an uninterrupted one would have seen.
    """
    if batch > count:
        raise ConfigError(f"batch size {batch} is larger than the {count} samples; lower it or add pictures")
    per_epoch = count // batch
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[position * batch : (position + 1) * batch].tolist()
