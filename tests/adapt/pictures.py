"""A few pictures to learn from, and a checkpoint of each family without its bundle."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.bundle_fixture import KINDS

COLOURS = ("red", "green", "blue", "yellow", "black")


def write_few(folder: Path, *, captioned: bool = False) -> Path:
    """Five pictures, 24 x 16; the second has a caption if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (24, 16), "white")
        image.paste(colour, (2 + number, 3, 14 + number, 13))
        image.save(folder / f"{colour}.png")
    if captioned:
        (folder / f"{COLOURS[1]}.txt").write_text("a green square\n")
    return folder


def checkpoint_of(kind: str, folder: Path, tiny: Path) -> Path:
    """A tiny random checkpoint of a family; "sd" is `tiny` itself."""
    if kind == "sd":
        return tiny
    KINDS[kind](folder / kind, tiny)
    return folder / kind
