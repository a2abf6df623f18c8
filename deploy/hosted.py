"""Makes a notebook run that was opened by itself: on Colab, Kaggle, ModelScope, or in an image of a rented machine.

    %run course/deploy/hosted.py en    in a notebook, with the project in the folder `course`; zh for the Chinese series
    python course/deploy/hosted.py     in a terminal: installs, and leaves the rest to the first cell of a notebook

It installs what the notebooks need and is missing, keeps what fits (above all torch, and all that the service's own
pages are made of), says whether the kernel must be restarted, and changes into the folder of the notebooks. Called
again, it installs nothing. It needs neither make nor git nor a virtual environment, and imports only the standard
library, so that nothing it may replace is in use by it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def drop_foreign(names: Sequence[str] = ("utils", "course", "finetune")) -> None:
    """Forget modules of these names that another project has brought into this process, and put the project first."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in names:
            file = getattr(module, "__file__", None)
            if not file or ROOT not in Path(file).resolve().parents:
                del sys.modules[name]
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT))]
    importlib.invalidate_caches()


drop_foreign()
import utils  # noqa: E402
from course.language import LANGUAGES, current, say  # noqa: E402

#: First and last release of Python and of torch that were tried: torch 2.11 on an H100, torch 2.13 by all tests.
PYTHON, TORCH = ((3, 11), (3, 13)), ((2, 11), (2, 13))
#: Pins that are not installed here: parts of the service, whose own releases fit its pages; tools of tests and checks.
SERVICE = {
    "jupyterlab",
    "jupyterlab-language-pack-zh-cn",
    "ipykernel",
    "ipywidgets",
    "ipython",
    "nbformat",
    "nbclient",
    "jupyter-client",
    "traitlets",
}
CHECKS = {"nbval", "pytest", "pytest-xdist", "hypothesis", "ruff", "websocket-client", "fonttools", "babel"}
CHECKS |= {"packaging"}
#: Kept from the release named here on, if the other packages accept the one that is there: the kernel may use it.
SHARED = {"numpy": (2, 0), "pandas": (2, 2), "pyarrow": (21, 0), "pillow": (11, 0), "matplotlib": (3, 10)}
SHARED |= {"networkx": (3, 0), "filelock": (3, 10), "psutil": (5, 9), "requests": (2, 32)}
#: Built for one release of torch, so they change with it.
BESIDE_TORCH = ("torchvision", "torchaudio")
#: Free disk that is asked for, in GiB: without torch, and with a CUDA build of it.
ROOM, ROOM_FOR_TORCH = 2.0, 10.0
#: Packages that a call of this script in this kernel has replaced while they were in use, behind the kernel's number.
REPLACED = "COURSE_REPLACED"


# ------------------------------------------------------------------------------------------------ what is wanted


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: `2.11.0+cu130` is (2, 11, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def within(version: str, limits: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether a version is of the first release, of the last one, or between."""
    return limits[0] <= release(version)[:2] <= limits[1]


def installed() -> dict[str, str]:
    """Canonical name to version of each package; of two with the same name, the one that is imported."""
    found: dict[str, str] = {}
    for one in metadata.distributions():
        if one.metadata["Name"]:  # a broken installation may have none
            found.setdefault(canonical(one.metadata["Name"]), one.version)
    return found


def pins() -> dict[str, tuple[str, str]]:
    """Canonical name to the whole requirement (`swanlab[dashboard]==0.10.3`) and its version."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.+-]+)", line) for line in lines)
    return {canonical(match[1]): (match[0], match[2]) for match in found if match}


def locked() -> dict[str, list[str]]:
    """Canonical name to its lines in the lock file, with their markers and without hashes."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([\w.-]+)==\S+(?: *;[^\\]+)?", line):
            found.setdefault(canonical(match[1]), []).append(match[0].strip())
    return found


@dataclass(frozen=True)
class Plan:
    """What pip is asked for.

    Attributes:
        requirements: all that must hold afterwards; empty, if it holds already.
        torch: the line that keeps torch as it is, or names its new release.
        replaced: the release of torch that goes; empty, if none does.
    """

    requirements: tuple[str, ...]
    torch: str
    replaced: str = ""


def planned(found: Mapping[str, str]) -> Plan:
    """What is to be done where these packages are installed."""
    wanted, missing = [], False
    for name, (line, pin) in pins().items():
        if name in SERVICE | CHECKS | {"torch"}:
            continue
        version = found.get(name)
        if name not in SHARED:
            wanted.append(line)
            missing |= version is None or version.partition("+")[0] != pin
        elif version and release(version) >= SHARED[name]:
            wanted.append(f"{name}>={'.'.join(map(str, SHARED[name]))}")
        else:
            wanted.append(line)
            missing = True
    torch = found.get("torch", "")
    if torch and within(torch, TORCH):
        return Plan(tuple(wanted) if missing else (), f"torch=={torch}")
    line = pins()["torch"][0]
    return Plan((line, *(name for name in BESIDE_TORCH if name in found), *wanted), line, torch)


# ------------------------------------------------------------------------------------------------ installing


def trouble(said: str) -> utils.CourseError:
    """The message for what pip said when it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
    if re.search("No space left|Disk quota|not enough space", said):
        return utils.CourseError(say("The disk is full. Free some of it, then run this line again."))
    if "externally-managed-environment" in said:
        return utils.CourseError(
            say(
                "This Python belongs to the system, and pip must not change it. Make an environment of your own "
                "(python3 -m venv, or conda), start Jupyter in it, then run this line again."
            )
        )
    if "No module named pip" in said:
        return utils.CourseError(
            say("This Python has no pip. Run python -m ensurepip in a terminal, then this line again.")
        )
    if re.search("No matching distribution|Max retries|[Cc]onnection|[Tt]imed? ?out|name resolution|unreachable", said):
        return utils.CourseError(
            say(
                "The package index was not reached ({reason}). Switch the internet on (Kaggle: Settings > Internet), "
                "or check the proxy; then run this line again.",
                reason=reason,
            )
        )
    return utils.CourseError(
        say("pip could not install the packages ({reason}). Mend that, then run this line again.", reason=reason)
    )


