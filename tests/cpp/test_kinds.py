"""Every kind of model, judged by diffusers: Python and C++, plain graphs, the target and the loop graph.

Size, batch, prompts and number of steps are none that were exported.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.runtime import Pipeline
from ldm_export.verify.loops import add_loop
from ldm_export.verify.metrics import psnr_db
from tests.bundle_fixture import CLASSES, SLOW_KINDS
from tests.diffusers_pipelines import LATENT_TOLERANCE, judged, opened
from tests.scheduler_configs import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

PROMPTS = ["a red circle", "two green triangles on white", "grinning face"]
SEEDS = [7, 11, 2]
HEIGHT, WIDTH, STEPS = 24, 40, 7
SAME_PICTURE_DB = 80.0
FORMS = ("plain", "target", "loop")
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("StableDiffusion", {"sampler": "dpmpp-2m", "guidance": 5.0}),
    "sd2": ("StableDiffusion", {"sampler": "ddim", "guidance": 5.0}),
    "sdxl": ("StableDiffusionXL", {"sampler": "euler", "guidance": 5.0}),
    "sdxl, negative": ("StableDiffusionXL", {"sampler": "euler", "guidance": 5.0, "negative_prompt": "a blue square"}),
    "ssd-1b": ("StableDiffusionXL", {"sampler": "dpmpp-2m", "guidance": 5.0}),
    "lcm": ("LatentConsistencyModel", {"sampler": "lcm", "guidance": 6.5}),
    "flow": ("StableDiffusion", {"sampler": "euler", "guidance": 5.0}),
    "flow, heun": ("StableDiffusion", {"sampler": "heun", "guidance": 5.0}),
    "flow, unipc": ("StableDiffusion", {"sampler": "unipc", "guidance": 5.0}),
    "sd3": ("StableDiffusion3", {"sampler": "euler", "guidance": 5.0}),
    "sd3, negative": ("StableDiffusion3", {"sampler": "dpmpp-2m", "guidance": 5.0, "negative_prompt": "a blue square"}),
    "sd3 with t5": ("StableDiffusion3", {"sampler": "euler", "guidance": 5.0}),
    "pixart": ("PixArtSigma", {"sampler": "dpmpp-2m", "guidance": 5.0}),
    "pixart, negative": ("PixArtSigma", {"sampler": "euler", "guidance": 5.0, "negative_prompt": "a BLUE square"}),
    "pixart alpha": ("PixArtAlpha", {"sampler": "euler", "guidance": 5.0}),
    "prx": ("PRX", {"sampler": "euler", "guidance": 5.0}),
    "prx, negative": ("PRX", {"sampler": "euler", "guidance": 5.0, "negative_prompt": "a blue square"}),
    "prx with dc-ae": ("PRX", {"sampler": "dpmpp-2m", "guidance": 5.0}),
    "refiner": ("StableDiffusionXL", {"sampler": "euler", "guidance": 5.0}),
}
"""The kind of each case, before a comma, with its pipelines in diffusers and how it is drawn."""
WITHOUT_TEXT = {"unconditional": None, "class-conditional": [CLASSES - 1, 0, 2]}


@pytest.fixture(scope="module")
def bundles(
    tiny_bundle: Path, kinds: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Path]:
    """A function from a kind, one of `FORMS` and a sampler to a bundle."""
    folder = tmp_path_factory.mktemp("forms")

    @cache
    def make(kind: str, form: str, sampler: str) -> Path:
        plain = tiny_bundle if kind == "text" else kinds(kind)[1]
        if form == "plain":
            return plain
        bundle = Bundle.open(shutil.copytree(plain, folder / f"{kind}-{form}-{sampler}"))
        if form == "loop":
            return add_loop(bundle, f"{sampler}-{STEPS}").path
        build_ort_cpu(bundle)
        return bundle.path

    return make


def drawn_by_both(open_cpp: Callable[..., Any], folder: Path, form: str, **options: Any) -> dict[str, Any]:
    """The pictures and latents of each runtime, by its name."""
    whole = form == "loop"
    python = Pipeline.open(folder, backend="cpu")
    cpp = open_cpp(folder, warn=pytest.fail)
    assert ("ort-cpu" in python.backend) == ("ort-cpu" in cpp.info().backend.decode()) == (form == "target")
    by_python = python.generate(seed=SEEDS, steps=STEPS, whole=whole, **options)
    given: dict[str, Any] = {"steps": STEPS, "whole": int(whole), "seeds": (ctypes.c_int64 * len(SEEDS))(*SEEDS)}
    prompts = options.pop("prompts", None)
    if prompts is None:
        given["count"] = len(SEEDS)
    if (negative := options.pop("negative_prompt", None)) is not None:
        given |= {"negative_prompts": (ctypes.c_char_p * 1)(negative.encode()), "negative_prompt_count": 1}
    if (labels := options.pop("class_labels", None)) is not None:
        given["class_labels"] = (ctypes.c_int64 * len(labels))(*labels)
    if (image := options.pop("image", None)) is not None:
        given |= {
            "image": image.tobytes(),
            "image_count": len(image),
            "height": image.shape[1],
            "width": image.shape[2],
        }
    options["sampler"] = options["sampler"].encode()
    latents: list[Any] = []

    def keep(step: Any) -> None:
        latents[:] = [np.ctypeslib.as_array(step.latents, tuple(step.latents_shape)).copy()]

    pixels = np.frombuffer(cpp.draw(prompts, callback=keep, **given, **options), np.uint8)
    by_cpp = SimpleNamespace(images=pixels.reshape(by_python.images.shape), latents=latents[0])
    return {"Python": by_python, "C++": by_cpp}


@torch.no_grad()
def check(results: dict[str, Any], latents: torch.Tensor, vae: Any) -> None:
    shift = getattr(vae.config, "shift_factor", None) or 0
    decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample
    pixels = diffusers.image_processor.VaeImageProcessor().postprocess(decoded, output_type="np")
    pictures = (pixels * 255).round().astype(np.uint8)
    for runtime, result in results.items():
        assert relative_error(result.latents, latents.numpy()) < LATENT_TOLERANCE, runtime
        assert psnr_db(result.images, pictures) >= SAME_PICTURE_DB, runtime


def waves(height: int, width: int) -> np.ndarray[Any, Any]:
    """A smooth picture a seed, uint8 (B, height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    values = [np.stack([np.sin(x / 5 + k), np.cos(y / 4), np.sin((x + y) / 7 - k)], axis=-1) for k in range(len(SEEDS))]
    return np.asarray(((np.stack(values) * 0.5 + 0.5) * 255).round().astype(np.uint8))


def in_forms(cases: Iterable[str], forms: Iterable[str]) -> list[Any]:
    """Every case in every form; those that need more graphs than others already show are slow."""
    cases = [*cases]
    quick = {(case, "plain") for case in cases if case not in SLOW_KINDS} | {("sdxl", form) for form in forms}
    slow = pytest.mark.slow
    return [
        pytest.param(case, form, marks=() if (case, form) in quick else slow) for case, form in product(cases, forms)
    ]


@pytest.mark.parametrize(("case", "form"), in_forms([case for case in TEXT if case != "refiner"], FORMS))
def test_text_to_image(
    open_cpp: Callable[..., Any],
    bundles: Callable[[str, str, str], Path],
    kinds: Callable[[str], tuple[Path, Path]],
    tiny_checkpoint: Path,
    case: str,
    form: str,
) -> None:
    kind, (pipeline, given) = case.partition(",")[0], TEXT[case]
    checkpoint = tiny_checkpoint if kind == "text" else kinds(kind)[0]
    pipe, options = opened(getattr(diffusers, f"{pipeline}Pipeline"), checkpoint), dict(given)
    sampler, sizes = options.pop("sampler"), {"height": HEIGHT, "width": WIDTH}
    results = drawn_by_both(
        open_cpp, bundles(kind, form, sampler), form, prompts=PROMPTS, sampler=sampler, **options, **sizes
    )
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(PROMPTS)
    check(results, judged(pipe, sampler, PROMPTS, SEEDS, steps=STEPS, **options, **sizes), pipe.vae)


FROM_IMAGES = [
    case
    for case, (pipeline, _) in TEXT.items()
    if hasattr(diffusers, f"{pipeline}Img2ImgPipeline")
    and case != "lcm"  # whose pipeline spreads its steps over the strength; all others leave out the first, as here
]


@pytest.mark.parametrize(("case", "form"), in_forms(FROM_IMAGES, FORMS[:2]))
def test_image_to_image(
    open_cpp: Callable[..., Any],
    bundles: Callable[[str, str, str], Path],
    kinds: Callable[[str], tuple[Path, Path]],
    tiny_checkpoint: Path,
    case: str,
    form: str,
) -> None:
    kind, (pipeline, given) = case.partition(",")[0], TEXT[case]
    checkpoint = tiny_checkpoint if kind == "text" else kinds(kind)[0]
    pipe, options = opened(getattr(diffusers, f"{pipeline}Img2ImgPipeline"), checkpoint), {**given, "strength": 0.6}
    sampler = options.pop("sampler")
    image = waves(HEIGHT, WIDTH)
    results = drawn_by_both(
        open_cpp, bundles(kind, form, sampler), form, prompts=PROMPTS, sampler=sampler, image=image, **options
    )
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(PROMPTS)
    if pipeline == "StableDiffusion3":  # which else makes the image as large as the model's own pictures
        options |= {"height": HEIGHT, "width": WIDTH}
    pictures = [Image.fromarray(picture) for picture in image]
    check(results, judged(pipe, sampler, PROMPTS, SEEDS, image=pictures, steps=STEPS, **options), pipe.vae)


@pytest.mark.parametrize(("kind", "form"), in_forms(WITHOUT_TEXT, FORMS))
@torch.no_grad()
def test_models_without_text(
    open_cpp: Callable[..., Any],
    bundles: Callable[[str, str, str], Path],
    kinds: Callable[[str], tuple[Path, Path]],
    kind: str,
    form: str,
) -> None:
    """diffusers has no pipeline for these: its scheduler, UNet and autoencoder, in a loop of this test's own."""
    checkpoint, labels = kinds(kind)[0], WITHOUT_TEXT[kind]
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(checkpoint / "scheduler")
    scheduler.set_timesteps(STEPS)
    noise = [torch.randn(1, 4, HEIGHT // 2, WIDTH // 2, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    latents = torch.cat(noise)
    for timestep in scheduler.timesteps:
        classes = None if labels is None else torch.tensor(labels)
        output = unet(latents, timestep, None, class_labels=classes).sample
        latents = scheduler.step(output, timestep, latents).prev_sample
    given: dict[str, Any] = {"sampler": "ddim", "height": HEIGHT, "width": WIDTH}
    if labels is not None:
        given["class_labels"] = labels
    check(drawn_by_both(open_cpp, bundles(kind, form, "ddim"), form, **given), latents, vae)


@pytest.mark.parametrize("form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
@torch.no_grad()
def test_a_transformer_that_reads_a_class(
    open_cpp: Callable[..., Any],
    bundles: Callable[[str, str, str], Path],
    kinds: Callable[[str], tuple[Path, Path]],
    form: str,
) -> None:
    """diffusers' pipeline draws squares of one size."""
    pipe, labels, decoded = opened(diffusers.DiTPipeline, kinds("dit")[0]), [999, 0, 2], list[torch.Tensor]()
    decode = pipe.vae.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda latents: decoded.append(latents) or decode(latents))
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
        pipe(class_labels=labels, guidance_scale=3.0, generator=generators, num_inference_steps=STEPS)
    given: dict[str, Any] = {"sampler": "ddim", "guidance": 3.0, "class_labels": labels}
    results = drawn_by_both(open_cpp, bundles("dit", form, "ddim"), form, **given)
    check(results, decoded[0] * pipe.vae.config.scaling_factor, pipe.vae)
