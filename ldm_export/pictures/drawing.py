"""Drawing a list of pictures, one file each, which resumes where it was interrupted.

Pictures are drawn one at a time, so each is what drawing it alone gives, to the bit, and is on the disk, whole, as soon
as it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm_export.bundle.atomic import check_output
from ldm_export.errors import InputError
from ldm_export.pictures.files import check_text, read_picture_file, save_grid
from ldm_export.pictures.text import PictureRequest, options_of, parameters_text, requests_from
from ldm_export.runtime import Pipeline


def draw_files(
    pipeline: Pipeline,
    requests: Sequence[PictureRequest],
    paths: Sequence[Path],
    *,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, of: None,
    **options: Any,
) -> list[Path]:
    """Draw each request to its file, but for those whose file is there with exactly this request in it.

    Parameters
    ----------
    requests, paths : as many; of this pipeline's bundle
    force : replace files that are there with something else in them
    progress : called with the number of pictures that are done, and of all
    options : what a request does not have: ``image``, ``mask``, ``keep_pixels``, ``controls``, ``ip_adapter_image``,
        ``ip_adapter_scale`` and ``whole``, as `Pipeline.generate` takes them

    Returns
    -------
    The files that were drawn now, in order

    Raises
    ------
    InputError
        Before anything is drawn, if a file cannot be written or is there with something else in it and no ``force``.
    BackendError, NumericalError, CancelledError
        As `Pipeline.generate` does; what was drawn before stays.
    """
    waiting = [number for number in range(len(paths)) if _is_to_be_drawn(requests[number], paths[number], force)]
    for path in {paths[number].parent: paths[number] for number in waiting}.values():
        check_output(path)
    done = len(paths) - len(waiting)
    for number in waiting:
        progress(done, len(paths))
        images = pipeline.generate(**options_of([requests[number]]), **options).images
        save_grid(images, paths[number], [requests[number]])
        done += 1
    progress(done, len(paths))
    return [paths[number] for number in waiting]


def _is_to_be_drawn(request: PictureRequest, path: Path, force: bool) -> bool:
    """Whether a file is not there with this request in it; raises InputError where it is there with another."""
    check_text(path, parameters_text([request]))
    if not path.exists():
        return True
    try:
        if requests_from(read_picture_file(path).parameters or "") == (request,):
            return False
    except InputError:  # no picture, or of other tools
        pass
    if not force:
        raise InputError(f"{path} is there and is not the picture that was asked for. Use --force, or name another.")
    check_output(path)
    return True
