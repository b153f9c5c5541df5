"""The ``parameters`` text: its form, read by another reader, and back by ours."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_export import __version__
from ldm_export.errors import InputError
from ldm_export.pictures.text import (
    AdapterUse,
    PictureRequest,
    control_text,
    ip_adapter_text,
    parameters_from,
    parameters_text,
    requests_from,
)
from ldm_export.plan import SAMPLERS

REQUEST = PictureRequest("a red apple", "blue, dark", 7, "ddim", 20, 4.0, 64, 96, "0123456789", "emoji64")


def other_reader(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, as galleries take them from a text: the last line is of settings, the line
    that begins with ``Negative prompt:`` divides the rest."""
    head, _, last = text.rpartition("\n")
    prompt, _, negative = f"\n{head}".partition("\nNegative prompt:")
    pairs = re.findall(r'([A-Za-z][A-Za-z ]*): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)', last)
    unquoted = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    return prompt.strip(), negative.strip(), unquoted


def test_the_form() -> None:
    assert parameters_text([REQUEST]) == (
        "a red apple\nNegative prompt: blue, dark\nSteps: 20, Sampler: DDIM, CFG scale: 4, Seed: 7, Size: 96x64, "
        f"Model hash: 0123456789, Model: emoji64, Plan: ddim, Version: ldm_export {__version__}"
    )


def test_what_it_has_besides() -> None:
    request = replace(
        REQUEST, sampler="fitted-guidance4", calls=8, class_label=3, strength=0.35, image_hash="ab", deepcache=3
    )
    text = parameters_text([replace(request, prompt=None, negative_prompt=None, model="a, b: c")])
    assert other_reader(text) == (
        "",
        "",
        {
            **{"Steps": "20", "Sampler": "fitted-guidance4", "CFG scale": "4", "Seed": "7", "Size": "96x64"},
            **{"Model hash": "0123456789", "Model": "a, b: c", "Denoising strength": "0.35", "Init image hash": "ab"},
            **{"Plan": "fitted-guidance4", "Calls": "8", "DeepCache": "3", "Class label": "3"},
            "Version": f"ldm_export {__version__}",
        },
    )


def test_adapters_come_back() -> None:
    uses = (AdapterUse('a "style", 2.ldma', 0.7, "0123456789", "folder/of/it"), AdapterUse("b.ldma", -1.0, "ab"))
    text = parameters_text([replace(REQUEST, adapters=uses)])
    assert "folder/of/it" not in text
    (read,) = requests_from(text)
    assert read.adapters == uses
    assert [use.path for use in read.adapters] == [None, None]
    for wrong in ('"[1]"', '"[[\\"a\\", 1, \\"b\\"]]"', '"{}"', '"[[\\"a\\", NaN, \\"b\\"]]"'):
        with pytest.raises(InputError, match="is not a request of ldm_export"):
            requests_from(parameters_text([REQUEST]).replace("Plan:", f"Adapters: {wrong}, Plan:"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_comes_back(sampler: str) -> None:
    assert requests_from(parameters_text([replace(REQUEST, sampler=sampler)]))[0].sampler == sampler


TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ["Negative prompt: x", "Steps: 1, Seed: 2, Size: 3x4", "", " a ", "b\r", "\x1b[2J", "\x00", "\ud800"]
    )
).map("\n".join)


@given(
    st.builds(
        PictureRequest,
        prompt=st.none() | TEXTS,
        negative_prompt=st.none() | TEXTS,
        seed=st.integers(-(2**63), 2**64 - 1),
        sampler=st.sampled_from([*SAMPLERS, "fitted-guidance4"]),
        steps=st.integers(1, 1000),
        guidance=st.floats(0, 1e6, allow_subnormal=False),
        height=st.integers(1, 4096),
        width=st.integers(1, 4096),
        model_hash=st.just("0123456789"),
        model=st.text(min_size=1),
        calls=st.none() | st.integers(1, 1000),
        class_label=st.none() | st.integers(0, 1000),
        strength=st.none() | st.floats(0, 1, allow_subnormal=False),
        image_hash=st.none() | st.just("00ff"),
        mask_hash=st.none() | st.just("0e11"),
        keep_pixels=st.booleans(),
        image_guidance=st.none() | st.floats(0, 1e6, allow_subnormal=False),
        deepcache=st.integers(1, 9),
    )
)
def test_every_request_comes_back(request: PictureRequest) -> None:
    text = parameters_text([request])
    text.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert requests_from(text) == (request,)


