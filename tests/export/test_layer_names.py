"""Layers of every kind of network are found by name in its graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from ldm_export.bundle import Bundle
from ldm_export.families import family_of, open_checkpoint
from ldm_export.graph.layers import layers_of, nameless_products
from tests.bundle_fixture import KINDS

LONG = {"ssd-1b", "sd3 with t5", "prx with dc-ae", "refiner"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in LONG else kind for kind in sorted(KINDS)]
)
def test_products_have_their_layers_names(kind: str, kinds: Callable[[str], tuple[Path, Path]]) -> None:
    folder, bundle = kinds(kind)
    opened = Bundle.open(bundle)
    for graph in family_of(open_checkpoint(folder)).graphs:
        if graph.component is None or graph.component == "vae":
            continue
        model = ir.load(opened.file(opened.manifest.graphs[graph.spec.name].path))
        network = graph.load().network
        layers = {
            name: tuple(module.weight.shape)
            for name, module in network.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and getattr(module, "groups", 1) == 1
        }
        found = {name: product.shape for name, product in layers_of(model).items()}
        assert found == layers
        assert nameless_products(model) == 0
