"""What the notebooks need and do not teach: settings, checks of files, messages, pictures, the chat box, a local hub.

Knows the course's folders and the form of its data. Knows nothing of LoRA, templates or training: those lines
stand in the notebooks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
BUNDLED = ROOT / "models" / "glm4-moe-mini"
FIELDS = ("instruction", "input", "output")
LONGEST_FIELD = 20_000
SWANLAB_MODES = ("local", "offline", "online", "cloud", "disabled")
#: A character that Unicode reserves for no text at all; it marks where a special token's spelling is broken up.
BREAK = "\ufdd0"


class CourseError(Exception):
    """A foreseeable mistake: Jupyter shows the message alone, without a stack trace."""

    def _render_traceback_(self) -> list[str]:
        return [f"CourseError: {self}"]


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


def settings() -> Settings:
    """The settings from `COURSE_MODEL`, `COURSE_DATA`, `COURSE_OUTPUT` and `SWANLAB_MODE`, else the defaults.

    Relative paths count from the project's folder.

    Raises:
        CourseError: an unknown `SWANLAB_MODE`, or `SWANLAB_PROJECT`, which makes SwanLab crash.
    """
    mode = os.environ.get("SWANLAB_MODE") or "local"
    if mode not in SWANLAB_MODES:
        raise CourseError(f"SWANLAB_MODE={mode} is unknown. Use one of: {', '.join(SWANLAB_MODES)}.")
    if "SWANLAB_PROJECT" in os.environ:
        raise CourseError("SWANLAB_PROJECT is set, and SwanLab 0.10 stops on it. Unset it; use SWANLAB_PROJ_NAME.")
    model = os.environ.get("COURSE_MODEL") or str(BUNDLED)
    if (ROOT / model).is_dir():
        model = str(ROOT / model)
    return Settings(
        model=model,
        data=ROOT / (os.environ.get("COURSE_DATA") or "dataset/huanhuan.json"),
        output=ROOT / (os.environ.get("COURSE_OUTPUT") or "output"),
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
        CourseError: no model there, a model id that notebook 02 has not fetched, or weights that are not safetensors.
    """
    folder = Path(course.model)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", course.model):
            raise CourseError(f"COURSE_MODEL={course.model}: no folder there, and no model id (owner/name) either.")
        note = course.output / "hub" / "fetched.json"
        fetched = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if course.model not in fetched:
            raise CourseError(
                f"{course.model} is not on this machine yet. Run notebook 02_download with internet first."
            )
        folder = course.output / "hub" / fetched[course.model]
    if not (folder / "config.json").is_file():
        raise CourseError(f"{shown(folder)}: no config.json there, so no model. Check COURSE_MODEL or run 02_download.")
    if not any(folder.glob("*.safetensors")):
        raise CourseError(f"{shown(folder)}: no *.safetensors there. The course loads no other kind of weights.")
    return folder


def stamp(path: Path, course: Settings) -> dict[str, str]:
    """Write and return what the folder was made from, so that a later notebook sees when it no longer fits."""
    facts = {"model": course.model, "data": hashlib.sha256(course.data.read_bytes()).hexdigest()}
    path.mkdir(parents=True, exist_ok=True)
    (path / "made_from.json").write_text(json.dumps(facts), encoding="utf-8")
    return facts


