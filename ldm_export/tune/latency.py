"""How long a picture takes where drawing it whole takes too long: calculated from parts that were timed.

All calls of one kind take the same time, whatever the plan: a picture of few calls tells what one of many takes. With
DeepCache there are two kinds, the whole denoiser and its outermost blocks.
"""

from __future__ import annotations

import statistics

from ldm_export.runtime.results import Timings

WHOLE_S = 20.0
"""A picture that takes longer is not drawn whole to be timed."""
FEW_CALLS = 2
"""Network calls of one that is drawn instead; as many as a period of DeepCache has where that is more."""


def calculated(run: Timings, calls: int, every: int = 1) -> Timings:
    """What a picture of ``calls`` network calls takes, from one of fewer.

    Parameters
    ----------
    run : timings of at least ``every`` calls
    calls : network calls of the picture that is asked about
    every : the first of every so many calls runs the whole denoiser, the others its outermost blocks

    Returns
    -------
    As ``run``, with ``calls`` entries of ``denoiser_ms``; what the loop spends outside the network is spent a call.
    """
    kinds = [run.denoiser_ms[0::every], [ms for k, ms in enumerate(run.denoiser_ms) if k % every]]
    means = [statistics.mean(kind) if kind else 0.0 for kind in kinds]
    return Timings(
        text_ms=run.text_ms,
        encode_ms=run.encode_ms,
        denoiser_ms=[means[min(k % every, 1)] for k in range(calls)],
        loop_ms=run.loop_ms * calls / len(run.denoiser_ms),
        decode_ms=run.decode_ms,
    )
