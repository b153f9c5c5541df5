"""Make the golden bundle of today's format: a random model like SDXL's refiner, small enough to be committed.

make.py FOLDER     writes FOLDER/bundle and what it generates, FOLDER/expected.npz; each format is made once, and kept
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from ldm_reference.tokenizer import END, save_tokenizer, train_tokenizer

from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from tests.bundle_fixture import SMALL_UNET, perturb

CAPTIONS = ("a red circle", "a blue square", "two green triangles on white")
TOKENS = 16
REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"prompts": ["a red circle", "a blue square"], "sampler": "dpmpp-2m", "steps": 5, "seed": [3, 4]},
    "negative": {"prompts": ["a red circle"], "negative_prompt": "a blue square", "sampler": "euler", "steps": 4},
    "wide": {"prompts": ["two green triangles"], "sampler": "ddim", "steps": 3, "height": 16, "width": 24},
}
"""What is generated, by name: options of `ldm_export.runtime.Pipeline.generate`."""


def checkpoint(folder: Path) -> None:
    """Write the model, in diffusers layout."""
    torch.manual_seed(0)
    trained = train_tokenizer(CAPTIONS, 530)
    end = trained.token_to_id(END)
    save_tokenizer(trained, folder / "trained", TOKENS)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "trained")
    text = transformers.CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    unet = diffusers.UNet2DConditionModel(
        **{
            **SMALL_UNET,
            "block_out_channels": [4],
            "norm_num_groups": 2,
            "down_block_types": ["CrossAttnDownBlock2D"],
            "mid_block_type": None,
            "up_block_types": ["UpBlock2D"],
        },
        cross_attention_dim=8,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 5 * 4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=perturb(vae),
        text_encoder=None,
        text_encoder_2=perturb(transformers.CLIPTextModelWithProjection(text)),
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=perturb(unet),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder / "golden")


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        checkpoint(Path(work))
        bundle = export_bundle(open_checkpoint(Path(work) / "golden"), folder / "bundle")
    pipeline = Pipeline(bundle, "cpu")
    made = {name: pipeline.generate(**request) for name, request in REQUESTS.items()}
    images = {f"{name}.images": result.images for name, result in made.items()}
    np.savez_compressed(folder / "expected.npz", **images, **{f"{n}.latents": r.latents for n, r in made.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
