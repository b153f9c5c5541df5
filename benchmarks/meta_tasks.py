"""Tasks to learn to learn from: emoji groups redrawn in a style, and classes of Fashion-MNIST.

A style is a colouring, a background and a placement, drawn at random; no two tasks share one, and the tasks that are
held out are of groups, or classes, that meta-learning has not seen. ``{train,tune,test}/TASK`` holds pictures with
their captions: of tasks to train on one folder, of the others ``few``, which is adapted to, and ``judged``.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageOps

FEW, JUDGED, TO_TRAIN = 10, 16, 26
SPLITS = {"train": 24, "tune": 4, "test": 8}
"""Tasks of emoji in each."""
GROUPS = {
    "train": {
        "faces": (0x1F600, 0x1F640),
        "animals": (0x1F400, 0x1F43F),
        "food": (0x1F345, 0x1F37F),
        "vehicles": (0x1F680, 0x1F6FF),
        "flags": (0x1F1E6, 0x1F1FF),
        "objects": (0x1F4A0, 0x1F4FF),
    },
    "tune": {"clocks": (0x1F550, 0x1F567), "hands": (0x1F44A, 0x1F465)},
    "test": {
        "leisure": (0x1F380, 0x1F3C4),
        "buildings": (0x1F3E0, 0x1F3F0),
        "new faces": (0x1F910, 0x1F92F),
        "new animals": (0x1F980, 0x1F9AF),
        "new things": (0x1F9E0, 0x1F9FF),
        "buttons": (0x1F500, 0x1F53D),
        "weather": (0x1F300, 0x1F320),
        "clothes": (0x1F451, 0x1F465),
    },
}
"""Unicode ranges of the first code point."""
CLASSES = {
    "train": ("t-shirt or top", "trouser", "pullover", "sneaker", "bag"),
    "tune": ("dress",),
    "test": ("coat", "sandal", "shirt", "ankle boot"),
}
REPEATS = 1
"""Draws of each held-out class of Fashion-MNIST."""

Draw = Callable[[Image.Image], Image.Image]


def _channels(order: tuple[int, int, int]) -> Draw:
    return lambda image: Image.merge("RGB", [image.split()[k] for k in order])


def _toned(dark: str, light: str) -> Draw:
    return lambda image: ImageOps.colorize(image.convert("L"), dark, light)


COLOURINGS: dict[str, Draw] = {
    "sepia": _toned("#402010", "#fff0d0"),
    "blueprint": _toned("#ffffff", "#1040a0"),
    "green": _toned("#003010", "#e0ffe0"),
    "negative": ImageOps.invert,
    "gbr": _channels((1, 2, 0)),
    "brg": _channels((2, 0, 1)),
    "posterized": lambda image: ImageOps.posterize(image, 2),
    "outlines": lambda image: ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB"),
}
BACKGROUNDS = ("#b080e0", "#f0c020", "#2060c0", "#d03030", "#40a060", "#808080")
PLACEMENTS: dict[str, Draw] = {
    "upright": lambda image: image,
    "turned": lambda image: image.rotate(90),
    "upside down": lambda image: image.rotate(180),
    "tilted": lambda image: image.rotate(30, Image.Resampling.BICUBIC, fillcolor="white"),
    "small": lambda image: ImageOps.expand(image.resize((32, 32), Image.Resampling.LANCZOS), 16, "white"),
    "pixelated": lambda image: image.resize((16, 16), Image.Resampling.BOX).resize((64, 64), Image.Resampling.NEAREST),
}


def styled(image: Image.Image, colouring: str, background: str, placement: str) -> Image.Image:
    """An RGB picture, 64 x 64, in a style: white becomes the background before it is coloured."""
    placed = PLACEMENTS[placement](image)
    return COLOURINGS[colouring](ImageChops.multiply(placed, Image.new("RGB", placed.size, background)))


def write_emoji(data: Path, folder: Path) -> None:
    """Write the tasks of emoji, from the pictures that emoji64 was trained on."""
    captions: dict[str, str] = {}
    for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        captions.setdefault(entry["file_name"], entry["text"])
    chance = random.Random(0)
    styles = list(itertools.product(COLOURINGS, BACKGROUNDS, PLACEMENTS))
    chance.shuffle(styles)
    for split, count in SPLITS.items():
        for number in range(count):
            group, (first, last) = list(GROUPS[split].items())[number % len(GROUPS[split])]
            members = [name for name in captions if first <= int(name.split(".")[0].split("-")[0], 16) <= last]
            chosen = chance.sample(members, min(len(members), TO_TRAIN))
            style = styles.pop()
            pictures = ((styled(_opened(data / name), *style), captions[name]) for name in chosen)
            _write(folder / split / f"{number:02}-{group}", split, pictures)


def write_fashion(data: Path, folder: Path) -> None:
    """Write the tasks of Fashion-MNIST; a class that is held out is drawn `REPEATS` times."""
    by_class: dict[str, list[str]] = {}
    for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        by_class.setdefault(entry["text"], []).append(entry["file_name"])
    chance = random.Random(0)
    for split, names in CLASSES.items():
        for name, repeat in itertools.product(names, range(1 if split == "train" else REPEATS)):
            chosen = chance.sample(by_class[name], 200 if split == "train" else TO_TRAIN)
            pictures = ((_opened(data / each), name) for each in chosen)
            _write(folder / split / f"{name.replace(' ', '_')}-{repeat}", split, pictures)


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        rgba = image.convert("RGBA").resize((64, 64), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _write(folder: Path, split: str, pictures: Iterator[tuple[Image.Image, str]]) -> None:
    for number, (image, caption) in enumerate(pictures):
        place = folder if split == "train" else folder / ("few" if number < FEW else "judged")
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:03}.png")
        (place / f"{number:03}.txt").write_text(caption + "\n", encoding="utf-8")


def tasks_of(folder: Path, split: str) -> Sequence[Path]:
    return sorted(path for path in (folder / split).iterdir() if path.is_dir())
