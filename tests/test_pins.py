"""What the course imports is pinned, and the lock files hold what the pins bring, by hash."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("requirements.txt", "deploy/requirements-hub.txt", "docs/site/requirements.txt")
REQUIREMENTS += ("tests/browser/requirements.txt", "tests/site/requirements.txt")
REQUIREMENTS += tuple(f"tests/other_tools/requirements-{name}.txt" for name in ("llama_factory", "ms_swift", "trl"))
LOCKS = ("requirements.lock", "deploy/requirements-hub.lock")
#: Not in the lock: one version has several builds, each with hashes and CUDA libraries of its own.
UNLOCKED = "torch"
#: What torch's CUDA build brings, pinned by torch itself.
CUDA = re.compile(r"(triton|cuda-.+|nvidia-(?!ml-py).+)$")


def python_files() -> list[Path]:
    """The Python files and notebooks of the project; what a run left behind or a virtual environment holds is none."""
    elsewhere = {".venv", "output", ".carry", ".ipynb_checkpoints"}
    found = [path for kind in ("*.py", "*.ipynb") for path in ROOT.rglob(kind)]
    return [path for path in found if not elsewhere & set(path.relative_to(ROOT).parts)]


def source(path: Path) -> str:
    """Its Python code; of a notebook that of all code cells, lines for the shell as the calls they become."""
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return "\n".join(TransformerManager().transform_cell(cell) for cell in cells)


def imports(code: str) -> set[str]:
    """The packages that code imports, by the first part of their name; also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def pinned(name: str) -> dict[str, str]:
    """Of a requirements file: the canonical name of each package to its version.

    Raises:
        AssertionError: a line that is no exact pin.
    """
    pins = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if text := line.partition("#")[0].strip():
            match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.+]+)", text)
            assert match, f"{name}: {text}"
            pins[canonicalize_name(match[1])] = match[2]
    return pins


def entries(name: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Of a lock file: each requirement, and the hashes that it allows."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        if requirement:
            yield Requirement(requirement), hashes


def locked(name: str) -> dict[str, str]:
    """Of a lock file: the canonical name of each package for this machine to its version."""
    chosen = (one for one, _ in entries(name) if one.marker is None or one.marker.evaluate())
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in chosen}


def brought(names: set[str]) -> set[str]:
    """Canonical names of the installed packages, and of all that they need on this machine.

    What only `UNLOCKED` needs of its own builds (CUDA libraries) is left out: torch pins that.
    """
    found, todo = set(), [(name, frozenset()) for name in names]
    seen = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen or CUDA.match(name):
            continue
        seen.add((name, extras))
        found.add(name)
        for text in metadata.requires(name) or []:
            one = Requirement(text)
            where = [default_environment() | {"extra": extra} for extra in ("", *extras)]
            if one.marker is None or any(one.marker.evaluate(place) for place in where):
                todo.append((canonicalize_name(one.name), frozenset(one.extras)))
    return found


def test_every_import_is_pinned():
    packages = metadata.packages_distributions()
    pins = {name for file in REQUIREMENTS for name in pinned(file)}
    own = {name for path in python_files() for name in (path.stem, path.parent.name)}
    own |= {path.name for path in ROOT.iterdir() if path.is_dir()}
    missing = {}
    for path in python_files():
        for module in imports(source(path)) - own - set(sys.stdlib_module_names):
            if not {canonicalize_name(name) for name in packages.get(module, [module])} & pins:
                missing.setdefault(module, []).append(str(path.relative_to(ROOT)))
    assert not missing


def test_an_import_is_found_wherever_it_is():
    code = "import a.b as c, d\nfrom e.f import g\ndef h():\n    import i\n    from . import j\n"
    assert imports(code) == {"a", "d", "e", "i"}


@pytest.mark.parametrize("name", LOCKS)
def test_each_locked_package_has_one_version_here_and_hashes(name):
    for one, hashes in entries(name):
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), one
        assert re.fullmatch(r"==[\w.+]+", str(one.specifier)), one
    here = [one.name for one, _ in entries(name) if one.marker is None or one.marker.evaluate()]
    assert len(here) == len(set(here)) > 10


def test_the_locks_hold_the_pins_and_agree():
    main, hub = map(locked, LOCKS)
    pins = pinned("requirements.txt")
    assert {name: main.get(name) for name in pins if name != UNLOCKED} == {
        name: pin for name, pin in pins.items() if name != UNLOCKED
    }
    assert pinned("deploy/requirements-hub.txt").items() <= hub.items()
    assert {name: pin for name, pin in hub.items() if name in main} == {
        name: main[name] for name in hub if name in main
    }


def test_the_lock_holds_all_that_the_pins_bring():
    main = locked("requirements.lock")
    needed = brought(set(pinned("requirements.txt"))) - {UNLOCKED}
    assert len(needed) > 100
    assert {name: main.get(name) for name in needed} == {name: metadata.version(name) for name in needed}


def test_the_lock_forces_no_build_of_torch():
    """The CUDA libraries take 3 GB, and the CPU build needs none of them."""
    names = {canonicalize_name(one.name) for name in LOCKS for one, _ in entries(name)}
    assert not [name for name in names if name == UNLOCKED or CUDA.match(name)]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_index(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|file:", text)


def test_make_setup_installs_the_lock_before_the_pins(tmp_path):
    """By what make would call: pip must check hashes, and must find torch's companions locked when torch comes."""
    done = subprocess.run(
        ["make", "-n", f"VENV={tmp_path / 'environment'}", "setup"], cwd=ROOT, capture_output=True, text=True
    )
    commands = re.findall(r"pip install [^&|]*?-r (\S+)", done.stdout.replace("\\\n", " "))
    assert commands == ["requirements.lock", "requirements.txt"], done.stdout + done.stderr
    assert re.search(r"--no-deps --require-hashes -r requirements\.lock", done.stdout)
