"""The command line: one small file a command, which parses, calls one library function and prints."""

import os
import signal


def _leave(*_: object) -> None:
    os.write(2, b"\nAborted!\n")
    os._exit(1)


# Ctrl-C while modules are imported would end in a traceback; nothing has begun yet that would have to be put away.
_own = signal.getsignal(signal.SIGINT)
try:
    if _own is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
except ValueError:  # not the main thread: this is imported by an application
    pass
try:
    from ldm_export.cli.main import main
finally:
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _own)

__all__ = ["main"]
