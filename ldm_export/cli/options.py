"""Options and outputs that several commands share."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ldm_export.bundle.atomic import check_output, write_output
from ldm_export.cli.terminal import console, printable, status
from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, read_text

__all__ = ["check_output", "console", "status", "write_output"]

Function = TypeVar("Function", bound=Callable[..., Any])

folder = click.Path(path_type=Path)


def json_option(function: Function) -> Function:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)


def bundle_argument(function: Function) -> Function:
    return click.argument("bundle", type=folder)(function)


def family_option(function: Function) -> Function:
    """Add ``--family FILE``, whose family is known to whatever opens a checkpoint from then on."""

    def read(_: click.Context, __: click.Parameter, file: Path | None) -> None:
        if file is not None:
            from ldm_export.families import read_family  # torch, which few commands need

            read_family(file)

    return click.option(
        "--family",
        type=folder,
        metavar="FILE",
        expose_value=False,
        callback=read,
        help="A Python file with a family of your own, as docs/families.md describes; its code is run.",
    )(function)


def lora_option(function: Function) -> Function:
    """Add ``--lora FILE[=SCALE]``, as texts for `adapters_from`."""
    return click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="FILE[=SCALE]",
        help="LoRA, LoHa, LoKr or DoRA, to merge into the checkpoint; the scale is 1 by default; repeatable.",
    )(function)


def adapters_from(loras: tuple[str, ...]) -> list[tuple[Path, float]]:
    """Files and strengths of ``--lora``; raises InputError for a strength that is no number."""
    found = []
    for text in loras:
        name, equals, scale = text.rpartition("=")
        if not equals or Path(text).exists():
            name, scale = text, "1"
        try:
            found.append((Path(name), float(scale)))
        except ValueError:
            raise InputError(f"--lora {text}: {scale!r} is no number. Give FILE=SCALE, such as {name}=0.8.") from None
    return found


def embedding_option(function: Function) -> Function:
    """Add ``--embedding FILE[=TOKEN]``, as texts for `embeddings_from`."""
    return click.option(
        "--embedding",
        "embeddings",
        multiple=True,
        metavar="FILE[=TOKEN]",
        help="Textual inversion, to put into the text encoders; the token is the file's own by default; repeatable.",
    )(function)


def embeddings_from(texts: tuple[str, ...]) -> list[tuple[Path, str | None]]:
    """Files and tokens of ``--embedding``."""
    found: list[tuple[Path, str | None]] = []
    for text in texts:
        signs = [place for place, sign in enumerate(text) if sign == "="]
        end = next((place for place in (len(text), *signs) if Path(text[:place]).exists()), [*signs, len(text)][0])
        found.append((Path(text[:end]), text[end + 1 :] if end < len(text) else None))
    return found


def print_json(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2, sort_keys=True))


def parity_line(record: Mapping[str, Any]) -> str:
    """A record of the manifest's ``parity`` as a line."""
    from ldm_export.bundle.parity import PYTORCH, REFERENCES  # numpy, which few commands need

    reference = REFERENCES.get(record.get("reference", PYTORCH), "PyTorch")
    return (
        f"{record['graph']:15} {record['output']:20} differs from {reference} by {record['max_error']:.1e} "
        f"(allowed {record['tolerance']:.0e})"
    )


def was_given(option: str) -> bool:
    """Whether an option of the command that runs was typed, by its parameter's name."""
    return click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE


def prompts_from(file: Path | None, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Prompts of ``--prompts FILE``, one a line, or of ``--prompt``, of which one may be given."""
    if file is None:
        return texts
    if texts:
        raise InputError("--prompts and --prompt were both given. Give one of them.")
    try:
        lines = tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
    except (OSError, MalformedError) as error:
        raise InputError(f"{file} cannot be read as text ({error}). Give a file with one prompt a line.") from error
    if not lines:
        raise InputError(f"{file} has no prompts. Give a file with one a line.")
    return lines


def command_line(ctx: click.Context) -> str:
    """What was typed, from what it was understood as."""
    words = ["ldm-export", ctx.info_name or ""]
    for param in ctx.command.params:
        assert param.name is not None
        if ctx.get_parameter_source(param.name) is not ParameterSource.COMMANDLINE or param.name == "resume":
            continue
        value = ctx.params[param.name]
        for each in value if isinstance(value, tuple) else (value,):
            flag = isinstance(each, bool)
            words += ([] if isinstance(param, click.Argument) else [param.opts[0]]) + ([] if flag else [str(each)])
    return shlex.join(words)


def size_from_text(text: str) -> tuple[int, int]:
    """``64x96``, a value of ``--size``, as height and width in pixels."""
    found = re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", text)
    if found is None:
        raise InputError(f"--size {text[:40]} is not a size; it is HEIGHTxWIDTH in pixels, such as 64x64.")
    return int(found[1]), int(found[2])


def margins_from_text(text: str) -> tuple[int, int, int, int]:
    """``left=64,right=64``, a value of ``--outpaint``, as pixels on the left, at the top, on the right, at the
    bottom."""
    margins = dict.fromkeys(("left", "top", "right", "bottom"), 0)
    for part in text.split(","):
        found = re.fullmatch(r" *(left|top|right|bottom)=([0-9]{1,6}) *", part)
        if found is None or margins[found[1]]:
            raise InputError(
                f"--outpaint {text[:60]} is none; it is sides with their pixels, each once, such as left=64,right=64."
            )
        margins[found[1]] = int(found[2])
    if not any(margins.values()):
        raise InputError(f"--outpaint {text[:60]} adds nothing. Give at least one side some pixels, or leave it out.")
    left, top, right, bottom = margins.values()
    return left, top, right, bottom


@contextmanager
def stages(title: str) -> Iterator[Callable[[str], None]]:
    """A spinner that shows what is being done; gives the function to call with each new stage."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=status, transient=True, disable=not status.is_terminal) as progress:
        task = progress.add_task(title)
        yield lambda stage: progress.update(task, description=printable(f"{title}  {stage}"))


@contextmanager
def steps_bar(title: str) -> Iterator[Callable[..., None]]:
    """A bar over counted steps; gives the function to call with (done, of) and, if it changed, the title."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=status, transient=True, disable=not status.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, of, title=title: progress.update(
            task, completed=done, total=of, description=printable(title)
        )


@contextmanager
def logged_bar(title: str, every: int) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over long work; gives the function to call with what is done now, how much of it, and of how much. Where
    stderr is no terminal, every so many steps are a line there."""
    with steps_bar(title) as advance:

        def progress(what: str, done: int, of: int) -> None:
            advance(done, of, what)
            if not status.is_terminal and (done % every == 0 or done == of):
                click.echo(f"{what} {done}/{of}", err=True)

        yield progress
