"""The table of hostile bundles (``tests/hostile``), decided by the C++ runtime as by Python's; and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from tests.cpp.conftest import ROOT, SOURCES
from tests.hostile import CASES, Case
from tests.hostile.base import Draft, entry_of, sound, with_conditioner, with_outside_weights, with_target

SENTENCES = (1, 2, 3)
"""Statuses of ldm.h that say what the caller, the bundle or the machine is at fault for."""


def disagreement(case: Case, found: dict[str, Any] | None) -> str:
    """What is wrong with an outcome, or nothing."""
    if found is None:
        return "the process died"
    status, said = found["status"], found["said"]
    if (status == 0) != case.opens:
        return f"refused: {said}" if case.opens else "opened"
    if not case.opens and (status not in SENTENCES or not 0 < len(said) < 1500):
        return f"refused with the status {status} and {len(said)} characters: {said[:200]}"
    if case.target is not None and found["backend"].endswith("ort-cpu") != case.target:
        return f"ran on {found['backend']}"
    if case.target is False and "no folder" not in case.name and len(found["warnings"]) != 1:
        return f"warned {len(found['warnings'])} times"
    return ""


def test_every_bundle_is_opened_or_refused_as_in_python(library: Path, tmp_path: Path) -> None:
    worker = (sys.executable, "-m", "tests.cpp.hostile_worker", str(library / "libldm.so"), str(tmp_path))
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=400)
    outcomes = {line["number"]: line for line in map(json.loads, done.stdout.splitlines())}
    found = {case.name: disagreement(case, outcomes.get(number)) for number, case in enumerate(CASES)}
    wrong = [f"{name}: {what}" for name, what in found.items() if what]
    assert not wrong, f"{len(wrong)} of {len(CASES)}:\n" + "\n".join(wrong[:50]) + done.stderr[-2000:]
    assert done.returncode == 0


def written(draft: Draft, folder: Path) -> Path:
    folder.mkdir()
    draft.write(folder)
    return folder


SMALL: dict[str, Any] = {"sampler": b"ddim", "steps": 2}


def pixels_of(pipeline: Any, **options: Any) -> bytes:
    return bytes(pipeline.draw(["a cat"], **SMALL | options))


@pytest.mark.parametrize("outside", [False, True], ids=["weights in the graphs", "weights outside"])
def test_what_is_verified_is_what_runs(
    open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path, outside: bool
) -> None:
    """Graphs and tokenizers are open once a bundle is; a plan that is swapped later is refused."""
    draft = sound()
    if outside:
        with_outside_weights(draft)
    folder = written(draft, tmp_path / "bundle")
    expected = pixels_of(open_cpp(folder, backend=b"cpu"))
    pipeline = open_cpp(folder, backend=b"cpu", verify=1)
    for name in ("unet", "text_encoder", "vae_decoder", "tokenizer"):
        shutil.rmtree(folder / name)
    assert pixels_of(pipeline) == expected
    shutil.copy(folder / "plans" / "euler-ancestral-2.json", folder / "plans" / "ddim-2.json")
    with pytest.raises(binding.LdmError, match=r"ddim-2\.json has"):
        pixels_of(pipeline)


def test_a_swapped_file_is_not_followed(open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path) -> None:
    """Without verifying, files are opened when they are needed, and checked at that moment."""
    folder = written(sound(), tmp_path / "bundle")
    for path in ("vae_decoder/model.onnx", "tokenizer/vocab.json", "plans/ddim-2.json"):
        pipeline = open_cpp(folder, backend=b"cpu")
        (folder / path).rename(tmp_path / "outside")
        (folder / path).symlink_to(tmp_path / "outside")
        with pytest.raises(binding.LdmError, match="is a link"):
            pixels_of(pipeline)
        (folder / path).unlink()
        (tmp_path / "outside").rename(folder / path)


@pytest.mark.parametrize("of_target", [False, True], ids=["the bundle's", "its target's"])
def test_weights_that_change_while_they_are_mapped_are_an_error(
    open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path, of_target: bool
) -> None:
    draft = sound()
    with_outside_weights(draft)
    weights = "text_encoder/model.onnx_data"
    if of_target:
        with_target(draft)
        draft.target_files["model.onnx_data"] = draft.files[weights]
        assert draft.target is not None
        draft.target["source_hashes"][weights] = entry_of(draft.files[weights])["sha256"]
        weights = "targets/ort-cpu/model.onnx_data"
    folder = written(draft, tmp_path / "bundle")
    pipeline = open_cpp(folder, backend=b"cpu")
    expected = pixels_of(pipeline)
    assert pipeline.info().backend.endswith(b"ort-cpu") == of_target
    assert pixels_of(pipeline) == expected
    os.truncate(folder / weights, 0)
    with pytest.raises(binding.LdmError, match="has changed since the bundle was opened"):
        pixels_of(pipeline)


NO_NUMBERS = {
    "latents": ("unet", "tenth = {0.1}", "tenth = {3e38}", "The latents are no numbers after step 1 of 2"),
    "pixels": ("vae_decoder", 'sample = Resize <mode = "nearest"> (three, , by)', 'large = Resize <mode = "nearest">'
               " (three, , by) e = Exp (large) f = Exp (e) g2 = Exp (f) k = Mul (g2, g2) sample = Exp (k)",
               "The pictures are no numbers"),
}  # fmt: skip


@pytest.mark.parametrize("which", NO_NUMBERS)
def test_what_is_no_number_is_an_error(
    open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path, which: str
) -> None:
    graph, old, new, message = NO_NUMBERS[which]
    from tests.hostile.base import GRAPHS

    draft = sound()
    assert old in GRAPHS[graph]
    draft.graph(graph, GRAPHS[graph].replace(old, new))
    with pytest.raises(binding.LdmError, match=message):
        pixels_of(open_cpp(written(draft, tmp_path / "bundle"), backend=b"cpu"), guidance=5.0)


def test_a_negative_prompt_that_is_empty_is_a_text(open_cpp: Callable[..., Any], tmp_path: Path) -> None:
    """Zeros stand for no negative prompt at all, in models that were trained so."""
    import ctypes

    draft = sound()
    with_conditioner(draft)
    zeros = open_cpp(written(draft, tmp_path / "zeros"), backend=b"cpu")
    text = open_cpp(written(sound(), tmp_path / "text"), backend=b"cpu")
    empty = {"negative_prompts": (ctypes.c_char_p * 1)(b""), "negative_prompt_count": 1}
    assert pixels_of(zeros) != pixels_of(text) == pixels_of(text, **empty) == pixels_of(zeros, **empty)


@pytest.mark.parametrize(("setting", "files"), [(None, 0), ("0", 0), ("true", 0)])
def test_nothing_is_written_outside(library: Path, tmp_path: Path, setting: str | None, files: int) -> None:
    """ONNX Runtime sends telemetry and writes a number of the device, unless it is told not to."""
    folder, home = written(sound(), tmp_path / "bundle"), tmp_path / "home"
    home.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); import ldm_ctypes;"  # and not Python's ONNX Runtime
        "p = ldm_ctypes.Pipeline(ldm_ctypes.load(sys.argv[1]), sys.argv[2]);"
        "p.draw(['a cat'], sampler=b'ddim', steps=2)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "XDG_"))}
    environment |= {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    if setting is not None:
        environment["ORT_DISABLE_TELEMETRY"] = setting
    command = (sys.executable, "-c", code, str(library / "libldm.so"), str(folder), str(SOURCES / "examples"))
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    assert len([path for path in home.rglob("*") if path.is_file()]) == files


def test_no_memory_is_asked_for_what_cannot_be_held(
    open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path
) -> None:
    pipeline = open_cpp(written(sound(), tmp_path / "bundle"), backend=b"cpu")
    with pytest.raises(binding.LdmError, match="GB of memory"):
        pipeline.draw(["a cat"], height=1 << 20, width=1 << 20, **SMALL)
    for guidance in (1e308, 1e7, -1.0, np.inf):
        with pytest.raises(binding.LdmError, match="guidance"):
            pixels_of(pipeline, guidance=guidance)


def test_weights_of_a_nested_graph_are_not_looked_for_in_the_working_folder(
    open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verified graph is opened from memory, where ONNX Runtime knows no folder of its own."""
    draft = sound()
    model = draft.model("unet")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    out = onnx.helper.make_tensor_value_info("b", 1, [1])
    branch = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["b"])], "b", [], [out], [tensor])
    yes = onnx.helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True])
    model.graph.initializer.append(yes)
    model.graph.node.insert(0, onnx.helper.make_node("If", ["yes"], ["one"], then_branch=branch, else_branch=branch))
    add = next(node for node in model.graph.node if node.op_type == "Add")
    add.output[0] = "sum"
    model.graph.node.append(onnx.helper.make_node("Mul", ["sum", "one"], ["out_sample"]))
    draft.files["unet/model.onnx"] = model.SerializeToString()
    draft.files["unet/w.bin"] = np.ones(1, np.float32).tobytes()
    folder = written(draft, tmp_path / "bundle")
    expected = pixels_of(open_cpp(folder, backend=b"cpu"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.bin").write_bytes(np.full(1, 7, np.float32).tobytes())
    drawn = None
    with suppress(binding.LdmError):  # a refusal is as good as the right picture
        drawn = pixels_of(open_cpp(folder, backend=b"cpu", verify=1))
    assert drawn in (None, expected)
