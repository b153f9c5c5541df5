"""The demo at a tiny scale: it passes on what is right, fails on what is not, and writes what it promises."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ldm_export.bench import demo, harness
from ldm_export.bench.demo import run_demo
from ldm_export.bench.harness import Document
from ldm_export.cli import main
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.verify.metrics import psnr_db

PROMPTS = ("red apple", "a <b>red</b> & blue")
OPTIONS = replace(demo.OPTIONS, prompts=PROMPTS, batch=1, repeats=1)
NEEDS = {"cold_start_ms": 900.0, "cold_starts_ms": [900.0], "peak_rss_bytes": None, "device_bytes": None}


@pytest.fixture(autouse=True, scope="module")
def small(traced_once: None) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "processes_in_turn", lambda variants, rounds, progress: dict.fromkeys(variants, NEEDS))
        patch.setattr(run_demo, "__defaults__", (OPTIONS,))
        yield


@pytest.fixture(scope="module")
def document(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Document:
    told: list[str] = []
    made = run_demo(open_checkpoint(tiny_checkpoint), tmp_path_factory.mktemp("demo"), told.append)
    assert {"export of tiny", "picture 2 of 2, bundle"} <= set(told)
    return made


def test_the_bundle_draws_what_pytorch_draws(document: Document) -> None:
    assert list(document["variants"]) == ["PyTorch tiny", "bundle"]
    assert {gate["key"]: gate["passed"] for gate in document["gates"]} == {"psnr": True, "parity": True}
    assert min(document["results"]["pictures"]["bundle"]["psnr_db"]) >= 45.0


def test_what_is_wrong_is_not_passed(document: Document) -> None:
    pictures = document["results"]["pictures"]
    wrong = {**pictures, "bundle": {**pictures["bundle"], "psnr_db": [60.0, 44.9]}}
    judged = demo.judged({**document, "results": {**document["results"], "pictures": wrong}})
    assert [gate["key"] for gate in judged if not gate["passed"]] == ["psnr"]


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


def test_the_command_writes_the_report(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["demo", "-o", str(tmp_path / "out"), "--checkpoint", str(tiny_checkpoint), "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"bundle", "bundle.png", "pytorch.png", "side_by_side.png", "report.html", "demo.json"}
    document = json.loads(done.stdout)
    assert document["conditions"] == list(PROMPTS)
    assert document == json.loads((tmp_path / "out" / "demo.json").read_text())
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; blue" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
