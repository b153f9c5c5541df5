"""Ctrl-C ends a command at once, also while a library computes that never asks Python.

The signal reaches Python's own code in the main thread only when that runs again. So another thread is woken at the
same time, which interrupts the backends that are open; what they run then raises, and the main thread gets its
KeyboardInterrupt. Where nothing ends within `PATIENCE_S`, or at a second Ctrl-C, the process leaves as it is, without
what it had not finished.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ldm_export.bundle.atomic import remove_unfinished

PATIENCE_S = 3.0
"""How long a library may take until the main thread runs again."""
UNWINDING_S = 15.0
"""How long the main thread may take to put things away."""
EXIT_CODE = 1

happened = threading.Event()
"""Set once Ctrl-C was pressed."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Watch for Ctrl-C; the process ends with this block, if it was pressed."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # nohup, or an application's own
        yield
        return
    received, sent = socket.socketpair()
    sent.setblocking(False)
    unwinding = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        happened.set()
        unwinding.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(received, unwinding), daemon=True).start()
    try:
        yield
    finally:
        if happened.is_set():
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(EXIT_CODE)  # an orderly end would wait for threads that still compute
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sent.close()


def _watch(received: socket.socket, unwinding: threading.Event) -> None:
    """The thread that is woken: bytes are numbers of signals, the end of them is the block's."""
    while (byte := received.recv(1)) != bytes([signal.SIGINT]):
        if not byte:
            return
    happened.set()
    received.settimeout(0.1)
    began = time.monotonic()
    while time.monotonic() - began < (UNWINDING_S if unwinding.is_set() else PATIENCE_S):
        _interrupt_backends()  # more than once: a graph may have begun to run meanwhile
        with suppress(TimeoutError):
            if received.recv(1) == bytes([signal.SIGINT]):
                break
    with suppress(Exception):
        remove_unfinished()
    cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
    with suppress(OSError):
        os.write(2, cursor + b"\nAborted!\n")
    os._exit(EXIT_CODE)


def _interrupt_backends() -> None:
    backends = sys.modules.get("ldm_export.runtime.backends.base")  # importing it here could wait for the main thread
    if backends is not None and hasattr(backends, "interrupt_all"):
        with suppress(Exception):
            backends.interrupt_all()
