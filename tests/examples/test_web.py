"""The web example in headless Chromium: the same tokens, noise and pictures as the Python runtime's."""

from __future__ import annotations

import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle import Bundle
from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Generator, Pipeline
from ldm_export.runtime.tokenizer_clip import ClipTokenizer
from ldm_export.verify.loops import add_loop
from ldm_export.verify.metrics import psnr_db
from tests.examples.chromium import Chromium

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "web"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SAME_PICTURE_DB = 40.0
LOOPS = ("ddim-20", "euler-ancestral-10", "ddim-calls4-10")
"""One that draws no noise on its way, one that does, and one of fewer network calls than steps."""
PROMPTS = (
    "red apple",
    "a smiling face, with sunglasses!",
    "it's  the\tartist's",
    "Ünïcode naïve café",
    "5 o'clock 12",
    "",
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium here; install Debian's package chromium")
    if not all((PAGE / "ort" / name).is_file() for name in RUNTIME_FILES):
        pytest.skip("ONNX Runtime Web is not in examples/web/ort; run: make web-runtime")
    with Chromium(program, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def bundle(browser: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """emoji64 with its loops; ``LDM_EXPORT_WEB_BUNDLE`` names one that is there."""
    if there := os.environ.get("LDM_EXPORT_WEB_BUNDLE"):
        return Bundle.open(there)
    made = export_bundle(open_checkpoint("emoji64"), tmp_path_factory.mktemp("web") / "bundle")
    return functools.reduce(add_loop, LOOPS, made)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the server serves."""
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def site(bundle: Bundle, served: Path) -> Iterator[str]:
    """The example's folder on a server of its own, with ONNX Runtime Web and a bundle in it."""
    folder = served
    for name in ("index.html", "draw.js"):
        shutil.copyfile(PAGE / name, folder / name)
    (folder / "ort").symlink_to((PAGE / "ort").resolve())
    (folder / "bundle").symlink_to(bundle.path.resolve())
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_console_is_watched(browser: Chromium, site: str) -> None:
    browser.open(f"{site}/no-such-page")
    browser.evaluate("console.error('seen')")
    assert any("404" in error for error in browser.errors)
    assert any("seen" in error for error in browser.errors)


def test_the_tokens_are_the_runtime_s(browser: Chromium, site: str, bundle: Bundle) -> None:
    browser.open(f"{site}/index.html")
    script = "import('/draw.js').then(({ Tokenizer }) => Tokenizer.load('/bundle/tokenizer'))"
    script += f".then((tokenizer) => {json.dumps(PROMPTS)}.map((text) => tokenizer.encode(text)))"
    assert browser.evaluate(script) == ClipTokenizer(bundle.path / "tokenizer")(PROMPTS).tolist()


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**63, -1])
def test_the_noise_is_the_runtime_s(browser: Chromium, site: str, seed: int) -> None:
    browser.open(f"{site}/index.html")
    counts = [3, 768, 17, 2, 20]
    script = f"import('/draw.js').then(({{ Generator }}) => {{ const g = new Generator({seed}n);"
    script += f"return {counts}.map((count) => [...g.randn(count)]) }})"
    generator = Generator(seed)
    for count, drawn in zip(counts, browser.evaluate(script), strict=True):
        np.testing.assert_allclose(np.float32(drawn), generator.randn(count), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_picture_is_the_runtime_s(browser: Chromium, site: str, bundle: Bundle, loop: str) -> None:
    prompt, seed, guidance = "red apple", 7, 4.0
    browser.errors.clear()
    browser.open(f"{site}/index.html?loop={loop}&prompt={prompt.replace(' ', '+')}&seed={seed}&guidance={guidance}")
    assert _settled(browser, "Loading") == "Ready."
    browser.evaluate("document.querySelector('button').click()")
    assert _settled(browser, "Ready", "Drawing").startswith("Drawn in ")
    script = "(() => { const c = document.querySelector('canvas');"
    script += "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] })()"
    pixels = np.array(browser.evaluate(script), np.uint8).reshape(64, 64, 4)
    sampler, _, steps = loop.rpartition("-")
    ours = Pipeline(bundle).generate(prompt, sampler=sampler, steps=int(steps), seed=seed, guidance=guidance)
    assert (pixels[..., 3] == 255).all()
    assert psnr_db(pixels[..., :3], ours.images[0]) >= SAME_PICTURE_DB
    assert browser.errors == []


@pytest.mark.parametrize(("kind", "asked"), [("sd3", {"prompts": "a red circle"}), ("dit", {"class_labels": [7]})])
def test_transformers_draw_what_the_runtime_does(
    browser: Chromium,
    site: str,
    kinds: Callable[[str], tuple[Path, Path]],
    served: Path,
    tmp_path: Path,
    kind: str,
    asked: dict[str, Any],
) -> None:
    bundle = add_loop(Bundle.open(shutil.copytree(kinds(kind)[1], tmp_path / "bundle")), "euler-3")
    (served / kind).symlink_to(bundle.path)
    browser.open(f"{site}/index.html")
    given = {"prompt": asked.get("prompts", ""), "classLabel": 7, "guidance": 3.0, "seed": 5}
    script = f"import('/draw.js').then(({{ Model }}) => Model.load('/{kind}', 'euler-3'))"
    script += f".then((model) => model.draw({json.dumps(given)})).then((picture) => [...picture.data])"
    pixels = np.array(browser.evaluate(script), np.uint8).reshape(16, 16, 4)
    ours = Pipeline(bundle, backend="cpu").generate(**asked, sampler="euler", steps=3, seed=5, guidance=3.0)
    assert psnr_db(pixels[..., :3], ours.images[0]) >= SAME_PICTURE_DB


def _settled(browser: Chromium, *passing: str) -> str:
    """What the page says once it says none of ``passing`` any more."""
    script = "new Promise((done) => { const look = () => { const said = document.querySelector('output').value;"
    script += f"const waiting = {json.dumps(passing)}.some((words) => said.startsWith(words));"
    script += "waiting ? setTimeout(look, 50) : done(said) }; look() })"
    return str(browser.evaluate(script))
