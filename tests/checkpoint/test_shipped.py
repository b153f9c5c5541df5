"""The checkpoint that comes with the project."""

from __future__ import annotations

import json

import safetensors
from ldm_reference.train import TrainConfig

from ldm_export.checkpoint import shipped_checkpoints
from ldm_export.families import open_checkpoint


def test_emoji64_is_small_fp16_and_says_its_licence() -> None:
    folder = shipped_checkpoints()["emoji64"]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 25_000_000
    assert "Apache License 2.0" in (folder / "README.md").read_text(encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118


def test_emoji64_is_what_its_recipe_describes() -> None:
    model = open_checkpoint("emoji64")
    assert model.components == ("text_encoder", "unet", "vae")
    recipe = TrainConfig.read(shipped_checkpoints()["emoji64"].parents[1] / "recipes" / "emoji64.toml")
    for component, asked in (("unet", recipe.unet), ("vae", recipe.vae), ("text_encoder", recipe.text_encoder)):
        config = model.configs[component]
        assert {key: config[key] for key in asked} == {
            key: tuple(value) if isinstance(value, list) else value for key, value in asked.items()
        }
    own = json.loads((model.path / "scheduler" / "scheduler_config.json").read_text())
    assert own == recipe.scheduler
    assert model.scheduler == own | {"steps_offset": 1}  # as diffusers' StableDiffusionPipeline uses it
    assert all(model.load(component) for component in model.components)
