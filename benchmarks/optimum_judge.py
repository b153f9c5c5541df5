"""Opens a bundle with optimum-onnx's ``ORTStableDiffusionPipeline``, draws, and compares with the bundle's pictures.

PYTHON-WITH-OPTIMUM benchmarks/optimum_judge.py BUNDLE theirs.npy
.venv/bin/python    benchmarks/optimum_judge.py BUNDLE theirs.npy --compare
"""

from __future__ import annotations

import json
import sys

import numpy as np

PROMPTS = ["red apple", "black cat", "pizza", "rocket"]


def draw(bundle: str, output: str) -> None:
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    pipeline = ORTStableDiffusionPipeline.from_pretrained(bundle)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(PROMPTS))]
    drawn = pipeline(PROMPTS, num_inference_steps=20, guidance_scale=4.0, generator=generators, output_type="np").images
    np.save(output, (drawn * 255).round().astype(np.uint8), allow_pickle=False)


def compare(bundle: str, theirs: str) -> None:
    from ldm_export.runtime import Pipeline
    from ldm_export.verify.metrics import psnr_db

    ours = Pipeline.open(bundle, backend="cpu").generate(PROMPTS, steps=20, guidance=4.0, seed=0).images
    values = [min(psnr_db(a, b), 999.0) for a, b in zip(ours, np.load(theirs, allow_pickle=False), strict=True)]
    print(f"PSNR against optimum-onnx, dB: worst {min(values):.1f} of {len(values)}")
    print(json.dumps({"psnr_db": values}))


if __name__ == "__main__":
    (compare if "--compare" in sys.argv else draw)(*sys.argv[1:3])
