"""TensorRT engines in C++: Python's pictures on a GPU that is the host (``host_gpu/``), what is refused and how it is
said. Where ``TENSORRT_ROOT`` names NVIDIA's headers and library, the library is built with them, and draws on a GPU."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import MANIFEST
from ldm_export.bundle.targets.base import TARGET
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import cuda
from ldm_export.verify.metrics import psnr_db
from tests.bundle.test_engines import DOES_NOT_FIT, KIND
from tests.bundle.test_engines import bundle as one_engine  # a fixture
from tests.cpp import test_build
from tests.cpp.conftest import SOURCES, run

pytest.importorskip("cuda.bindings.runtime", reason="CUDA's bindings (extra rtx) are not installed")
from tests.runtime.host_gpu import add_engines

__all__ = ["one_engine"]

HOST_GPU = Path(__file__).parent / "host_gpu"
STATUS_INPUT, STATUS_BACKEND = 1, 3
VERSION = "1.0.0.0"
LIBRARIES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
BACKENDS = {"rtx": b"tensorrt-rtx", "tensorrt": b"tensorrt"}
PROMPTS = ["a red circle", "a blue square"]
SAME_PICTURE_DB = 60.0
DRAWN: dict[str, dict[str, Any]] = {
    "guided": {"prompts": PROMPTS, "seed": 7, "guidance": 4.0},
    "unguided": {"prompts": PROMPTS, "guidance": 1.0},
    "noisy": {"prompts": PROMPTS[:1], "sampler": "euler-ancestral"},
    "other size": {"prompts": PROMPTS[:1], "height": 24, "width": 32},
    "from a picture": {"prompts": PROMPTS[:1], "image": np.full((16, 16, 3), 99, np.uint8)},
    "a part anew": {
        "prompts": PROMPTS[:1],
        "image": np.full((16, 16, 3), 99, np.uint8),
        "mask": np.repeat(np.uint8([0, 255]), 128).reshape(16, 16),
        "keep_pixels": True,
    },
}
IN_PYTHONS_WORDS = {"no profile", "a switch that is no switch", "a report that is none"}


@dataclass
class Host:
    """The library on a GPU that is the host: ``open`` opens a bundle, by its engines; ``gpu`` counts."""

    flavour: str
    open: Callable[..., Any]
    gpu: ctypes.CDLL

    def count(self, what: str) -> int:
        return int(getattr(self.gpu, f"host_gpu_{what}")())


@pytest.fixture(scope="module", params=["rtx", pytest.param("tensorrt", marks=pytest.mark.slow)])
def built(
    request: pytest.FixtureRequest, build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A flavour, and the folder of the library that was built with it."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, build(HOST_GPU, folder, f"-DLDM_TENSORRT={request.param}", "-DCMAKE_BUILD_TYPE=Debug")


@pytest.fixture
def host(built: tuple[str, Path], binding: ModuleType) -> Iterator[Host]:
    flavour, folder = built
    ldm = binding.load(str(folder / "ldm" / "libldm.so"))
    gpu = ctypes.CDLL(str(folder / "libhost_gpu.so"))
    for name in ("alive", "contexts", "uploaded_bytes"):
        getattr(gpu, f"host_gpu_{name}").restype = ctypes.c_long
    gpu.host_gpu_set_memory.argtypes = [ctypes.c_long]
    opened: list[Any] = []

    def open_bundle(folder: Path, backend: bytes = BACKENDS[flavour], **options: Any) -> Any:
        opened.append(binding.Pipeline(ldm, str(folder), backend=backend, **options))
        return opened[-1]

    yield Host(flavour, open_bundle, gpu)
    for pipeline in opened:
        pipeline.close()
    assert gpu.host_gpu_alive() == 0  # all that was taken of the GPU was given back


def with_engines(bundle: Path, folder: Path, flavour: str) -> Path:
    """A copy of a bundle, with engines for the host."""
    shutil.copytree(bundle, folder)
    change_target(add_engines(Bundle.open(folder), LIBRARIES[flavour]), lambda found: found.update(version=VERSION))
    return folder


def change_target(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / TARGET).read_text())
    change(document)
    (folder / TARGET).write_text(json.dumps(document))


@pytest.fixture(scope="module")
def engined(built: tuple[str, Path], bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with two loops and engines of the flavour; read-only."""
    return with_engines(bundle, tmp_path_factory.mktemp("engined") / "bundle", built[0])


