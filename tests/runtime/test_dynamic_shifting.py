"""Models whose noise levels are by the size of the picture, against diffusers' pipeline, and their plans and loops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.bundle import plans as bundle_plans
from ldm_export.bundle.plans import SCHEDULER, add_plan, check_plans, read_plan, with_plan
from ldm_export.cli.main import main
from ldm_export.errors import BundleError, InputError
from ldm_export.families import family_of, open_checkpoint
from ldm_export.plan import Plan, compile_plan, picture_tokens
from ldm_export.runtime import Pipeline
from ldm_export.runtime.tokenizer import tokenizer_of
from ldm_export.verify.loops import add_loop, check_loops
from ldm_export.verify.metrics import psnr_db
from ldm_export.verify.torch_reference import TorchReference
from tests.bundle_fixture import SHIFTING, flow_matching, shift_dynamically
from tests.diffusers_pipelines import LATENT_TOLERANCE, judged, opened
from tests.hostile.base import sound
from tests.scheduler_configs import relative_error

Shifting = Callable[[str], tuple[Path, Path]]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

PROMPTS, SEEDS, STEPS = ["a red circle", "grinning face"], [7, 11], 7
OWN, OTHER = (16, 16), (24, 40)
SAME_PICTURE_DB = 80.0


@pytest.fixture
def bundle(shifting: Shifting, tmp_path: Path) -> Bundle:
    """A copy that a test may add to."""
    return Bundle.open(shutil.copytree(shifting("exponential")[1], tmp_path / "bundle"))


@torch.no_grad()
def assert_same(result: Any, latents: torch.Tensor, vae: Any) -> None:
    assert relative_error(result.latents, latents.numpy()) < LATENT_TOLERANCE
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    pixels = diffusers.image_processor.VaeImageProcessor().postprocess(decoded, output_type="np")
    assert psnr_db(result.images, (pixels * 255).round().astype(np.uint8)) >= SAME_PICTURE_DB


# --- the pictures of diffusers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [OWN, OTHER], ids=str)
@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpmpp-2m"])
@pytest.mark.parametrize("name", SHIFTING)
def test_text_to_image(shifting: Shifting, name: str, sampler: str, size: tuple[int, int]) -> None:
    checkpoint, folder = shifting(name)
    options: dict[str, Any] = {"steps": STEPS, "guidance": 5.0, "height": size[0], "width": size[1]}
    pipeline = Pipeline.open(folder, backend="cpu")
    if (name, sampler) == ("linear", "dpmpp-2m"):  # which has neither
        with pytest.raises(InputError, match=r"time_shift_type = 'linear'; only 'exponential' is supported"):
            pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, **options)
        return
    pipe = opened(diffusers.StableDiffusion3Pipeline, checkpoint)
    result = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, **options)
    assert_same(result, judged(pipe, sampler, PROMPTS, SEEDS, **options), pipe.vae)


@pytest.mark.parametrize("size", [OWN, OTHER], ids=str)
@pytest.mark.parametrize("name", SHIFTING)
def test_image_to_image(shifting: Shifting, name: str, size: tuple[int, int]) -> None:
    checkpoint, folder = shifting(name)
    options: dict[str, Any] = {"steps": STEPS, "guidance": 5.0, "strength": 0.6}
    images = np.random.default_rng(0).integers(0, 256, (len(SEEDS), *size, 3), np.uint8)
    pipe = opened(diffusers.StableDiffusion3Img2ImgPipeline, checkpoint)
    result = Pipeline.open(folder, backend="cpu").generate(PROMPTS, seed=SEEDS, image=images, **options)
    options |= {"image": [Image.fromarray(image) for image in images], "height": size[0], "width": size[1]}
    assert_same(result, judged(pipe, "euler", PROMPTS, SEEDS, **options), pipe.vae)


def test_a_plan_of_another_size_is_seen(shifting: Shifting, bundle: Bundle) -> None:
    wish: dict[str, Any] = {"steps": STEPS, "seed": SEEDS, "height": OTHER[0], "width": OTHER[1]}
    right = Pipeline(bundle, "cpu").generate(PROMPTS, **wish)
    own = replace(read_plan(bundle, "euler", STEPS), tokens=0)
    wrong = Pipeline(bundle.add_file(f"plans/{own.file_name}", own.to_json().encode()), "cpu").generate(PROMPTS, **wish)
    assert relative_error(wrong.latents, right.latents) > 100 * LATENT_TOLERANCE


@pytest.mark.parametrize("size", [OWN, OTHER], ids=str)
def test_in_plain_pytorch(shifting: Shifting, size: tuple[int, int]) -> None:
    """What comparisons take for the checkpoint's pictures."""
    checkpoint, folder = shifting("linear")
    bundle = Bundle.open(folder)
    options: dict[str, Any] = {"sampler": "euler", "steps": STEPS, "guidance": 5.0}
    drawn = Pipeline(bundle, "cpu").generate(PROMPTS, seed=SEEDS, height=size[0], width=size[1], **options)
    tokenizers = [tokenizer_of(bundle, encoder) for encoder in bundle.roles.text_encoders]
    ids, empty_ids = ([read(texts) for read in tokenizers] for texts in (PROMPTS, [""] * len(PROMPTS)))
    reference = TorchReference(open_checkpoint(checkpoint))
    expected = reference.draw(SEEDS, size=size, ids=ids, empty_ids=empty_ids, **options)
    assert relative_error(drawn.latents, expected.trajectory[-1]) < LATENT_TOLERANCE


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        ({"pixels_per_latent": 8, "patch_size": 2}, (1024, 1024), 4096),
        ({"pixels_per_latent": 8, "patch_size": 2}, (512, 768), 32 * 48),
        ({"pixels_per_latent": 8}, (64, 72), 8 * 9),
        ({"pixels_per_latent": 2, "patch_size": 2}, OTHER, 60),
    ],
)
def test_tokens_of_a_picture(model: dict[str, int], size: tuple[int, int], tokens: int) -> None:
    assert picture_tokens(model, *size) == tokens


