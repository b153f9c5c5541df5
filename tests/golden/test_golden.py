"""A bundle of every format, made once: it opens and generates the same for ever, here in Python."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm_export.errors import BundleError
from ldm_export.runtime import Pipeline
from tests.golden.make import REQUESTS

FORMAT_2 = Path(__file__).parent / "format-2"
MOST_BYTES = 200_000
LATENT_TOLERANCE = 2e-5
"""Of the largest value; libraries and processors sum in other orders."""


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FORMAT_2.rglob("*") if file.is_file()) <= MOST_BYTES


@pytest.mark.parametrize("name", REQUESTS)
def test_what_it_generates(name: str) -> None:
    expected = np.load(FORMAT_2 / "expected.npz")
    pipeline = Pipeline.open(FORMAT_2 / "bundle", backend="cpu", verify=True)
    made = pipeline.generate(**REQUESTS[name])
    latents, images = expected[f"{name}.latents"], expected[f"{name}.images"].astype(int)
    np.testing.assert_allclose(made.latents, latents, rtol=0, atol=LATENT_TOLERANCE * np.abs(latents).max())
    assert np.abs(made.images - images).max() <= 1


def test_format_1_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = shutil.copytree(FORMAT_2 / "bundle", tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    sentence = (
        "has format_version 1; this ldm_export reads 2. Export the bundle anew, or install the ldm_export that made"
    )
    with pytest.raises(BundleError, match=re.escape(sentence)):
        Pipeline.open(folder)
