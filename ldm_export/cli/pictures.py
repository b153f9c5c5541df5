"""Pictures that are given as files."""

from __future__ import annotations

from pathlib import Path

import ldm_reference.pictures
from ldm_reference.config import ConfigError

from ldm_export.errors import InputError
from ldm_export.pictures.files import Pixels


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
