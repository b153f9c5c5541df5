"""``ldm-export``: the group of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console

from ldm_export import __version__
from ldm_export.errors import InputError, LdmExportError

COMMANDS = {
    "demo": "The whole chain on the shipped model: export, draw with and without PyTorch, compare.",
    "train": "Train a latent diffusion model on a folder of pictures.",
    "export": "Turn a checkpoint into a bundle that runs without PyTorch.",
    "build": "Make what a bundle runs faster with on one kind of machine.",
    "refit": "Put other weights into TensorRT engines.",
    "generate": "Draw pictures from a bundle.",
    "evaluate": "Measure how good a checkpoint's or a bundle's pictures are.",
    "bench": "Measure bundles, and PyTorch beside them: latency, likeness, memory, quality; an HTML report.",
    "verify": "Check a bundle's hashes and contract, and with --against its numbers.",
    "inspect": "Show what a bundle holds.",
    "plan": "Add a sampling plan to a bundle.",
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
    "tensorboardX": "train",
    "tomli": "train",
}

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class Commands(click.Group):
    """Imports a command when it is used, so that ``generate`` starts without loading what only ``export`` needs."""

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

    def invoke(self, ctx: click.Context) -> Any:
        """Print an error of ours, or that a package is missing, as one sentence and leave with the exit code."""
        with warnings.catch_warnings(), _notes_printed():
            warnings.showwarning = _print_warning  # type: ignore[assignment]  # it needs two of the six arguments
            try:
                return super().invoke(ctx)
            except LdmExportError as error:
                errors.print(f"error: {error}", style="red", markup=False)
                ctx.exit(error.exit_code)
            except ModuleNotFoundError as error:
                missing = (error.name or "").partition(".")[0]
                if missing not in EXTRAS:
                    raise
                hint = f"pip install 'ldm_export[{EXTRAS[missing]}]'"
                errors.print(
                    f"error: This needs {missing}, which is not installed. Run: {hint}", style="red", markup=False
                )
                ctx.exit(InputError.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ldm-export")
def main() -> None:
    """Take a latent diffusion model trained in PyTorch and make it something an application can ship."""


def _print_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        errors.print(f"warning: {message}", style="yellow", markup=False)


class _Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(record.getMessage(), markup=False)


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