def pip(*arguments: str) -> None:
    """Call pip in this Python.

    Raises:
        CourseError: it failed.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise trouble(done.stdout + done.stderr)


def need_room(gib: float) -> None:
    """Ask for free disk where packages are installed.

    Raises:
        CourseError: there is less.
    """
    free = shutil.disk_usage(sysconfig.get_path("purelib")).free / 2**30
    if free < gib:
        raise utils.CourseError(
            say(
                "{free:.1f} GiB of disk are free, {needed:.0f} are needed for the packages. Free some of it, "
                "then run this line again.",
                free=free,
                needed=gib,
            )
        )


def install(wanted: Plan) -> None:
    """Install what a plan asks for; what is missing comes in the version of the lock file, as far as that fits here.

    Raises:
        CourseError: pip failed.
    """
    print(say("Installing what is missing: a few minutes."))
    there = installed()
    missing = [line for name, lines in locked().items() if name not in there for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        asked = ["install", "--quiet", "--constraint", str(constraints), *wanted.requirements]
        constraints.write_text("\n".join([wanted.torch, *missing, ""]), encoding="utf-8")
        try:
            pip(*asked)
        except utils.CourseError as error:
            if "ResolutionImpossible" not in str(error):  # else what is kept does not fit to a release of the lock file
                raise
            constraints.write_text(f"{wanted.torch}\n", encoding="utf-8")
            pip(*asked)


def in_use(changed: Iterable[str]) -> list[str]:
    """Of the packages that were replaced, those that this process has imported, now or before an earlier call."""
    loaded = {name.partition(".")[0] for name in sys.modules}
    owners: dict[str, set[str]] = {}
    for module, names in metadata.packages_distributions().items():
        for name in names:
            owners.setdefault(canonical(name), set()).add(module)
    kernel, _, before = os.environ.get(REPLACED, "").partition(":")
    old = set(before.split(",")) if kernel == str(os.getpid()) else set()
    found = old | {name for name in changed if owners.get(name, set()) & loaded}
    if found:
        os.environ[REPLACED] = f"{os.getpid()}:{','.join(sorted(found))}"
    return sorted(found)


# ------------------------------------------------------------------------------------------------ where it runs


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> None:
    """Python must be one of those that the packages are made for.

    Raises:
        CourseError: it is not.
    """
    if not PYTHON[0] <= version <= PYTHON[1]:
        raise utils.CourseError(
            say(
                "This is Python {found}. The packages need 3.11 to 3.13: choose another environment or image.",
                found=".".join(map(str, version)),
            )
        )


def choose_output(start: Path) -> None:
    """Let the notebooks write beside the notebook, or in the system's folder for passing files, if not in the project.

    On Kaggle the inputs are read-only. A `COURSE_OUTPUT` that is set stays.
    """
    if os.environ.get("COURSE_OUTPUT") or os.access(ROOT, os.W_OK):
        return
    place = start if os.access(start, os.W_OK) else Path(tempfile.gettempdir())
    os.environ["COURSE_OUTPUT"] = str(place / "course-output")
    print(
        say(
            "The project's folder is read-only, so the notebooks write in {folder}.", folder=os.environ["COURSE_OUTPUT"]
        )
    )


def set_up(language: str) -> None:
    """Install what is missing, say what a learner has to do next, and change into the folder of the notebooks.

    Raises:
        CourseError: wrong Python, too little disk, pip failed, or no such language.
    """
    if language not in LANGUAGES:
        raise utils.CourseError(
            say(
                "{language}: no notebooks in this language. Use one of: {known}.",
                language=language,
                known=", ".join(LANGUAGES),
            )
        )
    os.environ["COURSE_LANGUAGE"] = language
    check_python()
    before = installed()
    wanted = planned(before)
    if wanted.replaced:
        print(
            say(
                "torch {found} is not one of 2.11 to 2.13, which the course was tried with, so {pin} takes its place. "
                "That is a download of 1 to 3 GB.",
                found=wanted.replaced,
                pin=wanted.torch,
            )
        )
    elif "torch" in before:
        print(say("torch {found} stays.", found=before["torch"]))
    begun = time.monotonic()
    if wanted.requirements:
        need_room(ROOM if "torch" in before and not wanted.replaced else ROOM_FOR_TORCH)
        install(wanted)
    drop_foreign()
    after = installed()
    changed = [name for name, version in before.items() if after.get(name) != version]
    if old := in_use(changed):
        print(
            say(
                "Restart the kernel now: it still holds the old {names}. (Colab: Runtime > Restart session. Kaggle: "
                "Run > Restart & clear cell outputs. Jupyter: Kernel > Restart Kernel.) Then run this line once more; "
                "it takes seconds.",
                names=", ".join(old),
            )
        )
        return
    choose_output(Path.cwd())
    os.chdir(ROOT / "notebooks" / language)
    seconds = time.monotonic() - begun
    print(say("Ready after {seconds:.0f} s. Go on with the first cell of the notebook.", seconds=seconds))


def main(arguments: Sequence[str]) -> None:
    """Prepare; in a terminal a foreseeable mistake is a line, in a notebook it is shown as one."""
    try:
        set_up(arguments[0] if arguments else current())
    except utils.CourseError as error:
        if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
            raise
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
