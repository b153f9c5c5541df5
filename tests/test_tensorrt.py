"""TensorRT-RTX engines, built without a GPU: the parser is the judge of every graph; nothing here runs an engine."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ldm_export.bundle import Bundle
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.contract import GraphSpec, TensorSpec, step_spec
from ldm_export.engines import EngineTarget, ShapeRange, read_engine_target
from ldm_export.errors import BackendError, BundleError, ExportError, InputError, ParityError
from ldm_export.export.chain import export_bundle
from ldm_export.export.tensorrt import build, process, sources
from ldm_export.export.tensorrt.build import Settings, build_engines
from ldm_export.export.tensorrt.library import library_of
from ldm_export.export.tensorrt.process import in_a_process, last_words
from ldm_export.export.tensorrt.profiles import Range, profile_of
from ldm_export.graph.base import GraphChange
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from tests.bundle_fixture import KINDS

library = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

RTX = "tensorrt_rtx"
SMALL = ("text_encoder",)
"""What builds in a second."""
KIND = "rtx-sm89"
KINDS_OF_EMOJI64 = ("rtx-sm86-sm89-sm120", "rtx-sm86-sm89-sm120-fp16")


def settings(*models: str, **options: Any) -> Settings:
    return Settings(RTX, models or ("89",), **options)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with all its engines and a loop's, in fp32, for two GPUs. Read-only."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    build_engines(Bundle.open(folder), settings("89", "86"), loops=["ddim-10"])
    return folder


@pytest.fixture
def small(built_small: Path, tmp_path: Path) -> Path:
    """A copy with one small engine, that a test may change."""
    return Path(shutil.copytree(built_small, tmp_path / "small"))


@pytest.fixture(scope="module")
def built_small(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("small") / "bundle"))
    build_engines(Bundle.open(folder), settings(), SMALL)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def engines_of(bundle: Path, kind: str = KIND) -> EngineTarget:
    target = read_engine_target(Bundle.open(bundle, verify=True), kind, version=library.__version__)
    assert isinstance(target, EngineTarget), target
    return target


def precisions_of(layers: dict[str, dict[str, int]]) -> set[str]:
    return {precision for counts in layers.values() for precision in counts} - {"none"}


def child(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process in the place of the one that builds."""
    monkeypatch.setattr(process, "CHILD", (sys.executable, "-c", code))


# --- what is built --------------------------------------------------------------------------------------------------


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
        match=r"^text_encoder in fp16 differs from the plain graph by 0\.\d+ .*; 0\.02 is allowed\. Nothing",
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


@pytest.mark.parametrize("kind", ["unconditional", "class-conditional", "inpainting", "lcm", "sd2", "sdxl"])
def test_models_of_other_kinds(kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str) -> None:
    assert kind in KINDS
    copy = Path(shutil.copytree(kinds(kind)[1], tmp_path / "bundle"))
    build_engines(Bundle.open(copy), settings(), ["unet"])
    names = {tensor.name for tensor in engines_of(copy).engines["unet"].inputs}
    expected = {"lcm": {"timestep_cond"}, "sdxl": {"text_embeds", "time_ids"}, "class-conditional": {"class_labels"}}
    assert expected.get(kind, set()) <= names
    rows = engines_of(copy).engines["unet"].profile["sample"]
    guided = kind in ("sd2", "sdxl", "inpainting") and "encoder_hidden_states" in names
    assert (rows.min[0], rows.max[0]) == (1, 8 if guided else 4)


# --- what is there is not built again -------------------------------------------------------------------------------


def test_what_holds_is_not_built_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(small)
    child("raise SystemExit(3)", monkeypatch)
    started = time.perf_counter()
    made = build_engines(Bundle.open(small), settings(), SMALL)
    assert (made.built, made.because) == ((), "")
    assert time.perf_counter() - started < 1
    assert contents(small) == before
    with pytest.raises(ExportError, match="exit code 3"):
        build_engines(Bundle.open(small), settings(), SMALL, force=True)
    assert contents(small) == before


