"""Whole runs at a tiny scale: what a run leaves, resuming, and every option of the stages."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import ldm_reference.cache
import ldm_reference.fit
import ldm_reference.stages
import pytest
import torch
import transformers
from ldm_reference.alignment import load_heads
from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.cache import cached, fingerprint
from ldm_reference.config import ConfigError
from ldm_reference.data import CaptionedImages
from ldm_reference.fit import Rows, Run, Stage
from ldm_reference.train import train
from ldm_reference.train_config import TrainConfig
from torch import Tensor

from ldm_export.checkpoint.training import train_checkpoint
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from tests.tiny_recipe import CONFIG
from tests.training import FLOW, TEXT_STAGE, Losses, config_from, edited, weights

NAMES = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae", "logs"}


def every_stage(text: str, line: str) -> str:
    return text.replace("warmup_steps = 3", f"warmup_steps = 3\n{line}")


@pytest.fixture(scope="module")
def whole_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    folder, losses = tmp_path_factory.mktemp("whole"), Losses()
    train(config_from(CONFIG, folder), pictures, folder / "out", resume=False, progress=losses)
    return folder / "out", losses


def test_a_run_leaves_a_checkpoint_and_its_logs(whole_run: tuple[Path, Losses]) -> None:
    folder, losses = whole_run
    assert list(losses.of) == [("autoencoder", i + 1) for i in range(7)] + [("denoiser", i + 1) for i in range(9)]
    assert {path.name for path in folder.iterdir()} == NAMES
    model = open_checkpoint(folder)
    assert model.components == ("text_encoder", "unet", "vae")
    assert model.scheduler["prediction_type"] == "v_prediction"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer("a red square", padding="max_length", return_tensors="pt").input_ids
    assert model.configs["text_encoder"]["vocab_size"] == len(tokenizer)
    assert model.configs["text_encoder"]["eos_token_id"] == tokenizer.eos_token_id
    with torch.no_grad():
        text = model.load("text_encoder")(ids)
        out = model.load("unet")(torch.randn(1, 4, 8, 8), torch.tensor([500]), text.last_hidden_state)
        picture = model.load("vae").decode(out)
    assert picture.shape == (1, 3, 16, 16)
    assert picture.isfinite().all()


def test_the_scaling_factor_gives_latents_unit_variance(whole_run: tuple[Path, Losses], pictures: Path) -> None:
    vae = open_checkpoint(whole_run[0]).load("vae")
    assert isinstance(vae, AutoencoderKL)
    with torch.no_grad():
        mean = vae.encode(CaptionedImages.open(pictures, 16).load(range(12))).chunk(2, dim=1)[0]
    assert (mean * vae.config.scaling_factor).std().item() == pytest.approx(1.0, abs=5e-3)  # weights are saved as fp16


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [("autoencoder", 2), ("autoencoder", 7), ("denoiser", 2), ("denoiser", 8)])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, pictures: Path, whole_run: tuple[Path, Losses], stop: tuple[str, int]
) -> None:
    """Bit for bit: every loss and every weight, with dropout, from a save that lies before the interruption."""
    config = config_from(every_stage(CONFIG, "save_every = 3"), tmp_path)
    before, after = Losses(stop), Losses()
    with pytest.raises(KeyboardInterrupt):
        train(config, pictures, tmp_path / "out", resume=False, progress=before)
    assert not (tmp_path / "out" / "model_index.json").exists()
    torch.manual_seed(12345)  # what another process may have drawn
    train(config, pictures, tmp_path / "out", resume=True, progress=after)
    saved = {"autoencoder": 0, "denoiser": 0, stop[0]: stop[1] // 3 * 3}
    saved |= {"autoencoder": 7} if stop != ("autoencoder", 2) else {}
    assert min(done for name, done in after.of if name == "denoiser") == saved["denoiser"] + 1
    assert len(after.of) == 7 + 9 - saved["autoencoder"] - saved["denoiser"]
    folder, losses = whole_run
    assert before.of | after.of == losses.of
    given, expected = weights(tmp_path / "out"), weights(folder)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[key], expected[key]) for key in expected)


def test_a_resumed_run_by_flow_matching(tmp_path: Path, pictures: Path) -> None:
    """Bit for bit, its pictures too; the checkpoint has the scheduler of the recipe, as diffusers reads it."""
    text = every_stage(edited(*FLOW, ("shift = 1.0", "shift = 3.0")), "save_every = 3\nsample_every = 9")
    config, whole = config_from(text, tmp_path), Losses()
    train(config, pictures, tmp_path / "whole", resume=False, progress=whole)
    before, after = Losses(("denoiser", 5)), Losses()
    with pytest.raises(KeyboardInterrupt):
        train(config, pictures, tmp_path / "out", resume=False, progress=before)
    train(config, pictures, tmp_path / "out", resume=True, progress=after)
    assert [done for name, done in after.of if name == "denoiser"] == [4, 5, 6, 7, 8, 9]
    assert before.of | after.of == whole.of
    given, expected = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(given[key], expected[key]) for key in expected)
    sample = "samples/denoiser-000009.png"
    assert (tmp_path / "out" / sample).read_bytes() == (tmp_path / "whole" / sample).read_bytes()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.shift == 3.0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_levels_of_flow_matching_are_not_whole_timesteps(
    tmp_path: Path, pictures: Path, batches: dict[str, list[Rows]]
) -> None:
    config = config_from(edited(*FLOW), tmp_path)
    train(config, pictures, tmp_path / "out", resume=False, progress=Losses())
    timesteps = torch.cat([batch["timesteps"] for batch in batches["denoiser"]])
    assert timesteps.dtype == torch.float32
    assert 0 < timesteps.min().item() < timesteps.max().item() < 1000
    assert (timesteps % 1 > 0).float().mean().item() > 0.9


def test_resume_with_another_config_is_refused_and_loses_nothing(tmp_path: Path, pictures: Path) -> None:
    config = config_from(every_stage(CONFIG, "save_every = 2"), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(config, pictures, tmp_path / "out", resume=False, progress=Losses(("denoiser", 5)))
    states = {file: file.read_bytes() for file in (tmp_path / "out" / "training").iterdir()}
    other = dataclasses.replace(config, unet_stage=dataclasses.replace(config.unet_stage, learning_rate=1e-3))
    losses = Losses()
    with pytest.raises(ConfigError, match=r"denoiser\.safetensors was made with another config"):
        train(other, pictures, tmp_path / "out", resume=True, progress=losses)
    with pytest.raises(ConfigError, match=r"autoencoder\.safetensors was made with another config"):
        train(dataclasses.replace(config, seed=4), pictures, tmp_path / "out", resume=True, progress=losses)
    assert losses.of == {}
    assert {file: file.read_bytes() for file in (tmp_path / "out" / "training").iterdir()} == states


def test_an_output_that_holds_something_is_refused(
    tmp_path: Path, pictures: Path, config: TrainConfig, whole_run: tuple[Path, Losses]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty; use --resume to go on with it, or name another folder"):
        train(config, pictures, tmp_path, resume=False, progress=Losses())
    with pytest.raises(ConfigError, match=r"holds no interrupted training"):
        train(config, pictures, tmp_path, resume=True, progress=Losses())
    with pytest.raises(ConfigError, match=r"holds no interrupted training"):  # else it would be trained from the start
        train(config, pictures, whole_run[0], resume=True, progress=Losses())
    with pytest.raises(ConfigError, match=r"notes\.txt is a file; name a folder"):
        train(config, pictures, tmp_path / "notes.txt", resume=False, progress=Losses())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "notes.txt"]


@pytest.mark.parametrize("stage", ["vae_stage", "unet_stage"])
def test_a_batch_larger_than_the_data_is_refused_before_any_step(
    tmp_path: Path, pictures: Path, config: TrainConfig, stage: str
) -> None:
    losses = Losses()
    large = dataclasses.replace(config, **{stage: dataclasses.replace(getattr(config, stage), batch_size=14)})
    with pytest.raises(ConfigError, match=r"batch size 14 is larger than the 1[23] samples; lower it or add pictures"):
        train(large, pictures, tmp_path / "out", resume=False, progress=losses)
    assert losses.of == {}
    assert not (tmp_path / "out").exists()


def test_a_corrupt_picture_is_found_before_any_step(tmp_path: Path, pictures: Path, config: TrainConfig) -> None:
    data, losses = shutil.copytree(pictures, tmp_path / "data"), Losses()
    (data / "blue-bar.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"blue-bar\.png is not a readable picture"):
        train(config, data, tmp_path / "out", resume=False, progress=losses)
    assert losses.of == {}
    assert not (tmp_path / "out").exists()


def test_the_command_s_errors(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        def training(*args: Any, **options: Any) -> None:
            raise error

        return training

    recipe = tmp_path / "config.toml"
    recipe.write_text(CONFIG)
    for error, sentence in (
        (
            OSError(28, "No space left on device"),
            r"cannot be written \(.*No space left.*Free some space; --resume goes on",
        ),
        (ConfigError("the loss is nan"), r"^the loss is nan\.$"),
    ):
        monkeypatch.setattr("ldm_reference.train.train", fail(error))
        with pytest.raises(InputError, match=sentence):
            train_checkpoint(pictures, tmp_path / "out", recipe, resume=False, progress=Losses())


# --- conditions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Rows]]:
    """The batches of every stage, as the loop asked for them."""
    seen: dict[str, list[Rows]] = {}
    fit = ldm_reference.fit.fit

    def record(run: Run, stage: Stage) -> dict[str, Tensor]:
        def batch_at(step: int) -> Rows:
            seen.setdefault(stage.name, []).append(stage.batch_at(step))
            return seen[stage.name][-1]

        return fit(run, dataclasses.replace(stage, batch_at=batch_at))

    monkeypatch.setattr(ldm_reference.stages, "fit", record)
    return seen


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["fine-tuned", "frozen"])
def test_caption_dropout_drops_its_share(
    tmp_path: Path, pictures: Path, batches: dict[str, list[Rows]], share: float, mode: str
) -> None:
    text = CONFIG.replace("steps = 9\nbatch_size = 5", "steps = 30\nbatch_size = 12").replace(
        "caption_dropout = 0.2", f'caption_dropout = {share}\ntext_encoder = "{mode}"'
    )
    config = config_from(text + TEXT_STAGE, tmp_path)
    train(config, pictures, tmp_path / "out", resume=False, progress=Losses())
    key = "encoder_hidden_states" if mode == "frozen" else "input_ids"
    rows = torch.cat([batch[key] for batch in batches["denoiser"]]).flatten(1)
    assert len(rows) == 360
    counts = rows.unique(dim=0, return_counts=True)[1].sort(descending=True).values
    assert len(counts) == 13 + (share > 0)  # every caption, and the empty one
    if share:
        wide = 4 * math.sqrt(share * (1 - share) / 360)
        assert counts[0].item() / 360 == pytest.approx(share, abs=wide)


@pytest.mark.parametrize("mode", ["fine-tuned", "frozen"])
def test_text_stage(tmp_path: Path, pictures: Path, mode: str) -> None:
    config = config_from(
        edited(("caption_dropout = 0.2", f'caption_dropout = 0.2\ntext_encoder = "{mode}"')) + TEXT_STAGE, tmp_path
    )
    losses = Losses()
    train(config, pictures, tmp_path / "out", resume=False, progress=losses)
    assert [name for name, _ in losses.of].count("text_encoder") == 5
    heads = load_heads(tmp_path / "out")
    assert heads.visual_projection.weight.shape == (8, 1280)
    kept = tmp_path / "out" / "alignment" / "text_encoder"
    assert kept.is_dir() == (mode == "fine-tuned")
    if mode == "fine-tuned":  # the judge is the encoder before it was trained on
        before, after = weights(kept.parent), weights(tmp_path / "out")
        key = "text_model.encoder.layers.0.mlp.fc1.weight"
        assert not torch.equal(before[f"text_encoder.{key}"], after[f"text_encoder.{key}"])


def test_a_frozen_text_encoder_is_the_contrastive_stage_s(tmp_path: Path, pictures: Path) -> None:
    found = []
    for steps in (9, 3):
        text = edited(("caption_dropout = 0.2", 'text_encoder = "frozen"'), ("steps = 9", f"steps = {steps}"))
        out = tmp_path / str(steps)
        train(config_from(text + TEXT_STAGE, tmp_path), pictures, out, resume=False, progress=Losses())
        found.append(weights(out / "text_encoder"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


@pytest.fixture
def sides(tmp_path: Path) -> Path:
    """Pictures that are darker to the left, one whose caption says so."""
    from PIL import Image

    ramp = Image.linear_gradient("L").rotate(90).resize((16, 16)).convert("RGB")
    lines = []
    for name, text in (("a", "a ramp"), ("b", "a ramp to the right"), ("c", "Left of it"), ("d", "other ramp")):
        ramp.save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": text}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("flips", [False, True])
def test_flips_spare_captions_that_name_a_side(
    tmp_path: Path, sides: Path, batches: dict[str, list[Rows]], flips: bool
) -> None:
    text = CONFIG.replace("steps = 9\nbatch_size = 5", "steps = 30\nbatch_size = 4").replace(
        "caption_dropout = 0.2", "caption_dropout = 0.0" + "\nhorizontal_flip = true" * flips
    )
    train(config_from(text, tmp_path), sides, tmp_path / "out", resume=False, progress=Losses())
    latents: dict[tuple[int, ...], list[Tensor]] = {}
    for batch in batches["denoiser"]:
        for ids, values in zip(batch["input_ids"], batch["latents"], strict=True):
            latents.setdefault(tuple(ids.tolist()), []).append(values)
    checkpoint = open_checkpoint(tmp_path / "out")
    vae = checkpoint.load("vae")
    assert isinstance(vae, AutoencoderKL)
    picture = CaptionedImages.open(sides, 16).load([0])
    straight, mirrored = (
        vae.encode(x).chunk(2, dim=1)[0][0] * vae.config.scaling_factor for x in (picture, picture.flip(-1))
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    turned = {}
    for caption in ("a ramp", "a ramp to the right", "Left of it", "other ramp"):
        ids = tuple(tokenizer(caption, padding="max_length", truncation=True).input_ids)
        near = [(x - mirrored).norm() < (x - straight).norm() for x in latents[ids]]
        turned[caption] = sum(near) / len(near)
    assert turned["a ramp to the right"] == turned["Left of it"] == 0.0
    for caption in ("a ramp", "other ramp"):
        assert (0.2 < turned[caption] < 0.8) == flips, turned
        assert turned[caption] == 0.0 or flips


def test_flips_of_the_autoencoder(tmp_path: Path, sides: Path, batches: dict[str, list[Rows]]) -> None:
    text = edited(("kl_weight = 1e-4", "horizontal_flip = true"), ("batch_size = 5", "batch_size = 4"))
    train(config_from(text, tmp_path), sides, tmp_path / "out", resume=False, progress=Losses())
    pictures = torch.cat([batch["pictures"] for batch in batches["autoencoder"][:7]])
    darker_left = pictures[:, 0, 8, 1] < pictures[:, 0, 8, 14]
    assert 0.2 < darker_left.float().mean().item() < 0.8


# --- the cache ------------------------------------------------------------------------------------------------------


def test_the_cache_is_read_only_while_its_key_is_the_same(tmp_path: Path) -> None:
    calls: list[float] = []

    def compute(value: float) -> Any:
        def function() -> Tensor:
            calls.append(value)
            return torch.full((3, 2), value)

        return function

    file = tmp_path / "a.safetensors"
    for value, key in ((1.0, "k"), (2.0, "k"), (3.0, "other"), (4.0, "other")):
        found = cached(file, key, compute(value))
    assert calls == [1.0, 3.0]
    assert found.unique().tolist() == [3.0]
    file.write_bytes(b"damaged")
    assert cached(file, "other", compute(5.0)).unique().tolist() == [5.0]
    assert cached(file, "third", compute(6.0), writes=False).unique().tolist() == [6.0]
    assert cached(file, "other", compute(7.0)).unique().tolist() == [5.0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_cache_s_key_sees_weights_and_pictures(tmp_path: Path, pictures: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "data")
    layer, data = torch.nn.Linear(2, 2), CaptionedImages.open(folder, 16)
    first = fingerprint(layer, data, "16")
    assert fingerprint(layer, data, "16") == first
    assert fingerprint(layer, data, "32") != first
    (folder / "red-bar.png").write_bytes((folder / "blue-bar.png").read_bytes() + b"\0")
    second = fingerprint(layer, data, "16")
    assert second != first
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert fingerprint(layer, data, "16") != second


def test_latents_are_encoded_once(
    tmp_path: Path, pictures: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run, and not again by one that resumes it in the last stage."""
    passes: list[int] = []
    over = ldm_reference.stages.over_pictures

    def counted(data: CaptionedImages, function: Any) -> Tensor:
        passes.append(len(data.files))
        return over(data, function)

    monkeypatch.setattr(ldm_reference.stages, "over_pictures", counted)
    with pytest.raises(KeyboardInterrupt):
        train(config, pictures, tmp_path / "out", resume=False, progress=Losses(("denoiser", 5)))
    train(config, pictures, tmp_path / "out", resume=True, progress=Losses())
    assert passes == [12]


