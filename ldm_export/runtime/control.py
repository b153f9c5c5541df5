"""ControlNets (2302.05543): what a picture says of a layout, added to the denoiser in a part of the steps.

    residuals = sum over controls in use of scale * control(sample, timestep, conditions, picture)

A control is in use in call i of n where ``start <= i / n`` and ``(i + 1) / n <= end``, as in diffusers' pipelines. In
other calls, and for pictures without any, the denoiser is given zeros of one element for each free size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import residuals_of
from ldm_export.errors import InputError
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.values import real_number, shown

LARGEST_SCALE = 1e3
NONE_THERE = "no ControlNet. Export the model with `--controlnet FOLDER`, or leave the control out."


@dataclass(frozen=True)
class Control:
    """How a picture controls what is generated, by one of a bundle's ControlNets.

    Attributes
    ----------
    image : uint8 (H, W, 3), or (B, H, W, 3), of the size of what is generated, such as edges or depths
    scale : how much, from 0 to 1000
    start, end : of the steps, the share after which it begins and that after which it ends; in [0, 1]
    """

    image: Array
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class CheckedControl:
    """A control of a request; see `Control`.

    Attributes
    ----------
    name, graph : what it is asked for by, and the graph of its ControlNet
    image : float32 (B, 3, H, W) in [0, 1]
    """

    name: str
    graph: str
    image: Array
    scale: float
    start: float
    end: float

    def is_used(self, call: int, count: int) -> bool:
        """Whether it is in use in a call, of so many, counted from 0."""
        return not (call / count < self.start or (call + 1) / count > self.end)


def checked_controls(bundle: Bundle, given: Mapping[str, Control | Array] | None, batch: int) -> list[CheckedControl]:
    """The controls of a request for ``batch`` pictures.

    Parameters
    ----------
    given : by the names that the bundle has for its ControlNets; a picture alone is a `Control` of it

    Raises
    ------
    InputError
        If the bundle has no such ControlNet, a picture is none or of another size, or a number is out of its range.
    """
    there = bundle.roles.controls
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"controls is {shown(given)}; give a dict of pictures by the names of their ControlNets.")
    found = []
    for name, value in (given or {}).items():
        if name not in there:
            raise InputError(
                f"The control {shown(name)} was asked for; this bundle has "
                + (f"{', '.join(sorted(there))}. Use one of them." if there else NONE_THERE)
            )
        control = value if isinstance(value, Control) else Control(value)
        scale = real_number(f"scale of {name}", control.scale, 0.0, LARGEST_SCALE)
        start, end = (
            real_number(f"{side} of {name}", number, 0.0, 1.0)
            for side, number in (("start", control.start), ("end", control.end))
        )
        if not start < end:
            raise InputError(
                f"The control {name} starts at {start:g} and ends at {end:g} of the steps. End it after it starts."
            )
        found.append(CheckedControl(name, there[name], _pixels(name, control.image, batch), scale, start, end))
    return found


def size_with_controls(
    controls: Sequence[CheckedControl], height: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """Height and width of what is generated, by the pictures of controls where they are not known otherwise.

    Raises
    ------
    InputError
        If a picture is of another size.
    """
    for control in controls:
        sides = control.image.shape[2:]
        if height not in (None, sides[0]) or width not in (None, sides[1]):
            asked = "x".join("any" if side is None else str(side) for side in (height, width))
            raise InputError(
                f"The picture of the control {control.name} is {sides[0]}x{sides[1]}, and {asked} is generated. "
                "Resize it to that size."
            )
        height, width = sides
    return height, width


def check_with_controls(controls: Sequence[CheckedControl], *, deepcache: int, whole: bool, forecast: bool) -> None:
    """Raise InputError for what does not go together with controls, or with a part of the steps."""
    if not controls:
        return
    if deepcache > 1 or whole:
        what = "deepcache keeps what blocks of the denoiser gave" if deepcache > 1 else "A loop graph has none inside"
        raise InputError(
            f"A control was given with {'deepcache' if deepcache > 1 else 'the whole loop at once'}. {what}. "
            "Leave one of them out."
        )
    partly = [control.name for control in controls if control.start > 0 or control.end < 1]
    if partly and forecast:
        raise InputError(
            f"The control {partly[0]} was given for a part of the steps with calls, by which outputs are forecast from "
            "earlier ones, with the control or without. Leave one of them out."
        )


def _pixels(name: str, image: Any, batch: int) -> Array:
    """Pictures as float32 (B, 3, H, W) in [0, 1]; one serves the whole batch."""
    try:
        pixels = np.asarray(image)
    except Exception as error:  # lists of unequal lengths, tensors on a GPU: what a stranger's type raises
        raise InputError(f"The picture of {name} is {shown(image)}; uint8 (H, W, 3) is needed. Convert it.") from error
    given, pixels = pixels.shape, pixels[None] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise InputError(
            f"The picture of {name} has shape {given} and dtype {pixels.dtype}; uint8 (H, W, 3), or one of those a "
            "picture, is needed. Convert it to RGB."
        )
    if len(pixels) not in (1, batch):
        raise InputError(f"{len(pixels)} pictures of {name} were given for {batch} pictures. Give one, or one each.")
    sample = pixels.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)
    return np.ascontiguousarray(np.broadcast_to(sample, (batch, *sample.shape[1:])))


def no_residuals(bundle: Bundle, rows: int) -> dict[str, Array]:
    """What a denoiser is given where no control is in use: zeros, of one element for each free size but the rows."""
    roles = bundle.roles
    return {
        tensor.name: np.zeros((rows, *(size if isinstance(size, int) else 1 for size in tensor.shape[1:])), np.float32)
        for tensor in residuals_of(bundle.manifest.graphs[roles.denoiser], roles)
    }


@dataclass(frozen=True)
class LoadedControl:
    """A control whose graph is loaded.

    Attributes
    ----------
    graph : gives the residuals, of the denoiser's ``sample`` and ``timestep`` and of ``inputs``
    inputs : its other inputs, which stay the same
    """

    asked: CheckedControl
    graph: Graph
    inputs: Mapping[str, Array]

    def residuals(self, sample: Array, timestep: Array) -> dict[str, Array]:
        """Residuals by name, each times the scale."""
        given = self.graph.run({"sample": sample, "timestep": timestep, **self.inputs})
        scale = np.float32(self.asked.scale)
        return given if scale == 1 else {name: value * scale for name, value in given.items()}


def loaded_control(
    asked: CheckedControl,
    graph: Graph,
    conditions: Mapping[str, Array],
    rows: int,
    encode: Callable[[Array], Array],
) -> LoadedControl:
    """A control for so many rows of a call.

    Parameters
    ----------
    conditions : the denoiser's
    encode : gives latents of pictures (B, 3, H, W) in [-1, 1]
    """
    names = {tensor.name for tensor in graph.spec.inputs}
    image = {"control_image": asked.image}
    if "control_latents" in names:
        image = {"control_latents": encode(asked.image * np.float32(2) - np.float32(1))}
    repeated = {name: np.concatenate([value] * (rows // len(value))) for name, value in image.items()}
    return LoadedControl(asked, graph, {**{name: conditions[name] for name in names & conditions.keys()}, **repeated})


class Residuals:
    """What the controls of one generation add to the denoiser, call by call.

    Parameters
    ----------
    controls : those that are asked for
    count : calls of the denoiser
    """

    def __init__(self, controls: Sequence[LoadedControl], count: int):
        self._controls, self._count, self._done = controls, count, 0

    def next(self, sample: Array, timestep: Array) -> Mapping[str, Array] | None:
        """The residuals of the next call, by name; None where no control is in use."""
        total: dict[str, Array] | None = None
        for control in self._controls:
            if control.asked.is_used(self._done, self._count) and control.asked.scale:
                given = control.residuals(sample, timestep)
                total = given if total is None else {name: total[name] + value for name, value in given.items()}
        self._done += 1
        return total
