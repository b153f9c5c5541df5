"""Trains a text-to-image latent diffusion model in two stages and writes it in diffusers layout.

1. The autoencoder learns pictures (``autoencoder_loss``); ``scaling_factor`` becomes 1 / std of the training latents.
2. The UNet and the text encoder learn to denoise latents under a caption; a share of the captions is dropped, so that
   guidance has an unconditional prediction to start from (Ho & Salimans, 2207.12598).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ldm_reference.autoencoder import AutoencoderKL, sample_posterior
from ldm_reference.config import ConfigError, check_choice, check_positive, config_from_dict
from ldm_reference.data import CaptionedImages, batch_indices
from ldm_reference.fit import Optimisation, Progress, fit
from ldm_reference.layout import save_checkpoint
from ldm_reference.losses import autoencoder_loss, diffusion_target
from ldm_reference.schedules import SCHEDULES, add_noise, alphas_cumprod_from_config
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tokenizer import END, SMALLEST_VOCAB, encode, save_tokenizer, train_tokenizer
from ldm_reference.unet import UNet2DConditionModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REQUIRED = {
    "vae_stage": ("steps", "batch_size", "learning_rate"),
    "unet_stage": ("steps", "batch_size", "learning_rate"),
    "tokenizer": ("vocab_size", "model_max_length"),
    "scheduler": (
        *("_class_name", "prediction_type", "num_train_timesteps"),
        *("beta_schedule", "beta_start", "beta_end", "clip_sample"),  # diffusers' own defaults differ by class
    ),
}
"""What has no default in the tables of a config."""

SCHEDULER_KEYS = (
    "_class_name",
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "clip_sample",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
)
SPACINGS = ("leading", "trailing", "linspace")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on, but for the pictures.

    ``vae``, ``text_encoder``, ``unet`` and ``scheduler`` hold the keys of those components' config files; ``tokenizer``
    holds ``vocab_size`` and ``model_max_length``.
    """

    seed: int
    resolution: int
    kl_weight: float
    caption_dropout: float
    vae_stage: Optimisation
    unet_stage: Optimisation
    vae: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ConfigError(f"caption_dropout = {self.caption_dropout!r} must be in [0, 1)")
        check_positive(resolution=self.resolution, **self.tokenizer)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {self.seed!r} must be in [0, 2**32)")
        if self.tokenizer["vocab_size"] < SMALLEST_VOCAB:
            raise ConfigError(f"vocab_size = {self.tokenizer['vocab_size']!r} must be at least {SMALLEST_VOCAB}")
        if unknown := self.scheduler.keys() - SCHEDULER_KEYS:
            raise ConfigError(
                f"[scheduler] has the unknown key {min(unknown)!r}; known are {', '.join(SCHEDULER_KEYS)}"
            )
        check_choice("timestep_spacing", self.scheduler.get("timestep_spacing", "leading"), SPACINGS)
        check_choice("beta_schedule", self.scheduler["beta_schedule"], tuple(SCHEDULES))
        try:
            alphas_cumprod_from_config(self.scheduler)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"[scheduler] gives no noise schedule ({error})") from error
        check_choice("prediction_type", self.scheduler["prediction_type"], ("epsilon", "v_prediction", "sample"))
        with torch.device("meta"):  # before a stage is trained that the next one cannot use
            vae = AutoencoderKL.from_config(self.vae).config
            text_encoder = CLIPTextModel.from_config(self.text_encoder).config
            unet = UNet2DConditionModel.from_config(self.unet).config
        if unet.has_class_labels or unet.addition_embed_type or not unet.reads_text:
            raise ConfigError("the unet must be conditioned on text, by cross-attention, and on nothing else")
        if self.resolution % vae.factor:
            raise ConfigError(f"resolution = {self.resolution} is not a multiple of the autoencoder's {vae.factor}")
        for name, given, needed in (
            ("vae in_channels", vae.in_channels, 3),
            ("vae out_channels", vae.out_channels, 3),
            ("unet in_channels", unet.in_channels, vae.latent_channels),
            ("unet out_channels", unet.out_channels, vae.latent_channels),
            ("unet sample_size", unet.sample_size, self.resolution // vae.factor),
            ("unet cross_attention_dim", unet.cross_attention_dim, text_encoder.hidden_size),
        ):
            if given != needed:
                raise ConfigError(f"{name} = {given!r} must be {needed} here")

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} is not a readable TOML file ({error})") from error
        missing = {field.name for field in dataclasses.fields(cls)} - values.keys()
        if missing:
            raise ConfigError(f"{path}: missing {', '.join(sorted(missing))}")
        tables = [field.name for field in dataclasses.fields(cls) if field.type not in ("int", "float")]
        for name in tables:
            if not isinstance(values[name], dict):
                raise ConfigError(f"{path}: {name} = {values[name]!r} must be a table")
        for table, keys in REQUIRED.items():
            if lacking := [key for key in keys if key not in values[table]]:
                raise ConfigError(f"{path}: [{table}] lacks {', '.join(lacking)}")
        for stage in ("vae_stage", "unet_stage"):
            values[stage] = config_from_dict(Optimisation, values[stage], {})
        return config_from_dict(cls, values, {})

    def to_dict(self) -> dict[str, Any]:
        """What a state file records, so that it is not resumed with another config."""
        return dataclasses.asdict(self)


def _generator(seed: int, stage: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2 + stage) * 1_000_000_007 + step)


