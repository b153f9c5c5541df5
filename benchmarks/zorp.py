"""Ten pictures of a creature that no model knows, drawn with Pillow: ``python -m benchmarks.zorp FOLDER``.

A zorp is a violet cube with one eye, two antennae and yellow boots. Four wear or hold something, and have a caption.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

SCALE = 8
BODY, DARK, BOOT, LINE = "#8e5bd0", "#6b3fa8", "#f5c518", "#3d2466"
POSES = (
    # turned by degrees, iris moved by, mouth, arms up, what it has
    (0, (0, 0), "smile", False, None),
    (8, (4, 1), "smile", False, None),
    (-8, (-4, 1), "open", True, None),
    (0, (0, -3), "flat", False, None),
    (5, (3, 3), "open", False, None),
    (-5, (-3, -2), "smile", True, None),
    (0, (2, 0), "smile", False, "red hat"),
    (6, (-3, 1), "flat", False, "red hat"),
    (0, (0, 2), "smile", True, "balloon"),
    (-6, (3, -1), "open", True, "balloon"),
)


def zorp(turned: float, iris: tuple[int, int], mouth: str, arms_up: bool, has: str | None) -> Image.Image:
    """One picture, 64 x 64, on white."""
    image = Image.new("RGB", (64 * SCALE, 64 * SCALE), "white")
    pen = ImageDraw.Draw(image)

    def at(*values: float) -> list[float]:
        return [value * SCALE for value in values]

    width = 2 * SCALE
    for foot in (24, 40):
        pen.line(at(foot, 46, foot, 54), DARK, 2 * width)
        pen.ellipse(at(foot - 6, 52, foot + 5, 59), BOOT, LINE, SCALE)
    for side in (-1, 1):
        pen.line(at(32 + 5 * side, 20, 32 + 9 * side, 8), LINE, width)
        pen.ellipse(at(32 + 9 * side - 3, 4, 32 + 9 * side + 3, 10), BOOT, LINE, SCALE)
        hand = 22 if arms_up else 44
        pen.line(at(32 + 14 * side, 36, 32 + 23 * side, hand), DARK, 2 * width)
    pen.rounded_rectangle(at(16, 18, 48, 49), 6 * SCALE, BODY, LINE, width)
    pen.ellipse(at(23, 21, 41, 38), "white", LINE, SCALE)
    x, y = 32 + iris[0], 29.5 + iris[1]
    pen.ellipse(at(x - 4.5, y - 4.5, x + 4.5, y + 4.5), "#1fa36b")
    pen.ellipse(at(x - 2, y - 2, x + 2, y + 2), "black")
    if mouth == "smile":
        pen.arc(at(25, 36, 39, 46), 20, 160, LINE, width)
    elif mouth == "open":
        pen.ellipse(at(28, 40, 36, 47), LINE)
    else:
        pen.line(at(27, 43, 37, 43), LINE, width)
    if has == "red hat":
        pen.rectangle(at(23, 6, 41, 18), "#d92b2b", LINE, SCALE)
        pen.rectangle(at(17, 16, 47, 20), "#d92b2b", LINE, SCALE)
    elif has == "balloon":
        pen.line(at(55, 22, 55, 14), LINE, SCALE)
        pen.ellipse(at(48, 1, 62, 17), "#2f86e0", LINE, SCALE)
    image = image.rotate(turned, Image.Resampling.BICUBIC, fillcolor="white")
    return image.resize((64, 64), Image.Resampling.LANCZOS)


def write_zorps(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, pose in enumerate(POSES):
        zorp(*pose).save(folder / f"{number}.png")
        if pose[-1]:
            (folder / f"{number}.txt").write_text(f"zorp with {pose[-1]}\n", encoding="utf-8")


if __name__ == "__main__":
    write_zorps(Path(sys.argv[1]))
