"""A headless Chromium over its debugging pipe: opens a page at a width, tells what went wrong, takes a picture."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")


class Browser:
    """One tab. ``complaints`` are errors and warnings of the console, and whatever was asked of the network."""

    def __init__(self, commands: int, answers: BinaryIO):
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._loaded = False
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    _session: str | None = None

    def open(self, file: Path, width: int, height: int = 800, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", metrics)
        self._call("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self._loaded = False
        self._call("Page.navigate", {"url": file.resolve().as_uri()})
        while not self._loaded:
            self._note(self._read())

    def evaluate(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", {"expression": expression, "returnByValue": True})["result"]["value"]

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        told = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            width, height = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
            told["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", told)["data"]))

    def _call(self, method: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": dict(params or {})}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        parts = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has gone"
            parts += byte
        answer: dict[str, Any] = json.loads(parts)
        return answer

    def _note(self, event: Mapping[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        self._loaded |= method == "Page.loadEventFired"
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(params))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(params["request"]["url"])


@contextmanager
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    (their_commands, commands), (answers, their_answers) = os.pipe(), os.pipe()

    def as_3_and_4() -> None:  # where the browser looks for its pipe
        first, second = os.dup(their_commands), os.dup(their_answers)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, close_fds=False, preexec_fn=as_3_and_4, **quiet) as process:
            os.close(their_commands)
            os.close(their_answers)
            with os.fdopen(answers, "rb") as heard:
                try:
                    yield Browser(commands, heard)
                finally:
                    os.close(commands)
                    process.terminate()
