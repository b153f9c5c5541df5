"""Checkpoints of other kinds than Stable Diffusion, and a cache that traces each of their networks once a session."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from ldm_reference.layout import save_checkpoint
from ldm_reference.unet import UNet2DConditionModel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaConfig, T5GemmaEncoder

from ldm_export.bundle.atomic import locked
from ldm_export.contract import GraphSpec
from ldm_export.export import onnx
from ldm_export.families import open_checkpoint
from ldm_export.families.base import GraphModule
from tests.tokenizer_fixtures import gemma_tokenizer, t5_tokenizer

CLASSES = 5
SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TEXT_UNET: dict[str, Any] = {
    **SMALL_UNET,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
}


class GraphCache:
    """Stands in for ``export_graph``: tracing takes seconds, and equal networks give equal bytes.

    Processes that share the folder wait for one another, and trace each network once between them.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def export_graph(self, module: GraphModule, graph: GraphSpec, example: tuple[Tensor, ...], folder: Path) -> Path:
        call = getattr(module.call, "__qualname__", "")  # the autoencoder is two graphs
        digest = hashlib.sha256(repr((graph, call, module.network.config)).encode())
        for tensor in module.network.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        own = self.folder / digest.hexdigest()
        own.mkdir(parents=True, exist_ok=True)
        with locked(own):
            if not (own / "traced").is_dir():
                onnx.export_graph(module, graph, example, own / "traced.partial")
                (own / "traced.partial").rename(own / "traced")
        shutil.copytree(own / "traced", folder)
        return folder / "model.onnx"


