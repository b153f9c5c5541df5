"""Pictures of every kind that others make: read with their values, or refused with one sentence."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ldm_reference import pictures
from ldm_reference.config import ConfigError
from ldm_reference.pictures import FORMATS, read_picture
from PIL import Image, TiffImagePlugin

Y, X = np.mgrid[0:24, 0:32]
RAMP = ((X + Y) / 54 * 65535).astype(np.uint16)
GREY = (RAMP / 257).round().astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def saved(path: Path, pixels: Any, **options: Any) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0))
END = chunk(b"IDAT", zlib.compress(b"\0" * 65 * 64)) + chunk(b"IEND", b"")
BOMB = zlib.compress(b"A" * (80 << 20), 9)
BROKEN = {
    "nothing": b"",
    "text": b"a picture, surely",
    "short header": SIGNATURE + chunk(b"IHDR", b"\0\0") + END,
    "short resolution": SIGNATURE + HEADER + chunk(b"pHYs", b"\0") + END,
    "text that grows": SIGNATURE + HEADER + chunk(b"zTXt", b"k\0\0" + BOMB) + END,
    "colours that grow": SIGNATURE + HEADER + chunk(b"iCCP", b"k\0\0" + BOMB) + END,
    "no pixels": SIGNATURE + HEADER + chunk(b"IEND", b""),
    "wrong sum": SIGNATURE + HEADER[:-1] + b"\0" + END,
    "too large": SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 65536, 65536, 8, 0, 0, 0, 0)) + END,
    "large": SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)) + END,
    "PPM": b"P6 2 2 255\n" + bytes(12),
    "PPM of a bad number": b"P2 64 64 255 64$64 ",
    "QOI": b"qoif" + struct.pack(">IIBB", 64, 64, 3, 0) + b"\xfe\0\0\0",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "icon": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\x68\4\0\0\x16\0\0\0",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_or_of_another_format_is_one_sentence(tmp_path: Path, what: str) -> None:
    (tmp_path / "a.png").write_bytes(BROKEN[what])
    with pytest.raises(ConfigError, match=r"a\.png is not a readable picture") as raised:
        read_picture(tmp_path / "a.png")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_of_each_format_and_the_half_of_it(tmp_path: Path, form: str) -> None:
    file = saved(tmp_path / "a", COLOUR, format=form)
    read = read_picture(file)
    assert (read.dtype, read.shape) == (np.uint8, (24, 32, 3))
    assert np.abs(read.astype(int) - COLOUR).mean() < (12 if form in ("JPEG", "WEBP", "GIF") else 1e-9)
    assert np.abs(read_picture(file, 1)[..., 0].astype(int) - np.asarray(Image.fromarray(read).convert("L"))).max() <= 1
    data = file.read_bytes()
    for size in (len(data) // 2, 30, 9):
        file.write_bytes(data[:size])
        with pytest.raises(ConfigError, match="is not a readable picture"):
            read_picture(file)


def white_is_zero(path: Path) -> Path:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    data = io.BytesIO()
    Image.fromarray(65535 - RAMP).save(data, "TIFF", tiffinfo=tags)
    path.write_bytes(data.getvalue())
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0
    return path


def test_grey_of_16_bits_keeps_its_values(tmp_path: Path) -> None:
    for file in (
        saved(tmp_path / "a.png", RAMP),
        saved(tmp_path / "a.tif", RAMP),
        saved(tmp_path / "be.tif", Image.frombytes("I;16B", (32, 24), RAMP.astype(">u2").tobytes())),
        white_is_zero(tmp_path / "w.tif"),
    ):
        for channels in (1, 3):
            assert np.abs(read_picture(file, channels).astype(int) - GREY[..., None]).max() <= 1, file


def test_colour_of_16_bits_keeps_its_values(tmp_path: Path) -> None:
    wide = COLOUR.astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(SIGNATURE + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), COLOUR)


def test_floating_point_is_scaled_or_refused(tmp_path: Path) -> None:
    unit = RAMP.astype(np.float32) / 65535
    assert np.abs(read_picture(saved(tmp_path / "a.tif", unit), 1)[..., 0].astype(int) - GREY).max() <= 1
    for values in (unit * 255, unit - 0.5, np.where(unit > 0.5, np.float32("nan"), unit)):
        with pytest.raises(ConfigError, match=r"floating-point values beyond \[0, 1\]"):
            read_picture(saved(tmp_path / "a.tif", values))
    with pytest.raises(ConfigError, match="neither 8 nor 16 bits"):
        read_picture(saved(tmp_path / "a.tif", RAMP.astype(np.int32)))


def test_palettes_transparency_bits_and_inks(tmp_path: Path) -> None:
    image = Image.fromarray(COLOUR)
    alpha = Image.fromarray((X >= 16).astype(np.uint8) * 255)
    clear = image.copy()
    clear.putalpha(alpha)
    for file in (saved(tmp_path / "a.png", clear), saved(tmp_path / "p.png", clear.quantize(200))):
        read = read_picture(file)
        assert (read[:, :16] == 255).all()
        assert np.abs(read[:, 16:].astype(int) - COLOUR[:, 16:]).mean() < 6
    grey = Image.merge("LA", (Image.fromarray(GREY), alpha))
    assert (read_picture(saved(tmp_path / "la.png", grey), 1)[:, :16] == 255).all()
    assert set(np.unique(read_picture(saved(tmp_path / "1.png", Image.fromarray(X >= 16))))) == {0, 255}
    inks = read_picture(saved(tmp_path / "a.jpg", image.convert("CMYK"), quality=95))
    assert np.abs(inks.astype(int) - COLOUR).mean() < 12
    keyed = saved(tmp_path / "key.png", GREY, transparency=int(GREY[0, 0]))
    assert read_picture(keyed, 1)[0, 0, 0] == 255


def test_upright_and_the_first_frame(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for pixels in (COLOUR, RAMP):
        for suffix in ("png", "tif"):
            turned = read_picture(saved(tmp_path / f"a.{suffix}", pixels, exif=exif))
            assert turned.shape == (32, 24, 3)
            assert np.abs(turned[..., 0].T[::-1].astype(int) - GREY).max() <= 1
    other = Image.fromarray(255 - COLOUR)
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        file = saved(tmp_path / "b", COLOUR, format=form, save_all=True, append_images=[other])
        assert np.abs(read_picture(file).astype(int) - COLOUR).mean() < 12


def test_only_regular_files_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is not a readable picture"):
            read_picture(path)
    with pytest.raises(ConfigError, match=r"none\.png does not exist"):
        read_picture(tmp_path / "none.png")
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(ConfigError, match="is not a readable picture"):
            read_picture(tmp_path / name)
    file = saved(tmp_path / "a.png", COLOUR)
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    with pytest.raises(ConfigError, match="at most 100 are read"):
        read_picture(file)
