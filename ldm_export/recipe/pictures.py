"""Pictures that a recipe needs and that the teacher, as a bundle, draws itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_export.bundle import Bundle
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings
from ldm_export.verify.quality import Progress

GALLERY_SEED, REFERENCE_SEED = 10_000_000, 20_000_000
"""Seeds of the first picture of each set; what is judged is generated with seeds from 0 on."""
PNG = "{number:05d}.png"
MADE = "made.json"
"""Beside the pictures: what drew them, and how."""


def draw_gallery(
    bundle: Bundle, conditions: Sequence[str | int], count: int, folder: Path, progress: Progress
) -> tuple[Path, Path]:
    """Two folders of pictures with captions or classes, in the layout of training data: ``count`` each, of different
    conditions (as far as there are enough) and seeds. What the same bundle has drawn there is not drawn again."""
    image_generator = BundleImageGenerator(bundle)
    model = bundle.manifest.model
    settings = SamplingSettings(
        sampler=model["default_sampler"], steps=model["default_steps"], guidance=bundle.roles.guidance.scale
    )
    order = np.random.default_rng(0).permutation(max(len(conditions), 1))
    made = json.dumps([bundle.manifest.source.get("sha256"), asdict(settings), count, list(conditions)])
    folders = []
    for name, first_seed, skip in (("gallery", GALLERY_SEED, 0), ("reference", REFERENCE_SEED, count)):
        path = folder / name
        folders.append(path)
        if (path / "metadata.jsonl").is_file() and (path / MADE).is_file() and (path / MADE).read_text() == made:
            continue
        path.mkdir(parents=True, exist_ok=True)
        (path / "metadata.jsonl").unlink(missing_ok=True)
        (path / MADE).write_text(made)
        lines: list[dict[str, Any]] = []
        for start in range(0, count, settings.batch):
            progress(f"teacher draws the {name}", start, count)
            numbers = range(start, min(start + settings.batch, count))
            chosen = [conditions[order[(skip + k) % len(conditions)]] if conditions else "" for k in numbers]
            images = image_generator.draw(chosen, [first_seed + k for k in numbers], settings)
            for number, condition, image in zip(numbers, chosen, images, strict=True):
                file = PNG.format(number=number)
                Image.fromarray(image.squeeze()).save(path / file)
                says = {} if not conditions else {"text" if isinstance(condition, str) else "label": condition}
                lines.append({"file_name": file, **says})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (path / "metadata.jsonl").write_text(text, encoding="utf-8")  # last: a folder that has it is complete
    return folders[0], folders[1]
