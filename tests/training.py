"""What the tests of training share: twelve small pictures, and a progress callback that remembers and interrupts."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
from ldm_reference.train_config import TrainConfig
from PIL import Image
from torch import Tensor

from tests.tiny_recipe import CONFIG

COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
SHAPES = ("square", "bar")


def write_pictures(folder: Path) -> Path:
    """Twelve pictures of 16 x 16, the first with two captions; the label is the number of the colour."""
    lines = [{"file_name": "red-square.png", "text": "the colour red", "label": 0}]
    for label, colour in enumerate(COLOURS):
        for shape in SHAPES:
            image = Image.new("RGB", (16, 16), "white")
            image.paste(colour, (4, 4, 12, 12) if shape == "square" else (1, 6, 15, 10))
            image.save(folder / f"{colour}-{shape}.png")
            lines.append({"file_name": f"{colour}-{shape}.png", "text": f"a {colour} {shape}", "label": label})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_from(text: str, folder: Path) -> TrainConfig:
    (folder / "config.toml").write_text(text)
    return TrainConfig.read(folder / "config.toml")


def edited(*changes: tuple[str, str]) -> str:
    """The tiny recipe with each first text, which must be there, replaced by the second."""
    text = CONFIG
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


FLOW = (
    (
        CONFIG[CONFIG.index("[scheduler]") :],
        '[scheduler]\n_class_name = "FlowMatchEulerDiscreteScheduler"\nnum_train_timesteps = 1000\nshift = 1.0\n',
    ),
    ("caption_dropout = 0.2", "min_snr_gamma = 0"),
)
"""Changes by which the tiny recipe trains by flow matching."""
TEXT_STAGE = """
[text_stage]
steps = 5
batch_size = 4
learning_rate = 2e-3
warmup_steps = 1
projection_dim = 8
"""


class Losses:
    """A progress callback that remembers, and that may interrupt a stage after a number of steps."""

    def __init__(self, stop: tuple[str, int] | None = None):
        self.stop = stop
        self.of: dict[tuple[str, int], float] = {}

    def __call__(self, name: str, done: int, steps: int, loss: float) -> None:
        self.of[name, done] = loss
        if (name, done) == self.stop:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.relative_to(folder)}.{key}": tensor
        for file in sorted(folder.glob("**/*.safetensors"))
        for key, tensor in safetensors.torch.load_file(file).items()
    }
