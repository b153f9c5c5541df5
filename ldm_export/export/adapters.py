"""Adapters for a bundle, given when a picture is drawn: graphs with branches for them, and files of their factors.

The target ``adapters`` has each graph that an adapter changes once more, with a branch beside every layer that some
adapter of this bundle changes. An adapter that changes others is added to it; those before stay usable.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass
from safetensors.numpy import save as safetensors_bytes

from ldm_export.adapters import Adapter, Factors, merged, read_adapter
from ldm_export.adapters.factors import delta
from ldm_export.adapters.low_rank import low_rank
from ldm_export.adapters.names import Layer
from ldm_export.bundle import Bundle, export_error
from ldm_export.bundle.adapters import FORMAT, NEEDED, OF_DORA, LayerFactors, Mixture
from ldm_export.bundle.adapters import Adapter as BundleAdapter
from ldm_export.bundle.atomic import check_output, move_into_place, partial_folder, write_whole
from ldm_export.bundle.branches import branch_arrays
from ldm_export.bundle.parity import TOLERANCE, largest_error
from ldm_export.bundle.targets.base import (
    ADAPTERS,
    ADAPTERS_ORT_CPU,
    ORT_CPU,
    Target,
    TargetGraph,
    adapters_needs,
    folder_of,
    needs_of,
    read_target,
    write_target,
)
from ldm_export.checkpoint.merging import named_layers
from ldm_export.contract import GraphSpec, branch_input, branch_layers
from ldm_export.errors import ExportError, InputError
from ldm_export.export.ort_cpu import build_adapters_ort_cpu, seeded_calls
from ldm_export.graph.base import Array
from ldm_export.graph.branches import add_branches, branch_specs
from ldm_export.graph.files import check_links, save
from ldm_export.graph.layers import LayerProduct, layers_of, layers_without_branches, nameless_products
from ldm_export.graph.running import session_options

_log = logging.getLogger(__name__)
Progress = Callable[[str], None]
Layers = Mapping[str, Mapping[str, bool]]
"""Names of layers by graph, and whether their branches have a gain."""


@dataclass(frozen=True)
class MadeAdapter:
    """What was made of an adapter's file.

    Attributes
    ----------
    path : the file for the bundle
    layers : number of layers that it changes, by graph
    largest_rank : of all of them
    unmatched : names of the file that belong to no layer of the bundle's graphs
    error : of graphs with the branches, compared with those whose weights have the adapter in them; None where weights
        are rounded, and can have nothing in them
    """

    path: Path
    layers: Mapping[str, int]
    largest_rank: int
    unmatched: tuple[str, ...]
    error: float | None


def make_adapter(bundle: Bundle, path: Path, output: Path, *, progress: Progress = lambda stage: None) -> MadeAdapter:
    """Write an adapter's factors for a bundle, and see to it that the bundle has branches for all of them.

    Parameters
    ----------
    path : LoRA, LoHa, LoKr or DoRA, as `ldm_export.adapters.read_adapter` reads them
    output : the file, ``.ldma``, in the place of one that is there

    Raises
    ------
    InputError
        If the adapter cannot be read, is of another model, or is DoRA that a branch beside a layer cannot do.
    ExportError
        If a graph with branches is not the graph without them, or the target cannot be written.
    """
    check_output(output)
    models = {name: _plain(bundle, name) for name in _adaptable(bundle)}
    products = {name: layers_of(model) for name, model in models.items()}
    component = {name: str(bundle.manifest.source.get("components", {}).get(name, name)) for name in models}
    without = {name: layers_without_branches(model) for name, model in models.items()}
    adapter = read_adapter(
        path, {component[name]: _named(component[name], products[name], without[name]) for name in models}
    )
    _check_branches(adapter, {component[name]: layers for name, layers in without.items()})
    _check(bundle, adapter, {name: nameless_products(model) for name, model in models.items()})
    changes = {name: adapter.layers[component[name]] for name in models if component[name] in adapter.layers}
    factors = {
        name: {layer: _for_branch(each, products[name][layer], path) for layer, each in layers.items()}
        for name, layers in changes.items()
    }
    del models, products
    wanted = {
        name: {layer: each.magnitude is not None for layer, each in layers.items()} for name, layers in changes.items()
    }
    target = _with_branches(bundle, wanted, progress)
    networks = {name: bundle.manifest.source["sha256"][component[name]] for name in changes}
    made = BundleAdapter(output, adapter.sha256, networks, factors)
    errors = []
    for name, layers in changes.items():
        progress(f"{name}: comparing with merged weights")
        errors.append(_compared(bundle, target, name, layers, made))
    write_whole(output, _content(made, adapter.file.name))
    known = [error for error in errors if error is not None]
    return MadeAdapter(
        output,
        {name: len(layers) for name, layers in changes.items()},
        max(each.rank for layers in factors.values() for each in layers.values()),
        adapter.unmatched,
        max(known) if len(known) == len(errors) else None,
    )


def _adaptable(bundle: Bundle) -> list[str]:
    """Names of the graphs that adapters may change."""
    return [*(encoder.graph for encoder in bundle.roles.text_encoders), bundle.roles.denoiser]


def _plain(bundle: Bundle, name: str) -> ir.Model:
    file = bundle.file(bundle.manifest.graphs[name].path)
    check_links(file)
    return ir.load(file)


def _named(
    component: str, products: Mapping[str, LayerProduct], others: Mapping[str, tuple[int, ...]]
) -> dict[str, Layer]:
    shapes = {**{name: product.shape for name, product in products.items()}, **others}
    blocks = [name for name in shapes if name.startswith("down_blocks.0.resnets.") and name.endswith(".conv1")]
    return named_layers(component, shapes, len(blocks) or None)


def _check_branches(adapter: Adapter, without: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Refuse an adapter that changes a layer, by component, beside which no branch can be."""
    for name, layers in without.items():
        if used := layers.keys() & adapter.layers.get(name, {}).keys():
            raise InputError(
                f"{adapter.file} changes {min(used)} of {name}, which this bundle has in groups or divided into a sum, "
                "as quantize-static does, and no branch can be put beside it. Use a bundle without that pass, or merge "
                f"the adapter: ldm-export export CHECKPOINT -o BUNDLE --lora {adapter.file}"
            )


