"""What tracing makes of a network, where it is not obvious."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from ldm_export.contract import TensorSpec, graph_spec
from ldm_export.export.onnx import export_graph
from ldm_export.families.base import GraphModule


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x / (x + 1e-15),
        lambda x: (x * 1.000005 - x) / x.clamp(min=1.0),
        lambda x: (x - 1e-9) / (x + 2e-9),
    ],
    ids=["plus 1e-15", "times 1.000005", "minus 1e-9"],
)
def test_small_numbers_count(formula: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """onnxscript's rules would drop them as a zero and a one, and a division by zero would be left."""
    spec = graph_spec("graph", [TensorSpec("x", "float32", ("n",))], [TensorSpec("y", "float32", ("n",))])
    x = torch.tensor([0.0, 1e-9, 3.0, 7.0])
    module = GraphModule(torch.nn.Identity(), lambda network, x: (formula(network(x)),))
    path = export_graph(module, spec, (x,), tmp_path)
    (result,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(result, formula(x).numpy(), rtol=1e-6, atol=0)
