"""The graph ``step`` against the runtime's own arithmetic, by every sampler, and TensorRT's opinion of it."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from ldm_export.contract import REMEMBERED, ROW_FIELDS, STEP_CELLS, GraphSpec, TensorSpec, step_spec
from ldm_export.export.step import step_model
from ldm_export.plan import MAX_HISTORY, SAMPLERS, Row, Stepper, Trajectory, compile_plan
from ldm_export.runtime.backends.device_loop import table_of
from tests.scheduler_configs import base_config, relative_error

CHANNELS = 4
SHAPE = (3, CHANNELS, 5, 7)
SAMPLE = TensorSpec("sample", "float32", ("batch", CHANNELS, "height", "width"))
UNET = GraphSpec("unet/model.onnx", (SAMPLE,), (TensorSpec("out_sample", "float32", SAMPLE.shape),))
SCHEDULER = base_config(_class_name="DDIMScheduler", clip_sample=True, clip_sample_range=1.0)
TOLERANCE = 1e-6
"""Of the largest value: the same sums in the same order."""
RESULTS = ["next_latents", "next_remembered", "sample", "timestep"]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def step() -> onnxruntime.InferenceSession:
    model = step_model(UNET)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def walks(
    step: onnxruntime.InferenceSession, trajectory: Trajectory, guidance: float | None, table: Array
) -> list[tuple[Array, Array]]:
    """After each row, the latents by `Stepper` and by the graph, and what the UNet is given next by both."""
    generator = np.random.default_rng(0)

    def noise(*shape: int) -> Array:
        return generator.standard_normal(shape or SHAPE).astype(np.float32)

    latents = noise()
    given = {"latents": latents.copy(), "remembered": np.zeros((REMEMBERED, *SHAPE), np.float32), "noise": noise()}
    stepper = Stepper(trajectory.rows, latents)
    pairs = []
    for number, (row, cells) in enumerate(zip(trajectory.rows, table, strict=True)):
        out = noise(SHAPE[0] * (1 if guidance is None else 2), *SHAPE[1:])
        if row.noise:
            given["noise"] = noise()
        values = step.run(RESULTS, {**given, "out_sample": out, "row": cells})
        results = dict(zip(RESULTS, values, strict=True))
        given |= {"latents": results["next_latents"], "remembered": results["next_remembered"]}
        negative, prompted = out[: SHAPE[0]], out[-SHAPE[0] :]
        guided = prompted if guidance is None else (prompted - negative) * np.float32(guidance) + negative
        stepper.advance(guided, given["noise"].copy)
        pairs.append((results["next_latents"], latents.copy()))
        if number + 1 < len(trajectory.rows):
            sample = np.empty_like(latents)
            stepper.network_input(out=sample)
            assert results["sample"].shape == out.shape
            pairs.append((results["sample"], np.concatenate([sample] * (len(out) // len(sample)))))
            timesteps = np.full(len(out), trajectory.rows[number + 1].timestep, np.float32)
            pairs.append((results["timestep"], timesteps))
    return pairs


def test_it_is_what_the_contract_says(step: onnxruntime.InferenceSession) -> None:
    spec = step_spec(UNET)
    for side, values in ((spec.inputs, step.get_inputs()), (spec.outputs, step.get_outputs())):
        assert [(tensor.name, list(tensor.shape)) for tensor in side] == [(value.name, value.shape) for value in values]
    assert REMEMBERED + 1 == MAX_HISTORY
    assert {*ROW_FIELDS, "weights"} == {field.name for field in fields(Row)}


@pytest.mark.parametrize("guidance", [None, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_where_the_runtime_goes(
    step: onnxruntime.InferenceSession, sampler: str, guidance: float | None
) -> None:
    plan = compile_plan(SCHEDULER, sampler, 6)
    for trajectory in (plan.from_noise(), plan.for_strength(0.6)):
        for ours, theirs in walks(step, trajectory, guidance, table_of(trajectory.rows, guidance)):
            assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("cell", STEP_CELLS)
def test_every_number_of_a_row_counts(step: onnxruntime.InferenceSession, cell: str) -> None:
    """A wrong one is seen, in some sampler."""
    worst = 0.0
    for sampler in SAMPLERS:
        rows = compile_plan(SCHEDULER, sampler, 6).from_noise()
        table = table_of(rows.rows, 4.0)
        table[:, STEP_CELLS.index(cell)] *= np.float32(0.5)
        worst = max(worst, *(relative_error(ours, theirs) for ours, theirs in walks(step, rows, 4.0, table)))
    assert worst > 100 * TOLERANCE


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX (extra rtx) is not installed")
def test_tensorrt_reads_it() -> None:
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network()
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(step_model(UNET).SerializeToString()), [
        parser.get_error(index).desc() for index in range(parser.num_errors)
    ]
    there = {network.get_input(index).name for index in range(network.num_inputs)}
    assert there == {tensor.name for tensor in step_spec(UNET).inputs}
