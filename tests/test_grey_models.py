"""Own-trained shapes through the whole chain: grey pictures of an odd number of latents, by class or by nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.generate import pixels_from_sample
from ldm_reference.samplers import ddim
from ldm_reference.schedules import alphas_cumprod_from_config, leading_timesteps
from ldm_reference.unet import UNet2DConditionModel
from PIL import Image

from ldm_export.cli import main
from ldm_export.errors import InputError
from ldm_export.export.chain import compare_bundle
from ldm_export.export.parity import SIZES
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.verify.metrics import psnr_db
from tests.scheduler_configs import relative_error

RESOLUTION, SIDE, CLASSES, STEPS = 14, 7, 3, 10
TOLERANCE = 2e-5
CONFIG = f"""
seed = 1
resolution = {RESOLUTION}
mixed_precision = "bf16"

[vae_stage]
steps = 3
batch_size = 4
learning_rate = 1e-2
warmup_steps = 1

[unet_stage]
steps = 3
batch_size = 4
learning_rate = 1e-2
warmup_steps = 1

[vae]
in_channels = 1
out_channels = 1
sample_size = {RESOLUTION}
latent_channels = 2
mid_block_add_attention = false
block_out_channels = [4, 8]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D"]
norm_num_groups = 4

[unet]
sample_size = {SIDE}
in_channels = 2
out_channels = 2
block_out_channels = [4, 8]
mid_block_type = "UNetMidBlock2D"
layers_per_block = 1
norm_num_groups = 2
attention_head_dim = 4
REST_OF_THE_UNET

[scheduler]
_class_name = "DDIMScheduler"
num_train_timesteps = 1000
beta_start = 0.0001
beta_end = 0.02
beta_schedule = "squaredcos_cap_v2"
prediction_type = "epsilon"
steps_offset = 1
clip_sample = false
"""
FLOW = """[scheduler]
_class_name = "FlowMatchEulerDiscreteScheduler"
num_train_timesteps = 1000
shift = 2.0
"""
KINDS = {
    "class-conditional": f"""
down_block_types = ["AttnDownBlock2D", "AttnDownBlock2D"]
up_block_types = ["AttnUpBlock2D", "AttnUpBlock2D"]
num_class_embeds = {CLASSES}
""",
    "unconditional": """
down_block_types = ["DownBlock2D", "AttnDownBlock2D"]
up_block_types = ["UpBlock2D", "UpBlock2D"]
""",
}
SEEDS = [5, 9]

Model = tuple[Path, Path]
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six grey pictures of 14 x 14, each of one of three classes."""
    folder = tmp_path_factory.mktemp("grey")
    lines = []
    for number in range(6):
        pixels = np.full((RESOLUTION, RESOLUTION), 40 * (number % CLASSES), np.uint8)
        pixels[number : number + 5, 3:9] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "label": number % CLASSES}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def models(data: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Checkpoint and bundle of each of `KINDS`, made with the commands that a user has."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for kind, unet in KINDS.items():
        (folder / f"{kind}.toml").write_text(CONFIG.replace("REST_OF_THE_UNET", unet))
        checkpoint, bundle = folder / kind, folder / f"{kind}.bundle"
        for arguments in (
            ["train", "--data", data, "--config", folder / f"{kind}.toml", "-o", checkpoint],
            ["export", checkpoint, "-o", bundle],
        ):
            done = CliRunner().invoke(main, [str(argument) for argument in arguments])
            assert done.exit_code == 0, done.output
        made[kind] = checkpoint, bundle
    return made


def labels_of(kind: str) -> list[int] | None:
    return [CLASSES - 1, 0] if kind == "class-conditional" else None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_bundle_draws_what_pytorch_draws(models: dict[str, Model], kind: str) -> None:
    checkpoint = open_checkpoint(models[kind][0])
    unet, vae = checkpoint.load("unet"), checkpoint.load("vae")
    assert isinstance(unet, UNet2DConditionModel)
    assert isinstance(vae, AutoencoderKL)
    labels = labels_of(kind)
    classes = None if labels is None else torch.tensor(labels)
    shape = (1, 2, SIDE, SIDE)
    latents = ddim(
        lambda x, timestep: unet(x, torch.tensor([timestep]), class_labels=classes),
        torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]),
        alphas_cumprod_from_config(checkpoint.scheduler),
        leading_timesteps(1000, STEPS, 1),
    )
    drawn = Pipeline.open(models[kind][1]).generate(seed=SEEDS, steps=STEPS, class_labels=labels)
    assert drawn.images.shape == (2, RESOLUTION, RESOLUTION, 1)
    assert relative_error(drawn.latents, latents.numpy()) < TOLERANCE
    for ours, theirs in zip(
        drawn.images, pixels_from_sample(vae.decode(latents / vae.config.scaling_factor)), strict=True
    ):
        assert psnr_db(ours, theirs.numpy()) > 45


