"""Every pass over the graphs of a bundle: sealed and drawing, as near to PyTorch as it promises, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ldm_export.bundle import Bundle
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.contract import GraphSpec
from ldm_export.errors import ExportError, InputError, ParityError
from ldm_export.export.graphs import change_graphs
from ldm_export.families import family_of, open_checkpoint
from ldm_export.graph.base import GraphChange, GraphPass, Inputs
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.runtime import Pipeline
from tests.graph.graphs import Array, count, off_by

GRAPHS = ("text_encoder", "unet", "vae_decoder")
PROMPTS = ["a red circle", "a blue square"]
DRAWING: dict[str, Any] = {"seed": [1, 2], "steps": 10}
END = 559
"""The highest token id, which ends a text."""


def draw(graph: GraphSpec, seed: int, *, tokens: int = 16, end: int = END) -> Inputs:
    """Inputs as drawing meets them: one or two latents of 8 x 8, 16 tokens, or pictures of 16 x 16."""
    generator = np.random.default_rng(seed)
    sizes = {"batch": 1 + seed % 2, "height": 8, "width": 8, "image_height": 16, "image_width": 16, "tokens": tokens}

    def values(name: str, shape: Sequence[int | str]) -> Array:
        full = [sizes[size] if isinstance(size, str) else size for size in shape]
        if name == "timestep":
            return np.full(full, 981.0 - 300 * seed, np.float32)
        if name == "input_ids":
            ids = generator.integers(0, end, full)
            ids[:, 5 + seed :] = end
            return ids
        return generator.standard_normal(full).astype(np.float32)

    return {tensor.name: values(tensor.name, tensor.shape) for tensor in graph.inputs}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> LatentDiffusion:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def calibration(bundle: Bundle) -> Mapping[str, Sequence[Inputs]]:
    return {name: [draw(bundle.manifest.graphs[name], seed) for seed in range(2)] for name in GRAPHS}


@pytest.fixture(scope="module")
def latents(bundle: Bundle) -> Array:
    """What the plain bundle makes of the prompts."""
    return Pipeline.open(bundle.path).generate(PROMPTS, **DRAWING).latents


def worst_of_pytorch(bundle: Bundle, checkpoint: LatentDiffusion, name: str, calls: Sequence[Inputs]) -> float:
    """max |onnx - torch| / max |torch|, by a session and a network of this test's own."""
    spec = bundle.manifest.graphs[name]
    module = next(graph.load() for graph in family_of(checkpoint).graphs if graph.spec == spec)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # fp32, as the runtime's sessions
    session = onnxruntime.InferenceSession(bundle.path / spec.path, options, ["CPUExecutionProvider"])
    errors = []
    for call in calls:
        with torch.no_grad():
            exact = module(*(torch.from_numpy(call[tensor.name]) for tensor in spec.inputs))
        given = session.run([tensor.name for tensor in spec.outputs], dict(call))
        errors += [
            np.abs(mine - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
            for mine, theirs in zip(given, exact, strict=True)
        ]
    return float(np.max(errors))


@pytest.mark.parametrize(
    ("step", "operator", "share", "drawn_within", "seen"),
    [
        pytest.param(
            QuantizeDynamic(smallest=1000, graphs=GRAPHS), "MatMulInteger", 0.95, 0.1, (0.015, 41), id="dynamic"
        ),
        pytest.param(
            QuantizeWeights(smallest=500, graphs=GRAPHS), "DequantizeLinear", 0.4, 0.1, (0.04, 30), id="8 bits"
        ),
        pytest.param(
            QuantizeWeights(bits=4, smallest=4000, block=16, graphs=GRAPHS),
            "DequantizeLinear",
            0.7,
            0.2,
            (0.06, 27),
            id="4 bits",
        ),
        pytest.param(Half(graphs=GRAPHS), "Cast", 0.55, 0.01, (0.003, 51), id="fp16"),
    ],
)
def test_a_bundle_is_changed_sealed_and_drawn_with(
    bundle: Bundle,
    checkpoint: LatentDiffusion,
    calibration: Mapping[str, Sequence[Inputs]],
    latents: Array,
    tmp_path: Path,
    step: GraphPass,
    operator: str,
    share: float,
    drawn_within: float,
    seen: tuple[float, float],
) -> None:
    """``share`` of the bytes is the most that may be left; ``drawn_within`` is how far latents may then be off.

    ``seen`` is half as much error as was seen again, and 3 dB less of a signal-to-noise ratio, of the worst graph.
    """
    stages: list[str] = []
    result, reports = change_graphs(bundle, tmp_path / "changed", step, calibration, PROMPTS, checkpoint, stages.append)
    assert list(reports) == list(GRAPHS)
    assert len(stages) == 2 * len(GRAPHS)
    opened = Bundle.open(result.path, verify=True)
    assert opened.manifest.graphs == bundle.manifest.graphs
    assert opened.manifest.source == {**bundle.manifest.source, "calibration": PROMPTS}
    sizes = [
        sum((one.path / one.manifest.graphs[name].path).stat().st_size for name in GRAPHS) for one in (opened, bundle)
    ]
    assert sizes[0] < share * sizes[1]
    for name in GRAPHS:
        file, before = (one.path / one.manifest.graphs[name].path for one in (opened, bundle))
        onnx.checker.check_model(str(file), full_check=True)
        assert count(onnx.load(file), operator) > count(onnx.load(before), operator)
        assert {node.domain for node in onnx.load(file).graph.node} == {""}
        error = worst_of_pytorch(opened, checkpoint, name, calibration[name])
        assert 1e-6 < error < seen[0]
        recorded = [record for record in opened.manifest.parity if record["graph"] == name]
        assert max(record["max_error"] for record in recorded) == pytest.approx(error, rel=1e-3)
        assert {(record["passed"], record["tolerance"]) for record in recorded} == {(True, step.tolerance)}
        assert (
            min(record["snr_db"] for record in recorded) > seen[1] > min(record["least_snr_db"] for record in recorded)
        )
    encoder = "vae_encoder/model.onnx"
    assert (opened.path / encoder).read_bytes() == (bundle.path / encoder).read_bytes()
    drawn = Pipeline.open(opened.path, verify=True).generate(PROMPTS, **DRAWING)
    assert drawn.images.shape == (2, 16, 16, 3)
    assert 0 < off_by(drawn.latents, latents) < drawn_within


@pytest.mark.parametrize(
    "step",
    [QuantizeDynamic(smallest=1000), QuantizeWeights(graphs=("text_encoder",)), Half(graphs=("vae_decoder",))],
    ids=lambda step: step.name,
)
def test_a_tolerance_that_cannot_be_met_leaves_nothing(
    bundle: Bundle,
    checkpoint: LatentDiffusion,
    calibration: Mapping[str, Sequence[Inputs]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: GraphPass,
) -> None:
    monkeypatch.setattr(type(step), "tolerance", 0.0)
    (first, *_) = bundle.roles.named(step.graphs[0])
    message = rf"^{first} output '\w+' differs from PyTorch by \S+ of its largest value; 0\.0001 is allowed\."
    with pytest.raises(ParityError, match=message):
        change_graphs(bundle, tmp_path / "changed", step, calibration, PROMPTS, checkpoint)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Breaks:
    """A pass that gives the first operator an input which is not there."""

    name: ClassVar[str] = "breaks"
    purpose: ClassVar[Any] = "speed"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    tolerance: ClassVar[float] = 1.0
    graphs: tuple[str, ...] = ("vae_decoder",)

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        model.graph.node[0].input[0] = "nowhere"
        return GraphChange(model)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (Breaks(), ExportError, r"^breaks made no valid ONNX of vae_decoder \("),
        (Half(graphs=("vae_decoder",), loss=7e-4), ExportError, r"^In fp16 the graph is off by"),
        (Half(graphs=("vae_decoder",)), InputError, r"^There is no calibration data"),
        (Half(graphs=("text_encoder_2",)), InputError, r"^half is for text_encoder_2; this bundle has text_encoder, "),
    ],
)
def test_a_pass_that_fails_leaves_nothing(
    bundle: Bundle,
    checkpoint: LatentDiffusion,
    calibration: Mapping[str, Sequence[Inputs]],
    tmp_path: Path,
    step: GraphPass,
    error: type[Exception],
    message: str,
) -> None:
    calls = {**calibration, **({"vae_decoder": []} if "calibration" in message else {})}
    with pytest.raises(error, match=message):
        change_graphs(bundle, tmp_path / "changed", step, calls, PROMPTS, checkpoint)
    assert list(tmp_path.iterdir()) == []
