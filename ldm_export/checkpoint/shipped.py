"""The checkpoints that come with ``ldm_reference``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


def shipped_checkpoints() -> dict[str, Path]:
    """Their folders, by name."""
    spec = find_spec("ldm_reference")
    folder = (
        Path(spec.submodule_search_locations[0]) / "pretrained" if spec and spec.submodule_search_locations else None
    )
    found: Iterator[Path] = folder.glob("*/model_index.json") if folder else iter(())
    return {file.parent.name: file.parent for file in sorted(found)}
