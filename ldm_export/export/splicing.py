"""Puts graphs together into one, with their weights in one external-data file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

from ldm_export.contract import TensorSpec

EXTERNAL_FROM_BYTES = 1024
"""Smaller tensors, shapes among them, stay in the model, where shape inference reads them."""
ALIGNMENT_BYTES = 64
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class _Span:
    """Bytes of a file."""

    path: Path
    offset: int
    length: int

    def chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for begin in range(0, self.length, _CHUNK_BYTES):
                yield file.read(min(_CHUNK_BYTES, self.length - begin))


@dataclass
class Weights:
    """An external-data file in the making: the tensors of several models, one behind the other."""

    location: str
    size_bytes: int = 0
    _parts: list[bytes | _Span] = field(default_factory=list)

    def take(self, tensor: TensorProto, folder: Path) -> None:
        """Move a tensor's data here, unless they are few; ``folder`` is where its own model lies."""
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            path, offset = folder / entries["location"], int(entries.get("offset", 0))
            length = int(entries["length"]) if "length" in entries else path.stat().st_size - offset
            self._append(tensor, _Span(path, offset, length), length)
            return
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        data = tensor.raw_data
        if len(data) >= EXTERNAL_FROM_BYTES:
            tensor.ClearField("raw_data")
            self._append(tensor, data, len(data))

    def _append(self, tensor: TensorProto, part: bytes | _Span, length: int) -> None:
        padding = -self.size_bytes % ALIGNMENT_BYTES
        offset = self.size_bytes + padding
        self._parts += [bytes(padding), part]
        self.size_bytes = offset + length
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", self.location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)

    def write(self, folder: Path) -> None:
        with (folder / self.location).open("wb") as file:
            for part in self._parts:
                file.writelines([part] if isinstance(part, bytes) else part.chunks())


class GraphWriter:
    """A graph in the making. Names are its scope's, ``a/b`` in the scope ``a``, so nested graphs shadow nothing."""

    def __init__(self, scope: str = ""):
        self.scope = scope
        self.graph = GraphProto(name=scope or "main")
        self._count = 0

    def input(self, tensor: TensorSpec) -> str:
        self.graph.input.append(value_info(tensor))
        return tensor.name

    def output(self, tensor: TensorSpec, value: str, operator: str = "Identity", **attributes: Any) -> None:
        """Give a value out, as ``operator`` makes it, under the name of ``tensor``."""
        self.graph.node.append(
            helper.make_node(operator, [value], [tensor.name], name=f"{tensor.name}/give", **attributes)
        )
        self.graph.output.append(value_info(tensor))

    def constant(self, name: str, array: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(array), self._name(name)))
        return self._name(name)

    def node(self, operator: str, *inputs: str, outputs: int | None = None, **attributes: Any) -> Any:
        """Add a node; gives the name of its output, or with ``outputs`` the list of its outputs' names."""
        self._count += 1
        name = self._name(f"{operator}_{self._count}")
        names = [name] if outputs is None else [f"{name}.{k}" for k in range(outputs)]
        self.graph.node.append(helper.make_node(operator, list(inputs), names, name=name, **attributes))
        return name if outputs is None else names

    def splice(
        self, name: str, model: ModelProto, inputs: Mapping[str, str], weights: Weights, folder: Path
    ) -> dict[str, str]:
        """Move another model's nodes and weights here, fed with values of this graph; gives its outputs' names.

        Parameters
        ----------
        inputs : this graph's value for each of the model's inputs
        folder : where the model lies, and so what its external data are relative to
        """
        rename = _Renaming(self._name(name), inputs)
        for tensor in model.graph.initializer:
            weights.take(tensor, folder)
        outputs = [value.name for value in model.graph.output]
        rename.graph(model.graph)
        self.graph.node.extend(model.graph.node)
        self.graph.initializer.extend(model.graph.initializer)
        return {output: rename(output) for output in outputs}

    def _name(self, name: str) -> str:
        return f"{self.scope}/{name}" if self.scope else name


class _Renaming:
    """A model's names in another graph: its inputs by ``given``, all others under ``prefix``."""

    def __init__(self, prefix: str, given: Mapping[str, str]):
        self._prefix = prefix
        self._given = given

    def __call__(self, name: str) -> str:
        return self._given.get(name) or (f"{self._prefix}/{name}" if name else "")

    def graph(self, graph: GraphProto) -> None:
        """Rename all of a graph, and drop the shapes that were inferred in it: its sizes have other names now."""
        del graph.value_info[:]
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = self(value.name)
        for node in graph.node:
            node.name = self(node.name)
            node.input[:] = map(self, node.input)
            node.output[:] = map(self, node.output)
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    self.graph(attribute.g)


def value_info(tensor: TensorSpec) -> Any:
    """A graph's input or output as ONNX describes it."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, element, tensor.shape)
