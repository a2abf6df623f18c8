"""What every notebook shares and none teaches: settings, files between notebooks, the machine.

Knows the course's folders. Knows nothing of rows, models or training: the package `course` does, whose tables and
checks of exercises (`course.cells`) can be called by way of this module. Importing this module changes nothing;
`start` prepares a process and says its settings.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from course.cells import Shown, check, columns, in_html, shell, table  # noqa: F401 (for all who import utils)
from course.language import LANGUAGES, glossed, say  # noqa: F401 (notebooks use glossed)

ROOT = Path(__file__).resolve().parent
BUNDLED = ROOT / "models" / "glm4-moe-mini"
SWANLAB_MODES = ("local", "offline", "online", "cloud", "disabled")
#: How a file system says that it knows no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: A character that Unicode reserves for no text at all; it marks where a special token's spelling is broken up.
BREAK = "\ufdd0"


class CourseError(Exception):
    """A foreseeable mistake: Jupyter shows the message alone, without a stack trace."""

    def _render_traceback_(self) -> list[str]:
        return [f"CourseError: {self}"]


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """Where the course reads and writes.

    Attributes:
        model: a folder, or a model id of ModelScope such as `ZhipuAI/GLM-4.5-Air`.
        data: the training rows. output: the folder for all that the notebooks write.
        swanlab_mode: one of `SWANLAB_MODES`.
        system_prompt: that of a persona of your own; empty, the one in notebook 04.
        max_steps: training ends after so many steps; -1, after all epochs.
    """

    model: str
    data: Path
    output: Path
    swanlab_mode: str
    system_prompt: str = ""
    max_steps: int = -1

    @property
    def bundled(self) -> bool:
        """Whether the model is the one that came with the course."""
        return Path(self.model) == BUNDLED

    @property
    def default_data(self) -> bool:
        """Whether the rows are those that came with the course."""
        return self.data == ROOT / "dataset" / "huanhuan.json"


def _unknown(name: str, value: str, known: Sequence[str]) -> CourseError:
    return CourseError(
        say("{name}={value} is unknown. Use one of: {known}.", name=name, value=value, known=", ".join(known))
    )


def whole_number(name: str) -> int | None:
    """The number above 0 in a variable; None where it is unset or empty.

    Raises:
        CourseError: something else.
    """
    given = os.environ.get(name) or ""
    if given and not (given.isdecimal() and int(given)):
        raise CourseError(say("{name}={value}: a whole number above 0 is needed.", name=name, value=given))
    return int(given) if given else None


def _from_environment(name: str, default: str) -> str:
    """The value of a variable, with a leading `~` as the home folder; unset or empty, the default."""
    return os.path.expanduser(os.environ.get(name) or default)  # noqa: PTH111 (leaves an unknown ~user as it is)


def settings() -> Settings:
    """The settings from the variables `COURSE_*` and `SWANLAB_MODE` of the README, else the defaults.

    Relative paths count from the project's folder, and `~` is the home folder.

    Raises:
        CourseError: an unknown `SWANLAB_MODE` or `COURSE_LANGUAGE`, a `COURSE_MAX_STEPS` that is no number, or
            `SWANLAB_PROJECT`, which makes SwanLab crash.
    """
    mode = os.environ.get("SWANLAB_MODE") or "local"
    if mode not in SWANLAB_MODES:
        raise _unknown("SWANLAB_MODE", mode, SWANLAB_MODES)
    if (language := os.environ.get("COURSE_LANGUAGE") or "en") not in LANGUAGES:
        raise _unknown("COURSE_LANGUAGE", language, LANGUAGES)
    if "SWANLAB_PROJECT" in os.environ:
        raise CourseError(say("SWANLAB_PROJECT is set, and SwanLab 0.10 stops on it. Unset it; use SWANLAB_PROJ_NAME."))
    model = _from_environment("COURSE_MODEL", str(BUNDLED))
    if (ROOT / model).is_dir():
        model = str(ROOT / model)
    return Settings(
        model=model,
        data=ROOT / _from_environment("COURSE_DATA", "dataset/huanhuan.json"),
        output=ROOT / _from_environment("COURSE_OUTPUT", "output"),
        swanlab_mode=mode,
        system_prompt=os.environ.get("COURSE_SYSTEM_PROMPT") or "",
        max_steps=whole_number("COURSE_MAX_STEPS") or -1,
    )


def shown(path: str | Path) -> str:
    """The path as a learner should see it: from the project's folder where it lies there, else its last parts."""
    path = Path(path)
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return path.as_posix() if not path.is_absolute() else ".../" + "/".join(path.parts[-2:])


