"""Engine targets as they are read: those that fit, and why the others do not, without opening an engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.engines import (
    Engine,
    EngineTarget,
    ShapeRange,
    engine_kind,
    engine_targets,
    fits,
    read_engine_target,
    write_engine_target,
)
from ldm_export.contract import TensorSpec

KIND = "rtx-sm86-sm89-fp16"
RANGE = ShapeRange((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 16, 16))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy with a target whose engine is a few bytes, which nothing here opens."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = Bundle.open(folder).manifest
    engine = Engine(
        path="unet.plan",
        source="unet/model.onnx",
        source_hashes={"unet/model.onnx": manifest.files["unet/model.onnx"].sha256},
        inputs=(TensorSpec("sample", "float32", (-1, 4, -1, -1)), TensorSpec("timestep", "float32", ())),
        outputs=(TensorSpec("out_sample", "float32", (-1, 4, -1, -1)),),
        profile={"sample": RANGE},
        seconds=1.5,
    )
    target = EngineTarget(
        folder=folder / "targets" / KIND,
        kind=KIND,
        flavour="tensorrt_rtx",
        version="1.7.1.116",
        compute_capabilities=("8.6", "8.9"),
        precision="fp16",
        refittable=False,
        stripped=False,
        sparse=False,
        engines={"unet": engine},
        report={"unet": {"error": 0.001}},
    )
    target.folder.mkdir(parents=True)
    (target.folder / "unet.plan").write_bytes(b"an engine")
    write_engine_target(target)
    return folder


def changed(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = bundle / "targets" / KIND / "target.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def in_unet(**values: Any) -> Callable[[Path], None]:
    return lambda bundle: changed(bundle, lambda document: document["engines"]["unet"].update(values))


def with_profile(**values: Any) -> Callable[[Path], None]:
    entry = {"min": RANGE.min, "opt": RANGE.opt, "max": RANGE.max} | values
    return in_unet(profile={"sample": entry})


def test_what_was_written_is_read(bundle: Path) -> None:
    opened = Bundle.open(bundle, verify=True)
    assert engine_targets(opened) == [KIND]
    target = read_engine_target(opened, KIND, version="1.7.1.116", compute_capability="8.9")
    assert isinstance(target, EngineTarget)
    assert target.folder == bundle / "targets" / KIND
    assert (target.flavour, target.compute_capabilities, target.precision) == ("tensorrt_rtx", ("8.6", "8.9"), "fp16")
    engine = target.engines["unet"]
    assert engine.profile == {"sample": RANGE}
    assert engine.inputs[0] == TensorSpec("sample", "float32", (-1, 4, -1, -1))
    assert target.file(engine.path).read_bytes() == b"an engine"
    assert set(target.files) == {"unet.plan"}
    assert target.report == {"unet": {"error": 0.001}}


def test_other_targets_are_no_engines(bundle: Path) -> None:
    for name in ("ort-cpu", ".rtx-sm89.partial-1-ab", "tensorrt-sm90"):
        (bundle / "targets" / name).mkdir()
    assert engine_targets(Bundle.open(bundle)) == [KIND, "tensorrt-sm90"]
    assert read_engine_target(Bundle.open(bundle), "rtx-sm120") is None
    assert read_engine_target(Bundle.open(bundle), "tensorrt-sm90") == "its target.json is missing"


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("tensorrt_rtx", ("8.9",), "fp32"), "rtx-sm89"),
        (("tensorrt_rtx", ("8.6", "12.0"), "fp16"), "rtx-sm86-sm120-fp16"),
        (("tensorrt", ("9.0",), "int8"), "tensorrt-sm90-int8"),
    ],
)
def test_kinds(arguments: tuple[str, tuple[str, ...], str], kind: str) -> None:
    assert engine_kind(*arguments) == kind


DOES_NOT_FIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing engine": (lambda bundle: (bundle / "targets" / KIND / "unet.plan").unlink(), "its unet.plan is missing"),
    "a truncated engine": (
        lambda bundle: (bundle / "targets" / KIND / "unet.plan").write_bytes(b"an eng"),
        "its unet.plan has 6 bytes; target.json says 9",
    ),
    "an altered engine": (
        lambda bundle: (bundle / "targets" / KIND / "unet.plan").write_bytes(b"an Engine"),
        "its unet.plan has been altered",
    ),
    "a stray file": (
        lambda bundle: (bundle / "targets" / KIND / "more.plan").write_bytes(b""),
        "its more.plan is not listed",
    ),
    "an engine elsewhere": (in_unet(path="../../unet/model.onnx"), "its ../../unet/model.onnx is missing"),
    "a file elsewhere": (
        lambda bundle: changed(bundle, lambda document: document["files"].update({"../x": {"size_bytes": 1}})),
        "its target.json cannot be read (the path '../x' is not a plain one inside the folder)",
    ),
    "other graphs": (in_unet(source_hashes={"unet/model.onnx": "0" * 64}), "its unet was made from other graphs"),
    "no graph": (in_unet(source_hashes={}), "its unet does not say what it was made from"),
    "another kind": (
        lambda bundle: changed(bundle, lambda document: document.update(precision="fp32")),
        "its target.json cannot be read (it is for tensorrt_rtx, 8.6, 8.9 in fp32)",
    ),
    "an unknown flavour": (
        lambda bundle: changed(bundle, lambda document: document.update(flavour="trt")),
        "its target.json cannot be read (it is for trt, 8.6, 8.9 in fp16)",
    ),
    "another format": (
        lambda bundle: changed(bundle, lambda document: document.update(format_version=99)),
        "its target.json cannot be read (it has format_version 99",
    ),
    "no profile": (in_unet(profile={}), "its unet has a profile for [], and free sizes in ['sample']"),
    "a profile that falls": (with_profile(min=[4, 4, 8, 8]), "its unet takes sample of (-1, 4, -1, -1), and has"),
    "a profile of other channels": (with_profile(max=[8, 5, 16, 16]), "its unet takes sample of (-1, 4, -1, -1)"),
    "a profile of nothing": (with_profile(min=[0, 4, 8, 8]), "its unet takes sample of (-1, 4, -1, -1)"),
    "a profile of too few sizes": (with_profile(opt=[2, 4, 8]), "its unet takes sample of (-1, 4, -1, -1)"),
    "a size that is no number": (with_profile(opt=[2, 4, 8, "8"]), "its target.json cannot be read (engines['unet']"),
    "a report that is none": (
        lambda bundle: changed(bundle, lambda document: document.update(report={"unet": 1})),
        "its target.json cannot be read (report.unet is of type int; dict is needed)",
    ),
    "a switch that is no switch": (
        lambda bundle: changed(bundle, lambda document: document.update(stripped="no")),
        "its target.json cannot be read (stripped is of type str; bool is needed)",
    ),
}


@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_a_target_that_does_not_fit_says_why(bundle: Path, case: str) -> None:
    damage, reason = DOES_NOT_FIT[case]
    damage(bundle)
    found = read_engine_target(Bundle.open(bundle, verify=True), KIND)
    assert isinstance(found, str)
    assert found.startswith(reason)


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({"version": "1.8.0.1"}, "it was made with tensorrt_rtx 1.7.1.116, and this is 1.8.0.1"),
        ({"compute_capability": "9.0"}, "it was made for compute capability 8.6 and 8.9, and this device has 9.0"),
    ],
)
def test_engines_of_another_release_or_device(bundle: Path, here: dict[str, str], reason: str) -> None:
    assert read_engine_target(Bundle.open(bundle), KIND, **here) == reason


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((-1, 4), ShapeRange((1, 4), (2, 4), (3, 4)), True),
        ((-1, 4), ShapeRange((3, 4), (2, 4), (3, 4)), False),
        ((-1, 4), ShapeRange((1, 4), (2, 4), (1, 4)), False),
        ((-1, 4), ShapeRange((1, 4), (2, 3), (3, 4)), False),
        ((), ShapeRange((), (), ()), True),
    ],
)
def test_ranges(shape: tuple[int, ...], sizes: ShapeRange, expected: bool) -> None:
    assert fits(shape, sizes) is expected
