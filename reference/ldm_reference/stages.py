"""The three stages: autoencoder, text encoder, UNet. Each makes its objective and batches and leaves a trained network.

1. The autoencoder learns pictures; ``scaling_factor`` becomes 1 / std of the training latents (2112.10752, appendix G).
2. The text encoder learns which picture a caption is of (CLIP's loss, against fixed features of the pictures).
3. The UNet learns to denoise latents under a caption, a class or nothing; a share of the captions is dropped, so that
   guidance has an unconditional prediction to start from (Ho & Salimans, 2207.12598).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ldm_reference.alignment import AlignmentHeads
from ldm_reference.autoencoder import AutoencoderKL, sample_posterior
from ldm_reference.cache import cached, fingerprint, over_pictures
from ldm_reference.data import CaptionedImages, batch_indices
from ldm_reference.discriminator import PatchDiscriminator
from ldm_reference.features import feature_network, picture_features
from ldm_reference.fit import Rows, Run, Stage, fit
from ldm_reference.generate import class_to_image, pixels_from_sample, text_to_image
from ldm_reference.initialisation import initialise
from ldm_reference.noise import noise_from_config
from ldm_reference.objectives import AutoencoderObjective, ContrastiveObjective, DenoiserObjective
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tokenizer import END, encode
from ldm_reference.train_config import TrainConfig
from ldm_reference.unet import UNet2DConditionModel

NAMES_A_SIDE = re.compile(r"\b(left|right|east|west|clockwise)", re.IGNORECASE)
SAMPLES = 8
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 4.0


def _generator(seed: int, stage: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 3 + stage) * 1_000_000_007 + step)


def _recipe(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True)


def _load(network: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Load what :func:`fit` left of one network and stop training it."""
    chosen = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    network.load_state_dict(chosen)
    network.requires_grad_(False).eval()


def mirrored(pictures: Tensor, chosen: Tensor) -> Tensor:
    """Pictures or latents (B, C, H, W), of which the rows that ``chosen`` (B,) names are mirrored left to right."""
    return torch.where(chosen[:, None, None, None], pictures.flip(-1), pictures)


def train_autoencoder(run: Run, config: TrainConfig, data: CaptionedImages) -> AutoencoderKL:
    """Stage 1. The result is in evaluation mode and carries the data's ``scaling_factor``."""
    torch.manual_seed(config.seed)
    settings = config.vae_stage
    vae = AutoencoderKL.from_config(config.vae)
    discriminator = PatchDiscriminator(config.channels) if settings.adversarial_weight else None
    initialise(vae)
    size = config.resolution // vae.config.factor
    shape = (settings.batch_size, vae.config.latent_channels, size, size)

    def batch_at(step: int) -> Rows:
        generator = _generator(config.seed, 0, step)
        pictures = data.load(batch_indices(len(data.files), settings.batch_size, step, config.seed))
        noise = torch.randn(shape, generator=generator)
        flips = torch.rand(len(pictures), generator=generator) < 0.5
        pictures = mirrored(pictures, flips) if settings.horizontal_flip else pictures
        return {"step": torch.full((len(pictures),), step), "pictures": pictures, "noise": noise}

    def sample() -> Tensor:
        """Above, pictures; below, what the autoencoder makes of them."""
        pictures = data.load(range(min(SAMPLES, len(data.files)))).to(run.device)
        drawn = vae.decode(vae.encode(pictures).chunk(2, dim=1)[0])
        return _rows_of_pictures(torch.cat([pixels_from_sample(pictures), pixels_from_sample(drawn)]), 2)

    objective = AutoencoderObjective(
        vae,
        reconstruction="l1" if settings.reconstruction == "l1" else "mse",
        kl_weight=settings.kl_weight,
        kl_warmup_steps=settings.kl_warmup_steps,
        perceptual_weight=settings.perceptual_weight,
        perceptual=feature_network() if settings.perceptual_weight else None,
        adversarial_weight=settings.adversarial_weight,
        adversarial_start=settings.adversarial_start,
        discriminator=discriminator,
    )
    recipe = _recipe(config.seed, config.resolution, config.vae, dataclasses.asdict(settings), config.mixed_precision)
    weights = fit(run, Stage("autoencoder", objective, batch_at, settings, recipe, config.seed, sample))
    vae = AutoencoderKL.from_config(config.vae)
    _load(vae, weights, "vae.")
    means = encode_pictures(run, vae, data)[0].chunk(2, dim=1)[0]
    vae.config = dataclasses.replace(vae.config, scaling_factor=round(1.0 / means.std().item(), 5))
    return vae


