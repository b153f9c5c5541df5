"""The C++ runtime draws with adapters what the Python one draws."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from ldm_export.bundle import Bundle
from ldm_export.export.adapters import make_adapter
from ldm_export.runtime import Pipeline
from tests.adapters.peft_files import CONFIGS, as_diffusers, as_kohya, lora_factors, peft_adapter
from tests.cpp.test_same import assert_same, drawn, seeds

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = ("a red circle", "a blue square", "a red circle", "a red circle")


@pytest.fixture(scope="module")
def adapters(bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A bundle with its target for this machine, and two adapters for it: of all networks, and of the UNet alone."""
    folder = tmp_path_factory.mktemp("adapters")
    copy = shutil.copytree(bundle, folder / "bundle")
    factors = lora_factors("sd", tiny_checkpoint)
    save_file(as_diffusers(factors), folder / "one.safetensors")
    flipped = {name: value.flip(0).contiguous() for name, value in as_kohya(factors, "sd").items() if "unet" in name}
    save_file(flipped, folder / "two.safetensors")
    opened = Bundle.open(copy)
    return copy, [
        make_adapter(opened, folder / f"{name}.safetensors", folder / f"{name}.ldma").path for name in ("one", "two")
    ]


def given(files: list[Path], strengths: list[float], pictures: list[int] | None = None) -> dict[str, Any]:
    return {
        "adapters": (ctypes.c_char_p * len(files))(*(str(file).encode() for file in files)),
        "adapter_strengths": (ctypes.c_double * len(files))(*strengths),
        "adapter_pictures": None if pictures is None else (ctypes.c_int64 * len(files))(*pictures),
        "adapter_count": len(files),
    }


@pytest.mark.parametrize("form", ["ort-cpu", "plain"])
def test_same_pictures_with_adapters(
    form: str, adapters: tuple[Path, list[Path]], open_cpp: Callable[..., Any], tmp_path: Path
) -> None:
    bundle, (one, two) = adapters
    if form == "plain":
        bundle = shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("*ort-cpu"))
    cpp, python = open_cpp(bundle, warn=pytest.fail), Pipeline.open(bundle, backend="cpu")
    assert python.backend.endswith("ort-cpu") == (form == "ort-cpu")
    options: dict[str, Any] = {"sampler": "ddim", "steps": 10, "guidance": 4.0}
    result = drawn(cpp, PROMPTS[:1], sampler=b"ddim", steps=10, guidance=4.0, seed=7, **given([one], [0.8]))
    expected = python.generate(PROMPTS[:1], seed=7, adapters=[(one, 0.8)], **options)
    assert_same(result, expected)
    mixtures = [[(one, 0.8)], [(two, -0.5)], [], [(one, 0.3), (two, 0.4)]]
    result = drawn(
        cpp, PROMPTS, sampler=b"ddim", steps=10, guidance=4.0, seeds=seeds((7, 8, 9, 10)),
        **given([one, two, one, two], [0.8, -0.5, 0.3, 0.4], [0, 1, 3, 3]),
    )  # fmt: skip
    batch = python.generate(PROMPTS, seed=[7, 8, 9, 10], adapters=mixtures, **options)
    assert_same(result, batch)
    assert np.abs(expected.latents[0] - python.generate(PROMPTS[:1], seed=7, **options).latents[0]).max() > 0.1
    bare = drawn(cpp, PROMPTS[:1], sampler=b"ddim", steps=10, guidance=4.0, seed=7)
    assert_same(bare, python.generate(PROMPTS[:1], seed=7, **options))


@pytest.mark.parametrize("option", ["prompt_weights", "long_prompts"])
def test_same_pictures_of_prompts_that_are_read_otherwise(
    option: str, adapters: tuple[Path, list[Path]], open_cpp: Callable[..., Any]
) -> None:
    """Encoded prompts are remembered by ids, adapters and strengths."""
    bundle, (one, _) = adapters
    cpp, python = open_cpp(bundle, warn=pytest.fail), Pipeline.open(bundle, backend="cpu")
    prompts = ["a (red:1.4) circle on [white]" * (3 if option == "long_prompts" else 1)] * 3
    options: dict[str, Any] = {"steps": 4, "guidance": 4.0, option: True}
    result = drawn(cpp, prompts, seeds=seeds((7, 7, 7)), **given([one, one], [0.8, -0.3], [0, 2]), **options)
    expected = python.generate(prompts, seed=[7, 7, 7], adapters=[[(one, 0.8)], [], [(one, -0.3)]], **options)
    assert_same(result, expected)
    assert min(np.abs(expected.latents[0] - expected.latents[k]).max() for k in (1, 2)) > 0.1


