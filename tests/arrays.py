"""Arrays for a graph's inputs and outputs, by its contract."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm_export.contract import TensorSpec


def arrays(tensors: tuple[TensorSpec, ...], seed: int = 0, **sizes: int) -> dict[str, np.ndarray[Any, Any]]:
    """Noise for a graph's inputs, or room for its outputs; what is free has 3 rows, 4 tokens and odd heights."""
    sizes = {"batch": 3, "height": 6, "width": 10, "image_height": 12, "image_width": 20, "tokens": 4, **sizes}
    generator = np.random.default_rng(seed)
    made = {}
    for tensor in tensors:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        integers = tensor.dtype == "int64"
        values = generator.integers(0, 5, shape) if integers else generator.standard_normal(shape)
        made[tensor.name] = np.asarray(values, tensor.dtype)
    return made
