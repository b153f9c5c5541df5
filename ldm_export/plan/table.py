"""The sampling plan: a sampler as a table, the file it is kept in, and the loop that runs it.

Row i of n network calls, with ``out`` the (guided) network output and ``h`` the remembered values, newest first::

    h_0  = from_sample * x + from_output * out                      then clipped to +-clip where clip > 0
    x   <- keep * x + direct * out + sum_k weights[k] * h_k + noise * z         z ~ N(0, I)
    network input = input_scale * x,   timestep = the row's timestep

A trajectory says how ``x`` starts and which rows it runs::

    x = image_scale * image_latents + noise_scale * z

From noise, that is ``init_scale * z`` and every row. From an image, step k of the plan is entered through
``entries[k]``: its warm-up rows first, since a multistep solver that starts in the middle has nothing to remember yet,
then the plan's own rows from ``resume`` on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, parsed

FORMAT_VERSION = 1
MAX_HISTORY = 5
"""Values that a row may remember: PLMS's first output comes back at lag 4."""

MOST_STEPS = 10_000
MOST_TOKENS = 1 << 40
"""Largest ``tokens`` of a plan: of the largest picture, one a pixel."""

Latents = npt.NDArray[np.floating[Any]]


class PlanError(InputError):
    """Numbers of which no row or trajectory can be made."""


@dataclass(frozen=True)
class Row:
    """One network call and the update that follows it; the module's docstring has the formula.

    ``timestep`` is what the network is given (>= 0, fractional for some samplers); ``input_scale`` > 0; ``clip`` >= 0,
    0 being off; ``weights`` has at most `MAX_HISTORY` items, newest first, ``weights[0]`` belonging to this row's h.
    """

    timestep: float
    input_scale: float = 1.0
    from_sample: float = 0.0
    from_output: float = 0.0
    clip: float = 0.0
    keep: float = 0.0
    direct: float = 0.0
    weights: tuple[float, ...] = ()
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (all(map(_is_float32, value)) if name == "weights" else _is_float32(value)):
                raise PlanError(
                    f"a plan row has {name} = {value}; it must be finite in float32. Compile the plan again."
                )
        if self.timestep < 0 or not np.float32(self.input_scale) > 0 or self.clip < 0:
            raise PlanError(
                f"a plan row has timestep {self.timestep}, input_scale {self.input_scale} and clip {self.clip}; "
                "they must be >= 0, > 0 and >= 0. Compile the plan again."
            )
        if len(self.weights) > MAX_HISTORY:
            raise PlanError(
                f"a plan row has {len(self.weights)} weights; at most {MAX_HISTORY} values are remembered. "
                "Compile the plan again."
            )


@dataclass(frozen=True)
class Entry:
    """How image-to-image enters the plan at one of its steps; the module's docstring has the meaning."""

    image_scale: float
    noise_scale: float
    warmup: tuple[Row, ...]
    resume: int


class Entries(Sequence[Entry]):
    """The entries of a compiled plan, each made when it is first asked for: most runs start from noise.

    Parameters
    ----------
    count : how many there are
    make : gives one by its number, 0 to count - 1
    """

    def __init__(self, count: int, make: Callable[[int], Entry]) -> None:
        self._count, self._make = count, cache(make)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, step: Any) -> Any:
        number = range(self._count)[step]
        return self._make(number) if isinstance(number, int) else tuple(map(self._make, number))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True)
class Trajectory:
    """A run of the sampler: ``x = image_scale * image_latents + noise_scale * z``, then ``rows`` in order."""

    image_scale: float
    noise_scale: float
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.rows or not (_is_float32(self.image_scale) and _is_float32(self.noise_scale)):
            raise PlanError(
                f"a plan starts at image_scale {self.image_scale} and noise_scale {self.noise_scale} with "
                f"{len(self.rows)} rows; scales must be finite and rows at least 1. Compile the plan again."
            )
        for made, row in enumerate(self.rows[:MAX_HISTORY], start=1):
            if len(row.weights) > made:
                raise PlanError(
                    f"network call {made} of a plan weighs {len(row.weights)} remembered values; only {made} exist "
                    "by then. Compile the plan again."
                )


