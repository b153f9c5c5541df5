"""Reads pictures that somebody else made: bounded, upright, and never a value cut off. Needs numpy and Pillow alone."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm_reference.config import ConfigError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MOST_BYTES = 256 << 20
MOST_PIXELS = 1 << 26
"""8192 x 8192."""
_SMALLER = f"at most {MOST_PIXELS:,} are read, so make it smaller first"
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


def read_picture(path: Path, channels: int = 3) -> npt.NDArray[np.uint8]:
    """A picture file as uint8 (H, W, channels): the first frame, turned upright as EXIF says, transparency on white.

    Grey becomes colour, or colour grey (ITU-R 601), as asked. Grey of 16 bits is scaled to 8, and floating-point grey
    in [0, 1] to [0, 255].

    Raises
    ------
    ConfigError
        If it is not a regular file of one of `FORMATS`, at most `MOST_BYTES` long and `MOST_PIXELS` large, whose values
        have a meaning; names the file.
    """
    try:
        data = _content(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what is strange in a file and of its size
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ConfigError(f"{image.width} x {image.height} pixels; {_SMALLER}")
                tags = dict(getattr(image, "tag_v2", {}))  # of TIFF
                rgba = _of_8_bits(ImageOps.exif_transpose(image), tags).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return np.array(flat.convert("L" if channels == 1 else "RGB")).reshape(rgba.height, rgba.width, channels)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ConfigError(f"{path} is not a readable picture; give one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{path} is not a readable picture (too many pixels; {_SMALLER})") from error
    except Exception as error:  # Pillow's readers raise what meets them: SyntaxError, struct.error, RuntimeError ...
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path} is not a readable picture ({why})") from error


def _content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:  # O_NONBLOCK: a pipe is not waited for
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("not a regular file")
        if status.st_size > MOST_BYTES:
            raise ConfigError(f"{status.st_size:,} bytes; at most {MOST_BYTES:,} are read")
        return file.read(MOST_BYTES)


def _of_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey of more than 8 bits as mode L, which Pillow's own conversion would cut off at 255; others as they are."""
    if image.mode == "F":
        values: npt.NDArray[Any] = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ConfigError("floating-point values beyond [0, 1]; save it with 8 or 16 bits")
    elif image.mode.startswith("I"):
        if tags and (image.mode == "I" or tags.get(_BITS_PER_SAMPLE) != (16,)):
            raise ConfigError("grey of neither 8 nor 16 bits; save it with 8 or 16 bits")
        values = np.asarray(image) / 65535
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = 1 - values
    else:
        return image
    return Image.fromarray((values * 255).round().astype(np.uint8))
