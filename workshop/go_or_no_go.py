"""The evening before: says GO or NO-GO for this machine and so many learners.

`make workshop LEARNERS=12` compares the machine with what eight learners took when they were measured
(`workshop/measured_room.json`), then lets several kernels run two short notebooks at the same time, each with an output
folder of its own. It prints a table with a cure for whatever is missing; the last line is the verdict, and so is the
exit status. Everything that is derived from the measured figures counts on cores about as fast as the measured ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import utils  # noqa: E402

ROOM = ROOT / "workshop" / "measured_room.json"
#: Of the names and bytes of all files in `models/glm4-moe-mini`.
MODEL_SHA256 = "4911592698eef5bf742a06cca46be6f8998f5871c3b20a4ed4c5be0b1fe44746"
#: JupyterLab takes the next port by itself when its own is taken; the dashboard does not.
DASHBOARD_PORT = int(os.environ.get("PORT", "5092"))
#: Longer than that and a room waits for the training notebook.
LONGEST_TRAINING_MINUTES = 30
SMOKE_NOTEBOOKS = ("01_environment", "03_dataset")
SMOKE_KERNELS = 4


@dataclass(frozen=True)
class Check:
    """One line of the table: what was looked at, whether it is good, what was found, and the cure if it is not."""

    what: str
    good: bool
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Found:
    """What there is. Sizes in GiB; `fonts` is None where it cannot be told, `unwritable` the reason or empty."""

    cores: int
    free_memory: float
    free_disk: float
    port_free: bool
    model_sha256: str
    unwritable: str
    fonts: list[str] | None


def model_sha256(folder: Path) -> str:
    """One digest of all files in a folder, names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def chinese_fonts() -> list[str] | None:
    """Families with Chinese characters that fontconfig knows; None where there is no fontconfig."""
    if not shutil.which("fc-list"):
        return None
    listed = subprocess.run(["fc-list", ":lang=zh", "family"], capture_output=True, text=True, check=False)
    return sorted({line.split(",")[0] for line in listed.stdout.splitlines() if line})


def look() -> Found:
    """Look at this machine."""
    output, machine, unwritable = utils.settings().output, utils.machine(), ""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        unwritable = f"{utils.shown(output)}: {error.strerror}"
    there = next(path for path in (output, *output.parents) if path.is_dir())
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port_free = True
        try:
            one.bind(("127.0.0.1", DASHBOARD_PORT))
        except OSError:
            port_free = False
    return Found(
        cores=int(machine["cores"]),
        free_memory=machine["free_memory_gib"],
        free_disk=shutil.disk_usage(there).free / 2**30,
        port_free=port_free,
        model_sha256=model_sha256(utils.BUNDLED),
        unwritable=unwritable,
        fonts=chinese_fonts(),
    )


def software(python: tuple[int, int], wrong: list[str]) -> list[Check]:
    """Python and the pinned packages; without them nothing else can be looked at."""
    shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return [
        Check(
            "Python",
            (3, 11) <= python < (3, 14),
            f"{python[0]}.{python[1]}, 3.11 to 3.13 wanted",
            "make clean, then make workshop PYTHON=python3.12",
        ),
        Check("packages", not wrong, shown or f"all {len(utils.pins())} in the pinned version", "make setup"),
    ]


def training_minutes(learners: int, cores: int, room: dict[str, Any]) -> float:
    """How long notebook 05 takes when all train at once: the measured time, by learners and cores."""
    shared = room["training_minutes"] * learners / room["learners"] * room["cores"] / cores
    return max(room["training_minutes_alone"], shared)


