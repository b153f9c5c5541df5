"""Files of weights that cannot be read, and what to do about each."""

from __future__ import annotations

from pathlib import Path

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HOW_TO_CONVERT = (
    "Load it where you trust it and save it with diffusers: pipeline.save_pretrained(folder, safe_serialization=True)."
)


def remedy_of(file: Path, how_to_convert: str = HOW_TO_CONVERT) -> str:
    """What to do about a file that cannot be read, by how it begins.

    Parameters
    ----------
    how_to_convert : said of a pickle
    """
    if not file.is_file():
        return "A regular file is needed."
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return "Make it readable."
    if start.startswith(b"version https://git-lfs"):
        return "It is a pointer of Git LFS, not the file itself: run `git lfs pull` in the folder."
    if start.lstrip()[:1] == b"<":
        return "It is a web page, not the file itself: download the file."
    if start.startswith(b"GGUF"):
        return "It is a GGUF file, whose weights are quantized: use the model that it was made from."
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return f"It is a pickle, which is never opened. {how_to_convert}"
    return "It is damaged or was not downloaded whole: download it again."
