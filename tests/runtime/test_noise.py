"""Noise against torch's CPU generator, and against recorded values where torch is absent."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_export.errors import InputError
from ldm_export.runtime.noise import Generator

TOLERANCE = 2e-6
SEEDS = [0, 1, 2, 7, 42, 1234, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63, 2**64 - 1, -1, -(2**63)]

# g = torch.Generator().manual_seed(2026); torch.randn(n, generator=g) for n = 3, 17, 2 in turn
# fmt: off
GOLDEN_3 = [0.36554578, 1.90646017, 0.21686491]
GOLDEN_17 = [
    1.31741476, -0.66895163, 1.59992063, -0.82511503, 0.22499359, -0.34458825,
    -1.73808300, -0.76315302, 0.94934350, -0.32840872, 1.33967197, -0.22296549,
    -0.87108392, 0.12642829, 1.58693707, 0.71034998, -1.68086421,
]
GOLDEN_2 = [0.29633486, 0.73079026]
# fmt: on


def torch_draws(seed: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


def torch_tolerance() -> float:
    """Without AVX2 torch rounds the angle otherwise, and so differs from its own AVX2 code by up to 2.5e-6."""
    torch = pytest.importorskip("torch")
    return 2 * TOLERANCE if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else TOLERANCE


def assert_same_as_torch(seed: int, shapes: list[tuple[int, ...]]) -> None:
    ours = Generator(seed)
    for shape, expected in zip(shapes, torch_draws(seed, shapes), strict=True):
        drawn = ours.randn(shape)
        assert drawn.dtype == np.float32
        assert drawn.shape == expected.shape
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=torch_tolerance())


def test_golden_values_without_torch():
    generator = Generator(2026)
    for expected in (GOLDEN_3, GOLDEN_17, GOLDEN_2):
        np.testing.assert_allclose(generator.randn(len(expected)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(seed):
    assert_same_as_torch(seed, [(1, 4, 64, 64)])


@pytest.mark.parametrize("size", [*range(50), 63, 64, 65, 127, 255, 257, 1000, 4096, 16385, 100003])
def test_sizes(size):
    assert_same_as_torch(size, [(size,), (5,), (size,)])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3), (4, 4), (2, 4, 8, 8), (3, 5, 7, 11)])
def test_shapes(shape):
    assert_same_as_torch(11, [shape, (), shape])


def test_an_int_is_a_shape_of_one_axis():
    np.testing.assert_array_equal(Generator(3).randn(20), Generator(3).randn((20,)))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1), sizes=st.lists(st.integers(0, 70), min_size=1, max_size=12))
def test_any_sequence_of_draws(seed, sizes):
    assert_same_as_torch(seed, [(size,) for size in sizes])


def test_smallest_uniform_gives_the_largest_value():
    """Many values of one long draw: the tail, where the logarithm is steepest, agrees too."""
    drawn = Generator(9).randn(4_000_000)
    (expected,) = torch_draws(9, [(4_000_000,)])
    assert np.abs(drawn).max() > 4.8
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=torch_tolerance())


def test_a_different_seed_gives_different_noise():
    assert np.abs(Generator(0).randn(64) - Generator(1).randn(64)).max() > 1


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, True, 1.5, "7", None])
def test_bad_seed(seed):
    with pytest.raises(InputError, match="seed"):
        Generator(seed)


@pytest.mark.parametrize("shape", [(-1,), (4, -2), (2.0,), 3.5, None])
def test_bad_shape(shape):
    with pytest.raises(InputError, match="shape"):
        Generator(0).randn(shape)


def test_numpy_integers_are_accepted():
    np.testing.assert_array_equal(Generator(np.int64(5)).randn((np.int64(4), 4)), Generator(5).randn((4, 4)))


def test_imports_no_torch():
    code = "import sys, ldm_export.runtime.noise; assert not {'torch', 'onnx', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
