from __future__ import annotations

from pathlib import Path

import click

import ldm_export


@click.command()
def command() -> None:
    """Print where the sources of the C and C++ runtime are, for cmake -S and add_subdirectory."""
    click.echo(Path(ldm_export.__file__).parent / "cpp")
