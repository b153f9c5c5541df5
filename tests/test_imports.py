"""The import rules of the packages, read from the syntax of every module, and what a light import loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ldm_export.errors
import ldm_export.runtime

ROOT = Path(__file__).parents[1]
SOURCES = {"ldm_export": ROOT / "ldm_export", "ldm_reference": ROOT / "reference" / "ldm_reference"}

BASE = {"errors", "contract", "reading", "plan"}
BUNDLE = BASE | {"bundle"}
MAY_IMPORT = {
    "errors": set(),
    "reading": {"errors"},
    "contract": {"errors"},
    "plan": {"errors", "reading"},
    "processes": set(),
    "bundle": BASE,
    "runtime": BUNDLE,
    "pictures": BUNDLE | {"runtime"},
    "adapters": {"errors", "reading"},
    "checkpoint": BASE | {"adapters"},
    "families": BUNDLE | {"checkpoint", "runtime"},
    "passes": BUNDLE | {"checkpoint"},
    "graph": BUNDLE,
    "export": BUNDLE | {"processes", "adapters", "checkpoint", "families", "passes", "graph"},
    "verify": BUNDLE | {"checkpoint", "families", "runtime", "passes", "graph", "export"},
    "recipe": BUNDLE | {"checkpoint", "families", "runtime", "passes", "graph", "export", "verify"},
    "bench": BUNDLE | {"processes", "checkpoint", "families", "runtime", "passes", "graph", "export", "verify"},
    "tune": BUNDLE
    | {"processes", "checkpoint", "families", "runtime", "passes", "graph", "export", "verify", "recipe", "bench"},
    "adapt": BUNDLE | {"adapters", "checkpoint", "families", "verify"},
    "cpp": set(),
    "cli": BUNDLE
    | {"checkpoint", "families", "runtime", "passes", "graph", "export", "verify", "recipe", "bench", "tune"}
    | {"pictures", "adapt"},
}
"""What each part of ``ldm_export`` may import of the others; no part is left out, and itself it always may."""

LIGHT = {"numpy", "tokenizers", *sys.stdlib_module_names}
"""What the parts that an application loads may import at their top."""


def modules(package: str) -> dict[str, Path]:
    """Every module of a package, by its dotted name, with its file."""
    files = sorted(SOURCES[package].rglob("*.py"))
    names = [file.relative_to(SOURCES[package].parent).with_suffix("").parts for file in files]
    return {
        ".".join(part for part in parts if part != "__init__"): file for parts, file in zip(names, files, strict=True)
    }


def imports(file: Path, *, top: bool = False, types: bool = False) -> set[str]:
    """The modules that a file imports when it runs.

    Parameters
    ----------
    top : without those that it imports inside functions
    types : also those that it imports for annotations alone
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if top and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(file: Path, *, top: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(file, top=top)}


def part_of(module: str) -> str:
    """``runtime`` of ``ldm_export.runtime.pipeline``."""
    return [*module.split("."), ""][1]


def parts_of(file: Path) -> set[str]:
    """The parts of ``ldm_export`` that a file imports."""
    return {part_of(name) for name in imports(file) if name.startswith("ldm_export.")} - {"__version__"}


TOOLCHAIN, REFERENCE = modules("ldm_export"), modules("ldm_reference")


@pytest.mark.parametrize("module", [module for module in TOOLCHAIN if module != "ldm_export"])
def test_a_module_imports_only_what_its_part_may(module: str) -> None:
    part = part_of(module)
    assert parts_of(TOOLCHAIN[module]) <= MAY_IMPORT[part] | {part}


