"""Scores and the verdict: what a stage is worth, and why a pass is undone."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.recipe.score import FASTER, Judge, Score, verdict
from ldm_export.recipe.settings import Budget
from ldm_export.verify.latency import Latency
from tests.recipe.tiny import cost_of
from tests.training import write_pictures

BUDGET = Budget(frechet_ratio=1.2, retrieval_drop=0.05)
TEACHER = Score(1000, Latency(10.0, 1.0, 2.0, 1.0, 4), "ddim", 4, 4.0, 100.0, 0.5, 0.8, None)


# --- the verdict ----------------------------------------------------------------------------------------------------

STAYS = {
    "a little worse": (replace(TEACHER, frechet_distance=119.9, retrieval_at_5=0.76), "speed", 1.5),
    "exactly at the budget": (replace(TEACHER, frechet_distance=120.0, retrieval_at_5=0.75), "speed", 1.5),
    "better": (replace(TEACHER, frechet_distance=1.0, retrieval_at_5=1.0), "speed", 1.5),
    "just fast enough": (TEACHER, "speed", 1 / FASTER),
    "for speed, and larger": (replace(TEACHER, bytes=2000), "speed", 1.5),
    "for bytes, and slower": (replace(TEACHER, bytes=999), "bytes", 0.5),
    "nothing was told": (replace(TEACHER, retrieval_at_5=None), "speed", 1.5),
    "R@1 is not judged": (replace(TEACHER, retrieval_at_1=0.0), "speed", 1.5),
}
UNDONE = {
    "Fréchet": (
        replace(TEACHER, frechet_distance=120.1),
        "speed",
        1.5,
        "Fréchet distance 120.1 is 1.20 times the teacher's 100.0; 1.2 times is allowed",
    ),
    "Fréchet is no number": (
        replace(TEACHER, frechet_distance=math.nan),
        "speed",
        1.5,
        "Fréchet distance nan is nan times the teacher's 100.0; 1.2 times is allowed",
    ),
    "Fréchet is endless": (
        replace(TEACHER, frechet_distance=math.inf),
        "bytes",
        1.5,
        "Fréchet distance inf is inf times the teacher's 100.0; 1.2 times is allowed",
    ),
    "retrieval": (
        replace(TEACHER, retrieval_at_5=0.74),
        "speed",
        1.5,
        "R@5 fell from the teacher's 0.800 to 0.740; a drop of 0.05 is allowed",
    ),
    "retrieval is no number": (replace(TEACHER, retrieval_at_5=math.nan), "speed", 1.5, "R@5 fell .* to nan; "),
    "no faster": (
        TEACHER,
        "speed",
        1.0,
        "it is meant to be faster, and is 1.00 times as fast as the stage before",
    ),
    "slower": (TEACHER, "speed", 0.5, "it is meant to be faster, and is 0.50 times as fast as the stage before"),
    "speed is no number": (TEACHER, "speed", math.nan, "it is meant to be faster, and is nan times as fast"),
    "no smaller": (
        TEACHER,
        "bytes",
        1.5,
        "it is meant to be smaller, and has 1,000 bytes where the stage before has 1,000",
    ),
    "larger": (replace(TEACHER, bytes=12345), "bytes", 1.5, "has 12,345 bytes where the stage before has 1,000"),
}


@pytest.mark.parametrize(("after", "purpose", "faster"), STAYS.values(), ids=STAYS)
def test_a_pass_stays(after: Score, purpose: str, faster: float) -> None:
    assert verdict(purpose, BUDGET, TEACHER, TEACHER, after, faster) is None


@pytest.mark.parametrize(("after", "purpose", "faster", "why"), UNDONE.values(), ids=UNDONE)
def test_a_pass_is_undone(after: Score, purpose: str, faster: float, why: str) -> None:
    given = verdict(purpose, BUDGET, TEACHER, TEACHER, after, faster)
    assert given is not None
    assert re.search(why, given), given


def test_quality_is_held_against_the_teacher_and_bytes_against_the_stage_before() -> None:
    """Losses add up to no more than the budget; gains must be new."""
    before = replace(TEACHER, frechet_distance=118.0, bytes=500)
    after = replace(TEACHER, frechet_distance=119.0, bytes=499)
    assert verdict("bytes", BUDGET, TEACHER, before, after, 1.0) is None
    assert "1.26 times the teacher's" in str(
        verdict("bytes", BUDGET, TEACHER, before, replace(after, frechet_distance=126.0), 1.0)
    )
    assert "500" in str(verdict("bytes", BUDGET, TEACHER, before, replace(after, bytes=500), 1.0))


@pytest.mark.parametrize("distance", [0.0, 1.0])
def test_a_teacher_without_a_distance(distance: float) -> None:
    """One that draws what it is judged by."""
    perfect = replace(TEACHER, frechet_distance=0.0)
    why = verdict("speed", BUDGET, perfect, perfect, replace(perfect, frechet_distance=distance), 1.5)
    assert (why is None) == (distance == 0.0)


# --- the score ------------------------------------------------------------------------------------------------------


def test_a_score_is_the_same_read_again() -> None:
    assert Score.from_dict(json.loads(json.dumps(TEACHER.to_dict()))) == TEACHER


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write_pictures(tmp_path / "data")


def judge(data: Path, pictures: int = 10) -> Judge:
    return Judge(data, data, None, pictures, lambda what, done, of: None)


def test_a_bundle_is_scored(tiny_bundle: Path, data: Path, cheap_judge: None) -> None:
    bundle = Bundle.open(tiny_bundle)
    score, faster, pictures = judge(data).score(bundle, None, None)
    assert faster is None
    assert pictures.shape == (10, 16, 16, 3)
    assert score.psnr_to_teacher_db is None
    assert (score.sampler, score.steps, score.guidance) == ("ddim", 20, 4.0)
    listed = sum(file.stat().st_size for file in tiny_bundle.rglob("*") if file.is_file())
    assert score.bytes == bundle.size_bytes == listed - (tiny_bundle / "manifest.json").stat().st_size
    assert score.latency == cost_of(bundle)
    assert score.frechet_distance > 0
    assert 0 <= score.retrieval_at_1 <= score.retrieval_at_5 <= 1
    again, faster, same = judge(data).score(bundle, bundle, pictures)
    assert faster == 1.0
    assert again == replace(score, psnr_to_teacher_db=100.0)  # of equal pictures, which has a bound
    np.testing.assert_array_equal(same, pictures)


def test_a_judge_is_known_by_its_pictures(data: Path, tmp_path: Path) -> None:
    name = judge(data).name
    other = Path(shutil.copytree(data, tmp_path / "other"))
    assert judge(other).name == name
    assert judge(data, 11).name != name
    lines = (other / "metadata.jsonl").read_text().splitlines(keepends=True)
    (other / "metadata.jsonl").write_text("".join(lines[:-1]))
    assert judge(other).name != name


def test_too_few_pictures_are_refused(tiny_bundle: Path, data: Path, cheap_judge: None) -> None:
    with pytest.raises(InputError, match="13 prompts are asked for and the data has 12 pictures"):
        judge(data, 13).score(Bundle.open(tiny_bundle), None, None)
