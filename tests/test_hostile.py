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
LONGEST_ERROR = 1500


def test_the_table_is_large_and_its_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= LEAST_CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.encode("unicode_escape").decode()[:80])
def test_a_bundle_is_opened_or_refused(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    write_case(case, folder)
    if not case.opens:
        with pytest.raises(LdmExportError) as caught:
            generated(case, folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < LONGEST_ERROR
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        backend = generated(case, folder)
    if case.target is not None:
        assert backend.endswith("ort-cpu") == case.target
        assert len(said) == (not case.target and (folder / "targets").is_dir()), [str(one.message) for one in said]


def generated(case: Case, folder: Path) -> str:
    """Open the bundle and generate what the case asks for; gives what ran."""
    with Pipeline.open(folder, backend="cpu", verify=case.verify, threads=1) as pipeline:
        if case.asks is not None:
            asks = dict(case.asks)
            prompts = asks.pop("prompts")
            if asks.pop("image", False):
                model = pipeline.bundle.manifest.model
                asks["image"] = np.full((model["height"], model["width"], 3), 99, np.uint8)
            pipeline.generate(prompts, **asks)
        return pipeline.backend