# --- options that run -----------------------------------------------------------------------------------------------


def test_samples_appear_as_training_goes(tmp_path: Path, pictures: Path) -> None:
    from PIL import Image

    config = config_from(every_stage(CONFIG, "sample_every = 4"), tmp_path)
    train(config, pictures, tmp_path / "out", resume=False, progress=Losses())
    files = sorted((tmp_path / "out" / "samples").iterdir())
    steps = [f"autoencoder-{step:06d}.png" for step in (4, 7)] + [f"denoiser-{step:06d}.png" for step in (4, 8, 9)]
    assert [file.name for file in files] == steps
    with Image.open(files[0]) as image:
        assert image.size == (8 * 16, 2 * 16)
        assert image.crop((0, 0, 16, 16)).getpixel((8, 8)) == (255, 0, 0)  # the first picture, a red square, as it is
    with Image.open(files[-1]) as image:
        assert image.size == (8 * 16, 16)


@pytest.mark.parametrize("classes", [None, 6])
def test_samples_of_a_model_without_text(tmp_path: Path, pictures: Path, classes: int | None) -> None:
    from PIL import Image

    from tests.reference.test_train_config import WITHOUT_TEXT

    condition = ("dropout = 0.1", f"num_class_embeds = {classes}" if classes else "")
    config = config_from(every_stage(edited(*WITHOUT_TEXT, condition), "sample_every = 9"), tmp_path)
    train(config, pictures, tmp_path / "out", resume=False, progress=Losses())
    assert open_checkpoint(tmp_path / "out").components == ("unet", "vae")
    with Image.open(tmp_path / "out" / "samples" / "denoiser-000009.png") as image:
        assert image.size == (8 * 16, 16)
        parts = [image.crop((k * 16, 0, k * 16 + 16, 16)).tobytes() for k in range(8)]
    assert len(set(parts)) == 8


