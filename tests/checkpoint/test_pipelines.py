"""What pipeline classes fill in, against diffusers' own constructors, and the configs that are read past."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from ldm_export.checkpoint import LatentDiffusion, SamplingDefaults
from ldm_export.errors import CheckpointError
from ldm_export.export import chain
from ldm_export.families import family_of, open_checkpoint
from ldm_export.families.stable_diffusion import StableDiffusion
from ldm_export.plan import compile_plan

KIND = StableDiffusion.kind
PARTS = {*KIND.own_parts, *KIND.optional_parts}

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_scheduler(checkpoint: Path, name: str, **config: Any) -> LatentDiffusion:
    edit_json(checkpoint / "model_index.json", scheduler=["diffusers", name])
    (checkpoint / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    return open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", KIND.pipelines)
def test_every_argument_of_the_class_is_known(name: str) -> None:
    given = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: value.default for key, value in given.items() if key not in PARTS | {"self"}}
    assert KIND.pipelines[name].options == defaults
    for key, default in defaults.items():
        assert KIND.option({"_class_name": name}, key) == default
        assert KIND.option({"_class_name": name, key: not default}, key) is not default


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_what_the_constructor_makes_of_a_scheduler(checkpoint: Path, name: str, scheduler: str) -> None:
    """A config with its class alone: diffusers' Stable Diffusion overrules two of the defaults, its SDXL none."""
    edit_json(checkpoint / "model_index.json", _class_name=name)
    model = with_scheduler(checkpoint, scheduler)
    cls = getattr(diffusers, name)
    none = dict.fromkeys(inspect.signature(cls.__init__).parameters.keys() & PARTS)
    pipeline = cls(**{**none, "scheduler": getattr(diffusers, scheduler)()})
    judge = pipeline.scheduler
    judge.set_timesteps(20)
    plan = compile_plan(model.scheduler, model.drawing.sampler, 20)
    assert [row.timestep for row in plan.rows] == pytest.approx(judge.timesteps.tolist(), abs=1e-3)
    assert any(row.clip for row in plan.rows) == bool(judge.config.get("clip_sample"))


def test_the_class_of_the_scheduler_is_that_of_the_index(checkpoint: Path) -> None:
    edit_json(checkpoint / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    model = open_checkpoint(checkpoint)
    assert model.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert model.drawing == SamplingDefaults("euler")


@pytest.mark.parametrize(
    ("name", "config", "sampler", "steps"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, "plms", 20),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp-2m-sde", 20),
        ("UniPCMultistepScheduler", {}, "unipc", 20),
        ("LCMScheduler", {}, "lcm", 4),
        ("LCMScheduler", {"original_inference_steps": 2}, "lcm", 2),
        ("DDIMScheduler", {"num_train_timesteps": 12}, "ddim", 11),
    ],
)
def test_a_model_is_drawn_with_its_own_scheduler(
    checkpoint: Path, name: str, config: dict[str, Any], sampler: str, steps: int
) -> None:
    model = with_scheduler(checkpoint, name, **config)
    assert model.drawing == SamplingDefaults(sampler, steps)
    assert compile_plan(model.scheduler, sampler, steps).rows


@pytest.mark.parametrize("name", ["FlowMatchLCMScheduler", "TCDScheduler", "PNDMScheduler"])
def test_a_scheduler_that_no_sampler_is(checkpoint: Path, name: str) -> None:
    model = with_scheduler(checkpoint, name)
    with pytest.raises(CheckpointError, match=name):
        _ = model.drawing
    chosen = open_checkpoint(checkpoint, sampler="euler")
    if name == "FlowMatchLCMScheduler":
        with pytest.raises(CheckpointError, match="Use another checkpoint"):
            _ = chosen.drawing
    else:
        assert chosen.drawing == SamplingDefaults("euler")


def test_what_the_unet_predicts_cannot_be_said_of_flow_matching(checkpoint: Path) -> None:
    with_scheduler(checkpoint, "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(CheckpointError, match=r"epsilon was asked for, and its scheduler, .* Leave it out\."):
        _ = open_checkpoint(checkpoint, prediction_type="epsilon").scheduler


def test_what_the_unet_predicts_can_be_said(checkpoint: Path) -> None:
    model = open_checkpoint(checkpoint, prediction_type="v_prediction")
    assert model.scheduler["prediction_type"] == "v_prediction"
    assert family_of(model).facts["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        ("StableDiffusionPipeline", {"sample_size": None}, 64),
        ("StableDiffusionXLPipeline", {"sample_size": None}, 128),
        ("StableDiffusionPipeline", {"sample_size": 32, "_diffusers_version": "0.6.0.dev0"}, 64),
        ("StableDiffusionPipeline", {"sample_size": 32, "_diffusers_version": "0.10.0"}, 32),
        ("StableDiffusionPipeline", {"sample_size": [8, 16]}, (8, 16)),
        ("StableDiffusionPipeline", {"sample_size": [8, 8]}, 8),
    ],
)
def test_the_size_of_the_latents(checkpoint: Path, name: str, changes: dict[str, Any], size: Any) -> None:
    edit_json(checkpoint / "model_index.json", _class_name=name)
    edit_json(checkpoint / "unet/config.json", **changes)
    model = open_checkpoint(checkpoint)
    height, width = size if isinstance(size, tuple) else (size, size)
    assert model.latent_size == (height, width)
    family = family_of(model)
    assert (family.facts["height"], family.facts["width"]) == (2 * height, 2 * width)
    (unet,) = (graph for graph in family.graphs if graph.component == "unet")
    assert unet.config is not None
    assert unet.config["sample_size"] == size  # which optimum-onnx reads


LEFTOVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "EMAModel": ("unet", {"decay": 0.9999, "optimization_step": 100, "use_ema_warmup": False}),
    "two names of SiLU": ("unet", {"act_fn": "swish"}),
    "keys of other block types": ("unet", {"cross_attention_norm": "layer_norm", "resnet_out_scale_factor": 2.0}),
    "old transformers": (
        "text_encoder",
        {"return_dict": True, "id2label": {"0": "LABEL_0"}, "is_decoder": False, "top_k": 50, "bad_words_ids": None},
    ),
    "no attention mask": ("text_encoder", {"use_attention_mask": False}),
    "a shift of nought": ("vae", {"shift_factor": 0.0}),
    "an unknown key": ("vae", {"use_tiling": False, "_name_or_path": "x"}),
    "a float that JSON has not": ("vae", {"note": float("nan")}),
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_keys_that_change_nothing(checkpoint: Path, case: str) -> None:
    component, changes = LEFTOVERS[case]
    edit_json(checkpoint / component / "config.json", **changes)
    assert open_checkpoint(checkpoint).load(component)


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        family_of(open_checkpoint(checkpoint)).check()
    assert str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize(
    ("component", "changes", "sentence"),
    [
        ("unet", {"in_channels": 7}, "the UNet takes 7 channels and the autoencoder has 4"),
        ("unet", {"out_channels": 8}, "the UNet gives 8 channels and the autoencoder has 4"),
        ("vae", {"latent_channels": 8}, "the UNet takes 4 channels and the autoencoder has 8"),
        ("vae", {"in_channels": 4, "out_channels": 4}, "pictures have 4 channels in and 4 out"),
        ("vae", {"in_channels": 3, "out_channels": 1}, "pictures have 3 channels in and 1 out"),
        ("unet", {"cross_attention_dim": 64}, "the text encoding is 32 wide, and the UNet reads 64"),
        ("unet", {"cross_attention_dim": [32, 16]}, "the text encoding is 32 wide, and the UNet reads (32, 16)"),
        (
            "unet",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "it has text_encoder for a UNet that reads text_encoder and text_encoder_2 or text_encoder_2",
        ),
        ("text_encoder", {"max_position_embeddings": 8}, "tokenizer gives 16 tokens; the text_encoder has 8 positions"),
        ("text_encoder", {"vocab_size": 100}, "the text_encoder knows 100 tokens"),
    ],
)
def test_networks_that_do_not_fit_together(
    checkpoint: Path, component: str, changes: dict[str, Any], sentence: str
) -> None:
    edit_json(checkpoint / component / "config.json", **changes)
    assert sentence in refusal(checkpoint)


def test_parts_that_do_not_fit_the_unet(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model_index.json").read_text())
    edit_json(checkpoint / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])
    assert "the text_encoder is not a CLIPTextModel" in refusal(checkpoint)
    edit_json(checkpoint / "model_index.json", text_encoder=[None, None])
    assert "names no text_encoder" in refusal(checkpoint)
    edit_json(checkpoint / "model_index.json", **index)
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "mid_block_type": None}
    edit_json(checkpoint / "unet/config.json", **plain)
    assert "the UNet reads no text" in refusal(checkpoint)


def test_more_positions_than_the_tokenizer_gives(checkpoint: Path) -> None:
    edit_json(checkpoint / "text_encoder/config.json", max_position_embeddings=40)
    text_encoder = family_of(open_checkpoint(checkpoint)).graphs[0].spec
    assert text_encoder.inputs[0].shape == ("batch", 16)
    assert text_encoder.outputs[0].shape == ("batch", 16, 32)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "garbage"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"merges": [1], "vocab": {}}}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(checkpoint: Path, name: str, content: str) -> None:
    (checkpoint / "tokenizer" / name).write_text(content)
    message = refusal(checkpoint)
    assert name in message
    assert "Use the tokenizer that was saved with the model." in message


def test_what_is_left_out_is_named(checkpoint: Path) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit_json(checkpoint / "model_index.json", safety_checker=checker, _class_name="StableDiffusionSAGPipeline")
    model = open_checkpoint(checkpoint)
    assert family_of(model).notes == [
        "Left out: safety_checker; a bundle has no such parts.",
        "The checkpoint is of a StableDiffusionSAGPipeline; the bundle generates as a StableDiffusionPipeline does.",
    ]
    assert chain._source_facts(model)["left_out"] == ["safety_checker"]
    edit_json(checkpoint / "unet/config.json", in_channels=9)
    assert (
        "takes 9 channels, as for inpainting, so the bundle wants an image and a mask"
        in family_of(open_checkpoint(checkpoint)).notes[-1]
    )
