"""The whole chain on one model: export it, and measure the bundle beside PyTorch.

Where a student of the model is shipped, a network that the recipe cpu-fast taught to draw the same in few steps, it is
exported too and measured beside its teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_export.bench.gates import judge
from ldm_export.bench.harness import Bench, BenchOptions, Document, results_by_variant
from ldm_export.bench.variants import PROMPTS
from ldm_export.checkpoint import LatentDiffusion, shipped_checkpoints
from ldm_export.errors import InputError
from ldm_export.export.chain import export_bundle
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.verify.gates import Gate

STUDENT = "{}-fast"
"""Name of each shipped model's student."""
BUNDLE, FAST = "bundle", "fast.bundle"
OPTIONS = BenchOptions(prompts=PROMPTS, batch=4, warm_up=1, repeats=4, backends=("cpu",))
GATES = (Gate("psnr", 45.0), Gate("parity", 1.0))
"""What the bundle must reach: pictures that no eye can tell from PyTorch's, and graphs within their tolerances."""


def run_demo(
    checkpoint: LatentDiffusion, folder: Path, progress: Callable[[str], None], options: BenchOptions = OPTIONS
) -> Document:
    """Export ``checkpoint`` to ``folder/bundle``, and its student to ``folder/fast.bundle`` if one is shipped; measure
    them and PyTorch, bit by bit in ``folder/demo.json``. The document says in ``gates`` what the bundle reached."""
    if not checkpoint.reads_text:
        raise InputError(
            f"The demo draws prompts, and {checkpoint.name} reads no text. Use `ldm-export export`, its bundle, and "
            "`ldm-export verify --against`."
        )
    models = {BUNDLE: checkpoint}
    if (name := STUDENT.format(checkpoint.name)) in shipped_checkpoints():
        models[FAST] = open_checkpoint(name)
    for target, model in models.items():
        progress(f"export of {model.name}")
        build_ort_cpu(export_bundle(model, folder / target, force=True, progress=progress), progress)
    bench = Bench([folder / target for target in models], checkpoint, options)
    document = bench.run(folder / "demo.json", "ldm-export demo", resume=False, progress=progress)
    document["gates"] = [gate for gate in judged(document) if gate["variant"] == BUNDLE]
    return document


def judged(document: Document) -> list[dict[str, Any]]:
    return judge(GATES, results_by_variant(document), document["baseline"])
