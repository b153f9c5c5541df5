"""A process of its own that draws: what a program that ships the model pays for its first picture, and in memory.

    echo '{"bundle": "my.bundle", "backend": "cpu", "given": {"prompts": ["red apple"], "seed": [0]}}' |
    python -m ldm_export.bench.child

The request is one line of JSON. Prints ``drawn`` once the first picture is there and, after a second, the peak of its
resident memory in bytes; it holds what it holds until its input ends. Nothing is imported that its variant does not
need: a bundle is drawn without PyTorch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_export.processes import peak_rss_bytes


def main() -> None:
    request = json.loads(sys.stdin.readline())
    draw = opened(request)
    draw()
    print("drawn", flush=True)
    draw()
    print(json.dumps(peak_rss_bytes()), flush=True)
    sys.stdin.read()


def opened(request: dict[str, Any]) -> Callable[[], object]:
    """What draws a picture; opening it is part of what is timed."""
    given = request["given"]
    if "bundle" in request:
        from ldm_export.runtime import Pipeline

        pipeline = Pipeline.open(request["bundle"], backend=request["backend"], threads=request.get("threads"))
        return lambda: pipeline.generate(**given)
    from ldm_export.families import open_checkpoint, read_family
    from ldm_export.verify.torch_reference import TorchReference

    for file in request.get("families", ()):
        read_family(Path(file))
    adapters = [(Path(file), scale) for file, scale in request.get("adapters", ())]
    embeddings = [(Path(file), token) for file, token in request.get("embeddings", ())]
    reference = TorchReference(open_checkpoint(request["checkpoint"], adapters=adapters, embeddings=embeddings))
    return lambda: reference.draw_as(given)


if __name__ == "__main__":
    main()
