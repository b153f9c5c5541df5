"""Whatever goes wrong is one sentence; whatever is printed is printed as it is; Ctrl-C ends it all."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

import ldm_export.cli.options
from ldm_export.bundle.atomic import remove_unfinished, write_whole
from ldm_export.cli import interruption, main
from ldm_export.cli.terminal import PlainConsole, printable
from ldm_export.errors import BackendError, InputError

PROGRAM = [sys.executable, "-c", "from ldm_export.cli import main; main(prog_name='ldm-export')"]
CLI = Path(ldm_export.cli.options.__file__).parent


# --- errors ---------------------------------------------------------------------------------------------------------


def raised(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def told(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> tuple[int, str]:
    """Exit code and output of ``doctor`` where its work ends with an error."""
    monkeypatch.setattr("ldm_export.cli.doctor.diagnose", raised(error))
    done = CliRunner().invoke(main, ["doctor"])
    assert isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


ERRORS: dict[str, tuple[BaseException, int, str]] = {
    "ours": (InputError("A thing\nis \x1b[2J wrong."), 2, r"error: A thing is \x1b[2J wrong."),
    "memory": (MemoryError(), 2, "needs more memory"),
    "memory of torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "needs more memory"),
    "memory of C++": (RuntimeError("std::bad_alloc"), 2, "needs more memory"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "/x/[red]y"), 2, "/x/[red]y: No space left"),
    "long name": (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, "a: File name too long. Name another"),
    "not allowed": (PermissionError(errno.EACCES, "Permission denied", b"b"), 2, "b: Permission denied"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", Path("c")), 2, "Read-only file system"),
    "of no file": (OSError(errno.EIO, "Input/output error"), 2, "refuses to read or write: Input/output error"),
    "not text": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 2, "as utf-8. Use UTF-8."),
    "surrogate": (UnicodeEncodeError("ascii", "\xe9", 0, 1, "no"), 2, "as ascii"),
    "nested": (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
    "reader gone": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    "interrupted": (KeyboardInterrupt(), 1, "Aborted!"),
    "missing package": (ModuleNotFoundError("No module named 'onnx'", name="onnx.helper"), 2, "ldm_export[export]"),
    "usage": (click.UsageError("no \x9b2J such"), 2, r"Error: no \x9b2J such"),
    "defect": (KeyError("boom"), 70, "a defect of ldm_export, not of what it was given: KeyError: 'boom'. Set LDM_EX"),
    "assertion": (AssertionError(), 70, "not of what it was given: AssertionError. Set"),
    "unknown package": (ModuleNotFoundError("No module named 'foo'", name="foo"), 70, "No module named 'foo'"),
    "without a number": (OSError("libfoo.so: cannot open"), 70, "OSError: libfoo.so"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_every_error_is_one_sentence_and_an_exit_code(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    error, code, sentence = ERRORS[case]
    exit_code, output = told(monkeypatch, error)
    assert exit_code == code
    assert sentence in output
    assert "Traceback" not in output
    assert "\x1b" not in output
    assert len(output.strip().splitlines()) <= (4 if case == "usage" else 1)


def test_a_traceback_is_shown_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LDM_EXPORT_TRACEBACK", "1")
    code, output = told(monkeypatch, KeyError("boom"))
    assert code == 70
    assert "Traceback" in output + capsys.readouterr().err


def test_an_error_after_ctrl_c_is_an_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption.happened, "is_set", lambda: True)
    assert told(monkeypatch, BackendError("terminated")) == (1, "Aborted!\n")


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 120, **options}
    return subprocess.run([*PROGRAM, *map(str, words)], **given)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_stdout_that_is_full_or_closed(tiny_bundle: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("inspect", tiny_bundle, "--json", stdout=full)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "No space left on device. Make room" in done.stderr
        assert run("inspect", tiny_bundle / "none", stderr=full).returncode == 2
    closed = subprocess.run(
        ["sh", "-c", '"$0" "$@" >&-', *PROGRAM, "inspect", str(tiny_bundle)], stderr=subprocess.PIPE, text=True
    )
    assert closed.returncode == 2
    assert closed.stderr == "error: The system refuses to read or write: Bad file descriptor. Write elsewhere.\n"


# --- what is printed ------------------------------------------------------------------------------------------------


def test_nothing_printed_is_markup_or_a_command_to_the_terminal() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, soft_wrap=True, force_terminal=True, width=200)
    strange = "[/red]x [bold]y :smile: \x1b]0;t\x07\x9b2J\u202eab\r\udcff\u2066 \U0001f98a\u200d"
    table = Table("[/h]", title="[/t]\x1b[2J")
    table.add_row(strange)
    console.print(table)
    console.print(strange, style="red")
    text = file.getvalue()
    shown = r"[/red]x [bold]y :smile: \x1b]0;t\x07\x9b2J\u202eab\r\udcff\u2066 " + "\U0001f98a\u200d"
    assert text.count(shown) == 2
    assert r"[/t]\x1b[2J" in text
    assert "[/h]" in text
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert printable("a\tb\nc") == "a\tb\nc"


def test_all_commands_print_by_consoles_that_are_plain() -> None:
    """No module of the command line makes a console, or lets a progress bar read markup."""
    for file in CLI.glob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert ("Console(" in source) == (file.name == "terminal.py"), file
        assert source.count("TextColumn(") == source.count("markup=False)"), file
        assert "from rich.markup" not in source, file
        assert " print(" not in source, file
    assert isinstance(ldm_export.cli.options.console, PlainConsole)
    assert isinstance(ldm_export.cli.options.status, PlainConsole)
    assert issubclass(PlainConsole, Console)


def test_inspect_shows_names_as_they_are(tiny_bundle: Path, tmp_path: Path) -> None:
    name = "[/red]\x1b[2J"
    document = json.loads((tiny_bundle / "manifest.json").read_text())
    document["source"]["checkpoint"] = document["model"]["k\x9b"] = name
    for file in tiny_bundle.rglob("*"):
        if file.is_file() and file.name != "manifest.json":
            (tmp_path / file.relative_to(tiny_bundle)).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, tmp_path / file.relative_to(tiny_bundle))
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    done = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert done.exit_code == 0
    assert done.output.startswith(r"[/red]\x1b[2J, exported by")
    assert not {"\x1b", "\x9b"} & {*done.output}


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / ("é" * 120 + ".png")
    write_whole(file, b"first")
    file.chmod(0o640)
    (tmp_path / "link").symlink_to(file)
    write_whole(tmp_path / "link", b"second")
    assert file.read_bytes() == b"second"
    assert file.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raised(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            write_whole(file, b"third")
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # killed just here
        with pytest.raises(OSError, match="full"):
            write_whole(file, b"third")
    assert file.read_bytes() == b"second"
    assert len(list(file.parent.iterdir())) == 2
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):  # that nobody reads
        write_whole(tmp_path / "pipe", b"gone")
    write_whole(Path("/dev/null"), b"gone")
    assert not Path("/dev/null").is_file()


def test_what_is_unfinished_is_removed_before_an_end_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [tmp_path / ".a.partial-1-aa", tmp_path / ".b.partial-1-bb"]
    left[0].mkdir()
    left[1].write_bytes(b"half")
    monkeypatch.setattr("ldm_export.bundle.atomic._unfinished", {*left})
    remove_unfinished()
    assert list(tmp_path.iterdir()) == []


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------

STUCK = """
import sys, time, hashlib
from pathlib import Path
import ldm_export.cli.doctor as doctor
from ldm_export.cli import interruption, main
from ldm_export.bundle.atomic import partial_folder
from ldm_export.runtime.backends.base import Backend
interruption.PATIENCE_S = 0.5
class Fake(Backend):
    def interrupt(self):
        print("told", file=sys.stderr)
