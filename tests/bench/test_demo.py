"""The demo at a tiny scale: it passes on what is right, fails on what is not, and its page needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ldm_export.bench import demo as demo_module
from ldm_export.bench import report
from ldm_export.bench.demo import Demo, run_demo
from ldm_export.bench.parity import psnr_db
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.cli import main
from ldm_export.errors import InputError

PROMPTS = ("red apple", "a <b>red</b> & blue")


@pytest.fixture(scope="module")
def demo(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (demo_module, report):
            patch.setattr(module, "PROMPTS", PROMPTS)
            patch.setattr(module, "BATCH", 1)
            patch.setattr(module, "STEPS", 10)
        stages: list[str] = []
        yield run_demo(LatentDiffusion.open(tiny_checkpoint), tmp_path_factory.mktemp("demo"), stages.append)
        assert "drawing 2 of 2 with bundle" in stages


def test_the_bundle_draws_what_pytorch_draws(demo: Demo) -> None:
    assert demo.passed
    assert demo.bundle_images.shape == demo.torch_images.shape == (2, 16, 16, 3)
    assert min(demo.psnr) >= 45.0
    assert all(value > 0 for stages in demo.milliseconds.values() for value in stages.values())
    assert json.loads(json.dumps(demo.to_dict(), allow_nan=False))["passed"] is True


def test_a_wrong_picture_is_not_passed(demo: Demo) -> None:
    wrong = dataclasses.replace(demo, psnr=(*demo.psnr[:-1], 44.9))
    assert not wrong.passed
    assert "does not draw what PyTorch draws: 44.9 dB" in report.html_report(wrong)


def test_a_wrong_graph_is_not_passed(demo: Demo) -> None:
    records = [{**demo.parity[0], "passed": False}, *demo.parity[1:]]
    assert not dataclasses.replace(demo, parity=tuple(records)).passed


def test_the_report_stands_alone(demo: Demo) -> None:
    page = report.html_report(demo)
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 2 * len(PROMPTS)
    assert not re.search(r"https?:|//|<script|<link|url\(", re.sub(r'base64,[^"]*', "", page))
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; blue" in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("difference", "expected"), [(0, math.inf), (1, 48.1308), (255, 0.0), (16, 20 * math.log10(255 / 16))]
)
def test_psnr(difference: int, expected: float) -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr_db(black, black + np.uint8(difference)) == pytest.approx(expected, abs=1e-4)
    assert psnr_db(black + np.uint8(difference), black) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("other", [np.zeros((4, 5, 3), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_psnr_of_what_cannot_be_compared(other: np.ndarray[Any, Any]) -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        psnr_db(np.zeros((4, 4, 3), np.uint8), other)


def test_the_command_writes_the_report(demo: Demo, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["demo", "-o", str(tmp_path / "out"), "--checkpoint", str(tiny_checkpoint), "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"bundle", "bundle.png", "pytorch.png", "side_by_side.png", "report.html", "demo.json"}
    assert json.loads(done.stdout)["prompts"] == list(PROMPTS)
