"""Every error that this package raises on purpose.

    LdmExportError
    ├── InputError          an argument that cannot be used: unknown sampler, odd size, bad strength, unreadable image
    ├── CheckpointError     a checkpoint that cannot be opened: missing, truncated, mis-shaped, pickled
    ├── BundleError         a bundle that cannot be trusted: wrong hash, missing file, path that leaves the folder
    ├── ExportError         an export that could not be finished: full disk, unsupported operator
    ├── ParityError         a graph that does not compute what the PyTorch model computes
    ├── BackendError        a backend that is not installed or cannot run here
    ├── NumericalError      latents or pixels that are no finite numbers, of which no picture can be made
    └── CancelledError      a generation that its callback, or an interruption, stopped

A message is one to three short sentences: what was given; what is allowed; what to do. The command line prints it
without a traceback and exits with ``exit_code``: 2 for wrong input, 1 where a check ran and failed.
"""

import sys
import warnings


class LdmExportError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 2


class InputError(LdmExportError):
    """An argument that cannot be used."""


class CheckpointError(LdmExportError):
    """A checkpoint that cannot be opened."""


class BundleError(LdmExportError):
    """A bundle that is incomplete, altered or of another format version."""


class ExportError(LdmExportError):
    """An export that could not be finished."""


class ParityError(LdmExportError):
    """A graph whose numbers are not those of the PyTorch model."""

    exit_code = 1


class BackendError(LdmExportError):
    """A backend that is not installed or cannot run on this machine."""


class NumericalError(LdmExportError):
    """Latents or pixels that are no finite numbers."""


class CancelledError(LdmExportError):
    """A generation that its callback, or an interruption, stopped."""

    exit_code = 1


def warn(message: str) -> None:
    """Give a UserWarning that names the caller's line: that of the first frame outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "ldm_export":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
