"""Lists of pictures to generate, and the requests that they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.pictures import lists
from ldm_export.pictures.lists import Wanted, checked_requests, pictures_from_file, pictures_from_prompts
from ldm_export.pictures.text import PictureRequest, options_of, parameters_text, requests_from

DEFAULTS = {"seed": 5, "steps": 10, "sampler": None}


def written(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def asked(found: list[Wanted], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(picture.options.get(key) for key in keys) for picture in found]


def test_prompts_are_repeated() -> None:
    found = pictures_from_prompts(["a", "b"], [], 3, DEFAULTS)
    expected = [("a", 5), ("a", 6), ("a", 7), ("b", 8), ("b", 9), ("b", 10)]
    assert asked(found, "prompt", "seed") == expected
    assert asked(pictures_from_prompts([], [4, 2], 2, DEFAULTS), "class_label", "seed") == [
        (4, 5),
        (4, 6),
        (2, 7),
        (2, 8),
    ]
    assert asked(pictures_from_prompts([], [], 2, DEFAULTS), "prompt", "seed") == [(None, 5), (None, 6)]
    with pytest.raises(InputError, match="2 prompts and 1 class labels were given"):
        pictures_from_prompts(["a", "b"], [1], 1, DEFAULTS)


def test_a_list(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "a", "count": 2},
        "  \r",
        {"prompt": "b", "seed": 100, "count": 2, "steps": 20, "negative_prompt": "n", "height": 8, "class_label": 3},
        {"prompt": "c\u2028"},
    )
    found = pictures_from_file(path, DEFAULTS)
    assert asked(found, "prompt", "seed", "steps") == [
        ("a", 5, 10),
        ("a", 6, 10),
        ("b", 100, 20),
        ("b", 101, 20),
        ("c\u2028", 9, 10),
    ]
    assert [picture.where for picture in found][::2] == [f"{path}, line {line}" for line in (1, 3, 4)]
    assert asked(pictures_from_file(path, DEFAULTS, 3), "prompt")[-3:] == [("c\u2028",)] * 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a red apple", "line 2 is not JSON: .* Write one JSON object a line"),
        ('{"prompt": NaN}', "line 2 is not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "line 2 is not JSON: the key 'prompt' occurs twice"),
        ('["a"]', "line 2 is no JSON object"),
        ({"promt": "a"}, "line 2 has the unknown key 'promt'; known are prompt, negative_prompt, seed"),
        ({"prompt": "a", "image": "x.png"}, "line 2 has the unknown key 'image'"),
        ({"prompt": "a", "count": 0}, "line 2: count is 0; give a whole number from 1"),
        ({"prompt": "a", "count": 1e9}, "line 2: count is"),
        ({"prompt": "a", "seed": "7"}, "line 2: seed is '7' of type str"),
        ({"prompt": "a", "seed": None}, "line 2: seed is None"),
    ],
)
def test_a_wrong_line(tmp_path: Path, line: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        pictures_from_file(written(tmp_path, {"prompt": "a"}, line), DEFAULTS)


def test_a_file_that_is_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path, says in (
        (tmp_path / "absent", "cannot be read .No such file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "bytes", "not UTF-8"),
        (written(tmp_path, "", " "), "asks for no picture"),
    ):
        with pytest.raises(InputError, match=says):
            pictures_from_file(path, DEFAULTS)
    monkeypatch.setattr(lists, "MOST_PICTURES", 4)
    with pytest.raises(InputError, match="is more than 4 pictures"):
        pictures_from_file(written(tmp_path, {"prompt": "a", "count": 5}), DEFAULTS)
    with pytest.raises(InputError, match="2 times 3 is more than 4 pictures"):
        pictures_from_prompts(["a", "b"], [], 3, DEFAULTS)


def test_requests_have_every_default(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    (found,) = checked_requests(bundle, [Wanted("", {"prompt": "red", "seed": 3})])
    model = bundle.manifest.model
    assert found == PictureRequest(
        prompt="red",
        negative_prompt=None,
        seed=3,
        sampler=model["default_sampler"],
        steps=model["default_steps"],
        guidance=bundle.roles.guidance.scale,
        height=model["height"],
        width=model["width"],
        model_hash=hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()[:10],
        model=bundle.manifest.source["checkpoint"],
    )


def test_a_request_from_a_picture(tiny_bundle: Path) -> None:
    image = np.zeros((16, 24, 3), np.uint8)
    options = {"prompt": "red", "seed": 3, "image": image}
    (found,) = checked_requests(Bundle.open(tiny_bundle), [Wanted("", options)])
    assert (found.strength, found.height, found.width) == (0.6, 16, 24)
    assert found.image_hash == hashlib.sha256(bytes(16 * 24 * 3)).hexdigest()[:10]
    mask = np.full((16, 24), 255, np.uint8)
    (found,) = checked_requests(Bundle.open(tiny_bundle), [Wanted("", options | {"mask": mask, "keep_pixels": True})])
    assert (found.strength, found.keep_pixels) == (1.0, True)
    assert found.mask_hash == hashlib.sha256(mask.tobytes()).hexdigest()[:10]


def test_a_request_of_a_picture_that_is_edited(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    bundle = Bundle.open(kinds("instruct-pix2pix")[1])
    options: dict[str, Any] = {"prompt": "red", "seed": 3, "image": np.zeros((16, 24, 3), np.uint8)}
    (found,) = checked_requests(bundle, [Wanted("", options)])
    assert (found.guidance, found.image_guidance, found.strength) == (7.5, 1.5, None)
    (other,) = checked_requests(bundle, [Wanted("", options | {"image_guidance": 2, "guidance": 3})])
    assert other == replace(found, image_guidance=2.0, guidance=3.0)
    assert "Image CFG scale: 2, " in parameters_text([other])
    assert requests_from(parameters_text([other])) == (other,)
    assert options_of([other])["image_guidance"] == 2.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "x, line 9: 0 prompts and no class labels were given"),
        ({"prompt": 3}, "x, line 9: prompt is 3; give text"),
        ({"prompt": ["a", "b"]}, "x, line 9: prompt is .* give text"),
        ({"prompt": "a", "negative_prompt": ["b"]}, "negative_prompt is .* give text"),
        ({"prompt": "a", "class_label": "3"}, "class_label is '3' of type str; give a whole number"),
        ({"prompt": "a", "class_label": True}, "class_label is True"),
        ({"prompt": "a", "steps": 1.5}, "steps is 1.5"),
        ({"prompt": "a", "sampler": "magic"}, "no plan for 'magic'"),
        ({"prompt": "a", "height": 17}, "17x"),
    ],
)
def test_what_the_bundle_cannot_draw(tiny_bundle: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        checked_requests(Bundle.open(tiny_bundle), [Wanted("x, line 9", {"seed": 0, **options})])


def test_a_class(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    bundle = Bundle.open(kinds("class-conditional")[1])
    (found,) = checked_requests(bundle, pictures_from_prompts([], [4], 1, {"seed": 0}))
    assert (found.prompt, found.class_label) == (None, 4)
