"""What is read of a bundle is what was checked: listed files alone, no links, and nothing that was swapped later."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.atomic import locked
from ldm_export.errors import BundleError, LdmExportError
from ldm_export.reading.documents import MalformedError
from ldm_export.runtime import Pipeline
from tests.hostile.base import Draft, sound, with_outside_weights, with_target

ASKS = {"sampler": "ddim", "steps": 2, "seed": 1}
WEIGHTS = "text_encoder/model.onnx_data"


def written(folder: Path, *changes: Callable[[Draft], object]) -> Path:
    draft = sound()
    for change in changes:
        change(draft)
    folder.mkdir()
    draft.write(folder)
    return folder


def generated(pipeline: Pipeline) -> np.ndarray:
    return pipeline.generate(["a cat"], **ASKS).images


def test_only_listed_files_are_read(tmp_path: Path) -> None:
    bundle = Bundle.open(written(tmp_path / "b", lambda draft: draft.unlisted.update({"x.json": b"{}"})))
    assert bundle.json("model_index.json") == {"_class_name": "StableDiffusionPipeline"}
    for name in ("x.json", "manifest.json", "../b/model_index.json", "/etc/passwd"):
        with pytest.raises(BundleError, match=r"not listed in manifest\.json"):
            bundle.read(name)
    with pytest.raises(MalformedError, match="at most 3 are read"):
        bundle.listed.read("model_index.json", 3)


@pytest.mark.parametrize("parent", [False, True])
def test_a_link_that_comes_later_is_not_followed(tmp_path: Path, parent: bool) -> None:
    folder = written(tmp_path / "b")
    bundle = Bundle.open(folder)
    path = folder / ("tokenizer" if parent else "tokenizer/vocab.json")
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="is a link; a bundle has none"):
        bundle.read("tokenizer/vocab.json")


def test_a_file_that_grows_later_is_not_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "b")
    bundle = Bundle.open(folder)
    (folder / "model_index.json").write_text("{}" * 100)
    with pytest.raises(BundleError, match="has 200 bytes; manifest"):
        bundle.read("model_index.json")


@pytest.mark.parametrize("name", ["vae_decoder/model.onnx", "plans/ddim-2.json", "tokenizer/vocab.json", WEIGHTS])
def test_what_is_swapped_after_it_was_verified_is_not_used(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "b", with_outside_weights)
    with Pipeline.open(folder, backend="cpu", threads=1) as pipeline:
        before = generated(pipeline)
    with Pipeline.open(folder, backend="cpu", threads=1, verify=True) as pipeline:
        size = (folder / name).stat().st_size
        (folder / name).write_bytes(b"\x01" * size)
        np.testing.assert_array_equal(generated(pipeline), before)


def test_altered_bytes_of_the_same_size_are_refused_when_they_are_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "b")
    bundle = Bundle.open(folder).verifying()
    data = bytearray((folder / "unet/model.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "unet/model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="onnx has been altered"):
        bundle.graph_files("unet/model.onnx")


def test_a_model_is_checked_again_where_it_changed_since(tmp_path: Path) -> None:
    """Of the same size, it now reads a file that is not listed."""
    folder = written(tmp_path / "b", with_outside_weights)
    bundle = Bundle.open(folder)
    model = (folder / "text_encoder/model.onnx").read_bytes()
    (folder / "text_encoder/model.onnx").write_bytes(model.replace(b"model.onnx_data", b"other.onnx_data"))
    with pytest.raises(BundleError, match=r"from 'other.onnx_data', which manifest.json does not list"):
        bundle.graph_files("text_encoder/model.onnx")


def test_weights_that_are_cut_short_in_use_are_an_error(tmp_path: Path) -> None:
    folder = written(tmp_path / "b", with_outside_weights)
    with Pipeline.open(folder, backend="cpu", threads=1) as pipeline:
        before = generated(pipeline)
        replaced = folder / "again"
        shutil.copy(folder / WEIGHTS, replaced)
        os.replace(replaced, folder / WEIGHTS)  # another file of that name: the mapped one is as it was
        np.testing.assert_array_equal(pipeline.generate(["a dog", "a cat"], **ASKS).images[1].shape, before[0].shape)
    with Pipeline.open(folder, backend="cpu", threads=1) as pipeline:
        generated(pipeline)
        os.truncate(folder / WEIGHTS, 0)
        with pytest.raises(LdmExportError, match="onnx_data was changed while it was in use"):
            pipeline.generate(["a bird"], **ASKS)


@pytest.mark.parametrize("verify", [False, True])
def test_weights_of_several_links_are_used(tmp_path: Path, verify: bool) -> None:
    folder = written(tmp_path / "b", with_outside_weights)
    shutil.copytree(folder, tmp_path / "copy", copy_function=os.link)
    with Pipeline.open(folder, backend="cpu", threads=1, verify=verify) as pipeline:
        assert generated(pipeline).shape == (1, 8, 8, 3)


def test_a_target_of_several_links_runs(tmp_path: Path) -> None:
    folder = written(tmp_path / "b", with_target)
    shutil.copytree(folder, tmp_path / "copy", copy_function=os.link)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Pipeline.open(folder, backend="cpu", threads=1) as pipeline:
            generated(pipeline)
            assert pipeline.backend.endswith("ort-cpu")


ADDS = """
import sys
from ldm_export.bundle import Bundle
Bundle.open(sys.argv[1]).add_file(f"plans/{sys.argv[2]}.txt", b"x")
"""


def test_files_that_are_added_at_once_are_all_listed(tmp_path: Path) -> None:
    folder = written(tmp_path / "b")
    names = [f"n{number}" for number in range(5)]
    with locked(folder):
        running = [subprocess.Popen([sys.executable, "-c", ADDS, str(folder), name]) for name in names]
        with pytest.raises(subprocess.TimeoutExpired):
            running[0].wait(0.5)
    assert [process.wait(60) for process in running] == [0] * len(names)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {f"plans/{name}.txt" for name in names} <= files.keys()
    Bundle.open(folder, verify=True)


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    folder = written(tmp_path / "b")
    code = "import os, sys; from pathlib import Path; from ldm_export.bundle.atomic import locked\n"
    code += "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert "more.txt" in Bundle.open(folder).add_file("more.txt", b"x").manifest.files
