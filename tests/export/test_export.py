"""Exported bundles of every kind: plain ONNX, the same bytes everywhere, the numbers of diffusers, or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import numpy_helper
from torch import Tensor

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import is_target
from ldm_export.bundle.parity import TOLERANCE, check_parity, largest_error
from ldm_export.contract import GraphSpec, Guidance, Roles, TensorSpec, TextEncoder
from ldm_export.errors import BundleError, CheckpointError, ExportError, LdmExportError, ParityError
from ldm_export.export import chain, parity
from ldm_export.export import onnx as onnx_export
from ldm_export.export.onnx import random_inputs
from ldm_export.export.parity import compare_outputs
from ldm_export.families import family_of, open_checkpoint
from ldm_export.families.base import GraphModule
from ldm_export.graph import files as graph_files
from ldm_export.graph.running import worst_error
from ldm_export.runtime import Pipeline
from tests.bundle_fixture import CLASSES, KINDS, in_kinds
from tests.diffusers_networks import judged

ROOT = Path(__file__).parents[2]
ALL_KINDS = ["stable diffusion", *KINDS]
OFTEN = ("sdxl", "unconditional")
UNSEEN_SIZES = {"batch": 3, "height": 12, "width": 20, "tokens": 9}
PIXELS_PER_LATENT = 2

Model = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def model(tiny_checkpoint: Path, tiny_bundle: Path, kinds: Model) -> Model:
    """A function from one of `ALL_KINDS` to the checkpoint and its bundle."""
    return lambda kind: (tiny_checkpoint, tiny_bundle) if kind == "stable diffusion" else kinds(kind)


def graphs_of(bundle: Path) -> dict[str, Path]:
    found = {path.parent.name: path for path in sorted(bundle.glob("*/model.onnx"))}
    assert {"vae_decoder", "vae_encoder"} < found.keys()
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unconditional", pytest.param("stable diffusion", marks=pytest.mark.slow)])
def test_another_process_in_another_place_writes_the_same_bytes(model: Model, tmp_path: Path, kind: str) -> None:
    checkpoint, bundle = model(kind)
    elsewhere = shutil.copytree(checkpoint, tmp_path / "some" / "where" / checkpoint.name)
    call = "from ldm_export.cli import main; main()"
    command = [sys.executable, "-c", call, "export", str(elsewhere), "-o", "again", "--json"]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(record["passed"] for record in json.loads(done.stdout)["parity"])
    written = files_of(tmp_path / "again").items()
    again, first = {name: data for name, data in written if not is_target(name)}, files_of(bundle)
    assert again.keys() == first.keys()
    assert [name for name in first if again[name] != first[name]] == []


@pytest.mark.parametrize(
    "kind",
    [*OFTEN, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALL_KINDS if kind not in OFTEN)],
)
def test_no_file_tells_where_it_was_made(model: Model, kind: str) -> None:
    checkpoint, bundle = model(kind)
    for name, content in files_of(bundle).items():
        for trace in (str(ROOT), str(Path.home()), str(checkpoint.parent), "stack_trace", ".py", "site-packages"):
            assert trace.encode() not in content, name


@pytest.mark.parametrize("kind", ["stable diffusion", *in_kinds()])
def test_graphs_are_standard_onnx(model: Model, kind: str) -> None:
    for path in graphs_of(model(kind)[1]).values():
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path)
        assert {(opset.domain, opset.version) for opset in graph.opset_import} == {("", 20)}
        assert {node.domain for node in graph.graph.node} == {""}
        assert not graph.functions
        assert not graph.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, tuple(size.dim_param or size.dim_value for size in tensor.shape.dim))


@pytest.mark.parametrize("kind", ["stable diffusion", *in_kinds()])
def test_inputs_and_outputs_are_those_of_contract_and_manifest(model: Model, kind: str) -> None:
    checkpoint, bundle = model(kind)
    paths = graphs_of(bundle)
    specs = {}
    for name, path in paths.items():
        graph = onnx.load(path).graph
        sides = (tuple(map(tensor_spec, values)) for values in (graph.input, graph.output))
        specs[name] = GraphSpec(f"{name}/model.onnx", *sides)
    assert specs == {graph.spec.name: graph.spec for graph in family_of(open_checkpoint(checkpoint)).graphs}
    assert specs == Bundle.open(bundle, verify=True).manifest.graphs


def test_the_manifest_says_where_the_weights_came_from(model: Model) -> None:
    checkpoint, bundle = model("class-conditional")
    manifest = Bundle.open(bundle).manifest
    assert manifest.source["checkpoint"] == checkpoint.name
    assert manifest.source["sha256"]["unet"] == open_checkpoint(checkpoint).sha256("unet")
    assert manifest.model["class_count"] == CLASSES
    assert [record["passed"] for record in manifest.parity] == [True] * 3


def test_the_bundle_is_read_as_the_checkpoint_was(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    assert Bundle.open(tiny_bundle).manifest.model == {
        "class_name": "StableDiffusionPipeline",
        "height": 16,
        "width": 16,
        "latent_channels": 4,
        "pixels_per_latent": PIXELS_PER_LATENT,
        "default_sampler": "ddim",
        "default_steps": 20,
        "class_count": None,
        "prediction_type": "epsilon",
    }
    assert Bundle.open(tiny_bundle).roles == Roles(
        "unet",
        "vae_decoder",
        "vae_encoder",
        Guidance("two_rows", 4.0),
        (TextEncoder("text_encoder", "tokenizer", "clip", 16),),
        None,
        {"encoder_hidden_states": "text_encoder.last_hidden_state"},
    )


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stable diffusion", *in_kinds()])
@torch.no_grad()
def test_graphs_compute_what_diffusers_computes(model: Model, kind: str) -> None:
    checkpoint, bundle = model(kind)
    patch_size = Bundle.open(bundle).manifest.model.get("patch_size", 1)
    for name, graph in Bundle.open(bundle).manifest.graphs.items():
        drawn = random_inputs(graph, UNSEEN_SIZES, PIXELS_PER_LATENT, CLASSES, patch_size)
        inputs = dict(zip([tensor.name for tensor in graph.inputs], drawn, strict=True))
        expected = judged(checkpoint, name, inputs)
        session = onnxruntime.InferenceSession(bundle / graph.path, providers=["CPUExecutionProvider"])
        outputs = [tensor.name for tensor in graph.outputs]
        given = session.run(outputs, {key: value.numpy() for key, value in inputs.items()})
        for output, array in zip(outputs, given, strict=True):
            reference = expected[output].numpy()
            assert array.shape == reference.shape
            assert np.abs(array - reference).max() / np.abs(reference).max() < TOLERANCE, (name, output)


# --- a graph that is wrong ------------------------------------------------------------------------------------------


def spoil(path: Path, factor: float) -> None:
    """Multiply the largest weight of a graph."""
    graph = onnx.load(path)
    tensor = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(graph, path)


@pytest.mark.parametrize(
    ("graph", "output", "factor"),
    [
        ("text_encoder", "last_hidden_state", 1.01),
        ("unet", "out_sample", 1.01),
        ("unet", "out_sample", np.nan),
        ("vae_encoder", "latent_parameters", 1.01),
    ],
)
def test_a_wrong_graph_is_not_sealed(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    output: str,
    factor: float,
) -> None:
    traced = chain.export_graph

    def export_wrong(module: GraphModule, spec: GraphSpec, example: tuple[Tensor, ...], folder: Path) -> Path:
        path = traced(module, spec, example, folder)
        if spec.name == graph:
            spoil(path, factor)
        return path

    monkeypatch.setattr(chain, "export_graph", export_wrong)
    message = rf"{graph} output '{output}' differs from PyTorch by \S+ of its largest value; 0\.0001 is allowed"
    with pytest.raises(ParityError, match=message):
        chain.export_bundle(open_checkpoint(tiny_checkpoint), tmp_path / "wrong" / "bundle")
    assert list(tmp_path.iterdir()) == []


OUTPUT = GraphSpec("unet/model.onnx", (), (TensorSpec("out_sample", "float32", ("batch", 4)),))


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        (np.ones((2, 4), np.float32), True),
        (np.full((2, 4), 1 + 0.9 * TOLERANCE, np.float32), True),
        (np.full((2, 4), 1 + 1.1 * TOLERANCE, np.float32), False),
        (np.ones((1, 4), np.float32), False),
        (np.full((2, 4), np.inf, np.float32), False),
        (np.full((2, 4), np.nan, np.float32), False),
    ],
)
def test_the_measure_of_parity(given: np.ndarray[Any, Any], passes: bool) -> None:
    parities = compare_outputs(OUTPUT, [(torch.ones(2, 4),)], [[given]])
    assert [parity.passed for parity in parities] == [passes]
    if not passes:
        with pytest.raises(ParityError, match="unet output 'out_sample'"):
            check_parity(parities)


@pytest.mark.parametrize(
    ("given", "snr_db"),
    [
        (np.full((2, 4), 1.1, np.float32), 20.0),
        (np.full((2, 4), 0.99, np.float32), 40.0),
        (np.ones((2, 4), np.float32), 200.0),
        (np.full((2, 4), np.inf, np.float32), -200.0),
        (np.ones((1, 4), np.float32), -200.0),
        (np.full((2, 4), np.nan, np.float32), np.nan),
    ],
)
def test_the_signal_to_noise_ratio(given: np.ndarray[Any, Any], snr_db: float) -> None:
    """The worst of two runs, wherever it is."""
    ones = np.ones((2, 4), np.float32)
    for results in ([[given], [ones]], [[ones], [given]]):
        (parity,) = compare_outputs(OUTPUT, [(torch.ones(2, 4),)] * 2, results)
        assert parity.snr_db == pytest.approx(snr_db, abs=1e-4, nan_ok=True)
        loud, silent = (replace(parity, tolerance=10.0, least_snr_db=least) for least in (19.0, 39.0))
        assert (loud.passed, silent.passed) == (snr_db >= 19, snr_db >= 39)
        if np.isfinite(given).all() and given.shape == ones.shape and not silent.passed:
            with pytest.raises(ParityError, match=r"has a signal-to-noise ratio of 20\.0 dB.*39\.0 dB is the least"):
                check_parity([silent])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_never_near(value: float) -> None:
    """Wherever it is, and if both have it."""
    ones, other = np.ones((2, 4), np.float32), np.full((2, 4), value, np.float32)
    for expected, results in (([ones, ones], [ones, other]), ([ones, ones], [other, ones]), ([other], [other])):
        assert not largest_error(expected, results) <= 1e9
        assert not worst_error([expected], [results]) <= 1e9
    references = [(torch.from_numpy(other),)]
    assert not compare_outputs(OUTPUT, references, [[other]])[0].passed
    assert not largest_error([ones], [ones[:1]]) <= 1e9


def test_the_same_bytes_in_any_number_of_threads(tiny_checkpoint: Path, traced_once: None, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    manifests = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            bundle = chain.export_bundle(open_checkpoint(tiny_checkpoint), tmp_path / str(count))
            assert torch.get_num_threads() == count
            manifests.append((bundle.path / "manifest.json").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert manifests[0] == manifests[1] == manifests[2]


def test_a_network_of_zeros_equals_a_graph_of_zeros() -> None:
    (parity,) = compare_outputs(OUTPUT, [(torch.zeros(2, 4),)], [[np.zeros((2, 4), np.float32)]])
    assert parity.passed


def test_a_network_that_cannot_be_traced(tmp_path: Path) -> None:
    graph = GraphSpec("unet/model.onnx", (TensorSpec("sample", "float32", ("batch", 4)),), OUTPUT.outputs)
    module = GraphModule(torch.nn.Identity(), lambda network, x: (x if x.sum() > 0 else -x,))
    with pytest.raises(ExportError, match="unet could not be exported: ") as raised:
        onnx_export.export_graph(module, graph, (torch.ones(2, 4),), tmp_path)
    assert "\n" not in str(raised.value)


# --- large weights --------------------------------------------------------------------------------------------------


def test_large_weights_lie_in_one_external_file(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, inline = model("unconditional")
    anew = {"unet": onnx_export.export_graph}
    cached = chain.export_graph
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_ABOVE_BYTES", 10_000)
    monkeypatch.setattr(
        chain, "export_graph", lambda module, graph, *rest: anew.get(graph.name, cached)(module, graph, *rest)
    )
    bundle = chain.export_bundle(open_checkpoint(checkpoint), tmp_path / "bundle").path
    files = {path.name for path in (bundle / "unet").iterdir()}
    assert files == {"config.json", "model.onnx", "model.onnx_data"}
    path = bundle / "unet" / "model.onnx"
    weights = onnx.load(path, load_external_data=False).graph.initializer
    locations = {entry.value for tensor in weights for entry in tensor.external_data if entry.key == "location"}
    assert locations == {"model.onnx_data"}
    assert path.stat().st_size + 10_000 < (inline / "unet" / "model.onnx").stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    drawn = [Pipeline.open(folder, verify=True).generate(seed=[3], steps=10).images for folder in (bundle, inline)]
    np.testing.assert_array_equal(*drawn)


# --- all or nothing -------------------------------------------------------------------------------------------------


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def fill_the_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["export_graph", "compare_graph", "_write_json"])
@pytest.mark.parametrize(
    ("happens", "error", "message"),
    [(interrupt, KeyboardInterrupt, None), (fill_the_disk, ExportError, "The disk is full: .*are needed. Make room")],
    ids=["Ctrl-C", "full disk"],
)
def test_an_export_that_ends_early_leaves_nothing(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    happens: Callable[..., None],
    error: type[BaseException],
    message: str | None,
) -> None:
    monkeypatch.setattr(chain, place, happens)
    with pytest.raises(error, match=message):
        chain.export_bundle(open_checkpoint(tiny_checkpoint), tmp_path / "new" / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_by_force(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "vae_encoder" / "config.json").unlink()
    with pytest.raises(BundleError, match="exists; use --force"):
        chain.export_bundle(checkpoint, bundle)
    stages: list[str] = []
    chain.export_bundle(checkpoint, bundle, force=True, progress=stages.append)
    assert files_of(bundle) == files_of(tiny_bundle)
    assert [stage for stage in stages if stage.startswith("unet")] == [
        "unet: running in PyTorch",
        "unet: exporting",
        "unet: comparing with PyTorch",
    ]


# --- checkpoints that cannot become bundles -------------------------------------------------------------------------


def break_scheduler(checkpoint: Path) -> None:
    (checkpoint / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "flow"}')


def lose_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer" / "merges.txt").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_scheduler, CheckpointError, "prediction_type"),
        (lose_tokenizer, CheckpointError, "neither tokenizer.json nor"),
    ],
)
def test_a_broken_checkpoint_is_refused_before_anything_is_traced(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    error: type[LdmExportError],
    message: str,
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))
    damage(checkpoint)
    monkeypatch.setattr(chain, "export_graph", interrupt)
    with pytest.raises(error, match=message):
        chain.export_bundle(open_checkpoint(checkpoint), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_tokenizer_in_one_file_is_written_out(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))
    transformers.CLIPTokenizerFast.from_pretrained(checkpoint / "tokenizer").save_pretrained(checkpoint / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (checkpoint / "tokenizer" / name).unlink(missing_ok=True)
    bundle = chain.export_bundle(open_checkpoint(checkpoint), tmp_path / "bundle").path
    ours, theirs = (json.loads((folder / "tokenizer" / "vocab.json").read_text()) for folder in (bundle, tiny_bundle))
    assert ours == theirs
    pipelines = [Pipeline.open(folder) for folder in (bundle, tiny_bundle)]
    drawn = [pipeline.generate("two green triangles", steps=10).latents for pipeline in pipelines]
    np.testing.assert_array_equal(*drawn)


def test_a_large_graph_is_compared_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    monkeypatch.setattr(parity, "LARGE_BYTES", 0)
    bundle, checkpoint = Bundle.open(tiny_bundle), open_checkpoint(tiny_checkpoint)
    graph = bundle.manifest.graphs["text_encoder"]
    own = family_of(checkpoint).graphs[0]
    runs = parity.reference_runs(own.load(), own, 2)
    records = parity.compare_graph(bundle.file(graph.path), graph, runs)
    assert [record.output for record in records] == ["last_hidden_state", "pooler_output"]
    assert all(record.passed for record in records)
    wrong = [(inputs, tuple(output + 1 for output in outputs)) for inputs, outputs in runs]
    assert not any(record.passed for record in parity.compare_graph(bundle.file(graph.path), graph, wrong))
