"""The target ``ort-cpu``: built, drawing the same pictures, and passed over with a reason where it does not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.cpu_level import cpu_level
from ldm_export.contract import GraphSpec, TensorSpec
from ldm_export.errors import ExportError
from ldm_export.export import ort_cpu
from ldm_export.export.graphs import change_graphs, copy_bundle
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.graph.base import GraphPass
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import open_backend
from ldm_export.runtime.backends.hoisted import HoistedGraph
from tests.graph.test_whole_graphs import draw
from tests.scheduler_configs import relative_error

PROMPTS = ["a red circle", "two green triangles on white"]
CLOSE = 1e-5
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny bundle with its target. Read-only."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    build_ort_cpu(Bundle.open(bundle))
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def fast(built: Path) -> Pipeline:
    return Pipeline.open(built, backend="cpu")


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


def changed(bundle: Path, change: Change) -> None:
    """Write another ``target.json``."""
    file = bundle / "targets" / "ort-cpu" / "target.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- the same pictures ----------------------------------------------------------------------------------------------


def test_the_backend_says_which_graphs_run(fast: Pipeline, plain: Pipeline) -> None:
    assert fast.backend == f"onnxruntime {onnxruntime.__version__} cpu ort-cpu"
    assert plain.backend == f"onnxruntime {onnxruntime.__version__} cpu"


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (PROMPTS, {"sampler": "ddim", "steps": 10, "guidance": 4.0, "negative_prompt": ["blue", "red"]}),
        (PROMPTS[1:], {"sampler": "ddim", "steps": 10, "guidance": 4.0, "negative_prompt": ["blue"]}),
        (PROMPTS, {"sampler": "dpmpp-2m", "steps": 10, "guidance": 1.0}),
        (PROMPTS[:1], {"sampler": "euler", "steps": 10, "height": 24, "width": 40}),
        ([*PROMPTS, "blue"], {"sampler": "heun", "steps": 10, "height": 18, "width": 14, "seed": [5, 3, 9]}),
    ],
)
def test_the_same_pictures(fast: Pipeline, plain: Pipeline, prompts: list[str], options: dict[str, Any]) -> None:
    """One pipeline draws one after another, so that nothing of a prompt or a plan before may be left."""
    result, expected = fast.generate(prompts, **options), plain.generate(prompts, **options)
    assert relative_error(result.latents, expected.latents) < CLOSE
    assert np.abs(result.images.astype(int) - expected.images).max() <= 1


def test_two_loops_interleave(fast: Pipeline, plain: Pipeline) -> None:
    expected = [plain.generate(prompt, steps=10).latents for prompt in PROMPTS]
    *_, pair = zip(*(fast.steps(prompt, steps=10) for prompt in PROMPTS), strict=True)
    for step, latents in zip(pair, expected, strict=True):
        assert relative_error(step.latents, latents) < CLOSE


@pytest.mark.parametrize(
    ("kind", "options"),
    [("unconditional", {"seed": [1, 2]}), ("class-conditional", {"seed": [1, 2], "class_labels": [4, 0]})],
)
def test_models_without_text(
    kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    copy = Path(shutil.copytree(kinds(kind)[1], tmp_path / "bundle"))
    expected = Pipeline.open(copy, backend="cpu").generate(steps=10, **options)
    build_ort_cpu(Bundle.open(copy))
    result = Pipeline.open(copy, backend="cpu").generate(steps=10, **options)
    assert result.backend.endswith(" ort-cpu")
    assert relative_error(result.latents, expected.latents) < CLOSE


# --- building -------------------------------------------------------------------------------------------------------


def test_a_target_is_beside_the_bundle(built: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    own = {name: data for name, data in contents(built).items() if not name.startswith("targets/")}
    assert own == contents(tiny_bundle)
    opened = Bundle.open(built, verify=True)
    copy = copy_bundle(opened, tmp_path / "copy", passes=[], force=False)
    assert not (copy.path / "targets").exists()
    graphs = json.loads((built / "targets" / "ort-cpu" / "target.json").read_text())["graphs"]
    assert {name: sorted(graph["hoisted"]) for name, graph in graphs.items()} == {
        "text_encoder": [],
        "unet": ["encoder_hidden_states", "timestep"],
        "vae_decoder": [],
        "vae_encoder": [],
    }


def test_a_deleted_target_leaves_the_plain_graphs(bundle: Path, plain: Pipeline) -> None:
    shutil.rmtree(bundle / "targets")
    pipeline = Pipeline.open(bundle, backend="cpu")
    assert pipeline.backend == plain.backend
    np.testing.assert_array_equal(
        pipeline.generate(PROMPTS, steps=10).latents, plain.generate(PROMPTS, steps=10).latents
    )


def test_a_build_takes_the_place_of_one_that_is_there(bundle: Path) -> None:
    folder = bundle / "targets" / "ort-cpu"
    changed(bundle, lambda document: document.update(format_version=99))
    (folder / "stray").write_text("")
    build_ort_cpu(Bundle.open(bundle))
    assert not (folder / "stray").exists()
    assert Pipeline.open(bundle, backend="cpu").backend.endswith(" ort-cpu")
    assert [path.name for path in folder.parent.iterdir()] == ["ort-cpu"]


KILLED = """
import os, signal, sys
from ldm_export.bundle import Bundle
from ldm_export.export.ort_cpu import build_ort_cpu
build_ort_cpu(Bundle.open(sys.argv[1]), lambda stage: stage.endswith("unet") and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_a_killed_build_left_is_ignored_and_then_cleared(bundle: Path, fast: Pipeline) -> None:
    targets = bundle / "targets"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(bundle)], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = targets.glob(".ort-cpu.partial-*")
    assert (left / "text_encoder.onnx").is_file()
    assert Pipeline.open(bundle, backend="cpu", verify=True).backend == fast.backend
    pid, tail = left.name.split("partial-")[1].split("-")
    going = targets / f".ort-cpu.partial-{os.getpid()}-{tail}"
    replaced = targets / f".ort-cpu.old-{pid}-{tail}"
    other = targets / f".openvino.partial-{pid}-{tail}"
    for folder in (going, replaced, other):
        folder.mkdir()
    build_ort_cpu(Bundle.open(bundle))
    assert sorted(targets.iterdir()) == sorted([targets / "ort-cpu", going, other])


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")], ids=["interrupted", "failed"])
def test_a_build_that_ends_early_leaves_what_was_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, there: bool
) -> None:
    if not there:
        shutil.rmtree(bundle / "targets")
    before = contents(bundle)

    def progress(stage: str) -> None:
        if stage.endswith("vae_decoder"):
            raise error

    with pytest.raises(type(error)):
        build_ort_cpu(Bundle.open(bundle), progress)
    assert contents(bundle) == before


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_graph_that_differs_too_much_is_not_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    before = contents(bundle)
    monkeypatch.setattr(ort_cpu, "_compared", lambda *_: (error, 200.0))
    with pytest.raises(ExportError, match=r"^ort-cpu: \w+ differs from the plain graph by .* Nothing was kept\.$"):
        build_ort_cpu(Bundle.open(bundle))
    assert contents(bundle) == before


