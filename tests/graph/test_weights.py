"""The gate of weights: what passes make is let through, and with any one weight zeroed, or two exchanged, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import ParityError
from ldm_export.export.chain import compare_bundle, export_bundle
from ldm_export.export.graphs import change_graphs
from ldm_export.families import open_checkpoint
from ldm_export.graph.base import GraphChange, GraphPass, Inputs
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.graph.quantize_static import QuantizeStatic
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.graph.weights import LEAST_SNR_DB, check_weights, least_snr_db
from tests.graph.graphs import copy_of, weights_of, with_weights
from tests.graph.small_graph import CALLS, network
from tests.graph.test_whole_graphs import draw

STATIC = {"layer_error": 0.9, "graph_error": 0.9, "only_faster": False}
PASSES: dict[str, Sequence[GraphPass]] = {
    "weights of 8 bits": [QuantizeWeights(smallest=16)],
    "weights of 4 bits": [QuantizeWeights(bits=4, block=4, smallest=16, layer_error=0.9)],
    "dynamic": [QuantizeDynamic(smallest=16)],
    "static": [QuantizeStatic(**STATIC)],
    "static, dynamic": [QuantizeStatic(("Conv",), **STATIC), QuantizeDynamic(smallest=16)],
    "16 bits": [Half(loss=0.5)],
    "bf16": [Half("bf16", loss=0.5)],
    "8 bits, fp16": [QuantizeWeights(smallest=16), Half(loss=0.5)],
    "static, fp16": [QuantizeStatic(**STATIC), Half(loss=0.5)],
    "dynamic, fp16": [QuantizeDynamic(smallest=16), Half(loss=0.5)],
}


def each_with_one_zeroed(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Copies of a graph with one constant of zeros, but for zero points and what is zero already."""
    for index, tensor in enumerate(model.graph.initializer):
        values = ir.from_proto(tensor).numpy()
        if tensor.name.endswith(".zero_point") or not values.astype(np.float64).any():
            continue
        zeroed = copy_of(model)
        nothing = zeroed.graph.initializer[index]
        size = len(ir.from_proto(tensor).tobytes())
        for field in ("float_data", "int32_data", "int64_data"):
            nothing.ClearField(field)  # type: ignore[arg-type]
        nothing.raw_data = bytes(size)
        yield tensor.name, zeroed


def changed(model: onnx.ModelProto, steps: Sequence[GraphPass], calls: Sequence[Inputs]) -> onnx.ModelProto:
    for step in steps[:-1]:
        model = step.apply(copy_of(model), calls).model
    return steps[-1].apply(copy_of(model), calls).model


def is_refused(before: onnx.ModelProto, after: onnx.ModelProto) -> bool:
    try:
        check_weights(ir.from_proto(before), ir.from_proto(after), "unet")
    except ParityError:
        return True
    return False


@pytest.mark.parametrize("name", PASSES)
def test_any_one_weight_that_is_zeroed_is_refused(name: str) -> None:
    before = network()
    after = changed(before, PASSES[name], CALLS)
    assert check_weights(ir.from_proto(before), ir.from_proto(after), "unet") == len(weights_of(before))
    names = [name for name, zeroed in each_with_one_zeroed(after) if is_refused(before, zeroed)]
    assert names == [name for name, _ in each_with_one_zeroed(after)]
    assert len(names) >= len(weights_of(before))


