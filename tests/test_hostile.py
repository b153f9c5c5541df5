"""The table of hostile and odd bundles (``tests/hostile``), run by the Python runtime."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from ldm_export.errors import LdmExportError
from ldm_export.runtime import Pipeline
from tests.hostile import CASES, Case, write_case

LEAST_CASES = 300


def test_the_table_is_large_and_its_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= LEAST_CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.encode("unicode_escape").decode()[:80])
def test_a_bundle_is_opened_or_refused(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    write_case(case, folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            backend = _generated(case, folder)
        except LdmExportError as error:
            assert not case.opens, f"{case.name} is refused: {error}"
            assert len(str(error)) < 1500
            return
    assert case.opens, f"{case.name} is opened"
    if case.target is not None:
        assert backend.endswith("ort-cpu") == case.target
        assert len(said) == (0 if case.target or "no folder" in case.name else 1), [str(one.message) for one in said]


def _generated(case: Case, folder: Path) -> str:
    """Open the bundle and generate what the case asks for; gives what ran."""
    with Pipeline.open(folder, backend="cpu", verify=case.verify, threads=1) as pipeline:
        if case.asks is None:
            return pipeline.backend
        asks = dict(case.asks)
        prompts = asks.pop("prompts")
        if asks.pop("image", False):
            size = pipeline.bundle.manifest.model
            asks["image"] = np.full((size["height"], size["width"], 3), 99, np.uint8)
        pipeline.generate(prompts, **asks)
        return pipeline.backend