def test_a_graph_that_does_not_run_is_not_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bundle)

    def refuse(*_: object) -> None:
        raise ValueError("shapes differ")

    monkeypatch.setattr(ort_cpu, "run_parts", refuse)
    with pytest.raises(
        ExportError, match=r"^ort-cpu: the rewritten \w+ does not run \(shapes differ\)\. Nothing was kept\.$"
    ):
        build_ort_cpu(Bundle.open(bundle))
    assert contents(bundle) == before


@pytest.mark.parametrize("factor", [1.001, np.nan])
def test_another_number_in_any_output_is_seen(built: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A deliberately wrong result must fail."""
    opened = Bundle.open(built)
    spec = opened.manifest.graphs["unet"]
    target = json.loads((built / "targets" / "ort-cpu" / "target.json").read_text())["graphs"]["unet"]
    graph = ort_cpu.TargetGraph(target["path"], target["hoisted"])
    folder = built / "targets" / "ort-cpu"
    assert ort_cpu._compared(opened.file(spec.path), spec, graph, folder, opened)[0] < CLOSE
    run_parts = ort_cpu.run_parts
    monkeypatch.setattr(ort_cpu, "run_parts", lambda *args: [array * factor for array in run_parts(*args)])
    error, snr = ort_cpu._compared(opened.file(spec.path), spec, graph, folder, opened)
    assert not error < 1e-4
    assert not snr > 80


def quantized(bundle: Path, checkpoint: Path, folder: Path, step: GraphPass) -> Bundle:
    opened = Bundle.open(bundle)
    calls = {"unet": [draw(opened.manifest.graphs["unet"], seed) for seed in range(2)]}
    return change_graphs(opened, folder, step, calls, PROMPTS, open_checkpoint(checkpoint))[0]


def test_of_rounded_weights_the_target_is_as_near_as_of_plain_ones(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Whatever the graph with such weights may be off by from PyTorch."""
    step = QuantizeWeights(smallest=500, graphs=("unet",))
    report = build_ort_cpu(quantized(tiny_bundle, tiny_checkpoint, tmp_path / "small", step)).report["graphs"]["unet"]
    assert report["error"] < CLOSE
    assert report["allowed"] == 1e-4


def test_where_values_are_rounded_as_it_runs_noise_is_bounded(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = quantized(tiny_bundle, tiny_checkpoint, tmp_path / "half", Half(graphs=("unet",)))
    report = build_ort_cpu(small).report["graphs"]["unet"]
    assert report["snr_db"] > report["least_snr_db"] == 40.0
    monkeypatch.setattr(ort_cpu, "_compared", lambda *_: (1e-6, 39.0))
    with pytest.raises(ExportError, match=r"^ort-cpu: unet has a signal-to-noise ratio of 39\.0 dB, .* 40\.0 dB"):
        build_ort_cpu(small)


# --- targets that do not fit ----------------------------------------------------------------------------------------


def outside(bundle: Path) -> None:
    """Let a graph read weights from elsewhere, and say that its size is right."""
    file = bundle / "targets" / "ort-cpu" / "unet.onnx"
    model = onnx.load(file, load_external_data=False)
    moved = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in moved.external_data if entry.key == "location").value = "../../unet/model.onnx"
    file.write_bytes(model.SerializeToString())
    changed(bundle, lambda document: document["files"]["unet.onnx"].update(size_bytes=file.stat().st_size))


def unlisted(bundle: Path) -> None:
    (bundle / "targets" / "ort-cpu" / "unet.onnx_data").unlink()
    changed(bundle, lambda document: document["files"].pop("unet.onnx_data"))


def same_size(bundle: Path) -> None:
    file = bundle / "targets" / "ort-cpu" / "unet.onnx"
    file.write_bytes(b"\xff" * file.stat().st_size)


def cut(bundle: Path) -> None:
    file = bundle / "targets" / "ort-cpu" / "unet.onnx_data"
    file.write_bytes(file.read_bytes()[:-1])


def updated(**change: Any) -> Callable[[Path], None]:
    return lambda bundle: changed(bundle, lambda document: document.update(change))


def unknown(bundle: Path) -> None:
    """An operator that ONNX Runtime does not have, in a file of the same size."""
    file = bundle / "targets" / "ort-cpu" / "unet.onnx"
    file.write_bytes(file.read_bytes().replace(b"MultiHeadAttention", b"MultiHeadAttentiom"))


def said(bundle: Path) -> Path:
    return bundle / "targets" / "ort-cpu" / "target.json"


def listed(name: str, **change: Any) -> Callable[[Path], None]:
    return lambda bundle: changed(bundle, lambda document: document["files"][name].update(change))


def of_unet(**change: Any) -> Callable[[Path], None]:
    return lambda bundle: changed(bundle, lambda document: document["graphs"]["unet"].update(change))


def linked(path: Path) -> None:
    """The same bytes, behind a link out of the bundle."""
    moved = path.rename(path.parents[len(path.parts) - 1 - path.parts.index("bundle")] / f"moved-{path.name}")
    path.symlink_to(moved)


NEEDS = {"onnxruntime": onnxruntime.__version__, "cpu": cpu_level()}
DEEP = "its target.json cannot be read (graphs['unet'] has deep_channels "
DOES_NOT_FIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "another ONNX Runtime": (
        updated(needs=NEEDS | {"onnxruntime": "0.1"}),
        f"it was made for onnxruntime 0.1, and this is {onnxruntime.__version__}",
    ),
    "another processor": (updated(needs=NEEDS | {"cpu": "z80"}), f"it was made for cpu z80, and this is {cpu_level()}"),
    "other graphs": (updated(source_hashes={"unet/model.onnx": "0" * 64}), "it was made from other graphs"),
    "no needs": (updated(needs={}), "it says what it needs of nothing, and must of onnxruntime, cpu"),
    "no processor": (
        updated(needs={"onnxruntime": onnxruntime.__version__}),
        "it says what it needs of onnxruntime, and must of onnxruntime, cpu",
    ),
    "more needs": (updated(needs=NEEDS | {"gpu": "x"}), "it says what it needs of onnxruntime, cpu, gpu, and must of "),
    "needs that are no text": (
        updated(needs=NEEDS | {"cpu": 1}),
        "its target.json cannot be read (needs.cpu is of type",
    ),
    "another kind": (updated(kind="openvino"), "its target.json cannot be read (it is of the kind 'openvino')"),
    "a version of another type": (updated(format_version=1.0), "its target.json cannot be read (format_version is of"),
    "NaN": (updated(report={"seconds": float("nan")}), "its target.json cannot be read (not JSON: NaN is no number)"),
    "a key twice": (
        lambda bundle: said(bundle).write_text('{"kind": "ort-cpu", "kind": "ort-cpu"}'),
        "its target.json cannot be read (not JSON: the key 'kind' occurs twice",
    ),
    "nested too deep": (
        lambda bundle: said(bundle).write_text("[" * 200000),
        "its target.json cannot be read (not JSON",
    ),
    "a size in half bytes": (
        listed("unet.onnx", size_bytes=1.5),
        "its target.json cannot be read (files['unet.onnx'].size",
    ),
    "a size that is true": (
        listed("unet.onnx", size_bytes=True),
        "its target.json cannot be read (files['unet.onnx'].size",
    ),
    "a size below zero": (listed("unet.onnx", size_bytes=-1), "its target.json cannot be read (files['unet.onnx'] is "),
    "an absurd size": (
        listed("unet.onnx", size_bytes=10**30),
        "its target.json cannot be read (files['unet.onnx'] is ",
    ),
    "a hash that is none": (listed("unet.onnx", sha256="x"), "its target.json cannot be read (files['unet.onnx'] is "),
    "channels in halves": (
        of_unet(deep_channels=1.5),
        "its target.json cannot be read (graphs['unet'].deep_channels is of",
    ),
    "absurd channels": (
        of_unet(deep_channels=10**12),
        DEEP + "1000000000000",
    ),
    "channels below zero": (
        of_unet(deep_channels=-1),
        DEEP + "-1",
    ),
    "no outermost blocks": (of_unet(shallow=""), DEEP + ""),
    "a part of no input": (of_unet(hoisted={"latents": "unet.timestep.onnx"}), "ONNX Runtime refuses its unet"),
    "parts exchanged": (
        of_unet(hoisted={"timestep": "unet.encoder_hidden_states.onnx", "encoder_hidden_states": "unet.timestep.onnx"}),
        "ONNX Runtime refuses its unet",
    ),
    "a part too few": (of_unet(hoisted={"timestep": "unet.timestep.onnx"}), "ONNX Runtime refuses its unet"),
    "another graph": (of_unet(path="vae_decoder.onnx"), "ONNX Runtime refuses its unet"),
    "a graph elsewhere": (of_unet(path="../../unet/model.onnx"), "its ../../unet/model.onnx is missing"),
    "an absolute path": (of_unet(path="/etc/passwd"), "its /etc/passwd is missing"),
    "a file that is not listed": (lambda bundle: (said(bundle).parent / "x").write_text(""), "its x is not listed"),
    "a linked file": (lambda bundle: linked(said(bundle).parent / "unet.onnx"), "its unet.onnx is a link or a device"),
    "a linked description": (lambda bundle: linked(said(bundle)), "its target.json is a link or a device"),
    "a dangling link": (
        lambda bundle: (said(bundle).parent / "x").symlink_to("nowhere"),
        "its x is a link or a device",
    ),
    "a pipe": (lambda bundle: os.mkfifo(said(bundle).parent / "x"), "its x is a link or a device"),
    "a linked folder": (lambda bundle: linked(said(bundle).parent), "its folder is a link"),
    "linked targets": (lambda bundle: linked(said(bundle).parent.parent), "its folder is a link"),
    "no description": (lambda bundle: said(bundle).unlink(), "its target.json is missing"),
    "a file for a folder": (
        lambda bundle: (shutil.rmtree(said(bundle).parent), said(bundle).parent.write_text("")),
        "its target.json cannot be read (",
    ),
    "another format": (
        updated(format_version=1),
        "its target.json cannot be read (it has format_version 1; this ldm_export reads 2)",
    ),
    "a graph too few": (
        lambda bundle: changed(bundle, lambda document: document["graphs"].pop("vae_decoder")),
        "it has the graphs text_encoder, unet, vae_encoder, and",
    ),
    "no JSON": (
        lambda bundle: (bundle / "targets" / "ort-cpu" / "target.json").write_bytes(b"{\xff"),
        "its target.json cannot be read (",
    ),
    "a list": (
        lambda bundle: (bundle / "targets" / "ort-cpu" / "target.json").write_text("[]"),
        "its target.json cannot be read (",
    ),
    "no files": (updated(files=None), "its target.json cannot be read ("),
    "a path that is a list": (
        lambda bundle: changed(bundle, lambda document: document["graphs"]["unet"].update(path=[])),
        "its target.json cannot be read (",
    ),
    "a file elsewhere": (
        lambda bundle: changed(bundle, lambda document: document["files"].update({"../x": {"size_bytes": 1}})),
        "its target.json cannot be read (",
    ),
    "a missing file": (
        lambda bundle: (bundle / "targets" / "ort-cpu" / "unet.onnx").unlink(),
        "its unet.onnx is missing",
    ),
    "a truncated file": (cut, "its unet.onnx_data has "),
    "a graph that is none": (same_size, "its unet.onnx is not a readable ONNX model: "),
    "an unknown operator": (unknown, "ONNX Runtime refuses its unet"),
    "weights outside": (outside, "its unet.onnx reads tensor "),
    "weights unlisted": (unlisted, "its unet.onnx reads tensor "),
}


