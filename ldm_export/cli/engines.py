"""What there is to say of TensorRT engines, on the console."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ldm_export.bundle.targets.engines import EngineTarget
from ldm_export.cli.options import console


def print_engine(target: EngineTarget, name: str, took: str, *, kinds: bool = False) -> None:
    """Print the size and layers by precision, with ``kinds`` also by kind, and what the graph was compared with."""
    size_mb = target.files[target.engines[name].path].size_bytes / 1e6
    _line(name, f"{size_mb:8.1f} MB, {took}")
    report = target.report.get(name, {})
    if "compared" not in report:  # of an ldm_export that did not compare
        return
    counts = Counter[str]()
    for by_precision in report["layers"].values():
        counts.update(by_precision)
    _line("", f"{counts.total()} layers: {', '.join(f'{key} {count}' for key, count in counts.most_common())}")
    for precision in counts if kinds else ():
        of = {kind: found[precision] for kind, found in report["layers"].items() if precision in found}
        _line("", f"{precision}: {', '.join(f'{kind} {count}' for kind, count in sorted(of.items()))}")
    if kept := report.get("kept_in_fp32"):
        _line("", f"in fp32: {', '.join(kept)}")
    _line("", "; ".join(map(_sentence, report["compared"])))


def _sentence(compared: dict[str, Any]) -> str:
    graph, against = compared["graph"], compared["against"]
    if "error" not in compared:
        return f"{graph} was compared with {against}"
    return f"{graph} differs from {against} by {compared['error']:.1e} ({compared['allowed']:.0e} allowed)"


def _line(name: str, text: str) -> None:
    console.print(f"{name:15} {text}")