def perturb(module: torch.nn.Module) -> torch.nn.Module:
    """Move every weight off its initial value, so that a norm's scale or a bias that is ignored shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _without_text(folder: Path, tiny: Path, prediction_type: str = "epsilon", **unet: Any) -> None:
    torch.manual_seed(0)
    checkpoint = open_checkpoint(tiny)
    save_checkpoint(
        folder,
        vae=checkpoint.load("vae"),
        unet=perturb(UNet2DConditionModel.from_config({**SMALL_UNET, **unet})),
        text_encoder=None,
        tokenizer=None,
        scheduler={**checkpoint.scheduler, "prediction_type": prediction_type},
        dtype=torch.float32,
    )


def unconditional(folder: Path, tiny: Path) -> None:
    """No text, no class; predicts v."""
    _without_text(folder, tiny, "v_prediction")


def class_conditional(folder: Path, tiny: Path) -> None:
    _without_text(folder, tiny, num_class_embeds=CLASSES)


def refiner(folder: Path, tiny: Path) -> None:
    """SDXL's refiner: the second text encoder alone, and an aesthetic score in place of the target's size."""
    torch.manual_seed(0)
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    second = transformers.CLIPTextConfig.from_dict({**base.text_encoder.config.to_dict(), "projection_dim": 24})
    unet = diffusers.UNet2DConditionModel(
        **TEXT_UNET,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 5 * 8,
    )
    diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=perturb(transformers.CLIPTextModelWithProjection(second)),
        tokenizer=None,
        tokenizer_2=base.tokenizer,
        unet=perturb(unet),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(base.scheduler.config),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)


def segmind(folder: Path, tiny: Path) -> None:
    """As SSD-1B: SDXL with transformers of other depths in each block, and none in the middle."""
    stable_diffusion_xl(folder, tiny)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8, 16, 16],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2D",
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=[2, 4, 4],
        transformer_layers_per_block=[0, 2, 1],
        reverse_transformer_layers_per_block=[[1, 1, 1], [2, 1, 1], 0],
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    perturb(unet).save_pretrained(folder / "unet")


def eight_channels(folder: Path, tiny: Path) -> None:
    """Eight input channels, latents and those of the picture that is edited, and no text that would say how."""
    _without_text(folder, tiny, in_channels=8)


def instruct_pix2pix(folder: Path, tiny: Path) -> None:
    """Eight input channels, and text that says how the picture is edited."""
    torch.manual_seed(0)
    unet = perturb(diffusers.UNet2DConditionModel(**TEXT_UNET, cross_attention_dim=32, in_channels=8))
    parts = {**diffusers.StableDiffusionPipeline.from_pretrained(tiny).components, "unet": unet}
    diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


def instruct_pix2pix_xl(folder: Path, tiny: Path) -> None:
    """SDXL of eight input channels, its picture's latents scaled, as CosXL's are."""
    stable_diffusion_xl(folder, tiny)
    parts = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False).components
    torch.manual_seed(0)
    parts["unet"] = perturb(diffusers.UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 8}))
    kept = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.StableDiffusionXLInstructPix2PixPipeline(**kept, add_watermarker=False, is_cosxl_edit=True)
    pipe.register_to_config(is_cosxl_edit=True)
    pipe.save_pretrained(folder)


def inpainting(folder: Path, tiny: Path) -> None:
    """Nine input channels: latents, mask, latents of the masked picture."""
    _without_text(folder, tiny, in_channels=9)


def latent_consistency(folder: Path, tiny: Path) -> None:
    """A guidance-distilled text model: the scale goes into the UNet as ``timestep_cond``."""
    torch.manual_seed(0)
    unet = perturb(diffusers.UNet2DConditionModel(**TEXT_UNET, cross_attention_dim=32, time_cond_proj_dim=10))
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    scheduler = diffusers.LCMScheduler.from_config(base.scheduler.config)
    kept = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    diffusers.LatentConsistencyModelPipeline(unet=unet, scheduler=scheduler, **kept, **off).save_pretrained(folder)


def stable_diffusion_2(folder: Path, tiny: Path) -> None:
    """As Stable Diffusion 2.1: projections are products, not convolutions; each level has its own heads; predicts v."""
    torch.manual_seed(0)
    two_levels = {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [2, 4],
    }
    unet = diffusers.UNet2DConditionModel(
        **{**TEXT_UNET, **two_levels}, cross_attention_dim=32, use_linear_projection=True
    )
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    scheduler = diffusers.DDIMScheduler.from_config(base.scheduler.config, prediction_type="v_prediction")
    kept = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    diffusers.StableDiffusionPipeline(unet=perturb(unet), scheduler=scheduler, **kept, **off).save_pretrained(folder)


def stable_diffusion_xl(folder: Path, tiny: Path) -> None:
    """Two text encoders, the second with a projection; pooled text and picture sizes go into the UNet."""
    torch.manual_seed(0)
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    second = transformers.CLIPTextConfig.from_dict({**base.text_encoder.config.to_dict(), "projection_dim": 24})
    unet = diffusers.UNet2DConditionModel(
        **TEXT_UNET,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    diffusers.StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=perturb(transformers.CLIPTextModelWithProjection(second)),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=perturb(unet),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(base.scheduler.config),
        add_watermarker=False,
    ).save_pretrained(folder)


def flow_matching(folder: Path, tiny: Path) -> None:
    """As a UNet that was fine-tuned by flow matching: the scheduler alone says so."""
    shutil.copytree(tiny, folder)
    shutil.rmtree(folder / "scheduler")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


def stable_diffusion_3(folder: Path, tiny: Path, *, third: bool = False) -> None:
    """Two text encoders with projections, with T5 as the ``third`` or none, a transformer, 16 shifted channels of
    latents, flow matching."""
    torch.manual_seed(0)
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    text = transformers.CLIPTextConfig.from_dict({**base.text_encoder.config.to_dict(), "projection_dim": 24})
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    diffusers.StableDiffusion3Pipeline(
        transformer=perturb(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=perturb(shifted_autoencoder()),
        text_encoder=perturb(transformers.CLIPTextModelWithProjection(text)),
        tokenizer=base.tokenizer,
        text_encoder_2=perturb(transformers.CLIPTextModelWithProjection(text)),
        tokenizer_2=base.tokenizer,
        text_encoder_3=t5(width=96) if third else None,
        tokenizer_3=t5_tokenizer(folder.with_name(f"{folder.name} tokenizer")) if third else None,
    ).save_pretrained(folder)


TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "norm_num_groups": 4,
}


def diffusion_transformer(folder: Path, tiny: Path) -> None:
    """A transformer that reads a class and predicts a variance, too."""
    torch.manual_seed(0)
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    diffusers.DiTPipeline(
        transformer=perturb(diffusers.DiTTransformer2DModel(**TRANSFORMER)),
        vae=base.vae,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        id2label={0: "tench", 1: "goldfish"},
    ).save_pretrained(folder)


def shifted_autoencoder() -> diffusers.AutoencoderKL:
    """An autoencoder of 16 channels that are shifted and scaled."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def t5(width: int = 32) -> transformers.T5EncoderModel:
    """A small text encoder of T5's kind, for `t5_tokenizer`."""
    config = transformers.T5Config(
        vocab_size=600, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return perturb(transformers.T5EncoderModel(config))


def pixart(folder: Path, tiny: Path, *, sizes: bool = False) -> None:
    """A transformer that reads T5's states, and with ``sizes`` the picture's."""
    torch.manual_seed(0)
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    own = {"attention_head_dim": 12, **({"sample_size": 128, "num_layers": 1} if sizes else {})}
    transformer = diffusers.PixArtTransformer2DModel(
        **{**TRANSFORMER, **own}, cross_attention_dim=48, caption_channels=32
    )
    pipeline = diffusers.PixArtAlphaPipeline if sizes else diffusers.PixArtSigmaPipeline
    pipeline(
        tokenizer=t5_tokenizer(folder.with_name(f"{folder.name} tokenizer")),
        text_encoder=t5(),
        vae=base.vae,
        transformer=perturb(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)


SHIFTING: dict[str, dict[str, Any]] = {
    "exponential": {},
    "linear": {"time_shift_type": "linear", "shift_terminal": 0.1},
}
"""How noise levels go by the size of the picture: options of diffusers' scheduler."""


def shift_dynamically(checkpoint: Path, name: str) -> None:
    """Give a checkpoint of flow matching a scheduler of `SHIFTING`."""
    shutil.rmtree(checkpoint / "scheduler")
    small = {"base_image_seq_len": 16, "max_image_seq_len": 64, "max_shift": 2.0}  # so that sizes of tests differ much
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **small, **SHIFTING[name])
    scheduler.save_pretrained(checkpoint / "scheduler")


def deep_autoencoder() -> diffusers.AutoencoderDC:
    """A DC-AE of 8 channels."""
    blocks = ("ResBlock", "EfficientViTBlock")
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    )


