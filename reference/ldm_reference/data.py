"""A folder of pictures with captions or labels, in the *imagefolder* convention.

``metadata.jsonl`` holds one JSON object a line with ``file_name`` (relative to the folder) and, as the model asks for,
``text`` or ``label`` (a class, from 0). A picture may stand on several lines, one for each of its captions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm_reference.config import ConfigError, read_text
from ldm_reference.pictures import read_picture

EXAMPLES = {
    "text": '{"file_name": "cat.png", "text": "a cat"}',
    "label": '{"file_name": "boot.png", "label": 9}',
    None: '{"file_name": "wood.png"}',
}
"""A line of the metadata for each kind of condition."""
_SURROGATE = re.compile("[\ud800-\udfff]")


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
        if not metadata.exists():
            raise ConfigError(f"{folder} has no metadata.jsonl; one line a picture is needed: {example}")
        index: dict[str, int] = {}
        captions: list[tuple[int, str]] = []
        labels: dict[int, int] = {}
        for number, line in enumerate(read_text(metadata).split("\n"), start=1):  # splitlines would cut at U+2028
            if not line.strip():
                continue
            where = f"{metadata}, line {number}"
            try:
                entry = json.loads(line)
                name, value = entry["file_name"], entry[condition] if condition else None
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ConfigError(f"{where}: not an object like {example} ({type(error).__name__}: {error})") from error
            if not isinstance(name, str) or (condition == "text" and not isinstance(value, str)):
                raise ConfigError(f"{where}: 'file_name' and 'text' must be strings")
            if name not in index:
                _check_name(folder, name, where)
            if condition == "text" and _SURROGATE.search(value):
                raise ConfigError(f"{where}: 'text' has half of a surrogate pair")
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


def _check_name(folder: Path, name: str, where: str) -> None:
    """Refuse what is not the name of a regular file below the folder, or of a link to a regular file anywhere."""
    shown = f"{name[:60]!r}"
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ConfigError(f"{where}: {shown} leaves the folder")
    try:
        there = (folder / name).is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long; NUL; links in a circle
        raise ConfigError(f"{where}: {shown} is no name of a file ({error})"[:400]) from error
    if not there:
        raise ConfigError(f"{where}: {shown} is not a file in {folder}")


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
        If it cannot be read whole (:func:`ldm_reference.pictures.read_picture`).
    """
    pixels = read_picture(path, channels)
    if pixels.shape[:2] != (resolution, resolution):
        flat = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        pixels = np.array(ImageOps.fit(flat, (resolution, resolution), Image.Resampling.LANCZOS))
    square = torch.from_numpy(pixels).reshape(resolution, resolution, channels)  # uint8
    return square.permute(2, 0, 1).float() / 127.5 - 1.0


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
