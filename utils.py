"""What the notebooks need and do not teach: settings, checks of files, messages, pictures, the chat box, a local hub.

Knows the course's folders and the form of its data. Knows nothing of LoRA, templates or training: those lines
stand in the notebooks.
"""

from __future__ import annotations

import base64
import errno
import fnmatch
import hashlib
import html
import io
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

from language import CHINESE, LANGUAGES, gloss, glossed, say, translated
from row_checks import BREAK, FIELDS, few, one_form, row_remarks  # noqa: F401 (notebook 03 uses two of them)
from row_files import read_rows

# Threads of torch that wait spin only shortly before they sleep. Without a limit, two kernels on the same two cores
# slowed each other tenfold (8.4 s instead of 0.8 s a step). Read when torch is imported, so it stands before that.
os.environ.setdefault("GOMP_SPINCOUNT", "300")

# Imported by peft and transformers, it asks for a package that a processor can do without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parent


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
        message = (
            "Neither HOME={home} nor {other} can be written. Set HOME and COURSE_OUTPUT to folders that you may write."
        )
        print(say(message, home=home, other=other))
        return
    other.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = str(other)
    message = "HOME={home} cannot be written, so the libraries keep their files in {other}. Set HOME to change that."
    print(say(message, home=home, other=other))


need_home()  # before any of them is imported
BUNDLED = ROOT / "models" / "glm4-moe-mini"
SWANLAB_MODES = ("local", "offline", "online", "cloud", "disabled")
#: What a download leaves out, whatever a hub lists: paths that lead out of the cache, and files that can hold code.
NEVER_FETCHED = ["/*", "../*", "*/../*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.py"]
#: How a file system says that it knows no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: The names of this machine, to which no request may go through a proxy.
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
#: Okabe and Ito's, told apart by colour-blind eyes; a marker, a kind of line or a word says the same each time.
BLUE, RED, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"


class CourseError(Exception):
    """A foreseeable mistake: Jupyter shows the message alone, without a stack trace."""

    def _render_traceback_(self) -> list[str]:
        return [f"CourseError: {self}"]


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


if shell := getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)():
    shell.set_custom_exc((NameError,), _name_error)


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Settings:
    """Where the course reads and writes.

    Attributes:
        model: a folder, or a model id of ModelScope such as `ZhipuAI/GLM-4.5-Air`.
        data: the training rows. output: the folder for all that the notebooks write.
        swanlab_mode: one of `SWANLAB_MODES`.
    """

    model: str
    data: Path
    output: Path
    swanlab_mode: str

    @property
    def bundled(self) -> bool:
        """Whether the model is the one that came with the course."""
        return Path(self.model) == BUNDLED

    @property
    def default_data(self) -> bool:
        """Whether the rows are those that came with the course."""
        return self.data == ROOT / "dataset" / "huanhuan.json"


def _unknown(name: str, value: str, known: Sequence[str]) -> CourseError:
    message = "{name}={value} is unknown. Use one of: {known}."
    return CourseError(say(message, name=name, value=value, known=", ".join(known)))


def _from_environment(name: str, default: str) -> str:
    """The value of a variable, with a leading `~` as the home folder; unset or empty, the default."""
    return os.path.expanduser(os.environ.get(name) or default)  # noqa: PTH111 (leaves an unknown ~user as it is)


def settings() -> Settings:
    """The settings from `COURSE_MODEL`, `COURSE_DATA`, `COURSE_OUTPUT` and `SWANLAB_MODE`, else the defaults.

    Relative paths count from the project's folder, and `~` is the home folder.

    Raises:
        CourseError: an unknown `SWANLAB_MODE` or `COURSE_LANGUAGE`, or `SWANLAB_PROJECT`, which makes SwanLab crash.
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
    )


def shown(path: str | Path) -> str:
    """The path as a learner should see it: from the project's folder where it lies there, else its last parts."""
    path = Path(path)
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return path.as_posix() if not path.is_absolute() else ".../" + "/".join(path.parts[-2:])


def model_folder(course: Settings) -> Path:
    """The folder that holds the weights.

    Raises:
        CourseError: no model there, a model id that is neither fetched by notebook 02 nor in ModelScope's cache, or a
            model that `model_check` refuses.
    """
    import model_check

    folder = Path(course.model)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", course.model):
            message = "COURSE_MODEL={model}: no folder there, and no model id (owner/name) either."
            raise CourseError(say(message, model=course.model))
        note = course.output / "hub" / "fetched.json"
        fetched = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if course.model in fetched:
            folder = course.output / "hub" / fetched[course.model]
        elif not (folder := cached_model(course.model)):
            message = (
                "{model} is not on this machine yet. Run notebook 02_download with internet first, "
                "or set COURSE_MODEL to the folder that holds the model."
            )
            raise CourseError(say(message, model=course.model))
    if not (folder / "config.json").is_file():
        message = "{folder}: no config.json there, so no model. Check COURSE_MODEL or run 02_download."
        raise CourseError(say(message, folder=shown(folder)))
    return model_check.check(folder)


def cached_model(model_id: str) -> Path | None:
    """The folder of a whole model in ModelScope's own cache (`MODELSCOPE_CACHE`, else its default), if there is one."""
    from modelscope import snapshot_download
    from modelscope_hub.errors import HubError

    # Handed over at each call, for the client reads the variable only once.
    named = os.environ.get("MODELSCOPE_CACHE")
    cache = Path(named).expanduser() if named else None
    try:
        return whole(Path(snapshot_download(model_id, cache_dir=cache, local_files_only=True)))
    except (HubError, OSError, ValueError, CourseError):  # not there, or not all of it
        return None