def test_a_checkpoint_and_its_bundle_have_the_same_tokens(shifting: Shifting) -> None:
    checkpoint = open_checkpoint(shifting("exponential")[0])
    facts = family_of(checkpoint).facts
    assert checkpoint.tokens == picture_tokens(facts, facts["height"], facts["width"]) == 16
    assert checkpoint.drawing.sampler == "euler"
    check_loops(checkpoint, ["unipc-9"])


def test_a_checkpoint_that_shifts_by_a_number_has_no_tokens(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    assert open_checkpoint(kinds("sd3")[0]).tokens == 0
    bundle = Bundle.open(kinds("sd3")[1])
    assert read_plan(bundle, "euler", 9, OTHER) is read_plan(bundle, "euler", 9, OWN)  # compiled once


def test_without_patches_a_token_is_a_latent(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flow_matching(tmp_path / "flow", tiny_checkpoint)
    shift_dynamically(tmp_path / "flow", "exponential")
    opened = open_checkpoint(tmp_path / "flow")
    assert opened.tokens == 64
    assert opened.drawing.steps == 20


@pytest.mark.parametrize(("class_name", "max_shift"), [("UniPCMultistep", 1.16), ("FlowMatchEulerDiscrete", None)])
def test_what_the_file_leaves_out_is_as_in_the_pipeline(
    shifting: Shifting, tmp_path: Path, class_name: str, max_shift: float | None
) -> None:
    checkpoint = Path(shutil.copytree(shifting("exponential")[0], tmp_path / "sd3"))
    config = {"_class_name": f"{class_name}Scheduler", "use_dynamic_shifting": True}
    if class_name.startswith("UniPC"):
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    (checkpoint / SCHEDULER).write_text(json.dumps(config))
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    assert open_checkpoint(checkpoint).scheduler.get("max_shift") == max_shift
    pipe = opened(diffusers.StableDiffusion3Pipeline, checkpoint)
    assert pipe.scheduler.config.get("max_shift", 1.16) == (max_shift or 1.15)


def test_a_plan_is_of_one_size(bundle: Bundle) -> None:
    config = json.loads(bundle.read(SCHEDULER))
    for size, tokens in ((None, 16), (OWN, 16), (OTHER, 60), ((8, 32), 16)):
        plan = read_plan(bundle, "euler", 5, size)
        assert (plan.tokens, plan) == (tokens, compile_plan(config, "euler", 5, tokens=tokens))
    document = json.loads(read_plan(bundle, "euler", 5, OTHER).to_json())
    assert document["tokens"] == 60
    assert Plan.from_json(json.dumps(document)).tokens == 60
    del document["tokens"]
    assert Plan.from_json(json.dumps(document)).tokens == 0
    assert "tokens" not in json.loads(Plan.from_json(json.dumps(document)).to_json())


@pytest.mark.parametrize("tokens", [0, -1, 1.0, True, "16", None, 2**40 + 1])
def test_tokens_that_no_picture_has(bundle: Bundle, tokens: Any) -> None:
    document = json.loads(read_plan(bundle, "euler", 5).to_json()) | {"tokens": tokens}
    with pytest.raises(InputError, match=r"tokens.* Compile the plan again\."):
        Plan.from_json(json.dumps(document))


def test_a_file_is_used_at_its_size_alone(bundle: Bundle) -> None:
    added, plan = add_plan(bundle, "euler", 5)
    assert plan.tokens == 16
    other = replace(plan, init_scale=0.5)
    changed = added.add_file("plans/euler-5.json", other.to_json().encode())
    assert read_plan(changed, "euler", 5) == read_plan(changed, "euler", 5, (8, 32)) == other
    assert read_plan(changed, "euler", 5, OTHER) == read_plan(bundle, "euler", 5, OTHER)
    assert with_plan(changed, "euler", 5) == (changed, other)
    check_plans(changed)


def test_a_file_of_another_size_is_replaced(bundle: Bundle) -> None:
    text = read_plan(bundle, "euler", 5, OTHER).to_json().encode()
    added, plan = with_plan(bundle.add_file("plans/euler-5.json", text), "euler", 5)
    assert plan.tokens == Plan.from_json(added.read("plans/euler-5.json")).tokens == 16


def test_a_file_of_another_size_and_no_scheduler_config(tmp_path: Path) -> None:
    draft = sound()
    del draft.files[SCHEDULER]
    draft.put("plans/ddim-2.json", draft.document("plans/ddim-2.json") | {"tokens": 16})
    (tmp_path / "bundle").mkdir()
    draft.write(tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert read_plan(bundle, "ddim", 2).tokens == 16
    with pytest.raises(
        InputError, match="no plan for 'ddim' with 2 steps and pictures of 240 tokens, and no scheduler"
    ):
        read_plan(bundle, "ddim", 2, OTHER)


def test_a_bundle_that_says_no_size(bundle: Bundle) -> None:
    del bundle.manifest.model["height"]
    with pytest.raises(BundleError, match="does not say how large the model's pictures are"):
        add_plan(bundle, "euler", 5)
    assert read_plan(bundle, "euler", 5, OTHER).tokens == 60


def test_plans_of_many_sizes_are_not_kept(bundle: Bundle) -> None:
    pipeline = Pipeline(bundle, "cpu")
    for height in range(8, 80, 4):
        next(iter(pipeline.steps("a cat", steps=1, height=height, width=16)))
    assert bundle_plans._compiled.cache_info().currsize <= 8


# --- loops and commands ---------------------------------------------------------------------------------------------


def test_a_loop_draws_at_its_size_alone(bundle: Bundle) -> None:
    looped = add_loop(bundle, f"euler-{STEPS}")
    assert json.loads(looped.read(f"plans/euler-{STEPS}.json"))["tokens"] == 16
    pipeline, wish = Pipeline(looped, "cpu"), {"steps": STEPS, "seed": SEEDS, "guidance": 5.0}
    for size in (OWN, (8, 32)):  # which has as many tokens
        sizes = {"height": size[0], "width": size[1]}
        whole = pipeline.generate(PROMPTS, **wish, **sizes, whole=True)
        assert relative_error(whole.latents, pipeline.generate(PROMPTS, **wish, **sizes).latents) < LATENT_TOLERANCE
    message = r"The whole loop euler-7 was asked for at 24x40; it is made for 16x16, since .* draw step by step\."
    with pytest.raises(InputError, match=message):
        pipeline.generate(PROMPTS, **wish, height=OTHER[0], width=OTHER[1], whole=True)
    pipeline.generate(PROMPTS, **wish, height=OTHER[0], width=OTHER[1])


def test_commands(shifting: Shifting, bundle: Bundle, tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, list(arguments), catch_exceptions=False)

    added = run("plan", str(bundle.path), "--sampler", "euler", "--steps", "5", "--loop")
    assert added.exit_code == 0, added.stderr
    assert "plans/euler-5.json: 5 network calls, for pictures of 16x16" in added.stdout
    said = json.loads(run("plan", str(bundle.path), "--sampler", "euler", "--steps", "6", "--json").stdout)
    assert (said["rows"], said["size"]) == (6, "16x16")
    assert run("verify", str(bundle.path)).exit_code == 0
    latents = tmp_path / "latents.npy"
    draw = ["generate", str(bundle.path), "a cat", "--steps", "5", "-o", str(tmp_path / "a.png"), "--backend", "cpu"]
    assert run(*draw, "--size", "24x40", "--latents", str(latents)).exit_code == 0
    plain = Pipeline.open(shifting("exponential")[1], backend="cpu")  # without the file
    expected = plain.generate("a cat", steps=5, height=24, width=40).latents
    np.testing.assert_array_equal(np.load(latents), expected)
    assert run(*draw, "--whole").exit_code == 0
    refused = run(*draw, "--whole", "--size", "24x40")
    assert refused.exit_code == 2
    assert "it is made for 16x16" in refused.stderr
