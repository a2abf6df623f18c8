"""Says for which systems every pinned package has a wheel, that is, installs without a compiler.

`python tools/wheels.py` asks the package index for the files of `requirements.lock`, with their hashes, and for torch;
it installs nothing. A row of the table is a system, a column a Python version. What has no wheel is named, and whether
it has none anywhere: a source of pure Python, which pip builds by itself. `make lint` installs the `uv` that it needs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: How a reader names a system, and how uv does.
SYSTEMS = {
    "Linux, x86-64": "x86_64-manylinux_2_28",
    "Linux, ARM": "aarch64-manylinux_2_28",
    "macOS 14, ARM": "aarch64-apple-darwin",
    "macOS 14, Intel": "x86_64-apple-darwin",
    "Windows, x86-64": "x86_64-pc-windows-msvc",
    "Windows, ARM": "aarch64-pc-windows-msvc",
}
PYTHONS = ("3.11", "3.12", "3.13")


def entries(lock: str, pins: str) -> list[str]:
    """What is to be installed, a line each: the requirements of the lock with their hashes, and torch from the pins."""
    joined = re.sub(r"^\s*#.*\n", "", lock, flags=re.MULTILINE).replace("\\\n", " ")
    locked = [" ".join(line.split()) for line in joined.splitlines() if line.strip()]
    return locked + [line.partition("#")[0].strip() for line in pins.splitlines() if line.startswith("torch==")]


def name(entry: str) -> str:
    """The package of an entry with its version."""
    return entry.partition(" ")[0]


def installs(chosen: Sequence[str], system: str, python: str) -> bool:
    """Whether each of them has a wheel there; where the lock has hashes, one that the lock allows.

    Raises:
        RuntimeError: uv stopped for another reason, such as an index that cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text("\n".join(chosen), encoding="utf-8")
        command = ["uv", "pip", "install", "-q", "--dry-run", "--no-deps", "--only-binary", ":all:"]
        command += ["--target", folder, "--python-platform", SYSTEMS[system], "--python-version", python]
        environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
        done = subprocess.run([*command, "-r", wanted], env=environment, capture_output=True, text=True)
    if done.returncode and "No solution found" not in done.stderr:
        raise RuntimeError(done.stderr.strip())
    return done.returncode == 0


def without_wheel(chosen: Sequence[str], system: str, python: str) -> list[str]:
    """Those that have no wheel there, found by halving."""
    if installs(chosen, system, python):
        return []
    if len(chosen) == 1:
        return [name(chosen[0])]
    middle = len(chosen) // 2
    return without_wheel(chosen[:middle], system, python) + without_wheel(chosen[middle:], system, python)


def main() -> int:
    """Print the table; 0 when the systems that were asked about lack no wheel but those that no system has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="this one only; may be repeated")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="this version only; may be repeated")
    options = parser.parse_args()
    chosen = entries(*((ROOT / file).read_text(encoding="utf-8") for file in ("requirements.lock", "requirements.txt")))
    missing = {}
    for system in options.system or SYSTEMS:
        for python in options.python or PYTHONS:
            try:
                missing[system, python] = without_wheel(chosen, system, python)
            except (RuntimeError, FileNotFoundError) as error:
                print(f"uv could not be asked: {error}", file=sys.stderr)
                return 2
            print(f"{system:16} Python {python}:", ", ".join(missing[system, python]) or "all", flush=True)
    nowhere = set.intersection(*map(set, missing.values())) if len(missing) > 1 else set()
    print(f"{len(chosen)} packages. Without a wheel on each of these systems:", ", ".join(sorted(nowhere)) or "none")
    return int(any(set(one) - nowhere for one in missing.values()))


if __name__ == "__main__":
    sys.exit(main())