backend = Fake()
def diagnose(*_):
    with partial_folder(Path(sys.argv[1]) / "bundle"):
        print("begun", file=sys.stderr, flush=True)
        {work}
doctor.diagnose = diagnose
main(["doctor"], prog_name="ldm-export")
"""
IN_C = 'hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)'
"""Minutes in which Python's own code does not run in the main thread."""


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
@pytest.mark.parametrize("work", ["time.sleep(60)", IN_C], ids=["in Python", "in C"])
def test_ctrl_c_ends_a_command_and_leaves_nothing(work: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK.format(work=work), str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what nohup ignores, the child would ignore, too
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "begun\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 1
    lines = said.split()
    assert lines[-1] == "Aborted!"
    assert {*lines[:-1]} == ({"told"} if work == IN_C else {*lines[:-1]} & {"told"})
    assert list(tmp_path.iterdir()) == []


# --- privacy --------------------------------------------------------------------------------------------------------


def test_nothing_is_written_outside_the_cache_that_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime would leave the id of the device in the home folder, and send events."""
    pytest.importorskip("onnxruntime")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ORT_") and k not in ("CI", "XDG_CACHE_HOME")}
    opens = f"from ldm_export.runtime import Pipeline; Pipeline.open({str(tiny_bundle)!r}, backend='cpu').load()"
    draws = ["generate", str(tiny_bundle), "cat", "-o", str(tmp_path / "a.png"), "--steps", "10", "--backend", "cpu"]
    for command in ([*PROGRAM, *draws], [*PROGRAM, "verify", str(tiny_bundle)], [sys.executable, "-c", opens]):
        subprocess.run(command, env={**kept, "HOME": str(tmp_path / "home")}, check=True, capture_output=True)
    written = [file for file in (tmp_path / "home").rglob("*") if file.is_file()]
    assert [file for file in written if (tmp_path / "home" / ".cache" / "ldm_export") not in file.parents] == []


@pytest.mark.parametrize("given", [None, "", "0", "false"])
def test_telemetry_is_off_whatever_is_set(given: str | None) -> None:
    kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    env = kept if given is None else {**kept, "ORT_DISABLE_TELEMETRY": given}
    code = "import os, ldm_export; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"
