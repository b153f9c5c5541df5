"""Files of the user's cache: what was found out once, and may be deleted at any time."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def cache_folder() -> Path | None:
    """``$XDG_CACHE_HOME/ldm_export``, or ``~/.cache/ldm_export``; None where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "ldm_export"
    except RuntimeError:
        return None


def write_whole(file: Path, data: bytes) -> None:
    """Write a file, and its folder, whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