def prx(folder: Path, tiny: Path, *, deep: bool = False) -> None:
    """A transformer that reads T5Gemma's states, with an autoencoder of shifted channels or a ``deep`` one, DC-AE."""
    torch.manual_seed(0)
    channels = 8 if deep else 16
    size = {"vocab_size": 1200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]}
    text = T5GemmaConfig(encoder={**size, **heads, "sliding_window": 8}, decoder={**size, **heads})
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=channels,
        patch_size=1 if deep else 2,
        context_in_dim=32,
        hidden_size=32,
        num_heads=4,
        depth=2,
        axes_dim=[4, 4],
    )
    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 24
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a class of diffusers that this pipeline is made of
        diffusers.PRXPipeline(
            transformer=perturb(transformer),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=perturb(T5GemmaEncoder(text.encoder)),
            tokenizer=tokenizer,
            vae=perturb(deep_autoencoder() if deep else shifted_autoencoder()),
            default_sample_size=16,
        ).save_pretrained(folder)
    text.save_pretrained(folder / "text_encoder")  # the whole model's, as the published checkpoints have it


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "unconditional": unconditional,
    "class-conditional": class_conditional,
    "inpainting": inpainting,
    "lcm": latent_consistency,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "refiner": refiner,
    "ssd-1b": segmind,
    "8 channels": eight_channels,
    "instruct-pix2pix": instruct_pix2pix,
    "instruct-pix2pix xl": instruct_pix2pix_xl,
    "flow": flow_matching,
    "sd3": stable_diffusion_3,
    "sd3 with t5": partial(stable_diffusion_3, third=True),
    "dit": diffusion_transformer,
    "pixart": pixart,
    "pixart alpha": partial(pixart, sizes=True),
    "prx": prx,
    "prx with dc-ae": partial(prx, deep=True),
}
"""How a checkpoint of each kind is written to a folder, given the one of ``tiny_checkpoint``."""
SLOW_KINDS = ("ssd-1b", "instruct-pix2pix xl", "sd3 with t5", "pixart alpha", "prx with dc-ae")
"""Those that others nearly show, too."""


def in_kinds(*left_out: str) -> list[Any]:
    """Every kind as a parameter of a test, the slow ones marked."""
    slow = pytest.mark.slow
    return [pytest.param(kind, marks=slow if kind in SLOW_KINDS else ()) for kind in KINDS if kind not in left_out]
