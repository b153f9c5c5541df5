"""Large graphs, here of a few kilobytes, whose weights lie outside: the same numbers, and no copies of gigabytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import BundleError
from ldm_export.export.graphs import change_graphs
from ldm_export.families import open_checkpoint
from ldm_export.graph import files
from ldm_export.graph.base import GraphPass
from ldm_export.graph.files import load, load_outside, save
from ldm_export.graph.half import Half
from ldm_export.graph.integers import array, initializers
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.graph.quantize_static import QuantizeStatic
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.graph.running import outputs_of, session
from tests.graph.graphs import copy_of, evaluate, run, weights_of
from tests.graph.small_graph import CALLS, network

STATIC = QuantizeStatic(only_faster=False, layer_error=0.5, graph_error=0.9)


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXTERNAL_DATA_ABOVE_BYTES", 1000)


@pytest.fixture
def outside(small_is_large: None, tmp_path: Path) -> Path:
    """The file of a graph whose weights lie outside."""
    save(ir.from_proto(network()), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_weights_lie_in_one_file_beside(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in outside.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    onnx.checker.check_model(str(outside), full_check=True)
    before, after = weights_of(network()), weights_of(onnx.load(outside))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], weight)
    monkeypatch.undo()
    folder = outside.parent / "small"
    folder.mkdir()
    save(ir.from_proto(load(outside)), folder / "model.onnx")  # what became small again is one file again
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    np.testing.assert_array_equal(evaluate(onnx.load(folder / "model.onnx"), CALLS[0]), evaluate(network(), CALLS[0]))


def test_a_loaded_graph_holds_none_of_them_and_runs(outside: Path) -> None:
    model = load(outside)
    far = [weight for weight in model.graph.initializer if weight.external_data]
    assert len(far) > 4
    assert not any(weight.raw_data for weight in far)
    assert all(isinstance(array(weight).base, np.memmap | np.ndarray) for weight in far)
    before = copy_of(model)
    for optimised in (True, False):
        (given,) = session(model, optimised=optimised).run(None, CALLS[0])
        np.testing.assert_allclose(given, run(network(), CALLS[0], optimised=optimised), rtol=1e-4, atol=1e-5)
    assert model == before
    outside.with_name("model.onnx_data").unlink()
    assert len(initializers(load(outside))) == len(network().graph.initializer)


def test_weights_of_several_hard_links_are_refused(outside: Path, tmp_path: Path) -> None:
    os.link(f"{outside}_data", tmp_path / "another")
    with pytest.raises(BundleError, match=r"model.onnx_data has 2 hard links.*Copy the whole bundle"):
        load(outside)


def test_weights_that_lie_inside_are_put_outside_for_a_while(outside: Path, tmp_path: Path) -> None:
    folder, inside = tmp_path / "folder", tmp_path / "inside.onnx"
    folder.mkdir()
    onnx.save(network(), inside)
    model = load_outside(inside, folder)
    assert max(len(weight.raw_data) for weight in model.graph.initializer) <= 256  # bytes; not worth a place outside
    np.testing.assert_array_equal(session(model).run(None, CALLS[0]), session(network()).run(None, CALLS[0]))
    assert load_outside(outside, folder) == load(outside)  # which does already


@pytest.mark.parametrize("step", [STATIC, QuantizeDynamic(smallest=1), QuantizeWeights(smallest=1), Half(loss=0.2)])
def test_a_pass_makes_the_same_of_both(step: GraphPass, outside: Path) -> None:
    near, far = step.apply(network(), CALLS), step.apply(load(outside), CALLS)
    assert near.report == far.report
    assert [node.op_type for node in near.model.graph.node] == [node.op_type for node in far.model.graph.node]
    again = outside.parent / "again"
    again.mkdir()
    save(ir.from_proto(far.model), again / "model.onnx")
    assert (again / "model.onnx_data").is_file()
    for before, after in zip(outputs_of(near.model, CALLS), outputs_of(load(again / "model.onnx"), CALLS), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("stays_large", [True, False])
def test_a_bundle_with_a_large_graph(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    small_is_large: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stays_large: bool,
) -> None:
    """Its graph becomes one of integers, outside again or small enough for one file."""
    plain, checkpoint = Bundle.open(tiny_bundle), open_checkpoint(tiny_checkpoint)
    unet = plain.manifest.graphs["unet"]
    rng = np.random.default_rng(0)
    calls = {
        "unet": [
            {
                "sample": rng.standard_normal((1, 4, 8, 8)).astype(np.float32),
                "timestep": np.full(1, timestep, np.float32),
                "encoder_hidden_states": rng.standard_normal((1, 16, 32)).astype(np.float32),
            }
            for timestep in (900, 100)
        ]
    }
    step = QuantizeDynamic(smallest=1000)
    small, _ = change_graphs(plain, tmp_path / "small", step, calls, [], checkpoint)
    (large,) = [path for path in small.manifest.files if path.endswith("_data")]
    assert large == f"{unet.path}_data"
    if not stays_large:
        monkeypatch.undo()
    changed, _ = change_graphs(small, tmp_path / "changed", QuantizeWeights(graphs=("unet",)), calls, [], checkpoint)
    assert (large in changed.manifest.files) == stays_large
    Bundle.open(changed.path, verify=True)
    expected = QuantizeWeights(graphs=("unet",)).apply(onnx.load(small.path / unet.path), []).model
    for call in calls["unet"]:
        np.testing.assert_array_equal(run(onnx.load(changed.path / unet.path), call), run(expected, call))
