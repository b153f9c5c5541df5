"""Drawing from a bundle, with diffusers as the judge: the same latents and pictures for the same seeds."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.errors import BackendError, BundleError, CancelledError, InputError
from ldm_export.plan import SAMPLERS, compile_plan
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeGraph
from tests.bundle_fixture import CLASSES
from tests.diffusers_pipelines import LATENT_TOLERANCE, assert_same, judged, opened
from tests.scheduler_configs import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

PROMPTS = ["a red circle", "two green triangles on white"]
NEGATIVES = ["a blue square", "smiling eyes"]
SEEDS = [7, 11]
STEPS = 10
CONDITIONS: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 4.0, "negative_prompt": NEGATIVES},
    "guidance off": {"guidance": 1.0},
}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle, verify=True)


@pytest.fixture(scope="module")
def judge(tiny_checkpoint: Path) -> Any:
    return opened(diffusers.StableDiffusionPipeline, tiny_checkpoint)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray[Any, Any]:
    """Two smooth pictures, uint8 (2, 16, 24, 3)."""
    y, x = np.mgrid[0:16, 0:24]
    waves = [np.stack([np.sin(x / 5 + k), np.cos(y / 4), np.sin((x + y) / 7 - k)], axis=-1) for k in range(2)]
    return ((np.stack(waves) * 0.5 + 0.5) * 255).round().astype(np.uint8)


# --- the same pictures as diffusers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image(pipeline: Pipeline, judge: Any, sampler: str, condition: str) -> None:
    options = {"steps": 8 if sampler == "lcm" else STEPS, **CONDITIONS[condition]}
    result = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, **options)
    assert_same(result, judged(judge, sampler, PROMPTS, SEEDS, **options), judge.vae)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "dpmpp-2m-sde", "euler", "euler-ancestral", "heun", "unipc"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image(
    pipeline: Pipeline, judge: Any, pictures: np.ndarray[Any, Any], sampler: str, strength: float
) -> None:
    options = {"steps": STEPS, "guidance": 4.0, "negative_prompt": NEGATIVES, "strength": strength}
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**judge.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    images = [Image.fromarray(picture) for picture in pictures]
    result = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, image=pictures, **options)
    assert_same(result, judged(pipe, sampler, PROMPTS, SEEDS, image=images, **options), judge.vae)


@pytest.mark.parametrize("size", [(16, 32), (40, 24), (18, 14)], ids=str)
def test_other_sizes(pipeline: Pipeline, judge: Any, size: tuple[int, int]) -> None:
    options = {"steps": STEPS, "guidance": 4.0, "height": size[0], "width": size[1]}
    result = pipeline.generate(PROMPTS, seed=SEEDS, **options)
    assert result.images.shape == (2, *size, 3)
    assert_same(result, judged(judge, "ddim", PROMPTS, SEEDS, **options), judge.vae)


@pytest.mark.parametrize("negative", [None, ["", ""], NEGATIVES], ids=["zeros", "empty texts", "negative prompts"])
def test_stable_diffusion_xl(kinds: Callable[[str], tuple[Path, Path]], negative: list[str] | None) -> None:
    checkpoint, bundle = kinds("sdxl")
    pipe = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    options = {"steps": STEPS, "guidance": 5.0, "negative_prompt": negative, "height": 16, "width": 24}
    result = Pipeline.open(bundle).generate(PROMPTS, sampler="euler", seed=SEEDS, **options)
    assert_same(result, judged(pipe, "euler", PROMPTS, SEEDS, **options), pipe.vae)


@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_latent_consistency(kinds: Callable[[str], tuple[Path, Path]], guidance: float) -> None:
    checkpoint, bundle = kinds("lcm")
    pipe = opened(diffusers.LatentConsistencyModelPipeline, checkpoint)
    result = Pipeline.open(bundle).generate(PROMPTS, seed=SEEDS, guidance=guidance)
    assert_same(result, judged(pipe, "lcm", PROMPTS, SEEDS, steps=4, guidance=guidance), pipe.vae)


@pytest.mark.parametrize(
    ("kind", "labels"), [("unconditional", None), ("class-conditional", [CLASSES - 1, 0])], ids=["none", "class"]
)
@torch.no_grad()
def test_models_without_text(kinds: Callable[[str], tuple[Path, Path]], kind: str, labels: list[int] | None) -> None:
    checkpoint, bundle = kinds(kind)
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(checkpoint / "scheduler")
    scheduler.set_timesteps(STEPS)
    classes = None if labels is None else torch.tensor(labels)
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    for timestep in scheduler.timesteps:
        output = unet(latents, timestep, None, class_labels=classes).sample
        latents = scheduler.step(output, timestep, latents).prev_sample
    assert_same(Pipeline.open(bundle).generate(seed=SEEDS, steps=STEPS, class_labels=labels), latents, vae)


def test_a_wrong_step_is_seen(pipeline: Pipeline, judge: Any) -> None:
    result = pipeline.generate(PROMPTS, seed=SEEDS, steps=STEPS, guidance=4.01)
    latents = judged(judge, "ddim", PROMPTS, SEEDS, steps=STEPS, guidance=4.0)
    assert relative_error(result.latents, latents.numpy()) > LATENT_TOLERANCE


# --- seeds and batches ----------------------------------------------------------------------------------------------


def test_image_k_of_a_batch_uses_seed_plus_k(pipeline: Pipeline) -> None:
    assert pipeline.generate(PROMPTS, steps=STEPS, seed=3).seeds == (3, 4)
    counted = pipeline.generate(PROMPTS, steps=STEPS, seed=3).latents
    np.testing.assert_array_equal(counted, pipeline.generate(PROMPTS, steps=STEPS, seed=[3, 4]).latents)


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_a_batch_is_its_pictures_drawn_singly(pipeline: Pipeline, pictures: np.ndarray[Any, Any], sampler: str) -> None:
    options = {"sampler": sampler, "steps": STEPS}
    batch = pipeline.generate(PROMPTS, seed=SEEDS, image=pictures, negative_prompt=NEGATIVES, **options)
    for k, seed in enumerate(SEEDS):
        single = pipeline.generate(PROMPTS[k], seed=seed, image=pictures[k], negative_prompt=NEGATIVES[k], **options)
        assert relative_error(batch.latents[k : k + 1], single.latents) < 1e-5


def test_one_image_serves_the_whole_batch(pipeline: Pipeline, pictures: np.ndarray[Any, Any]) -> None:
    one = pipeline.generate(PROMPTS, steps=STEPS, image=pictures[0])
    two = pipeline.generate(PROMPTS, steps=STEPS, image=pictures[[0, 0]])
    np.testing.assert_array_equal(one.latents, two.latents)


# --- the loop in the caller's hands ---------------------------------------------------------------------------------


def test_the_callback_sees_every_step_and_the_live_latents(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int, float]] = []
    copies: list[np.ndarray[Any, Any]] = []
    buffers = set()

    def watch(step: Any) -> None:
        seen.append((step.index, step.count, step.timestep))
        copies.append(step.latents.copy())
        buffers.add(step.latents.ctypes.data)

    result = pipeline.generate(PROMPTS, steps=STEPS, seed=SEEDS, callback=watch)
    rows = compile_plan(scheduler_config(pipeline), "ddim", STEPS).rows
    assert seen == [(index, STEPS, row.timestep) for index, row in enumerate(rows)]
    assert len(buffers) == 1
    assert all(np.abs(before - after).max() > 0 for before, after in itertools.pairwise(copies))
    np.testing.assert_array_equal(copies[-1], result.latents)


def scheduler_config(pipeline: Pipeline) -> dict[str, Any]:
    config: dict[str, Any] = diffusers.DDIMScheduler.load_config(pipeline.bundle.path / "scheduler")
    return config


def test_a_preview_is_the_decoded_latents(pipeline: Pipeline) -> None:
    *_, before, last = [step.decode() for step in pipeline.steps(PROMPTS, steps=STEPS)]
    assert before.shape == last.shape == (2, 16, 16, 3)
    assert before.dtype == last.dtype == np.uint8
    np.testing.assert_array_equal(last, pipeline.generate(PROMPTS, steps=STEPS).images)


@pytest.mark.parametrize("stop", [0, 4])
def test_a_callback_that_returns_false_cancels(pipeline: Pipeline, stop: int) -> None:
    with pytest.raises(CancelledError, match=f"after step {stop + 1} of {STEPS}"):
        pipeline.generate(PROMPTS, steps=STEPS, callback=lambda step: step.index < stop)


def test_steps_can_be_abandoned_and_the_pipeline_used_again(pipeline: Pipeline) -> None:
    expected = pipeline.generate(PROMPTS, steps=STEPS, sampler="dpmpp-2m").latents
    for step in pipeline.steps(PROMPTS, steps=STEPS, sampler="dpmpp-2m", seed=99):
        if step.index == 3:
            break
    *_, last = pipeline.steps(PROMPTS, steps=STEPS, sampler="dpmpp-2m")
    np.testing.assert_array_equal(last.latents, expected)


def test_two_loops_interleave(pipeline: Pipeline) -> None:
    expected = [pipeline.generate(prompt, steps=STEPS).latents for prompt in PROMPTS]
    *_, (first, second) = zip(*(pipeline.steps(prompt, steps=STEPS) for prompt in PROMPTS), strict=True)
    np.testing.assert_array_equal(first.latents, expected[0])
    np.testing.assert_array_equal(second.latents, expected[1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The inputs of every run of a text encoder, as they happen."""
    made: list[dict[str, Any]] = []
    run = OnnxRuntimeGraph.run

    def counted(self: OnnxRuntimeGraph, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.spec.name.startswith("text_encoder"):
            made.append(dict(inputs))
        return run(self, inputs)

    monkeypatch.setattr(OnnxRuntimeGraph, "run", counted)
    return made


def test_a_prompt_is_encoded_once(tiny_bundle: Path, calls: list[dict[str, Any]]) -> None:
    pipeline = Pipeline.open(tiny_bundle)
    first = pipeline.generate(PROMPTS, steps=STEPS)
    assert [len(call["input_ids"]) for call in calls] == [2, 1]  # the prompts, then the empty negative
    again = pipeline.generate([f"  {prompt.upper()} " for prompt in PROMPTS], steps=STEPS)  # the same token ids
    assert len(calls) == 2
    np.testing.assert_array_equal(first.latents, again.latents)
    pipeline.generate([PROMPTS[1], "a blue circle", "a blue circle"], steps=STEPS)
    assert [len(call["input_ids"]) for call in calls[2:]] == [1]


def test_the_unet_reads_and_writes_where_it_did(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[dict[str, Any]] = []
    bind = OnnxRuntimeGraph.bind

    def watched(
        self: OnnxRuntimeGraph, inputs: dict[str, Any], outputs: dict[str, Any], fixed: Sequence[str], every: int
    ) -> Callable[[], None]:
        bound.append({**inputs, **outputs})
        assert set(fixed) == {"encoder_hidden_states"}
        return bind(self, inputs, outputs, fixed, every)

    monkeypatch.setattr(OnnxRuntimeGraph, "bind", watched)
    seen: list[np.ndarray[Any, Any]] = []
    pipeline.generate(PROMPTS, steps=STEPS, guidance=1.0, callback=lambda _: seen.append(bound[0]["sample"].copy()))
    assert len(bound) == 1  # once for the whole loop
    assert len({array.tobytes() for array in seen}) == STEPS  # and every step puts its own input there
    assert set(bound[0]) == {"sample", "timestep", "encoder_hidden_states", "out_sample"}


# --- backends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requested", ["auto", "cpu"])
def test_the_backend_is_reported_as_asked_for_and_as_used(tiny_bundle: Path, requested: str) -> None:
    pipeline = Pipeline.open(tiny_bundle, backend=requested)
    assert pipeline.requested_backend == requested
    assert pipeline.backend.startswith("onnxruntime ")
    assert pipeline.backend.endswith(" cpu")
    assert pipeline.generate(PROMPTS, steps=STEPS).backend == pipeline.backend


def test_cuda_that_is_not_there_is_refused_by_name(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"Install 'ldm_export\[gpu\]'"):
        Pipeline.open(tiny_bundle, backend="cuda")


def test_a_backend_that_does_not_exist(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="There is no backend 'directml'; there are auto, cpu, openvino, tensorrt-rtx"):
        Pipeline.open(tiny_bundle, backend="directml")


def test_onnxruntime_that_is_not_installed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'ldm_export\[cpu\]'"):
        Pipeline.open(tiny_bundle)


def test_an_error_of_onnxruntime_becomes_one_sentence(tiny_bundle: Path) -> None:
    graph = OnnxRuntimeBackend(Bundle.open(tiny_bundle), "cpu", None).load("text_encoder")
    with pytest.raises(BackendError, match="ONNX Runtime could not run text_encoder: ") as raised:
        graph.run({"input_ids": np.full((1, 16), 10**6)})  # far beyond the vocabulary
    assert "\n" not in str(raised.value)


# --- what cannot be drawn -------------------------------------------------------------------------------------------

GREY = np.full((16, 16, 3), 127, np.uint8)
BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown sampler": (
        {"sampler": "magic"},
        "no plan for 'magic' with 20 steps, .* known are ddpm, ddim, plms.* Use one",
    ),
    "too many steps": ({"steps": 1001}, "no plan for 'ddim' with 1001 steps, .* it must be 1 to 1000, .* Choose one"),
    "no integer steps": ({"sampler": "unipc", "steps": 1000}, "do not fit into 1000 training timesteps.*Use fewer"),
    "zero steps": ({"steps": 0}, "steps is 0; give a whole number from 1"),
    "odd size": ({"height": 17}, "17x16 does not fit; height and width must be multiples of 2. Use 16x16"),
    "zero size": ({"width": 0}, "width is 0; give a whole number from 1"),
    "negative size": ({"height": -16}, "height is -16; "),
    "fractional size": ({"height": 16.5}, r"height is 16\.5; give a whole number"),
    "too few seeds": ({"seed": [1]}, "1 seeds were given for 2 pictures"),
    "seed of text": ({"seed": ["a", "b"]}, "seed"),
    "fractional seed": ({"seed": 0.5}, "seed"),
    "seed beyond 64 bits": ({"seed": 2**64}, "seed"),
    "too many negatives": ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts were given for 2 pictures"),
    "guidance NaN": ({"guidance": float("nan")}, "guidance is nan"),
    "guidance infinite": ({"guidance": float("inf")}, "guidance is inf"),
    "negative guidance": ({"guidance": -1.0}, r"guidance is -1\.0"),
    "no strength": ({"image": GREY, "strength": 0.0}, r"strength 0\.0"),
    "too much strength": (
        {"image": GREY, "strength": 1.5},
        r"strength is 1\.5; give a number from 0 to 1",
    ),
    "strength NaN": ({"image": GREY, "strength": float("nan")}, "strength is nan"),
    "strength below a step": ({"image": GREY, "strength": 0.01}, "leaves nothing to run"),
    "image of floats": ({"image": GREY / 255}, r"shape \(16, 16, 3\) and dtype float64"),
    "grey image": ({"image": GREY[..., 0]}, r"shape \(16, 16\)"),
    "image with alpha": ({"image": np.zeros((16, 16, 4), np.uint8)}, "Convert it to RGB"),
    "too many images": ({"image": np.stack([GREY] * 3)}, "3 images were given for 2 pictures"),
    "no images": ({"image": np.zeros((0, 16, 16, 3), np.uint8)}, "0 images were given for 2 pictures"),
    "image of another size": ({"image": GREY, "height": 32}, "32xany .*16x16.*Resize"),
    "odd image": ({"image": GREY[:15]}, "15x16 does not fit"),
    "class labels": ({"class_labels": [0, 1]}, "2 prompts and 2 class labels"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_wrong_options_are_one_sentence_before_the_first_step(pipeline: Pipeline, case: str) -> None:
    options, message = BAD_OPTIONS[case]
    with pytest.raises(InputError, match=message) as raised:
        pipeline.steps(PROMPTS, **options)  # checked by the call itself, not by the first `next`
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=message):
        pipeline.generate(PROMPTS, **options)


@pytest.mark.parametrize("prompts", [None, [], ()])
def test_a_text_model_needs_prompts(pipeline: Pipeline, prompts: Sequence[str] | None) -> None:
    with pytest.raises(InputError, match=r"0 prompts .* takes a prompt a picture"):
        pipeline.steps(prompts)


def test_a_prompt_is_text(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="prompt is 7; give text"):
        pipeline.steps(["a red circle", 7])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("kind", "prompts", "options", "message"),
    [
        ("unconditional", ["a cat"], {}, "takes neither: give seed a list"),
        ("unconditional", None, {"seed": []}, "seed"),
        ("unconditional", None, {"class_labels": [1]}, "takes neither"),
        ("class-conditional", None, {}, "no class labels were given; this model takes class_labels"),
        ("class-conditional", ["a cat"], {"class_labels": [1]}, "1 prompts and 1 class labels"),
        ("class-conditional", None, {"class_labels": []}, "class label"),
        ("class-conditional", None, {"class_labels": [0, CLASSES]}, f"class label {CLASSES}.* 0 to {CLASSES - 1}"),
        ("class-conditional", None, {"class_labels": [-1]}, f"class label -1.* 0 to {CLASSES - 1}"),
        ("class-conditional", None, {"class_labels": [0.5]}, "class label"),
        ("inpainting", None, {}, r"reads a picture and a mask of what is drawn anew .* Give both: image and mask"),
    ],
)
def test_models_of_other_kinds_say_what_they_take(
    kinds: Callable[[str], tuple[Path, Path]],
    kind: str,
    prompts: list[str] | None,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        Pipeline.open(kinds(kind)[1]).steps(prompts, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " \t\n",
        "🦊👩\u200d",
        "\ud83e",
        "\x00\x07\x1b[31m",
        "\u202eمرحبا",
        "a\u0301\u0327" * 3,
        "\ufeff\ufffe",
        "<|endoftext|>",
    ],
    ids=ascii,
)
def test_any_unicode_is_a_prompt(pipeline: Pipeline, prompt: str) -> None:
    assert np.isfinite(pipeline.generate(prompt, steps=STEPS, negative_prompt=prompt).latents).all()


def test_a_long_prompt_is_cut_with_a_warning(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match="token") as warned:
        long = pipeline.generate("red circle " * 40, steps=STEPS)
    assert {warning.filename for warning in warned} == {__file__}
    with pytest.warns(UserWarning, match="token"):
        longer = pipeline.generate("red circle " * 50, steps=STEPS)
    np.testing.assert_array_equal(long.latents, longer.latents)


def test_a_plan_that_is_no_plan(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    pipeline = Pipeline.open(bundle)
    pipeline.bundle = pipeline.bundle.add_file("plans/ddim-20.json", b"[]")
    with pytest.raises(BundleError, match=r"plans/ddim-20\.json: a plan file"):
        pipeline.steps(PROMPTS)