@dataclass(frozen=True)
class Plan:
    """A compiled sampler of ``num_inference_steps`` steps: ``rows`` from noise, ``entries[k]`` from an image.

    There are as many rows as network calls: one or two a step, and fewer where outputs are forecast
    (`ldm_export.plan.forecast`) or the rows were fitted.

    ``tokens`` are those of the pictures that it draws; 0 for any size. Its file has them where there are some.
    """

    sampler: str
    num_inference_steps: int
    init_scale: float
    rows: tuple[Row, ...]
    entries: Sequence[Entry]
    tokens: int = 0

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        if not 0 <= self.tokens <= MOST_TOKENS:
            raise InputError(
                f"a plan is of pictures of {self.tokens} tokens; they have 1 to {MOST_TOKENS}. Compile the plan again."
            )
        if not 1 <= steps <= MOST_STEPS or not 1 <= len(self.rows) <= 2 * steps:
            raise InputError(
                f"a plan of {steps} steps has {len(self.rows)} rows; a step is at most two network calls. "
                "Compile the plan again."
            )
        if len(self.entries) != steps:
            raise InputError(
                f"a plan of {steps} steps has {len(self.entries)} entries; it needs one a step. Compile the plan again."
            )
        self.from_noise()
        if isinstance(self.entries, Entries):  # which are not made yet, and fit together
            return
        for start, entry in enumerate(self.entries):
            if len(entry.warmup) > 2 * MAX_HISTORY:
                raise InputError(
                    f"entry {start} of a plan has {len(entry.warmup)} warm-up rows; at most {2 * MAX_HISTORY} are run. "
                    "Compile the plan again."
                )
            if not 0 <= entry.resume <= len(self.rows):
                raise InputError(
                    f"entry {start} of a plan resumes at row {entry.resume}; it has rows 0 to {len(self.rows)}. "
                    "Compile the plan again."
                )
            first = entry.warmup + self.rows[entry.resume : entry.resume + MAX_HISTORY]  # those after may weigh any
            Trajectory(entry.image_scale, entry.noise_scale, first)

    @property
    def file_name(self) -> str:
        """Where a bundle keeps this plan, under ``plans/``."""
        return f"{self.sampler}-{self.num_inference_steps}.json"

    def from_noise(self) -> Trajectory:
        """The text-to-image run: pure noise in, every row."""
        return Trajectory(0.0, self.init_scale, self.rows)

    def starting_at(self, step: int) -> Trajectory:
        """The image-to-image run that skips the first ``step`` steps, 0 <= step < num_inference_steps."""
        if not 0 <= step < self.num_inference_steps:
            raise InputError(
                f"start step {step} is outside the plan; it has steps 0 to {self.num_inference_steps - 1}. "
                "Start at one of those."
            )
        entry = self.entries[step]
        return Trajectory(entry.image_scale, entry.noise_scale, entry.warmup + self.rows[entry.resume :])

    def for_strength(self, strength: float, *, rounds_up: bool = False) -> Trajectory:
        """The image-to-image run that redoes the last ``strength`` of the steps; see `first_step`."""
        return self.starting_at(self.first_step(strength, rounds_up=rounds_up))

    def first_step(self, strength: float, *, rounds_up: bool = False) -> int:
        """The step from which the last ``strength`` of the steps is redone, as diffusers counts them.

        Parameters
        ----------
        strength : in (0, 1]; 1 keeps of the image only what its noised latents carry at the first step
        rounds_up : whether a part of a step counts as one, as in pipelines of Stable Diffusion 3, or as none
        """
        steps, redone = self.num_inference_steps, 0
        if 0 < strength <= 1:
            redone = steps - int(steps - steps * strength) if rounds_up else int(steps * strength)
        if redone < 1:
            raise InputError(
                f"strength {strength} of {self.num_inference_steps} steps leaves nothing to run; it must lie in "
                f"[{1 / self.num_inference_steps:.3g}, 1]. Raise the strength or the number of steps."
            )
        return steps - redone

    def to_json(self) -> str:
        """The plan file: the same plan gives the same text, and every number reads back to the last bit."""
        document = asdict(replace(self, entries=tuple(self.entries)))
        if not self.tokens:
            del document["tokens"]
        return json.dumps({"format_version": FORMAT_VERSION, **document}, sort_keys=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan file, checking everything.

        Raises
        ------
        InputError
            If the text is not JSON, has another format version, a missing, unknown or mistyped field, a number that is
            not finite, or rows and entries that do not fit together.
        """
        try:
            document = parsed(text)
        except MalformedError as error:
            raise InputError(f"a plan file is {error}. Compile the plan again.") from error
        version = document.pop("format_version", None) if isinstance(document, dict) else None
        if type(version) is not int or version != FORMAT_VERSION:
            raise InputError(
                f"a plan file has format_version {version!r}; this package reads {FORMAT_VERSION}. "
                "Compile the plan again with this version."
            )
        if document.get("tokens") == 0:
            raise InputError("a plan file has tokens = 0; a plan for any size has no tokens. Compile the plan again.")
        return _record(cls, {"tokens": 0, **document}, "a plan")


def _is_float32(number: float) -> bool:
    """Whether a number is finite once it is a float32, which latents are."""
    return abs(number) <= _LARGEST_FLOAT32  # false for NaN


_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
Record = TypeVar("Record", Row, Entry, Plan)


def _record(cls: type[Record], value: Any, where: str) -> Record:
    """Build a dataclass of this module from parsed JSON, holding every value against the field's declared type."""
    names = [field.name for field in fields(cls)]
    if not isinstance(value, dict) or value.keys() != set(names):
        given = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{where} holds {given}; it must hold exactly {sorted(names)}. Compile the plan again.")
    return cls(**{field.name: _READERS[str(field.type)](value[field.name], field.name) for field in fields(cls)})


def _exactly(kind: type, value: Any, name: str) -> Any:
    if type(value) is not kind:
        raise InputError(f"a plan has {name} = {repr(value)[:40]}; it must be {kind.__name__}. Compile the plan again.")
    return value


def _number(value: Any, name: str) -> float:
    try:
        return float(value if type(value) is int else _exactly(float, value, name))
    except OverflowError as error:  # an integer beyond float64
        raise InputError(f"a plan has {name} beyond the range of float64. Compile the plan again.") from error


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "str": lambda value, name: _exactly(str, value, name),
    "int": lambda value, name: _exactly(int, value, name),
    "float": _number,
    "tuple[float, ...]": lambda value, name: tuple(_number(item, name) for item in _exactly(list, value, name)),
    "tuple[Row, ...]": lambda value, name: tuple(_record(Row, item, "a row") for item in _exactly(list, value, name)),
    "Sequence[Entry]": lambda value, name: tuple(
        _record(Entry, item, "an entry") for item in _exactly(list, value, name)
    ),
}


