"""The golden bundle of every format opens and generates the same for ever, here in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.golden.make import REQUESTS
from tests.golden.test_golden import FORMAT_2, LATENT_TOLERANCE


@pytest.mark.parametrize("name", REQUESTS)
def test_what_it_generates(open_cpp: Callable[..., Any], name: str) -> None:
    expected, request = np.load(FORMAT_2 / "expected.npz"), dict(REQUESTS[name])
    prompts, seed = request.pop("prompts"), request.pop("seed", 0)
    seeds = seed if isinstance(seed, list) else [seed + k for k in range(len(prompts))]
    if (negative := request.pop("negative_prompt", None)) is not None:
        request |= {"negative_prompts": (ctypes.c_char_p * 1)(negative.encode()), "negative_prompt_count": 1}
    request |= {"sampler": request["sampler"].encode(), "seeds": (ctypes.c_int64 * len(seeds))(*seeds)}
    latents: list[Any] = []

    def keep(step: Any) -> None:
        latents[:] = [np.ctypeslib.as_array(step.latents, tuple(step.latents_shape)).copy()]

    pixels = open_cpp(FORMAT_2 / "bundle", verify=True, backend=b"cpu").draw(prompts, callback=keep, **request)
    wanted, images = expected[f"{name}.latents"], expected[f"{name}.images"]
    np.testing.assert_allclose(latents[0], wanted, rtol=0, atol=LATENT_TOLERANCE * np.abs(wanted).max())
    assert np.abs(np.frombuffer(pixels, np.uint8).reshape(images.shape).astype(int) - images).max() <= 1
