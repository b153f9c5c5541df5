"""Reading a folder of pictures, and every way in which it can lie."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from ldm_reference.config import ConfigError
from ldm_reference.data import CaptionedImages, batch_indices, load_picture
from PIL import Image


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (12, 4), (7, 7), (5, 1)])
def test_batches_cover_each_epoch_once(count: int, batch: int) -> None:
    per_epoch = count // batch
    epochs = []
    for epoch in range(3):
        batches = [batch_indices(count, batch, epoch * per_epoch + i, seed=1) for i in range(per_epoch)]
        assert {len(indices) for indices in batches} == {batch}
        seen = [index for indices in batches for index in indices]
        assert len(set(seen)) == per_epoch * batch  # none twice; a remainder smaller than a batch is left out
        assert set(seen) <= set(range(count))
        epochs.append(seen)
    assert len({tuple(seen) for seen in epochs}) == 3


def test_batches_depend_on_the_arguments_alone() -> None:
    given = [batch_indices(100, 8, step, seed=2) for step in (40, 3, 40)]
    torch.manual_seed(9)
    torch.rand(5)
    assert batch_indices(100, 8, 40, seed=2) == given[0] == given[2] != given[1]
    assert batch_indices(100, 8, 40, seed=3) != given[0]


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(ConfigError, match="batch size 8 is larger than the 7 samples; lower it or add pictures"):
        batch_indices(7, 8, 0, seed=0)


def test_open_pictures(pictures: Path) -> None:
    data = CaptionedImages.open(pictures, 16)
    assert len(data.files) == 12
    assert len(data.captions) == 13
    assert data.files[0] == "red-square.png"
    assert data.captions[:2] == ((0, "the colour red"), (0, "a red square"))
    loaded = data.load([0, 3])
    assert loaded.shape == (2, 3, 16, 16)
    assert loaded.dtype == torch.float32
    assert loaded[0, :, 8, 8].tolist() == [1.0, -1.0, -1.0]
    assert loaded[0, :, 0, 0].tolist() == [1.0, 1.0, 1.0]


METADATA_LIES = {
    "not JSON": ("file_name: a.png", 'line 1: not an object like {"file_name": "cat.png", "text": "a cat"}'),
    "not an object": ("[1]", "line 1: not an object"),
    "no text": ('{"file_name": "red-bar.png"}', "'text'"),
    "no file name": ('\n{"text": "a"}', "line 2: not an object"),
    "text a number": ('{"file_name": "red-bar.png", "text": 5}', "'file_name' and 'text' must be strings"),
    "above the folder": ('{"file_name": "../a.png", "text": "a"}', "line 1: '../a.png' leaves the folder"),
    "absolute": ('{"file_name": "/etc/passwd", "text": "a"}', "line 1: '/etc/passwd' leaves the folder"),
    "no such file": ('{"file_name": "mauve.png", "text": "a"}', "line 1: 'mauve.png' is not a file in"),
    "nested deep": ("[" * 100_000, "line 1: not an object"),
    "a number of many digits": ('{"file_name": "red-bar.png", "text": "a", "n": ' + "9" * 5000 + "}", "line 1: not an"),
    "a long name": (json.dumps({"file_name": "a" * 5000, "text": "a"}), "is no name of a file"),
    "NUL in a name": (json.dumps({"file_name": "a\0.png", "text": "a"}), "is no"),
    "half a character": ('{"file_name": "red-bar.png", "text": "\\ud83e"}', "'text' has half of a surrogate pair"),
    "half a character in a name": ('{"file_name": "\\ud83e.png", "text": "a"}', "is no"),
    "a folder": ('{"file_name": ".", "text": "a"}', "'.' is not a file in"),
    "a link in a circle": ('{"file_name": "circle.png", "text": "a"}', "circle.png' is no"),
    "a pipe": ('{"file_name": "pipe.png", "text": "a"}', "'pipe.png' is not a file in"),
    "empty": ("\n\n", "metadata.jsonl is empty"),
}


@pytest.mark.parametrize("lie", METADATA_LIES)
def test_metadata_that_lies(tmp_path: Path, pictures: Path, lie: str) -> None:
    text, sentence = METADATA_LIES[lie]
    (tmp_path / "red-bar.png").write_bytes((pictures / "red-bar.png").read_bytes())
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ConfigError) as caught:
        CaptionedImages.open(tmp_path, 16)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_picture_may_be_a_link_to_a_file_anywhere(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "linked.png").symlink_to(pictures / "red-bar.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "linked.png", "text": "a"}')
    assert CaptionedImages.open(tmp_path, 16).load([0]).shape == (1, 3, 16, 16)


def test_metadata_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metadata\.jsonl; one line a picture is needed"):
        CaptionedImages.open(tmp_path, 16)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"metadata\.jsonl is not UTF-8 text"):
        CaptionedImages.open(tmp_path, 16)
    (tmp_path / "metadata.jsonl").unlink()
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(ConfigError, match=r"metadata\.jsonl is not a regular file"):
        CaptionedImages.open(tmp_path, 16)


def test_captions_may_hold_any_character(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "red-bar.png").write_bytes((pictures / "red-bar.png").read_bytes())
    text = "one\u2028two\u0085three\x1cfour"
    line = json.dumps({"file_name": "red-bar.png", "text": text}, ensure_ascii=False).replace("\\u001c", "\x1c")
    line = line.replace("\x1c", "\\u001c")  # JSON escapes control characters, but not the other two
    (tmp_path / "metadata.jsonl").write_text(line + "\r\n", encoding="utf-8", newline="")
    assert CaptionedImages.open(tmp_path, 16).captions == ((0, text),)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 128))
    image = image.resize((16, 8), Image.Resampling.NEAREST)
    canvas = Image.new("RGBA", (16, 16))
    canvas.paste(image, (0, 0))
    canvas.save(tmp_path / "a.png")
    picture = load_picture(tmp_path / "a.png", 16)
    assert picture[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(picture[:, 0, 15], torch.tensor([127, 127, 255]) / 127.5 - 1)
    Image.new("LA", (16, 16), (10, 0)).save(tmp_path / "grey.png")
    assert load_picture(tmp_path / "grey.png", 16).min() == 1.0


def test_pictures_are_cropped_to_a_square_the_right_way_up(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (8, 0, 24, 16))
    image.save(tmp_path / "wide.png")
    red = load_picture(tmp_path / "wide.png", 8)[0]
    assert red[:, 1:-1].max() < -0.95  # the blue middle; the filter mixes a little into its edges
    turned = Image.new("RGB", (16, 16), "white")
    turned.paste("black", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    picture = load_picture(tmp_path / "turned.png", 16)
    assert (picture[0, 0, 0], picture[0, 15, 0]) == (1.0, -1.0)


MODES = {"1": 1, "L": 90, "LA": (90, 255), "P": 3, "I;16": 257 * 90, "CMYK": (0, 0, 0, 165), "RGB": (90,) * 3}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_picture_is_read(tmp_path: Path, mode: str, channels: int) -> None:
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = Image.new(mode, (16, 16), MODES[mode])
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + [90, 90, 90])
    image.save(file)
    picture = load_picture(file, 16, channels)
    assert picture.shape == (channels, 16, 16)
    level = 255 if mode == "1" else 90
    assert ((picture + 1) * 127.5).sub(level).abs().max() < 1.5


def test_grey_of_a_colour_is_its_luma(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "a.png")
    grey = (load_picture(tmp_path / "a.png", 16, 1)[0, 0, 0].item() + 1) * 127.5
    assert grey == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=0.51)


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert load_picture(tmp_path / "a.gif", 16)[:, 8, 8].tolist() == [1.0, -1.0, -1.0]


def test_a_huge_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ConfigError, match=r"a\.png is not a readable picture \(.*so make it smaller first\)"):
        load_picture(tmp_path / "a.png", 16)


LABEL_LIES = {
    "missing": ('{"file_name": "red-bar.png"}', 'not an object like {"file_name": "boot.png", "label": 9}'),
    "a text": ('{"file_name": "red-bar.png", "label": "3"}', "label '3' must be a whole number from 0 to 2"),
    "a truth": ('{"file_name": "red-bar.png", "label": true}', "label True must be a whole number from 0 to 2"),
    "negative": ('{"file_name": "red-bar.png", "label": -1}', "label -1 must be a whole number from 0 to 2"),
    "too high": ('{"file_name": "red-bar.png", "label": 3}', "label 3 must be a whole number from 0 to 2"),
    "two": (
        '{"file_name": "red-bar.png", "label": 1}\n{"file_name": "red-bar.png", "label": 2}',
        "line 2: 'red-bar.png' has two labels, 1 and 2",
    ),
}


@pytest.mark.parametrize("lie", LABEL_LIES)
def test_labels_that_lie(tmp_path: Path, pictures: Path, lie: str) -> None:
    text, sentence = LABEL_LIES[lie]
    (tmp_path / "red-bar.png").write_bytes((pictures / "red-bar.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ConfigError) as caught:
        CaptionedImages.open(tmp_path, 16, condition="label", classes=3)
    assert sentence in str(caught.value)


def test_open_labels_or_nothing(pictures: Path) -> None:
    data = CaptionedImages.open(pictures, 16, condition="label", classes=6)
    assert data.labels == tuple(label for label in range(6) for _ in range(2))
    assert data.captions == ()
    assert CaptionedImages.open(pictures, 16, condition=None).labels == ()


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_unreadable_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.png is not a readable picture"):
        load_picture(tmp_path / "a.png", 16)


def test_truncated_picture(tmp_path: Path, pictures: Path) -> None:
    content = (pictures / "red-bar.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"a\.png is not a readable picture"):
        load_picture(tmp_path / "a.png", 16)