def whole(folder: Path) -> Path:
    """The folder of a model or an adapter, when all of its weights are there as safetensors.

    Raises:
        CourseError: pointers of Git LFS, no safetensors (a pickle may be there, which can run code when it is loaded
            and is not read), or fewer shards than the model's index names.
    """
    from model_check import read_json, refuse_pointers

    refuse_pointers(folder)
    if not any(folder.glob("*.safetensors")):
        message = "{folder}: no *.safetensors there. The course loads no other kind of weights."
        raise CourseError(say(message, folder=shown(folder)))
    index = folder / "model.safetensors.index.json"
    named = read_json(index).get("weight_map", {}).values() if index.is_file() else ()
    if missing := sorted(name for name in set(named) if not (folder / name).is_file()):
        message = (
            "{folder}: its index names weights that are missing: {missing}. Run 02_download again; "
            "if that does not bring them, the hub lacks them."
        )
        raise CourseError(say(message, folder=shown(folder), missing=", ".join(missing)))
    return folder


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new one, never a part, even after a kill."""
    part = path.with_name(f".{path.name}-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _within(model: str) -> str:
    """A model of the project by its place in it, for the project's folder may be moved; any other as it is."""
    path = Path(model)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else model


def locked(path: Path, seconds: float = -1) -> Any:
    """Take the lock that a file stands for; the system gives it back when the process ends, however it ends.

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
        message = "{folder}: this file system knows no locks. Let only one notebook at a time write there."
        print(say(message, folder=shown(path.parent)))
        return None
    return lock


def stamp(path: Path, course: Settings, **made_with: Any) -> dict[str, Any]:
    """Write and return what the folder was made from, so that a later notebook sees when it no longer fits."""
    facts = {"model": _within(course.model), "data": hashlib.sha256(course.data.read_bytes()).hexdigest(), **made_with}
    path.mkdir(parents=True, exist_ok=True)
    _write_whole(path / "made_from.json", json.dumps(facts))
    return facts


def name_base(adapter: Path, course: Settings) -> None:
    """Name the base model in a saved adapter without this machine's folders, so that the adapter can be passed on.

    peft writes the path that the model was loaded from into `adapter_config.json` and `README.md`. Instead they hold a
    hub's id, the place in the project (`models/glm4-moe-mini`), or the name of a folder elsewhere.
    """
    name = _within(course.model)
    name = Path(name).name if Path(name).is_absolute() else name
    settings_file, card = adapter / "adapter_config.json", adapter / "README.md"
    peft_settings = json.loads(settings_file.read_text(encoding="utf-8"))
    path = peft_settings["base_model_name_or_path"]
    _write_whole(settings_file, json.dumps(peft_settings | {"base_model_name_or_path": name}, indent=2))
    if path and card.is_file():
        _write_whole(card, card.read_text(encoding="utf-8").replace(path, name))


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
    message = "{folder} cannot be written ({reason}). {cure}"
    return CourseError(say(message, folder=shown(folder), reason=error.strerror or error, cure=cure))


@contextmanager
def remake(folder: Path, course: Settings, **made_with: Any) -> Iterator[Path]:
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
        stamp(new, course, **made_with)
        try:
            restart(folder)
            new.replace(folder)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                message = "Another notebook writes {folder} just now. Run this cell again."
                raise CourseError(say(message, folder=shown(folder))) from None
            raise
    except OSError as error:
        about = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        about = about or not began or str(error.filename).startswith((str(new), str(folder)))  # or an older one's name
        if not about:  # the block's own trouble, with another file
            raise
        raise not_written(folder, error) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def require(path: Path, notebook: str, course: Settings, **made_with: Any) -> Path:
    """The folder `path`, which `notebook` makes.

    Raises:
        CourseError: it is missing, or was made from another model, other data, or with other settings.
    """
    try:
        facts = json.loads((path / "made_from.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        message = "{path} is not there yet. Run notebook {notebook} first, then this cell again."
        raise CourseError(say(message, path=shown(path), notebook=notebook)) from None
    if not course.data.is_file():
        raise CourseError(say("{path}: no such file. Check COURSE_DATA.", path=shown(course.data)))
    if facts["data"] != hashlib.sha256(course.data.read_bytes()).hexdigest():
        message = "{path} was made from other data than {data}. Run {notebook} again."
        raise CourseError(say(message, path=shown(path), data=shown(course.data), notebook=notebook))
    if _within(facts["model"]) != _within(course.model):
        message = "{path} was made for another model ({model}). Run {notebook} again."
        raise CourseError(say(message, path=shown(path), model=shown(facts["model"]), notebook=notebook))
    for name, value in made_with.items():
        if (found := facts.get(name)) != value:
            message = "{path} was made with {name} = {found}, not {value}. Run {notebook} again."
            raise CourseError(say(message, path=shown(path), name=name, found=found, value=value, notebook=notebook))
    return path


# ---------------------------------------------------------------------------------------------------- data


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a data file in any of the forms that `row_files` and `row_checks` know, every one checked.

    Returns:
        A list of objects with the three `FIELDS`, all text. Only where a row has them, also `system`, a text, and
        `history`, the turns before its question as {"role", "content"}. Further fields are dropped. A line says so, and
        how the file was read if not as a list of such rows.

    Raises:
        CourseError: no file, no text, an encoding in doubt, not well formed, no rows, or bad ones. One message names
            the file, each bad row (counted from 1; ten at most) and the fix.
    """
    name = shown(path)
    if not path.is_file():
        what = say("a folder, not a file") if path.is_dir() else say("no such file")
        message = "{name}: {what}. Check COURSE_DATA; the default is dataset/huanhuan.json."
        raise CourseError(say(message, name=name, what=what))
    try:
        read = read_rows(path.read_bytes(), path.name)
    except OSError as error:
        message = "{name}: cannot be read ({reason}). Check its permissions."
        raise CourseError(say(message, name=name, reason=error.strerror)) from None
    except ValueError as error:
        raise CourseError(f"{name}: {error}") from None
    print(*(f"{name}: {line}\n" for line in read.said), sep="", end="")
    seen: Counter[tuple[str, str]] = Counter()
    rows, bad = [], []
    for number, row in enumerate(read.rows, 1):
        made, problems = one_form(row, seen)
        rows.append(made)
        bad += [say("row {number} {problem}", number=number, problem=problem) for problem in problems]
    if bad:
        message = say("{name}: {count} problems, nothing was trained.", name=name, count=len(bad))
        more = [say("... and {count} more", count=len(bad) - 10)] if len(bad) > 10 else []
        raise CourseError("\n  ".join([message, *bad[:10], *more]))
    for (key, field_name), count in seen.items():
        message = "{name}: {key!r} is read as {field!r} (in {count} of {rows} rows)."
        if field_name == "unused":
            message = "{name}: {key!r} is not used (in {count} of {rows} rows); only {fields} are."
        holes = {"field": field_name, "fields": ", ".join(FIELDS)}
        print(say(message, name=name, key=key[:30], count=count, rows=len(rows), **holes))
    return rows