class Stepper:
    """Runs rows on latents, in place and without allocating.

    Parameters
    ----------
    rows : rows of a trajectory
    latents : float32 (or float64), any shape: ``x`` at its start; overwritten row by row and left at the result

    The caller owns the loop, and so progress, previews and cancelling::

        for row in rows:
            stepper.network_input(out=buffer)
            stepper.advance(network(buffer, row.timestep), draw)
    """

    def __init__(self, rows: Sequence[Row], latents: Latents) -> None:
        self.latents = latents
        self._rows = iter(rows)
        self._row = next(self._rows, None)
        self._history = [np.zeros_like(latents) for _ in range(max(len(row.weights) for row in rows))]  # newest first
        self._term = np.empty_like(latents)

    def network_input(self, out: Latents) -> None:
        """Write what the network is given next, ``input_scale * x``, to ``out``, or to each of several in it."""
        assert self._row is not None, "every row has been run"
        np.multiply(self.latents, self._row.input_scale, out=out)

    def advance(self, output: Latents, draw: Callable[[], Latents]) -> None:
        """Take the network's (guided) output and update the latents.

        Parameters
        ----------
        output : the shape and dtype of the latents
        draw : gives N(0, I) noise of that shape; called once where the row adds noise, else not at all
        """
        row, x = self._row, self.latents
        assert row is not None, "every row has been run"
        if self._history:
            self._history.insert(0, self._history.pop())  # the oldest buffer takes the newest value
            h = self._history[0]
            np.multiply(output, row.from_output, out=h)
            self._add(h, row.from_sample, x)
            if row.clip:
                np.clip(h, -row.clip, row.clip, out=h)
        np.multiply(x, row.keep, out=x)
        self._add(x, row.direct, output)
        for weight, h in zip(row.weights, self._history, strict=False):
            self._add(x, weight, h)
        if row.noise:
            self._add(x, row.noise, draw())
        self._row = next(self._rows, None)

    def _add(self, total: Latents, factor: float, term: Latents) -> None:
        if factor:
            np.multiply(term, factor, out=self._term)
            np.add(total, self._term, out=total)
