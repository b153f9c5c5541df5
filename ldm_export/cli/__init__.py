"""The command line: one small file a command, which parses, calls one library function and prints."""

from ldm_export.cli.main import main

__all__ = ["main"]
