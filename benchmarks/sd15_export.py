"""Exports a Stable Diffusion 1.5-size model with random weights: seconds, peak memory of the process, parity.

sd15_export.py [FOLDER]        needs 12 GB of disk in FOLDER (build/sd15)
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.layout import save_component, write_json
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tokenizer import save_tokenizer, train_tokenizer
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.export.chain import export_bundle

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
TEXT = {
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


def make_checkpoint(folder: Path) -> None:
    """Stable Diffusion 1.5's shapes in fp32; the tokenizer is a small one of our own."""
    torch.manual_seed(0)
    save_component(UNet2DConditionModel.from_config(UNET), folder / "unet")
    save_component(AutoencoderKL.from_config(VAE), folder / "vae")
    save_component(CLIPTextModel.from_config(TEXT), folder / "text_encoder")
    save_tokenizer(train_tokenizer(["a lighthouse at dusk"], 600), folder / "tokenizer", 77)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    classes = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    index = {name: ["", kind] for name, kind in classes.items()}
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})


def main(folder: Path) -> None:
    if not (folder / "checkpoint" / "model_index.json").is_file():
        make_checkpoint(folder / "checkpoint")
        print("checkpoint written; run again, so that only the export is measured")
        return
    seconds: dict[str, float] = {}
    peaks_gb: dict[str, float] = {}
    running, started = "start", time.perf_counter()

    def progress(stage: str) -> None:
        nonlocal running, started
        now = time.perf_counter()
        graph = running.partition(":")[0]
        seconds[graph] = seconds.get(graph, 0.0) + now - started
        usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        peaks_gb[graph] = max(usages) / 1e6  # of the larger process: a large graph is compared in its own
        running, started = stage, now

    begun = time.perf_counter()
    bundle = export_bundle(
        LatentDiffusion.open(folder / "checkpoint"), folder / "bundle", force=True, progress=progress
    )
    progress("end")
    total = time.perf_counter() - begun
    for graph, value in seconds.items():
        print(f"{graph:22} {value:7.1f} s   peak so far {peaks_gb[graph]:.2f} GB")
    print(f"{'whole pipeline':22} {total:7.1f} s   peak {max(peaks_gb.values()):.2f} GB")
    errors = {f"{record['graph']}/{record['output']}": record["max_error"] for record in bundle.manifest.parity}
    print(json.dumps({"seconds": seconds, "total_s": total, "peak_gb": peaks_gb, "max_error": errors}))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/sd15"))
