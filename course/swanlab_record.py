"""SwanLab's record of a training: where it goes, whether its cloud can take it, and what a local one holds.

Knows SwanLab's settings, login and local database. Knows nothing of training.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sqlite3
import sys
import tempfile
import threading
from contextlib import closing, suppress
from getpass import getpass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import utils
from course.language import say

#: What a key or an address is copied with: spaces, line ends, quotes of several kinds, marks without width.
AROUND_A_KEY = " \t\r\n\"'`“”‘’\ufeff\u200b"


def swanlab_access() -> tuple[str, str]:
    """SwanLab's key, empty if there is none, and the address of its cloud, from wherever the library takes them.

    That is the variables `SWANLAB_API_KEY` and `SWANLAB_API_HOST`, SwanLab's settings files, and what `swanlab login`
    has left. Quotes and line ends around them are taken off; where that changes something, the clean ones are put into
    the variables, from which the library reads them first.
    """
    for name in ("SWANLAB_API_KEY", "SWANLAB_API_HOST"):
        if name in os.environ and not os.environ[name].strip(AROUND_A_KEY):
            del os.environ[name]  # an empty variable would hide what `swanlab login` has left
        elif name in os.environ:
            os.environ[name] = os.environ[name].strip(AROUND_A_KEY)
    import swanlab

    found = swanlab.Settings()
    key = (found.api_key or "").strip(AROUND_A_KEY)
    if key != (found.api_key or ""):
        os.environ.update(SWANLAB_API_KEY=key, SWANLAB_API_HOST=found.api_host)
    return key, found.api_host.rstrip("/")


def _on_this_machine(address: str) -> bool:
    name = urlsplit(address).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def cloud_trouble(seconds: float = 4.0) -> str:
    """Why SwanLab's cloud cannot record, or nothing if it can; asked as the library does, which waits up to 75 s."""
    import requests

    key, host = swanlab_access()
    header = {"authorization": key if re.fullmatch(r"[!-~]*", key) else ""}  # nothing else fits into a header
    said = ["does not answer"]

    def ask() -> None:
        with suppress(requests.RequestException, UnicodeError), requests.Session() as session:
            session.trust_env = not _on_this_machine(host)  # no proxy is asked for this machine
            status = session.post(f"{host}/api/login/api_key", headers=header, timeout=seconds).status_code
            refused = "asks for a valid SWANLAB_API_KEY" if status in (401, 403) else f"is in trouble (HTTP {status})"
            said[0] = "" if status < 400 else refused

    thread = threading.Thread(target=ask, daemon=True)  # looking up the name has no time limit of its own
    thread.start()
    thread.join(seconds)
    return said[0]


def somebody_can_answer() -> bool:
    """Whether the front end that runs this cell lets it ask a question; nbclient and a plain script do not."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    # ipykernel's own `input` looks at this before it asks; there is no public way to.
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def ask_for_key() -> bool:
    """Ask for SwanLab's key, without showing it; it is kept in this process only. False if nobody gave one."""
    if not somebody_can_answer():
        return False
    try:
        key = getpass(say("SwanLab API key (hidden): ")).strip(AROUND_A_KEY)
    except (EOFError, NotImplementedError):  # the front end takes no questions after all
        return False
    if key:
        # The host goes with it: with a key in the variable, SwanLab no longer reads what `swanlab login` has left.
        os.environ.update(SWANLAB_API_HOST=swanlab_access()[1], SWANLAB_API_KEY=key)
    return bool(key)


def recording_mode(settings: utils.Settings) -> str:
    """SwanLab's mode for the course's settings; without a cloud that answers and takes the key, `local`, and said."""
    if settings.swanlab_mode not in ("online", "cloud"):
        return settings.swanlab_mode
    trouble = cloud_trouble()
    if "SWANLAB_API_KEY" in trouble and ask_for_key():
        trouble = cloud_trouble()
    if trouble:
        print(say("The SwanLab cloud {trouble}; recording locally, to be uploaded later.", trouble=trouble))
    return "local" if trouble else "online"


def log_folder(folder: Path) -> Path:
    """The folder if it can be written, else a new one among the temporary files, and said."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        other = Path(tempfile.mkdtemp(prefix="swanlab-"))
        print(
            say(
                "{folder} cannot be written ({reason}); SwanLab records in {other}",
                folder=utils.shown(folder),
                reason=error.strerror,
                other=other,
            )
        )
        return other


def recorded(folder: Path, name: str, experiment: str = "") -> dict[int, Any]:
    """What the newest local SwanLab run in the folder, or the newest of an experiment, holds under a name.

    Returns:
        Step to value: a number, or for texts and images a list (the texts themselves, the images' file names).

    Raises:
        CourseError: no local run there (other modes keep their record elsewhere), or nothing of that name in it.
    """
    database = folder / "runs.swanlab"
    if not database.is_file():
        raise utils.CourseError(
            say("{folder}: no local SwanLab run there. Record one with SWANLAB_MODE=local.", folder=utils.shown(folder))
        )
    with closing(sqlite3.connect(database)) as connection:
        newest = "SELECT run_id, id FROM experiment WHERE ? IN ('', name) ORDER BY id DESC"
        run, number = connection.execute(newest, (experiment,)).fetchone() or ("", 0)
        where = "SELECT folder FROM tag WHERE experiment_id = ? AND name = ?"
        found = connection.execute(where, (number, name)).fetchone()
    if not found:
        raise utils.CourseError(
            say("{folder}: the newest run holds nothing under {name}.", folder=utils.shown(folder), name=name)
        )
    lines = [line for path in (folder / run / "logs" / found[0]).glob("*.log") for line in path.open(encoding="utf-8")]
    return {entry["index"]: entry["data"] for entry in map(json.loads, lines)}
