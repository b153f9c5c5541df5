"""Picture files with their request inside: PNG, JPEG and WebP.

PNG has it as the text chunk ``parameters``: tEXt where it is Latin-1, else iTXt (PNG 1.2, 4.2.3). JPEG and WebP have
it as EXIF's UserComment (Exif 2.32, 4.6.5): the eight bytes ``UNICODE\\0``, then UTF-16, big-endian as the rest of the
EXIF block. That is where AUTOMATIC1111's stable-diffusion-webui writes it and other tools look.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ldm_export.bundle.atomic import check_output, write_output
from ldm_export.errors import InputError
from ldm_export.pictures.text import PictureRequest, parameters_text
from ldm_export.reading.documents import MalformedError, read_bytes

Pixels = npt.NDArray[Any]

FORMATS = ("PNG", "JPEG", "WEBP")
QUALITY = 95
"""Quality of JPEG and WebP, of 100."""
KEY = "parameters"
LONGEST_TEXT = 1 << 20
"""Most characters of a text that are written or read."""
MOST_BYTES = 256 << 20
MOST_PIXELS = 1 << 28
_MOST_EXIF_BYTES = 65_533 - len(b"Exif\0\0")
"""What a JPEG's segment holds beside its own length."""
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"


@dataclass(frozen=True)
class PictureFile:
    """What a file is, and the ``parameters`` text in it, whoever wrote it; None where there is none."""

    format: str
    width: int
    height: int
    parameters: str | None


def check_writable(path: Path) -> None:
    """Raise InputError unless a picture can be written to ``path``; makes its folder."""
    format_of(path)
    check_output(path)


def format_of(path: Path) -> str:
    """The format, of `FORMATS`, that a file's name says; raises InputError where it says none."""
    name = Image.registered_extensions().get(path.suffix.lower(), "")
    if name not in FORMATS:
        raise InputError(
            f"{path} cannot be written: it is not the name of a picture file in PNG, JPEG or WebP. "
            "Name a .png, .jpg or .webp."
        )
    return name


def check_text(path: Path, text: str) -> None:
    """Raise InputError unless a file of this name can hold the text."""
    if len(text) > LONGEST_TEXT:
        raise InputError(
            f"The request of {path} has {len(text):,} characters; a file takes {LONGEST_TEXT:,}. Shorten its prompts, "
            "or write fewer pictures to one file."
        )
    if format_of(path) == "JPEG" and len(_exif_of(text)) > _MOST_EXIF_BYTES:
        raise InputError(f"The request of {path} is longer than a JPEG holds (64 KB). Name a .png or .webp.")


def grid(images: Pixels, columns: int | None = None) -> Image.Image:
    """Pictures (B, H, W, C) in rows of about the square root of B, on white; mode L where C is 1, else RGB."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    sheet = Image.new("L" if channels == 1 else "RGB", (columns * width, math.ceil(count / columns) * height), "white")
    for k, pixels in enumerate(images):
        picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        sheet.paste(picture, (k % columns * width, k // columns * height))
    return sheet


def save_grid(images: Pixels, path: Path, requests: Sequence[PictureRequest] = ()) -> None:
    """Write one picture, or a grid of several, uint8 (B, H, W, C), whole or not at all, with their requests if given.

    Raises
    ------
    InputError
        If the name is not one of a picture, the format does not hold it, or the file cannot be written.
    """
    kind, text = format_of(path), parameters_text(requests) if requests else None
    content = io.BytesIO()
    try:
        grid(images).save(content, kind, **_options(kind, text))
    except (OSError, ValueError) as error:  # JPEG and WebP have largest sizes
        raise InputError(f"{path} cannot hold this picture ({error}). Name a .png.") from error
    write_output(path, content.getvalue())


def _options(kind: str, text: str | None) -> dict[str, Any]:
    if kind != "PNG":
        return {"quality": QUALITY} | ({} if text is None else {"exif": _exif_of(text)})
    chunks = PngImagePlugin.PngInfo()
    if text is not None:
        chunks.add_text(KEY, text)
    return {"pnginfo": chunks}


def _exif_of(text: str) -> bytes:
    exif = Image.Exif()
    exif.endian = ">"
    exif.get_ifd(_EXIF)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
    return exif.tobytes()


def read_picture_file(path: Path) -> PictureFile:
    """Format, size and text of a PNG, JPEG or WebP.

    Raises
    ------
    InputError
        If it is no such picture, larger than `MOST_BYTES` or `MOST_PIXELS`, damaged where the text is, or its text is
        longer than `LONGEST_TEXT`.
    """
    try:
        data = read_bytes(path, MOST_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what is strange in a file and of its size
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise MalformedError(f"{image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are read")
                text = _text_in(image)
                if text is not None and len(text) > LONGEST_TEXT:
                    raise MalformedError(f"its text has {len(text):,} characters; at most {LONGEST_TEXT:,} are read")
                return PictureFile(str(image.format), image.width, image.height, text)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture that is read. Give a PNG, JPEG or WebP.") from error
    except Exception as error:  # Pillow's readers raise what meets them: SyntaxError, struct.error, KeyError ...
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path} is not a picture whose text can be read ({why}). Give another file.") from error


def _text_in(image: Image.Image) -> str | None:
    if isinstance(image, PngImagePlugin.PngImageFile):
        text = image.text.get(KEY)  # also what comes after the pixels
        return None if text is None else str(text)
    comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    if isinstance(comment, str):
        return comment
    return _text_of(comment) if isinstance(comment, bytes) else None


def _text_of(comment: bytes) -> str:
    """Text of a UserComment. UTF-16 is big-endian, as most write it; little-endian where only so there are steps."""
    if comment.startswith(_UNICODE):
        body = comment.removeprefix(_UNICODE)
        if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return body.decode("utf-16", "replace")
        big, little = body.decode("utf-16-be", "replace"), body.decode("utf-16-le", "replace")
        return little if "Steps: " in little and "Steps: " not in big else big
    return comment.removeprefix(_ASCII).strip(b"\0").decode("utf-8", "replace")