# --------------------------------------------------------------------------------------------- the process


def start() -> Settings:
    """Prepare this process and return its settings: the first line of a notebook, before torch is imported.

    It may be called again, and changes nothing then.

    Raises:
        CourseError: as `settings`.
    """
    prepare()
    explain_name_errors()
    return settings()


def prepare() -> None:
    """Set what the libraries must find before they are imported: a home folder, threads that sleep, fewer warnings."""
    need_home()
    # Threads of torch that wait spin only shortly before they sleep. Without a limit, two kernels on the same two cores
    # slow each other tenfold. With too low a limit one kernel by itself is slow: a bare step of
    # 8 rows took 1.46 s at 300, 0.52 to 0.95 s at 1,000 (2 cores, EPYC); two at once 1.3 s. torch reads it on import.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Imported by peft and transformers, it asks for a package that a processor can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Through a pipe, Python on Windows writes in the system's encoding; what that lacks becomes a question mark.
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has none, and takes every character
        sys.stdout.reconfigure(errors="replace")


def _writable(folder: Path) -> bool:
    """Whether files can be made in the folder, or in the nearest one above it that exists."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def need_home() -> None:
    """Give the libraries another home folder where that of the user cannot be written; a line says so.

    Jupyter, matplotlib, ModelScope, Hugging Face and SwanLab each make files below `HOME`, and most stop when they
    cannot. `HOME` decides for all of them, so they need no variable each.
    """
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (no error where the user has none)
    if _writable(home.absolute()):
        return
    other = ROOT / (os.environ.get("COURSE_OUTPUT") or "output") / "home"
    if not _writable(other):
        print(
            say(
                "Neither HOME={home} nor {other} can be written. "
                "Set HOME and COURSE_OUTPUT to folders that you may write.",
                home=home,
                other=other,
            )
        )
        return
    other.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = str(other)
    print(
        say(
            "HOME={home} cannot be written, so the libraries keep their files in {other}. Set HOME to change that.",
            home=home,
            other=other,
        )
    )


def explain_name_errors() -> None:
    """Let a cell that uses a name of a cell above it, which did not run yet, say so in the place of a stack trace."""
    if in_notebook := shell():
        in_notebook.set_custom_exc((NameError,), _name_error)


def _name_error(shell: Any, kind: type, error: Exception, trace: Any, tb_offset: int | None = None) -> list[str] | None:
    """In the place of a stack trace: a name that no cell has made yet, in a cell or in a function of one."""
    last = trace
    while last.tb_next:
        last = last.tb_next
    if kind is not NameError or last.tb_frame.f_globals is not shell.user_ns:
        return shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
    message = say(
        "NameError in line {line}: {error}. A cell above makes it: Run > Run All Above Selected Cell, "
        "then this one (unless it is misspelt).",
        line=last.tb_lineno,
        error=error,
    )
    shell._showtraceback(kind, error, [message])
    return None


# ---------------------------------------------------------------------------------------------- files between notebooks


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new one, never a part, even after a kill."""
    part = path.with_name(f".{path.name}-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes this file; when the system refuses, one message says what helps.

    Raises:
        CourseError: the file or its folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise not_written(path.parent, error) from None


def _within(model: str) -> str:
    """A model of the project by its place in it, for the project's folder may be moved; any other as it is."""
    path = Path(model)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else model


def locked(path: Path, seconds: float = -1) -> Any:
    """Take the lock of a file; the system gives it back when the process ends, however it ends.

    Args:
        seconds: how long to wait for another process that holds it; -1 for as long as it takes, 0 not at all.

    Returns:
        What holds it until its `release()`; None, with a line that says so, on a file system that knows no locks.

    Raises:
        filelock.Timeout: another process holds it.
    """
    from filelock import FileLock

    lock = FileLock(path, timeout=seconds, fallback_to_soft=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if not isinstance(error, NotImplementedError) and error.errno not in NO_LOCKS:
            raise
        print(
            say(
                "{folder}: this file system knows no locks. Let only one notebook at a time write there.",
                folder=shown(path.parent),
            )
        )
        return None
    return lock


def _digest_of_data(settings: Settings) -> str:
    """SHA-256 of the data file; with the default data the conversations that come with it count too."""
    digest = hashlib.sha256(settings.data.read_bytes())
    if settings.default_data:
        digest.update((ROOT / "dataset" / "conversations.jsonl").read_bytes())
    return digest.hexdigest()


def stamp(path: Path, settings: Settings, **made_with: Any) -> dict[str, Any]:
    """Write and return what the folder was made from, so that a later notebook sees when it no longer fits."""
    facts = {
        "model": _within(settings.model),
        "data": _digest_of_data(settings),
        **made_with,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / "made_from.json", json.dumps(facts))
    return facts


def name_base(adapter: Path, settings: Settings) -> None:
    """Name the base model in a saved adapter without this machine's folders, so that the adapter can be passed on.

    peft writes the path that the model was loaded from into `adapter_config.json` and `README.md`. Instead they hold a
    hub's id, the place in the project (`models/glm4-moe-mini`), or the name of a folder elsewhere.
    """
    name = _within(settings.model)
    name = Path(name).name if Path(name).is_absolute() else name
    settings_file, card = adapter / "adapter_config.json", adapter / "README.md"
    peft_settings = json.loads(settings_file.read_text(encoding="utf-8"))
    path = peft_settings["base_model_name_or_path"]
    write_whole(settings_file, json.dumps(peft_settings | {"base_model_name_or_path": name}, indent=2))
    if path and card.is_file():
        write_whole(card, card.read_text(encoding="utf-8").replace(path, name))


def restart(folder: Path) -> None:
    """Make the folder anew; what an earlier run left in it is kept as `NAME-previous`, in the place of an older one.

    A folder without a file, as a process that was killed right here leaves it, takes no finished run's place.
    """
    if any(path.is_file() for path in folder.rglob("*")):
        previous = folder.with_name(f"{folder.name}-previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def not_written(folder: Path, error: OSError) -> CourseError:
    """The message for a folder that cannot be written: what the system said, and what helps."""
    cures = {
        errno.ENOSPC: say("Free some disk, or set COURSE_OUTPUT to a folder on a larger one."),
        errno.EDQUOT: say("Free some disk, or set COURSE_OUTPUT to a folder on a larger one."),
        errno.ENAMETOOLONG: say("Set COURSE_OUTPUT to a folder with a shorter path."),
    }
    cure = cures.get(error.errno, say("Set COURSE_OUTPUT to a folder that you may write."))
    return CourseError(
        say(
            "{folder} cannot be written ({reason}). {cure}",
            folder=shown(folder),
            reason=error.strerror or error,
            cure=cure,
        )
    )


@contextmanager
def remake(folder: Path, settings: Settings, **made_with: Any) -> Iterator[Path]:
    """A new folder to write into; only when the block ends well is it stamped and takes the place of `folder`.

    A cell that fails or is killed half-way, or another notebook that writes the same, so leaves nothing half done.

    Raises:
        CourseError: another notebook put its folder there at the same moment, or the folder cannot be written.
    """
    new = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    began = False
    try:
        new.mkdir(parents=True)
        began = True
        yield new
        stamp(new, settings, **made_with)
        try:
            restart(folder)
            new.replace(folder)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise CourseError(
                    say("Another notebook writes {folder} just now. Run this cell again.", folder=shown(folder))
                ) from None
            raise
    except OSError as error:
        about = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        about = about or not began or str(error.filename).startswith((str(new), str(folder)))  # or an older one's name
        if not about:  # the block's own trouble, with another file
            raise
        raise not_written(folder, error) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def require(path: Path, notebook: str, settings: Settings, **made_with: Any) -> Path:
    """The folder `path`, which `notebook` makes.

    Raises:
        CourseError: it is missing, or was made from another model, other data, or with other settings.
    """
    try:
        facts = json.loads((path / "made_from.json").read_text(encoding="utf-8"))
        facts["data"], facts["model"]  # a file without them says nothing either
    except (OSError, ValueError, KeyError, TypeError):
        raise CourseError(
            say(
                "{path} is not there yet. Run notebook {notebook} first, then this cell again.",
                path=shown(path),
                notebook=notebook,
            )
        ) from None
    if not settings.data.is_file():
        raise CourseError(say("{path}: no such file. Check COURSE_DATA.", path=shown(settings.data)))
    if facts["data"] != _digest_of_data(settings):
        raise CourseError(
            say(
                "{path} was made from other data than {data}. Run {notebook} again.",
                path=shown(path),
                data=shown(settings.data),
                notebook=notebook,
            )
        )
    if _within(facts["model"]) != _within(settings.model):
        raise CourseError(
            say(
                "{path} was made for another model ({model}). Run {notebook} again.",
                path=shown(path),
                model=shown(facts["model"]),
                notebook=notebook,
            )
        )
    for name, value in made_with.items():
        if (found := facts.get(name)) != value:
            raise CourseError(
                say(
                    "{path} was made with {name} = {found}, not {value}. Run {notebook} again.",
                    path=shown(path),
                    name=name,
                    found=found,
                    value=value,
                    notebook=notebook,
                )
            )
    return path


def report(settings: Settings, **figures: Any) -> None:
    """Add figures to `output/report.json`, which `make run` prints at its end; two at the same time both arrive."""
    path = settings.output / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / ".report.lock") or nullcontext():
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_whole(path, json.dumps(old | figures, ensure_ascii=False, indent=1))


# ------------------------------------------------------------------------------------------------- text for a tokenizer


def as_text(tokenizer: Any, text: Any) -> Any:
    """The text with every special token's spelling broken up by `BREAK`, so that `encode` keeps it plain text.

    Args:
        text: a text, or lists and dictionaries that hold texts, such as turns and schemas of tools.
    """
    if isinstance(text, list):
        return [as_text(tokenizer, part) for part in text]
    if isinstance(text, dict):
        return {as_text(tokenizer, key): as_text(tokenizer, value) for key, value in text.items()}
    if not isinstance(text, str):
        return text
    begins = "|".join(map(re.escape, tokenizer.get_added_vocab()))
    return re.sub(f"(?={begins}).", rf"\g<0>{BREAK}", text)  # looks ahead, so it also finds spellings that overlap


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered prompt; parts divided by `BREAK` are encoded apart, so none becomes a special token."""
    return [i for part in text.split(BREAK) for i in tokenizer(part, add_special_tokens=False)["input_ids"]]


# ------------------------------------------------------------------------------------------------- packages and machine


def pins() -> dict[str, str]:
    """Package name to the version that `requirements.txt` pins."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.+-]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def wrong_packages() -> list[str]:
    """One line for each pinned package that is missing or has another version."""
    wrong = []
    for name, wanted in pins().items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(say("{name}: not installed, {wanted} wanted", name=name, wanted=wanted))
            continue
        if found.split("+")[0] != wanted:
            wrong.append(say("{name}: {found} installed, {wanted} wanted", name=name, found=found, wanted=wanted))
    return wrong


def machine() -> dict[str, float]:
    """Cores, memory in GiB (installed and free), and free disk in GiB of the project's folder."""
    from course.memory import machine_memory_gib

    memory_gib, free_memory_gib = machine_memory_gib()
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": memory_gib,
        "free_memory_gib": free_memory_gib,
        "free_disk_gib": shutil.disk_usage(ROOT).free / 2**30,
    }
