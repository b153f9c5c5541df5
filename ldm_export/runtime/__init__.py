"""Draws pictures from a bundle. Needs numpy and one backend; never torch, never onnx.

from ldm_export.runtime import Pipeline

pipeline = Pipeline.open("demo/bundle")
result = pipeline.generate(["red apple"], steps=20, guidance=4.0, seed=0)
result.images                                      # uint8 (B, H, W, 3)
"""

from ldm_export.runtime.noise import Generator
from ldm_export.runtime.pipeline import Pipeline
from ldm_export.runtime.results import Generation, Step

__all__ = ["Generation", "Generator", "Pipeline", "Step"]