def as_text(tokenizer: Any, text: str) -> str:
    """The text with every special token's spelling broken up by `BREAK`, so that `encode` keeps it plain text."""
    begins = "|".join(map(re.escape, tokenizer.get_added_vocab()))
    return re.sub(f"(?={begins}).", rf"\g<0>{BREAK}", text)  # looks ahead, so it also finds spellings that overlap


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered prompt; parts divided by `BREAK` are encoded apart, so none becomes a special token."""
    return [i for part in text.split(BREAK) for i in tokenizer(part, add_special_tokens=False)["input_ids"]]


# -------------------------------------------------------------------------------------------------- checks


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
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": memory.total / 2**30,
        "free_memory_gib": memory.available / 2**30,
        "free_disk_gib": shutil.disk_usage(ROOT).free / 2**30,
    }


def peak_memory_gib() -> float:
    """The most memory that this process has held, in GiB."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def proxy_for(url: str) -> str:
    """The proxy that a request to the address takes, as `URL (variable)` without its user and password, or nothing."""
    from requests.utils import get_environ_proxies, select_proxy

    if not (proxy := select_proxy(url, get_environ_proxies(url))):
        return ""
    names = (f"{urllib.parse.urlsplit(url).scheme}_proxy", "all_proxy")
    source = [name for name, value in os.environ.items() if name.lower() in names and value == proxy]
    return f"{re.sub('^([a-z0-9]+://)?.*@', lambda kept: kept[1] or '', proxy)} ({(source or ['system settings'])[0]})"


def _through_proxy(url: str) -> str:
    """A sentence that names the proxy of an address, with a space before it; nothing where there is none."""
    message = "The request went through the proxy {proxy}; check it, or name the host in no_proxy."
    return f" {say(message, proxy=proxy)}" if (proxy := proxy_for(url)) else ""


@contextmanager
def around_proxies() -> Iterator[None]:
    """Let requests to this machine go to it directly, whatever proxy the environment sets, until the block ends."""
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ.get(name) for name in names}
    hosts = [host for host in (before["no_proxy"] or before["NO_PROXY"] or "").split(",") if host.strip()]
    if [host.strip() for host in hosts] != ["*"]:  # a star, which must be the only entry, excepts every host already
        hosts += [host for host in THIS_MACHINE if host not in hosts]
    os.environ.update(dict.fromkeys(names, ",".join(hosts)))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def hub_answers(model_id: str, seconds: float = 5.0) -> bool:
    """Whether the hub answers in that time, asked as ModelScope's client asks it; a line says why it does not.

    The address is the client's own (`MODELSCOPE_ENDPOINT`, else ModelScope's hub), and so is the way to it: through
    the environment's proxies.
    """
    import requests
    from modelscope import HubApi

    endpoint = HubApi().endpoint
    trouble = [say("does not answer within {seconds:.0f} s", seconds=seconds)]

    def ask() -> None:
        try:
            with requests.get(endpoint, timeout=seconds, stream=True, allow_redirects=False) as answer:
                refused = answer.status_code in (403, 407) and proxy_for(endpoint)
                bad = answer.status_code >= 500 or refused
                trouble[0] = say("answers HTTP {status}", status=answer.status_code) if bad else ""
        except requests.exceptions.SSLError:
            trouble[0] = say("shows a certificate that is not trusted (REQUESTS_CA_BUNDLE names a file of yours)")
        except (requests.RequestException, ValueError) as error:
            trouble[0] = say("cannot be reached ({reason})", reason=type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(seconds)
    if trouble[0]:
        message = "{endpoint} {trouble}, so {model} cannot be fetched now. The bundled model shows the steps."
        print(say(message, endpoint=endpoint, trouble=trouble[0], model=model_id) + _through_proxy(endpoint))
    return not trouble[0]


def say_update(seconds: float = 3.0) -> None:
    """Print a line when the address in `COURSE_UPDATES` names a newer version (a date) than `deploy/VERSION`.

    Without the variable nobody is asked. No answer in that time, or one that is no date, is no news.
    """
    address, answer = os.environ.get("COURSE_UPDATES", ""), []
    if not address.startswith(("https://", "http://")):
        return

    def ask() -> None:
        with suppress(Exception), urllib.request.urlopen(address, timeout=seconds) as reply:
            answer.append(reply.read(64).decode().strip())

    asking = threading.Thread(target=ask, daemon=True)  # a name that is looked up heeds no timeout
    asking.start()
    asking.join(seconds)
    here = (ROOT / "deploy" / "VERSION").read_text(encoding="utf-8").strip()
    if answer and re.fullmatch(r"\d{4}-\d\d-\d\d", answer[0]) and answer[0] > here:
        print(say("A newer version of the course is out: {new}. Yours is of {here}.", new=answer[0], here=here))


def recorded(folder: Path, name: str, experiment: str = "") -> dict[int, Any]:
    """What the newest local SwanLab run in the folder, or the newest of an experiment, holds under a name.

    Returns:
        Step to value: a number, or for texts and images a list (the texts themselves, the images' file names).

    Raises:
        CourseError: no local run there (other modes keep their record elsewhere), or nothing of that name in it.
    """
    database = folder / "runs.swanlab"
    if not database.is_file():
        message = "{folder}: no local SwanLab run there. Record one with SWANLAB_MODE=local."
        raise CourseError(say(message, folder=shown(folder)))
    with closing(sqlite3.connect(database)) as connection:
        newest = "SELECT run_id, id FROM experiment WHERE ? IN ('', name) ORDER BY id DESC"
        run, number = connection.execute(newest, (experiment,)).fetchone() or ("", 0)
        where = "SELECT folder FROM tag WHERE experiment_id = ? AND name = ?"
        found = connection.execute(where, (number, name)).fetchone()
    if not found:
        message = "{folder}: the newest run holds nothing under {name}."
        raise CourseError(say(message, folder=shown(folder), name=name))
    lines = [line for path in (folder / run / "logs" / found[0]).glob("*.log") for line in path.open(encoding="utf-8")]
    return {entry["index"]: entry["data"] for entry in map(json.loads, lines)}


def report(course: Settings, **figures: Any) -> None:
    """Add figures to `output/report.json`, which `make run` prints at its end; two at the same time both arrive."""
    path = course.output / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / ".report.lock") or nullcontext():
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        _write_whole(path, json.dumps(old | figures, ensure_ascii=False, indent=1))


