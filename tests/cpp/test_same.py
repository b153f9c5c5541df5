"""The C++ runtime draws what the Python one draws: tokens, noise, latents and pixels."""

from __future__ import annotations

import ctypes
import json
import random
import re
import shutil
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import MANIFEST
from ldm_export.bundle.plans import read_plan
from ldm_export.errors import InputError
from ldm_export.plan import SAMPLERS
from ldm_export.runtime import Pipeline
from ldm_export.runtime.tokenizer_clip import ClipTokenizer
from ldm_export.runtime.tokenizer_files import TokenizerFiles
from ldm_export.runtime.tokenizer_json import JsonTokenizer
from tests.hostile.base import entry_of, sound, with_length, with_tokenizer_json
from tests.tokenizer_fixtures import (
    LENGTH,
    added_token,
    document_of,
    documents_by_hand,
    gemma_tokenizer,
    prompts_in_capitals,
    prompts_of_every_category,
    t5_tokenizer,
)

LATENT_TOLERANCE = 1e-5
NOISE_TOLERANCE = 2e-6
VECTORS = ("<fox>", "<fox>_1", "<fox>_2", "<owl>", "<owl>_1", "<one>", "<x>_1", "<x>_2")
"""Added tokens: textual inversions of three, two and one vectors, and two that no shorter name leads to."""
PROMPTS = ("a red circle", "grinning face, it's smiling")
SEEDS = (7, -3)
STEPS = {"lcm": 4}
WRITTEN_OUT = (
    *(
        "<|startoftext|>",
        "<|endoftext|>",
        "<|ENDOFTEXT|>",
        "<|endoftext|><|startoftext|>!!",
        "'s",
        "'LL",
        "it's",
        "don'T",
    ),
    *("a red circle", "  ", "\t\n", "\u00a0", "e\u0301", "\u1100\u1161\u11a8", "\u0344", "\u0958", "\u212b", "\ufb01"),
    *(
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\U0001f1e9\U0001f1ea",
        "\u0130",
        "\u03a3",
        "\u00df",
        "\u00bd",
        "\u2460",
    ),
)