@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_a_target_that_does_not_fit_is_passed_over(bundle: Path, plain: Pipeline, case: str) -> None:
    damage, reason = DOES_NOT_FIT[case]
    damage(bundle)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = Pipeline.open(bundle, backend="cpu")
        result = pipeline.generate(PROMPTS, steps=10)
    assert pipeline.backend == plain.backend
    (warning,) = [str(each.message) for each in caught]
    assert warning.startswith(f"targets/ort-cpu of {bundle} is passed over, since {reason}")
    assert warning.endswith(f"run: ldm-export build {bundle} --target cpu")
    np.testing.assert_array_equal(result.latents, plain.generate(PROMPTS, steps=10).latents)


@pytest.mark.parametrize("file", ["unet.onnx", "unet.onnx_data", "vae_decoder.onnx_data"])
def test_altered_bytes_are_seen_when_hashes_are_checked(bundle: Path, plain: Pipeline, file: str) -> None:
    path = bundle / "targets" / "ort-cpu" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert Bundle.open(bundle, verify=True).verified
    with pytest.warns(
        UserWarning, match=rf"is passed over, since its {file} has been altered; the plain graphs run"
    ) as warned:
        pipeline = Pipeline.open(bundle, backend="cpu", verify=True)
    assert [warning.filename for warning in warned] == [__file__]
    assert pipeline.backend == plain.backend