def train_autoencoder(
    config: TrainConfig, data: CaptionedImages, state_folder: Path, progress: Progress
) -> AutoencoderKL:
    """Stage 1. The result is in evaluation mode and carries the data's ``scaling_factor``."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKL.from_config(config.vae)
    size = config.resolution // vae.config.factor
    settings = config.vae_stage

    def loss_at(step: int) -> Tensor:
        batch = data.load(batch_indices(len(data.files), settings.batch_size, step, config.seed))
        shape = (len(batch), vae.config.latent_channels, size, size)
        noise = torch.randn(shape, generator=_generator(config.seed, 0, step))
        return autoencoder_loss(vae, batch, noise, config.kl_weight)

    recipe = json.dumps(
        [config.seed, config.resolution, config.kl_weight, config.vae, dataclasses.asdict(settings)], sort_keys=True
    )
    fit("autoencoder", {"vae": vae}, loss_at, settings, state_folder / "autoencoder.safetensors", recipe, progress)
    latents = encode_pictures(vae, data).chunk(2, dim=1)[0]
    vae.config = dataclasses.replace(vae.config, scaling_factor=round(1.0 / latents.std().item(), 5))
    return vae


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, data: CaptionedImages, batch: int = 64) -> Tensor:
    """Posterior parameters of every picture, (N, 2 C, h, w)."""
    count = len(data.files)
    return torch.cat([vae.encode(data.load(range(i, min(i + batch, count)))) for i in range(0, count, batch)])


def train_denoiser(
    config: TrainConfig,
    data: CaptionedImages,
    vae: AutoencoderKL,
    tokenizer: Tokenizer,
    state_folder: Path,
    progress: Progress,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Stage 2, on latents that are encoded once. The results are in evaluation mode."""
    torch.manual_seed(config.seed + 1)
    length = config.tokenizer["model_max_length"]
    end = tokenizer.token_to_id(END)
    special = {"vocab_size": end + 1, "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    text_encoder = CLIPTextModel.from_config({**config.text_encoder, "max_position_embeddings": length, **special})
    unet = UNet2DConditionModel.from_config(config.unet)
    prediction_type = config.scheduler["prediction_type"]
    alphas_cumprod = alphas_cumprod_from_config(config.scheduler).float()

    parameters = encode_pictures(vae, data)
    owner = torch.tensor([index for index, _ in data.captions])
    input_ids = encode(tokenizer, [text for _, text in data.captions], length)
    empty = encode(tokenizer, [""], length)[0]
    settings = config.unet_stage

    def loss_at(step: int) -> Tensor:
        generator = _generator(config.seed, 1, step)
        batch = batch_indices(len(owner), settings.batch_size, step, config.seed + 1)
        moments = parameters[owner[batch]]
        shape = (len(batch), vae.config.latent_channels, *moments.shape[2:])
        latents = sample_posterior(moments, torch.randn(shape, generator=generator)) * vae.config.scaling_factor
        noise = torch.randn(shape, generator=generator)
        timesteps = torch.randint(len(alphas_cumprod), (len(batch),), generator=generator)
        dropped = torch.rand(len(batch), generator=generator) < config.caption_dropout
        ids = torch.where(dropped[:, None], empty, input_ids[batch])
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))  # for dropout, if the UNet has any
        noisy = add_noise(latents, noise, alphas_cumprod, timesteps)
        prediction = unet(noisy, timesteps, text_encoder(ids).last_hidden_state)
        return F.mse_loss(prediction, diffusion_target(prediction_type, latents, noise, alphas_cumprod, timesteps))

    recipe = json.dumps([config.to_dict(), vae.config.scaling_factor], sort_keys=True)
    modules = {"unet": unet, "text_encoder": text_encoder}
    fit("denoiser", modules, loss_at, settings, state_folder / "denoiser.safetensors", recipe, progress)
    return unet, text_encoder


def train(config: TrainConfig, data_folder: Path, output: Path, *, resume: bool, progress: Progress) -> None:
    """Run both stages and write the checkpoint ``output`` in diffusers layout.

    What a resumed run needs is kept in ``output/training`` until the checkpoint is complete.

    Raises
    ------
    ConfigError
        If the data or the config cannot be used, or ``output`` holds something and ``resume`` is false.
    """
    state_folder = output / "training"
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder")
    if output.exists() and any(output.iterdir()):
        if not resume:
            raise ConfigError(f"{output} is not empty; use --resume to go on with it, or name another folder")
        if not state_folder.is_dir():
            raise ConfigError(f"{output} holds no interrupted training; name another folder, or train without --resume")
    data = CaptionedImages.open(data_folder, config.resolution)
    for stage, count in ((config.vae_stage, len(data.files)), (config.unet_stage, len(data.captions))):
        batch_indices(count, stage.batch_size, 0, config.seed)  # refuses a batch that is larger than the data
    for index in range(len(data.files)):  # a picture that cannot be read shows now, not hours from here
        data.load([index])
    vae = train_autoencoder(config, data, state_folder, progress)
    tokenizer = train_tokenizer((text for _, text in data.captions), config.tokenizer["vocab_size"])
    unet, text_encoder = train_denoiser(config, data, vae, tokenizer, state_folder, progress)
    save_checkpoint(
        output,
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=lambda folder: save_tokenizer(tokenizer, folder, config.tokenizer["model_max_length"]),
        scheduler=config.scheduler,
    )
    shutil.rmtree(state_folder)