def test_a_grid_has_all_of_its_pictures() -> None:
    others = [replace(REQUEST, prompt="green", seed=8), replace(REQUEST, seed=9, negative_prompt=None), REQUEST]
    text = parameters_text([REQUEST, *others])
    assert other_reader(text)[0] == "a red apple"
    assert json.loads(other_reader(text)[2]["Grid"]) == [
        {"prompt": "green", "seed": 8},
        {"negative_prompt": None, "seed": 9},
        {},
    ]
    assert requests_from(text) == (REQUEST, *others)


def test_the_text_of_another_tool() -> None:
    lines = ["a cat", "on a mat", "Negative prompt: dog", "horse"]
    text = "\n".join([*lines, 'Steps: 30, Sampler: Euler a, Seed: 1, Size: 8x8, Lora hashes: "a: b, c"'])
    found = parameters_from(text)
    assert (found.prompt, found.negative_prompt) == ("a cat\non a mat", "dog\nhorse")
    assert found.settings["Lora hashes"] == "a: b, c"
    with pytest.raises(InputError, match=r"not a request of ldm_export \(it lacks Plan\)\. Type"):
        requests_from(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Seed: 7", "Seed: seven"),
        ("Seed: 7", "Seed: " + "7" * 5000),
        ("Size: 96x64", "Size: 96"),
        ("CFG scale: 4", "CFG scale: nan"),
        ("Plan: ddim", "Plan: ddim, Image CFG scale: inf"),
        ("Plan: ddim", 'Plan: ddim, Exact: "[]"'),
        ("Plan: ddim", 'Plan: ddim, Exact: "{\\"steps\\": 3}"'),
        ("Plan: ddim", 'Plan: ddim, Grid: "{}"'),
        ("Plan: ddim", 'Plan: ddim, Grid: "[3]"'),
        ("Plan: ddim", 'Plan: ddim, Grid: "[{\\"seed\\": true}]"'),
        ("Plan: ddim", 'Plan: ddim, Grid: "' + "[" * 5000 + '"'),
        ("Plan: ddim", "Plan: ddim, Grid: ]"),
        ("Plan: ddim", "Flan: ddim"),
    ],
)
def test_a_text_that_was_changed(old: str, new: str) -> None:
    text = parameters_text([REQUEST])
    assert old in text
    with pytest.raises(InputError, match="not a request of ldm_export") as caught:
        requests_from(text.replace(old, new))
    assert len(str(caught.value)) < 320


@pytest.mark.parametrize("part", ["a", "a:", 'a:"', 'a:"\\",', "a: b,", "Negative prompt:\n", "\n", '"'])
def test_a_long_text_takes_no_long_time(part: str) -> None:
    started = time.perf_counter()
    parameters_from(part * ((1 << 20) // len(part)))
    assert time.perf_counter() - started < 10


def test_no_class_of_requests_differs_unseen() -> None:
    """Each field shows in the text: two requests that differ have other texts."""
    changed: dict[str, Any] = {
        **{"prompt": "x", "negative_prompt": None, "seed": 8, "sampler": "plms", "steps": 21, "guidance": 4.5},
        **{"height": 128, "width": 128, "model_hash": "1", "model": "m", "calls": 3, "class_label": 1},
        **{"strength": 0.5, "image_hash": "1", "mask_hash": "1", "keep_pixels": True, "deepcache": 2},
        "controls": (control_text("canny", 0.8, 0.0, 0.6, "ab"),),
        "ip_adapter": ip_adapter_text(0.6, "ab"),
        "adapters": (AdapterUse("a.ldma", 1.0, "ab"),),
        "image_guidance": 1.5,
        **{"prompt_weights": True, "long_prompts": True},
    }
    assert changed.keys() == vars(REQUEST).keys()
    texts = {parameters_text([replace(REQUEST, **{name: value})]) for name, value in changed.items()}
    assert len(texts | {parameters_text([REQUEST])}) == len(changed) + 1