# ------------------------------------------------------------------------------------- tables and pictures


@dataclass(frozen=True)
class Shown:
    """What a cell shows: `html` in a browser, and the same facts as plain `text` for everybody else; `png` if drawn."""

    html: str
    text: str
    png: bytes = b""

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        """The plain twin; nbval compares it."""
        return self.text


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(2 if ord(c) > 0x2E80 else 1 for c in text)


def table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> None:
    """Show a table. In plain text a Chinese character counts as two columns, as in a terminal.

    The fonts of a browser keep to no such rule, so a notebook shows a table that holds Chinese as HTML: its columns
    stay straight, and a long text is broken within its own. In an English notebook the glosses of a row's Chinese
    texts stand below it, each in its column. A row without any gloss, say of data of your own, has no such lines.
    """
    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(_columns(line[i]) for line in lines) for i in range(len(head))]
    glosses = [
        [(gloss(cell) or "(no gloss)" * bool(CHINESE.search(cell))) * any(map(gloss, line)) for cell in line]
        for line in lines
    ]
    text = []
    for line, meant in zip(lines, glosses, strict=True):
        text.append("  ".join(cell + " " * (w - _columns(cell)) for cell, w in zip(line, widths, strict=True)).rstrip())
        for below in zip_longest(*map(textwrap.wrap, meant, (max(w, 1) for w in widths)), fillvalue=""):
            text.append("  ".join(map(str.ljust, below, widths)).rstrip())
    text.insert(1, "  ".join("-" * w for w in widths))
    if shell and any(map(CHINESE.search, text)):
        from IPython.display import display

        display(Shown(_table_html(lines, glosses), "\n".join(text)))
    else:
        print("\n".join(text))


