"""OpenVINO as a backend, compared with ONNX Runtime: graph by graph, picture by picture, and where it must refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import BackendError, BundleError, InputError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import open_backend
from ldm_export.runtime.backends import openvino as backend_module
from ldm_export.runtime.backends.openvino import OpenVinoBackend, OpenVinoGraph
from ldm_export.verify.metrics import psnr_db
from tests.arrays import arrays
from tests.hostile.base import entry_of
from tests.scheduler_configs import relative_error

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO (extra openvino) is not installed")

TOLERANCE = 1e-4
"""Of the largest value."""
SAME_PICTURE_DB = 60.0
STEPS = 10
GRAPHS = {
    "tiny": ("text_encoder", "unet", "vae_decoder", "vae_encoder"),
    "unconditional": ("unet",),
    "class-conditional": ("unet",),
    "lcm": ("unet",),
    "sdxl": ("unet", "text_encoder_2"),
}
DRAWN: dict[str, dict[str, Any]] = {
    "tiny": {
        "prompts": ["a red circle", "two green triangles on white"],
        "seed": [7, 11],
        "negative_prompt": "smiling",
    },
    "unconditional": {"seed": [7, 11]},
    "class-conditional": {"seed": [7, 11], "class_labels": [4, 0]},
}
Array = np.ndarray[Any, Any]


@pytest.fixture
def bundle_of(tiny_bundle: Path, kinds: Callable[[str], tuple[Path, Path]]) -> Callable[[str], Path]:
    return lambda kind: tiny_bundle if kind == "tiny" else kinds(kind)[1]


@pytest.fixture
def backend(tiny_bundle: Path) -> OpenVinoBackend:
    return OpenVinoBackend(Bundle.open(tiny_bundle), None)


# --- the same numbers as ONNX Runtime -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "graph"), [(kind, graph) for kind, graphs in GRAPHS.items() for graph in graphs])
def test_every_graph_gives_what_onnxruntime_gives(bundle_of: Callable[[str], Path], kind: str, graph: str) -> None:
    bundle = Bundle.open(bundle_of(kind))
    ours, theirs = (open_backend(bundle, name, 1).load(graph) for name in ("openvino", "cpu"))
    inputs = arrays(ours.spec.inputs)
    expected = theirs.run(inputs)
    results = ours.run(inputs)
    assert list(results) == [tensor.name for tensor in ours.spec.outputs]
    for name, result in results.items():
        assert result.shape == expected[name].shape
        assert result.dtype == expected[name].dtype
        np.testing.assert_allclose(result, expected[name], rtol=0, atol=TOLERANCE * np.abs(expected[name]).max())


def listed(folder: Path, *files: str) -> None:
    """Let the manifest say what these files now are."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] |= {file: entry_of((folder / file).read_bytes()) for file in files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_weights_in_a_file_of_their_own(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    file, outside = bundle.file("unet/model.onnx"), "unet/model.onnx.data"
    inputs = arrays(bundle.manifest.graphs["unet"].inputs)
    expected = OpenVinoBackend(bundle, None).load("unet").run(inputs)["out_sample"]
    onnx.save_model(onnx.load(file), file, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert (bundle.path / outside).stat().st_size > file.stat().st_size
    listed(bundle.path, "unet/model.onnx", outside)
    ours = OpenVinoBackend(Bundle.open(bundle.path), None)
    np.testing.assert_array_equal(ours.load("unet").run(inputs)["out_sample"], expected)


def test_a_wrong_number_is_seen(backend: OpenVinoBackend, tiny_bundle: Path) -> None:
    ours, theirs = backend.load("unet"), open_backend(Bundle.open(tiny_bundle), "cpu", 1).load("unet")
    inputs = arrays(ours.spec.inputs)
    expected = theirs.run(inputs)["out_sample"]
    inputs["timestep"] += 1
    assert relative_error(ours.run(inputs)["out_sample"], expected) > TOLERANCE


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("size", [{}, {"height": 24, "width": 32}], ids=["own size", "other size"])
def test_the_same_pictures(bundle_of: Callable[[str], Path], kind: str, size: dict[str, int]) -> None:
    theirs, ours = (
        Pipeline.open(bundle_of(kind), backend=name).generate(**DRAWN[kind], steps=STEPS, **size)
        for name in ("cpu", "openvino")
    )
    assert ours.images.shape == theirs.images.shape
    for picture, expected in zip(ours.images, theirs.images, strict=True):
        assert psnr_db(picture, expected) >= SAME_PICTURE_DB


def test_a_picture_from_a_picture(tiny_bundle: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    theirs, ours = (
        Pipeline.open(tiny_bundle, backend=name).generate("a red circle", steps=STEPS, image=image)
        for name in ("cpu", "openvino")
    )
    assert psnr_db(ours.images[0], theirs.images[0]) >= SAME_PICTURE_DB


def test_one_pipeline_draws_several_sizes_and_batches(tiny_bundle: Path) -> None:
    pipeline = Pipeline.open(tiny_bundle, backend="openvino")
    first = pipeline.generate("a red circle", steps=STEPS, seed=3)
    pipeline.generate(["a blue square"] * 3, steps=STEPS, height=32)
    again = pipeline.generate("a red circle", steps=STEPS, seed=3)
    np.testing.assert_array_equal(first.latents, again.latents)
    *_, (left, right) = zip(*(pipeline.steps("a red circle", steps=STEPS, seed=3) for _ in range(2)), strict=True)
    np.testing.assert_array_equal(left.latents, right.latents)  # two loops that interleave, on one compiled graph
    np.testing.assert_array_equal(left.latents, first.latents)


# --- binding --------------------------------------------------------------------------------------------------------


def test_what_is_bound_is_read_and_written_in_place(backend: OpenVinoBackend) -> None:
    unet = backend.load("unet")
    inputs, outputs = arrays(unet.spec.inputs), arrays(unet.spec.outputs)
    call = unet.bind(inputs, outputs)
    for seed in (1, 2, 3):
        for name, array in arrays(unet.spec.inputs, seed).items():
            inputs[name][...] = array
        call()
        assert relative_error(outputs["out_sample"], unet.run(inputs)["out_sample"]) < TOLERANCE


def test_two_bindings_of_one_size_do_not_disturb_each_other(backend: OpenVinoBackend) -> None:
    unet = backend.load("unet")
    sides = [(arrays(unet.spec.inputs, seed), arrays(unet.spec.outputs)) for seed in (1, 2)]
    calls = [unet.bind(*side) for side in sides]
    for call in (*calls, calls[0]):
        call()
    for inputs, outputs in sides:
        assert relative_error(outputs["out_sample"], unet.run(inputs)["out_sample"]) < TOLERANCE


def test_a_graph_is_compiled_once_for_each_size(backend: OpenVinoBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    compile_model = OpenVinoBackend.compile
    monkeypatch.setattr(
        OpenVinoBackend, "compile", lambda self, model: compiled.append(model) or compile_model(self, model)
    )
    unet = backend.load("unet")
    assert not compiled
    for batch in (1, 2, 1, 2):
        unet.bind(arrays(unet.spec.inputs, batch=batch), arrays(unet.spec.outputs, batch=batch))()
    assert len(compiled) == 2


def test_a_large_graph_is_kept_for_one_size_only(backend: OpenVinoBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "KEPT_BYTES", 1)
    unet = backend.load("unet")
    first = arrays(unet.spec.inputs, batch=1), arrays(unet.spec.outputs, batch=1)
    call = unet.bind(*first)
    unet.bind(arrays(unet.spec.inputs, batch=2), arrays(unet.spec.outputs, batch=2))
    assert len(unet._sized) == 1
    call()  # what is bound stays bound
    assert relative_error(first[1]["out_sample"], unet.run(first[0])["out_sample"]) < TOLERANCE


# --- names, settings and refusals -----------------------------------------------------------------------------------


def test_its_name_and_what_it_runs_with(backend: OpenVinoBackend, tiny_bundle: Path) -> None:
    kind, version, device = backend.name.split()
    assert (kind, device) == ("openvino", "cpu")
    assert version.replace(".", "").isdecimal()
    graph = OpenVinoBackend(Bundle.open(tiny_bundle), 1).load("vae_decoder")
    assert isinstance(graph, OpenVinoGraph)
    compiled = graph.compiled()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() in ("f32", "float32")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_it_is_reported_as_asked_for_and_as_used(tiny_bundle: Path) -> None:
    pipeline = Pipeline.open(tiny_bundle, backend="openvino", threads=1)
    assert pipeline.requested_backend == "openvino"
    assert pipeline.generate("a red circle", steps=STEPS).backend == pipeline.backend
    assert pipeline.backend.startswith("openvino 2")


def test_openvino_that_is_not_installed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"OpenVINO is not installed; .*pip install 'ldm_export\[openvino\]'"):
        Pipeline.open(tiny_bundle, backend="openvino")


def test_its_import_is_not_reported_to_anyone() -> None:
    code = (
        "import sys; from ldm_export.runtime.backends.openvino import _import_openvino; _import_openvino(); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"dtype": "float16"}, {"shape": ("batch", 7, "height", "width")}]
)
def test_a_graph_that_is_not_what_the_manifest_says(tiny_bundle: Path, side: str, change: dict[str, Any]) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec = bundle.manifest.graphs["vae_decoder"]
    wrong = replace(spec, **{side: (replace(getattr(spec, side)[0], **change),)})
    bundle = replace(bundle, manifest=replace(bundle.manifest, graphs={"vae_decoder": wrong}))
    for name in ("openvino", "cpu"):
        with pytest.raises(BundleError, match=f"vae_decoder/model.onnx has other {side} than manifest.json says: "):
            open_backend(bundle, name, None).load("vae_decoder")


def test_a_graph_that_it_refuses(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    model = onnx.load(folder / "unet/model.onnx")
    model.graph.node[0].op_type = "Nothing"
    (folder / "unet/model.onnx").write_bytes(model.SerializeToString())
    listed(folder, "unet/model.onnx")
    with pytest.raises(BundleError, match=r"OpenVINO refuses unet/model\.onnx: .*Use the backend cpu") as raised:
        OpenVinoBackend(Bundle.open(folder), None).load("unet")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("way", ["run", "bind"])
def test_inputs_that_do_not_fit(backend: OpenVinoBackend, way: str) -> None:
    unet = backend.load("unet")
    inputs = arrays(unet.spec.inputs)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:2]
    with pytest.raises(InputError, match=r"unet input 'encoder_hidden_states' has shape \(2, 4, 32\)"):
        unet.run(inputs) if way == "run" else unet.bind(inputs, {})


def test_an_error_of_openvino_becomes_one_sentence(backend: OpenVinoBackend) -> None:
    unet = backend.load("unet")
    with pytest.raises(BackendError, match="OpenVINO could not run unet: ") as raised:
        unet.bind(arrays(unet.spec.inputs), arrays(unet.spec.outputs, batch=7))
    assert "\n" not in str(raised.value)
    assert "Exception from" not in str(raised.value)
