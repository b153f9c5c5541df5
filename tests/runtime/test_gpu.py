"""What only a GPU shows: ``make test-gpu`` builds engines for the one at hand and holds what they draw against the CPU.

Engines of the tiny bundle and of ``emoji64``, in fp32 and fp16, for every flavour of TensorRT that is installed and
builds for this GPU; and ONNX Runtime's providers, as far as they are installed.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import BackendError, InputError
from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import cuda, engine, open_backend
from ldm_export.runtime.backends.base import Backend
from ldm_export.runtime.backends.tensorrt import TensorRtBackend
from ldm_export.runtime.backends.user_cache import cache_folder
from ldm_export.verify.loops import add_loop
from ldm_export.verify.metrics import psnr_db
from tests.arrays import arrays
from tests.scheduler_configs import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.driver_is_there(), reason="NVIDIA's driver is not installed"),
]

NAMES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
PROVIDERS = ("cuda", "ort-tensorrt", "ort-tensorrt-rtx")
SAME = {"fp32": 1e-3, "fp16": 2e-2}
"""Of a graph's largest value."""
SAME_PICTURE_DB = {"fp32": 60.0, "fp16": 40.0}
SAME_LOOP = {"fp32": 1e-4, "fp16": 1e-2}
"""Of the latents' largest value, after a loop of the same engines by another way."""
LARGEST_BATCH = 2
PROMPTS = {"tiny": ["a red circle", "two green triangles on white"], "emoji64": ["red apple", "black cat"]}
LOOP = {"sampler": "euler-ancestral", "steps": 10}
Engines = Callable[[str, str], Bundle]


@pytest.fixture(scope="module", params=NAMES)
def flavour(request: pytest.FixtureRequest) -> str:
    """A flavour that is installed and has engines for this GPU."""
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "tensorrt_rtx":
        import tensorrt_rtx as trt

        capability = cuda.gpus()[0].compute_capability
        if not hasattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"):
            pytest.skip(f"TensorRT-RTX builds no engines for compute capability {capability}")
    return str(request.param)