@pytest.mark.parametrize(
    "prediction_type",
    ["epsilon", "flow", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("v_prediction", "sample"))],
)
def test_both_losses_go_down(tmp_path: Path, pictures: Path, prediction_type: str) -> None:
    """The denoiser's to well below what predicting nothing costs, the variance of what is predicted."""
    variance = 2 if prediction_type == "flow" else 1
    text = (
        (edited(*FLOW) if prediction_type == "flow" else CONFIG)
        .replace("steps = 7\nbatch_size = 4\nlearning_rate = 2e-3", "steps = 60\nbatch_size = 6\nlearning_rate = 4e-3")
        .replace(
            "steps = 9\nbatch_size = 5\nlearning_rate = 2e-3", "steps = 120\nbatch_size = 12\nlearning_rate = 4e-3"
        )
        .replace("dropout = 0.1\n", "\n")
        .replace("caption_\n", "min_snr_gamma = 0\n")
        .replace("v_prediction", prediction_type)
    )
    text = text.replace("caption_dropout = 0.2", "min_snr_gamma = 0")
    losses = Losses()
    train(config_from(text, tmp_path), pictures, tmp_path / "out", resume=False, progress=losses)
    autoencoder, denoiser = (
        [loss for (name, _), loss in losses.of.items() if name == stage] for stage in ("autoencoder", "denoiser")
    )
    assert sum(autoencoder[-20:]) < 0.5 * sum(autoencoder[:20])
    assert sum(denoiser[-20:]) / 20 < 0.8 * variance


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
def test_compiled_losses_are_the_same(tmp_path: Path, pictures: Path) -> None:
    text, found = CONFIG.replace("dropout = 0.1\n", "\n"), {}
    for compiled in (False, True):
        losses, extra = Losses(), "compile = true" if compiled else ""
        out = tmp_path / str(compiled)
        train(config_from(every_stage(text, extra), tmp_path), pictures, out, resume=False, progress=losses)
        found[compiled] = losses.of
    assert found[True] == pytest.approx(found[False], rel=1e-4)
