"""A pass that breaks the model, or is not what it is for, is undone: the bundle is that of the stage before."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import ExportError, ParityError
from ldm_export.export import chain
from ldm_export.passes.distill_decoder import DistillDecoder
from ldm_export.recipe import score
from tests.recipe.conftest import Make
from tests.recipe.tiny import DECODER, LOOSE, WEIGHTS, Interrupt, cost_of, files_of, plain, without_manifest

pytestmark = pytest.mark.usefixtures("fake_passes")

CAREFUL = "frechet_ratio = 1.15\nretrieval_drop = 1.0"
SCALE = '[[pass]]\nname = "scale"\n'
STRICT = '[[pass]]\nname = "scale-strictly"\n'


def change(what: str, name: str = "change") -> str:
    return f'[[pass]]\nname = "{name}"\nwhat = "{what}"\n'


UNDONE = {
    "a broken picture": (
        SCALE,
        CAREFUL,
        r"^Fréchet distance \d+\.\d is \d+\.\d\d times the teacher's \d+\.\d; 1\.15 times is allowed$",
    ),
    "no faster": (
        change("nothing", "change-for-speed"),
        LOOSE,
        r"^it is meant to be faster, and is 1\.00 times as fast as the stage before$",
    ),
    "slower": (
        change("grow", "change-for-speed"),
        LOOSE,
        r"^it is meant to be faster, and is (0\.99|1\.00) times as fast as the stage before$",
    ),
    "no smaller": (
        change("nothing"),
        LOOSE,
        r"^it is meant to be smaller, and has ([\d,]+) bytes where the stage before has \1$",
    ),
    "larger": (
        change("grow"),
        LOOSE,
        r"^it is meant to be smaller, and has [\d,]+ bytes where the stage before has [\d,]+$",
    ),
    "parity": (
        STRICT,
        CAREFUL,
        r"^vae_decoder output 'sample' differs from PyTorch by \S+ of its largest value; 0\.01 is allowed",
    ),
    "parity without a number": (
        change("lose numbers"),
        LOOSE,
        r"^vae_decoder output 'sample' differs from PyTorch by nan of its largest value",
    ),
    "refused": (change("refuse"), LOOSE, r"^This graph has an operator that change does not know"),
    "no valid ONNX": (change("break"), LOOSE, r"^change made no valid ONNX of vae_decoder \(.*Nothing was kept"),
    "no runtime can run it": (
        change("unknown operator"),
        LOOSE,
        r"^ONNX Runtime refuses the exported vae_decoder: .*Sharpen",
    ),
}
"""Passes that are undone, the budget, and the record's ``why``."""


@pytest.mark.parametrize(("passes", "budget", "why"), UNDONE.values(), ids=UNDONE)
def test_it_is_undone_and_says_why(make: Make, begun: Path, passes: str, budget: str, why: str) -> None:
    bundle, (_, record) = make(passes, budget=budget)
    assert record["kept"] is False
    assert re.search(why, record["why"], re.DOTALL), record["why"]
    assert without_manifest(bundle.path) == without_manifest(begun / "00-teacher" / "bundle")
    before = Bundle.open(begun / "00-teacher" / "bundle").manifest
    after = Bundle.open(bundle.path, verify=True).manifest
    assert (after.model, after.graphs, after.parity, after.source) == (
        before.model,
        before.graphs,
        before.parity,
        before.source,
    )
    assert after.passes[1] == plain(record)


def test_the_record_has_the_numbers(make: Make) -> None:
    _, (teacher, record) = make(SCALE, budget=CAREFUL)
    after, before = record["score"]["frechet_distance"], teacher["score"]["frechet_distance"]
    assert after > 1.15 * before
    assert f"{after:.1f} is {after / before:.2f} times the teacher's {before:.1f}" in record["why"]
    assert record["report"] == {"vae_decoder": {"factor": 5.0}}
    assert record["score"]["psnr_to_teacher_db"] < 20


def test_what_could_not_be_measured_has_no_score(make: Make) -> None:
    _, (_, record) = make(STRICT, budget=CAREFUL)
    assert record.keys() == {"name", "options", "key", "judged_on", "kept", "why", "seconds"}


def test_a_change_that_nothing_speaks_against_is_kept(make: Make, begun: Path) -> None:
    bundle, (_, record) = make(WEIGHTS)
    assert record["kept"] is True
    assert "why" not in record
    assert without_manifest(bundle.path) != without_manifest(begun / "00-teacher" / "bundle")


def test_the_next_pass_begins_at_the_stage_before(make: Make, begun: Path, tmp_path: Path) -> None:
    """With an undone pass between, a recipe gives what it gives without, and to the same stage."""
    works = [Path(shutil.copytree(begun, tmp_path / name)) for name in ("without", "with")]
    plain_bundle, expected = make(DECODER + WEIGHTS, work=works[0], output=tmp_path / "plain")
    undone = DECODER + change("refuse") + change("grow", "change-for-speed") + WEIGHTS
    bundle, records = make(undone, work=works[1])
    assert [record["kept"] for record in records] == [True, True, False, False, True]
    assert records[-1]["key"] == expected[-1]["key"]
    assert without_manifest(bundle.path) == without_manifest(plain_bundle.path)


def test_an_undone_pass_is_not_tried_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = make(SCALE + STRICT, budget=CAREFUL)
    told = Interrupt()
    bundle, second = make(SCALE + STRICT, budget=CAREFUL, progress=told)
    assert second == plain(first)
    assert told.told == []
    assert [record["kept"] for record in bundle.manifest.passes] == [True, False, False]


# --- passes over networks -------------------------------------------------------------------------------------------


def test_a_slow_student_is_undone(make: Make, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_in_turn(sides: dict[str, Bundle], rounds: int) -> dict[str, Any]:
        return {name: cost_of(sides["this"]) for name in sides}

    monkeypatch.setattr(score, "time_in_turn", time_in_turn)
    bundle, (_, record) = make(DECODER)
    assert record["why"] == "it is meant to be faster, and is 1.00 times as fast as the stage before"
    assert without_manifest(bundle.path) == without_manifest(begun / "00-teacher" / "bundle")


def test_a_bad_student_is_undone_and_its_weights_are_kept_aside(make: Make, begun: Path, work: Path) -> None:
    bundle, (_, record) = make(DECODER, budget="frechet_ratio = 1.01\nretrieval_drop = 0")
    assert record["kept"] is False
    assert without_manifest(bundle.path) == without_manifest(begun / "00-teacher" / "bundle")
    (folder,) = work.glob("01-distill-decoder-*")
    assert any(name.startswith("checkpoint/vae/") for name in files_of(folder))


@pytest.mark.parametrize("error", [ParityError("unet differs."), ExportError("unet could not be exported.")])
def test_a_student_that_cannot_be_exported_is_undone(
    make: Make, begun: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(chain, "export_graph", refuse)
    bundle, (_, record) = make(DECODER)
    assert (record["kept"], record["why"]) == (False, str(error))
    assert without_manifest(bundle.path) == without_manifest(begun / "00-teacher" / "bundle")


def test_what_a_pass_does_not_foresee_is_no_verdict(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect ends the run, and is not taken for a pass that did not help."""

    def fail(self: DistillDecoder, setting: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(DistillDecoder, "apply", fail)
    with pytest.raises(ZeroDivisionError):
        make(DECODER)
