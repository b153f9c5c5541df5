"""What the C++ runtime makes of each case of the table of hostile bundles, in a process of its own.

    python -m tests.cpp.hostile_worker LIBRARY FOLDER [NAME]

prints one JSON line a case as it is done: its number, the status of ldm.h (0 where pictures came), the sentence, what
ran the graphs, and the warnings. So where the process dies, the last line says after which case.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.cpp.conftest import binding_of
from tests.hostile import CASES, Case, write_case


def outcome(binding: Any, ldm: Any, case: Case, folder: Path) -> dict[str, Any]:
    """Open a case's bundle and generate what it asks for."""
    told: list[str] = []
    pipeline = None
    try:
        pipeline = binding.Pipeline(
            ldm, str(folder), warn=told.append, backend=b"cpu", threads=1, verify=int(case.verify)
        )
        if case.asks is not None:
            asks = dict(case.asks)
            prompts = asks.pop("prompts")
            asks["sampler"] = asks["sampler"].encode()
            if asks.pop("image", False):
                info = pipeline.info()
                asks["image"] = bytes([99]) * (info.height * info.width * info.channels)
            pipeline.draw(prompts, **asks)
        return {"status": 0, "said": "", "backend": pipeline.info().backend.decode(), "warnings": told}
    except binding.LdmError as error:
        return {"status": error.status, "said": str(error), "backend": "", "warnings": told}
    finally:
        if pipeline is not None:
            pipeline.close()


def main(library: str, scratch: str, name: str = "") -> None:
    binding = binding_of()
    ldm = binding.load(library)
    assert isinstance(ldm, ctypes.CDLL)
    for number, case in enumerate(CASES):
        if name and name not in case.name:
            continue
        holder = Path(scratch) / str(number)
        write_case(case, holder / "bundle")
        print(json.dumps({"number": number, **outcome(binding, ldm, case, holder / "bundle")}), flush=True)
        shutil.rmtree(holder)


if __name__ == "__main__":
    main(*sys.argv[1:])
