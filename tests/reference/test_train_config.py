"""The recipe is checked whole: each way in which it cannot fit or contradicts itself is one sentence."""

from __future__ import annotations

from pathlib import Path

import ldm_reference
import pytest
from ldm_reference.config import ConfigError
from ldm_reference.train_config import TrainConfig

from tests.tiny_recipe import CONFIG
from tests.training import FLOW, TEXT_STAGE, config_from, edited

WITHOUT_TEXT = [
    (CONFIG[CONFIG.index("[tokenizer]") : CONFIG.index("[unet]\n")], ""),
    (
        '["DownBlock2D", "CrossAttnDownBlock2D"]',
        '["DownBlock2D", "AttnDownBlock2D"]\nmid_block_type = "UNetMidBlock2D"',
    ),
    ('["CrossAttnUpBlock2D", "UpBlock2D"]', '["AttnUpBlock2D", "UpBlock2D"]'),
    ("cross_attention_dim = 16\n", ""),
]

LIES = {
    "not TOML": ([("seed = 3", "seed = [")], "is not a readable TOML file"),
    "no seed": ([("seed = 3", "")], "missing seed"),
    "seed is text": ([("seed = 3", 'seed = "3"')], "seed = '3' must be int"),
    "seed too large": ([("seed = 3", "seed = 4294967296")], "seed = 4294967296 must be in [0, 2**32)"),
    "unknown key": ([("seed = 3", "seed = 3\nspeed = 1")], "unknown key 'speed'"),
    "precision": (
        [("seed = 3", 'seed = 3\nmixed_precision = "int8"')],
        "mixed_precision = 'int8' is not supported; allowed are 'no', 'bf16', 'fp16'",
    ),
    "dropout of all": ([("caption_dropout = 0.2", "caption_dropout = 1.0")], "caption_dropout = 1.0 must be in [0, 1)"),
    "gamma": ([("caption_dropout = 0.2", "min_snr_gamma = -1")], "min_snr_gamma = -1 must be a number of at least 0"),
    "text encoder": (
        [("caption_dropout = 0.2", 'text_encoder = "thawed"')],
        "text_encoder = 'thawed' is not supported; allowed are 'fine-tuned', 'frozen'",
    ),
    "frozen untrained": (
        [("caption_dropout = 0.2", 'text_encoder = "frozen"')],
        'text_encoder = "frozen" needs a [text_stage] that trains it first',
    ),
    "kl": ([("kl_weight = 1e-4", "kl_weight = nan")], "kl_weight = nan must be a number of at least 0"),
    "perceptual": (
        [("kl_weight = 1e-4", "perceptual_weight = -0.1")],
        "perceptual_weight = -0.1 must be a number of at least 0",
    ),
    "reconstruction": (
        [("kl_weight = 1e-4", 'reconstruction = "huber"')],
        "reconstruction = 'huber' is not supported; allowed are 'mse', 'l1'",
    ),
    "schedule": (
        [("kl_weight = 1e-4", 'schedule = "linear"')],
        "schedule = 'linear' is not supported; allowed are 'cosine', 'constant', 'cyclic'",
    ),
    "uneven parts": (
        [("batch_size = 4", "batch_size = 4\ngradient_accumulation = 3")],
        "batch_size = 4 cannot be cut into 3 equal parts (1 processes x gradient_accumulation 3); use a multiple",
    ),
    "contrast in parts": (
        [("[vae]", TEXT_STAGE + "gradient_accumulation = 2\n\n[vae]")],
        "gradient_accumulation = 2 must be 1 in [text_stage]",
    ),
    "projection": (
        [("[vae]", TEXT_STAGE.replace("projection_dim = 8", "projection_dim = 0") + "\n[vae]")],
        "projection_dim = 0 must hold integers of at least 1",
    ),
    "resolution": (
        [("resolution = 16", "resolution = 15")],
        "resolution = 15 is not a multiple of the autoencoder's 2",
    ),
    "no vocabulary": ([("vocab_size = 540", "")], "[tokenizer] lacks vocab_size"),
    "empty vocabulary": ([("vocab_size = 540", "vocab_size = 0")], "vocab_size = 0 must hold integers of at least 1"),
    "small vocabulary": ([("vocab_size = 540", "vocab_size = 500")], "vocab_size = 500 must be at least 514"),
    "no steps": ([("steps = 7", "")], "[vae_stage] lacks steps"),
    "half a step": ([("steps = 7", "steps = 7.5")], "steps = 7.5 must be int"),
    "misspelt": ([("steps = 7", "stepz = 7\nsteps = 7")], "unknown key 'stepz'"),
    "prediction": ([('"v_prediction"', '"velocity"')], "prediction_type = 'velocity' is not supported"),
    "scheduler key": (
        [("clip_sample = false", "clip_sample = false\nbeta = 1")],
        "[scheduler] has the unknown key 'beta'",
    ),
    "spacing": (
        [("clip_sample = false", 'clip_sample = false\ntimestep_spacing = "even"')],
        "timestep_spacing = 'even' is not supported",
    ),
    "no schedule": ([("beta_end = 0.012", 'beta_end = "a"')], "[scheduler] gives no noise schedule"),
    "epsilon of pure noise": (
        [
            ('"v_prediction"', '"epsilon"'),
            ("clip_sample = false", "clip_sample = false\nrescale_betas_zero_snr = true"),
        ],
        "prediction_type = 'epsilon' contradicts rescale_betas_zero_snr = true",
    ),
    "beta of flow matching": (
        [*FLOW, ("shift = 1.0", "shift = 1.0\nbeta_start = 0.1")],
        "'beta_start'; known of FlowMatchEulerDiscreteScheduler are _class_name, num_train_timesteps, shift",
    ),
    "no shift": ([*FLOW, ("shift = 1.0\n", "")], "[scheduler] lacks shift"),
    "shift of none": ([*FLOW, ("shift = 1.0", "shift = 0")], "shift = 0 must be a number above 0"),
    "no timesteps": (
        [*FLOW, ("num_train_timesteps = 1000", "num_train_timesteps = 0")],
        "num_train_timesteps = 0 must hold integers of at least 1",
    ),
    "Min-SNR of flow matching": (
        [*FLOW, ("min_snr_gamma = 0", "")],
        "min_snr_gamma = 5.0 weights the noise of DDPM; FlowMatchEulerDiscreteScheduler needs min_snr_gamma = 0",
    ),
    "width of the text": (
        [("cross_attention_dim = 16", "cross_attention_dim = 24")],
        "unet cross_attention_dim = 24 must be 16 here",
    ),
    "latents in": ([("dropout = 0.1", "in_channels = 3")], "unet in_channels = 3 must be 4 here"),
    "latents out": ([("dropout = 0.1", "out_channels = 8")], "unet out_channels = 8 must be 4 here"),
    "size": ([("sample_size = 8", "sample_size = 16")], "unet sample_size = 16 must be 8 here"),
    "two channels": (
        [("[vae]\n", "[vae]\nin_channels = 2\nout_channels = 2\n")],
        "vae in_channels = 2 is not supported; allowed are 1, 3",
    ),
    "colour from grey": ([("[vae]\n", "[vae]\nin_channels = 1\n")], "vae out_channels = 3 must be 1 here"),
    "text and classes": (
        [("dropout = 0.1", "num_class_embeds = 3")],
        "the unet must be conditioned on text or on classes, not on both",
    ),
    "other conditions": (
        [("dropout = 0.1", "time_cond_proj_dim = 8")],
        "the unet must be conditioned on text, on num_class_embeds classes, or on nothing else",
    ),
    "layers": ([("num_hidden_layers = 1", "num_hidden_layers = 0")], "num_hidden_layers = 0 must hold integers"),
    "no tokenizer": (
        [(CONFIG[CONFIG.index("[tokenizer]") : CONFIG.index("[text_encoder]")], "")],
        "[tokenizer] is missing: the unet reads text",
    ),
    "unread text": (
        [*WITHOUT_TEXT, ("[unet]\n", "[tokenizer]\nvocab_size = 540\nmodel_max_length = 8\n[unet]\n")],
        "[tokenizer] has no use: the unet has no cross-attention",
    ),
    "unread stage": (
        [*WITHOUT_TEXT, ("[unet]\n", TEXT_STAGE + "\n[unet]\n")],
        "[text_stage] has no use: the unet has no cross-attention",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_config_that_cannot_be_trained(tmp_path: Path, lie: str) -> None:
    changes, sentence = LIES[lie]
    with pytest.raises(ConfigError) as caught:
        config_from(edited(*changes), tmp_path)
    assert sentence in str(caught.value)


def test_conditions_by_the_unet(tmp_path: Path) -> None:
    assert config_from(CONFIG, tmp_path).classes is None
    unconditional = config_from(edited(*WITHOUT_TEXT), tmp_path)
    assert (unconditional.tokenizer, unconditional.classes, unconditional.channels) == (None, None, 3)
    assert config_from(edited(*WITHOUT_TEXT, ("dropout = 0.1", "num_class_embeds = 3")), tmp_path).classes == 3


def test_a_config_that_is_missing_or_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read \(No such file"):
        TrainConfig.read(tmp_path / "config.toml")
    for text, sentence in (
        ("x=" + "[" * 100_000, "is not a readable TOML file"),
        ("x=" + "9" * 5000, "is not a readable TOML file"),
        ("x=1\0", "is not a readable TOML file"),
        ("x='\udcff'", "is not UTF-8 text"),
    ):
        (tmp_path / "config.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigError, match=sentence) as raised:
            TrainConfig.read(tmp_path / "config.toml")
        assert len(str(raised.value)) < 400
    names = ("vae_stage", "unet_stage", "vae", "unet", "scheduler")
    with pytest.raises(ConfigError, match="vae_stage = 5 must be a table"):
        config_from("seed = 3\nresolution = 16\n" + "".join(f"{name} = 5\n" for name in names), tmp_path)


def test_the_shipped_recipes_can_be_read() -> None:
    recipes = list((Path(ldm_reference.__file__).parent / "recipes").glob("*.toml"))
    assert recipes
    for recipe in recipes:
        assert TrainConfig.read(recipe).resolution > 0