def test_a_model_trained_by_flow_matching(data: Path, traced_once: None, tmp_path: Path, run: Run) -> None:
    """Drawn by its own scheduler, as diffusers' steps."""
    text = CONFIG[: CONFIG.index("[scheduler]")].replace("REST_OF_THE_UNET", KINDS["class-conditional"]) + FLOW
    last = text.rindex("warmup_steps = 1")  # of the UNet
    (tmp_path / "flow.toml").write_text(f"{text[:last]}min_snr_gamma = 0.0\n{text[last:]}")
    checkpoint, bundle = tmp_path / "flow", tmp_path / "flow.bundle"
    assert run("train", "--data", data, "--config", tmp_path / "flow.toml", "-o", checkpoint).exit_code == 0
    assert run("export", checkpoint, "-o", bundle).exit_code == 0
    unet = open_checkpoint(checkpoint).load("unet")  # diffusers' own joins no odd sizes in these blocks
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(checkpoint / "scheduler")
    scheduler.set_timesteps(STEPS)
    shape, labels = (1, 2, SIDE, SIDE), [CLASSES - 1, 0]
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            out = unet(latents, timestep[None], class_labels=torch.tensor(labels))
        latents = scheduler.step(out, timestep, latents).prev_sample
    pipeline = Pipeline.open(bundle)
    assert pipeline.bundle.manifest.model["default_sampler"] == "euler"
    drawn = pipeline.generate(seed=SEEDS, steps=STEPS, class_labels=labels)
    assert relative_error(drawn.latents, latents.numpy()) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_picture(models: dict[str, Model], kind: str) -> None:
    labels = labels_of(kind)
    first, again = (
        Pipeline.open(models[kind][1]).generate(seed=SEEDS, steps=STEPS, class_labels=labels) for _ in range(2)
    )
    np.testing.assert_array_equal(first.images, again.images)
    assert np.abs(first.latents[0] - first.latents[1]).max() > 0.1


def test_a_class_changes_the_picture(models: dict[str, Model]) -> None:
    pipeline = Pipeline.open(models["class-conditional"][1])
    drawn = pipeline.generate(seed=[5, 5], steps=STEPS, class_labels=[0, 1])
    assert np.abs(drawn.latents[0] - drawn.latents[1]).max() > 100 * TOLERANCE


def test_the_graphs_are_held_against_pytorch_on_odd_sizes(models: dict[str, Model]) -> None:
    assert any(sizes["height"] % 2 and sizes["width"] % 2 for sizes in SIZES)
    checkpoint, bundle = models["class-conditional"]
    records = compare_bundle(Pipeline.open(bundle).bundle, open_checkpoint(checkpoint), lambda stage: None)
    assert all(record.passed for record in records)


def test_a_grey_grid_is_a_grey_file(models: dict[str, Model], run: Run, tmp_path: Path) -> None:
    bundle, picture = models["class-conditional"][1], tmp_path / "p.png"
    labels = [option for label in range(CLASSES) for option in ("--class-label", label)]
    done = run("generate", bundle, *labels, "--seed", 4, "--steps", STEPS, "-o", picture)
    assert done.exit_code == 0, done.output
    assert f"3 of {RESOLUTION}x{RESOLUTION}" in done.stdout
    expected = Pipeline.open(bundle).generate(seed=4, steps=STEPS, class_labels=range(CLASSES)).images
    with Image.open(picture) as sheet:
        assert sheet.mode == "L"
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * RESOLUTION, 2 * RESOLUTION)
    np.testing.assert_array_equal(pixels[:RESOLUTION, RESOLUTION:], expected[1, ..., 0])
    np.testing.assert_array_equal(pixels[RESOLUTION:, :RESOLUTION], expected[2, ..., 0])
    assert (pixels[RESOLUTION:, RESOLUTION:] == 255).all()


def test_a_coloured_picture_to_start_from_becomes_grey(models: dict[str, Model], run: Run, tmp_path: Path) -> None:
    start = Image.new("RGB", (RESOLUTION, RESOLUTION), "red")
    start.save(tmp_path / "in.png")
    options = ["--image", tmp_path / "in.png", "--strength", 0.5, "--steps", STEPS]
    done = run("generate", models["unconditional"][1], "-o", tmp_path / "p.png", *options)
    assert done.exit_code == 0, done.output
    pipeline = Pipeline.open(models["unconditional"][1])
    grey = np.asarray(start.convert("L"))[..., None]
    expected = pipeline.generate(seed=[0], image=grey, strength=0.5, steps=STEPS).images[0, ..., 0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "p.png")), expected)
    with pytest.raises(InputError, match=r"\(14, 14, 3\) and dtype uint8; uint8 \(H, W, 1\).* Convert it to grey"):
        pipeline.generate(seed=[0], image=np.asarray(start))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("class-conditional", ["--class-label", CLASSES], r"class label 3 is none; this model has 0 to 2\."),
        ("class-conditional", ["--class-label", -1], r"class label -1 is none; this model has 0 to 2\."),
        (
            "class-conditional",
            [],
            r"0 prompts and no class labels were given; this model takes class_labels from 0 to 2\.",
        ),
        ("class-conditional", ["a boot"], "1 prompts and no class labels were given"),
        ("unconditional", ["--class-label", 0], "0 prompts and 1 class labels were given; this model takes neither"),
        ("unconditional", ["--size", "13x14"], "13x14 does not fit; height and width must be multiples of 2"),
    ],
)
def test_what_a_model_does_not_take_is_one_sentence(
    models: dict[str, Model], run: Run, tmp_path: Path, kind: str, arguments: list[str | int], message: str
) -> None:
    done = run("generate", models[kind][1], *arguments, "-o", tmp_path / "p.png")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "p.png").exists()


def test_verify_and_inspect(models: dict[str, Model], run: Run) -> None:
    checkpoint, bundle = models["unconditional"]
    done = run("verify", bundle, "--against", checkpoint, "--json")
    assert done.exit_code == 0, done.output
    assert {record["graph"] for record in json.loads(done.stdout)["parity"]} == {"unet", "vae_decoder", "vae_encoder"}
    assert "class_count: None" in run("inspect", bundle).stdout
    assert f"class_count: {CLASSES}" in run("inspect", models["class-conditional"][1]).stdout


def test_the_demo_says_that_it_needs_text(models: dict[str, Model], run: Run, tmp_path: Path) -> None:
    done = run("demo", "--checkpoint", models["unconditional"][0], "-o", tmp_path / "demo")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "ldm-export verify --against" in done.stderr
