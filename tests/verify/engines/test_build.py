"""TensorRT-RTX engines, built without a GPU: the parser is the judge of every graph; nothing here runs an engine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ldm_export.bundle import Bundle
from ldm_export.contract import step_spec
from ldm_export.errors import BundleError, ParityError
from ldm_export.export.chain import export_bundle
from ldm_export.export.tensorrt.process import in_a_process
from ldm_export.families import open_checkpoint
from ldm_export.graph.base import GraphChange
from ldm_export.graph.half import Half
from ldm_export.verify.engines import sources
from ldm_export.verify.engines.build import build_engines
from tests.bundle_fixture import KINDS
from tests.verify.engines.engines import KIND, RTX, SMALL, child, contents, engines_of, settings

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

KINDS_OF_EMOJI64 = ("rtx-sm86-sm89-sm120", "rtx-sm86-sm89-sm120-fp16")


def precisions_of(layers: dict[str, dict[str, int]]) -> set[str]:
    return {precision for counts in layers.values() for precision in counts} - {"none"}


def test_engines_take_and_give_what_the_bundle_says(built: Path) -> None:
    target = engines_of(built, "rtx-sm86-sm89")
    graphs = Bundle.open(built).manifest.graphs
    assert set(target.engines) == {*graphs, "step", "loops/ddim-10"}
    assert target.compute_capabilities == ("8.6", "8.9")
    for name, graph in {**graphs, "step": step_spec(graphs["unet"])}.items():
        for tensors, specs in (
            (target.engines[name].inputs, graph.inputs),
            (target.engines[name].outputs, graph.outputs),
        ):
            told = {
                spec.name: (spec.dtype, tuple(-1 if isinstance(size, str) else size for size in spec.shape))
                for spec in specs
            }
            assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors} == told
    weights = sum(file.stat().st_size for file in (built / "unet").iterdir())
    assert target.file("unet.plan").stat().st_size > weights
    layers = target.report["unet"]["layers"]
    assert layers["CONVOLUTION"].keys() == {"FLOAT"}
    assert layers["CONVOLUTION"]["FLOAT"] > 5
    assert precisions_of(layers) <= {"FLOAT", "INT64", "INT32", "BOOL"}
    assert "TRIP_LIMIT" in target.report["loops/ddim-10"]["layers"]


def test_what_went_in_was_compared(built: Path) -> None:
    """Each engine says how far its graph is from PyTorch's; a loop and the step, how far from what they shall be."""
    report = engines_of(built, "rtx-sm86-sm89").report
    for name, graph in Bundle.open(built).manifest.graphs.items():
        (own,) = report[name]["compared"]
        assert (own["graph"], own["against"], own["allowed"]) == (graph.name, "PyTorch", 1e-4)
        assert 0 < own["error"] <= own["allowed"]
    (step,) = report["step"]["compared"]
    assert (step["graph"], step["against"]) == ("step", "its formula in float64")
    assert 0 < step["error"] < step["allowed"]
    *parts, images, latents = report["loops/ddim-10"]["compared"]
    assert [part["graph"] for part in parts] == ["text_encoder", "unet", "vae_decoder"]
    assert images["graph"] == "images of loops/ddim-10"
    assert latents["against"] == "its graphs, called one by one"
    assert latents["error"] <= latents["allowed"] == 1e-4


@pytest.mark.parametrize(("precision", "type_of_weights"), [("fp16", "HALF"), ("int8", "INT8")])
def test_other_precisions(bundle: Path, precision: str, type_of_weights: str) -> None:
    made = build_engines(Bundle.open(bundle), settings(precision=precision), ["text_encoder", "vae_decoder"])
    target = engines_of(bundle, f"{KIND}-{precision}")
    assert made.target == target
    for name, engine in target.engines.items():
        report = target.report[name]
        plain, own = report["compared"]
        assert (plain["against"], own["against"]) == ("PyTorch", "the plain graph")
        assert own["graph"] == f"{name} in {precision}"
        assert 0 < own["error"] <= own["allowed"]
        assert type_of_weights in precisions_of(report["layers"])
        assert all(tensor.dtype != "float16" for tensor in (*engine.inputs, *engine.outputs))
        assert report["onnx_bytes"] < (bundle / name / "model.onnx").stat().st_size


class Wrong(Half):
    """A conversion that halves the largest weight."""

    def apply(self, model: onnx.ModelProto, calibration: Any) -> GraphChange:
        change = super().apply(model, calibration)
        weight = max(change.model.graph.initializer, key=lambda each: np.prod(each.dims))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) / np.float16(2), weight.name))
        return change