def another_release(bundle: Path) -> None:
    file = bundle / "targets" / KIND / "target.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": "1.2.0.1"}))


def another_graph(bundle: Path) -> None:
    file = bundle / "targets" / KIND / "target.json"
    document = json.loads(file.read_text())
    document["engines"]["text_encoder"]["made_from"]["text_encoder/model.onnx"] = "0" * 64
    file.write_text(json.dumps(document))


def damaged(bundle: Path) -> None:
    file = bundle / "targets" / KIND / "text_encoder.plan"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut_short(bundle: Path) -> None:
    (bundle / "targets" / KIND / "text_encoder.plan").write_bytes(b"an engine")


def lost(bundle: Path) -> None:
    (bundle / "targets" / KIND / "text_encoder.plan").unlink()


def unproved(bundle: Path) -> None:
    file = bundle / "targets" / KIND / "target.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"report": {}}))


STALE: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "another release": (another_release, {}, f"it was made with {RTX} 1.2.0.1, and this is {library.__version__}"),
    "another graph": (another_graph, {}, "its text_encoder was made from other graphs"),
    "a damaged engine": (damaged, {}, "its text_encoder.plan has been altered"),
    "other shapes": (lambda bundle: None, {"batch": Range(1, 2, 2)}, "its text_encoder was made for other shapes"),
    "an engine cut short": (cut_short, {}, "its text_encoder.plan has 9 bytes, and"),
    "no engine": (lost, {}, "its text_encoder.plan is missing"),
    "no record": (unproved, {}, "it does not say what its text_encoder was compared with"),
    "another switch": (lambda bundle: None, {"sparse": True}, "it was made with other switches"),
}


@pytest.mark.parametrize("case", STALE)
def test_what_does_not_hold_is_built_again(small: Path, case: str) -> None:
    damage, options, reason = STALE[case]
    damage(small)
    made = build_engines(Bundle.open(small), settings(**options), SMALL)
    assert made.built == SMALL
    assert made.because.startswith(reason)
    assert made.target == engines_of(small)
    assert build_engines(Bundle.open(small), settings(**options), SMALL).built == ()
    assert [path.name for path in (small / "targets").iterdir()] == [KIND]


@pytest.mark.parametrize("case", ["a damaged engine", "another graph"])
def test_of_several_engines_only_the_damaged_one_is_built_again(small: Path, case: str) -> None:
    build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    kept = small / "targets" / KIND / "vae_encoder.plan"
    file, both = kept.stat().st_ino, (*SMALL, "vae_encoder")
    damage, _, reason = STALE[case]
    damage(small)
    made = build_engines(Bundle.open(small), settings(), both)
    assert made.built == SMALL
    assert made.because.startswith(reason)
    assert kept.stat().st_ino == file
    assert set(engines_of(small).engines) == set(both)


def test_a_file_that_is_not_listed_goes(small: Path) -> None:
    before = contents(small)
    (small / "targets" / KIND / "more.plan").write_bytes(b"an engine")
    made = build_engines(Bundle.open(small), settings(), SMALL)
    assert (made.built, made.because) == ((), "its more.plan is not listed")
    assert contents(small) == before


