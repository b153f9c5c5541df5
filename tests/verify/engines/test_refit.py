"""Refitting engines: all that is refused before a GPU is needed, and that the process which refits ends well without.

Engines that can be refitted are not built without a GPU, so here ``target.json`` says so of ones that cannot; what a
GPU makes of real ones is in ``tests/runtime/test_gpu.py``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import add_plan
from ldm_export.cli.main import main
from ldm_export.errors import BackendError, ExportError, InputError
from ldm_export.reading.hashes import sha256_of
from ldm_export.runtime.backends import cuda
from ldm_export.verify.engines import refit
from ldm_export.verify.engines.build import EngineSettings, build_engines
from ldm_export.verify.engines.refit import check_same_networks, refit_engines

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

KIND = "rtx-sm89"
NAME = "text_encoder"
without_a_gpu = pytest.mark.skipif(cuda.driver_is_there(), reason="NVIDIA's driver is installed")


def here() -> str:
    return "8.9"


def nowhere() -> str:
    raise BackendError("there is no GPU")


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one small engine; read-only."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    build_engines(Bundle.open(folder), EngineSettings("tensorrt_rtx", ("89",)), [NAME])
    return folder


@pytest.fixture
def base(built: Path, tmp_path: Path) -> Path:
    """A copy whose engine is said to be refittable, for a test to change."""
    return says(Path(shutil.copytree(built, tmp_path / "base")), refittable=True)


@pytest.fixture
def other(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the same networks, for a test to change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "other", ignore=shutil.ignore_patterns("targets")))


def says(bundle: Path, **fields: Any) -> Path:
    file = bundle / "targets" / KIND / "target.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return bundle


def change(bundle: Path, edit: Callable[[onnx.GraphProto], object]) -> None:
    """Change the text encoder of a bundle, which stays whole."""
    file = bundle / NAME / "model.onnx"
    model = onnx.load(file)
    edit(model.graph)
    onnx.save(model, file)
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = manifest["files"][f"{NAME}/model.onnx"]
    entry |= {"size_bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def weight_of(graph: onnx.GraphProto, dtype: int = onnx.TensorProto.FLOAT) -> onnx.TensorProto:
    """A matrix, or the first whole number."""
    return next(w for w in graph.initializer if w.data_type == dtype and (dtype != 1 or len(w.dims) == 2))


def rewrite(weight: onnx.TensorProto, new: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    weight.CopyFrom(numpy_helper.from_array(new(numpy_helper.to_array(weight)), weight.name))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_there_is_no_such_target(base: Path, other: Path) -> None:
    with pytest.raises(InputError, match=rf"has no engines 'rtx-sm120'; it has {KIND}\. Build some"):
        refit_engines(Bundle.open(base), "rtx-sm120", nowhere)
    with pytest.raises(InputError, match=r"has no engines 'toaster'; it has none\. "):
        refit_engines(Bundle.open(other), "toaster", nowhere)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refittable": False}, r"was built with its weights fixed\. Build it with --refit or --strip\.$"),
        ({}, r"has its weights\. Name another bundle"),
        ({"stripped": True, "version": "1.2.0.1"}, r"was made with tensorrt_rtx 1\.2\.0\.1, and this is "),
        ({"stripped": "no"}, r"cannot be refitted, since its target\.json cannot be read \(stripped is of"),
    ],
)
def test_engines_that_cannot_be_refitted(base: Path, fields: dict[str, Any], message: str) -> None:
    says(base, **fields)
    before = contents(base)
    with pytest.raises(InputError, match=message):
        refit_engines(Bundle.open(base), KIND, nowhere)
    assert contents(base) == before


def test_engines_stripped_alone_take_their_own_weights(base: Path, other: Path) -> None:
    says(base, refittable=False, stripped=True)
    with pytest.raises(BackendError, match="there is no GPU"):
        refit_engines(Bundle.open(base), KIND, nowhere)
    change(other, lambda graph: rewrite(weight_of(graph), lambda weight: weight + 1))
    with pytest.raises(InputError, match=rf"built with --strip alone, .* of which {NAME}'s are not\. Build"):
        refit_engines(Bundle.open(other), KIND, nowhere, Bundle.open(base))


def cut(graph: onnx.GraphProto) -> None:
    rewrite(weight_of(graph), lambda weight: weight[:-1])


def whole_number(graph: onnx.GraphProto) -> None:
    rewrite(weight_of(graph, onnx.TensorProto.INT64), lambda number: number + 1)


def half(graph: onnx.GraphProto) -> None:
    rewrite(weight_of(graph), lambda weight: weight.astype(np.float16))


def renamed(graph: onnx.GraphProto) -> None:
    weight_of(graph).name = "another"


def another_node(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if node.op_type == "Add").op_type = "Sub"


def one_node_less(graph: onnx.GraphProto) -> None:
    del graph.node[-1]


DIFFERENT: dict[str, tuple[Callable[[onnx.GraphProto], None], str]] = {
    "shape": (cut, r"weight '\S+' has shape \(\d+, \d+\) in \S+other, and \(\d+, \d+\) in \S+base\. Engines take"),
    "dtype": (half, r"weight '\S+' is FLOAT16 in \S+other, and FLOAT in \S+base"),
    "name": (renamed, r"other has the weight 'another', and \S+base has not"),
    "constant": (whole_number, r"constant '\S+' is not the same in"),
    "node": (another_node, r"Sub '\S+' in \S+other is Add '\S+' in \S+base"),
    "nodes": (one_node_less, r"other has \d+ nodes, inputs and outputs, and \S+base \d+"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_network_is_refused_before_a_gpu_is_asked_for(base: Path, other: Path, case: str) -> None:
    edit, message = DIFFERENT[case]
    change(other, edit)
    before = contents(other)
    with pytest.raises(InputError, match=rf"^{NAME} is another network: .*{message}"):
        refit_engines(Bundle.open(other), KIND, nowhere, Bundle.open(base))
    assert contents(other) == before


def test_a_loop_takes_no_other_plan(base: Path, other: Path) -> None:
    """The plan is in the engine, and its numbers are no weights."""
    name, plan = "loops/ddim-10", "plans/ddim-10.json"
    for folder in (base, other):
        add_plan(Bundle.open(folder), "ddim", 10)
    file = base / "targets" / KIND / "target.json"
    document = json.loads(file.read_text())
    source_hashes = {plan: Bundle.open(base).manifest.files[plan].sha256}
    document["engines"] = {name: document["engines"][NAME] | {"source": plan, "source_hashes": source_hashes}}
    file.write_text(json.dumps(document))
    opened = Bundle.open(other)
    changed = json.loads(opened.file(plan).read_text()) | {"init_scale": 1.5}
    opened.add_file(plan, json.dumps(changed).encode())
    before = contents(other)
    with pytest.raises(
        InputError, match=rf"^{plan} is another plan in \S+base, and the engine {name} has it in it\. Build {name} anew"
    ):
        refit_engines(Bundle.open(other), KIND, nowhere, Bundle.open(base))
    assert contents(other) == before


def test_a_full_disk_leaves_what_was_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(base, stripped=True)
    before = contents(base)

    def full(told: Any, what: str) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(refit, "in_a_process", full)
    with pytest.raises(ExportError, match=r"^The disk is full: .*rtx-sm89 could not be written; .* Make room\.$"):
        refit_engines(Bundle.open(base), KIND, here)
    assert contents(base) == before


def test_other_values_are_the_same_network(base: Path, other: Path) -> None:
    change(other, lambda graph: rewrite(weight_of(graph), lambda weight: weight + 1))
    check_same_networks(Bundle.open(other), Bundle.open(base), [NAME, "unet"], "here", "there")
    with pytest.raises(BackendError, match="there is no GPU"):
        refit_engines(Bundle.open(other), KIND, nowhere, Bundle.open(base))
    with pytest.raises(BackendError, match=r"is for compute capability 8\.9, and the GPU here has 9\.0\. Refit it on"):
        refit_engines(Bundle.open(other), KIND, lambda: "9.0", Bundle.open(base))


def test_a_graph_that_the_other_lacks(built: Path) -> None:
    bundle = Bundle.open(built)
    none = replace(bundle, manifest=replace(bundle.manifest, graphs={}))
    with pytest.raises(InputError, match=rf"^there has no graph '{NAME}', which the engines take in here; build"):
        check_same_networks(bundle, none, [NAME], "here", "there")


def test_what_is_written(base: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the refitting itself, in whose place the engine is copied."""
    change(other, lambda graph: rewrite(weight_of(graph), lambda weight: weight + 1))
    says(base, stripped=True)

    def copied(told: Any, what: str) -> Any:
        (graph,) = told["graphs"].values()
        shutil.copy(graph["engine"], graph["plan"])
        assert Path(graph["onnx"]).is_relative_to(other)
        return {NAME: {"seconds": 1.5}}

    monkeypatch.setattr(refit, "in_a_process", copied)
    opened = Bundle.open(other)
    made = refit_engines(opened, KIND, here, Bundle.open(base))
    assert (made.folder, made.stripped, made.refittable) == (other / "targets" / KIND, False, True)
    assert made.engines[NAME].source_hashes == {
        f"{NAME}/model.onnx": opened.manifest.files[f"{NAME}/model.onnx"].sha256
    }
    assert made.engines[NAME].seconds == 1.5
    assert [path.name for path in (other / "targets").iterdir()] == [KIND]


@without_a_gpu
def test_a_process_that_cannot_refit_leaves_all_as_it_was(base: Path) -> None:
    """TensorRT-RTX itself opens no engine here."""
    says(base, stripped=True)
    before = contents(base)
    with pytest.raises(ExportError, match=rf"^Refitting {NAME} (failed|ended|crashed)"):
        refit_engines(Bundle.open(base), KIND, here)
    assert contents(base) == before


@without_a_gpu
def test_the_command_says_that_there_is_no_driver(base: Path) -> None:
    says(base, stripped=True)
    done = CliRunner().invoke(main, ["refit", str(base), "--target", KIND])
    assert done.exit_code == 2
    assert "NVIDIA's driver is missing" in done.stderr
    assert "backend" not in done.stderr
    assert "Traceback" not in done.output