def test_a_conversion_that_is_wrong_is_not_built(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bundle)
    monkeypatch.setitem(sources.PRECISIONS, "fp16", Wrong())
    with pytest.raises(
        ParityError,
        match=r"^text_encoder: '.*\.half' is not '.*' of the graph that it was made of: .* off by more than rounding",
    ):
        build_engines(Bundle.open(bundle), settings(precision="fp16"), SMALL)
    assert contents(bundle) == before


def test_an_altered_graph_is_not_built(bundle: Path) -> None:
    """Else an engine's record would be of other weights than it has."""
    file = bundle / "text_encoder" / "model.onnx"
    model = onnx.load(file)
    weight = next(each for each in model.graph.initializer if len(each.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"text_encoder/model\.onnx has been altered: its SHA-256 is"):
        build_engines(Bundle.open(bundle), settings(), SMALL)
    assert not list((bundle / "targets").iterdir())


@pytest.mark.parametrize(
    "kind", ["unconditional", "class-conditional", "inpainting", "lcm", "sd2", "sdxl", "instruct-pix2pix"]
)
def test_models_of_other_kinds(kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str) -> None:
    assert kind in KINDS
    copy = Path(shutil.copytree(kinds(kind)[1], tmp_path / "bundle"))
    build_engines(Bundle.open(copy), settings(), ["unet"])
    names = {tensor.name for tensor in engines_of(copy).engines["unet"].inputs}
    expected = {"lcm": {"timestep_cond"}, "sdxl": {"text_embeds", "time_ids"}, "class-conditional": {"class_labels"}}
    assert expected.get(kind, set()) <= names
    rows = engines_of(copy).engines["unet"].profile["sample"]
    guided = kind in ("sd2", "sdxl", "inpainting") and "encoder_hidden_states" in names
    assert (rows.min[0], rows.max[0]) == (1, 12 if kind == "instruct-pix2pix" else 8 if guided else 4)


def test_weights_of_8_bits_stay_8_bits(tmp_path: Path) -> None:
    """A judge of int8: the engine of a product with quantized weights has a quarter of the bytes."""
    weights = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    scale = np.abs(weights).max() / 127
    integers = np.round(weights / scale).astype(np.int8)
    sizes = {}
    for name, nodes, tensors in (
        ("fp32", [], {"w": weights}),
        ("int8", [helper.make_node("DequantizeLinear", ["q", "s"], ["w"])], {"q": integers, "s": np.float32(scale)}),
    ):
        graph = helper.make_graph(
            [*nodes, helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 256])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 1024])],
            [numpy_helper.from_array(np.asarray(array), key) for key, array in tensors.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "g.onnx")
        told = {"compute_capabilities": ["8.9"], "refittable": False, "stripped": False, "sparse": False}
        profile = {"x": {"min": [1, 256], "opt": [2, 256], "max": [4, 256]}}
        entry = {"onnx": str(tmp_path / "g.onnx"), "plan": str(tmp_path / name), "profile": profile}
        in_a_process({"flavour": RTX, **told, "graphs": {"g": entry}}, "The build")
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["int8"] < sizes["fp32"] / 3


@pytest.mark.slow
def test_emoji64(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model, as continuous integration builds it: for three GPUs, in two precisions, each once."""
    bundle = export_bundle(open_checkpoint("emoji64"), tmp_path / "emoji64")
    wanted = [settings("86", "89", "120", precision=precision) for precision in ("fp32", "fp16")]
    lines = [f"{'emoji64 for SM 86, 89, 120':30} {'seconds':>8} {'bytes':>10} {'of ONNX':>10} {'error':>8}"]
    for each in wanted:
        made = build_engines(bundle, each)
        assert made.built == (*bundle.manifest.graphs, "step")
        for name, engine in made.target.engines.items():
            report = made.target.report[name]
            worst = max(report["compared"], key=lambda compared: compared["error"])
            assert worst["error"] <= worst["allowed"]
            assert report["engine_bytes"] == made.target.file(engine.path).stat().st_size > report["onnx_bytes"]
            sizes = f"{report['engine_bytes']:10} {report['onnx_bytes']:10}"
            lines.append(f"{name:23} {each.precision:6} {engine.seconds:8.1f} {sizes} {worst['error']:8.1e}")
    sums = [
        sum(entry.size_bytes for entry in engines_of(bundle.path, kind).files.values()) for kind in KINDS_OF_EMOJI64
    ]
    assert sums[1] < 0.8 * sums[0]
    before = contents(bundle.path / "targets")
    child("raise SystemExit('nothing may be built')", monkeypatch)
    started = time.perf_counter()
    assert [build_engines(bundle, each).built for each in wanted] == [(), ()]
    lines.append(f"{'again, nothing to build':30} {time.perf_counter() - started:8.1f}")
    assert contents(bundle.path / "targets") == before
    with capsys.disabled():
        print("", *lines, sep="\n")
