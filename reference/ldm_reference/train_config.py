"""The recipe of a training run: one TOML file, checked whole before the first batch."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.config import ConfigError, check_choice, check_positive, config_from_dict, read_text
from ldm_reference.flow import FLOW_CLASS
from ldm_reference.optimisation import Optimisation
from ldm_reference.schedules import SCHEDULES, alphas_cumprod_from_config
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tokenizer import SMALLEST_VOCAB
from ldm_reference.unet import UNet2DConditionModel, UNetConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REQUIRED = {
    "vae_stage": ("steps", "batch_size", "learning_rate"),
    "text_stage": ("steps", "batch_size", "learning_rate"),
    "unet_stage": ("steps", "batch_size", "learning_rate"),
    "tokenizer": ("vocab_size", "model_max_length"),
}
"""What has no default in the tables of a config; of [scheduler], see `scheduler_keys`."""
REQUIRED_OF_SCHEDULER = (
    *("_class_name", "prediction_type", "num_train_timesteps"),
    *("beta_schedule", "beta_start", "beta_end", "clip_sample"),  # diffusers' own defaults differ by class
)
FLOW_KEYS = ("_class_name", "num_train_timesteps", "shift")

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
PRECISIONS = ("no", "bf16", "fp16")


def scheduler_keys(scheduler: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys that [scheduler] must have, and those that it may have, by its class: flow matching, or DDPM's noise."""
    if scheduler.get("_class_name") == FLOW_CLASS:
        return FLOW_KEYS, FLOW_KEYS
    return REQUIRED_OF_SCHEDULER, SCHEDULER_KEYS


def _check_weight(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} = {value!r} must be a number of at least 0")


@dataclasses.dataclass(frozen=True)
class AutoencoderStage(Optimisation):
    """The first stage. Every term beside the reconstruction is off where its weight is 0.

    Attributes
    ----------
    reconstruction : "mse" or "l1", of pictures in [-1, 1]
    kl_weight, kl_warmup_steps : of the divergence per latent value, growing linearly from 0 over these steps
    perceptual_weight : of the distance in EfficientNet-Lite0 features
    adversarial_weight, adversarial_start : of the patch discriminator, and the step from which it takes part
    horizontal_flip : mirror a random half of the pictures
    """

    reconstruction: str = "mse"
    kl_weight: float = 1e-4
    kl_warmup_steps: int = 0
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reconstruction", self.reconstruction, ("mse", "l1"))
        _check_weight(
            kl_weight=self.kl_weight,
            kl_warmup_steps=self.kl_warmup_steps,
            perceptual_weight=self.perceptual_weight,
            adversarial_weight=self.adversarial_weight,
            adversarial_start=self.adversarial_start,
        )


@dataclasses.dataclass(frozen=True)
class TextStage(Optimisation):
    """The contrastive stage; ``projection_dim`` is the width of the space that text and pictures share."""

    projection_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(projection_dim=self.projection_dim)
        if self.gradient_accumulation > 1:
            raise ConfigError(
                f"gradient_accumulation = {self.gradient_accumulation} must be 1 in [text_stage]: each row is "
                "compared with the whole batch; lower batch_size, or use more processes"
            )


@dataclasses.dataclass(frozen=True)
class DenoiserStage(Optimisation):
    """The last stage.

    Attributes
    ----------
    min_snr_gamma : of the loss weights (2303.09556); 0 for equal weights, as flow matching needs
    caption_dropout : share of the captions that are replaced by the empty one, for guidance (2207.12598)
    text_encoder : "fine-tuned" with the UNet, or "frozen" as the contrastive stage left it
    horizontal_flip : mirror a random half of the pictures, but none whose caption names a side
    """

    min_snr_gamma: float = 5.0
    caption_dropout: float = 0.1
    text_encoder: str = "fine-tuned"
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(min_snr_gamma=self.min_snr_gamma)
        if not 0 <= self.caption_dropout < 1:
            raise ConfigError(f"caption_dropout = {self.caption_dropout!r} must be in [0, 1)")
        check_choice("text_encoder", self.text_encoder, ("fine-tuned", "frozen"))


