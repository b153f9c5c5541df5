"""``lora``, and ``generate --lora``: files, their text, lists, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_export.pictures.files import read_picture_file
from ldm_export.pictures.text import options_of, requests_from
from ldm_export.runtime import Pipeline
from tests.adapters.peft_files import as_diffusers, lora_factors
from tests.cli.test_generate_files import drawn, pixels, refused, run

pytestmark = [pytest.mark.filterwarnings("ignore:::peft"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that may be changed, an adapter, and what ``lora`` makes of it."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(tiny_bundle, folder / "bundle")
    save_file(as_diffusers(lora_factors("sd", tiny_checkpoint)), folder / "style.safetensors")
    done = run("lora", folder / "bundle", folder / "style.safetensors", "-o", folder / "style.ldma", "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["path"] == str(folder / "style.ldma")
    assert {*made["layers"]} == {"unet", "text_encoder"}
    assert made["error"] < 1e-4
    return folder


def test_a_picture_says_what_it_was_drawn_with(folder: Path, tmp_path: Path) -> None:
    out, style = tmp_path / "out.png", folder / "style.ldma"
    drawn(folder / "bundle", "a red circle", "-o", out, "--lora", f"{style}=0.5", "--backend", "cpu")
    (request,) = requests_from(read_picture_file(out).parameters or "")
    (use,) = request.adapters
    assert (use.name, use.strength, len(use.sha256), use.path) == ("style.ldma", 0.5, 10, None)
    assert json.loads(run("inspect", out, "--json").stdout)["requests"][0]["adapters"] == [
        {"name": "style.ldma", "strength": 0.5, "sha256": use.sha256}
    ]
    pipeline = Pipeline.open(folder / "bundle", backend="cpu")
    options: dict[str, Any] = options_of([request]) | {"adapters": [(style, use.strength)]}
    assert np.array_equal(pipeline.generate(**options).images[0], pixels(out))
    assert not np.array_equal(pipeline.generate(**options | {"adapters": None}).images[0], pixels(out))


def test_lines_of_a_list_have_their_own(folder: Path, tmp_path: Path) -> None:
    style = folder / "style.ldma"
    lines = [{"prompt": "a red circle", "seed": 3, "adapters": {str(style): strength}} for strength in (0.0, 1.0)]
    lines += [{"prompt": "a red circle", "seed": 3}, {"prompt": "a red circle", "seed": 3, "adapters": {}}]
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join(map(json.dumps, lines)))
    arguments = [folder / "bundle", "-f", listing, "-o", f"{tmp_path}/out/", "--lora", style, "--backend", "cpu"]
    files = drawn(*arguments)["files"]
    without, with_it, by_option, none = (pixels(Path(file)) for file in files)
    assert np.abs(without.astype(int) - none).max() <= 1
    assert np.array_equal(with_it, by_option)
    assert not np.array_equal(with_it, none)
    assert drawn(*arguments)["drawn"] == []
    assert "adapters is [0.5]" in refused(_listed(folder, tmp_path, [0.5]))
    assert "an adapter's strength" in refused(_listed(folder, tmp_path, {str(style): "much"}))


def _listed(folder: Path, tmp_path: Path, adapters: Any) -> Any:
    listing = tmp_path / "bad.jsonl"
    listing.write_text(json.dumps({"prompt": "a red circle", "adapters": adapters}))
    return run("generate", folder / "bundle", "-f", listing, "-o", f"{tmp_path}/bad/", "--backend", "cpu")


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("none.safetensors", "There is no adapter"),
        ("pickle.bin", "is a pickle"),
        ("other.safetensors", "is of a layer of this model"),
        ("text.safetensors", "truncated or not a safetensors file"),
    ],
)
def test_what_is_no_adapter_changes_nothing(file: str, why: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04")
    (tmp_path / "text.safetensors").write_text("no safetensors")
    save_file({"unet.mid.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    before = sorted(path for path in folder.rglob("*"))
    done = run("lora", folder / "bundle", tmp_path / file, "-o", tmp_path / "out.ldma")
    assert why in refused(done)
    assert sorted(path for path in folder.rglob("*")) == before
    assert not (tmp_path / "out.ldma").exists()


def test_a_safetensors_file_is_told_what_to_run(folder: Path, tmp_path: Path) -> None:
    done = run(
        *("generate", folder / "bundle", "a red circle", "-o", tmp_path / "out.png", "--backend", "cpu"),
        *("--lora", folder / "style.safetensors"),
    )
    assert "is no adapter for bundles" in refused(done)
    assert "ldm-export lora BUNDLE" in done.stderr
