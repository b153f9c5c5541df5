"""Pictures in and out of files."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import ldm_reference.pictures
import numpy.typing as npt
from ldm_reference.config import ConfigError
from PIL import Image

from ldm_export.cli.options import check_output, write_output
from ldm_export.errors import InputError

Pixels = npt.NDArray[Any]
WRITABLE = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


def read_picture(path: Path, channels: int = 3) -> Pixels:
    """A file as uint8 (H, W, channels), as training reads it: :func:`ldm_reference.pictures.read_picture`.

    Raises
    ------
    InputError
        If it is not a picture that is read.
    """
    try:
        return ldm_reference.pictures.read_picture(path, channels)
    except ConfigError as error:
        raise InputError(f"{error}.") from error


def check_writable(path: Path) -> None:
    """Raise InputError unless a picture can be written to ``path``; makes its folder."""
    _format_of(path)
    check_output(path)


def _format_of(path: Path) -> str:
    name = Image.registered_extensions().get(path.suffix.lower(), "")
    if name not in WRITABLE:
        raise InputError(f"{path} cannot be written: it is not the name of a picture file. Name a .png.")
    return name


def grid(images: Pixels, columns: int | None = None) -> Image.Image:
    """Pictures (B, H, W, C) in rows of about the square root of B, on white; mode L where C is 1, else RGB."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    sheet = Image.new("L" if channels == 1 else "RGB", (columns * width, math.ceil(count / columns) * height), "white")
    for k, pixels in enumerate(images):
        picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        sheet.paste(picture, (k % columns * width, k // columns * height))
    return sheet


def save_grid(images: Pixels, path: Path) -> None:
    """Write one picture, or a grid of several."""
    content = io.BytesIO()
    try:
        grid(images).save(content, _format_of(path))
    except (OSError, ValueError) as error:  # JPEG and WebP have largest sizes
        raise InputError(f"{path} cannot hold this picture ({error}). Name a .png.") from error
    write_output(path, content.getvalue())
