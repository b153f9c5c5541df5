"""Hashes of files and of values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20


def sha256_of(*files: Path) -> str:
    """SHA-256 of the bytes of files, one after another, as 64 hex digits."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def hash_of(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold, hex; others are taken as their text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
