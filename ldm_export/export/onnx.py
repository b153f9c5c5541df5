"""PyTorch networks to plain ONNX graphs.

A graph uses standard operators of opset 20 only (GroupNorm as InstanceNormalization, attention unfused), which every
ONNX runtime and TensorRT read; what is made for one machine is forked from it later. Stack traces and source paths
are stripped, so that the same weights and package versions give the same bytes everywhere.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript.rewriter._pattern_ir import Constant
from torch import Tensor

from ldm_export.contract import RESIDUAL, GraphSpec, TensorSpec
from ldm_export.errors import ExportError
from ldm_export.families.base import GraphModule, ModelGraph, Padding
from ldm_export.graph.files import save
from ldm_export.graph.layers import TRANSPOSED

OPSET = 20
FLOAT32_PRECISION = 1e-7
LEVELS = 12
"""Resolutions that a UNet may have, each half of the one before."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which the exporter notes the modules that a node comes from, the innermost last."""


def random_inputs(
    graph: GraphSpec,
    sizes: dict[str, int],
    pixels_per_latent: int,
    id_count: int,
    patch_size: int = 1,
    padding: Padding | None = None,
) -> tuple[Tensor, ...]:
    """Seeded inputs of the contract's shapes: normal values, timesteps from 500 on, token ids and class labels below
    ``id_count``, pictures' sizes as they belong to those of the latents.

    Each row of token ids has the highest one, by CLIP's convention the end of text, at a place of its own, and with
    ``padding`` such tokens, more in each row than in the one before; masks are of as many. What is 1 or 0 for each row
    is both.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {**sizes, **{side: -(-sizes[side] // patch_size) * patch_size for side in ("height", "width")}}
    pictures = {side: sizes[side] * pixels_per_latent for side in ("height", "width")}
    sizes = {**sizes, **{f"image_{side}": size for side, size in pictures.items()}}
    sizes["patches"] = sizes["height"] * sizes["width"] // patch_size**2
    for side in pictures:  # of what ControlNets give
        sizes |= {f"{side}_over_{1 << level}": -(-sizes[side] // (1 << level)) for level in range(LEVELS)}

    def draw(tensor: TensorSpec) -> Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.name == "timestep":
            return (500.0 + 217.0 * torch.arange(shape[0])) % 1000
        if tensor.name in pictures:
            return torch.tensor(float(pictures[tensor.name]))
        if tensor.name in ("has_prompt", "has_negative_prompt", "is_negative"):
            return (torch.arange(shape[0]) % 2).float()
        if tensor.name.endswith("attention_mask"):
            return (torch.arange(shape[1]) < shape[1] - _padded(shape)).float()
        if tensor.dtype == "int64":
            ids = torch.randint(id_count, shape, generator=generator)
            if len(shape) == 2 and padding is not None:
                places = torch.arange(shape[1]).flip(0) if padding.left else torch.arange(shape[1])
                return torch.where(places < shape[1] - _padded(shape), ids, padding.token)
            if len(shape) == 2:  # end of text, the highest id, somewhere else in each row: pooling looks for it
                ids[range(shape[0]), range(2, shape[0] + 2)] = id_count - 1
            return ids
        return torch.randn(shape, generator=generator)

    return tuple(draw(tensor) for tensor in graph.inputs)


def inputs_of(graph: ModelGraph, sizes: dict[str, int], pixels_per_latent: int) -> tuple[Tensor, ...]:
    """Seeded inputs of a graph to be, as `random_inputs` has them."""
    return random_inputs(graph.spec, sizes, pixels_per_latent, graph.ids, graph.patch_size, graph.padding)


def _padded(shape: Sequence[int]) -> Tensor:
    """Places of padding in rows (rows, 1) of such a shape: none in the first, and never all."""
    return torch.arange(shape[0])[:, None] * 3 % shape[1]


def export_graph(module: GraphModule, graph: GraphSpec, example: tuple[Tensor, ...], folder: Path) -> Path:
    """Write ``model.onnx`` (and ``model.onnx_data`` above 1.5 GB) to ``folder``.

    Raises
    ------
    ExportError
        If the network cannot be traced, or the result is not valid ONNX.
    """
    shapes = tuple(
        dict.fromkeys(_free_axes(tensor)[: 1 if _is_residual(tensor) else None], torch.export.Dim.DYNAMIC)
        for tensor in graph.inputs
    )
    example = tuple(
        _first(value, _free_axes(tensor)[1:]) if _is_residual(tensor) else value
        for value, tensor in zip(example, graph.inputs, strict=True)
    )
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet("torch.onnx"), _exact_constants():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                dynamic_shapes={"inputs": shapes},
                input_names=[tensor.name for tensor in graph.inputs],
                output_names=[tensor.name for tensor in graph.outputs],
                opset_version=OPSET,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise ExportError(f"{graph.name} could not be exported: {_last_line(error)}") from error
    assert program is not None
    name_weights(program.model, module)
    model = _cleaned(program.model, graph)
    path = folder / "model.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    save(model, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{graph.name} is not valid ONNX: {_last_line(error)}") from error
    return path


def _free_axes(tensor: TensorSpec) -> list[int]:
    return [axis for axis, size in enumerate(tensor.shape) if isinstance(size, str)]


def _is_residual(tensor: TensorSpec) -> bool:
    """Whether an input may have one element for each free size but the rows, and is traced so.

    Traced at its whole size, that would be taken for the sample's wherever the graph needs one.
    """
    return tensor.name.startswith(RESIDUAL)


def _first(value: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        value = value.narrow(axis, 0, 1)
    return value


def name_weights(model: onnx_ir.Model, module: GraphModule) -> None:
    """Give weights that the exporter has transposed, and numbered, the names of their layers, in place.

    ``val_124`` becomes ``network.mid_block.….to_q.weight.transposed``, as `ldm_export.graph.layers` reads it. Layers
    are known by the scopes that the exporter notes, and by their weights, which must be the very ones.
    """
    parameters = dict(module.named_parameters())
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer():
            continue
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        layer = next((scope for scope in reversed(scopes) if f"{scope}.weight" in parameters), None)
        name = f"{layer}.weight"
        if layer is None or weight.const_value is None or f"{name}{TRANSPOSED}" in model.graph.initializers:
            continue
        if np.array_equal(weight.const_value.numpy().T, parameters[name].detach().numpy()):
            weight.name = f"{name}{TRANSPOSED}"


def _cleaned(model: onnx_ir.Model, graph: GraphSpec) -> onnx_ir.Model:
    """Strip what depends on the machine and give free dimensions the contract's names."""
    model.metadata_props.clear()
    model.doc_string = None
    parts: list[onnx_ir.Graph | onnx_ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None
        for node in part.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for values, tensors in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = onnx_ir.Shape(tensor.shape)
    return model


def release_weights(module: GraphModule) -> None:
    """Free the network's memory, whoever still holds its tensors: onnxscript's rewrite rules keep the last graph."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.empty(0)


@contextmanager
def _exact_constants() -> Iterator[None]:
    """Make onnxscript's rules match constants to float32's precision.

    They take a number within 1e-8, or 1e-5 of its size, for the one that they look for, and so drop ``+ 1e-15`` as the
    addition of zero, which keeps a division from one by zero, and ``* 1.000005`` as the product with one.
    """
    tolerances = {"_rel_tol": FLOAT32_PRECISION, "_abs_tol": 0.0}
    for name, value in tolerances.items():
        setattr(Constant, name, _Fixed(value))
    try:
        yield
    finally:
        for name in tolerances:
            delattr(Constant, name)


class _Fixed:
    """An attribute of a class that goes before what its instances have."""

    def __init__(self, value: float):
        self._value = value

    def __get__(self, *_: object) -> float:
        return self._value

    def __set__(self, *_: object) -> None:
        pass


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a library's remarks, such as that torchvision is not there."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
