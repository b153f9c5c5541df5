"""Adapting against hand-written loops on diffusers' networks, and what is written as diffusers reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ldm_export.adapt.factors import factors_of
from ldm_export.adapt.material import encoded, rows_at, shuffled
from ldm_export.adapt.options import AdaptOptions, Factors
from ldm_export.adapt.pictures import pictures_in, read_images
from ldm_export.adapt.training import Learner, Prior, adapt, learner_of, trained_noise
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.verify.image_generators import SamplingSettings, TorchImageGenerator
from ldm_export.verify.metrics import psnr_db
from tests.adapt.pictures import checkpoint_of, write_few
from tests.training import Losses

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

ALL = Factors(rank=2, alpha=3.0, layers="all")
PROMPTS = ["a red circle", "a blue square"]


def filled(learner: Learner) -> dict[str, Tensor]:
    """Fill the second factors, too, so that every gradient is of something; gives all factors."""
    generator = torch.Generator().manual_seed(1)
    own = factors_of(learner.objective.denoiser.network)
    with torch.no_grad():
        for name, value in own.items():
            if "lora_B" in name:
                value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    return {name: value.detach().clone() for name, value in own.items()}


def judge_of(network: Any, learner: Learner, values: dict[str, Tensor]) -> Any:
    """A network of diffusers with an adapter of the same config and values, made by diffusers' own method."""
    config = {key: learner.config[key] for key in ("r", "lora_alpha", "target_modules")}
    network.requires_grad_(False)
    network.add_adapter(peft.LoraConfig(**config))
    wanted = get_peft_model_state_dict(network)
    assert {*wanted} == {*values}
    peft.set_peft_model_state_dict(network, values)
    return network.train()


def compared(learner: Learner, rows: dict[str, Tensor], theirs: Any, judged: Tensor) -> None:
    """Compare a loss and every gradient with those of a hand-written step."""
    learner.objective.train()
    loss = learner.objective(**rows)["loss"]
    loss.backward()
    judged.backward()
    assert loss.item() == pytest.approx(judged.item(), rel=1e-5)
    own = factors_of(learner.objective.denoiser.network)
    found = {name.replace(".default.", "."): value for name, value in theirs.named_parameters() if "lora_" in name}
    assert {*own} == {*found}
    scale = max(float(value.grad.abs().max()) for value in found.values() if value.grad is not None)
    for name, value in own.items():
        ours, other = value.grad, found[name].grad
        assert (ours is None) == (other is None), name
        if ours is not None and other is not None:
            assert (ours - other).abs().max() < 1e-5 * scale, name


def states(folder: Path, prompts: list[str], **options: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    return pipe, pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)


def taught(learner: Learner, folder: Path, prompts: list[str]) -> dict[str, Tensor]:
    """Rows of two pictures that show different things, weighted 1 and 0.5."""
    write_few(folder)
    for file, prompt in zip(sorted(folder.glob("*.png")), [*prompts, *prompts, prompts[0]], strict=True):
        file.with_suffix(".txt").write_text(prompt)
    pictures = encoded(learner.generator, pictures_in(folder, ""))
    rows = dict(rows_at(0, pictures, None, learner.noise, 5, 1.0, seed=4))
    rows["weights"] = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3])
    return rows


def prompts_of(folder: Path, rows_seed: int = 4) -> list[str]:
    """What the rows of `taught` show, in order."""
    chosen = shuffled(5, 5, 0, rows_seed * 2).tolist()
    files = sorted(folder.glob("*.png"))
    return [files[k].with_suffix(".txt").read_text() for k in chosen]


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_step_of_stable_diffusion_is_a_hand_written_one(tiny_checkpoint: Path, tmp_path: Path, layers: str) -> None:
    learner = learner_of(open_checkpoint(tiny_checkpoint), Factors(2, 3.0, layers), seed=5)
    values, rows = filled(learner), taught(learner, tmp_path / "few", PROMPTS)
    pipe, (embeds, _) = states(tiny_checkpoint, prompts_of(tmp_path / "few"), safety_checker=None)
    unet = judge_of(pipe.unet, learner, values)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    timesteps = rows["timesteps"]
    noisy = scheduler.add_noise(rows["latents"], rows["noise"], timesteps)
    errors = (unet(noisy, timesteps, embeds).sample - rows["noise"]).square().mean(dim=(1, 2, 3))
    compared(learner, rows, unet, (rows["weights"] * errors).mean())


