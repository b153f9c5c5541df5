"""Gaussian noise equal to ``torch.randn`` on a CPU generator, without torch.

The same seed then gives the same starting latents, hence the same picture, as diffusers with
``torch.Generator("cpu").manual_seed(seed)``. The algorithm, in full:

State
    An mt19937 (Matsumoto & Nishimura 1998) and one optional float64, the *spare*. Seeding takes the low 32 bits of the
    seed (a negative seed is first taken modulo 2**64), initialises the twister as the authors' ``init_genrand`` does
    (C++: ``std::mt19937(uint32_t)``), and leaves no spare. Below, ``word()`` is the next tempered 32-bit output.

n >= 16 values, in float32
    1. ``u[i] = (word() & 0xFFFFFF) * 2**-24`` for i = 0 .. n-1, in order.
    2. Each whole block of 16 values, at 0, 16, 32, ...: for j = 0 .. 7, with ``a = 1 - u[j]`` and ``b = u[j + 8]``,
       ``r = sqrt(-2 log a)`` and ``t = fl32(2 pi) * b`` (a float32 product), the block becomes
       ``z[j] = r cos t`` and ``z[j + 8] = r sin t`` (Box & Muller 1958). From ``a`` and ``t`` on, in float64 and
       rounded once, so that it is the same in every language and on every processor.
    3. If 16 does not divide n, the *last 16* values, n-16 .. n-1, are drawn anew with 16 further words and step 2.
       They overwrite the end of the last whole block, which had been transformed already.

    The spare is neither read nor written.

n < 16 values, in float64, each rounded to float32 at the end; one by one:
    If there is a spare, the value is the spare, which is then gone. Otherwise two uniforms are drawn, four words in:
    ``u1`` then ``u2``, each ``(((hi << 32) | lo) & (2**53 - 1)) * 2**-53`` with ``hi`` the first word drawn and ``lo``
    the second. With ``r = sqrt(-2 log1p(-u2))`` and ``t = 2 pi u1``, the value is ``r cos t`` and the spare becomes
    ``r sin t``. The spare outlives any draw of 16 or more in between.

n == 0 draws nothing. A scalar, shape ``()``, is a draw of one value.

torch's vector code approximates log, sin and cos, so agreement is to rounding, not to the bit: within 2e-6 of torch on
a CPU with AVX2 (at most 7.2e-7 in 20 million values), and within 4e-6 on one without, where torch rounds ``t`` once, as
``fl32(2 pi b)``, and differs from its own AVX2 code by up to 2.5e-6. Draws of fewer than 16 values agree to the bit.
"""

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ldm_export.errors import InputError
from ldm_export.runtime.values import whole_number

_BLOCK = 16
_TWO_PI = np.float32(2 * math.pi)


class Generator:
    """A seeded source of standard normal noise that follows ``torch.Generator("cpu")``.

    Parameters
    ----------
    seed : int
        -2**63 .. 2**64 - 1. As in torch, only the low 32 bits matter: ``seed`` and ``seed + 2**32`` give equal noise.

    Raises
    ------
    InputError
        If the seed is not an integer or is out of range.
    """

    def __init__(self, seed: int) -> None:
        number = whole_number("seed", seed, -(2**63), 2**64 - 1)
        self._twister = np.random.RandomState(number & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: int | Sequence[int]) -> NDArray[np.float32]:
        """Draw standard normal values, as ``torch.randn(shape, generator=..., dtype=torch.float32)`` does.

        Parameters
        ----------
        shape : int or sequence of int
            Any number of axes, each 0 or more.

        Returns
        -------
        ndarray, float32, of the given shape
            Independent values of N(0, 1), equal to torch's as far as the module says; none is beyond 8.6 in size.

        Raises
        ------
        InputError
            If an axis is negative or not an integer.
        """
        try:
            axes = tuple(operator.index(axis) for axis in ([shape] if isinstance(shape, int) else shape))
        except TypeError:
            raise InputError(f"The noise shape is {shape!r}; a sequence of whole numbers is needed.") from None
        if min(axes, default=0) < 0:
            raise InputError(f"The noise shape is {axes}; every axis must be 0 or more.")
        size = math.prod(axes)
        if size >= _BLOCK:
            return self._many(size).reshape(axes)
        return np.array([self._one() for _ in range(size)], np.float32).reshape(axes)

    def _many(self, size: int) -> NDArray[np.float32]:
        uniform = self._uniform(size)
        whole = size - size % _BLOCK
        _box_muller(uniform[:whole])
        if whole < size:
            uniform[-_BLOCK:] = self._uniform(_BLOCK)
            _box_muller(uniform[-_BLOCK:])
        return uniform

    def _uniform(self, size: int) -> NDArray[np.float32]:
        uniform: NDArray[np.float32] = (self._words(size) & np.uint32(0xFFFFFF)).astype(np.float32)
        uniform *= np.float32(2**-24)
        return uniform

    def _words(self, size: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size, dtype=np.uint32)  # whole range: the twister's words as they are

    def _one(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        hi1, lo1, hi2, lo2 = (int(word) for word in self._words(4))
        u1, u2 = ((((hi << 32) | lo) & (2**53 - 1)) * 2.0**-53 for hi, lo in ((hi1, lo1), (hi2, lo2)))
        radius, angle = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(values: NDArray[np.float32]) -> None:
    """Turn uniforms in [0, 1) into normal values in place; float32, contiguous, a multiple of 16 long."""
    halves = values.reshape(-1, 2, _BLOCK // 2)  # (blocks, 2, 8), a view
    radius = np.sqrt(-2 * np.log((np.float32(1) - halves[:, 0]).astype(np.float64)))
    angle = (_TWO_PI * halves[:, 1]).astype(np.float64)
    halves[:, 0] = radius * np.cos(angle)
    halves[:, 1] = radius * np.sin(angle)
