"""What `adapt` makes of emoji64 with ten pictures of a creature that it does not know, and what it forgets.

adapting.py DATA WORK RESULT.json     (RESULT.png shows it; DATA is the training pictures of emoji64)

Pictures of the new word are compared with the ten, in EfficientNet-Lite0 features, before and after, beside the ten
with each other. What is forgotten is measured on captions of the training data that were not part of the adaptation:
their alignment with pictures that are drawn with the same seeds before and after. Without class pictures, with some
that the model draws of one known thing, and with some of its training pictures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.zorp import POSES, write_zorps, zorp
from ldm_export.adapt.options import AdaptOptions, Factors
from ldm_export.adapt.training import Prior, adapt
from ldm_export.families import open_checkpoint
from ldm_export.verify.image_generators import SamplingSettings, TorchImageGenerator
from ldm_export.verify.image_text_alignment import features_of, open_pictures
from ldm_export.verify.metrics import cosines, over_pictures
from ldm_export.verify.quality import choose_prompts, draw_pictures, open_judge

CHECKPOINT, WORD, KNOWN = "emoji64", "zorp", "robot face"
OPTIONS = AdaptOptions(Factors(layers="all"), steps=400, learning_rate=1e-3, mixed_precision="bf16")
DRAWN, KEPT, KNOWN_COUNT = 24, 60, 100
SETTINGS = SamplingSettings(KEPT, "ddim", 25, 4.0, batch=4)
GRID = (
    *((WORD, 4), (f"{WORD} with red hat", 1), (f"{WORD} with balloon", 1)),  # as on the pictures
    *((f"{WORD} with sunglasses", 1), (f"two {WORD}", 1)),  # not on the pictures
    *((KNOWN, 1), ("red apple", 1), ("dog face", 1), ("grinning face", 1)),
)
"""What the grid shows, and how often."""


def drawn(file: Path | None, conditions: Sequence[str]) -> npt.NDArray[np.uint8]:
    adapters = [] if file is None else [(file, 1.0)]
    generator = TorchImageGenerator(open_checkpoint(CHECKPOINT, adapters=adapters))
    return draw_pictures(generator, conditions, SETTINGS, lambda what, done, of: None)


def write_known(data: Path, folder: Path, judged: set[int]) -> Path:
    """Write `KNOWN_COUNT` pictures that the model was trained on, each with a caption, none of those that judge."""
    pictures = open_pictures(data, 64, 3, "text")
    captions = {index: str(text) for index, text in reversed(pictures.conditions) if index not in judged}
    folder.mkdir(parents=True, exist_ok=True)
    for index in np.random.default_rng(1).permutation(sorted(captions))[:KNOWN_COUNT].tolist():
        Image.fromarray(pictures.images[index]).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(captions[index] + "\n", encoding="utf-8")
    return folder


def main(data: Path, work: Path, result: Path) -> None:
    few = work / "zorps"
    write_zorps(few)
    real = np.stack([np.asarray(zorp(*pose)) for pose in POSES])
    ten = features_of(real)
    between = cosines(ten, ten)
    np.fill_diagonal(between, np.nan)
    judge = open_judge(CHECKPOINT, None)
    assert judge is not None
    chosen = choose_prompts(open_pictures(data, 64, 3, "text"), SETTINGS, "text")
    captions = [str(text) for _, text in chosen]
    sides: dict[str, Path | None] = {"before": None}
    priors = {
        "ten pictures alone": None,
        f"and 24 of its own of {KNOWN!r}": Prior(KNOWN, count=24),
        "and 100 captioned ones": Prior("emoji", write_known(data, work / "known", {index for index, _ in chosen})),
    }
    for name, prior in priors.items():
        sides[name] = work / f"{len(sides)}.safetensors"
        if not sides[name].is_file():

            def say(what: str, done: int, of: int) -> None:
                if done % 50 == 0:
                    print(what, done, of, flush=True)

            adapt(open_checkpoint(CHECKPOINT), few, WORD, sides[name], OPTIONS, prior=prior, progress=say)
    redrawn = features_of(TorchImageGenerator(open_checkpoint(CHECKPOINT)).reconstruct(real))
    figures: dict[str, Any] = {
        "the ten with each other": {"likeness": list(over_pictures(np.nanmean(between, axis=1)))},
        "the ten through the autoencoder": {"likeness": list(over_pictures(cosines(redrawn, ten).mean(axis=1)))},
    }
    shown = [text for text, count in GRID for _ in range(count)]
    rows, aligned = [np.concatenate([*real, *np.full((len(shown) - len(real), 64, 64, 3), 255, np.uint8)], axis=1)], {}
    for name, file in sides.items():
        likeness = cosines(features_of(drawn(file, [WORD] * DRAWN)), ten).mean(axis=1)
        kept = drawn(file, captions)
        aligned[name] = judge.score(features_of(kept), captions)
        change = over_pictures(aligned[name] - aligned["before"])
        figures[name] = {
            "likeness": list(over_pictures(likeness)),
            "known_alignment": list(over_pictures(aligned[name])),
            "known_alignment_change": list(change),
        }
        print(name, figures[name], flush=True)
        rows.append(np.concatenate(list(drawn(file, shown)), axis=1))
    grid = Image.fromarray(np.concatenate(rows))
    grid.resize((grid.width * 3 // 2, grid.height * 3 // 2), Image.Resampling.LANCZOS).save(result.with_suffix(".png"))
    document = {"checkpoint": CHECKPOINT, "steps": OPTIONS.steps, "drawn": DRAWN, "captions": KEPT, "figures": figures}
    result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document))


def table(document: dict[str, Any]) -> str:
    """Rows of the documentation's table."""
    lines = ["| | likeness to the ten | alignment of known captions | change |", "|---|---:|---:|---:|"]
    for name, figures in document["figures"].items():
        cells = [figures.get(key) for key in ("likeness", "known_alignment", "known_alignment_change")]
        shown = ["{:.3f} ({:.3f} to {:.3f})".format(*cell) if cell else "" for cell in cells]
        lines.append(f"| {name} | {' | '.join(shown[:2])} | {'' if name == 'before' else shown[2]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
