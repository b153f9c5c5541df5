"""TensorRT engines: which run, what is refused and how it is said; and the loop on the device, on a GPU that is the
host (`tests.runtime.host_gpu`), against the CPU's pictures. What only a GPU shows is in ``test_gpu.py``."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.base import TARGET
from ldm_export.bundle.targets.engines import ShapeRange
from ldm_export.errors import BackendError, BundleError, CancelledError, InputError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import cuda, engine, open_backend
from ldm_export.runtime.backends.engine import check_profile, check_validity, open_library
from ldm_export.runtime.backends.tensorrt import build_command, fitting_target
from ldm_export.verify.loops import add_loop
from ldm_export.verify.metrics import psnr_db
from tests.scheduler_configs import relative_error

pytest.importorskip("cuda.bindings.runtime", reason="CUDA's bindings (extra rtx) are not installed")
from tests.runtime import host_gpu as stand_in
from tests.runtime.host_gpu import CAPABILITY, VERSION, HostEngine, add_engines, host_gpu

FLAVOURS = ("tensorrt_rtx", "tensorrt")
NAMES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
SAME = 1e-5
"""Of the largest value: sums in another order."""
DRAWN: dict[str, dict[str, Any]] = {
    "guided": {"prompts": ["a red circle", "a blue square"], "seed": [7, 11], "guidance": 4.0, "steps": 10},
    "noisy": {"prompts": "a red circle", "sampler": "euler-ancestral", "steps": 10},
    "remembering": {"prompts": "a red circle", "sampler": "dpmpp-2m", "steps": 10},
    "unguided": {"prompts": "a red circle", "guidance": 1.0, "steps": 10},
    "other size": {"prompts": "a red circle", "height": 24, "width": 32, "steps": 10},
    "from a picture": {"prompts": "a red circle", "image": np.full((16, 16, 3), 99, np.uint8), "steps": 10},
}
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX (extra rtx) is not installed")
without_a_gpu = pytest.mark.skipif(cuda.driver_is_there(), reason="NVIDIA's driver is installed")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """The tiny bundle without targets, for a test to change."""
    ignored = shutil.ignore_patterns("targets")
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=ignored))


@pytest.fixture(scope="module")
def looped(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with plans that the tests draw by, a loop, and engines of both flavours; read-only."""
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    made = Bundle.open(shutil.copytree(tiny_bundle, folder, ignore=shutil.ignore_patterns("targets")))
    made = add_loop(made, "euler-ancestral-10")
    for flavour in FLAVOURS:
        add_engines(made, flavour)
    return made


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn_twice(bundle: Bundle, backend: str, wishes: dict[str, Any]) -> tuple[Any, Any]:
    """By the CPU and by a backend."""
    return tuple(Pipeline(bundle, name).generate(**wishes) for name in ("cpu", backend))  # type: ignore[return-value]


# --- the loop on the device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", DRAWN)
def test_the_same_pictures(looped: Bundle, flavour: str, wish: str) -> None:
    with host_gpu(flavour):
        expected, drawn = drawn_twice(looped, NAMES[flavour], DRAWN[wish])
    assert relative_error(drawn.latents, expected.latents) < SAME
    assert np.abs(drawn.images.astype(int) - expected.images).max() <= 1
    assert drawn.timings.denoiser_ms == [1.5] * len(expected.timings.denoiser_ms)  # as the device's clock says
    assert drawn.backend == f"{flavour} {VERSION} {'rtx' if 'rtx' in flavour else 'tensorrt'}-sm89 the host"


