"""The memory that this process may still take, so that what cannot fit is refused before it is begun."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from ldm_export.errors import InputError

ALWAYS_BYTES = 64 << 20
"""What is begun without a question, which takes milliseconds to answer."""


def check_memory(least_bytes: int, what: str) -> None:
    """Raise InputError if ``what`` needs more memory than `available_bytes` gives."""
    available = None if least_bytes <= ALWAYS_BYTES else available_bytes()
    if available is not None and least_bytes > available:
        raise InputError(
            f"{what} need at least {least_bytes / 1e9:.1f} GB of memory; this process may have "
            f"{max(available, 0) / 1e9:.1f} GB. Ask for fewer or smaller pictures."
        )


def available_bytes() -> int | None:
    """The least of what the machine has left, swap included, and what limits on this process leave of it
    (``ulimit -v``, control groups); None where the system does not tell."""
    found = [*_machine(), *_address_space(), *_control_groups()]
    return min(found, default=None)


def _machine() -> list[int]:
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        return [(kib["MemAvailable"] + kib["SwapFree"]) * 1024]
    with suppress(OSError, ValueError, AttributeError):  # macOS: all of it, as what is free says little there
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return []


def _address_space() -> list[int]:
    if sys.platform == "win32":
        return []
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    taken = 0
    with suppress(OSError, ValueError, IndexError):
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        taken = int(pages) * os.sysconf("SC_PAGE_SIZE")
    return [limit - taken]


def _control_groups() -> list[int]:
    """What each control group (version 2 or 1) that this process is in, and those around it, leaves; the cache of
    files counts as left."""
    left = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = Path("/sys/fs/cgroup") / controllers
            limit, used = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            here = root / path.lstrip("/")
            for folder in {root, *(parent for parent in (here, *here.parents) if root in parent.parents)}:
                with suppress(OSError, ValueError, KeyError):
                    allowed = int((folder / limit).read_text(encoding="ascii"))  # "max" is no number: there is none
                    pairs = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                    cache = {key: int(value) for key, value in pairs}["inactive_file"]
                    left.append(allowed - int((folder / used).read_text(encoding="ascii")) + cache)
    return left