def test_another_graph_without_parts_is_passed_over(bundle: Path) -> None:
    changed(bundle, lambda document: document["graphs"]["vae_decoder"].update(path="unet.shallow.onnx"))
    backend = open_backend(Bundle.open(bundle), "cpu", None)
    with pytest.warns(UserWarning, match="is passed over, since ONNX Runtime refuses its vae_decoder") as warned:
        graph = backend.load("vae_decoder")
    assert [warning.filename for warning in warned] == [__file__]
    assert [tensor.name for tensor in graph.spec.inputs] == ["latent_sample"]
    assert not backend.name.endswith("ort-cpu")


def test_a_sound_target_stays_when_hashes_are_checked(built: Path, fast: Pipeline) -> None:
    assert Pipeline.open(built, backend="cpu", verify=True).backend == fast.backend


# --- which processors are alike -------------------------------------------------------------------------------------

INTEL = "processor : 0\nvendor_id : GenuineIntel\ncpu family : 6\nmodel : 143\nmodel name : Xeon\nflags : {}\n\n"
AMX = "fpu smep sse2 sse4_1 avx avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni amx_tile amx_int8"
PHONE = "processor : 0\nFeatures : fp asimd asimddp {}\nCPU implementer : 0x41\nCPU part : {}\n\n"


