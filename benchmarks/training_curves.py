"""Draws the loss of every stage of a training run from its TensorBoard logs.

training_curves.py CHECKPOINT -o CURVES.svg
"""

from __future__ import annotations

import argparse
import math
import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

PANEL, HEIGHT, MARGIN, GAP = 300, 180, 46, 24


def scalars_from_events(file: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of one scalar; a TFRecord is a length, its checksum, the event and a checksum."""
    data, position, found = file.read_bytes(), 0, []
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        event = Event.FromString(data[position + 12 : position + 12 + length])
        found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
        position += 12 + length + 4
    return found


def panel(name: str, points: list[tuple[int, float]], left: int) -> str:
    """One stage: value over step, both axes labelled at their ends, the value logarithmic."""
    last = max(step for step, _ in points)
    low, high = (edge(math.log10(value) for _, value in points) for edge in (min, max))
    span = max(high - low, 1e-9)
    width, height, top = PANEL - MARGIN - GAP, HEIGHT - 60, 30
    line = " ".join(
        f"{left + MARGIN + width * step / last:.1f},{top + height * (high - math.log10(value)) / span:.1f}"
        for step, value in points
    )
    bottom, right = top + height, left + MARGIN + width
    return (
        f'<text x="{left + MARGIN}" y="18" font-weight="600">{name.replace("_", " ")}</text>'
        f'<path d="M{left + MARGIN} {top}V{bottom}H{right}" fill="none" stroke="#999"/>'
        f'<polyline points="{line}" fill="none" stroke="#2a6fbb" stroke-width="1.5"/>'
        f'<text x="{left + MARGIN - 5}" y="{top + 8}" text-anchor="end">{10**high:.3g}</text>'
        f'<text x="{left + MARGIN - 5}" y="{bottom}" text-anchor="end">{10**low:.3g}</text>'
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{last:,} steps</text>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    folders = sorted(path for path in (arguments.checkpoint / "logs").iterdir() if path.is_dir())
    curves = {}
    for folder in folders:
        points = dict(pair for file in sorted(folder.iterdir()) for pair in scalars_from_events(file, "loss"))
        curves[folder.name] = sorted(points.items())
    panels = "".join(panel(name, points, PANEL * i) for i, (name, points) in enumerate(curves.items()))
    arguments.output.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PANEL * len(curves)} {HEIGHT}" font-size="11" '
        f'font-family="sans-serif" fill="#555"><rect width="100%" height="100%" fill="white"/>{panels}</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