@pytest.fixture(scope="module")
def engines(flavour: str, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """A function from a model and a precision to a bundle with engines for this GPU."""
    from ldm_export.verify.engines.build import EngineSettings, Range, build_engines

    folder = tmp_path_factory.mktemp(flavour)

    @cache
    def plain(model: str) -> Bundle:
        if model == "tiny":
            return Bundle.open(shutil.copytree(tiny_bundle, folder / model))
        return export_bundle(open_checkpoint(model), folder / model)

    @cache
    def build(model: str, precision: str) -> Bundle:
        bundle = Bundle.open(shutil.copytree(plain(model).path, folder / f"{model}-{precision}"))
        bundle = add_loop(bundle, f"{LOOP['sampler']}-{LOOP['steps']}")
        sm_versions = (cuda.gpus()[0].compute_capability.replace(".", ""),) if flavour == "tensorrt_rtx" else ()
        side = bundle.manifest.model["height"]
        settings = EngineSettings(
            flavour, sm_versions, precision, batch=Range(1, 1, LARGEST_BATCH), pixels=Range(side, side, 2 * side)
        )
        build_engines(bundle, settings, loops=[f"{LOOP['sampler']}-{LOOP['steps']}"])
        return bundle

    return build


@pytest.fixture(params=SAME)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PROMPTS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipeline(engines: Engines, flavour: str) -> Iterator[Pipeline]:
    """The tiny model's engines in fp32."""
    with Pipeline(engines("tiny", "fp32"), NAMES[flavour]) as opened:
        yield opened


def drawn(bundle: Bundle, backend: str, model: str, **wishes: Any) -> Any:
    with Pipeline(bundle, backend) as pipeline:
        return pipeline.generate(PROMPTS[model], seed=7, **wishes)


# --- engines against the CPU ----------------------------------------------------------------------------------------


def test_every_graph(engines: Engines, flavour: str, model: str, precision: str) -> None:
    bundle = engines(model, precision)
    ours, theirs = (open_backend(bundle, name, None) for name in (NAMES[flavour], "cpu"))
    factor, side = bundle.manifest.model["pixels_per_latent"], bundle.manifest.model["height"]
    sizes = {"batch": LARGEST_BATCH, "image_height": side, "image_width": 2 * side, "height": side // factor}
    sizes |= {"width": 2 * side // factor, "tokens": int(bundle.manifest.graphs["text_encoder"].inputs[0].shape[1])}
    for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        graph = ours.load(name)
        inputs = arrays(graph.spec.inputs, **sizes)
        expected = theirs.load(name).run(inputs)
        for output, result in graph.run(inputs).items():
            assert result.shape == expected[output].shape
            assert relative_error(result, expected[output]) < SAME[precision], (name, output)
    ours.close()


@pytest.mark.parametrize("size", [{}, {"width": 2}], ids=["own size", "twice as wide"])
def test_whole_pictures(engines: Engines, flavour: str, model: str, precision: str, size: dict[str, int]) -> None:
    bundle = engines(model, precision)
    wishes = {side: times * bundle.manifest.model[side] for side, times in size.items()}
    theirs, ours = (drawn(bundle, name, model, **wishes) for name in ("cpu", NAMES[flavour]))
    assert ours.backend.startswith(flavour)
    for picture, expected in zip(ours.images, theirs.images, strict=True):
        assert psnr_db(picture, expected) >= SAME_PICTURE_DB[precision]


def test_a_picture_from_a_picture(engines: Engines, flavour: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    theirs, ours = (drawn(engines("tiny", "fp32"), name, "tiny", image=image) for name in ("cpu", NAMES[flavour]))
    assert psnr_db(ours.images[0], theirs.images[0]) >= SAME_PICTURE_DB["fp32"]


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp-2m", "euler-ancestral"])
def test_steps_on_the_device_and_on_the_host(pipeline: Pipeline, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pipeline.generate("a red circle", sampler=sampler, steps=10)
    monkeypatch.setattr(TensorRtBackend, "sampling", Backend.sampling)
    theirs = pipeline.generate("a red circle", sampler=sampler, steps=10)
    assert relative_error(ours.latents, theirs.latents) < SAME_LOOP["fp32"]


def test_the_whole_loop_as_one_engine(engines: Engines, flavour: str, model: str, precision: str) -> None:
    bundle = engines(model, precision)
    stepped, whole = (drawn(bundle, NAMES[flavour], model, whole=at_once, **LOOP) for at_once in (False, True))
    assert relative_error(whole.latents, stepped.latents) < SAME_LOOP[precision]
    for picture, expected in zip(whole.images, stepped.images, strict=True):
        assert psnr_db(picture, expected) >= SAME_PICTURE_DB[precision]


# --- CUDA graphs, memory, the cache, refusals -----------------------------------------------------------------------


def test_with_and_without_cuda_graphs(engines: Engines, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = engines("emoji64", "fp16")
    recorded = drawn(bundle, NAMES[flavour], "emoji64", **LOOP)
    monkeypatch.setattr(engine, "CUDA_GRAPHS", False)
    plain = drawn(bundle, NAMES[flavour], "emoji64", **LOOP)
    np.testing.assert_array_equal(plain.latents, recorded.latents)


def test_memory_comes_back(engines: Engines, flavour: str) -> None:
    bundle = engines("emoji64", "fp16")

    def free_after_a_life() -> int:
        with Pipeline(bundle, NAMES[flavour]) as opened:
            next(opened.steps(PROMPTS["emoji64"]))  # cancelled after the first step
            opened.generate(PROMPTS["emoji64"])
        del opened
        gc.collect()
        return int(cuda.call("cudaMemGetInfo")[0])

    free_after_a_life()  # what CUDA and TensorRT load once stays
    assert free_after_a_life() == free_after_a_life() == free_after_a_life()


def test_two_loops_at_once(pipeline: Pipeline) -> None:
    alone = pipeline.generate("a red circle", seed=3, steps=10)
    *_, (left, right) = zip(*(pipeline.steps("a red circle", seed=3, steps=10) for _ in range(2)), strict=True)
    np.testing.assert_array_equal(left.latents, alone.latents)
    np.testing.assert_array_equal(right.latents, alone.latents)


def test_what_is_compiled_is_kept(
    engines: Engines, flavour: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if flavour != "tensorrt_rtx":
        pytest.skip("only TensorRT-RTX compiles where it runs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = drawn(engines("tiny", "fp32"), NAMES[flavour], "tiny")
    folder = cache_folder()
    assert folder is not None
    kept = {path.name: path.read_bytes() for path in folder.glob("engine-*.cache")}
    assert len(kept) == 4  # text encoder, UNet, step and decoder
    again = drawn(engines("tiny", "fp32"), NAMES[flavour], "tiny")
    assert {path.name: path.read_bytes() for path in folder.glob("engine-*.cache")} == kept  # nothing was compiled
    np.testing.assert_array_equal(first.latents, again.latents)


def test_more_than_the_engines_were_built_for(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match=r"would be given .* of shape .*; it was built for .* --size: ldm-export b"):
        pipeline.generate(["a red circle"] * (LARGEST_BATCH + 1))
    with pytest.raises(InputError, match=r"would be given 'latent_sample' of shape"):
        pipeline.generate("a red circle", height=8 * pipeline.bundle.manifest.model["height"])


def test_auto_takes_the_engines(engines: Engines, flavour: str) -> None:
    assert Pipeline(engines("tiny", "fp32")).backend.startswith(flavour)


# --- ONNX Runtime's providers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
def test_pictures_by_onnxruntime(tiny_bundle: Path, provider: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    try:
        open_backend(bundle, provider, None)
    except BackendError as error:
        pytest.skip(str(error))
    theirs, ours = (drawn(bundle, name, "tiny") for name in ("cpu", provider))
    assert ours.backend.split()[2] == provider.removeprefix("ort-")
    for picture, expected in zip(ours.images, theirs.images, strict=True):
        assert psnr_db(picture, expected) >= SAME_PICTURE_DB["fp32"]


# --- refitted engines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [{"stripped": True}, {"stripped": True, "refittable": True}], ids=str)
def test_refitted_engines_draw_as_built_ones(
    engines: Engines, flavour: str, precision: str, switches: dict[str, bool], tmp_path: Path
) -> None:
    from ldm_export.verify.engines.build import EngineSettings, build_engines
    from ldm_export.verify.engines.refit import refit_engines

    capability = cuda.gpus()[0].compute_capability
    sm_versions = (capability.replace(".", ""),) if flavour == "tensorrt_rtx" else ()
    built = engines("tiny", precision)
    bundle = Bundle.open(shutil.copytree(built.path, tmp_path / "bundle", ignore=shutil.ignore_patterns("targets")))
    stripped = build_engines(bundle, EngineSettings(flavour, sm_versions, precision, **switches)).target
    with pytest.raises(BackendError, match="its engines have no weights"):
        drawn(bundle, NAMES[flavour], "tiny")
    full = refit_engines(bundle, stripped.kind, lambda: capability)
    assert (full.stripped, full.refittable) == (False, "refittable" in switches)
    assert full.report["unet"]["engine_bytes"] > stripped.report["unet"]["engine_bytes"]
    theirs, ours = (drawn(each, NAMES[flavour], "tiny") for each in (built, bundle))
    assert relative_error(ours.latents, theirs.latents) < SAME[precision]