def level_of(cpuinfo: str, monkeypatch: pytest.MonkeyPatch, node: str = "here") -> str:
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: cpuinfo)
    monkeypatch.setattr("platform.node", lambda: node)
    monkeypatch.setattr("platform.machine", lambda: "here64")
    return cpu_level()


def test_all_that_a_layout_may_depend_on_is_in_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    level = level_of(INTEL.format(AMX) * 2, monkeypatch)
    assert level == (
        "here64 GenuineIntel 6 143 amx_int8 amx_tile avx avx2 avx512_vnni avx512bw avx512dq avx512f avx512vl fma sse4_1"
    )
    others = [
        INTEL.format(AMX.replace(" avx512_vnni", "")),
        INTEL.format(AMX.replace(" amx_tile amx_int8", "")),
        INTEL.format(AMX.replace(" avx512bw", "")),
        INTEL.format(AMX + " avx_vnni"),
        INTEL.format(AMX + " avx_vnni_int8"),
        INTEL.format(AMX).replace("143", "85"),
        INTEL.format(AMX).replace("GenuineIntel", "AuthenticAMD"),
        PHONE.format("", "0xd0b"),
        PHONE.format("i8mm", "0xd0b"),
        PHONE.format("sve", "0xd0b"),
        PHONE.format("i8mm", "0xd0b") + PHONE.format("i8mm", "0xd05"),
        "isa : rv64gcv",
    ]
    levels = [level_of(cpuinfo, monkeypatch) for cpuinfo in others]
    assert len({level, *levels}) == len(others) + 1
    assert level_of(INTEL.format(AMX + " smap rtm"), monkeypatch, node="there") == level