@pytest.mark.parametrize("name", ["weights of 8 bits", "static", "dynamic", "16 bits"])
def test_one_weight_that_is_off_by_a_step_is_refused(name: str) -> None:
    """One number of a thousand, by one."""
    before = network()
    after = changed(before, PASSES[name], CALLS)
    for tensor in after.graph.initializer:
        values = ir.from_proto(tensor).numpy()
        if values.dtype == np.int8 and values.ndim > 1:
            data = bytearray(tensor.raw_data)
            data[len(data) // 2] = (data[len(data) // 2] + 1) % 256
        elif values.dtype == np.float16 and values.ndim > 1:
            data = bytearray(tensor.raw_data)
            data[len(data) // 2 | 1] ^= 4  # of the exponent
        else:
            continue
        kept, tensor.raw_data = tensor.raw_data, bytes(data)
        assert is_refused(before, after), tensor.name
        tensor.raw_data = kept


def test_two_weights_in_each_others_place_are_refused() -> None:
    before = network()
    weights = weights_of(before)
    weights["query.w"] = weights["query.w"].T.copy()
    assert is_refused(before, with_weights(before, {"query.w": weights["query.w"]}))
    halves = weights["inner.b"], weights["shortcut.b"]
    assert is_refused(before, with_weights(before, {"inner.b": halves[1], "shortcut.b": halves[0]}))


def test_a_weight_more_or_less_is_refused() -> None:
    before = network()
    after = copy_of(before)
    del after.graph.node[-1]
    assert not is_refused(before, after)  # it reads no weight
    del after.graph.node[5:]
    assert is_refused(before, after)
    assert is_refused(after, before)


def test_infinities_of_masks_are_equal_and_nan_is_not() -> None:
    mask = with_weights(network(), {"stack": np.full((1, 36, 36), -np.inf)})
    assert not is_refused(mask, mask)
    nan = with_weights(network(), {"stack": np.full((1, 36, 36), np.nan)})
    assert is_refused(nan, nan)


@pytest.mark.parametrize("name", LEAST_SNR_DB)
def test_the_noise_that_is_allowed_is_known_by_the_numbers_in_a_graph(name: str) -> None:
    after = changed(network(), PASSES[name], CALLS)
    assert least_snr_db(ir.from_proto(after)) == LEAST_SNR_DB[name]
    assert least_snr_db(ir.from_proto(network())) is None


# --- whole bundles --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A pass that loses one weight of 8 bits."""

    name: ClassVar[str] = "broken"
    purpose: ClassVar[Any] = "bytes"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    tolerance: ClassVar[float] = 10.0
    graphs: tuple[str, ...] = ("unet",)
    weight: int = 0

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        change = QuantizeWeights(smallest=500, graphs=self.graphs).apply(model, calibration)
        *_, (_, zeroed) = zip(range(self.weight + 1), each_with_one_zeroed(change.model), strict=False)
        return GraphChange(zeroed[1])


def test_a_bundle_with_a_lost_weight_is_not_sealed(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    calls = {"unet": [draw(bundle.manifest.graphs["unet"], seed) for seed in range(2)]}
    with pytest.raises(ParityError, match=r"^unet: '.+' is not '.+' of the graph that it was made of"):
        change_graphs(bundle, tmp_path / "broken", Broken(), calls, ["red"], open_checkpoint(tiny_checkpoint))
    assert list(tmp_path.iterdir()) == []


def test_verify_against_finds_every_lost_weight(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Whatever tolerance the manifest has; and of plain graphs, too."""
    bundle, checkpoint = Bundle.open(tiny_bundle), open_checkpoint(tiny_checkpoint)
    calls = {"vae_decoder": [draw(bundle.manifest.graphs["vae_decoder"], seed) for seed in range(2)]}
    step = QuantizeWeights(smallest=500, graphs=("vae_decoder",))
    sound, _ = change_graphs(bundle, tmp_path / "sound", step, calls, ["red"], checkpoint)
    manifest = json.loads((sound.path / "manifest.json").read_text())
    for record in manifest["parity"]:
        record["tolerance"] = 1e6
    (sound.path / "manifest.json").write_text(json.dumps(manifest))
    opened = Bundle.open(sound.path)
    assert all(record.passed for record in compare_bundle(opened, checkpoint, lambda stage: None, calls))
    file = sound.path / "vae_decoder" / "model.onnx"
    weights = [(name, zeroed) for name, zeroed in each_with_one_zeroed(onnx.load(file)) if name.endswith(".integer")]
    for name, zeroed in weights[:2]:
        onnx.save(zeroed, file)
        records = compare_bundle(opened, checkpoint, lambda stage: None, calls)
        (lost,) = [record for record in records if record.output.startswith("weight ")]
        assert (lost.graph, lost.passed) == ("vae_decoder", False), name


@pytest.mark.slow
def test_any_one_weight_of_emoji64_that_is_zeroed_is_refused(tmp_path: Path) -> None:
    """All graphs, by all passes of the shipped recipes, calibrated on seeded calls."""
    bundle = export_bundle(open_checkpoint("emoji64"), tmp_path / "emoji64")
    shipped: list[list[GraphPass]] = [
        [QuantizeWeights()],
        [QuantizeWeights(bits=4)],
        [QuantizeStatic(("Conv",), only_faster=False), QuantizeDynamic()],
        [Half()],
    ]
    for steps in shipped:
        for graph in set.intersection(*(set(step.graphs) for step in steps)) & bundle.manifest.graphs.keys():
            before = onnx.load(bundle.file(bundle.manifest.graphs[graph].path))
            calls = [draw(bundle.manifest.graphs[graph], seed, tokens=24, end=1000) for seed in range(2)]
            after = changed(before, steps, calls)
            assert not is_refused(before, after)
            kept = [name for name, zeroed in each_with_one_zeroed(after) if not is_refused(before, zeroed)]
            assert kept == [], (steps, graph)
