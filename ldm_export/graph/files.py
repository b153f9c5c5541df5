"""Graphs as files: the weights of a large one lie outside, in one file beside it; those of any do while it is changed.

A protobuf message cannot be written with 2 GiB in it, and a copy of a graph should not copy its weights. In memory, a
tensor that lies outside has the whole path of its file for its ``location``; in a file, its name alone.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from ldm_export.bundle.onnx_wire import external_data_from_onnx
from ldm_export.errors import BundleError
from ldm_export.graph.base import copied

EXTERNAL_DATA_ABOVE_BYTES = 1_500_000_000
"""Weights beyond this go to one external file."""
LOCATION = "location"


def check_links(file: Path) -> None:
    """Check that onnx reads what lies outside of a graph.

    Raises
    ------
    BundleError
        If it lies in a file of several hard links, which onnx refuses.
    """
    for data in {file.parent / each.location for each in external_data_from_onnx(file)}:
        if data.exists() and (links := data.stat().st_nlink) > 1:
            raise BundleError(
                f"{data} has {links} hard links, and onnx reads no weights from such a file. Copy the whole bundle "
                "(cp -r), and use the copy."
            )


def load(file: Path) -> onnx.ModelProto:
    """A graph; what lies outside of its file is not read.

    Raises
    ------
    BundleError
        As `check_links`.
    """
    check_links(file)
    model = onnx.load(str(file), load_external_data=False)
    for entry in _locations(model):
        entry.value = str(file.resolve().parent / entry.value)
    return model


def load_outside(file: Path, folder: Path) -> onnx.ModelProto:
    """A graph whose weights all lie outside: of one that holds them itself, in ``folder``, which must outlive it."""
    model = load(file)
    if _locations(model):
        return model
    ir.save(ir.from_proto(model), folder / file.name, external_data=f"{file.name}_data")
    return load(folder / file.name)


def save(model: ir.Model, file: Path) -> None:
    """Write a graph to ``file`` and, if its weights take more than 1.5 GB, those to ``<file>_data`` beside it.

    It must not be the file that the graph's weights are read from.
    """
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(weight.nbytes for weight in weights) > EXTERNAL_DATA_ABOVE_BYTES:
        ir.save(model, file, external_data=f"{file.name}_data")
    else:
        ir.save(ir.external_data.load_to_model(model), file)


def as_in_a_file(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Path | None]:
    """The graph with the names alone of what lies outside, and the folder that it lies in, if anything does."""
    if not _locations(model):
        return model, None
    named, folder = copied(model), None
    for entry in _locations(named):
        folder, entry.value = Path(entry.value).parent, Path(entry.value).name
    return named, folder


def _locations(model: onnx.ModelProto) -> list[onnx.StringStringEntryProto]:
    return [entry for weight in model.graph.initializer for entry in weight.external_data if entry.key == LOCATION]