def test_a_step_of_sdxl_that_predicts_v(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint_of("sdxl", tmp_path, tiny_checkpoint)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    learner = learner_of(open_checkpoint(folder), ALL, seed=5)
    values, rows = filled(learner), taught(learner, tmp_path / "few", PROMPTS)
    pipe, (embeds, _, pooled, _) = states(folder, prompts_of(tmp_path / "few"))
    unet = judge_of(pipe.unet, learner, values)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    timesteps, (height, width) = rows["timesteps"], learner.generator.pixels
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * 5, dtype=torch.float32)
    noisy = scheduler.add_noise(rows["latents"], rows["noise"], timesteps)
    added = {"text_embeds": pooled, "time_ids": sizes}
    out = unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample
    target = scheduler.get_velocity(rows["latents"], rows["noise"], timesteps)
    compared(learner, rows, unet, (rows["weights"] * (out - target).square().mean(dim=(1, 2, 3))).mean())


def test_a_step_of_sd3_that_matches_flows(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint_of("sd3", tmp_path, tiny_checkpoint)
    learner = learner_of(open_checkpoint(folder), ALL, seed=5)
    values, rows = filled(learner), taught(learner, tmp_path / "few", PROMPTS)
    shown = prompts_of(tmp_path / "few")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(shown, shown, shown, device="cpu", do_classifier_free_guidance=False)
    network = judge_of(pipe.transformer, learner, values)
    sigma = (rows["timesteps"] / 1000)[:, None, None, None]
    noisy = (1 - sigma) * rows["latents"] + sigma * rows["noise"]
    out = network(noisy, timestep=rows["timesteps"], encoder_hidden_states=embeds, pooled_projections=pooled).sample
    errors = (out - (rows["noise"] - rows["latents"])).square().mean(dim=(1, 2, 3))
    compared(learner, rows, network, (rows["weights"] * errors).mean())


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler", "EulerDiscreteScheduler"]
)
def test_noise_is_that_of_the_schedulers_class(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Where the config leaves out its betas, too."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    config = {"_class_name": name, "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    theirs = getattr(diffusers, name).from_pretrained(folder / "scheduler").alphas_cumprod
    ours = trained_noise(open_checkpoint(folder)).get_buffer("alphas_cumprod")
    assert (ours - theirs).abs().max() < 1e-6
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "trained_betas": [0.1] * 1000}))
    with pytest.raises(InputError, match="has trained_betas"):
        trained_noise(open_checkpoint(folder))


