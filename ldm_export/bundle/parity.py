"""The parity record: how far a graph's outputs are from what they shall be, how that is measured, and what is allowed.

Two measures. The error is max |given - exact| / max |exact| over every element of an output. Of graphs whose numbers a
pass has rounded there is also the signal-to-noise ratio 10 log10(|exact|^2 / |given - exact|^2), in dB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.errors import ParityError

Array = npt.NDArray[Any]

TOLERANCE = 1e-4
"""Allowed error of an fp32 graph."""

SILENT_DB = 200.0
"""Largest signal-to-noise ratio that is written, dB: float64 ends at about 300 dB, and JSON has no infinity."""

PICTURE_TOLERANCE = 2 / 255
"""Allowed error of pictures of bytes: a value that is rounded the other way, and one to spare."""

STEP_TOLERANCE = 1e-5
"""Allowed error of the graph ``step``: float32 sums of some ten terms."""

PYTORCH, RUNTIME = "PyTorch", "runtime"
REFERENCES = {PYTORCH: "PyTorch", RUNTIME: "the runtime"}
"""What graphs are compared with, by its name in a record: as sentences call it."""


@dataclass(frozen=True)
class Parity:
    """How far a graph's output is from what it shall be.

    Attributes
    ----------
    graph, output : names of both
    max_error : max |given - exact| / max |exact|, at most ``tolerance``; of loops' pictures a share of 255
    snr_db : signal-to-noise ratio, at least ``least_snr_db`` where that is given: of graphs with rounded numbers
    reference : what it was compared with: PyTorch, or of loops the runtime
    source_hashes : of loops, the SHA-256 of each file that they were built from
    """

    graph: str
    output: str
    max_error: float
    tolerance: float
    snr_db: float = SILENT_DB
    least_snr_db: float | None = None
    reference: str = PYTORCH
    source_hashes: Mapping[str, str] | None = None

    @property
    def passed(self) -> bool:
        loud = self.least_snr_db is None or self.snr_db >= self.least_snr_db  # false for NaN, as is the next
        return loud and self.max_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Record as a manifest has it: without signal-to-noise ratios where none was asked for."""
        keys = ("graph", "output", "max_error", "tolerance")
        record: dict[str, Any] = {key: getattr(self, key) for key in keys}
        if self.least_snr_db is not None:
            record |= {"snr_db": self.snr_db, "least_snr_db": self.least_snr_db}
        record["passed"] = self.passed
        if self.reference != PYTORCH:
            record["reference"] = self.reference
        if self.source_hashes is not None:
            record["source_hashes"] = dict(self.source_hashes)
        return record


@np.errstate(invalid="ignore")
def snr_db(exact: Array, given: Array) -> float:
    """10 log10(|exact|^2 / |given - exact|^2), in dB, within +-:data:`SILENT_DB`; NaN if a value is no number."""
    signal = exact.astype(np.float64)
    noise = float(np.square(given - signal).sum())
    if noise == 0:
        return SILENT_DB
    return float(np.clip(10 * np.log10(max(float(np.square(signal).sum()) / noise, 1e-300)), -SILENT_DB, SILENT_DB))


@np.errstate(invalid="ignore")
def largest_error(expected: Sequence[Array], results: Sequence[Array]) -> float:
    """Largest difference of a call's outputs, as a share of each one's largest value.

    NaN if a result is; infinite if a shape is another.
    """
    errors = [
        float(np.abs(array - other).max()) / max(float(np.abs(array).max()), 1e-30)
        if array.shape == other.shape
        else np.inf
        for array, other in zip(expected, results, strict=True)
    ]
    return float(np.max(errors))  # NaN if one is, which max() is not


def least_snr(expected: Sequence[Array], results: Sequence[Array]) -> float:
    """Signal-to-noise ratio of the noisiest array, in dB; NaN if a value is no number."""
    ratios = [
        snr_db(array, other) if array.shape == other.shape else -SILENT_DB
        for array, other in zip(expected, results, strict=True)
    ]
    return float(np.min(ratios))  # NaN if one is, which min() is not


def check_parity(parities: Sequence[Parity], end: str = "Nothing was sealed.") -> None:
    """Raise ParityError, with the graph, the tensor and the numbers, unless every output is close enough.

    Parameters
    ----------
    end : last sentence of the error, on what became of the graph
    """
    for parity in parities:
        what, reference = f"{parity.graph} output {parity.output!r}", REFERENCES[parity.reference]
        if not parity.max_error <= parity.tolerance:  # NaN is not, either
            raise ParityError(
                f"{what} differs from {reference} by {parity.max_error:.3g} of its largest value; "
                f"{parity.tolerance:.3g} is allowed. {end}"
            )
        if not parity.passed:
            raise ParityError(
                f"{what} has a signal-to-noise ratio of {parity.snr_db:.1f} dB, compared with {reference}; "
                f"{parity.least_snr_db:.1f} dB is the least for numbers that are rounded as its are. {end}"
            )
