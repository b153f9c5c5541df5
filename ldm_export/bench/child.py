"""A process of its own that draws: what a program that ships the model pays for its first picture, and in memory.

    echo '{"bundle": "my.bundle", "backend": "cpu", "given": {"prompts": ["red apple"], "seed": [0]}}' |
    python -m ldm_export.bench.child

It is told in one line. Prints ``drawn`` once the first picture is there and, after a second, the peak of its resident
memory in bytes; it holds what it holds until its input ends. Nothing is imported that this side does not need: a bundle
is drawn without PyTorch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from ldm_export.processes import peak_rss_bytes


def main() -> None:
    told = json.loads(sys.stdin.readline())
    draw = opened(told)
    draw()
    print("drawn", flush=True)
    draw()
    print(json.dumps(peak_rss_bytes()), flush=True)
    sys.stdin.read()


def opened(told: dict[str, Any]) -> Callable[[], object]:
    """What draws a picture; opening it is part of what is timed."""
    given = told["given"]
    if "bundle" in told:
        from ldm_export.runtime import Pipeline

        pipeline = Pipeline.open(told["bundle"], backend=told["backend"])
        return lambda: pipeline.generate(**given)
    from ldm_export.checkpoint import LatentDiffusion
    from ldm_export.verify.torch_reference import TorchReference

    reference = TorchReference(LatentDiffusion.open(told["checkpoint"]))
    return lambda: reference.draw_as(given)


if __name__ == "__main__":
    main()