@pytest.mark.parametrize("package", [TOOLCHAIN, REFERENCE], ids=["ldm_export", "ldm_reference"])
def test_no_circle_of_files(package: dict[str, Path]) -> None:
    """Imports inside functions and for annotations count."""

    def modules_read(file: Path) -> set[str]:
        names = imports(file, types=True)
        return {name if name in package else name.rpartition(".")[0] for name in names} & package.keys()

    waiting = {module: modules_read(file) - {module} for module, file in package.items()}
    while free := [module for module, read in waiting.items() if not read & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, {module: sorted(read & waiting.keys()) for module, read in waiting.items()}


def test_nothing_lies_loose() -> None:
    loose = {module.partition(".")[2] for module in TOOLCHAIN if module.count(".") == 1}
    assert {name for name in loose if (ROOT / "ldm_export" / f"{name}.py").is_file()} == {
        "errors",
        "contract",
        "processes",
    }


def test_who_knows_the_reference() -> None:
    """What opens its networks, draws with them, judges pictures by its data, changes and trains them, or reads pictures
    as it does."""
    knows = {part_of(module) for module, file in TOOLCHAIN.items() if "ldm_reference" in packages(file)}
    assert knows == {"adapt", "checkpoint", "families", "verify", "passes", "cli"}
    reads = {name for module, file in TOOLCHAIN.items() if part_of(module) == "cli" for name in imports(file)}
    assert {name for name in reads if name.startswith("ldm_reference")} == {
        "ldm_reference.pictures",
        "ldm_reference.config.ConfigError",
    }


def test_reading_pictures_needs_no_torch() -> None:
    for module in ("config", "pictures"):
        assert packages(REFERENCE[f"ldm_reference.{module}"]) <= {*LIGHT, "PIL", "ldm_reference"}


def test_the_reference_networks_know_nothing_of_the_toolchain() -> None:
    loaded = set.union(*map(packages, REFERENCE.values()))
    assert "torch" in loaded
    assert not loaded & {"ldm_export", "diffusers", "transformers"}


def test_diffusers_and_transformers_are_judges_only() -> None:
    assert not set.union(*map(packages, TOOLCHAIN.values())) & {"diffusers", "transformers", "optimum"}


@pytest.mark.parametrize("module", [module for module in TOOLCHAIN if part_of(module) in BUNDLE | {"runtime", ""}])
def test_what_an_application_loads_is_light(module: str) -> None:
    assert packages(TOOLCHAIN[module], top=True) <= LIGHT | {"ldm_export"}


@pytest.mark.parametrize("module", [module for module in TOOLCHAIN if part_of(module) == "pictures"])
def test_picture_files_need_pillow_besides(module: str) -> None:
    assert packages(TOOLCHAIN[module], top=True) <= LIGHT | {"ldm_export", "PIL"}


@pytest.mark.parametrize("module", ["ldm_export", "ldm_export.runtime", "ldm_export.plan", "ldm_export.bundle"])
def test_a_light_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"torch", "onnx", "onnxruntime", "openvino", "onnxscript", "PIL", "click", "rich", "safetensors"}
    assert not set(done.stdout.split()) & (heavy | {"ldm_reference"})


def test_the_public_names_of_the_runtime() -> None:
    names = ["Generation", "Generator", "Pipeline", "Step"]
    assert ldm_export.runtime.__all__ == names
    assert all(hasattr(ldm_export.runtime, name) for name in names)


def test_the_error_tree_is_the_drawn_one() -> None:
    assert ldm_export.errors.__doc__ is not None
    drawn = {line.split()[1] for line in ldm_export.errors.__doc__.splitlines() if line.strip().startswith(("├", "└"))}
    assert drawn == {error.__name__ for error in ldm_export.errors.LdmExportError.__subclasses__()}


FAMILIES = re.compile(
    r"unet|sdxl|\blcm\b|stable.?diffusion|flux|pixart|\bdit\b|\bsd[123x]|\bt5\b|refiner|"
    r"time_ids|text_embeds|timestep_cond|encoder_hidden_states|hidden_states",
    re.IGNORECASE,
)
"""Words that only families of models know."""
SAMPLERS = {"samplers", "onestep", "schedule"}
"""Files of C++ that compile plans: one of the samplers is called lcm."""
RUNTIMES = [
    *(ROOT / "ldm_export" / "runtime").rglob("*.py"),
    *(ROOT / "ldm_export" / "cpp" / "src").glob("*"),
    *(ROOT / "ldm_export" / "cpp" / "include").rglob("*.h*"),
]


@pytest.mark.parametrize("file", RUNTIMES, ids=lambda file: str(file.relative_to(ROOT / "ldm_export")))
def test_a_runtime_names_no_family(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    words = [(number, word) for number, line in enumerate(lines, 1) for word in FAMILIES.findall(line)]
    if file.stem in SAMPLERS:
        words = [(number, word) for number, word in words if word.lower() != "lcm"]
    if not file.name.startswith("tokenizer") and file.stem not in SAMPLERS:  # the kind of a tokenizer; what is clipped
        words += [(number, "CLIP") for number, line in enumerate(lines, 1) if "CLIP" in line]
    assert words == []


def test_the_words_are_seen() -> None:
    seen = ("the UNet", "sd3", "LCM", "SDXL", "Stable Diffusion", "encoder_hidden_states")
    assert all(FAMILIES.search(text) for text in seen)