def hardware(found: Found, learners: int, room: dict[str, Any], fonts_here: bool = True) -> list[Check]:
    """What was found against what so many learners need, as derived from the measured room."""
    each, disk = room["most_mib_of_one"] / 1024, room["disk_mib_of_one"] / 1024
    minutes = training_minutes(learners, found.cores, room)
    cores = math.ceil(found.cores * minutes / LONGEST_TRAINING_MINUTES)
    at_once = int(learners * LONGEST_TRAINING_MINUTES / minutes)
    return [
        Check(
            "memory",
            found.free_memory >= learners * each,
            f"{found.free_memory:.1f} GiB free; {learners} x {each:.1f} = {learners * each:.1f} GiB needed",
            f"enough for {int(found.free_memory / each)}: close programs and old kernels, or take a larger machine",
        ),
        Check(
            "disk",
            found.free_disk >= learners * disk,
            f"{found.free_disk:.1f} GiB free; {learners} x {disk:.2f} = {learners * disk:.1f} GiB needed",
            "free some, or set COURSE_OUTPUT to a folder on a larger disk",
        ),
        Check(
            "cores",
            minutes <= LONGEST_TRAINING_MINUTES,
            f"{found.cores}: notebook 05 takes about {minutes:.0f} minutes if all {learners} train at once",
            f"{cores} cores would do it in {LONGEST_TRAINING_MINUTES}; or let {at_once} train at a time",
        ),
        Check(
            "port",
            found.port_free,
            f"{DASHBOARD_PORT} is {'free' if found.port_free else 'taken'} (SwanLab dashboard)",
            "end the other dashboard, or name another port: make dashboard PORT=5093",
        ),
        Check(
            "bundled model",
            found.model_sha256 == MODEL_SHA256,
            "as recorded" if found.model_sha256 == MODEL_SHA256 else "its files are not those recorded",
            "git checkout -- models/glm4-moe-mini, or copy the folder again",
        ),
        Check(
            "output folder",
            not found.unwritable,
            found.unwritable or "can be written",
            "set COURSE_OUTPUT to a folder that can be written",
        ),
        Check(
            "Chinese font",
            not fonts_here or found.fonts is None or bool(found.fonts),
            "the browsers run elsewhere"
            if not fonts_here
            else "cannot be told here (no fc-list)"
            if found.fonts is None
            else ", ".join(found.fonts[:2]) or "none",
            "Debian: apt install fonts-noto-cjk; if the browsers run on other machines, add BROWSERS=elsewhere",
        ),
    ]


def threads_each(learners: int, cores: int) -> int:
    """The value of OMP_NUM_THREADS for a learner: the cores shared out, one at least."""
    return max(1, cores // learners)


def smoke(learners: int, cores: int) -> Check:
    """Several kernels at once run two notebooks to their end, each with an output folder of its own."""
    kernels, begun = min(learners, SMOKE_KERNELS), time.time()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COURSE_", "SWANLAB_"))}
    environment["OMP_NUM_THREADS"] = str(threads_each(learners, cores))
    with tempfile.TemporaryDirectory(prefix="workshop-") as root:
        folders = [Path(root) / f"learner-{number}" for number in range(1, kernels + 1)]
        command = [sys.executable, __file__, "1", "--one-run"]
        started = [
            subprocess.Popen(
                [*command, str(folder)],
                env=environment | {"COURSE_OUTPUT": str(folder)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for folder in folders
        ]
        said = [process.communicate()[0].strip().splitlines() for process in started]
        good = [
            process.returncode == 0 and (folder / "rows" / "made_from.json").is_file()
            for process, folder in zip(started, folders, strict=True)
        ]
    found = f"{sum(good)} of {kernels} kernels ran notebooks 01 and 03 at once, in {time.time() - begun:.0f} s"
    reason = next((lines[-1] for lines, one in zip(said, good, strict=True) if lines and not one), "")
    return Check("short run", all(good), found, f"{reason}; look it up in docs/troubleshooting.md")


def one_run(folder: Path) -> int:
    """What each kernel of the short run does; on a fault, its message is the last line."""
    from nbclient.exceptions import CellExecutionError
    from run_series import run

    for name in SMOKE_NOTEBOOKS:
        try:
            run(ROOT / "notebooks" / "en" / f"{name}.ipynb", folder, limit=600)
        except CellExecutionError as error:
            print(f"{name}: {error.ename}: {' '.join(error.evalue.split())[:200]}")
            return 1
    return 0


def verdict(checks: list[Check]) -> str:
    """GO, or NO-GO and why."""
    bad = [check.what for check in checks if not check.good]
    return f"NO-GO: {', '.join(bad)}" if bad else "GO"


def show(checks: list[Check]) -> None:
    """Print the table and the verdict."""
    lines = [("✓" if one.good else "✗", one.what, one.found, "" if one.good else one.cure) for one in checks]
    utils.table(lines, ("", "checked", "found", "cure"))
    print(verdict(checks))


def main() -> int:
    """0 for GO."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("learners", type=int)
    parser.add_argument("--browsers-elsewhere", action="store_true", help="learners bring browsers of their own")
    parser.add_argument("--one-run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    utils.prepare()
    if options.one_run:
        return one_run(options.one_run)
    if options.learners < 1:
        parser.error("at least one learner")
    room = json.loads(ROOM.read_text(encoding="utf-8"))
    print(f"{options.learners} learners; needs derived from {room['learners']} measured on {room['hardware']}\n")
    checks = software(sys.version_info[:2], utils.wrong_packages())
    if all(check.good for check in checks):
        found = look()
        checks += hardware(found, options.learners, room, fonts_here=not options.browsers_elsewhere)
        if not found.unwritable and found.model_sha256 == MODEL_SHA256:
            checks.append(smoke(options.learners, found.cores))
    show(checks)
    return int(verdict(checks) != "GO")


if __name__ == "__main__":
    sys.exit(main())