def encode_pictures(run: Run, vae: AutoencoderKL, data: CaptionedImages, *, flips: bool = False) -> list[Tensor]:
    """Posterior parameters of every picture, (N, 2 C, h, w), and of every mirrored picture if ``flips``; cached."""
    vae.to(run.device)

    def parameters(mirror: bool) -> Tensor:
        def encode(pictures: Tensor) -> Tensor:
            return vae.encode((pictures.flip(-1) if mirror else pictures).to(run.device)).cpu()

        name = "latents-mirrored.safetensors" if mirror else "latents.safetensors"
        key = fingerprint(vae, data, str((data.resolution, data.channels)), name)
        file, writes = run.state_folder / name, run.accelerator.is_main_process
        return cached(file, key, lambda: over_pictures(data, encode), writes=writes)

    return [parameters(mirror) for mirror in (False, True)[: 1 + flips]]


def new_text_encoder(config: TrainConfig, tokenizer: Tokenizer) -> CLIPTextModel:
    """A text encoder for this tokenizer's ids, with its starting weights."""
    assert config.text_encoder is not None
    assert config.tokenizer is not None
    end = tokenizer.token_to_id(END)
    special = {"vocab_size": end + 1, "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    length = config.tokenizer["model_max_length"]
    text_encoder = CLIPTextModel.from_config({**config.text_encoder, "max_position_embeddings": length, **special})
    initialise(text_encoder)
    return text_encoder


def train_text_encoder(
    run: Run, config: TrainConfig, data: CaptionedImages, tokenizer: Tokenizer
) -> tuple[CLIPTextModel, AlignmentHeads]:
    """Stage 2. Both results are in evaluation mode."""
    settings = config.text_stage
    assert settings is not None
    assert config.tokenizer is not None
    torch.manual_seed(config.seed + 1)
    text_encoder = new_text_encoder(config, tokenizer)
    heads = AlignmentHeads(text_encoder.config.hidden_size, settings.projection_dim)
    features = cached(
        run.state_folder / "features.safetensors",
        fingerprint(data, str((data.resolution, data.channels))),
        lambda: over_pictures(data, lambda pictures: picture_features(pictures.to(run.device)).cpu()),
        writes=run.accelerator.is_main_process,
    )
    owner = torch.tensor([index for index, _ in data.captions])
    end = tokenizer.token_to_id(END)
    input_ids = encode(tokenizer, [text for _, text in data.captions], config.tokenizer["model_max_length"])

    def batch_at(step: int) -> Rows:
        batch = batch_indices(len(owner), settings.batch_size, step, config.seed + 1)
        ids = input_ids[batch]
        longest = int((ids != end).sum(dim=1).max()) + 1  # the mask is causal: padding after the end says nothing
        return {"input_ids": ids[:, :longest], "features": features[owner[batch]], "picture": owner[batch]}

    recipe = _recipe(
        config.seed, config.resolution, config.tokenizer, config.text_encoder, dataclasses.asdict(settings)
    )
    objective = ContrastiveObjective(text_encoder, heads)
    weights = fit(run, Stage("text_encoder", objective, batch_at, settings, recipe, config.seed + 1))
    text_encoder = new_text_encoder(config, tokenizer)
    heads = AlignmentHeads(text_encoder.config.hidden_size, settings.projection_dim)
    _load(text_encoder, weights, "text_encoder.")
    _load(heads, weights, "heads.")
    return text_encoder, heads


class Conditions:
    """Inputs of the UNet beside the latents: captions (as ids, or as states of a frozen encoder), classes, nothing.

    ``owner`` (N,) is the picture of every training row; a picture with several captions has several rows.
    """

    def __init__(
        self, config: TrainConfig, data: CaptionedImages, tokenizer: Tokenizer | None, encoder: CLIPTextModel | None
    ):
        self.dropout = config.unet_stage.caption_dropout
        self.values: dict[str, Tensor] = {}
        self.empty: dict[str, Tensor] = {}
        self.turns = torch.ones(len(data.files), dtype=torch.bool)
        self.owner = torch.arange(len(data.files))
        if tokenizer is not None and config.tokenizer is not None:
            texts = [text for _, text in data.captions]
            self.owner = torch.tensor([index for index, _ in data.captions])
            self.turns = torch.tensor([not NAMES_A_SIDE.search(text) for text in texts])
            ids = encode(tokenizer, ["", *texts], config.tokenizer["model_max_length"])
            name = "input_ids"
            if encoder is not None and config.unet_stage.text_encoder == "frozen":
                name = "encoder_hidden_states"
                with torch.no_grad():
                    device = encoder.text_model.final_layer_norm.weight.device
                    ids = torch.cat([encoder(part.to(device)).last_hidden_state.cpu() for part in ids.split(256)])
            self.empty, self.values = {name: ids[0]}, {name: ids[1:]}
        elif config.classes:
            self.values = {"class_labels": torch.tensor(data.labels)}

    def rows(self, batch: list[int], generator: torch.Generator) -> dict[str, Tensor]:
        chosen = {name: value[batch] for name, value in self.values.items()}
        if self.empty:
            dropped = torch.rand(len(batch), generator=generator) < self.dropout
            for name, value in chosen.items():
                mask = dropped.reshape(-1, *[1] * (value.ndim - 1))
                chosen[name] = torch.where(mask, self.empty[name], value)
        return chosen


def train_denoiser(
    run: Run,
    config: TrainConfig,
    data: CaptionedImages,
    vae: AutoencoderKL,
    tokenizer: Tokenizer | None,
    text_encoder: CLIPTextModel | None,
) -> tuple[UNet2DConditionModel, CLIPTextModel | None]:
    """Stage 3, on latents that are encoded once. The results are in evaluation mode."""
    settings = config.unet_stage
    torch.manual_seed(config.seed + 2)
    if tokenizer is not None and text_encoder is None:
        text_encoder = new_text_encoder(config, tokenizer)
    if text_encoder is not None:
        text_encoder.to(run.device)
    frozen = settings.text_encoder == "frozen"
    trained_text = None if frozen or text_encoder is None else text_encoder.requires_grad_(True)
    unet = UNet2DConditionModel.from_config(config.unet)
    initialise(unet)
    process = noise_from_config(config.scheduler)
    parameters = encode_pictures(run, vae, data, flips=settings.horizontal_flip)
    conditions = Conditions(config, data, tokenizer, text_encoder)
    shape = (settings.batch_size, vae.config.latent_channels, *parameters[0].shape[2:])

    def batch_at(step: int) -> Rows:
        generator = _generator(config.seed, 2, step)
        batch = batch_indices(len(conditions.owner), settings.batch_size, step, config.seed + 2)
        moments = parameters[0][conditions.owner[batch]]
        posterior_noise = torch.randn(shape, generator=generator)
        if settings.horizontal_flip:
            turned = conditions.turns[batch] & (torch.rand(len(batch), generator=generator) < 0.5)
            moments = torch.where(turned[:, None, None, None], parameters[1][conditions.owner[batch]], moments)
        return {
            "latents": sample_posterior(moments, posterior_noise) * vae.config.scaling_factor,
            "noise": torch.randn(shape, generator=generator),
            "timesteps": process.draw_timesteps(len(batch), generator),
            **conditions.rows(batch, generator),
        }

    def sample() -> Tensor:
        """The first captions of as many pictures, drawn with guidance; or as many classes; or as many seeds."""
        size = (shape[2], shape[3])
        if tokenizer is None or text_encoder is None:
            labels = torch.arange(SAMPLES) % config.classes if config.classes else None
            seeds, steps = range(SAMPLES), SAMPLE_STEPS
            images = class_to_image(vae, unet, config.scheduler, labels, seeds, steps=steps, latent_size=size)
            return _rows_of_pictures(images, 1)
        captions = list(dict(reversed(data.captions)).values())[-SAMPLES:]
        ids = encode(tokenizer, ["", *captions], int((config.tokenizer or {})["model_max_length"]))
        images = text_to_image(
            vae,
            unet,
            text_encoder,
            config.scheduler,
            ids[1:],
            ids[:1].expand(len(captions), -1),
            range(len(captions)),
            steps=SAMPLE_STEPS,
            guidance=SAMPLE_GUIDANCE,
            latent_size=size,
        )
        return _rows_of_pictures(images, 1)

    objective = DenoiserObjective(
        unet,
        trained_text,
        noise=process,
        min_snr_gamma=settings.min_snr_gamma or None,
    )
    recipe = _recipe(config.to_dict(), vae.config.scaling_factor)
    weights = fit(run, Stage("denoiser", objective, batch_at, settings, recipe, config.seed + 2, sample))
    unet = UNet2DConditionModel.from_config(config.unet)
    _load(unet, weights, "unet.")
    if trained_text is not None and tokenizer is not None:
        text_encoder = new_text_encoder(config, tokenizer)
        _load(text_encoder, weights, "text_encoder.")
    return unet, text_encoder


def _rows_of_pictures(images: Tensor, rows: int) -> Tensor:
    """uint8 (N, H, W, C) -> one picture (rows * H, N / rows * W, 3)."""
    count, height, width, _ = images.shape
    grid = images.expand(-1, -1, -1, 3).reshape(rows, count // rows, height, width, 3).transpose(1, 2)
    return grid.reshape(rows * height, count // rows * width, 3)
