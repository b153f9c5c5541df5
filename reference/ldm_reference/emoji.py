"""Builds the data that ``emoji64`` is trained on: the Noto emoji of the npm package ``emoji-datasource-google``.

    python -m ldm_reference.emoji FOLDER

runs ``npm pack``, composes each of the 1,911 base emoji (skin-tone variants are left out) on white at 64 x 64 pixels
and writes two folders in the imagefolder convention: ``FOLDER/train`` and, for measuring reconstruction on pictures
that no stage has seen, ``FOLDER/test`` (every 20th emoji in Unicode order).

Captions are the Unicode name and the short names that people type, one line each: "grinning face with smiling eyes",
"smile". The artwork is Google's Noto Emoji (Apache License 2.0; the flags are in the public domain).
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
RESOLUTION = 64
TEST_EVERY = 20


def captions_from_entry(entry: dict[str, object]) -> list[str]:
    """Unicode name first, then the short names, lower case, each once."""
    short_names = entry["short_names"]
    assert isinstance(short_names, list)
    texts = [str(entry["name"]).lower(), *(str(name).replace("_", " ").replace("-", " ") for name in short_names)]
    return list(dict.fromkeys(text for text in texts if any(character.isalpha() for character in text)))


def build(archive: Path, folder: Path) -> dict[str, int]:
    """Unpack the package's pictures into ``folder/train`` and ``folder/test``; gives the number of pictures in each."""
    counts = {"train": 0, "test": 0}
    with tarfile.open(archive) as package:

        def read(name: str) -> bytes:
            member = package.extractfile(f"package/{name}")
            if member is None:
                raise FileNotFoundError(f"{archive} has no {name}")
            return member.read()

        lines: dict[str, list[str]] = {"train": [], "test": []}
        entries = sorted(json.loads(read("emoji.json")), key=lambda entry: entry["sort_order"])
        for number, entry in enumerate(entries):
            split = "test" if number % TEST_EVERY == TEST_EVERY - 1 else "train"
            target = folder / split / entry["image"]
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(io.BytesIO(read(f"img/google/64/{entry['image']}"))) as image:
                rgba = image.convert("RGBA").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
            Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB").save(target)
            counts[split] += 1
            for text in captions_from_entry(entry):
                lines[split].append(json.dumps({"file_name": entry["image"], "text": text}, ensure_ascii=False))
    for split, rows in lines.items():
        (folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the emoji data set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archive", type=Path, help=f"the package as a .tgz; without it, `npm pack {PACKAGE}` is run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        archive = arguments.archive
        if archive is None:
            packed = subprocess.run(
                ["npm", "pack", PACKAGE, "--silent"], cwd=temporary, check=True, capture_output=True, text=True
            )
            archive = Path(temporary) / packed.stdout.strip().splitlines()[-1]
        counts = build(archive, arguments.folder)
    print(f"{arguments.folder}: {counts['train']} pictures to train on, {counts['test']} held out")


if __name__ == "__main__":
    main()