def test_latents_are_those_of_diffusers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shown = pictures_in(write_few(tmp_path), "a red circle")
    generator = TorchImageGenerator(open_checkpoint(tiny_checkpoint))
    pictures = encoded(generator, shown)
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    images = torch.from_numpy(read_images(shown, (16, 16), 3)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    assert (pictures.moments.chunk(2, dim=1)[0] - mean).abs().max() < 1e-5


OPTIONS = AdaptOptions(factors=ALL, steps=6, batch_size=2, learning_rate=2e-2, warmup_steps=2, ema_decay=0.5, seed=3)


def run(checkpoint: Path, folder: Path, output: Path, options: AdaptOptions = OPTIONS, **more: Any) -> dict[str, Any]:
    more = {"progress": lambda *_: None, **more}
    asked = more.pop("asked", "a zorp")
    return adapt(open_checkpoint(checkpoint), folder, asked, output, options, **more)


def test_the_file_is_diffusers_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its pipeline loads it and draws what a checkpoint with it merged draws, which is another picture than without."""
    few, file = write_few(tmp_path / "few", captioned=True), tmp_path / "it.safetensors"
    report = run(tiny_checkpoint, few, file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    packed = json.loads(metadata["lora_adapter_metadata"])
    assert (packed["unet.r"], packed["unet.lora_alpha"]) == (2, 3.0)
    assert json.loads(metadata["ldm_export"])["prompt"] == "a zorp"
    assert report["parameters"] == sum(value.numel() for value in load_file(file).values())
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(file)
    keywords = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    theirs = pipe("a zorp", generator=torch.Generator().manual_seed(0), **keywords).images
    settings = SamplingSettings(1, "ddim", 4, 3.0)
    merged = TorchImageGenerator(open_checkpoint(tiny_checkpoint, adapters=[(file, 1.0)]))
    ours = merged.draw(["a zorp"], [0], settings)
    bare = TorchImageGenerator(open_checkpoint(tiny_checkpoint)).draw(["a zorp"], [0], settings)
    assert psnr_db(ours[0], (theirs[0] * 255).round().astype(np.uint8)) > 60
    assert psnr_db(ours[0], bare[0]) < 40


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "pixart", "prx", "dit", "class-conditional", "unconditional", "flow"])
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_every_family_learns(kind: str, layers: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The loss at the same noise is less than before; the file merges, every layer of it."""
    folder, few = checkpoint_of(kind, tmp_path, tiny_checkpoint), write_few(tmp_path / "few")
    generator = TorchImageGenerator(open_checkpoint(folder))
    asked = {"text": "a zorp", "label": 1, None: None}[generator.condition]
    file, factors = tmp_path / "it.safetensors", Factors(2, layers=layers)
    if layers == "attention" and kind in ("class-conditional", "unconditional"):
        with pytest.raises(Exception, match=r"Train all: --layers all\."):
            run(folder, few, file, AdaptOptions(factors=factors), asked=asked)
        return
    options = AdaptOptions(factors, steps=25, batch_size=5, learning_rate=1e-2, ema_decay=0.0)
    report = run(folder, few, file, options, asked=asked)
    losses = []
    for start in (None, file):
        learner = learner_of(open_checkpoint(folder), factors, 0, start)
        pictures = encoded(learner.generator, pictures_in(few, asked))
        with torch.no_grad():
            losses.append(learner.objective(**rows_at(0, pictures, None, learner.noise, 20, 1.0, 9))["loss"].item())
    assert losses[1] < losses[0], losses
    (merge,) = open_checkpoint(folder, adapters=[(file, 1.0)]).merges
    assert not merge.adapter.unmatched
    assert sum(map(len, merge.adapter.layers.values())) == report["layers"]


def test_an_interrupted_run_ends_as_an_unbroken_one(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_export.adapt.options.SAVE_EVERY", 2)
    few, files = write_few(tmp_path / "few"), [tmp_path / name / "it.safetensors" for name in ("whole", "broken")]
    prior = Prior("a red circle", count=3)
    run(tiny_checkpoint, few, files[0], prior=prior)
    stop = Losses()

    def interrupt(what: str, done: int, of: int) -> None:
        if what.startswith("adapt") and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, few, files[1], prior=prior, progress=interrupt)
    assert not files[1].exists()
    assert not stop.of
    begun: list[int] = []
    run(tiny_checkpoint, few, files[1], prior=prior, progress=lambda what, done, of: begun.append(done))
    assert begun == [5, 6]
    whole, broken = (load_file(file) for file in files)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not (files[1].with_name("it.work") / "training").exists()


def test_a_seed_is_one_result(tiny_checkpoint: Path, tmp_path: Path) -> None:
    few = write_few(tmp_path / "few")
    made = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        run(tiny_checkpoint, few, tmp_path / f"{name}.safetensors", AdaptOptions(ALL, steps=2, seed=seed))
        made.append(load_file(tmp_path / f"{name}.safetensors"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not any(torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_class_pictures_count_by_their_weight(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The loss is DreamBooth's: of the pictures, plus the weight times that of the class pictures."""
    learner = learner_of(open_checkpoint(tiny_checkpoint), ALL, 0)
    filled(learner)
    taught = encoded(learner.generator, pictures_in(write_few(tmp_path / "few"), "a zorp"))
    kept = encoded(learner.generator, pictures_in(write_few(tmp_path / "class"), "a red circle"))
    rows = rows_at(3, taught, kept, learner.noise, 4, 0.7, seed=1)
    with torch.no_grad():
        loss = learner.objective(**rows)["loss"].item()
        sides = [
            learner.objective(**{**{key: value[k::2] for key, value in rows.items()}, "weights": torch.ones(4)})["loss"]
            for k in (0, 1)
        ]
    assert loss == pytest.approx((sides[0] + 0.7 * sides[1]).item(), rel=1e-5)


def test_the_model_draws_its_class_pictures_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    few, file = write_few(tmp_path / "few"), tmp_path / "it.safetensors"
    options = AdaptOptions(ALL, steps=1)
    said: list[str] = []
    for _ in range(2):
        run(
            tiny_checkpoint,
            few,
            file,
            options,
            prior=Prior("a red circle", count=2),
            progress=lambda w, *_: said.append(w),
        )
    assert said.count("class pictures") == 2
    (folder,) = (tmp_path / "it.work").glob("class-*")
    own = TorchImageGenerator(open_checkpoint(tiny_checkpoint))
    expected = own.draw(["a red circle"], [1], own.defaults)
    assert np.array_equal(read_images(pictures_in(folder, "")[1:], (16, 16), 3), expected)


def test_batches_walk_over_all_pictures() -> None:
    walked = torch.cat([shuffled(5, 3, step, seed=1) for step in range(5)]).reshape(3, 5)
    assert all(sorted(row.tolist()) == [0, 1, 2, 3, 4] for row in walked)
    assert sorted(shuffled(2, 6, 0, seed=1).tolist()) == [0, 0, 0, 1, 1, 1]