def _check(bundle: Bundle, adapter: Adapter, nameless: Mapping[str, int]) -> None:
    """Refuse what would be applied in part, and say what is left out."""
    if adapter.unmatched and any(nameless.values()):
        raise InputError(
            f"{adapter.file} has {adapter.unmatched[0]!r}, and {sum(nameless.values())} weights of {bundle.path} have "
            "no names by which it could be found; it was exported by an older release. Export the bundle anew."
        )
    if adapter.unmatched:
        _log.warning(
            f"{adapter.file}: {sum(map(len, adapter.layers.values()))} layers are used; {len(adapter.unmatched)} names "
            f"are of no layer of this bundle's graphs and left out: {', '.join(adapter.unmatched)}"
        )


def _for_branch(factors: Factors, product: LayerProduct, file: Path) -> LayerFactors:
    """What a layer's branch takes of an adapter.

    Raises
    ------
    InputError
        If it is DoRA that scales inputs, or that would scale weights that are rounded.
    """
    down, up = low_rank(factors, product.shape)
    if down.ndim == 2:
        arrays = np.ascontiguousarray(down.T), np.ascontiguousarray(up.T)
    else:
        arrays = np.ascontiguousarray(down), np.ascontiguousarray(up[:, :, None, None])
    if factors.magnitude is None:
        return LayerFactors(*arrays)
    weight = product.weight
    if factors.magnitude_axis != 0 or weight is None:
        why = "that scales a layer's inputs" if weight is not None else "and this bundle's weights are rounded"
        raise InputError(
            f"{file} is DoRA, {why}, which a branch beside the layer cannot do. Merge it: ldm-export export CHECKPOINT "
            f"-o BUNDLE --lora {file}"
        )
    own = weight.reshape(len(weight), -1).astype(np.float64)
    change = delta(factors, weight.shape).reshape(own.shape)
    norms = np.stack([(own * own).sum(1), (own * change).sum(1), (change * change).sum(1)])
    return LayerFactors(*arrays, np.asarray(factors.magnitude, np.float32).reshape(-1), norms.astype(np.float32))


def _content(adapter: BundleAdapter, name: str) -> bytes:
    """A file as `ldm_export.runtime.adapters` reads it; ``name`` is that of the adapter's own file."""
    tensors = {
        f"{graph}/{layer}.{role}": array
        for graph, layers in adapter.factors.items()
        for layer, factors in layers.items()
        for role in (*NEEDED, *OF_DORA)
        if (array := getattr(factors, role)) is not None
    }
    networks = json.dumps(dict(adapter.networks))
    metadata = {"format": FORMAT, "name": name, "sha256": adapter.sha256, "networks": networks}
    return bytes(safetensors_bytes(tensors, metadata))


def _with_branches(bundle: Bundle, layers: Layers, progress: Progress) -> Target:
    """The target ``adapters`` with branches at least beside these layers, made or made larger where it must be, and
    with it the one for this machine's CPU, where the bundle has such a target."""
    there = read_target(bundle, ADAPTERS, {})
    known: dict[str, dict[str, bool]] = {}
    if isinstance(there, Target):
        for name, graph in there.graphs.items():
            spec = GraphSpec("", tuple(branch_specs(there.file(graph.path))), ())
            names = {tensor.name for tensor in spec.inputs}
            known[name] = {layer: branch_input(layer, "gain") in names for layer in branch_layers(spec)}
    wanted = {
        name: {
            layer: known.get(name, {}).get(layer, False) or layers.get(name, {}).get(layer, False)
            for layer in (*known.get(name, {}), *layers.get(name, {}))
        }
        for name in (*known, *layers)
    }
    made = there if isinstance(there, Target) and wanted == known else _build(bundle, wanted, progress)
    version = onnxruntime.__version__
    has_cpu = isinstance(read_target(bundle, ORT_CPU, needs_of(version)), Target)
    if has_cpu and not isinstance(read_target(bundle, ADAPTERS_ORT_CPU, adapters_needs(made, version)), Target):
        build_adapters_ort_cpu(bundle, made, progress)
    return made