def test_where_the_system_tells_nothing_another_machine_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    here = level_of("isa : rv64gcv", monkeypatch)
    assert level_of("isa : rv64gcv", monkeypatch) == here
    assert level_of("isa : rv64gcv", monkeypatch, node="there") != here
    assert "here " not in here  # the machine's name is not given away


# --- HoistedGraph ---------------------------------------------------------------------------------------------------


class Doubled:
    """A graph in numpy that counts its calls."""

    def __init__(self, spec: GraphSpec, function: Callable[..., Any]):
        self.spec, self.function, self.calls = spec, function, 0

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return {self.spec.outputs[0].name: np.asarray(self.function(**inputs), np.float32)}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *_: Any) -> Callable[[], None]:
        def call() -> None:
            for name, array in self.run(inputs).items():
                outputs[name][...] = array

        return call


def hoisted() -> tuple[HoistedGraph, Doubled, Doubled]:
    """y = x + 2 t + 3 c, of which the products are parts; t has one number a row."""
    x, t, c, two, three, y = (
        TensorSpec(name, "float32", ("batch",) if name in ("t", "two") else ("batch", 2))
        for name in ("x", "t", "c", "two", "three", "y")
    )
    by_t = Doubled(GraphSpec("t", (t,), (two,)), lambda t: 2 * t)
    by_c = Doubled(GraphSpec("c", (c,), (three,)), lambda c: 3 * c)
    rest = Doubled(GraphSpec("rest", (x, two, three), (y,)), lambda x, two, three: x + two[:, None] + three)
    return HoistedGraph(GraphSpec("g", (x, t, c), (y,)), rest, {"t": by_t, "c": by_c}), by_t, by_c


def arrays() -> dict[str, Any]:
    return {"x": np.ones((1, 2), np.float32), "t": np.full(1, 5, np.float32), "c": np.ones((1, 2), np.float32)}


