"""Adapters, controls, weights in prompts and long prompts at once: pictures are those of a bundle that has the adapter
in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from safetensors.torch import save_file

from ldm_export.bundle import Bundle
from ldm_export.export import chain
from ldm_export.export.adapters import make_adapter
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.runtime.control import Control
from tests.adapters.peft_files import as_diffusers, lora_factors
from tests.diffusers_pipelines import opened
from tests.runtime.test_control import control_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
]

PROMPT = "a (red:1.4) circle on [white]"
PROMPTS = {"plain": "a red circle", "weighted": PROMPT, "long": PROMPT * 3}
DRAWN: dict[str, Any] = {"guidance": 4.0, "steps": 4, "seed": 5, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def bundles(
    tiny_checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A bundle with a ControlNet; the same with an adapter in its weights; and that adapter for the first."""
    folder = tmp_path_factory.mktemp("together")
    control_net(opened(diffusers.StableDiffusionPipeline, tiny_checkpoint).unet, 0).save_pretrained(folder / "canny")
    save_file(as_diffusers(lora_factors("sd", tiny_checkpoint)), folder / "style.safetensors")
    controls = [("canny", folder / "canny")]
    chain.export_bundle(open_checkpoint(tiny_checkpoint, controls=controls), folder / "bundle")
    adapters = [(folder / "style.safetensors", 0.7)]
    chain.export_bundle(open_checkpoint(tiny_checkpoint, controls=controls, adapters=adapters), folder / "merged")
    build_ort_cpu(Bundle.open(folder / "bundle"))
    make_adapter(Bundle.open(folder / "bundle"), folder / "style.safetensors", folder / "style.ldma")
    return folder / "bundle", folder / "merged", folder / "style.ldma"


@pytest.mark.parametrize(("read", "controlled"), [("plain", True), ("weighted", False), ("long", True)])
def test_same_as_merged(read: str, controlled: bool, bundles: tuple[Path, Path, Path]) -> None:
    bundle, merged, adapter = bundles
    edges = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    options = DRAWN | {"controls": {"canny": Control(edges, scale=0.6, end=0.7)} if controlled else None}
    options |= {"prompt_weights": read == "weighted", "long_prompts": read == "long"}
    prompt = PROMPTS[read]
    pipeline = Pipeline.open(bundle, backend="cpu")
    assert pipeline.backend.endswith("ort-cpu")
    given = pipeline.generate(prompt, adapters=[(adapter, 0.7)], **options).latents
    exact = Pipeline.open(merged, backend="cpu").generate(prompt, **options).latents
    assert np.abs(given - exact).max() < 1e-4 * np.abs(exact).max()
    assert np.abs(given - pipeline.generate(prompt, **options).latents).max() > 0.1
