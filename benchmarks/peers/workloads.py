"""What peers are compared on: models with the same weights as a checkpoint, as a bundle and as optimum-onnx exports it.

workloads.py WORKLOAD FOLDER        emoji64, 52m (a UNet of 52 M parameters at 256 px) or sd15 (Stable Diffusion 1.5's
                                    shapes at 512 px); the last two with random weights

optimum/ is made by the environment that has optimum-onnx: PYTHON workloads.py optimum FOLDER.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

SD_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD_VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
SD_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "eos_token_id": 2,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SMALL_UNET = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "cross_attention_dim": 256,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
SMALL_VAE = {**SD_VAE, "sample_size": 256, "block_out_channels": [32, 64, 64, 64], "layers_per_block": 1}
SMALL_TEXT = {
    **SD_TEXT,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "52m": (SMALL_UNET, SMALL_VAE, SMALL_TEXT),
    "sd15": (SD_UNET, SD_VAE, SD_TEXT),
}
WORKLOADS = ("emoji64", *SHAPES)
BATCH, TOKENS = 2, 77


def make_checkpoint(
    folder: Path, unet: dict[str, Any] = SD_UNET, vae: dict[str, Any] = SD_VAE, text: dict[str, Any] = SD_TEXT
) -> None:
    """A checkpoint of these shapes with random weights in fp32; the tokenizer is a small one of our own."""
    import torch
    from ldm_reference.autoencoder import AutoencoderKL
    from ldm_reference.layout import save_component, write_json
    from ldm_reference.text_encoder import CLIPTextModel
    from ldm_reference.tokenizer import save_tokenizer, train_tokenizer
    from ldm_reference.unet import UNet2DConditionModel

    torch.manual_seed(0)
    save_component(UNet2DConditionModel.from_config(unet), folder / "unet")
    save_component(AutoencoderKL.from_config(vae), folder / "vae")
    save_component(CLIPTextModel.from_config(text), folder / "text_encoder")
    save_tokenizer(train_tokenizer(["a lighthouse at dusk"], 600), folder / "tokenizer", TOKENS)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    classes = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    library = {"vae": "diffusers", "unet": "diffusers", "text_encoder": "transformers"}
    index = {name: [library[name], kind] for name, kind in classes.items()}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "PNDMScheduler"]}
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})


def make_workload(name: str, folder: Path, *, cpu_target: bool = True) -> None:
    """Checkpoint, bundle with its target for this CPU and the inputs of a call; what is there already stays."""
    from ldm_export.export.chain import export_bundle
    from ldm_export.export.ort_cpu import build_ort_cpu
    from ldm_export.families import open_checkpoint

    checkpoint = folder / "checkpoint"
    if not (checkpoint / "model_index.json").is_file():
        if name == "emoji64":
            shutil.copytree(open_checkpoint(name).path, checkpoint)
        else:
            make_checkpoint(checkpoint, *SHAPES[name])
    model = open_checkpoint(checkpoint)
    if not (folder / "bundle").is_dir():
        bundle = export_bundle(model, folder / "bundle", progress=print)
        if cpu_target:
            build_ort_cpu(bundle, print)
    unet = model.configs["unet"]
    rng, side = np.random.default_rng(0), unet["sample_size"]
    shapes = {"sample": (BATCH, unet["in_channels"], side, side)}
    shapes["encoder_hidden_states"] = (BATCH, TOKENS, unet["cross_attention_dim"])
    np.savez(folder / "inputs.npz", **{key: rng.standard_normal(of).astype(np.float32) for key, of in shapes.items()})


def export_with_optimum(folder: Path) -> None:
    """Runs in the environment that has optimum-onnx."""
    from optimum.exporters.onnx import main_export

    if not (folder / "optimum" / "unet" / "model.onnx").is_file():
        names = str(folder / "checkpoint"), str(folder / "optimum")
        main_export(*names, task="text-to-image", library_name="diffusers", do_validation=False)


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    where.mkdir(parents=True, exist_ok=True)
    if what == "optimum":
        export_with_optimum(where)
    elif what in WORKLOADS:
        make_workload(what, where)
    else:
        sys.exit(f"There is no workload {what!r}; there are {', '.join(WORKLOADS)}.")