@pytest.fixture
def copied(built: tuple[str, Path], tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with engines, for a test to change."""
    return with_engines(tiny_bundle, tmp_path / "bundle", built[0])


def engines_of(bundle: Path) -> Path:
    return next(folder for folder in (bundle / "targets").iterdir() if "sm89" in folder.name)


def draw(pipeline: Any, prompts: list[str], **options: Any) -> np.ndarray[Any, Any]:
    """Pixels, with the options of Python's ``generate``."""
    given = {name: value.encode() if isinstance(value, str) else value for name, value in options.items()}
    given |= {name: given[name].tobytes() for name in ("image", "mask") if name in given}
    return np.frombuffer(pipeline.draw(prompts, **{"steps": 10, **given}), np.uint8)


def by_python(bundle: Path, prompts: list[str], **options: Any) -> np.ndarray[Any, Any]:
    return Pipeline.open(bundle, backend="cpu").generate(prompts, **{"steps": 10, **options}).images.ravel()


def assert_same(drawn: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert expected.std() > 10
    assert np.abs(drawn.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("wish", DRAWN)
def test_the_same_pictures(host: Host, engined: Path, wish: str) -> None:
    pipeline = host.open(engined)
    assert_same(draw(pipeline, **DRAWN[wish]), by_python(engined, **DRAWN[wish]))
    assert pipeline.info().backend.decode() == f"{LIBRARIES[host.flavour]} {VERSION} {host.flavour}-sm89 the host"


def test_auto_takes_engines(host: Host, engined: Path) -> None:
    told: list[str] = []
    pipeline = host.open(engined, b"auto", warn=told.append)
    assert pipeline.info().backend.startswith(LIBRARIES[host.flavour].encode())
    assert not told


def test_in_a_step_only_the_sample_and_the_timestep_go_up(host: Host, engined: Path) -> None:
    moved: list[int] = []
    host.open(engined).draw(PROMPTS, steps=10, callback=lambda _: moved.append(host.count("uploaded_bytes")))
    assert moved[0] > moved[1]  # what the prompts give, once
    assert moved[1:] == [4 * (4 * 4 * 8 * 8 + 4)] * 9  # rows of the prompts and of none, each with its timestep


def test_contexts_are_used_again(host: Host, engined: Path) -> None:
    pipeline = host.open(engined)
    host.count("contexts")
    draw(pipeline, **DRAWN["guided"])
    assert host.count("contexts") == 3  # of the text encoder, the UNet and the decoder
    draw(pipeline, **DRAWN["guided"])
    draw(pipeline, **DRAWN["other size"])
    assert host.count("contexts") == 0


def test_clones_draw_at_once(host: Host, engined: Path, binding: ModuleType) -> None:
    pipeline = host.open(engined)
    expected = [draw(pipeline, PROMPTS, seed=seed) for seed in range(3)]
    drawn: dict[int, np.ndarray[Any, Any]] = {}

    def one(clone: Any, seed: int) -> None:
        drawn[seed] = draw(clone, PROMPTS, seed=seed)

    clones = []
    for _ in range(3):
        clone = binding.Pipeline.__new__(binding.Pipeline)
        clone._ldm, clone._handle = pipeline._ldm, ctypes.c_void_p()
        clone._check(pipeline._ldm.ldm_pipeline_clone(pipeline._handle, ctypes.byref(clone._handle)))
        clones.append(clone)
    threads = [threading.Thread(target=one, args=(clone, seed)) for seed, clone in enumerate(clones)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for clone in clones:
        clone.close()
    for seed in range(3):
        np.testing.assert_array_equal(drawn[seed], expected[seed])


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_the_whole_loop_in_one_call(host: Host, engined: Path, sampler: str) -> None:
    pipeline = host.open(engined)
    host.count("contexts")
    steps: list[int] = []
    drawn = draw(pipeline, PROMPTS, sampler=sampler, whole=1, callback=lambda step: steps.append(step.index))
    assert_same(drawn, by_python(engined, PROMPTS, sampler=sampler))
    assert (steps, host.count("contexts")) == ([0], 1)


def test_a_loop_that_the_bundle_has_no_graph_of(host: Host, engined: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(engined, tmp_path / "bundle")
    manifest = json.loads((folder / MANIFEST).read_text())
    name, plan = "loops/ddim-10", "plans/ddim-10.json"
    path = manifest["graphs"].pop(name)["path"]
    manifest["parity"] = [record for record in manifest["parity"] if record["graph"] != name]
    del manifest["files"][path]
    (folder / path).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    source_hashes = {plan: manifest["files"][plan]["sha256"]}
    change_target(
        engines_of(folder), lambda found: found["engines"][name].update(source=plan, source_hashes=source_hashes)
    )
    drawn = draw(host.open(folder), PROMPTS, sampler="ddim", whole=1)
    assert_same(drawn, by_python(engined, PROMPTS, sampler="ddim"))


def test_a_loop_without_an_engine(host: Host, engined: Path, binding: ModuleType, tmp_path: Path) -> None:
    folder = shutil.copytree(engined, tmp_path / "bundle")
    change_target(engines_of(folder), lambda found: found["engines"].pop("loops/ddim-10"))
    change_target(engines_of(folder), lambda found: found["files"].pop("loops/ddim-10.plan"))
    (engines_of(folder) / "loops" / "ddim-10.plan").unlink()
    for backend in (BACKENDS[host.flavour], b"auto"):
        with pytest.raises(
            binding.LdmError, match=r"has no engine of loops/ddim-10\. Run: .* --loop ddim-10$"
        ) as caught:
            draw(host.open(folder, backend), PROMPTS, sampler="ddim", whole=1)
        assert caught.value.status == STATUS_BACKEND


@pytest.mark.parametrize(
    ("wish", "graph", "tensor"),
    [
        ({"prompts": ["a"] * 5}, "unet", r"'sample' of shape \(10, 4, 8, 8\).*to \(8, 4, 64, 64\)"),
        ({"prompts": ["a"] * 9, "guidance": 1.0}, "vae_decoder", r"'latent_sample' of shape \(9, 4, 8, 8\)"),
        ({"prompts": ["a"], "height": 256}, "vae_decoder", r"'latent_sample' of shape \(1, 4, 128, 8\)"),
    ],
)
def test_sizes_that_no_engine_was_built_for(
    host: Host, engined: Path, binding: ModuleType, wish: dict[str, Any], graph: str, tensor: str
) -> None:
    steps: list[int] = []
    expected = rf"{graph}\.plan would be given {tensor}.*larger --batch or --size: ldm-export build .* --target "
    with pytest.raises(binding.LdmError, match=expected) as caught:
        draw(host.open(engined), **wish, callback=lambda step: steps.append(step.index))
    assert caught.value.status == STATUS_INPUT
    assert not steps


@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_engines_that_do_not_fit(host: Host, binding: ModuleType, one_engine: Path, case: str) -> None:
    if host.flavour == "tensorrt":
        pytest.skip("the target is of the other flavour")
    damage, reason = DOES_NOT_FIT[case]
    change_target(one_engine / "targets" / KIND, lambda found: found.update(version=VERSION))
    damage(one_engine)
    if case in IN_PYTHONS_WORDS:
        reason = reason.partition("has")[0].partition("of type")[0]
    with pytest.raises(binding.LdmError) as caught:
        host.open(one_engine, verify=1)
    assert caught.value.status == STATUS_BACKEND
    assert f"has no tensorrt_rtx engines for this GPU (targets/{KIND} does not fit: {reason}" in str(caught.value)
    assert str(caught.value).endswith(f". Run: ldm-export build {one_engine} --target rtx --sm 89")
    told: list[str] = []
    assert host.open(one_engine, b"auto", verify=1, warn=told.append).info().backend.startswith(b"onnxruntime")
    assert told == [f"{caught.value} Another backend is used."]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "1.8.0.1"}, f"{VERSION}"),
        ({"stripped": True}, "its engines have no weights"),
    ],
)
def test_engines_of_another_release_or_without_weights(
    host: Host, copied: Path, binding: ModuleType, change: dict[str, Any], reason: str
) -> None:
    change_target(engines_of(copied), lambda found: found.update(change))
    with pytest.raises(binding.LdmError, match=reason):
        host.open(copied)


def test_the_fastest_of_those_that_fit(host: Host, copied: Path) -> None:
    fast = add_engines(Bundle.open(copied), LIBRARIES[host.flavour], precision="fp16")
    change_target(fast, lambda found: found.update(version=VERSION))
    assert host.open(copied).info().backend.endswith(b"-sm89-fp16 the host")


@pytest.mark.parametrize(
    ("graph", "start", "reason"),
    [
        ("unet", b"\0\0\0\0\0\0\0", "could not open targets/"),
        ("vae_decoder", b"invalid", "cannot run targets/.* here .unsupported cc.. Update NVIDIA's driver, or run: "),
        ("unet", None, "has other inputs or outputs than unet/model.onnx. Run: "),
    ],
)
def test_an_engine_that_does_not_open(
    host: Host, copied: Path, tiny_bundle: Path, binding: ModuleType, graph: str, start: bytes | None, reason: str
) -> None:
    if start == b"invalid" and host.flavour == "tensorrt":
        pytest.skip("only TensorRT-RTX tells ahead")
    plan = engines_of(copied) / f"{graph}.plan"
    whole = plan.read_bytes()
    if start is None:
        shutil.copy(engines_of(copied) / "vae_decoder.plan", plan)
        size = plan.stat().st_size
        change_target(engines_of(copied), lambda found: found["files"]["unet.plan"].update(size_bytes=size))
    else:
        plan.write_bytes(start + whole[len(start) :])
    with pytest.raises(binding.LdmError, match=reason) as caught:
        draw(host.open(copied), PROMPTS)
    assert caught.value.status == STATUS_BACKEND
    told: list[str] = []
    pipeline = host.open(copied, b"auto", warn=told.append)
    assert_same(draw(pipeline, PROMPTS), by_python(tiny_bundle, PROMPTS))
    assert [sentence for sentence in told if "Another backend is used." in sentence] == [
        f"{caught.value} Another backend is used."
    ]
    assert pipeline.info().backend.startswith(b"onnxruntime")


def test_a_full_gpu(host: Host, engined: Path, binding: ModuleType) -> None:
    pipeline = host.open(engined)
    host.gpu.host_gpu_set_memory(1 << 14)
    try:
        with pytest.raises(binding.LdmError, match="the GPU's memory is full") as caught:
            draw(pipeline, **DRAWN["guided"])
    finally:
        host.gpu.host_gpu_set_memory(1 << 30)
    assert caught.value.status == STATUS_BACKEND
    assert_same(draw(pipeline, **DRAWN["guided"]), by_python(engined, **DRAWN["guided"]))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", test_build.SANITIZERS)
def test_under_sanitizers(build: Callable[..., Path], bundle: Path, tmp_path: Path, sanitizer: str) -> None:
    flags = f"-DCMAKE_CXX_FLAGS=-O1 -g -fsanitize={sanitizer} -fno-sanitize-recover=all"
    test_build.need(test_build.installed("catch2/catch.hpp"), "Catch2 2")
    programs = build(HOST_GPU.parent, tmp_path / "build", "-DCMAKE_BUILD_TYPE=Debug", "-DLDM_TENSORRT=rtx", flags)
    folder = with_engines(bundle, tmp_path / "bundle", "rtx")
    tests = "[threads]" if sanitizer == "thread" else "[threads],A callback cancels*,A step shows*"
    run(programs / "ldm_unit", tests, LDM_TEST_BUNDLE=str(folder), **test_build.SANITIZERS[sanitizer])


@pytest.mark.parametrize("flavour", BACKENDS)
def test_without_the_option(ldm: Any, binding: ModuleType, bundle: Path, flavour: str) -> None:
    with pytest.raises(binding.LdmError, match=f"built without it.* -DLDM_TENSORRT={flavour}") as caught:
        binding.Pipeline(ldm, str(bundle), backend=BACKENDS[flavour])
    assert caught.value.status == STATUS_BACKEND


def test_the_other_flavour(host: Host, engined: Path, binding: ModuleType) -> None:
    other = {"rtx": "tensorrt", "tensorrt": "rtx"}[host.flavour]
    with pytest.raises(binding.LdmError, match=f"built without it.* -DLDM_TENSORRT={other}"):
        host.open(engined, BACKENDS[other])


def test_an_unknown_flavour(sdk: Path, tmp_path: Path) -> None:
    command = ("cmake", "-S", SOURCES, "-B", tmp_path, f"-DONNXRUNTIME_ROOT={sdk}", "-DLDM_TENSORRT=trt")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "LDM_TENSORRT is trt; it is OFF, rtx or tensorrt." in done.stderr


@pytest.fixture(scope="module")
def nvidias(
    build: Callable[..., Path], binding: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any]:
    """A flavour that NVIDIA's headers and library are there of, and the library built with them."""
    root = os.environ.get("TENSORRT_ROOT")
    if root is None:
        pytest.skip("TENSORRT_ROOT names no folder of TensorRT's or TensorRT-RTX's release archive")
    flavour = "rtx" if list(Path(root).glob("lib*/libtensorrt_rtx*")) else "tensorrt"
    folder = build(
        SOURCES, tmp_path_factory.mktemp("nvidia"), f"-DLDM_TENSORRT={flavour}", "-DCMAKE_BUILD_TYPE=Release"
    )
    return flavour, binding.load(str(folder / "libldm.so"))


@pytest.mark.skipif(cuda.driver_is_there(), reason="NVIDIA's driver is installed")
def test_built_with_nvidias_headers_and_without_a_driver(
    nvidias: tuple[str, Any], binding: ModuleType, tiny_bundle: Path, tmp_path: Path
) -> None:
    flavour, ldm = nvidias
    folder = with_engines(tiny_bundle, tmp_path / "bundle", flavour)
    with pytest.raises(binding.LdmError, match="CUDA does not run here: NVIDIA's driver is missing") as caught:
        binding.Pipeline(ldm, str(folder), backend=BACKENDS[flavour])
    assert caught.value.status == STATUS_BACKEND
    told: list[str] = []
    pipeline = binding.Pipeline(ldm, str(folder), warn=told.append)
    assert_same(draw(pipeline, PROMPTS), by_python(folder, PROMPTS))
    assert not any("engine" in sentence for sentence in told)
    pipeline.close()


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.driver_is_there(), reason="NVIDIA's driver is not installed")
def test_on_a_gpu(nvidias: tuple[str, Any], binding: ModuleType, tiny_bundle: Path, tmp_path: Path) -> None:
    from ldm_export.verify.engines.build import EngineSettings, Range, build_engines

    flavour, ldm = nvidias
    sm_versions = (cuda.gpus()[0].compute_capability.replace(".", ""),) if flavour == "rtx" else ()
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    settings = EngineSettings(LIBRARIES[flavour], sm_versions, "fp32", batch=Range(1, 1, 2), pixels=Range(16, 16, 32))
    build_engines(Bundle.open(folder), settings)
    pipeline = binding.Pipeline(ldm, str(folder), backend=BACKENDS[flavour])
    for wish in DRAWN.values():
        drawn = draw(pipeline, **wish)
        assert psnr_db(drawn, by_python(folder, **wish)) > SAME_PICTURE_DB
    pipeline.close()