STAGES = {"vae_stage": AutoencoderStage, "text_stage": TextStage, "unet_stage": DenoiserStage}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on, but for the pictures.

    ``vae``, ``text_encoder``, ``unet`` and ``scheduler`` hold the keys of those components' config files; ``tokenizer``
    holds ``vocab_size`` and ``model_max_length``. A UNet without cross-attention has neither text tables nor a text
    stage: it is unconditional or, with ``num_class_embeds``, class-conditional. ``mixed_precision`` is "no", "bf16" or
    "fp16" (1710.03740).
    """

    seed: int
    resolution: int
    vae_stage: AutoencoderStage
    unet_stage: DenoiserStage
    vae: Mapping[str, Any]
    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text_stage: TextStage | None = None
    tokenizer: Mapping[str, Any] | None = None
    text_encoder: Mapping[str, Any] | None = None
    mixed_precision: str = "no"
    sharded: bool = False

    def __post_init__(self) -> None:
        check_positive(resolution=self.resolution)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {self.seed!r} must be in [0, 2**32)")
        check_choice("mixed_precision", self.mixed_precision, PRECISIONS)
        self._check_scheduler()
        with torch.device("meta"):  # before a stage is trained that the next one cannot use
            vae = AutoencoderKL.from_config(self.vae).config
            unet = UNet2DConditionModel.from_config(self.unet).config
        self._check_conditioning(unet)
        if self.resolution % vae.factor:
            raise ConfigError(f"resolution = {self.resolution} is not a multiple of the autoencoder's {vae.factor}")
        check_choice("vae in_channels", vae.in_channels, (1, 3))
        for name, given, needed in (
            ("vae out_channels", vae.out_channels, vae.in_channels),
            ("unet in_channels", unet.in_channels, vae.latent_channels),
            ("unet out_channels", unet.out_channels, vae.latent_channels),
            ("unet sample_size", unet.sample_size, self.resolution // vae.factor),
        ):
            if given != needed:
                raise ConfigError(f"{name} = {given!r} must be {needed} here")

    def _check_scheduler(self) -> None:
        _, known = scheduler_keys(self.scheduler)
        if unknown := self.scheduler.keys() - known:
            of = f" of {FLOW_CLASS}" if known is FLOW_KEYS else ""
            raise ConfigError(f"[scheduler] has the unknown key {min(unknown)!r}; known{of} are {', '.join(known)}")
        if known is FLOW_KEYS:
            self._check_flow()
            return
        check_choice("timestep_spacing", self.scheduler.get("timestep_spacing", "leading"), SPACINGS)
        check_choice("beta_schedule", self.scheduler["beta_schedule"], tuple(SCHEDULES))
        try:
            alphas_cumprod = alphas_cumprod_from_config(self.scheduler)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"[scheduler] gives no noise schedule ({error})") from error
        prediction_type = self.scheduler["prediction_type"]
        check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample"))
        if prediction_type == "epsilon" and self.scheduler.get("rescale_betas_zero_snr"):
            raise ConfigError(
                "prediction_type = 'epsilon' contradicts rescale_betas_zero_snr = true: the last timestep is noise "
                f"alone (alphas_cumprod {alphas_cumprod[-1].item():.0e}), which says nothing of the picture; "
                "use 'v_prediction' (2305.08891, section 3.2)"
            )

    def _check_flow(self) -> None:
        check_positive(num_train_timesteps=self.scheduler["num_train_timesteps"])
        shift = self.scheduler["shift"]
        if type(shift) not in (int, float) or not 0 < shift < math.inf:
            raise ConfigError(f"shift = {shift!r} must be a number above 0")
        if gamma := self.unet_stage.min_snr_gamma:
            raise ConfigError(
                f"min_snr_gamma = {gamma!r} weights the noise of DDPM; {FLOW_CLASS} needs min_snr_gamma = 0"
            )

    def _check_conditioning(self, unet: UNetConfig) -> None:
        if unet.addition_embed_type or unet.class_embed_type or unet.time_cond_proj_dim:
            raise ConfigError("the unet must be conditioned on text, on num_class_embeds classes, or on nothing else")
        tables = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        for name, table in tables.items():
            if unet.reads_text and table is None:
                raise ConfigError(f"[{name}] is missing: the unet reads text")
            if not unet.reads_text and table is not None:
                raise ConfigError(f"[{name}] has no use: the unet has no cross-attention")
        if not unet.reads_text:
            if self.text_stage is not None:
                raise ConfigError("[text_stage] has no use: the unet has no cross-attention")
            return
        if unet.has_class_labels:
            raise ConfigError("the unet must be conditioned on text or on classes, not on both")
        assert self.tokenizer is not None
        assert self.text_encoder is not None
        check_positive(**self.tokenizer)
        if self.tokenizer["vocab_size"] < SMALLEST_VOCAB:
            raise ConfigError(f"vocab_size = {self.tokenizer['vocab_size']!r} must be at least {SMALLEST_VOCAB}")
        if self.unet_stage.text_encoder == "frozen" and self.text_stage is None:
            raise ConfigError('text_encoder = "frozen" needs a [text_stage] that trains it first')
        with torch.device("meta"):
            text_encoder = CLIPTextModel.from_config(self.text_encoder).config
        if unet.cross_attention_dim != text_encoder.hidden_size:
            raise ConfigError(
                f"unet cross_attention_dim = {unet.cross_attention_dim!r} must be {text_encoder.hidden_size} here"
            )

    @property
    def channels(self) -> int:
        """Channels of the pictures: 3, or 1 for grey ones."""
        return int(self.vae.get("in_channels", 3))

    @property
    def classes(self) -> int | None:
        count: int | None = self.unet.get("num_class_embeds")
        return count

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """Read a TOML file.

        Raises
        ------
        ConfigError
            If it is not TOML, or a key is missing, unknown, of the wrong type, out of range or in contradiction.
        """
        try:
            values = tomllib.loads(read_text(path))
        except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:  # nested too deep; too many digits
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a readable TOML file ({error})") from error
        fields = dataclasses.fields(cls)
        missing = {field.name for field in fields if field.default is dataclasses.MISSING} - values.keys()
        if missing:
            raise ConfigError(f"{path}: missing {', '.join(sorted(missing))}")
        tables = [field.name for field in fields if field.type not in ("int", "str", "bool")]
        for name in tables:
            if name in values and not isinstance(values[name], dict):
                raise ConfigError(f"{path}: {name} = {values[name]!r} must be a table")
        required = {**REQUIRED, "scheduler": scheduler_keys(values["scheduler"])[0]}
        for table, keys in required.items():
            if table in values and (lacking := [key for key in keys if key not in values[table]]):
                raise ConfigError(f"{path}: [{table}] lacks {', '.join(lacking)}")
        for name, stage in STAGES.items():
            if name in values:
                values[name] = config_from_dict(stage, values[name], {})
        return config_from_dict(cls, values, {})

    def to_dict(self) -> dict[str, Any]:
        """What a state file records, so that it is not resumed with another config."""
        return dataclasses.asdict(self)
