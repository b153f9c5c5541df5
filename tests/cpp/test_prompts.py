"""Weights in prompts and prompts in chunks: the C++ runtime draws what the Python one draws."""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_export.errors import InputError
from ldm_export.export import chain
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline

Kinds = Callable[[str], tuple[Path, Path]]
PIECES = (
    *("(", "[", ")", "]", ":", "\\", "(", ")", ":1.3)", ":0.5)", ": -.4 )", ":+2.)", ":1.2.3)", ":9)"),
    *(" a red circle", "red", ", ", "\n", " smiling eyes", "7", ".", " ", "\u00e9", "\U0001f600", "\u0663)"),
)
LONG = "two green triangles on white, smiling eyes, a red circle and a blue square, grinning face"
PROMPTS = ["a (red:1.4) circle [on] white", f"(({LONG}:1.2), {LONG}"]
NEGATIVE = "(blue:0.5) square"


def latents_of(pipeline: Any, prompts: list[str], negative: str, **options: Any) -> np.ndarray[Any, Any]:
    found = []

    def keep(step: Any) -> None:
        found[:] = [np.ctypeslib.as_array(step.latents, tuple(step.latents_shape)).copy()]

    texts = (ctypes.c_char_p * 1)(negative.encode())
    given = {"negative_prompts": texts, "negative_prompt_count": 1}
    pipeline.draw(prompts, callback=keep, **given, **options)
    return found[0]


def compared(cpp: Any, python: Pipeline, prompts: list[str], negative: str, **options: Any) -> None:
    expected = python.generate(prompts, negative_prompt=negative, steps=2, seed=3, guidance=3.0, **options).latents
    made = latents_of(cpp, prompts, negative, steps=2, seed=3, guidance=3.0, **options)
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    "reading", [{"prompt_weights": 1}, {"long_prompts": 1}, {"prompt_weights": 1, "long_prompts": 1}]
)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.filterwarnings("ignore:The prompt has:UserWarning")
def test_latents(
    open_cpp: Callable[..., Any], kinds: Kinds, variants: Callable[[str], Path], kind: str, reading: tuple[str, ...]
) -> None:
    folder = variants("target") if kind == "sd" else kinds(kind)[1]
    cpp, python = open_cpp(folder), Pipeline.open(folder, backend="cpu")
    compared(cpp, python, PROMPTS, NEGATIVE, **dict.fromkeys(reading, True))


@pytest.mark.filterwarnings("ignore:The prompt has:UserWarning")
def test_random_prompts(open_cpp: Callable[..., Any], tiny_bundle: Path) -> None:
    """Grammar, ids, weights and conditions at once: what is drawn is the same to the bit, or both refuse."""
    cpp, python = open_cpp(tiny_bundle), Pipeline.open(tiny_bundle, backend="cpu")
    source, refused = random.Random(1), 0
    for _ in range(150):
        prompt = "".join(source.choices(PIECES, k=source.randrange(24)))
        options = {"prompt_weights": True, "long_prompts": source.random() < 0.5}
        try:
            compared(cpp, python, [prompt], "", **options)
        except InputError as error:
            refused += 1
            with pytest.raises(Exception, match=re.escape(str(error).rpartition("the weight")[2])):
                latents_of(cpp, [prompt], "", **options)
    assert refused < 50


def test_textual_inversions(
    open_cpp: Callable[..., Any], tiny_checkpoint: Path, traced_once: None, tmp_path: Path
) -> None:
    file = tmp_path / "fox.safetensors"
    save_file({"<fox>": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}, file)
    bundle = chain.export_bundle(open_checkpoint(tiny_checkpoint, embeddings=[(file, None)]), tmp_path / "bundle")
    cpp, python = open_cpp(bundle.path), Pipeline.open(bundle.path, backend="cpu")
    compared(cpp, python, ["a red <fox>", "<FOX> eyes"], "(<fox>:0.5)", prompt_weights=True, long_prompts=True)


def test_what_is_refused(open_cpp: Callable[..., Any], kinds: Kinds, variants: Callable[[str], Path]) -> None:
    def both(folder: Path, prompts: list[str] | None, **options: Any) -> None:
        with pytest.raises(InputError) as refused:
            Pipeline.open(folder, backend="cpu").generate(prompts, steps=10, **options)
        with pytest.raises(Exception, match=re.escape(str(refused.value))):
            open_cpp(folder).draw(prompts, steps=10, **options)

    for option in ("prompt_weights", "long_prompts"):
        both(kinds("pixart")[1], ["red"], **{option: True})
        both(kinds("unconditional")[1], None, **{option: True})
        both(variants("loop"), ["red"], whole=True, **{option: True})
    both(variants("plain"), ["(" * 101], prompt_weights=True)
    both(variants("plain"), ["red " * 449], long_prompts=True)