def _table_html(lines: Sequence[Sequence[str]], glosses: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head, each text with its gloss, if any, below it."""
    made = ""
    for number, pairs in enumerate(map(zip, lines, glosses)):
        cell = '<td style="text-align:left">{}</td>' if number else '<th style="text-align:left">{}</th>'
        texts = (_in_html(text) + f"<br><i>{_in_html(meant)}</i>" * bool(meant) for text, meant in pairs)
        made += f"<tr>{''.join(map(cell.format, texts))}</tr>"
    return f"<table>{made}</table>"


def _in_html(text: str) -> str:
    """The text for HTML that shows it as it is: no tag in it works, and no MathJax takes `$...$` for a formula."""
    return re.sub(r"[$\\]", r"<span>\g<0></span>", html.escape(text))


def _token_boxes(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, int, bool]]:
    """What stands in each box of a mask: its text, its number of tokens, and whether they are trained.

    Tokens that only together make a character (its bytes) share a box.

    Raises:
        ValueError: `ids` and `labels` differ in length.
    """
    if len(ids) != len(labels):
        raise ValueError(f"{len(ids)} ids but {len(labels)} labels: a label belongs to each token")
    boxes, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if "\ufffd" not in text or end - start > 6 or end == len(ids):
            boxes.append((text.replace("\n", "⏎"), end - start, labels[end - 1] != -100))
            start = end
    return boxes


def mask_view(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> Shown:
    """A sample token by token: trained ones on blue with ●, read ones on white with ○; the twin divides tokens by │."""
    boxes = _token_boxes(tokenizer, ids, labels)
    style = "display:inline-block;margin:2px;padding:1px 4px;border:1px solid #888;color:#000;background:"
    parts = []
    for text, count, trained in boxes:
        sign, colour = ("●", "#bcdcff;border-bottom:4px solid #0b4f9c") if trained else ("○", "#fff")
        many = f"<sub>{say('{count} tokens', count=count)}</sub>" if count > 1 else ""
        parts.append(f'<span style="{style}{colour}">{sign} {_in_html(text)}{many}</span>')
    count = sum(label != -100 for label in labels)
    message = "● trained: {trained} tokens &nbsp; ○ read only: {read} tokens"
    key = say(message, trained=count, read=len(ids) - count)
    lines = []
    for position, (text, many, trained) in enumerate(boxes):
        if position == 0 or trained != boxes[position - 1][2]:
            lines.append(say("trained ● │") if trained else say("read    ○ │"))
        lines[-1] += text + (f"({many})" if many > 1 else "") + "│"
    summary = say("{count} of {all} tokens are trained", count=count, all=len(ids))
    return Shown(f"<div>{key}</div><div>{''.join(parts)}</div>", "\n".join([*lines, summary]))


@cache
def pyplot() -> Any:
    """Matplotlib's pyplot in the style of the course, once for each process.

    Chinese is drawn with the course's own font, what it lacks with matplotlib's, and the rest with the machine's.
    """
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    font_manager.fontManager.addfont(ROOT / "images" / "fonts" / "HuanhuanHei.otf")
    there = font_manager.get_font_names()  # a family that is not there would be warned of
    machine = [name for name in ("Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC") if name in there]
    plt.rcParams.update(
        {
            "font.family": ["Huanhuan Hei", "DejaVu Sans", *machine],
            "axes.prop_cycle": plt.cycler(
                color=[BLUE, RED, GREEN, PURPLE, BLACK], linestyle=["-", "--", "-.", ":", (0, (1, 3))]
            ),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.3,
        }
    )
    return plt


def picture(figure: Any, alt: str) -> Shown:
    """A matplotlib figure as an image with `alt` both as its alt text and as its caption; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight", facecolor="white")
    pyplot().close(figure)
    png = buffer.getvalue()
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
    return Shown(f"<figure>{image}<figcaption>{_in_html(alt)}</figcaption></figure>", alt, png)


def axes(columns: int = 1, width: float = 7.0, height: float = 2.8) -> tuple[Any, list[Any]]:
    """A figure and its axes side by side, in the style of the course."""
    figure, grid = pyplot().subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, list(grid[0])


def mask_picture(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> Shown:
    """The mask of a sample as a picture, for a record that holds no HTML: trained tokens on blue with ●."""
    rows, used = [[]], 0
    for text, _, trained in _token_boxes(tokenizer, ids, labels):
        columns = 3 + _columns(text)
        if used + columns > 72:
            rows, used = [*rows, []], 0
        rows[-1].append((used, f"{'●' if trained else '○'} {text}", trained))
        used += columns
    figure, (plot,) = axes(height=0.4 * len(rows) + 0.2)
    plot.set(xlim=(0, 72), ylim=(len(rows) - 0.5, -0.5))
    plot.set_axis_off()
    for line, row in enumerate(rows):
        for left, text, trained in row:
            box = {"facecolor": "#bcdcff" if trained else "white", "edgecolor": "#0b4f9c" if trained else "#888888"}
            plot.text(left, line, text.replace("$", r"\$"), fontsize=9, va="center", bbox={"boxstyle": "square", **box})
    count = sum(label != -100 for label in labels)
    message = "Mask of a sample: ● {count} of {all} tokens are trained, ○ the others are read only."
    return picture(figure, say(message, count=count, all=len(ids)))


def length_picture(lengths: Sequence[int], limit: int) -> Shown:
    """How long the samples are, in tokens."""
    figure, (plot,) = axes()
    plot.hist(lengths, bins=30, color=BLUE, edgecolor="white")
    title = say("Sample lengths (limit {limit})", limit=limit)
    plot.set(xlabel=say("tokens"), ylabel=say("samples"), title=title)
    middle = sorted(lengths)[len(lengths) // 2]
    message = "Histogram: {count} samples of {least} to {most} tokens, median {middle}."
    alt = say(message, count=len(lengths), least=min(lengths), most=max(lengths), middle=middle)
    return picture(figure, alt)


def nearest_picture(nearest: dict[str, Sequence[float]], limit: float) -> Shown:
    """For each way to split, how similar (0 to 100) a held-out question is to the nearest training question."""
    figure, plots = axes(len(nearest))
    said = []
    for plot, (name, values) in zip(plots, nearest.items(), strict=True):
        plot.hist(values, bins=range(0, 105, 5), color=BLUE, edgecolor="white")
        plot.axvline(limit, color=RED, linestyle="--")
        plot.set(title=say(name), xlabel=say("similarity"), ylabel=say("held-out questions"))
        message = "{name}: {near} of {count} at {limit:.0f} or more"
        near = sum(v >= limit for v in values)
        said.append(say(message, name=say(name), near=near, count=len(values), limit=limit))
    message = "Similarity of held-out to nearest kept questions. {panels} (dashed line)."
    return picture(figure, say(message, panels=say("; ").join(said)))


def share_picture(groups: dict[str, dict[str, int]]) -> Shown:
    """Bars of the trainable parameters of each group, one panel a model."""
    figure, plots = axes(len(groups))
    said = []
    for plot, (name, counts) in zip(plots, groups.items(), strict=True):
        total = sum(counts.values())
        bars = plot.barh(list(map(say, counts)), [100 * count / total for count in counts.values()], color=BLUE)
        plot.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=3, fontsize=8)
        plot.set(title=say(name), xlabel=say("% of the adapter"), xlim=(0, 150))
        plot.invert_yaxis()
        shares = say(", ").join(f"{say(group)} {count / total:.1%}" for group, count in counts.items())
        said.append(say("{title}: {shares}", title=say(name), shares=shares))
    return picture(figure, say("Trainable parameters by group. {panels}.", panels=say("; ").join(said)))


def moved_picture(sizes: dict[str, dict[int, float]]) -> Shown:
    """The size of each `lora_B` (root mean square), by layer; one marker a module."""
    figure, (plot,) = axes(height=3.4)
    for (name, by_layer), marker in zip(sizes.items(), "os^vDP*X<>dhp", strict=False):
        plot.plot(list(by_layer), list(by_layer.values()), marker, label=name, alpha=0.8)
    title, size = say("Did every adapter move?"), say("root mean square of lora_B")
    plot.set(xlabel=say("layer"), ylabel=size, title=title, ylim=(0, None))
    plot.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    every = [value for by_layer in sizes.values() for value in by_layer.values()]
    still = sum(value == 0 for value in every)
    message = "{count} matrices lora_B; {still} stand at zero; sizes from {least:.4f} to {most:.4f}."
    return picture(figure, say(message, count=len(every), still=still, least=min(every), most=max(every)))


def loss_picture(history: Sequence[dict[str, float]]) -> Shown:
    """Training loss (line) and every held-out loss (dashed, each with a marker of its own) of a `Trainer`'s log."""
    curves: dict[str, dict[int, float]] = {"training": {}}
    for row in history:
        for key, value in row.items():
            if key == "loss":
                curves["training"][row["step"]] = value
            elif held_out := re.fullmatch(r"eval_(?:(.+)_)?loss", key):
                name = (held_out[1] or "held-out").replace("_", " ")
                curves.setdefault(name, {})[row["step"]] = value
    curves = {name: curve for name, curve in curves.items() if curve}
    figure, (plot,) = axes(height=3.2)
    looks = dict(zip((name for name in curves if name != "training"), ("o--", "s:", "^-."), strict=False))
    said = []
    for (name, curve), colour in zip(curves.items(), (BLUE, RED, GREEN, BLACK), strict=False):
        plot.plot(list(curve), list(curve.values()), looks.get(name, "-"), color=colour, label=say(name))
        first, last = min(curve), max(curve)
        message = "{name} from {start:.2f} at step {first} to {end:.2f} at step {last}"
        said.append(say(message, name=say(name), start=curve[first], first=first, end=curve[last], last=last))
    plot.set(xlabel=say("step"), ylabel=say("nats a token"), title=say("Loss while training"), ylim=(0, None))
    plot.grid()
    if curves:
        plot.legend()
    return picture(figure, say("Loss: {curves}.", curves=say("; ").join(said) or say("nothing yet")))


def routing_picture(shares: dict[str, Any], first_layer: int) -> Shown:
    """Heat maps of the share of tokens (in %) that each layer sends to each expert; the figures stand in the cells.

    Args:
        shares: title to an array of shape (layers, experts) whose rows sum to 1.
        first_layer: the number of the first layer that has experts.
    """
    figure, plots = axes(len(shares), width=3.6 * len(shares), height=3.4)
    top = max(float(array.max()) for array in shares.values())
    said = []
    for plot, (title, array) in zip(plots, shares.items(), strict=True):
        image = plot.imshow(100 * array, cmap="Blues", vmin=0, vmax=100 * top, aspect="auto")
        plot.set(title=say(title), xlabel=say("expert"), ylabel=say("layer"))
        some = range(0, len(array), -(-len(array) // 12))
        plot.set_yticks(some, [first_layer + i for i in some])
        if array.size <= 200:  # with 128 experts the figures would cover the picture
            for i, row in enumerate(array):
                for j, value in enumerate(row):
                    ink = "white" if value > 0.72 * top else "black"
                    plot.text(j, i, f"{value:.0%}"[:-1], ha="center", va="center", fontsize=8, color=ink)
        elif plot is plots[-1]:
            figure.colorbar(image, label=say("% of a layer's tokens"))
        busiest = array.argmax() // array.shape[1], array.argmax() % array.shape[1]
        message = "{title}: most used is expert {expert} of layer {layer}, {share:.0%}"
        layer = first_layer + busiest[0]
        said.append(say(message, title=say(title), expert=busiest[1], layer=layer, share=array.max()))
    return picture(figure, say("Share of tokens by layer and expert, in %. {panels}.", panels=say("; ").join(said)))


# ---------------------------------------------------------------------------------------------------- progress


def _bar(done: int, count: int, what: str, begun: float) -> Shown:
    """How far it is; the text is always the same, so that a stored output does not depend on the speed."""
    seconds = (time.monotonic() - begun) / max(done, 1) * (count - done)
    message, what = "{what}: {done} of {count}", translated(what)
    if 0 < done < count:
        message = "{what}: {done} of {count}, about {seconds:.0f} s left"
    text = say(message, what=what, done=done, count=count, seconds=seconds)
    bar = f'<progress value="{done}" max="{count}" aria-label="{what}"></progress> {text}'
    return Shown(f"<div>{bar}</div>", f"{what}: {count}")


def progress(items: Sequence[Any], what: str) -> Iterator[Any]:
    """The items one by one, under a bar with the time left."""
    from IPython.display import display

    begun = time.monotonic()
    shown = display(_bar(0, len(items), what, begun), display_id=True)
    for done, item in enumerate(items, 1):
        yield item
        shown.update(_bar(done, len(items), what, begun))


def watched(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does, under a bar that follows its lines of the form `step 3/12`."""
    from IPython.display import display

    def bar(done: int, count: int) -> Shown:
        drawn = _bar(done, count, "steps", begun)
        return Shown(drawn.html, drawn.text.partition(":")[0])  # how many steps is not known at the beginning

    begun, lines = time.monotonic(), []
    shown = display(bar(0, 1), display_id=True)
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            for line in process.stdout:
                lines.append(line)
                if step := re.match(r"step (\d+)/(\d+)", line):
                    shown.update(bar(int(step[1]), int(step[2])))
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, "".join(lines), errors.read())


# ---------------------------------------------------------------------------------- exercises and the chat box


def check(given: Any, *tests: tuple[Callable[[Any], bool], str]) -> None:
    """Say whether the answer to an exercise is right, and if not, why.

    Args:
        given: the learner's answer; `...` means that there is none yet.
        tests: pairs of a function of the answer that is true for a right one, and what to say when it is not. The
            first that fails speaks; an exception in it counts as a failure and is named.
    """
    if given is ...:
        print(say("○ open: put your answer in the place of ... and run both cells"))
        return
    for right, advice in tests:
        try:
            passed, trouble = bool(right(given)), ""
        except Exception as error:  # the learner's code may do anything
            passed, trouble = False, f" ({type(error).__name__}: {error})"
        if not passed:
            print(say("✗ not yet: {advice}{trouble}", advice=translated(advice), trouble=trouble))
            return
    print(say("✓ right"))


def chat_box(reply: Callable[[str, list[dict[str, str]]], str], template: Callable[[list[dict[str, str]]], str]) -> Any:
    """A chat with base and adapter side by side, and the text that the template makes of the conversation on demand.

    Args:
        reply: takes "base" or "adapter" and the turns so far (`role`, `content`), returns the answer.
        template: takes the turns, returns the prompt as the model reads it.

    Questions and answers go into text areas only, which show markup as text and execute none of it.
    """
    import ipywidgets as widgets

    wide = widgets.Layout(width="auto")
    question = widgets.Text(placeholder="你是谁？", description=say("Question"), layout=widgets.Layout(width="60%"))
    ask = widgets.Button(description=say("Ask"), tooltip=say("Ask both models"))
    keep = widgets.Checkbox(description=say("keep the conversation"), indent=False, value=False)
    show = widgets.Checkbox(description=say("show the template's text"), indent=False, value=False)
    prompt = widgets.Textarea(
        rows=8, tooltip=say("what the adapter reads"), layout=widgets.Layout(width="auto", display="none")
    )
    heads = {"base": say("base"), "adapter": say("adapter")}
    columns = {
        name: widgets.VBox([widgets.Label(head)], layout=widgets.Layout(width="50%")) for name, head in heads.items()
    }
    turns: dict[str, list[dict[str, str]]] = {name: [] for name in columns}

    def meant(text: str) -> str:
        return glossed(text) if gloss(text) else text  # most of what is typed here has no gloss

    def answer(_: Any) -> None:
        asked = question.value.strip() or question.placeholder
        ask.disabled = True
        for name, column in columns.items():
            turns[name] = [*(turns[name] if keep.value else []), {"role": "user", "content": asked}]
            if name == "adapter":
                prompt.value = template(turns[name])
            try:
                said = reply(name, turns[name])
                turns[name].append({"role": "assistant", "content": said})
            except Exception as error:  # a widget's callback has no cell to show an error in
                said, turns[name] = f"{type(error).__name__}: {error}", []
            text = f"{say('Q: {question}', question=meant(asked))}\n{meant(said)}"
            rows = 1 + sum(1 + _columns(line) // 50 for line in text.splitlines())  # Chinese lines are the taller ones
            tooltip = say("answer of the {name}", name=heads[name])
            turn = widgets.Textarea(text, rows=min(12, rows), layout=wide, tooltip=tooltip)
            column.children = (column.children[0], turn, *column.children[1:])
        ask.disabled = False
        question.value = ""

    def unfold(change: dict[str, Any]) -> None:
        prompt.layout.display = "" if change["new"] else "none"

    ask.on_click(answer)
    question.on_msg(lambda _, message, __: answer(None) if message.get("event") == "submit" else None)  # the Enter key
    show.observe(unfold, "value")
    return widgets.VBox(
        [widgets.HBox([question, ask]), widgets.HBox([keep, show]), prompt, widgets.HBox(list(columns.values()))]
    )


# ------------------------------------------------------------------------------------------------ downloads


def still_to_fetch(listing: Iterable[Any], model_id: str, cache: Path) -> list[str]:
    """Which files of a hub's listing are not in the cache at their full length; checked before the first byte.

    The client moves a file to its place only after its hash was right, so a file of the right length needs no second
    reading.

    Args:
        listing: entries with `path`, `size` and `type`, as `HubApi.list_repo_files` returns them.

    Raises:
        CourseError: a path leads out of the cache (the client itself would write there), or the disk is too small.
    """
    folder = cache / "models" / model_id.replace("/", "--") / "snapshots" / "master"
    folder.mkdir(parents=True, exist_ok=True)
    missing, needed = [], 0
    for file in listing:
        target = folder / file.path
        if not target.resolve().is_relative_to(folder.resolve()):
            message = (
                "{model}: {path!r} leads out of {cache}, so nothing was fetched. "
                "Check COURSE_MODEL, and that folder for links."
            )
            raise CourseError(say(message, model=model_id, path=file.path, cache=shown(cache)))
        ignored = any(fnmatch.fnmatch(file.path, pattern) for pattern in NEVER_FETCHED)
        if file.type == "tree" or ignored or (target.is_file() and target.stat().st_size == file.size):
            continue
        begun = target.with_name(target.name + ".incomplete")
        missing.append(file.path)
        needed += file.size - (begun.stat().st_size if begun.is_file() else 0)
    if needed > (free := shutil.disk_usage(folder).free):
        message = (
            "{model}: {needed:,.0f} MiB are still to come and {free:,.0f} MiB of disk are free. "
            "Free some, or set COURSE_OUTPUT to a folder on a larger disk."
        )
        raise CourseError(say(message, model=model_id, needed=needed / 2**20, free=free / 2**20))
    return missing


@contextmanager
def download_errors(model_id: str, endpoint: str | None = None) -> Iterator[None]:
    """Turn whatever stops a ModelScope download into one message with the cure, in the place of the client's own.

    Args:
        endpoint: the hub's address, to name the proxy on the way to it; None for the client's own.
    """
    from modelscope import HubApi

    client = logging.getLogger("modelscope_hub.download")

    def no_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR  # warnings show how it tries again; the error is said below

    client.addFilter(no_error)
    try:
        yield
    except CourseError:
        raise
    except Exception as error:
        failed = list((getattr(error, "failed_files", None) or {"": error}).items())
        # One file's error stands for all; a full disk before others, for it may be their cause.
        name, cause = max(failed, key=lambda one: getattr(one[1], "errno", None) == errno.ENOSPC)
        files = f": {name}" if name else ""
        if name and len(failed) > 1:
            files += say(" and {count} more", count=len(failed) - 1)
        local = getattr(cause, "errno", None) == errno.ENOSPC
        through = "" if local else _through_proxy(endpoint or HubApi().endpoint)
        raise CourseError(f"{model_id}{files}: {_download_advice(name, cause)}{through}") from None
    finally:
        client.removeFilter(no_error)


def _download_advice(name: str, error: BaseException) -> str:
    """What happened to a file (or, without a name, to the listing), and the mend."""
    from modelscope_hub import errors as hub

    again = say("Run this cell again: what has arrived is kept, and only the rest is fetched.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = "the disk is full. Free some, or set COURSE_OUTPUT to a folder on a larger disk. {again}"
        return say(message, again=again)
    if isinstance(error.__cause__, hub.HubError) and not isinstance(error, hub.HubError):
        error = error.__cause__  # the client wraps some in an error of `requests`
    if isinstance(error, hub.NotExistError):
        if name:
            return say("the hub lists this file and does not have it. Try again later, or another model.")
        return say("the hub knows no such model. Check COURSE_MODEL for a slip of the pen.")
    if isinstance(error, (hub.AuthenticationError, hub.PermissionDeniedError)):
        return say(
            "the hub asks who you are. Put your token in the variable MODELSCOPE_API_TOKEN, or choose an open model."
        )
    if isinstance(error, hub.FileIntegrityError):
        message = "what arrived is not what the hub lists (length or SHA-256), so it was thrown away. Later: {again}"
        return say(message, again=again)
    if isinstance(error, (hub.ServerError, hub.RateLimitError)):
        message = "the hub is in trouble or overrun (HTTP {status}). Wait a little. {again}"
        return say(message, status=error.status_code, again=again)
    if isinstance(error, (hub.NetworkError, ConnectionError, TimeoutError)):
        return say("the connection broke off or stood still, several times. Check the network. {again}", again=again)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}. {again}"


# --------------------------------------------------------------------------------------------- a local hub


@dataclass
class LocalHub:
    """A server on 127.0.0.1 that speaks the routes a ModelScope download asks for, and serves one folder.

    Attributes:
        folder: what it serves. model_id: under which id. drop_once: a file whose first transfer is broken off
            half-way, to see the client resume. sent: bytes sent for each request, as (file, first byte, bytes).
    """

    folder: Path
    model_id: str
    drop_once: str = ""
    sent: list[tuple[str, int, int]] = field(default_factory=list)

    def __enter__(self) -> LocalHub:
        """Start serving on a free port, which requests of this process reach without a proxy."""
        hub = self
        self._direct = around_proxies()
        self._direct.__enter__()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop serving."""
        self._direct.__exit__(None, None, None)
        self._server.shutdown()
        self._server.server_close()

    def _files(self) -> list[dict[str, Any]]:
        return [
            {
                "Name": path.name,
                "Path": path.name,
                "Type": "blob",
                "Size": path.stat().st_size,
                "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "Revision": "master",
                "IsLFS": path.suffix == ".safetensors",
            }
            for path in sorted(self.folder.iterdir())
            if path.is_file()
        ]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(request.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        base = f"/api/v1/models/{self.model_id}/repo"
        # A listed name is matched, never joined to a path, so no request leaves the folder.
        served = {path.name: path for path in self.folder.iterdir() if path.is_file()}
        if url.path == f"{base}/files":
            body = json.dumps({"Code": 200, "Success": True, "Data": {"Files": self._files()}}).encode()
            self._send(request, 200, body, {"Content-Type": "application/json"})
        elif url.path == base and query.get("FilePath") in served:
            self._send_file(request, served[query["FilePath"]])
        else:
            self._send(request, 404, b'{"Code": 404, "Success": false, "Message": "not found"}', {})

    def _send_file(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]), len(data) - 1) if asked and asked[2] else len(data) - 1
        part = data[first : last + 1]
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if asked else {}
        if path.name == self.drop_once:
            self.drop_once = ""
            half = part[: len(part) // 2]
            self.sent.append((path.name, first, len(half)))
            self._send(request, 206 if asked else 200, half, {**headers, "Content-Length": str(len(part))})
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        self.sent.append((path.name, first, len(part)))
        self._send(request, 206 if asked else 200, part, headers)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)