def test_the_latents_stay_on_the_device(looped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of arrays only a step's noise goes up, and only its latents come down."""
    moved: list[tuple[str, int]] = []
    for way in ("upload", "download"):
        move = getattr(cuda.Buffer, way)
        monkeypatch.setattr(
            cuda.Buffer,
            way,
            lambda self, array, move=move, way=way: moved.append((way, array.nbytes)) or move(self, array),
        )
    with host_gpu("tensorrt"):
        steps = Pipeline(looped, "tensorrt").steps(**DRAWN["noisy"])
        first = next(steps)
        del moved[:]
        next(steps)
        assert moved == [("upload", first.latents.nbytes), ("download", first.latents.nbytes)]


def test_previews_and_the_live_latents(looped: Bundle, flavour: str) -> None:
    with host_gpu(flavour):
        sides = (Pipeline(looped, name).steps(**DRAWN["guided"]) for name in ("cpu", NAMES[flavour]))
        for theirs, ours in zip(*sides, strict=True):
            assert relative_error(ours.latents, theirs.latents) < SAME
        np.testing.assert_allclose(ours.decode().astype(int), theirs.decode(), atol=1)


def test_two_loops_at_once_and_one_after_another(looped: Bundle, flavour: str) -> None:
    with host_gpu(flavour) as (_, opened):
        pipeline = Pipeline(looped, NAMES[flavour])
        left, right = (pipeline.steps(**{**DRAWN["guided"], "seed": seed}) for seed in (3, 30))
        *_, (a, b) = zip(left, right, strict=True)
        for step, seed in ((a, 3), (b, 30)):
            alone = pipeline.generate(**{**DRAWN["guided"], "seed": seed})
            np.testing.assert_array_equal(step.latents, alone.latents)
        unet = next(found for found in opened if "timestep" in found.io)
        assert unet.contexts == 2  # as many as were in use at once


def test_memory_is_of_the_size_that_is_drawn(looped: Bundle, flavour: str) -> None:
    """Neither of the largest that the engines take, nor of sizes that were drawn before."""

    def held(*sizes: int) -> int:
        with host_gpu(flavour) as (gpu, _), Pipeline(looped, NAMES[flavour]) as pipeline:
            for size in sizes:
                pipeline.generate("a red circle", height=size, width=size, steps=10)
                gc.collect()
            return stand_in.MEMORY - gpu.memory_left

    assert held(16) < held(32)
    assert held(32, 16) == held(16)
    assert held(16, 32) == held(32)


def test_preparing_for_a_size_is_loading(looped: Bundle, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only preparing an engine moves on."""
    prepare, clock = engine.BoundEngine.prepare, [0.0]

    def takes_a_second(bound: engine.BoundEngine) -> None:
        prepare(bound)
        clock[0] += 1.0

    monkeypatch.setattr(engine.BoundEngine, "prepare", takes_a_second)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with host_gpu(flavour), Pipeline(looped, NAMES[flavour]) as pipeline:
        first, again = (pipeline.generate("a red circle", steps=10).timings for _ in range(2))
    assert (first.load_ms, first.text_ms) == (3000.0, 0.0)  # the UNet, and the step to and fro
    assert (again.load_ms, again.text_ms) == (0.0, 0.0)


def test_without_an_engine_for_the_steps_the_host_steps(bundle: Bundle, flavour: str) -> None:
    add_engines(bundle, flavour, step=False)
    with host_gpu(flavour):
        expected, drawn = drawn_twice(bundle, NAMES[flavour], DRAWN["noisy"])
    assert relative_error(drawn.latents, expected.latents) < SAME


def test_the_whole_loop_in_one_call(looped: Bundle, flavour: str) -> None:
    with host_gpu(flavour):
        expected = Pipeline(looped, "cpu").generate(**DRAWN["noisy"])
        for name in ("cpu", NAMES[flavour]):  # ONNX Runtime draws with loop graphs, too
            drawn = Pipeline(looped, name).generate(**DRAWN["noisy"], whole=True)
            assert relative_error(drawn.latents, expected.latents) < SAME
            assert psnr_db(drawn.images[0], expected.images[0]) > 50
            assert drawn.timings.denoiser_ms == []
            assert 0 < drawn.timings.whole_ms < drawn.timings.total_ms


def test_a_loop_that_only_the_engines_have(looped: Bundle, flavour: str) -> None:
    graphs = {name: graph for name, graph in looped.manifest.graphs.items() if not name.startswith("loops/")}
    without = replace(looped, manifest=replace(looped.manifest, graphs=graphs))
    with host_gpu(flavour):
        drawn, expected = (
            Pipeline(each, NAMES[flavour]).generate(**DRAWN["noisy"], whole=True) for each in (without, looped)
        )
        np.testing.assert_array_equal(drawn.latents, expected.latents)
        with pytest.raises(InputError, match=r"loop ddim-10 was .* has euler-ancestral-10\. Run: .* --loop$"):
            Pipeline(without, NAMES[flavour]).generate("a red circle", steps=10, whole=True)


@pytest.mark.parametrize("end", ["cancelled", "let go", "failed", "finished"])
def test_nothing_is_left_on_the_device(looped: Bundle, flavour: str, end: str) -> None:
    with host_gpu(flavour) as (gpu, _):
        with Pipeline(looped, NAMES[flavour]) as pipeline:
            pipeline.generate(**DRAWN["guided"])
            held = gpu.alive.keys() | set()
            if end == "cancelled":
                with pytest.raises(CancelledError):
                    pipeline.generate(**DRAWN["guided"], callback=lambda step: False)
            elif end == "let go":
                next(pipeline.steps(**DRAWN["guided"]))
            elif end == "failed":
                with pytest.raises(ZeroDivisionError):
                    pipeline.generate(**DRAWN["guided"], callback=lambda step: 1 / 0)
            else:
                pipeline.generate(**DRAWN["guided"])
            gc.collect()
            assert gpu.alive.keys() == held
        del pipeline
        gc.collect()
        assert not gpu.alive


def test_a_closed_pipeline_says_so(looped: Bundle, flavour: str) -> None:
    with host_gpu(flavour):
        pipeline = Pipeline(looped, NAMES[flavour])
        pipeline.close()
        with pytest.raises(InputError, match=r"This pipeline was closed\. Open the bundle again\."):
            pipeline.generate("a red circle")


def test_a_device_that_is_full(looped: Bundle, flavour: str) -> None:
    with host_gpu(flavour) as (gpu, _):
        pipeline = Pipeline(looped, NAMES[flavour])
        expected = pipeline.generate(**DRAWN["guided"])
        left, gpu.memory_left = gpu.memory_left, 5000
        with pytest.raises(BackendError, match="the GPU's memory is full"):
            pipeline.generate(**DRAWN["other size"])
        gpu.memory_left = left
        np.testing.assert_array_equal(pipeline.generate(**DRAWN["guided"]).latents, expected.latents)


# --- CUDA graphs, and what is compiled once -------------------------------------------------------------------------


def test_recorded_or_not_the_numbers_are_the_same(looped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with host_gpu("tensorrt") as (gpu, _):
        recorded = Pipeline(looped, "tensorrt").generate(**DRAWN["noisy"])
        assert sum(isinstance(held, list) for held in gpu.alive.values()) == 0
        pipeline = Pipeline(looped, "tensorrt")
        pipeline.generate(**DRAWN["noisy"])
        assert sum(isinstance(held, list) for held in gpu.alive.values()) == 3  # the UNet, and the step to and fro
        monkeypatch.setattr(engine, "CUDA_GRAPHS", False)
        plain = Pipeline(looped, "tensorrt").generate(**DRAWN["noisy"])
    np.testing.assert_array_equal(plain.latents, recorded.latents)


def test_what_is_compiled_is_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_engines(bundle, "tensorrt_rtx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with host_gpu("tensorrt_rtx") as (_, opened):
        Pipeline(bundle, "tensorrt-rtx").generate(**DRAWN["guided"])
        kept = sorted((tmp_path / "cache/ldm_export").iterdir())
        assert len(kept) == 4  # text encoder, UNet, step and decoder
        assert {path.read_bytes() for path in kept} == {b"host."}
        del opened[:]
        Pipeline(bundle, "tensorrt-rtx").generate(**DRAWN["guided"])
        assert all(found.compiled for found in opened)
        kept[0].write_bytes(b"of another GPU")
        Pipeline(bundle, "tensorrt-rtx").generate(**DRAWN["guided"])
        assert kept[0].read_bytes() == b"host."
    assert sorted((tmp_path / "cache/ldm_export").iterdir()) == kept
    Bundle.open(bundle.path, verify=True)


def test_pictures_are_drawn_where_nothing_can_be_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_engines(bundle, "tensorrt_rtx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / TARGET))  # a file
    with host_gpu("tensorrt_rtx"):
        assert np.isfinite(Pipeline(bundle, "tensorrt-rtx").generate(**DRAWN["guided"]).latents).all()


# --- which engines run ----------------------------------------------------------------------------------------------


def test_the_fastest_that_fits_runs(bundle: Bundle) -> None:
    for precision in ("fp32", "fp16"):
        add_engines(bundle, "tensorrt_rtx", precision=precision)
    assert fitting_target(bundle, "tensorrt_rtx", VERSION, CAPABILITY).kind == "rtx-sm89-fp16"
    shutil.rmtree(bundle.path / "targets/rtx-sm89-fp16")
    assert fitting_target(bundle, "tensorrt_rtx", VERSION, CAPABILITY).kind == "rtx-sm89"


def changed(bundle: Bundle, **changes: Any) -> None:
    path = bundle.path / "targets/rtx-sm89" / TARGET
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize(
    ("change", "here", "why"),
    [
        (None, ("1.1", "8.9"), "it was made with tensorrt_rtx 1.0, and this is 1.1"),
        (None, ("1.0", "12.0"), "it was made for compute capability 8.9, and this device has 12.0"),
        ({"stripped": True}, ("1.0", "8.9"), "its engines have no weights"),
        ({"engines": {}}, ("1.0", "8.9"), "it has no engine of text_encoder and unet and vae_decoder and vae_encoder"),
        ({"format_version": 99}, ("1.0", "8.9"), "its target.json cannot be read (it has format_version 99;"),
    ],
)
def test_engines_that_do_not_fit(
    bundle: Bundle, change: dict[str, Any] | None, here: tuple[str, str], why: str
) -> None:
    add_engines(bundle, "tensorrt_rtx")
    changed(bundle, **(change or {}))
    sm = here[1].replace(".", "")
    with pytest.raises(BackendError) as raised:
        fitting_target(bundle, "tensorrt_rtx", *here)
    assert f"(targets/rtx-sm89 does not fit: {why}" in str(raised.value)
    build, refit = f"build {bundle.path} --target rtx --sm {sm}", f"refit {bundle.path} --target rtx-sm89"
    assert str(raised.value).endswith(f". Run: ldm-export {refit if 'weights' in why else build}")


def test_engines_of_another_graph_or_cut_short(bundle: Bundle) -> None:
    folder = add_engines(bundle, "tensorrt_rtx")
    (folder / "unet.plan").write_bytes(b"short")
    with pytest.raises(BackendError, match=r"its unet\.plan has 5 bytes; target\.json says \d+"):
        fitting_target(bundle, "tensorrt_rtx", VERSION, CAPABILITY)
    add_engines(bundle, "tensorrt_rtx")
    entry = replace(bundle.manifest.files["unet/model.onnx"], sha256="0" * 64)
    other = replace(
        bundle, manifest=replace(bundle.manifest, files={**bundle.manifest.files, "unet/model.onnx": entry})
    )
    with pytest.raises(BackendError, match="was made from other graphs"):
        fitting_target(other, "tensorrt_rtx", VERSION, CAPABILITY)


def test_no_engines_at_all(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"has no tensorrt engines for this GPU\. Run: .* --target tensorrt$"):
        fitting_target(bundle, "tensorrt", VERSION, CAPABILITY)


def test_sizes_that_no_engine_was_built_for(bundle: Bundle, flavour: str) -> None:
    add_engines(bundle, flavour, largest=2)
    command = re.escape(build_command(bundle, flavour, CAPABILITY))
    with host_gpu(flavour):
        pipeline = Pipeline(bundle, NAMES[flavour])
        for wish, given in (
            ({"prompts": ["a red circle"] * 2}, r"unet\.plan would be given 'sample' of shape \(4, 4, 8, 8\)"),
            ({"prompts": "a red circle", "height": 144}, r"vae_decoder\.plan would be given 'latent_sample' of shape"),
        ):
            with pytest.raises(InputError, match=rf"{given}.*it was built for \(1, 4, 1, 1\) to .*--size: {command}"):
                pipeline.generate(**wish, steps=10)
        assert np.isfinite(pipeline.generate("a red circle", steps=10).latents).all()


def test_a_shape_of_another_rank() -> None:
    spec, limits = engine.GraphSpec("unet.plan", (), ()), ShapeRange((1, 4, 1, 1), (1, 4, 8, 8), (2, 4, 9, 9))
    with pytest.raises(InputError, match=r"of shape \(1, 4\); it was built for \(1, 4, 1, 1\) to \(2, 4, 9, 9\)"):
        check_profile(spec, {"sample": limits}, {"sample": (1, 4)}, "build")


def test_an_engine_that_is_of_another_graph(bundle: Bundle, flavour: str) -> None:
    folder = add_engines(bundle, flavour)
    document = json.loads((folder / TARGET).read_text())
    document["engines"]["unet"]["path"] = "vae_decoder.plan"
    (folder / TARGET).write_text(json.dumps(document))
    with (
        host_gpu(flavour),
        pytest.raises(BundleError, match=r"vae_decoder\.plan has other inputs than .*Run: ldm-"),
    ):
        Pipeline(bundle, NAMES[flavour]).generate("a red circle")


def test_a_loop_that_has_no_engine(bundle: Bundle, flavour: str) -> None:
    add_engines(bundle, flavour)
    looped = add_loop(bundle, "ddim-10")
    with (
        host_gpu(flavour),
        pytest.raises(BackendError, match=r"has no engine of loops/ddim-10\. Run: .* --loop ddim-10$"),
    ):
        Pipeline(looped, NAMES[flavour]).generate("a red circle", steps=10, whole=True)


# --- the real library, as far as it goes without a GPU --------------------------------------------------------------


@needs_rtx
@without_a_gpu
def test_without_a_driver_it_is_one_sentence(looped: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"^CUDA does not run here: NVIDIA's driver is missing, .* Or use the backend cpu\.$"
    ):
        open_backend(looped, "tensorrt-rtx", None)


def test_a_library_that_is_not_installed(looped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    open_library.cache_clear()
    with pytest.raises(BackendError, match=r"tensorrt is not installed; .*pip install 'ldm_export\[gpu\]'"):
        open_backend(looped, "tensorrt", None)


@needs_rtx
def test_a_plan_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "unet.plan").write_bytes(bytes(4096))
    library = open_library("tensorrt_rtx")
    with pytest.raises(BackendError, match=r"cannot run unet\.plan here \(malformed engine\)\..*, or run: build it$"):
        check_validity(library, np.memmap(tmp_path / "unet.plan", np.uint8, mode="r"), "unet.plan", "build it")


@needs_rtx
@without_a_gpu
def test_a_real_engine_without_a_driver() -> None:
    import tensorrt_rtx as trt

    library = open_library("tensorrt_rtx")
    builder = trt.Builder(library.runtime.logger)
    network, config = builder.create_network(), builder.create_builder_config()
    network.mark_output(network.add_identity(network.add_input("x", trt.float32, (2, 3))).get_output(0))
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = np.frombuffer(builder.build_serialized_network(network, config), np.uint8)
    with pytest.raises(BackendError, match=r"CUDA driver version is insufficient .*Update NVIDIA's driver, or"):
        check_validity(library, plan, "x.plan", "build it")
    assert library.runtime.deserialize_cuda_engine(plan) is None
    assert re.search("could not open x.plan: .*insufficient", str(library.failed("open x.plan")))


@needs_rtx
@pytest.mark.parametrize("kind", [HostEngine, "HostContext"])
def test_the_stand_in_has_the_calls_of_the_real_one(kind: Any) -> None:
    import tensorrt_rtx as trt

    if kind is HostEngine:
        there = {*dir(trt.ICudaEngine), *dir(trt.IRuntimeConfig), *dir(trt.IRuntimeCache)}
    else:
        kind, there = stand_in.HostContext, {*dir(trt.IExecutionContext)}
    assert {name for name in vars(kind) if not name.startswith("_")} <= there
    members = {
        "CudaGraphStrategy": {"DISABLED", "WHOLE_GRAPH_CAPTURE"},
        "DynamicShapesKernelSpecializationStrategy": {"EAGER"},
        "EngineValidity": {"INVALID"},
        "ExecutionContextAllocationStrategy": {"USER_MANAGED"},
        "TensorIOMode": {"INPUT"},
        "TensorLocation": {"DEVICE"},
    }
    assert all(names <= set(getattr(trt, name).__members__) for name, names in members.items())


# --- auto -----------------------------------------------------------------------------------------------------------


@without_a_gpu
def test_auto_without_a_driver_costs_and_says_nothing(looped: Bundle) -> None:
    code = (
        "import sys; from ldm_export.runtime import Pipeline; "
        f"print(Pipeline.open({str(looped.path)!r}, backend='auto').backend.split()[0], "
        "[name for name in sys.modules if name.startswith(('cuda', 'tensorrt'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"(onnxruntime|openvino) \[\]\n", done.stdout)
    assert not done.stderr


def test_auto_takes_engines_that_fit(looped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_export.runtime.backends.auto.driver_is_there", lambda: True)
    with host_gpu("tensorrt_rtx"):
        pipeline = Pipeline(looped)
        assert pipeline.backend == f"tensorrt_rtx {VERSION} rtx-sm89 the host"
        assert pipeline.requested_backend == "auto"


def test_auto_says_why_engines_are_passed_over(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engines(bundle, "tensorrt_rtx")
    changed(bundle, version="0.9")
    monkeypatch.setattr("ldm_export.runtime.backends.auto.driver_is_there", lambda: True)
    with (
        host_gpu("tensorrt_rtx"),
        pytest.warns(UserWarning, match=r"made with tensorrt_rtx 0\.9.*Another backend is") as warned,
    ):
        assert Pipeline.open(bundle.path).backend.startswith("onnxruntime ")
    assert [warning.filename for warning in warned] == [__file__]