def test_timesteps_are_remembered_and_prompts_are_not() -> None:
    graph, by_t, by_c = hoisted()
    inputs = arrays()
    for timestep, expected in ((5, 14), (6, 16), (5, 14), (6, 16)):
        inputs["t"][...] = timestep
        np.testing.assert_array_equal(graph.run(inputs)["y"], np.full((1, 2), expected))
    assert (by_t.calls, by_c.calls) == (2, 4)


def test_each_row_has_a_timestep_of_its_own() -> None:
    graph, by_t, _ = hoisted()
    inputs = {"x": np.ones((3, 2), np.float32), "t": np.array([5, 6, 5], np.float32), "c": np.ones((3, 2), np.float32)}
    expected = np.repeat([[14.0], [16.0], [14.0]], 2, axis=1)
    np.testing.assert_array_equal(graph.run(inputs)["y"], expected)
    assert by_t.calls == 2
    out = {"y": np.zeros((3, 2), np.float32)}
    call = graph.bind(inputs, out)
    inputs["t"][...] = [6, 6, 7]
    call()
    np.testing.assert_array_equal(out["y"], np.repeat([[16.0], [16.0], [18.0]], 2, axis=1))
    assert by_t.calls == 3


def test_not_all_timesteps_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_export.runtime.backends.hoisted.MOST_RESULTS", 2)
    graph, by_t, _ = hoisted()
    inputs = arrays()
    for timestep in (1, 2, 3, 3, 2, 1):
        inputs["t"][...] = timestep
        np.testing.assert_array_equal(graph.run(inputs)["y"], np.full((1, 2), 4 + 2 * timestep))
    assert by_t.calls == 4


@pytest.mark.parametrize(("fixed", "expected"), [((), 36), (("c",), 30)], ids=["nothing fixed", "fixed"])
def test_a_bound_call_reads_and_writes_in_place(fixed: tuple[str, ...], expected: float) -> None:
    graph, _, by_c = hoisted()
    inputs, out = arrays(), {"y": np.zeros((1, 2), np.float32)}
    call = graph.bind(inputs, out, fixed)
    call()
    np.testing.assert_array_equal(out["y"], np.full((1, 2), 14))
    inputs["x"][...], inputs["t"][...], inputs["c"][...] = 7, 10, 3
    call()
    np.testing.assert_array_equal(out["y"], np.full((1, 2), expected))
    assert by_c.calls == (1 if fixed else 3)


# --- threads and other sessions in the process ----------------------------------------------------------------------

OWN = """
import sys, warnings
import numpy as np
import onnxruntime
from ldm_export.runtime import Pipeline
warnings.simplefilter("error")
bundle = sys.argv[1]
draw = lambda **options: Pipeline.open(bundle, backend="cpu", **options).generate("red", steps=10).latents
session = lambda options=None: onnxruntime.InferenceSession(
    f"{bundle}/vae_decoder/model.onnx", options, providers=["CPUExecutionProvider"])
"""


def in_a_process(code: str, bundle: Path) -> str:
    command = [sys.executable, "-c", OWN + code, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pipeline_leaves_the_sessions_of_the_application_alone(built: Path) -> None:
    code = """
one, two = draw(threads=1), draw(threads=2)
session()
print(np.abs(one - two).max() / np.abs(one).max() < 1e-5)
"""
    assert in_a_process(code, built) == "True\n"


def test_the_application_s_arithmetic_stays_as_it_is(built: Path) -> None:
    code = """
subnormal = np.full(8, 1e-40, np.float32)
draw()
print((subnormal * np.float32(1)).any())
"""
    assert in_a_process(code, built) == "True\n"


def test_the_one_pool_of_the_application_is_used(built: Path, plain: Pipeline) -> None:
    code = """
import os
own = draw()
onnxruntime.set_global_thread_pool_sizes(3, 1)
options = onnxruntime.SessionOptions()
options.use_per_session_threads = False
options.log_severity_level = 3
kept = session(options)
before = len(os.listdir("/proc/self/task"))
pipeline = Pipeline.open(bundle, backend="cpu", threads=4)
shared = pipeline.generate("red", steps=10).latents
print(len(os.listdir("/proc/self/task")) - before, np.abs(own - shared).max() / np.abs(own).max() < 1e-5)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads in /proc")
    assert in_a_process(code, built) == "0 True\n"
