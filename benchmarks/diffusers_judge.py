"""Draws the demo's prompts with diffusers and with the bundle: the same pictures, and how long both take, in turn."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch

from ldm_export.bench.variants import PROMPTS
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.verify.metrics import psnr_db

PICTURES, REPEATS = 8, 5
STEPS, GUIDANCE = 20, 4.0
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}


def main(bundle: Path, checkpoint: str) -> None:
    pipeline = Pipeline.open(bundle, backend="cpu")
    judge = diffusers.StableDiffusionPipeline.from_pretrained(open_checkpoint(checkpoint).path)
    judge.set_progress_bar_config(disable=True)
    config = judge.scheduler.config
    prompts = list(PROMPTS[:PICTURES])

    def draw_with_diffusers(texts: list[str]) -> np.ndarray:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(texts))]
        drawn = judge(
            texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="np"
        ).images
        return (drawn * 255).round().astype(np.uint8)

    pictures = {}
    for sampler, (scheduler, extra) in SCHEDULERS.items():
        judge.scheduler = scheduler.from_config(config, **extra)
        theirs = draw_with_diffusers(prompts)
        ours = pipeline.generate(prompts, sampler=sampler, steps=STEPS, guidance=GUIDANCE, seed=0).images
        values = [min(psnr_db(a, b), 999.0) for a, b in zip(ours, theirs, strict=True)]
        pictures[sampler] = values
        print(f"{sampler:10} PSNR against diffusers, dB: worst {min(values):.1f} of {PICTURES}")

    judge.scheduler = diffusers.DDIMScheduler.from_config(config)
    seconds: dict[str, list[float]] = {"diffusers": [], "bundle": []}
    shares = []
    for repeat in range(REPEATS + 1):  # the first is warm-up
        started = time.perf_counter()
        draw_with_diffusers(prompts[:1])
        middle = time.perf_counter()
        timings = pipeline.generate(prompts[:1], steps=STEPS, guidance=GUIDANCE, seed=0).timings
        ended = time.perf_counter()
        if repeat:
            seconds["diffusers"].append(middle - started)
            seconds["bundle"].append(ended - middle)
            shares.append(timings.loop_ms / timings.total_ms)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    ratio = medians["diffusers"] / medians["bundle"]
    print(
        f"one picture, {STEPS} steps: diffusers {medians['diffusers']:.3f} s, "
        f"bundle {medians['bundle']:.3f} s: {ratio:.2f}x"
    )
    print(f"the loop outside the graphs: {statistics.median(shares):.2%} of the bundle's time")
    print(
        json.dumps({"psnr_db": pictures, "seconds": medians, "ratio": ratio, "loop_share": statistics.median(shares)})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/bundle"), sys.argv[2] if len(sys.argv) > 2 else "emoji64")
