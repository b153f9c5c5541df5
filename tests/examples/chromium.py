"""A headless Chromium over the DevTools protocol's pipe: null-terminated JSON on the file descriptors 3 and 4."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


class Chromium:
    """One page of a browser of its own; ``errors`` is what its console showed as errors or warnings."""

    def __init__(self, program: str, profile: Path):
        (read_there, write_here), (read_here, write_there) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (read_there, write_there)]

        def adopt() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=adopt, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for descriptor in (read_there, write_there, *high):
            os.close(descriptor)
        self._to, self._from = os.fdopen(write_here, "wb", buffering=0), os.fdopen(read_here, "rb")
        self._count = 0
        self._session: dict[str, str] = {}
        self.errors: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._to.close()
        self._from.close()

    def open(self, url: str) -> None:
        """Load a page, its modules included."""
        self._call("Page.navigate", url=url)
        loaded = "document.readyState === 'complete' ? done() : addEventListener('load', done)"
        self.evaluate(f"new Promise((done) => {loaded})")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        done = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise AssertionError(json.dumps(done["exceptionDetails"]))
        return done["result"].get("value")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._read())
            self._note(answer)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _read(self) -> bytes:
        parts = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "chromium has ended"
            parts += byte
        return bytes(parts)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        bad = {
            "Runtime.exceptionThrown": lambda: True,
            "Runtime.consoleAPICalled": lambda: parameters["type"] in ("error", "warning", "assert"),
            "Log.entryAdded": lambda: parameters["entry"]["level"] in ("error", "warning"),
        }
        if bad.get(event.get("method", ""), lambda: False)():
            self.errors.append(json.dumps(parameters))
