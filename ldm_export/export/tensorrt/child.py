"""A process of its own in which TensorRT parses graphs and builds engines, since it may crash or be killed.

    echo '{"flavour": "tensorrt_rtx", "graphs": {"unet": {"onnx": "unet/model.onnx"}}}' |
    python -m ldm_export.export.tensorrt.child

Prints one JSON document: of each graph what the parser refused, or the network's inputs, outputs and layers. A graph
with a ``plan`` is built, by its ``profile`` and the document's ``compute_capabilities`` and switches, and the engine
written there. With an ``engine`` beside it, the graph's weights are put into that one, on the first GPU, and it is
written to ``plan`` with all of them. All else that is printed, by whatever library, goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ldm_export.processes import peak_rss_bytes


def main() -> None:
    request = json.load(sys.stdin)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if request["flavour"] == "tensorrt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    found = {}
    for name, graph in request["graphs"].items():
        found[name] = refitted(graph) if "engine" in graph else graph_of(graph, request)
    json.dump(found, results)
    results.close()


def graph_of(graph: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """What there is to say of one graph, and its engine, if it is to be built."""
    from polygraphy.backend.trt import create_network, engine_bytes_from_network
    from polygraphy.backend.trt.util import get_trt_logger
    from polygraphy.exception import PolygraphyException
    from polygraphy.mod.trt_importer import lazy_import_trt

    library = lazy_import_trt()
    started = time.perf_counter()
    builder, network = create_network(strongly_typed=True)
    parser = library.OnnxParser(network, get_trt_logger())
    if not parser.parse_from_file(graph["onnx"]):
        return {"refused": refusals(parser)}
    document = described(network, library)
    if "plan" in graph:
        config = config_of(builder, network, graph["profile"], request)
        try:
            engine = engine_bytes_from_network((builder, network), lambda *_: config)
        except PolygraphyException:
            return {**document, "failed": True}
        document |= written(engine, graph["plan"], started)
    return document


def refitted(graph: dict[str, Any]) -> dict[str, Any]:
    """Put the weights of a graph into an engine, which must lack none then; ``refittable`` says whether it stays so."""
    from polygraphy.backend.trt.util import get_trt_logger
    from polygraphy.mod.trt_importer import lazy_import_trt

    library, logger = lazy_import_trt(), get_trt_logger()
    started = time.perf_counter()
    runtime = library.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(Path(graph["engine"]).read_bytes())
    if engine is None:
        return {"failed": True}
    refitter = library.Refitter(engine, logger)
    parser = library.OnnxParserRefitter(refitter, logger)
    given = parser.refit_from_file(graph["onnx"])
    if missing := refitter.get_missing_weights():
        return {"missing": missing}
    if not given or not refitter.refit_cuda_engine():
        return {"failed": True}
    config = engine.create_serialization_config()
    config.clear_flag(library.SerializationFlag.EXCLUDE_WEIGHTS)  # which a stripped engine's has at first
    if graph["refittable"]:
        config.set_flag(library.SerializationFlag.INCLUDE_REFIT)
    serialised = engine.serialize_with_config(config)
    return {"failed": True} if serialised is None else written(serialised, graph["plan"], started)


def written(engine: Any, plan: str, started: float) -> dict[str, Any]:
    """Write a serialised engine; says what making it took, or the number of the system's error."""
    try:
        with Path(plan).open("wb") as file:
            file.write(engine)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return {"errno": error.errno}
    return {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}


def config_of(builder: Any, network: Any, profile: dict[str, Any], request: dict[str, Any]) -> Any:
    """How to build, as Polygraphy sets it up."""
    from polygraphy.backend.trt import CreateConfig, Profile

    shapes = Profile()
    for name, sizes in profile.items():
        shapes.add(name, *(tuple(sizes[key]) for key in ("min", "opt", "max")))
    switches = {
        "profiles": [shapes],
        "refittable": request["refittable"],
        "strip_plan": request["stripped"],
        "sparse_weights": request["sparse"],
    }
    if request["flavour"] == "tensorrt":
        return CreateConfig(**switches)(builder, network)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    capabilities = [tuple(map(int, capability.split("."))) for capability in request["compute_capabilities"]]
    return CreateConfigRTX(compute_capabilities=capabilities, **switches)(builder, network)


def refusals(parser: Any) -> list[dict[str, str]]:
    """Each node that the parser refuses: its name, its operator and why."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [
        {
            "node": error.node_name() or f"number {error.node()}",
            "operator": error.node_operator(),
            "reason": "no such operator" if error.desc() == "false" else " ".join(error.desc().split()),
        }
        for error in errors
    ]


def described(network: Any, library: Any) -> dict[str, Any]:
    """A parsed network's inputs and outputs, free sizes being -1, and how many layers of each kind and precision."""

    def tensor(value: Any) -> dict[str, Any]:
        dtype = library.nptype(value.dtype)
        return {"name": value.name, "dtype": dtype.__name__, "shape": list(value.shape)}

    layers: dict[str, Counter[str]] = {}
    for layer in map(network.get_layer, range(network.num_layers)):
        precision = layer.get_output(0).dtype.name if layer.num_outputs else "none"
        layers.setdefault(layer.type.name, Counter())[precision] += 1
    return {
        "inputs": [tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "layers": layers,
    }


if __name__ == "__main__":
    main()