def test_a_disk_without_links(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: Path, other: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    assert set(engines_of(small).engines) == {*SMALL, "vae_encoder"}


def test_engines_add_up_and_each_is_kept(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that ends early keeps the engines that were done, and leaves nothing that does not open."""
    run = build.in_a_process

    def stopped(told: Any, what: str) -> Any:
        if "vae_encoder" in what:
            raise KeyboardInterrupt
        return run(told, what)

    monkeypatch.setattr(build, "in_a_process", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_engines(Bundle.open(small), settings(), ["vae_decoder", "vae_encoder"])
    assert set(engines_of(small).engines) == {"text_encoder", "vae_decoder"}
    assert [path.name for path in (small / "targets").iterdir()] == [KIND]


def test_an_engine_of_an_old_loop_is_dropped(small: Path) -> None:
    """Of engines that were not asked for, those that no longer hold go, so that the others can be used."""
    build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    file = small / "targets" / KIND / "target.json"
    document = json.loads(file.read_text())
    document["engines"]["vae_encoder"]["made_from"]["vae_encoder/model.onnx"] = "0" * 64
    file.write_text(json.dumps(document))
    made = build_engines(Bundle.open(small), settings(), SMALL)
    assert (made.built, made.because) == ((), "its vae_encoder was made from other graphs")
    assert set(engines_of(small).engines) == {"text_encoder"}


# --- what cannot be built -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("90",), r"^--sm 90 is no GPU that TensorRT-RTX \S+ builds for; it has .*, 89, .* H100 needs the data-centre"),
        (("100",), r"B200 needs the data-centre flavour: --target tensorrt on that machine\.$"),
        (("89", "banana"), r"^--sm banana is no GPU that"),
        ((), r"^--target rtx needs --sm, the GPUs to build for: 75, "),
    ],
)
def test_gpus_that_the_flavour_lacks(bundle: Path, models: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_engines(Bundle.open(bundle), Settings(RTX, models))
    assert not (bundle / "targets").exists()


def test_the_data_centre_flavour_takes_its_library(bundle: Path) -> None:
    if "tensorrt" in sys.modules or shutil.which("nvidia-smi"):
        pytest.skip("TensorRT may be installed here")
    with pytest.raises(BackendError, match=r"^tensorrt is not installed, .* pip install 'ldm_export\[export,gpu\]'$"):
        build_engines(Bundle.open(bundle), Settings("tensorrt"))


def test_the_data_centre_flavour_takes_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "library_of", lambda flavour: library)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError, match=r"^--target tensorrt builds for the GPU of this machine, and PyTorch finds"):
        build_engines(Bundle.open(bundle), Settings("tensorrt"))
    with pytest.raises(InputError, match="leave --sm out"):
        build_engines(Bundle.open(bundle), Settings("tensorrt", ("90",)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    child("raise SystemExit(3)", monkeypatch)
    with pytest.raises(ExportError, match="exit code 3"):
        build_engines(Bundle.open(bundle), Settings("tensorrt", precision="fp16"))


def test_a_flavour_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, RTX, None)
    with pytest.raises(BackendError, match=r"^tensorrt_rtx is not installed, .* 'ldm_export\[export,rtx\]'$"):
        library_of(RTX)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:1:4", "does not rise"),
        ("4:2:1", "is no range"),
        ("1:8:4", "does not rise"),
        ("0", "is no range"),
        ("0:1:2", "is no range"),
        ("1:2", "is no range"),
        ("-1:1:2", "is no range"),
        ("", "is no range"),
        ("1:x:2", "is no range"),
    ],
)
def test_ranges_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Range.parse("batch", text)


def test_ranges() -> None:
    assert Range.parse("batch", "3") == Range(3, 3, 3)
    assert Range.parse("size", "64:64:128") == Range(64, 64, 128)


def test_pictures_that_the_model_cannot_draw(bundle: Path) -> None:
    with pytest.raises(
        InputError, match=r"^size 17 cannot be drawn by this model; sizes are multiples of 2 .* Use 16\.$"
    ):
        build_engines(Bundle.open(bundle), settings(pixels=Range(16, 17, 32)))
    assert not (bundle / "targets").exists()


def test_profiles_follow_the_contract(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    graphs = manifest.graphs
    of = {name: profile_of(graphs[name], graphs, manifest.model, Range(1, 2, 3), Range(16, 16, 32)) for name in graphs}
    assert of["unet"] == {
        "sample": ShapeRange((1, 4, 8, 8), (4, 4, 8, 8), (6, 4, 16, 16)),
        "encoder_hidden_states": ShapeRange((1, 16, 32), (4, 16, 32), (6, 16, 32)),
    }
    step = profile_of(step_spec(graphs["unet"]), graphs, manifest.model, Range(1, 2, 3), Range(16, 16, 32))
    assert (step["latents"].max, step["out_sample"].max) == ((3, 4, 16, 16), (6, 4, 16, 16))
    assert step["remembered"] == ShapeRange((4, 1, 4, 8, 8), (4, 2, 4, 8, 8), (4, 3, 4, 16, 16))
    assert of["text_encoder"] == {"input_ids": ShapeRange((1, 16), (4, 16), (6, 16))}
    assert of["vae_decoder"] == {"latent_sample": ShapeRange((1, 4, 8, 8), (2, 4, 8, 8), (3, 4, 16, 16))}
    assert of["vae_encoder"] == {"sample": ShapeRange((1, 3, 16, 16), (2, 3, 16, 16), (3, 3, 32, 32))}
    folded = profile_of(
        graphs["unet"], graphs, {**manifest.model, "guidance_folded": True}, Range(1, 2, 3), Range(16, 16, 16)
    )
    assert folded["sample"].max == (3, 4, 8, 8)


@pytest.mark.parametrize(
    ("name", "message"), [("unett", "has no graph 'unett'; it has"), ("loops/x", "has no plan 'x'; it has")]
)
def test_graphs_that_there_are_not(bundle: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_engines(Bundle.open(bundle), settings(), [name])


def test_a_loop_of_no_plan(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"has no plan 'ddim-7'; it has ddim-10, .* ldm-export plan\.$"):
        build_engines(Bundle.open(bundle), settings(), SMALL, ["ddim-7"])


def test_a_loop_of_another_plan_than_it_says(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened = opened.add_file("plans/ddim-10.json", opened.file("plans/plms-10.json").read_bytes())
    with pytest.raises(BundleError, match=r"^plans/ddim-10\.json of \S+ is of the plan plms-10\. Export"):
        build_engines(opened, settings(), SMALL, ["ddim-10"])
    assert not (bundle / "targets").exists()


def test_an_operator_that_the_parser_lacks_is_refused_before_anything_is_built(bundle: Path) -> None:
    file = bundle / "text_encoder" / "model.onnx"
    model = QuantizeDynamic(smallest=1).apply(onnx.load(file), []).model
    file.write_bytes(model.SerializeToString())
    refused = next(node for node in model.graph.node if node.op_type == "DynamicQuantizeLinear")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["text_encoder/model.onnx"]["size_bytes"] = file.stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    stages: list[str] = []
    with pytest.raises(ExportError, match=rf"cannot read text_encoder: node {refused.name} \(Dyn\w+\): no such"):
        build_engines(Bundle.open(bundle), settings(), progress=stages.append)
    assert stages == ["parsing"]
    assert not list((bundle / "targets").iterdir())


def test_a_network_that_is_not_as_the_bundle_says(bundle: Path) -> None:
    """The parser, not the bundle, says what the network takes."""
    spec = Bundle.open(bundle).manifest.graphs["text_encoder"]
    graphs = {"text_encoder": {"onnx": str(bundle / spec.path)}}
    found = in_a_process({"flavour": RTX, "graphs": graphs}, "The parser")["text_encoder"]
    build._check_network("text_encoder", spec, found, RTX)
    other = GraphSpec(spec.path, (TensorSpec("input_ids", "int32", spec.inputs[0].shape),), spec.outputs)
    with pytest.raises(ExportError, match=r"reads text_encoder with the inputs \{'input_ids': \('int64'"):
        build._check_network("text_encoder", other, found, RTX)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"^The parser was killed, most likely for want of"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            r"^The parser crashed \(SIGSEGV\)\. Nothing was kept",
        ),
        ("import sys; sys.exit('a last word')", r"^The parser ended with exit code 1, saying: a last word\. Nothing"),
    ],
)
def test_a_process_that_dies_takes_nothing_down(
    small: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    before = contents(small)
    child(f"import sys; sys.stdin.read(); {code}", monkeypatch)
    with pytest.raises(ExportError, match=message):
        build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    assert contents(small) == before
    assert [path.name for path in (small / "targets").iterdir()] == [KIND]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"failed": True}, "[E] IBuilder::buildSerializedNetwork: Error Code 1: Myelin (Unexpected std::bad_alloc)"),
        ({"refused": [{"node": "number -1", "operator": "", "reason": "std::bad_alloc"}]}, "[E] std::bad_alloc"),
        (None, "MemoryError"),
    ],
    ids=["building", "parsing", "python"],
)
def test_out_of_memory(small: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any] | None, words: str) -> None:
    """What the process that builds said where its memory was limited (``RLIMIT_AS``), at several limits."""
    before = contents(small)
    child(
        f"import json, sys; sys.stdin.read(); print({words!r}, file=sys.stderr); found = {found!r}\n"
        "print(json.dumps({'vae_encoder': found})); sys.exit(found is None)",
        monkeypatch,
    )
    said = re.escape(words.removeprefix("[E] "))
    with pytest.raises(
        ExportError, match=rf"^The parser ran out of memory, saying: {said}\. Nothing was kept\. .*--batch"
    ):
        build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    assert contents(small) == before


def test_a_full_disk(tiny_bundle: Path) -> None:
    """/dev/full takes nothing: the engine's own file fails in the process that builds it."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    graphs = Bundle.open(tiny_bundle).manifest.graphs
    profile = {"input_ids": {key: [1, 16] for key in ("min", "opt", "max")}}
    graph = {"onnx": str(tiny_bundle / graphs["text_encoder"].path), "plan": "/dev/full", "profile": profile}
    switches = {"compute_capabilities": ["8.9"], "refittable": False, "stripped": False, "sparse": False}
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        in_a_process({"flavour": RTX, **switches, "graphs": {"text_encoder": graph}}, "The build")


def test_a_full_disk_is_said_and_leaves_what_was_there(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(small)

    def full(told: Any, what: str) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "in_a_process", full)
    with pytest.raises(ExportError, match=r"^The disk is full: .*rtx-sm89 could not be written; .* Make room\.$"):
        build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    assert contents(small) == before


@pytest.mark.parametrize("option", ["refittable", "stripped"])
def test_engines_to_be_refitted_are_for_one_gpu(option: str) -> None:
    with pytest.raises(InputError, match=r"for one GPU; 86, 89 were given\. Build for each\.$"):
        settings("86", "89", **{option: True})


@pytest.mark.parametrize("option", ["refittable", "stripped"])
def test_engines_to_be_refitted_need_a_gpu(bundle: Path, option: str) -> None:
    """TensorRT-RTX itself says so: that the switch is set shows in that it no longer builds here."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(
        ExportError, match=r"CUDA_SUCCESS.* built where there is a GPU; else leave --refit and --strip out"
    ):
        build_engines(Bundle.open(bundle), settings(**{option: True}), SMALL)


def test_what_a_gpu_cannot_compute_is_said(bundle: Path) -> None:
    """In TensorRT's own words: Turing has no fp32 products; in fp16 the same engine is built."""
    with pytest.raises(ExportError, match=r"for Turing \(SM75\): FP32 GEMM is not supported\. Nothing was kept\.$"):
        build_engines(Bundle.open(bundle), settings("75"), SMALL)
    assert build_engines(Bundle.open(bundle), settings("75", precision="fp16"), SMALL).built == SMALL


def test_last_words() -> None:
    said = "\x1b[38;5;9m[E] IBuilder: Error Code 1: no such thing. In compile at /_src/x.cpp:2\x1b[0m\n"
    assert last_words(said + "[!] Invalid Engine. Please check") == "IBuilder: Error Code 1: no such thing"
    assert last_words("") == ""


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


def test_emoji64(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model, as continuous integration builds it: for three GPUs, in two precisions, each once."""
    bundle = export_bundle(LatentDiffusion.open("emoji64"), tmp_path / "emoji64")
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
