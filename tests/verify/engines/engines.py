"""What tests of engines share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.engines import EngineTarget, read_engine_target
from ldm_export.export.tensorrt import process
from ldm_export.verify.engines.build import EngineSettings

RTX = "tensorrt_rtx"
SMALL = ("text_encoder",)
"""What builds in a second."""
KIND = "rtx-sm89"


def settings(*sm_versions: str, **options: Any) -> EngineSettings:
    return EngineSettings(RTX, sm_versions or ("89",), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def engines_of(bundle: Path, kind: str = KIND) -> EngineTarget:
    import tensorrt_rtx as library

    target = read_engine_target(Bundle.open(bundle, verify=True), kind, version=library.__version__)
    assert isinstance(target, EngineTarget), target
    return target


def child(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process in the place of the one that builds."""
    monkeypatch.setattr(process, "CHILD", (sys.executable, "-c", code))