def restart(folder: Path) -> None:
    """Delete what an earlier run left in the folder, and make it anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def require(path: Path, notebook: str, course: Settings) -> Path:
    """The folder `path`, which `notebook` makes.

    Raises:
        CourseError: it is missing, or was made from another model or other data.
    """
    note = path / "made_from.json"
    if not note.is_file():
        raise CourseError(f"{shown(path)} is not there yet. Run notebook {notebook} first, then this cell again.")
    facts = json.loads(note.read_text(encoding="utf-8"))
    if not course.data.is_file():
        raise CourseError(f"{shown(course.data)}: no such file. Check COURSE_DATA.")
    if facts["data"] != hashlib.sha256(course.data.read_bytes()).hexdigest():
        raise CourseError(f"{shown(path)} was made from other data than {shown(course.data)}. Run {notebook} again.")
    if facts["model"] != course.model:
        raise CourseError(f"{shown(path)} was made for another model ({shown(facts['model'])}). Run {notebook} again.")
    return path


# ---------------------------------------------------------------------------------------------------- data


def row_problems(row: Any) -> list[str]:
    """What is wrong with one row, each with its mend; empty for a good row."""
    if not isinstance(row, dict):
        return [f"is {type(row).__name__}, not an object: write {{'instruction': ..., 'input': ..., 'output': ...}}"]
    problems = []
    for name in FIELDS:
        if name not in row:
            problems.append(f"has no field '{name}': add it" + (" (it may be empty)" if name == "input" else ""))
        elif not isinstance(row[name], str):
            problems.append(f"'{name}' is {type(row[name]).__name__}, not text: put it in double quotes")
        elif name != "input" and not row[name].strip():
            problems.append(f"'{name}' is empty: write it, or delete the row")
        elif len(row[name]) > LONGEST_FIELD:
            problems.append(
                f"'{name}' has {len(row[name]):,} characters, {LONGEST_FIELD:,} at most: shorten or split it"
            )
        elif BREAK in row[name]:
            problems.append(f"'{name}' holds the character U+FDD0, which stands for no text: delete it")
    return problems


def load_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a data file, every one checked.

    Returns:
        A list of objects with the three `FIELDS`, all text; further fields are dropped.

    Raises:
        CourseError: no file, not UTF-8, not JSON, not a list, or bad rows. One message names the file, each bad row
            (counted from 1; ten at most) and the mend.
    """
    name = shown(path)
    if not path.is_file():
        raise CourseError(f"{name}: no such file. Check COURSE_DATA; the default is dataset/huanhuan.json.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CourseError(f"{name}: not UTF-8 (byte {error.start}). Save the file again with encoding UTF-8.") from None
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = (
            "This looks like JSON Lines: put [ before, ] after, and commas between the rows."
            if (error.msg == "Extra data" and text.lstrip().startswith("{"))
            else "Often a missing comma, bracket or double quote."
        )
        raise CourseError(
            f"{name}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}). {hint}"
        ) from None
    if not isinstance(rows, list) or not rows:
        kind = "an empty list" if rows == [] else f"one {type(rows).__name__}"
        raise CourseError(f"{name}: holds {kind}, not a list of rows. Write [ {{...}}, {{...}} ].")
    bad = [f"row {number} {problem}" for number, row in enumerate(rows, 1) for problem in row_problems(row)]
    if bad:
        more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise CourseError(f"{name}: {len(bad)} problems, nothing was trained.\n  " + "\n  ".join(bad[:10]) + more)
    return [{key: row[key] for key in FIELDS} for row in rows]


def as_text(tokenizer: Any, text: str) -> str:
    """The text with every special token's spelling broken up by `BREAK`, so that `encode` keeps it plain text."""
    spellings = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    pattern = "|".join(map(re.escape, spellings))
    return re.sub(pattern, lambda found: found[0][0] + BREAK + found[0][1:], text)


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
            wrong.append(f"{name}: not installed, {wanted} wanted")
            continue
        if found.split("+")[0] != wanted:
            wrong.append(f"{name}: {found} installed, {wanted} wanted")
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
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def reachable(host: str, seconds: float = 3.0) -> bool:
    """Whether a TCP connection to the host's port 443 opens in that time."""
    try:
        with socket.create_connection((host, 443), timeout=seconds):
            return True
    except OSError:
        return False


def report(course: Settings, **figures: Any) -> None:
    """Add figures to `output/report.json`, which `make run` prints at its end."""
    path = course.output / "report.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(old | figures, ensure_ascii=False, indent=1), encoding="utf-8")


# ------------------------------------------------------------------------------------- tables and pictures


def table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> None:
    """Print a plain table; a Chinese character counts as two columns."""

    def width(text: str) -> int:
        return sum(2 if ord(c) > 0x2E80 else 1 for c in text)

    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(width(line[i]) for line in lines) for i in range(len(head))]
    for number, line in enumerate(lines):
        print("  ".join(cell + " " * (w - width(cell)) for cell, w in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * w for w in widths))


def token_table(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> None:
    """Print a sample token by token, with `trained` beside each token that counts in the loss."""
    rows = [
        (place, repr(tokenizer.decode([i])), i, "trained" if label != -100 else "-")
        for place, (i, label) in enumerate(zip(ids, labels, strict=True))
    ]
    table(rows, ("place", "token", "id", "label"))


def loss_picture(history: list[dict[str, float]]) -> None:
    """Draw the training loss (line) and the held-out loss (dashed, with dots) of a `Trainer`'s log history."""
    import matplotlib.pyplot as plt

    train = [(row["step"], row["loss"]) for row in history if "loss" in row]
    heldout = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    _, axes = plt.subplots(figsize=(7, 3.2))
    axes.plot(*zip(*train, strict=True), color="#4C72B0", label="training loss")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o--", color="#C44E52", label="held-out loss")
    axes.set(xlabel="step", ylabel="nats a token", title="Loss while training")
    axes.legend()
    axes.grid(alpha=0.3)
    plt.show()


def length_picture(lengths: Sequence[int], limit: int) -> None:
    """Draw how long the samples are, in tokens, with the limit named in the title."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(7, 2.6))
    axes.hist(lengths, bins=30, color="#4C72B0", edgecolor="white")
    axes.set(xlabel="tokens", ylabel="samples", title=f"Sample lengths (longest {max(lengths)}, limit {limit})")
    plt.show()


# ------------------------------------------------------------------------------------------------ chat box


def chat_box(reply: Callable[[str], dict[str, str]]) -> Any:
    """A text field, a button and the answers below it.

    Args:
        reply: takes the question, returns a name and a text for each answerer. Texts are shown as text: markup in
            them is not executed.
    """
    import ipywidgets as widgets

    field_ = widgets.Text(placeholder="你是谁？", description="Question", layout=widgets.Layout(width="70%"))
    button = widgets.Button(description="Ask", tooltip="Ask both models")
    answers = widgets.VBox()

    def ask(_: Any) -> None:
        question = field_.value.strip() or field_.placeholder
        button.disabled = True
        try:
            spoken = reply(question)
        except Exception as error:  # a widget's callback has no cell to show an error in
            spoken = {"error": f"{type(error).__name__}: {error}"}
        finally:
            button.disabled = False
        lines = [widgets.Label(f"Q: {question}")] + [widgets.Label(f"{name}: {text}") for name, text in spoken.items()]
        answers.children = (*lines, *answers.children)
        field_.value = ""

    button.on_click(ask)
    return widgets.VBox([widgets.HBox([field_, button]), answers])


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
        """Start serving on a free port."""
        hub = self

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