def drawn(pipeline: Any, prompts: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, flat, and the latents of the last step."""
    latents = []

    def keep(step: Any) -> None:
        latents[:] = [np.ctypeslib.as_array(step.latents, tuple(step.latents_shape)).copy()]

    pixels = np.frombuffer(pipeline.draw(prompts, callback=keep, **options), np.uint8)
    return pixels, latents[0]


def assert_same(result: tuple[np.ndarray, np.ndarray], expected: Any) -> None:
    pixels, latents = result
    scale = np.abs(expected.latents).max()
    np.testing.assert_allclose(latents, expected.latents, rtol=0, atol=LATENT_TOLERANCE * scale)
    assert np.abs(pixels.astype(int) - expected.images.ravel().astype(int)).max() <= 1


def seeds(values: tuple[int, ...] = SEEDS) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


@pytest.fixture(scope="module")
def cpp(open_cpp: Callable[..., Any], bundle: Path) -> Any:
    return open_cpp(bundle, warn=pytest.fail)


@pytest.fixture(scope="module")
def python(bundle: Path) -> Pipeline:
    return Pipeline.open(bundle, backend="cpu")


def test_both_use_the_target(cpp: Any, python: Pipeline) -> None:
    assert cpp.info().backend.decode() == python.backend
    assert python.backend.endswith("ort-cpu")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents(cpp: Any, python: Pipeline, sampler: str) -> None:
    steps = STEPS.get(sampler, 10)
    result = drawn(cpp, PROMPTS, sampler=sampler.encode(), steps=steps, seeds=seeds())
    assert_same(result, python.generate(PROMPTS, sampler=sampler, steps=steps, seed=SEEDS))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_latents_from_an_image(cpp: Any, python: Pipeline, sampler: str, strength: float) -> None:
    steps = STEPS.get(sampler, 10)
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    given = {"image": image.tobytes(), "height": 16, "width": 24, "strength": strength}
    result = drawn(cpp, PROMPTS, sampler=sampler.encode(), steps=steps, seed=5, **given)
    assert_same(result, python.generate(PROMPTS, sampler=sampler, steps=steps, seed=5, image=image, strength=strength))


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 6), ("plms", 7), ("heun", 3), ("unipc", 13), ("deis", 16)])
@pytest.mark.parametrize("strength", [None, 1.0, 0.4])
def test_any_number_of_steps(
    cpp: Any, python: Pipeline, bundle: Path, sampler: str, steps: int, strength: float | None
) -> None:
    assert not (bundle / "plans" / f"{sampler}-{steps}.json").exists()
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    for_cpp = {} if strength is None else {"image": image.tobytes(), "height": 16, "width": 16, "strength": strength}
    for_python = {} if strength is None else {"image": image, "strength": strength}
    result = drawn(cpp, PROMPTS, sampler=sampler.encode(), steps=steps, seeds=seeds(), **for_cpp)
    assert_same(result, python.generate(PROMPTS, sampler=sampler, steps=steps, seed=SEEDS, **for_python))


CALLS: dict[str, tuple[int, int]] = {
    "ddim": (20, 7),
    "ddpm": (20, 12),
    "euler-ancestral": (12, 5),
    "heun": (8, 9),
    "plms": (25, 20),
    "dpmpp-2m-sde": (15, 15),
    "unipc": (13, 1),
}
"""Steps and calls of each sampler."""


@pytest.mark.parametrize("sampler", CALLS)
@pytest.mark.parametrize("strength", [None, 1.0, 0.45])
def test_fewer_calls_than_steps(cpp: Any, python: Pipeline, sampler: str, strength: float | None) -> None:
    steps, calls = CALLS[sampler]
    image = np.random.default_rng(2).integers(0, 256, (16, 16, 3), np.uint8)
    for_cpp = {} if strength is None else {"image": image.tobytes(), "height": 16, "width": 16, "strength": strength}
    for_python = {} if strength is None else {"image": image, "strength": strength}
    result = drawn(cpp, PROMPTS, sampler=sampler.encode(), steps=steps, calls=calls, seeds=seeds(), **for_cpp)
    expected = python.generate(PROMPTS, sampler=sampler, steps=steps, calls=calls, seed=SEEDS, **for_python)
    assert len(expected.timings.denoiser_ms) == calls or strength is not None
    assert_same(result, expected)
    if calls < steps:
        whole = drawn(cpp, PROMPTS, sampler=sampler.encode(), steps=steps, seeds=seeds(), **for_cpp)
        assert np.abs(whole[1] - result[1]).max() > 1e-3


def test_a_plans_file_is_what_is_drawn_with(open_cpp: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    opened = Bundle.open(folder)
    plan = read_plan(opened, "ddim", 5)
    opened.add_file("plans/ddim-5.json", replace(plan, init_scale=0.5).to_json().encode())
    compiled = drawn(open_cpp(tiny_bundle), PROMPTS, steps=5)
    result = drawn(open_cpp(folder), PROMPTS, steps=5)
    assert np.abs(result[1] - compiled[1]).max() > 0.1
    assert_same(result, Pipeline.open(folder, backend="cpu").generate(PROMPTS, steps=5))


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no guidance": ({"guidance": 1.0}, {"guidance": 1.0}),
    "another guidance": ({"guidance": 2.5}, {"guidance": 2.5}),
    "one negative prompt": (
        {"negative_prompts": (ctypes.c_char_p * 1)(b"blue"), "negative_prompt_count": 1},
        {"negative_prompt": "blue"},
    ),
    "negative prompts": (
        {"negative_prompts": (ctypes.c_char_p * 2)(b"blue", b"red"), "negative_prompt_count": 2},
        {"negative_prompt": ["blue", "red"]},
    ),
    "another size": ({"height": 32, "width": 16}, {"height": 32, "width": 16}),
    "deepcache": ({"deepcache": 3}, {"deepcache": 3}),
    "a seed": ({"seed": 2**31 - 1}, {"seed": 2**31 - 1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(cpp: Any, python: Pipeline, name: str) -> None:
    for_cpp, for_python = OPTIONS[name]
    assert_same(drawn(cpp, PROMPTS, steps=10, **for_cpp), python.generate(PROMPTS, steps=10, **for_python))


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", None), ("euler-ancestral", None), ("ddim", 4), ("ddim", 10)])
def test_a_loop_graph_draws_the_same(cpp: Any, python: Pipeline, sampler: str, calls: int | None) -> None:
    result = drawn(cpp, PROMPTS, sampler=sampler.encode(), steps=10, calls=calls or 0, whole=1)
    assert_same(result, python.generate(PROMPTS, sampler=sampler, steps=10, calls=calls))


def test_plain_graphs(open_cpp: Callable[..., Any], tiny_bundle: Path) -> None:
    expected = Pipeline.open(tiny_bundle, backend="cpu").generate(PROMPTS, steps=10)
    assert_same(drawn(open_cpp(tiny_bundle), PROMPTS, steps=10), expected)


@pytest.mark.parametrize("kind", ["unconditional", "class-conditional", "lcm", "sdxl"])
def test_other_kinds(open_cpp: Callable[..., Any], kinds: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    folder = kinds(kind)[1]
    cpp, python = open_cpp(folder), Pipeline.open(folder, backend="cpu")
    steps = cpp.info().default_steps
    if kind == "unconditional":
        result, expected = drawn(cpp, None, count=2, seeds=seeds()), python.generate(seed=SEEDS, steps=steps)
    elif kind == "class-conditional":
        labels = (ctypes.c_int64 * 2)(1, 3)
        result = drawn(cpp, None, count=2, seeds=seeds(), class_labels=labels)
        expected = python.generate(seed=SEEDS, steps=steps, class_labels=[1, 3])
    else:
        result, expected = drawn(cpp, PROMPTS, seeds=seeds()), python.generate(PROMPTS, seed=SEEDS)
    assert_same(result, expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 768, 16384, 100003])
def test_noise_is_that_of_torch(ldm: Any, seed: int, size: int) -> None:
    values = (ctypes.c_float * size)()
    assert ldm.ldm_noise(seed, values, size) == 0
    expected = torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    # without AVX2 torch rounds the angle otherwise (ldm_export/runtime/noise.py)
    slack = 2 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 1
    np.testing.assert_allclose(np.ctypeslib.as_array(values), expected, rtol=0, atol=NOISE_TOLERANCE * slack)


LONG = 512


@pytest.fixture(scope="module")
def long_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the tokenizer of `tiny_bundle`, to which textual inversions were added, that cuts nothing off."""
    draft = sound()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        draft.files[f"tokenizer/{name}"] = (tiny_bundle / "tokenizer" / name).read_bytes()
    config = draft.document("tokenizer/tokenizer_config.json")
    config.pop("added_tokens_decoder", None)
    draft.put("tokenizer/tokenizer_config.json", config | {"model_max_length": LONG})
    first = max(draft.document("tokenizer/vocab.json").values()) + 1
    draft.put("tokenizer/added_tokens.json", {token: first + k for k, token in enumerate(VECTORS)})
    with_length(draft, LONG)
    folder = tmp_path_factory.mktemp("long") / "bundle"
    draft.write(folder)
    return folder


def test_tokens_of_text_of_every_unicode_category(open_cpp: Callable[..., Any], long_bundle: Path) -> None:
    categories: dict[str, list[str]] = {}
    for code in range(1, 0x110000):
        categories.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    choose = random.Random(0)

    def part() -> str:
        if choose.random() < 0.4:
            return choose.choice(WRITTEN_OUT)
        return "".join(choose.choice(categories[choose.choice([*categories])]) for _ in range(choose.randint(1, 5)))

    prompts = ["".join(part() for _ in range(choose.randint(1, 8))) for _ in range(10_000)]
    assert any("\ud800" <= character <= "\udfff" for prompt in prompts for character in prompt)
    tokenizer, pipeline = ClipTokenizer(long_bundle / "tokenizer"), open_cpp(long_bundle, warn=pytest.fail)
    expected = tokenizer(prompts)
    for prompt, ids in zip(prompts, expected, strict=True):
        text = prompt.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # as the Python one takes it
        assert pipeline.tokenize(text.encode()) == ids.tolist(), ascii(prompt)


def test_every_code_point_is_classified_alike(open_cpp: Callable[..., Any], long_bundle: Path) -> None:
    tokenizer, pipeline = ClipTokenizer(long_bundle / "tokenizer"), open_cpp(long_bundle, warn=pytest.fail)
    points = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    rows = ["a".join(points[start : start + 50]) for start in range(0, 0x30000, 50)]  # beyond them nothing is assigned
    rows = [row for row in rows if len(row.encode()) <= 250]
    for row, ids in zip(rows, tokenizer(rows), strict=True):
        assert pipeline.tokenize(row.encode()) == ids.tolist(), ascii(row)


@pytest.fixture(scope="module")
def whole_documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Documents of the kind "tokenizers", by name."""
    gemma = gemma_tokenizer()
    return documents_by_hand() | {
        "t5": document_of(t5_tokenizer(tmp_path_factory.mktemp("t5") / "files")),
        "gemma": document_of(gemma),
        "gemma, padded left": document_of(gemma, side="Left"),
    }


@pytest.mark.filterwarnings("ignore:The prompt has")
@pytest.mark.parametrize("name", [*documents_by_hand(), "t5", "gemma", "gemma, padded left"])
def test_ids_of_a_document_that_is_read_whole(
    open_cpp: Callable[..., Any], binding: ModuleType, whole_documents: dict[str, Any], tmp_path: Path, name: str
) -> None:
    draft = sound()
    with_length(draft, LENGTH)
    with_tokenizer_json(draft, whole_documents[name])
    draft.write(tmp_path / "bundle")
    tokenizer = JsonTokenizer(TokenizerFiles.of_folder(tmp_path / "bundle" / "tokenizer"))
    pipeline = open_cpp(tmp_path / "bundle", warn=lambda _: None)
    prompts = prompts_of_every_category(3_000 if name in documents_by_hand() and name != "lower case" else 10_000)
    refused = 0
    for prompt in [*prompts, *prompts_in_capitals(2_000)]:
        text = prompt.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        try:
            expected = tokenizer(text)[0].tolist()
        except InputError as error:  # what looks like padding
            refused += 1
            with pytest.raises(binding.LdmError, match=f"^{re.escape(str(error))}$"):
                pipeline.tokenize(text.encode())
        else:
            assert pipeline.tokenize(text.encode()) == expected, ascii(prompt)
    assert refused < 10


def test_every_code_point_is_made_lower_case_alike(open_cpp: Callable[..., Any], tmp_path: Path) -> None:
    """Compare every code point by itself, at both ends of a prompt, and between a letter and a sigma."""
    draft = sound()
    with_length(draft, LONG)
    document = documents_by_hand()["lower case"]
    document["truncation"]["max_length"] = document["padding"]["strategy"]["Fixed"] = LONG
    with_tokenizer_json(draft, document)
    draft.write(tmp_path / "bundle")
    tokenizer = JsonTokenizer(TokenizerFiles.of_folder(tmp_path / "bundle" / "tokenizer"))
    pipeline = open_cpp(tmp_path / "bundle", warn=pytest.fail)
    points = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]  # no letter case beyond them
    points += [chr(code) for code in range(0xE0000, 0xE01F0)]  # nor a mark, but for these
    texts = [f"{c}\u03a3 A{c}\u03a3 A\u03a3{c}" for c in points]
    prompts = [" ".join(texts[start : start + 20]) for start in range(0, len(texts), 20)]
    prompts += [f"{c}a{c}" for c in points if not c.isprintable() and unicodedata.category(c) != "Cn"]
    for prompt, ids in zip(prompts, tokenizer(prompts), strict=True):
        assert pipeline.tokenize(prompt.encode()) == ids.tolist(), ascii(prompt)


def test_what_a_document_read_whole_cuts_off_is_told(
    open_cpp: Callable[..., Any], whole_documents: dict[str, Any], tmp_path: Path
) -> None:
    draft = sound()
    with_length(draft, LENGTH)
    document = json.loads(json.dumps(whole_documents["t5"]))
    number = max(token["id"] for token in document["added_tokens"]) + 1
    document["added_tokens"].append(added_token(max(number, len(document["model"]["vocab"])), "\x1c"))
    with_tokenizer_json(draft, document)
    draft.write(tmp_path / "bundle")
    warnings_given: list[str] = []
    prompt = "a red circle, a blue square, two green triangles on white; grinning face with smiling eyes\x1c"
    ids = open_cpp(tmp_path / "bundle", warn=warnings_given.append).tokenize(prompt.encode())
    tokenizer = JsonTokenizer(TokenizerFiles.of_folder(tmp_path / "bundle" / "tokenizer"))
    with pytest.warns(UserWarning, match=f"^{re.escape(warnings_given[0])}$"):
        assert tokenizer(prompt)[0].tolist() == ids


@pytest.mark.parametrize(
    "prompt",
    ["a <fox> runs", "<owl><fox> <fox>_1 and <FOX>", "<fox>_1 alone", "<one> <x>", "<fo x> fox", "<x>_1<x>", ""],
)
def test_textual_inversions_are_written_out_alike(open_cpp: Callable[..., Any], long_bundle: Path, prompt: str) -> None:
    expected = ClipTokenizer(long_bundle / "tokenizer")(prompt)[0].tolist()
    assert open_cpp(long_bundle, warn=pytest.fail).tokenize(prompt.encode()) == expected
    first = min(json.loads((long_bundle / "tokenizer" / "added_tokens.json").read_text()).values())
    if prompt == "a <fox> runs":
        assert [first, first + 1, first + 2] == [number for number in expected if number >= first]


def test_tokens_that_are_written_out_without_end_are_refused(
    open_cpp: Callable[..., Any], binding: ModuleType, long_bundle: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(long_bundle, tmp_path / "bundle")
    tokens = [name for k in range(1, 21) for name in ("a" * k + "b", "a" * k + "b_1", "a" * k + "b_2")]
    first = max(json.loads((folder / "tokenizer" / "vocab.json").read_text()).values()) + 1
    file = folder / "tokenizer" / "added_tokens.json"
    file.write_text(json.dumps({token: first + k for k, token in enumerate(tokens)}))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["tokenizer/added_tokens.json"] = entry_of(file.read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest))
    prompt = " ".join(reversed(tokens[::3]))
    message = r"are written out to more than 1048576 characters\. Shorten"
    with pytest.raises(InputError, match=message):
        ClipTokenizer(folder / "tokenizer")(prompt)
    with pytest.raises(binding.LdmError, match=message):
        open_cpp(folder).tokenize(prompt.encode())


def test_what_is_cut_off_is_told(open_cpp: Callable[..., Any], tiny_bundle: Path) -> None:
    told: list[str] = []
    prompt = "a red circle, a blue square, two green triangles on white; grinning face with smiling eyes"
    ids = open_cpp(tiny_bundle, warn=told.append).tokenize(prompt.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ClipTokenizer(tiny_bundle / "tokenizer")(prompt)[0].tolist() == ids
    assert told[0] == str(caught[0].message)
