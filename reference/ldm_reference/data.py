"""A folder of pictures with captions or labels, in the *imagefolder* convention.

``metadata.jsonl`` holds one JSON object a line with ``file_name`` (relative to the folder) and, as the model asks for,
``text`` or ``label`` (a class, from 0). A picture may stand on several lines, one for each of its captions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm_reference.config import ConfigError

EXAMPLES = {
    "text": '{"file_name": "cat.png", "text": "a cat"}',
    "label": '{"file_name": "boot.png", "label": 9}',
    None: '{"file_name": "wood.png"}',
}
"""A line of the metadata for each kind of condition."""


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and what is said of them.

    Attributes
    ----------
    folder : where the files are
    files : file names, each once
    captions : (index into ``files``, text), one a line of the metadata; empty where the model reads no text
    labels : the class of each file; empty where the model has none
    resolution : side of the square that :meth:`load` gives, in pixels
    channels : 3, or 1 for grey
    """

    folder: Path
    files: tuple[str, ...]
    captions: tuple[tuple[int, str], ...]
    labels: tuple[int, ...]
    resolution: int
    channels: int

    @classmethod
    def open(
        cls,
        folder: Path,
        resolution: int,
        channels: int = 3,
        *,
        condition: str | None = "text",
        classes: int | None = None,
    ) -> CaptionedImages:
        """Read the metadata; no picture is opened.

        Parameters
        ----------
        condition : "text", "label" or None: what every line must have beside ``file_name``
        classes : labels must be below it

        Raises
        ------
        ConfigError
            Naming the file and the line, if a line or a picture is missing or is not what is needed.
        """
        metadata = folder / "metadata.jsonl"
        example = EXAMPLES[condition]
        if not metadata.is_file():
            raise ConfigError(f"{folder} has no metadata.jsonl; one line a picture is needed: {example}")
        try:
            lines = metadata.read_text(encoding="utf-8").split("\n")  # splitlines would cut a caption at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{metadata} is not readable text ({error})") from error
        index: dict[str, int] = {}
        captions: list[tuple[int, str]] = []
        labels: dict[int, int] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{metadata}, line {number}"
            try:
                entry = json.loads(line)
                name, value = entry["file_name"], entry[condition] if condition else None
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ConfigError(f"{where}: not an object like {example} ({error})") from error
            if not isinstance(name, str) or (condition == "text" and not isinstance(value, str)):
                raise ConfigError(f"{where}: 'file_name' and 'text' must be strings")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ConfigError(f"{where}: {name!r} leaves the folder")
            if name not in index and not (folder / name).is_file():
                raise ConfigError(f"{where}: {name!r} is not in {folder}")
            picture = index.setdefault(name, len(index))
            if condition == "text":
                captions.append((picture, value))
            elif condition == "label" and labels.setdefault(picture, _label(value, classes, where)) != value:
                raise ConfigError(f"{where}: {name!r} has two labels, {labels[picture]} and {value}")
        if not index:
            raise ConfigError(f"{metadata} is empty; one line a picture is needed: {example}")
        return cls(folder, tuple(index), tuple(captions), tuple(labels.values()), resolution, channels)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Pictures as (B, channels, resolution, resolution), float32 in [-1, 1]."""
        return torch.stack([load_picture(self.folder / self.files[i], self.resolution, self.channels) for i in indices])


def _label(value: Any, classes: int | None, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (classes and value >= classes):
        allowed = f"from 0 to {classes - 1}" if classes else "of at least 0"
        raise ConfigError(f"{where}: label {value!r} must be a whole number {allowed}")
    return value


def load_picture(path: Path, resolution: int, channels: int = 3) -> Tensor:
    """One picture, transparency on white, centre-cropped to a square: (channels, resolution, resolution) in [-1, 1].

    Of an animated picture it is the first frame; grey becomes colour, or colour grey (ITU-R 601), as asked.

    Raises
    ------
    ConfigError
        If it cannot be read whole, or has more pixels than Pillow opens.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            rgba = upright.convert("RGBA")
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{path} is too large ({error}); make it smaller first") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise
        raise ConfigError(f"{path} is not a readable picture ({error})") from error
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB" if channels == 3 else "L")
    if flat.size != (resolution, resolution):
        flat = ImageOps.fit(flat, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(flat)).reshape(resolution, resolution, channels)  # uint8
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
