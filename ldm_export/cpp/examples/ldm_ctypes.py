"""How another language binds ldm.h, shown with nothing but Python's ctypes.

python ldm_ctypes.py libldm.so emoji64.bundle "red apple" > apple.ppm
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_void_p
from typing import Any


class Step(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("index", c_uint32),
        ("count", c_uint32),
        ("timestep", c_double),
        ("latents", POINTER(c_float)),
        ("latents_shape", c_size_t * 4),
        ("preview", c_void_p),
    )


StepCallback = ctypes.CFUNCTYPE(ctypes.c_int, POINTER(Step), c_void_p)
WarningCallback = ctypes.CFUNCTYPE(None, c_char_p, c_void_p)


class OpenOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("backend", c_char_p),
        ("threads", c_int32),
        ("verify", c_int32),
        ("warning", WarningCallback),
        ("warning_user", c_void_p),
    )


class DrawOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("sampler", c_char_p),
        ("steps", c_uint32),
        ("guidance", c_double),
        ("negative_prompts", POINTER(c_char_p)),
        ("negative_prompt_count", c_size_t),
        ("seed", c_int64),
        ("seeds", POINTER(c_int64)),
        ("height", c_uint32),
        ("width", c_uint32),
        ("image", c_char_p),
        ("image_count", c_size_t),
        ("strength", c_double),
        ("class_labels", POINTER(c_int64)),
        ("deepcache", c_uint32),
        ("whole", c_int32),
        ("step", StepCallback),
        ("step_user", c_void_p),
        ("calls", c_uint32),
        ("adapters", POINTER(c_char_p)),
        ("adapter_strengths", POINTER(c_double)),
        ("adapter_pictures", POINTER(c_int64)),
        ("adapter_count", c_size_t),
        ("mask", c_char_p),
        ("mask_count", c_size_t),
        ("keep_pixels", c_int32),
        ("image_guidance", c_double),
        ("prompt_weights", c_int32),
        ("long_prompts", c_int32),
    )


class Info(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("backend", c_char_p),
        ("height", c_uint32),
        ("width", c_uint32),
        ("channels", c_uint32),
        ("latent_channels", c_uint32),
        ("pixels_per_latent", c_uint32),
        ("reads_text", c_uint32),
        ("class_count", c_uint32),
        ("token_count", c_uint32),
        ("default_sampler", c_char_p),
        ("default_steps", c_uint32),
        ("default_guidance", c_double),
    )


class LdmError(RuntimeError):
    """A call that did not succeed: ``status`` of ldm.h, and its sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def load(library: str) -> ctypes.CDLL:
    """Open libldm and say what its functions take and give."""
    ldm = ctypes.CDLL(library)
    for name, arguments in {
        "ldm_open_options_init": (POINTER(OpenOptions), c_size_t),
        "ldm_draw_options_init": (POINTER(DrawOptions), c_size_t),
        "ldm_pipeline_open": (c_char_p, POINTER(OpenOptions), POINTER(c_void_p)),
        "ldm_pipeline_clone": (c_void_p, POINTER(c_void_p)),
        "ldm_pipeline_close": (c_void_p,),
        "ldm_pipeline_info": (c_void_p, POINTER(Info)),
        "ldm_draw": (c_void_p, POINTER(c_char_p), c_size_t, POINTER(DrawOptions), c_void_p, POINTER(c_size_t)),
        "ldm_step_preview": (POINTER(Step), c_void_p, POINTER(c_size_t)),
        "ldm_tokenize": (c_void_p, c_char_p, POINTER(c_int64), POINTER(c_size_t)),
        "ldm_noise": (c_int64, POINTER(c_float), c_size_t),
    }.items():
        getattr(ldm, name).argtypes = arguments
    ldm.ldm_version.restype = ldm.ldm_last_error.restype = c_char_p
    ldm.ldm_pipeline_close.restype = None
    return ldm


class Pipeline:
    """An opened bundle; use it from one thread at a time."""

    def __init__(self, ldm: ctypes.CDLL, folder: str, warn: Callable[[str], object] = lambda _: None, **options: Any):
        self._ldm = ldm
        self._handle = c_void_p()
        self._warn = WarningCallback(lambda sentence, _: warn(sentence.decode()) and None)
        chosen = OpenOptions()
        self._check(ldm.ldm_open_options_init(byref(chosen), ctypes.sizeof(chosen)))
        chosen.warning = self._warn
        for name, value in options.items():
            setattr(chosen, name, value)
        self._check(ldm.ldm_pipeline_open(folder.encode(), byref(chosen), byref(self._handle)))

    def close(self) -> None:
        self._ldm.ldm_pipeline_close(self._handle)

    def info(self) -> Info:
        info = Info(struct_size=ctypes.sizeof(Info))
        self._check(self._ldm.ldm_pipeline_info(self._handle, byref(info)))
        return info

    def draw(
        self,
        prompts: Sequence[str] | None,
        count: int = 1,
        callback: Callable[[Step], object] = lambda _: None,
        **options: Any,
    ) -> bytes:
        """Pixels uint8 (B, height, width, channels); ``callback`` sees each step, and cancels by returning False."""
        chosen = DrawOptions()
        self._check(self._ldm.ldm_draw_options_init(byref(chosen), ctypes.sizeof(chosen)))
        step = StepCallback(lambda step, _: int(callback(step.contents) is False))
        chosen.step = step
        for name, value in options.items():
            setattr(chosen, name, value)
        texts = None if prompts is None else (c_char_p * len(prompts))(*(prompt.encode() for prompt in prompts))
        given = (texts, count if prompts is None else len(prompts), byref(chosen))
        size = c_size_t()
        self._check(self._ldm.ldm_draw(self._handle, *given, None, byref(size)))
        pixels = (c_uint8 * size.value)()
        self._check(self._ldm.ldm_draw(self._handle, *given, pixels, byref(size)))
        return bytes(pixels)

    def tokenize(self, prompt: bytes) -> list[int]:
        size = c_size_t()
        self._check(self._ldm.ldm_tokenize(self._handle, prompt, None, byref(size)))
        ids = (c_int64 * size.value)()
        self._check(self._ldm.ldm_tokenize(self._handle, prompt, ids, byref(size)))
        return list(ids)

    def _check(self, status: int) -> None:
        if status != 0:
            raise LdmError(status, self._ldm.ldm_last_error().decode())


def main(library: str, folder: str, *prompts: str) -> None:
    pipeline = Pipeline(load(library), folder, warn=lambda sentence: print(sentence, file=sys.stderr))
    info = pipeline.info()
    pixels = pipeline.draw(
        prompts, callback=lambda step: print(f"step {step.index + 1} of {step.count}", file=sys.stderr)
    )
    kind = "P6" if info.channels == 3 else "P5"
    sys.stdout.buffer.write(f"{kind} {info.width} {info.height * len(prompts)} 255\n".encode() + pixels)
    pipeline.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
