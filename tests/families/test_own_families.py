"""Families of a user's own: files that are named, entry points of packages, and what is said of an unknown one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ldm_export import families
from ldm_export.bench.child import opened
from ldm_export.cli import main
from ldm_export.errors import CheckpointError, ExportError
from ldm_export.export.chain import export_bundle
from ldm_export.families import family_of, open_checkpoint, read_family, read_files
from ldm_export.families.dit import DiT

Kinds = Callable[[str], tuple[Path, Path]]
FILE = """
from dataclasses import replace

from ldm_export.families.dit import KIND, DiT


class Own(DiT):
    kind = replace(KIND, components={**KIND.components, "transformer": replace(KIND.components["transformer"],
        classes=("OwnTransformer",), build=lambda name, config: KIND.components["transformer"].build(
            "DiTTransformer2DModel", config))})
    notes = ["A note of its own."]


FAMILY = Own
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_read", {})


@pytest.fixture
def checkpoint(kinds: Kinds, tmp_path: Path) -> Path:
    """A checkpoint whose transformer is of a class that no family here has."""
    folder = Path(shutil.copytree(kinds("dit")[0], tmp_path / "own"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "OwnPipeline", "transformer": ["own", "OwnTransformer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own_family.py"
    path.write_text(FILE)
    return path


def test_an_unknown_family(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(checkpoint)
    said = str(refusal.value)
    assert "the transformer is ['own', 'OwnTransformer'], of a OwnPipeline, which is of no family that is known" in said
    assert "UNet2DConditionModel, SD3Transformer2DModel, " in said
    assert "--family FILE, which docs/families.md describes" in said


def test_a_file_that_is_named(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    command = ["export", str(checkpoint), "-o", str(tmp_path / "bundle"), "--target", "none"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    done = CliRunner().invoke(main, [*command, "--family", str(file)])
    assert done.exit_code == 0, done.output
    assert "transformer" in done.output


def test_other_processes_read_it_too(checkpoint: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_family(file)
    request: dict[str, Any] = {"checkpoint": str(checkpoint), "families": read_files(), "given": {}}
    monkeypatch.setattr(families, "_read", {})  # as another process begins
    assert callable(opened(request))


def test_a_package_that_is_installed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.syspath_prepend(file.parent)
    points = [EntryPoint("own", "own_family:FAMILY", families.ENTRY_POINTS)]
    monkeypatch.setattr(families, "entry_points", lambda group: points)
    opened = open_checkpoint(checkpoint)
    assert type(family_of(opened)).__name__ == "Own"


def test_a_package_that_cannot_be_imported_is_no_matter_to_others(
    kinds: Kinds, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [EntryPoint("own", "no_such_module:FAMILY", families.ENTRY_POINTS)]
    monkeypatch.setattr(families, "entry_points", lambda group: points)
    assert isinstance(family_of(open_checkpoint(kinds("dit")[0])), DiT)
    with pytest.raises(CheckpointError, match=r"The family own of an installed package \(no_such_module:FAMILY\) can"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", "cannot be run .ModuleNotFoundError"),
        ("raise SystemError('no')", "cannot be run .SystemError: no"),
        ("x = (", "cannot be run .SyntaxError"),
        ("FAMILIES = 3", "has no class FAMILY"),
        ("FAMILY = 3", "has no class FAMILY"),
        (
            "class FAMILY:\n    kind = notes = roles = tokenizers = facts = check = None",
            "the class FAMILY without graphs",
        ),
    ],
)
def test_files_that_are_no_family(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_family(tmp_path / "own.py")
    done = CliRunner().invoke(main, ["export", "emoji64", "-o", "x", "--family", str(tmp_path / "own.py")])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["export", "bench", "evaluate", "verify"])
def test_every_command_that_opens_checkpoints_takes_one(command: str) -> None:
    assert "--family FILE" in CliRunner().invoke(main, [command, "--help"]).output


def test_modules_that_are_no_graph_modules(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    file.write_text(
        FILE
        + """
from dataclasses import replace as with_
import torch
Own.graphs = property(lambda self: [with_(DiT(self._checkpoint).graphs[0], load=lambda: torch.nn.Identity())])
"""
    )
    read_family(file)
    with pytest.raises(ExportError, match=r"loads a Identity for conditioner; .* be a GraphModule\(network, call\)"):
        export_bundle(open_checkpoint(checkpoint), tmp_path / "bundle")


@pytest.mark.parametrize("name", ["missing.py", "folder", "own.txt"])
def test_what_is_no_python_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "own.txt").write_text(FILE)
    with pytest.raises(CheckpointError, match="is no Python file"):
        read_family(tmp_path / name)
