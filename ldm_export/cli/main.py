"""``ldm-export``: the group of commands, and the one place where errors become messages and exit codes.

Whatever goes wrong is one sentence on stderr. An error that nobody foresaw is called a defect of this program, with
exit code 70; with ``LDM_EXPORT_TRACEBACK=1`` in the environment every error shows its traceback too.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ldm_export import __version__
from ldm_export.cli.interruption import EXIT_CODE, happened, interruptible
from ldm_export.cli.terminal import errors, give_up, prepare_streams
from ldm_export.errors import InputError, LdmExportError

COMMANDS = {
    "demo": "The whole chain on the shipped model: export, draw with and without PyTorch, compare.",
    "train": "Train a latent diffusion model on a folder of pictures.",
    "adapt": "Teach a checkpoint what is on a few pictures: a LoRA file.",
    "export": "Turn a checkpoint into a bundle that runs without PyTorch.",
    "build": "Make what a bundle runs faster with on one kind of machine.",
    "refit": "Put other weights into TensorRT engines.",
    "lora": "Make an adapter usable when a bundle draws.",
    "generate": "Draw pictures from a bundle.",
    "evaluate": "Measure how good a checkpoint's or a bundle's pictures are.",
    "bench": "Measure bundles, and PyTorch beside them: latency, likeness, memory, quality; an HTML report.",
    "card": "Measure how true a bundle is to its checkpoint, and how fast: one page, one JSON.",
    "tune": "Search what can be done to a bundle on this machine within a budget of quality.",
    "verify": "Check a bundle's hashes and contract, and with --against its numbers.",
    "inspect": "Show what a bundle holds, or how a picture was generated.",
    "plan": "Add a sampling plan to a bundle.",
    "fit": "Fit a plan of few network calls to what a bundle generates in many.",
    "cmake-dir": "Show where the sources of the C and C++ runtime are.",
    "doctor": "Show what is installed here, and what is missing for what.",
}
EXTRAS = {
    "onnxruntime": "cpu",
    "torch": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "ldm_reference": "export",
    "accelerate": "train",
    "peft": "adapt",
    "tensorboardX": "train",
    "tomli": "train",
}

DEFECT_CODE = 70
"""Exit code of an error that nobody foresaw, as sysexits.h has it."""
TRACEBACK = "LDM_EXPORT_TRACEBACK"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_MEMORY = re.compile(
    r"bad_alloc|bad allocation|(can't|cannot|failed to) allocate memory|out of memory", re.IGNORECASE
)


class Commands(click.Group):
    """Imports a command when it is used, so that ``generate`` starts without loading what only ``export`` needs, and is
    the one place where errors become sentences and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ldm_export.cli.{name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run as a program: as `main`, and Ctrl-C ends it whatever it is doing."""
        prepare_streams()
        with interruptible():
            return self.main(*args, **options)

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command and leave with its exit code, whatever happens in it."""
        options["standalone_mode"] = False
        try:
            with warnings.catch_warnings(), _notes_printed():
                warnings.showwarning = _print_warning  # type: ignore[assignment]  # it needs two of the six arguments
                code = super().main(*args, **options)
            sys.stdout.flush()
        except click.Abort:
            code = _say("Aborted!", EXIT_CODE)
        except BrokenPipeError:  # who read what is printed has read enough
            code = EXIT_CODE
            give_up(sys.stdout)
        except Exception as error:
            code = _say("Aborted!", EXIT_CODE) if happened.is_set() else _report(error)
        try:
            sys.stdout.flush()
        except OSError as error:
            give_up(sys.stdout)
            code = code or _report(error)
        sys.exit(code)


def _report(error: Exception) -> int:
    """Print an error as a sentence; gives the exit code."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if isinstance(error, click.ClickException):
        text = io.StringIO()
        error.show(text)
        return _say(text.getvalue().rstrip(), error.exit_code)
    said = sentence(error)
    if said is not None:
        return _say(f"error: {said}", getattr(error, "exit_code", InputError.exit_code))
    kind = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _say(
        f"error: This is a defect of ldm_export, not of what it was given: {_one_line(kind)}. "
        f"Set {TRACEBACK}=1, run it again, and report what it prints.",
        DEFECT_CODE,
    )


def sentence(error: Exception) -> str | None:
    """What went wrong and what to do, or None for an error that nobody foresaw."""
    if isinstance(error, LdmExportError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRAS:
            return f"This needs {missing}, which is not installed. Run: pip install 'ldm_export[{EXTRAS[missing]}]'"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return (
            "This needs more memory than the machine, or a limit on this process, gives. Ask for fewer or smaller "
            "pictures, or end other programs."
        )
    if isinstance(error, OSError):
        if error.errno is None:  # not the system's: a library's own
            return None
        why = error.strerror or os.strerror(error.errno)
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        if error.errno in FULL:
            remedy = "Make room, or write elsewhere."
        else:
            remedy = "Name another file or folder." if where else "Write elsewhere."
        return f"{where or 'The system refuses to read or write: '}{why}. {remedy}"
    if isinstance(error, UnicodeError):
        return f"Text cannot be read or written as {getattr(error, 'encoding', 'UTF-8')}. Use UTF-8."
    if isinstance(error, RecursionError):
        return "What was given is nested too deeply to be read. Give a file that is not."
    return None


def _say(text: str, code: int) -> int:
    try:
        errors.print(_few_lines(text), style=None if text == "Aborted!" else "red")
    except (OSError, ValueError):  # stderr is full or closed
        give_up(sys.stderr)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _few_lines(text: str) -> str:
    """An error as one line of at most 2000 characters; click's, which begin with the usage, as they are."""
    if text.startswith("error: "):
        text = _one_line(text)
    return text if len(text) <= 2000 else f"{text[:1900]} ... {text[-90:]}"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0, done; 1, a check failed, or interrupted; 2, what was given cannot be used; 70, a defect of "
    f"this program ({TRACEBACK}=1 shows where).",
)
@click.version_option(__version__, prog_name="ldm-export")
def main() -> None:
    """Take a latent diffusion model trained in PyTorch and make it something an application can ship."""


def _print_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        errors.print(f"warning: {message}", style="yellow")


class _Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(record.getMessage())


@contextmanager
def _notes_printed() -> Iterator[None]:
    """Print what the library logs: what it found out on its own and goes by."""
    logger, printer = logging.getLogger("ldm_export"), _Printer(logging.INFO)
    level = logger.level
    logger.addHandler(printer)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(printer)


if __name__ == "__main__":
    sys.exit(main())
