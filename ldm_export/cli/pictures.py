"""Pictures in and out of files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm_export.errors import InputError

Pixels = npt.NDArray[Any]
WRITABLE = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


def read_picture(path: Path, channels: int = 3) -> Pixels:
    """A file as uint8 (H, W, channels), turned upright, transparency on white; grey (ITU-R 601) for one channel."""
    try:
        with Image.open(path) as image:
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; --image takes a picture file.") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture ({error}). Give a PNG or JPEG.") from error
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(flat.convert("L" if channels == 1 else "RGB")).reshape(rgba.height, rgba.width, -1)


def check_writable(path: Path) -> None:
    """Raise InputError unless a picture can be written to ``path``; makes its folder."""
    if Image.registered_extensions().get(path.suffix.lower()) not in WRITABLE or path.is_dir():
        raise InputError(f"{path} cannot be written: it is not the name of a picture file. Name a .png.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}). Name another folder.") from error


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
    check_writable(path)
    try:
        grid(images).save(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}). Name a .png in a folder that can be written.") from error
