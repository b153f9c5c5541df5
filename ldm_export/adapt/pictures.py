"""A folder of pictures to learn from, each with what it shows: a text, a class, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ldm_reference.config import ConfigError
from ldm_reference.pictures import read_picture
from PIL import Image, ImageOps

from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, read_text

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
Asked = str | int | None
"""What a picture shows, as a model is asked for it: a prompt, the number of a class, or None."""


@dataclass(frozen=True)
class Shown:
    """A picture and what it shows."""

    file: Path
    asked: Asked


def pictures_in(folder: Path, asked: Asked) -> list[Shown]:
    """The pictures of a folder, in the order of their names.

    Parameters
    ----------
    asked : what all of them show; where that is a prompt, a picture whose text file is beside it (``1.txt`` of
        ``1.png``) shows what the text says

    Raises
    ------
    InputError
        If there is no picture, or a text cannot be read or is empty.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder. Name one with 5 to 50 pictures.")
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and not path.name.startswith(".")
    )
    if not files:
        raise InputError(f"{folder} has no pictures ({', '.join(ENDINGS)}). Put 5 to 50 of them there.")
    return [Shown(file, _caption(file, asked) if isinstance(asked, str) else asked) for file in files]


def _caption(picture: Path, prompt: str) -> str:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return prompt
    try:
        text = " ".join(read_text(file).split())
    except (OSError, MalformedError) as error:
        raise InputError(f"{file} cannot be read as text ({error}). Write what {picture.name} shows.") from error
    if not text:
        raise InputError(f"{file} is empty. Write what {picture.name} shows, or delete it: --prompt counts then.")
    return text


def read_images(shown: list[Shown], size: tuple[int, int], channels: int) -> npt.NDArray[np.uint8]:
    """Pictures uint8 (N, H, W, channels), cut at the centre to the shape of ``size`` (H, W) and resized to it.

    Raises
    ------
    InputError
        If one cannot be read.
    """
    images = np.empty((len(shown), *size, channels), np.uint8)
    for row, each in zip(images, shown, strict=True):
        try:
            pixels = read_picture(each.file, channels)
        except ConfigError as error:
            raise InputError(f"{each.file}: {error}. Replace or remove it.") from error
        if pixels.shape[:2] != size:
            flat = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            fitted = ImageOps.fit(flat, (size[1], size[0]), Image.Resampling.LANCZOS)
            pixels = np.asarray(fitted).reshape(row.shape)
        row[:] = pixels
    return images
