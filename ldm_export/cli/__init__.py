"""The command line: one small file a command, which parses, calls one library function and prints."""

import os
import signal
import threading


def _leave(*_: object) -> None:
    os.write(2, b"\nAborted!\n")
    os._exit(1)


# Ctrl-C while modules are imported would otherwise end in a traceback; nothing has begun yet that could be put away.
_early = threading.current_thread() is threading.main_thread()
_early = _early and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _early:
    signal.signal(signal.SIGINT, _leave)
try:
    from ldm_export.cli.main import main
finally:
    if _early:
        signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["main"]
