"""Names of picture files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ldm_export.errors import InputError
from ldm_export.pictures.names import names_from, paths_of, slug
from ldm_export.pictures.text import PictureRequest

REQUEST = PictureRequest("A red apple!", None, 7, "ddim", 20, 4.0, 16, 24, "0123456789", "tiny")


def names(output: str, *requests: PictureRequest) -> list[str]:
    found = names_from(output)
    assert found is not None
    return [str(path) for path in paths_of(found, requests)]


def test_one_file_a_folder_or_a_pattern(tmp_path: Path) -> None:
    two = (REQUEST, replace(REQUEST, prompt="Katze, schwarz", seed=-8))
    assert names_from("out/p.png") is None
    assert names("new/", *two) == ["new/0000.png", "new/0001.png"]
    (tmp_path / "a{b}").mkdir()
    assert names(str(tmp_path / "a{b}"), REQUEST) == [str(tmp_path / "a{b}" / "0000.png")]
    assert names("o/{number:04}-{seed}-{prompt}.webp", *two) == [
        "o/0000-7-a-red-apple.webp",
        "o/0001--8-katze-schwarz.webp",
    ]
    assert names("../{seed:3d}/{{{number}}}.jpg", REQUEST) == ["../  7/{0}.jpg"]
    assert names("{prompt}.png", REQUEST) == ["a-red-apple.png"]
    assert names("/x/{prompt}/{number}.png", REQUEST) == ["/x/a-red-apple/0.png"]


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("{steps}.png", r"has the unknown field \{steps\}\. A pattern has the fields \{number\}, \{seed\}, \{prompt\}"),
        ("{}.png", "unknown field"),
        ("{0}.png", "unknown field"),
        ("{number.__class__}.png", "unknown field"),
        ("{prompt[0]}.png", "unknown field"),
        ("{prompt!r}.png", "unknown field"),
        ("{number:{seed}}.png", "a number takes a width"),
        ("{number:099999999}.png", "a number takes a width"),
        ("{prompt:10}.png", "a number takes a width"),
        ("{number.png", "is no pattern"),
        ("number}.png", "is no pattern"),
        ("o/{number}/../../p.png", r"leaves its folder after a field\. Leave the \.\. out"),
        ("o/{number}", "not the name of a picture file"),
        ("o/{number}.{prompt}", "not the name of a picture file"),
    ],
)
def test_a_wrong_pattern(output: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        names_from(output)


def test_two_pictures_of_one_name() -> None:
    with pytest.raises(InputError, match=r"^Pictures 0 and 2 would both be o/a-red-apple\.png\. Put \{number\} in"):
        names("o/{prompt}.png", REQUEST, replace(REQUEST, prompt="b"), replace(REQUEST, prompt="a  RED-apple"))


@pytest.mark.parametrize(
    ("prompt", "label", "expected"),
    [
        ("../../etc/passwd", None, "etc-passwd"),
        ("..", None, "picture"),
        ("", None, "picture"),
        (None, None, "picture"),
        (None, 7, "class-7"),
        ("\x00\x1b[2J\n\ud800", None, "2j"),
        ("a_b  c" + "x" * 99, None, "a-b-c" + "x" * 35),
        ("红苹果 🍎", None, "红苹果"),
        ('C:\\con|*?"<>', None, "c-con"),
    ],
)
def test_slugs(prompt: str | None, label: int | None, expected: str) -> None:
    assert slug(replace(REQUEST, prompt=prompt, class_label=label)) == expected
