"""Pictures of one GPU backend against the CPU's, by Python and by C++, for every sampler.

gpu_pictures.py FOLDER RESULT.json [--workload emoji64] [--backend cuda] [--library libldm.so] [--samplers ddim,euler]

FOLDER is that of ``gpu.py``; what of the workload is missing there is made. The reference is the plain fp32 bundle on
ONNX Runtime's CPU provider; compared with it are the fp32 and the fp16 bundle on the backend, and with ``--library``
the C++ runtime with the fp32 bundle on the same backend. A row holds the worst of its pictures. The exit code is 1 if a
picture is off by more than `SAME_PICTURE_DB`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import HALF, bundle_of, half_of
from benchmarks.peers.peer import GUIDANCE, PROMPTS, STEPS
from ldm_export.bench.harness import write_document
from ldm_export.errors import LdmExportError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends.base import one_line
from ldm_export.verify.metrics import psnr_db

SAMPLERS = ("ddim", "plms", "euler", "euler-ancestral", "heun", "dpmpp-2m", "unipc")
SAME_PICTURE_DB = {"fp32": 60.0, "fp16": 40.0, "fp32, C++": 60.0}
"""What the worst picture must reach, PSNR in dB; as in tests/runtime/test_gpu.py."""
LARGEST_DB = 200.0
"""Stands for equal pictures, whose PSNR is infinite."""
Generate = Callable[[str, str, int], Any]
"""Gives the picture, uint8 (H, W, C), of a sampler, a prompt and a seed."""


def python_pictures(bundle: Path, backend: str) -> tuple[Generate, str]:
    """The Python runtime on a bundle, and what it says that runs there."""
    pipeline = Pipeline.open(bundle, backend=backend)

    def generate(sampler: str, prompt: str, seed: int) -> Any:
        return pipeline.generate([prompt], sampler=sampler, steps=STEPS, guidance=GUIDANCE, seed=seed).images[0]

    return generate, pipeline.backend


def cpp_pictures(library: Path, bundle: Path, backend: str) -> tuple[Generate, str]:
    """The C++ runtime on a bundle, by the ctypes example, and what it says that runs there."""
    import ldm_export

    example = Path(ldm_export.__file__).parent / "cpp" / "examples" / "ldm_ctypes.py"
    spec = importlib.util.spec_from_file_location("ldm_ctypes", example)
    assert spec is not None
    assert spec.loader is not None
    binding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(binding)
    pipeline = binding.Pipeline(binding.load(str(library)), str(bundle), backend=backend.encode())
    info = pipeline.info()

    def generate(sampler: str, prompt: str, seed: int) -> Any:
        pixels = pipeline.draw([prompt], sampler=sampler.encode(), steps=STEPS, guidance=GUIDANCE, seed=seed)
        return np.frombuffer(pixels, np.uint8).reshape(info.height, info.width, info.channels)

    return generate, info.backend.decode()


def compare(variants: dict[str, Callable[[], tuple[Generate, str]]], samplers: tuple[str, ...]) -> dict[str, Any]:
    """The worst PSNR of each variant to the first one, by sampler; the reason instead where a variant does not run."""
    rows: dict[str, Any] = {}
    expected: dict[tuple[str, int], Any] = {}
    for name, start in variants.items():
        try:
            generate, runs_on = start()
            worst = {}
            for sampler in samplers:
                reached = []
                for seed, prompt in enumerate(PROMPTS):
                    picture = generate(sampler, prompt, seed)
                    reference = expected.setdefault((sampler, seed), picture)
                    reached.append(min(psnr_db(picture, reference), LARGEST_DB))
                worst[sampler] = min(reached)
            rows[name] = {"runs_on": runs_on, "worst_psnr_db": worst}
        except (LdmExportError, OSError, RuntimeError) as error:
            rows[name] = {"left_out": one_line(error)}
        print(name, json.dumps(rows[name]), file=sys.stderr)
    return rows


def faults_of(rows: dict[str, Any]) -> list[str]:
    """Sides with a picture that is off by too much, each with its sampler and PSNR."""
    return [
        f"{name} {sampler}: {db:.1f} dB, at least {SAME_PICTURE_DB[name]} wanted"
        for name, row in rows.items()
        for sampler, db in row.get("worst_psnr_db", {}).items()
        if name in SAME_PICTURE_DB and not db >= SAME_PICTURE_DB[name]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares a GPU's pictures with the CPU's.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--workload", default="emoji64")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--samplers", type=lambda text: tuple(text.split(",")), default=SAMPLERS)
    given = parser.parse_args()
    place = given.folder / given.workload
    device = "cpu" if given.backend == "cpu" else "cuda"
    bundle_of(given.workload, place, device)
    variants: dict[str, Callable[[], tuple[Generate, str]]] = {"cpu": lambda: python_pictures(place / "bundle", "cpu")}
    if given.library is None:
        half_of(place)
        variants["fp32"] = lambda: python_pictures(place / "bundle", given.backend)
        variants["fp16"] = lambda: python_pictures(place / HALF, given.backend)
    else:
        variants["fp32, C++"] = lambda: cpp_pictures(given.library, place / "bundle", given.backend)
    rows = compare(variants, given.samplers)
    faults = faults_of(rows)
    write_document({"workload": given.workload, "backend": given.backend, "rows": rows, "faults": faults}, given.result)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
