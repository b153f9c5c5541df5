"""What of ONNX Runtime is in progress, so that any thread can end it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

from ldm_export.errors import CancelledError


class Running:
    """The calls of one backend's sessions that run, and the sessions that are being opened."""

    def __init__(self) -> None:
        self._runs: list[Any] = []
        self._loads: list[tuple[Any, list[bool]]] = []

    def interrupt(self) -> None:
        """End all of them, from any thread; each raises CancelledError where it was called."""
        for options in list(self._runs):
            options.terminate = True
        for options, ended in list(self._loads):
            ended.append(True)
            options.set_load_cancellation_flag(True)

    @contextmanager
    def run(self) -> Iterator[Any]:
        """The ``RunOptions`` of one call.

        Raises
        ------
        CancelledError
            If `interrupt` ended it.
        """
        from onnxruntime import RunOptions

        options = RunOptions()
        options.log_severity_level = 4  # what is wrong is raised, and need not be printed
        self._runs.append(options)
        try:
            yield options
        except Exception as error:
            if options.terminate:
                raise CancelledError("Interrupted.") from error
            raise
        finally:
            self._runs.remove(options)

    def opened(self, options: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, a session with these ``SessionOptions``, from another thread.

        The thread that opens a process's first session rounds subnormals to zero from then on, which the application's
        arithmetic would suffer from. Where the thread that waits is interrupted (Ctrl-C), the opening is ended first:
        a process that exits while ONNX Runtime opens a session crashes.

        Raises
        ------
        CancelledError
            If `interrupt` ended it.
        """
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.extend((make(), None))
            except Exception as error:  # for the thread that waits
                outcome.extend((None, error))

        ended: list[bool] = []
        thread = Thread(target=run)
        self._loads.append((options, ended))
        try:
            thread.start()
            thread.join()
        except BaseException:
            options.set_load_cancellation_flag(True)
            thread.join()
            raise
        finally:
            self._loads.remove((options, ended))
        made, error = outcome
        if ended and error is not None:
            raise CancelledError("Interrupted.") from error
        if error is not None:
            raise error
        return made
