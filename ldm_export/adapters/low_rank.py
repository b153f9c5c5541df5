"""An adapter's change of a weight as two factors, dW = up @ down, as a branch beside a layer takes it.

LoRA is that already. The products of LoHa, LoKr and Tucker's cores have a rank, too: that of LoHa is at most r1 r2,
that of LoKr the product of its factors' ranks. They are divided by singular values (Eckart and Young, 1936), of which
those that float32 cannot tell from zero are left out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ldm_export.adapters.factors import LORA, Factors, delta

Array32 = npt.NDArray[np.float32]
SMALLEST = 1e-7
"""Smallest singular value that is kept, as a share of the largest."""


def low_rank(factors: Factors, shape: tuple[int, ...]) -> tuple[Array32, Array32]:
    """Factors of a change of a weight, scale included.

    Parameters
    ----------
    shape : of the weight, (out, in) or (out, in, kh, kw)

    Returns
    -------
    down (rank, in) or (rank, in, kh, kw), and up (out, rank)
    """
    out, *into = shape
    if factors.kind == LORA and "mid" not in factors.tensors:
        down = np.asarray(factors.tensors["down"], np.float64)
        up = factors.scale * np.asarray(factors.tensors["up"], np.float64).reshape(out, -1)
    else:
        left, values, right = np.linalg.svd(delta(factors, shape).reshape(out, -1), full_matrices=False)
        rank = max(1, int((values > SMALLEST * values[0]).sum()))
        up, down = left[:, :rank] * values[:rank], right[:rank]
    return down.reshape(-1, *into).astype(np.float32), up.astype(np.float32)
