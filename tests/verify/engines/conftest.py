"""Bundles with engines, built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm_export.bundle import Bundle
from ldm_export.verify.engines.build import build_engines
from tests.verify.engines.engines import SMALL, settings


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with all its engines and a loop's, in fp32, for two GPUs. Read-only."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    build_engines(Bundle.open(folder), settings("89", "86"), loops=["ddim-10"])
    return folder


@pytest.fixture
def small(built_small: Path, tmp_path: Path) -> Path:
    """A copy with one small engine, that a test may change."""
    return Path(shutil.copytree(built_small, tmp_path / "small"))


@pytest.fixture(scope="module")
def built_small(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("small") / "bundle"))
    build_engines(Bundle.open(folder), settings(), SMALL)
    return folder