def _build(bundle: Bundle, layers: Layers, progress: Progress) -> Target:
    target, started = folder_of(bundle, ADAPTERS), time.perf_counter()
    errors: dict[str, float] = {}
    try:
        with partial_folder(target) as folder:
            graphs = {}
            for name in layers:
                progress(f"{name}: branches beside {len(layers[name])} layers")
                model = _plain(bundle, name)
                ShapeInferencePass()(model)
                add_branches(model, layers[name], [layer for layer, gain in layers[name].items() if gain])
                save(model, folder / f"{name}.onnx")
                graphs[name] = TargetGraph(f"{name}.onnx", {})
                errors[name] = _without_effect(bundle, name, folder / f"{name}.onnx")
            report = {"errors": errors, "seconds": time.perf_counter() - started}
            write_target(folder, bundle, ADAPTERS, graphs, {}, report)
            move_into_place(folder, target)
    except OSError as error:
        raise export_error(error, target, None) from error
    made = read_target(bundle, ADAPTERS, {})
    assert isinstance(made, Target), made
    return made


def _without_effect(bundle: Bundle, name: str, file: Path) -> float:
    """How far a graph with branches is from the plain one where no adapter has any strength.

    Raises
    ------
    ExportError
        If that is more than rounding.
    """
    spec = bundle.manifest.graphs[name]
    calls = _calls(bundle, spec, file, ())
    own = [tensor.name for tensor in spec.inputs]
    expected = _results(bundle.file(spec.path), spec, [{key: call[key] for key in own} for call in calls])
    error = largest_error(expected, _results(file, spec, calls))
    if not error <= TOLERANCE:
        raise ExportError(f"{name} with branches differs by {error:.1e} without any adapter. Nothing was kept.")
    return error


def _compared(
    bundle: Bundle, target: Target, name: str, changes: Mapping[str, Factors], adapter: BundleAdapter
) -> float | None:
    """How far an adapter in branches is from the same in the weights; None where these are rounded.

    Raises
    ------
    ExportError
        If that is more than an exact graph may be off.
    """
    model, spec = _plain(bundle, name), bundle.manifest.graphs[name]
    products = layers_of(model)
    weights = {layer: products[layer].weight for layer in changes}
    if any(weight is None for weight in weights.values()):
        return None
    file = target.file(target.graphs[name].path)
    calls = _calls(bundle, spec, file, ((adapter, 1.0),))
    own = [tensor.name for tensor in spec.inputs]
    for layer, factors in changes.items():
        changed = merged(np.asarray(weights[layer]), factors, 1.0)
        value = products[layer].node.inputs[1]
        assert value is not None
        stored = changed.T if products[layer].is_transposed else changed
        value.const_value = ir.tensor(np.ascontiguousarray(stored, np.float32))
    with tempfile.TemporaryDirectory(dir=target.folder.parent) as temporary:
        ir.save(model, Path(temporary) / "merged.onnx", external_data="merged.onnx_data")
        expected = _results(Path(temporary) / "merged.onnx", spec, [{key: call[key] for key in own} for call in calls])
    error = largest_error(expected, _results(file, spec, calls))
    if not error <= TOLERANCE:
        raise ExportError(
            f"{name}: the adapter in branches differs from the same in the weights by {error:.1e}; {TOLERANCE:.0e} is "
            "allowed. No adapter was written; merge it: ldm-export export CHECKPOINT -o BUNDLE --lora "
            "ADAPTER.safetensors"
        )
    return error


def _calls(bundle: Bundle, spec: GraphSpec, file: Path, mixture: Mixture) -> list[dict[str, Array]]:
    """Seeded calls of a graph with branches, drawn with one mixture of adapters."""
    branches = GraphSpec(spec.path, tuple(branch_specs(file)), ())
    calls = seeded_calls(bundle, spec)
    return [call | branch_arrays(branches, spec.name, [mixture] * len(call[spec.inputs[0].name])) for call in calls]


def _results(file: Path, spec: GraphSpec, calls: Collection[Mapping[str, Array]]) -> list[Array]:
    session = onnxruntime.InferenceSession(file, session_options(), ["CPUExecutionProvider"])
    names = [tensor.name for tensor in spec.outputs]
    return [array for call in calls for array in session.run(names, dict(call))]
