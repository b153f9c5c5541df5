"""Files of the user's cache: what was found out once, and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """``$XDG_CACHE_HOME/ldm_export``, or ``~/.cache/ldm_export``; None where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "ldm_export"
    except RuntimeError:
        return None