def test_a_picture_does_not_depend_on_what_was_drawn_before(
    adapters: tuple[Path, list[Path]], open_cpp: Callable[..., Any]
) -> None:
    """A picture without adapters, beside one with them, leaves nothing of these behind."""
    bundle, (one, _) = adapters
    used, fresh = open_cpp(bundle, warn=pytest.fail), open_cpp(bundle, warn=pytest.fail)
    drawn(used, ["a red circle", "a blue square"], steps=2, guidance=4.0, **given([one], [0.8], [0]))
    after, expected = (drawn(cpp, ["a blue square"], steps=2, guidance=4.0, seed=3) for cpp in (used, fresh))
    for given_now, wanted in zip(after, expected, strict=True):
        np.testing.assert_array_equal(given_now, wanted)


def test_same_pictures_with_dora(
    adapters: tuple[Path, list[Path]],
    tiny_checkpoint: Path,
    open_cpp: Callable[..., Any],
    binding: ModuleType,
    tmp_path: Path,
) -> None:
    bundle, (_, two) = adapters
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    peft_adapter(CONFIGS["dora"](), tiny_checkpoint, tmp_path / "peft", 1.0)
    dora = make_adapter(Bundle.open(copy), tmp_path / "peft", tmp_path / "dora.ldma").path
    cpp, python = open_cpp(copy, warn=pytest.fail), Pipeline.open(copy, backend="cpu")
    options: dict[str, Any] = {"steps": 10, "guidance": 4.0}
    result = drawn(cpp, PROMPTS[:2], seeds=seeds((7, 8)), **given([dora, two], [0.8, 0.4], [0, 1]), **options)
    expected = python.generate(PROMPTS[:2], seed=[7, 8], adapters=[[(dora, 0.8)], [(two, 0.4)]], **options)
    assert_same(result, expected)
    assert np.abs(expected.latents - python.generate(PROMPTS[:2], seed=[7, 8], **options).latents).max() > 0.1
    with pytest.raises(binding.LdmError, match="is DoRA and another one change"):
        drawn(cpp, PROMPTS[:1], **given([dora, two], [0.8, 0.4]))


@pytest.mark.parametrize(
    ("files", "strengths", "pictures", "why"),
    [
        (["none.ldma"], [1.0], None, "none.ldma cannot be read"),
        (["one.safetensors"], [1.0], None, "is no adapter for bundles"),
        (["one.ldma"], [float("nan")], None, "an adapter's strength"),
        (["one.ldma"], [1e9], None, "an adapter's strength"),
        (["one.ldma", "one.ldma"], [1.0, 1.0], None, "given twice for one picture"),
        (["one.ldma"], [1.0], [1], "there are 0 to 0"),
    ],
)
def test_refusals(
    files: list[str],
    strengths: list[float],
    pictures: list[int] | None,
    why: str,
    adapters: tuple[Path, list[Path]],
    open_cpp: Callable[..., Any],
    binding: ModuleType,
) -> None:
    bundle, made = adapters
    cpp = open_cpp(bundle)
    with pytest.raises(binding.LdmError, match=why):
        drawn(cpp, PROMPTS[:1], **given([made[0].with_name(file) for file in files], strengths, pictures))


def test_bundles_that_do_not_take_them(
    adapters: tuple[Path, list[Path]],
    tiny_bundle: Path,
    kinds: Callable[[str], tuple[Path, Path]],
    open_cpp: Callable[..., Any],
    binding: ModuleType,
) -> None:
    files = adapters[1][:1]
    with pytest.raises(binding.LdmError, match=r"takes no adapters of unet\. Run: ldm-export lora"):
        drawn(open_cpp(tiny_bundle), PROMPTS[:1], **given(files, [1.0]))
    with pytest.raises(binding.LdmError, match=r"was made for another (text_encoder|unet) than that of"):
        drawn(open_cpp(kinds("sd2")[1]), PROMPTS[:1], **given(files, [1.0]))


def test_damaged_files_are_refused(
    adapters: tuple[Path, list[Path]], open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path
) -> None:
    """Every file that is cut short, and files with a byte of their header changed, raise or draw; none ends the
    process."""
    bundle, (one, _) = adapters
    content, bad, cpp = one.read_bytes(), tmp_path / "bad.ldma", open_cpp(bundle)
    header = int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(0)
    refused = []
    for number in range(60):
        changed = bytearray(content)
        if number % 2:
            changed = changed[: int(generator.integers(len(content)))]
        else:
            changed[int(generator.integers(8 + header))] ^= 1 << int(generator.integers(8))
        bad.write_bytes(changed)
        try:
            drawn(cpp, PROMPTS[:1], steps=1, **given([bad], [1.0]))
        except binding.LdmError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all("adapter" in sentence for sentence in refused)
