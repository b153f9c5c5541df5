"""Builds the data of the grey, class-conditional example: Fashion-MNIST (1708.07747), 28 x 28 pictures of ten kinds.

    python -m ldm_reference.fashion_mnist FOLDER

reads the four files that Debian's package ``dataset-fashion-mnist`` installs and writes ``FOLDER/train`` and
``FOLDER/test`` in the imagefolder convention, with the class as ``label`` and its name as ``text``: the first 10,000 of
the 60,000 training pictures and the first 1,000 of the 10,000 test pictures, or ``--limit`` of each. The pictures are
Zalando's (MIT licence).

The files are gzip'ed *idx* arrays: two zero bytes, 8 for unsigned bytes, the number of dimensions, each dimension as a
big-endian 32-bit number, then the bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_reference.config import ConfigError

SOURCE = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    *("t-shirt or top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""Names of the labels from 0 on."""

SPLITS = {"train": ("train", 10_000), "test": ("t10k", 1_000)}
"""How the files of each split begin, and how many pictures of it are written by default."""


def read_idx(file: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array of a gzip'ed idx file of unsigned bytes.

    Raises
    ------
    ConfigError
        If the file is missing, no whole gzip file, or not an idx file of that many dimensions; says what to do.
    """
    again = f"install {PACKAGE} again (apt-get install --reinstall {PACKAGE})"
    try:
        content = gzip.decompress(file.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file} is missing; install Debian's package {PACKAGE} (apt-get install {PACKAGE}), or name the folder "
            "that has its files with --source"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file} is not a readable gzip file ({error}); {again}") from error
    magic = bytes([0, 0, 8, dimensions])
    begin = 4 + 4 * dimensions
    if content[:4] != magic or len(content) < begin:
        raise ConfigError(
            f"{file} begins with {content[:4].hex() or 'nothing'}; {magic.hex()} and {dimensions} sizes are needed; "
            f"{again}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:begin])
    if len(content) - begin != math.prod(shape):
        raise ConfigError(
            f"{file} has {len(content) - begin} bytes of data; its header promises {math.prod(shape)} "
            f"({' x '.join(map(str, shape))}); {again}"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def build(source: Path, folder: Path, limit: int | None = None) -> dict[str, int]:
    """Write ``folder/train`` and ``folder/test``; gives the number of pictures in each.

    Parameters
    ----------
    source : the folder of the four files
    limit : the most pictures of a split; by default those of :data:`SPLITS`

    Raises
    ------
    ConfigError
        If a file is missing or damaged; then nothing is written.
    """
    splits = {}
    for split, (prefix, count) in SPLITS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels) or (labels >= len(CLASSES)).any():
            raise ConfigError(
                f"{source}: {len(images)} pictures and {len(labels)} labels up to {labels.max(initial=0)} begin with "
                f"{prefix!r}; as many labels as pictures, from 0 to {len(CLASSES) - 1}, are needed; install {PACKAGE} "
                "again"
            )
        count = limit or count
        splits[split] = images[:count], labels[:count]
    for split, (images, labels) in splits.items():
        target = folder / split
        target.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            name = f"{number:05d}.png"
            Image.fromarray(pixels).save(target / name)
            lines.append(json.dumps({"file_name": name, "label": label, "text": CLASSES[label]}))
        (target / "metadata.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return {split: len(labels) for split, (_, labels) in splits.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ldm_reference.fashion_mnist", description="Build the Fashion-MNIST data set."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=SOURCE, help=f"where the four files are; {SOURCE} by default")
    parser.add_argument(
        "--limit", type=int, help="the most pictures of a split; 10000 for training and 1000 for tests by default"
    )
    given = parser.parse_args(arguments)
    if given.limit is not None and given.limit < 1:
        parser.error(f"--limit {given.limit} must be at least 1")
    try:
        counts = build(given.source, given.folder, given.limit)
    except ConfigError as error:
        parser.exit(2, f"error: {error}.\n")
    print(f"{given.folder}: {counts['train']} pictures to train on, {counts['test']} held out")


if __name__ == "__main__":
    main()
