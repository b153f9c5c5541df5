"""Picture files: what Pillow and a walk through the bytes find in them, and hostile ones."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm_export.errors import InputError
from ldm_export.pictures.files import LONGEST_TEXT, check_text, read_picture_file, save_grid
from ldm_export.pictures.text import PictureRequest, parameters_text, requests_from

REQUEST = PictureRequest("a red apple", None, 7, "ddim", 20, 4.0, 16, 24, "0123456789", "tiny")
PROMPTS = {"latin-1": "ein süßer Apfel", "beyond it": "红苹果 一一一 🍎"}
IMAGES = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), np.uint8)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Types and contents of a PNG's chunks."""
    found, position = [], 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        found.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_png(tmp_path: Path, prompt: str) -> None:
    request, path = replace(REQUEST, prompt=prompt), tmp_path / "p.png"
    save_grid(IMAGES, path, [request])
    text = parameters_text([request])
    found = dict(chunks(path.read_bytes()))
    if prompt == PROMPTS["latin-1"]:
        assert found[b"tEXt"] == b"parameters\0" + text.encode("latin-1")
    else:
        assert found[b"iTXt"] == b"parameters\0\0\0\0\0" + text.encode()
    with Image.open(path) as image:
        assert image.info["parameters"] == text
        np.testing.assert_array_equal(np.asarray(image), IMAGES[0])


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", ["p.jpg", "p.jpeg", "p.webp"])
def test_exif(tmp_path: Path, name: str, prompt: str) -> None:
    request, path = replace(REQUEST, prompt=prompt), tmp_path / name
    save_grid(IMAGES, path, [request])
    comment = b"UNICODE\0" + parameters_text([request]).encode("utf-16-be")
    assert comment in path.read_bytes()
    with Image.open(path) as image:
        assert image.format == ("WEBP" if name == "p.webp" else "JPEG")
        assert image.getexif().get_ifd(0x8769)[0x9286] == comment
    found = read_picture_file(path)
    assert (found.width, found.height) == (24, 16)
    assert found.parameters is not None
    assert requests_from(found.parameters) == (request,)


def test_grey_pictures(tmp_path: Path) -> None:
    for name in ("p.png", "p.jpg", "p.webp"):
        save_grid(IMAGES[..., :1], tmp_path / name, [REQUEST])
        assert requests_from(read_picture_file(tmp_path / name).parameters or "") == (REQUEST,)


def test_a_grid(tmp_path: Path) -> None:
    requests = [replace(REQUEST, seed=seed) for seed in (7, 8, 9)]
    save_grid(np.repeat(IMAGES, 3, axis=0), tmp_path / "p.png", requests)
    found = read_picture_file(tmp_path / "p.png")
    assert (found.width, found.height) == (48, 32)
    assert requests_from(found.parameters or "") == tuple(requests)


def test_without_a_request(tmp_path: Path) -> None:
    for name in ("p.png", "p.jpg", "p.webp"):
        save_grid(IMAGES, tmp_path / name)
        assert read_picture_file(tmp_path / name).parameters is None


@pytest.mark.parametrize(
    "comment", [b"UNICODE\0" + "Steps: 2".encode(coding) for coding in ("utf-16-be", "utf-16-le", "utf-16")]
)
def test_byte_orders_of_other_tools(tmp_path: Path, comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (8, 8)).save(tmp_path / "p.webp", exif=exif)
    assert read_picture_file(tmp_path / "p.webp").parameters == "Steps: 2"


def test_text_after_the_pixels(tmp_path: Path) -> None:
    save_grid(IMAGES, tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    (tmp_path / "p.png").write_bytes(data[:-12] + chunk(b"tEXt", b"parameters\0late") + data[-12:])
    assert read_picture_file(tmp_path / "p.png").parameters == "late"


def test_a_request_too_long_for_a_file() -> None:
    check_text(Path("p.jpg"), "a" * 32_000)
    with pytest.raises(InputError, match=r"longer than a JPEG holds \(64 KB\)\. Name a \.png or \.webp\."):
        check_text(Path("p.jpg"), "a" * 33_000)
    check_text(Path("p.webp"), "a" * 33_000)
    with pytest.raises(InputError, match="has 1,048,577 characters; a file takes 1,048,576"):
        check_text(Path("p.png"), "a" * (LONGEST_TEXT + 1))


def test_the_longest_text_of_a_jpeg_is_written(tmp_path: Path) -> None:
    request = replace(REQUEST, prompt="")
    room = next(n for n in range(33_000, 0, -1) if _fits("p.jpg", parameters_text([replace(REQUEST, prompt="a" * n)])))
    request = replace(REQUEST, prompt="a" * room)
    save_grid(IMAGES, tmp_path / "p.jpg", [request])
    assert requests_from(read_picture_file(tmp_path / "p.jpg").parameters or "") == (request,)


def _fits(name: str, text: str) -> bool:
    try:
        check_text(Path(name), text)
    except InputError:
        return False
    return True


def _png(*extra: bytes) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    data = content.getvalue()
    return data[:33] + b"".join(extra) + data[33:]


def _with_exif(kind: str, exif: bytes) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, kind, exif=exif)
    return content.getvalue()


BROKEN_EXIF = {
    "cut off": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0",
    "points outside": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\x7f\xff\xff\xff\0\0\0\0",
    "points at itself": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x08\0\0\0\0",
    "no TIFF": b"Exif\0\0nothing of the kind",
}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_broken_exif(tmp_path: Path, kind: str, exif: bytes) -> None:
    """One sentence, or a picture without a text: never another error."""
    path = tmp_path / "p"
    path.write_bytes(_with_exif(kind, exif))
    try:
        assert read_picture_file(path).parameters is None
    except InputError as error:
        assert str(error).startswith(f"{path} is not a picture whose text can be read (")  # noqa: PT017


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not a picture that is read. Give a PNG, JPEG or WebP."),
        (b"no picture at all", "is not a picture that is read. Give a PNG, JPEG or WebP."),
        (_png()[:40], "is not a picture"),
        (_png(chunk(b"tEXt", b"parameters\0" + b"a" * (LONGEST_TEXT + 1))), "its text has 1,048,577 characters"),
        (_png(chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * (64 << 20)))), "cannot|can be read"),
        (_png(chunk(b"IHDR", struct.pack(">IIBBBBB", 1 << 30, 1 << 30, 8, 2, 0, 0, 0))), "is not a picture"),
    ],
    ids=["empty", "text", "cut off", "long text", "bomb", "huge"],
)
def test_hostile_files(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says) as caught:
        read_picture_file(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(InputError, match="is not a picture whose text can be read"):
            read_picture_file(path)


def test_a_name_of_no_picture() -> None:
    for name in ("p.txt", "p", "p.gif", "p.bmp"):
        with pytest.raises(InputError, match=r"Name a \.png, \.jpg or \.webp\."):
            save_grid(IMAGES, Path(name))


def test_what_a_text_chunk_says_is_text() -> None:
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20  # what Pillow unpacks at most
