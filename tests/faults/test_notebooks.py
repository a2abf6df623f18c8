"""Notebooks used as people use them: cells out of order and twice, restarts, other folders, two at once, kills.

Real kernels. Each case ends in the right files or in one clear message, never in another run's files.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import address
import headless
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

import utils
from course.rows import load_rows

EN = ROOT / "notebooks" / "en"
STARTUP = {"PYTHONSTARTUP": str(ROOT / "course" / "startup.py")}
FOUND_TOO_EARLY = "A cell above makes it: Run > Run All Above Selected Cell"
TEA = ROOT / "dataset" / "teahouse.json"


class Learner:
    """Somebody with one notebook open: runs its cells, by number or by a text in them, and sees what they say."""

    def __init__(self, client: NotebookClient) -> None:
        self.client = client
        self.code = [i for i, cell in enumerate(client.nb.cells) if cell.cell_type == "code"]

    def holding(self, text: str) -> int:
        (number,) = (i for i in self.code if text in self.client.nb.cells[i].source)
        return number

    def run(self, which: int | str, **changes: str) -> tuple[str, str]:
        """The name of the error, empty if there was none, and all that the error showed."""
        number = self.holding(which) if isinstance(which, str) else which
        cell = self.client.nb.cells[number]
        for old, new in changes.items():
            assert old in cell.source
            cell.source = cell.source.replace(old, new)
        try:
            self.client.execute_cell(cell, number)
        except CellExecutionError as error:
            (output,) = (o for o in cell.outputs if o.output_type == "error")
            return error.ename, "\n".join(output.traceback)
        return "", ""

    def run_all(self) -> None:
        for number in self.code:
            assert self.run(number) == ("", ""), self.client.nb.cells[number].id


@contextmanager
def opened(name: str, output: Path, folder: Path = EN, **env: str) -> Iterator[Learner]:
    """A notebook in a fresh kernel whose working folder is `folder`."""
    notebook = nbformat.read(EN / f"{name}.ipynb", as_version=4)
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=120, resources=place, kernel_manager_class=headless.Manager)
    with client.setup_kernel(env={**os.environ, "COURSE_OUTPUT": str(output), **env}):
        yield Learner(client)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; what `datasets` notes about its own making differs from run to run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("state.json", "dataset_info.json"):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What notebooks 03 and 04 write when they are run once, in order: the measure for everything below."""
    output = tmp_path_factory.mktemp("right")
    for name in ("03_dataset", "04_chat_template"):
        with opened(name, output) as learner:
            learner.run_all()
    return {part: files(output / part) for part in ("rows", "tokens")}


@pytest.fixture
def output(right: dict[str, dict[str, bytes]], tmp_path: Path) -> Path:
    """An output folder in which 03 and 04 have been run."""
    for part, inside in right.items():
        for name, data in inside.items():
            path = tmp_path / "out" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return tmp_path / "out"


def written(output: Path) -> dict[str, dict[str, bytes]]:
    return {part: files(output / part) for part in ("rows", "tokens")}


def is_clear(error: str, shown: str) -> bool:
    """Whether a cell either ran or said in one line what to do."""
    return not error or (
        "Traceback" not in shown
        and len(shown.splitlines()) == 1
        and {"NameError": FOUND_TOO_EARLY in shown, "CourseError": True}.get(error, False)
    )


# ------------------------------------------------------------------------------- one notebook, another order


@pytest.mark.parametrize("name", ["01_environment", "03_dataset", "04_chat_template"])
def test_backwards_then_in_order_then_backwards(right, output, name, fault):
    with opened(name, output) as learner:
        learner.run(learner.code[0])
        said = [learner.run(number) for number in reversed(learner.code[1:])]
        assert all(is_clear(*one) for one in said), said
        assert any(error == "NameError" for error, _ in said)
        assert written(output) == right  # a cell that failed has taken nothing away
        learner.run_all()
        for number in reversed(learner.code):  # any cell once more, with all that later cells have made
            assert learner.run(number) == ("", ""), learner.client.nb.cells[number].id
    assert written(output) == right
    fault.record(
        "notebooks",
        f"{name}: cells backwards, in order, backwards",
        "a real kernel",
        "each gives its result or one line that says what to do; the files are those of a clean run",
    )


@pytest.mark.parametrize("name", ["01_environment", "03_dataset", "04_chat_template"])
def test_every_cell_twice(right, output, name, fault):
    with opened(name, output) as learner:
        for number in learner.code:
            assert learner.run(number) == ("", "")
            assert learner.run(number) == ("", "")
    assert written(output) == right
    fault.record("notebooks", f"{name}: every cell twice", "a real kernel", "the files are those of a clean run")


@pytest.mark.parametrize("name", ["03_dataset", "04_chat_template", "05_lora_training", "06_inference"])
def test_a_restarted_kernel_says_at_any_cell_what_to_run(right, output, name, fault):
    """As `make lab` starts kernels; without its startup file a kernel knows no message before `utils.start`."""
    with opened(name, output, **STARTUP) as learner:
        said = [learner.run(number) for number in reversed(learner.code[1:])]
    assert all(is_clear(*one) for one in said), said
    assert sum(error == "NameError" for error, _ in said) > len(said) / 3
    assert written(output) == right
    fault.record(
        "notebooks",
        f"{name}: a cell in a kernel just restarted",
        "each cell alone, as make lab starts kernels",
        "one line says what to run; nothing is written",
    )


def test_a_kernel_restarted_in_the_middle_goes_on_after_run_all_above(right, output, fault):
    with opened("04_chat_template", output, **STARTUP) as learner:
        middle = learner.holding("parts, cut = {}, []")
        error, shown = learner.run(middle)
        assert (error, FOUND_TOO_EARLY in shown) == ("NameError", True)
        for number in learner.code:
            assert learner.run(number) == ("", "")
    assert written(output) == right
    fault.record(
        "notebooks",
        "04: kernel restarted in the middle",
        "a cell that needs others, then all in order",
        "one line says what to run; the files are those of a clean run",
    )


def test_the_startup_file_leaves_no_name_behind_and_a_typo_in_a_library_keeps_its_trace(tmp_path):
    code = 'print(sorted(n for n in dir() if n in ("sys", "utils", "os")))\nexec("missing", {})'
    cells = [nbformat.v4.new_code_cell(source) for source in (code, "def f():\n    g = g\n\n\nf()")]
    client = NotebookClient(nbformat.v4.new_notebook(cells=cells), allow_errors=True)
    with client.setup_kernel(env={**os.environ, **STARTUP}):
        for number, cell in enumerate(cells):
            client.execute_cell(cell, number)
    assert cells[0].outputs[0].text == "[]\n"
    assert "Traceback" in "\n".join(cells[0].outputs[1].traceback)  # not made in a cell: the trace is needed
    assert "UnboundLocalError" in "\n".join(cells[1].outputs[0].traceback)
    assert FOUND_TOO_EARLY not in "\n".join(cells[1].outputs[0].traceback)


def test_training_without_notebook_04_stops_at_every_cell_that_needs_it(output, tmp_path, fault):
    for path in (output / "tokens").rglob("*"):
        if path.is_file():
            path.unlink()
    with opened("05_lora_training", output) as learner:
        last = learner.holding("trainer = GroupedTrainer(")
        said = {number: learner.run(number) for number in learner.code if number <= last}
    assert said[learner.code[0]][0] == "CourseError"
    assert "Run notebook 04_chat_template first" in said[learner.code[0]][1]
    assert all(is_clear(*one) for one in said.values()), said
    assert said[last][0] == "NameError"
    fault.record(
        "notebooks",
        "05 before 04",
        "every cell, in an empty output folder",
        "each cell that needs it says which notebook to run",
    )


def test_no_cell_takes_the_name_of_a_function_of_another_cell():
    """Else that cell, run once more, breaks every later call."""
    for path in sorted(EN.glob("*.ipynb")):
        trees = {
            cell.id: ast.parse(cell.source)
            for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "code"
        }
        functions = {node.name: name for name, tree in trees.items() for node in tree.body if hasattr(node, "args")}
        for name, tree in trees.items():
            tree.body = [
                node for node in tree.body if not hasattr(node, "body") or isinstance(node, ast.For | ast.With)
            ]
            stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            assert not {n for n in stored & set(functions) if functions[n] != name}, name


def test_a_prompt_changed_after_the_samples_is_refused(right, output, fault):
    with opened("04_chat_template", output) as learner:
        learner.run_all()
        learner.run("SYSTEM_PROMPT = ", 甄嬛="陆掌柜")
        error, shown = learner.run("utils.remake(")
    assert error == "CourseError"
    assert "another system prompt" in shown
    assert written(output) == right
    fault.record(
        "notebooks",
        "04: the system prompt changes after the samples were made",
        "the cell is edited and run again",
        "refused before anything is saved, with what to do",
    )


# ------------------------------------------------------------------------------------------- another folder


def test_from_another_folder_without_the_startup_file_the_message_says_what_to_run(tmp_path, fault):
    (tmp_path / "utils.py").write_text("raise SystemExit('not the utils of the course')\n")
    with opened("03_dataset", tmp_path / "out", tmp_path) as learner:
        cell = learner.client.nb.cells[learner.code[0]]
        with pytest.raises(CellExecutionError):
            learner.client.execute_cell(cell, learner.code[0])
        (output,) = cell.outputs  # what IPython says of a UsageError, and no stack trace
        shown = output.text
    assert address.message(address.address()) in shown
    assert not (tmp_path / "out").exists()
    fault.record(
        "notebooks",
        "a notebook by itself, or a kernel in another folder without make lab",
        "another working directory, a foreign utils.py in it",
        "one message with what to run, no stack trace",
    )


def test_from_another_folder_with_the_startup_file_the_result_is_the_same(right, tmp_path, fault):
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "utils.py").write_text("raise SystemExit('not the utils of the course')\n")
    for name in ("03_dataset", "04_chat_template"):
        with opened(name, tmp_path / "out", here, **STARTUP) as learner:
            learner.run_all()
    assert written(tmp_path / "out") == right
    assert [path.name for path in here.iterdir()] == ["utils.py"]
    fault.record(
        "notebooks",
        "a kernel in another folder",
        "make lab's startup file, a foreign utils.py beside it",
        "the files are those of a clean run",
    )


# ---------------------------------------------------------------------------------------------- two at once


def test_two_at_once_with_an_output_each_do_not_meet(right, tmp_path, fault):
    with opened("03_dataset", tmp_path / "a") as first, opened("03_dataset", tmp_path / "b", COURSE_DATA=str(TEA)) as b:
        for number in first.code:
            assert first.run(number) == b.run(number) == ("", "")
    assert files(tmp_path / "a" / "rows") == right["rows"]
    rows = [row for path in (tmp_path / "b" / "rows").glob("[nt]*.json") for row in json.loads(path.read_text("utf-8"))]
    assert sorted(map(str, rows)) == sorted(map(str, load_rows(TEA)))
    fault.record(
        "notebooks", "two learners at once", "two kernels, an output folder each", "the files are those of a clean run"
    )


@pytest.mark.parametrize("moment", ["@widgets.interact", "parts, cut = {}, []"])
def test_rows_of_another_run_that_come_in_the_middle_are_refused(right, output, moment, fault):
    """One learner is in the middle of 04 when another, with the same output folder and other data, runs 03."""
    with opened("04_chat_template", output) as first:
        reading = first.holding(moment)
        for number in (n for n in first.code if n < reading):
            assert first.run(number) == ("", "")
        with opened("03_dataset", output, COURSE_DATA=str(TEA)) as second:
            second.run_all()
        said = [first.run(number) for number in first.code if number >= reading]
    assert said[first.code.index(first.holding("utils.remake(")) - first.code.index(reading)][0] == "CourseError"
    assert files(output / "tokens") == right["tokens"]
    fault.record(
        "notebooks",
        "03 runs with other data while 04 works",
        "between two cells of 04",
        "04 stops before it saves and says so",
    )


def test_inference_refuses_rows_of_another_run(cell, output, monkeypatch, fault):
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    monkeypatch.setenv("COURSE_DATA", str(TEA))
    with pytest.raises(utils.CourseError, match=r"rows was made from other data than dataset/teahouse\.json"):
        exec(cell("06_inference", "asked_now = "), {"utils": utils, "settings": utils.settings(), "json": json})
    fault.record(
        "notebooks",
        "06 with rows or tokens of another run",
        "the folders are exchanged",
        "refused: one message names the notebook to run",
    )


WRITER = """
import sys, time
import utils
course, tag, asks = utils.settings(), sys.argv[1], sys.argv[2] == "asks"
while True:
    with utils.remake(course.output / "rows", course, tag=tag) as folder:
        for number in range(8):
            print("ready", flush=True) if asks else time.sleep(0.002)
            sys.stdin.readline() if asks else None
            (folder / f"{number}.txt").write_text(tag * 5000)
    print("written", flush=True)
    if asks:
        break
"""


def writer(output: Path, tag: str, how: str) -> subprocess.Popen[str]:
    """A process that makes the folder `rows`: file by file when told to ("asks"), or again and again."""
    env = {**os.environ, "COURSE_OUTPUT": str(output), "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", WRITER, tag, how], env=env, text=True, **pipes)


def let_write(process: subprocess.Popen[str], count: int) -> None:
    for _ in range(count):
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()


def whole(output: Path, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is of that writer, every file of it."""
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    folder = utils.require(output / "rows", "03_dataset", utils.settings(), tag=tag)
    texts = {path.name: path.read_text() for path in folder.glob("*.txt")}
    assert texts == {f"{number}.txt": tag * 5000 for number in range(8)}


def test_two_writers_of_one_folder_leave_one_whole_result(tmp_path, monkeypatch, fault):
    first, second = writer(tmp_path, "a", "asks"), writer(tmp_path, "b", "asks")
    let_write(first, 4)
    let_write(second, 8)
    assert second.stdout.readline() == "written\n"
    whole(tmp_path, "b", monkeypatch)  # the other is in the middle, and no reader sees it
    let_write(first, 4)
    assert first.communicate(timeout=60) == ("written\n", "")
    whole(tmp_path, "a", monkeypatch)
    second.communicate(timeout=60)
    assert not list(tmp_path.glob(".rows-*"))
    fault.record(
        "notebooks",
        "two notebooks write one folder",
        "two processes, file by file",
        "one whole result; never a mixture",
    )


def test_two_that_put_their_folder_there_at_the_same_moment(output, monkeypatch):
    monkeypatch.setenv("COURSE_OUTPUT", str(output))

    def beaten(folder: Path) -> None:  # between setting aside and putting in place the other was faster
        (folder / "of_the_other").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(utils, "restart", beaten)
    with (
        pytest.raises(utils.CourseError, match=r"Another notebook writes .*rows just now\. Run this cell again"),
        utils.remake(output / "rows", utils.settings()),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "Free some disk, or set COURSE_OUTPUT"),
        (errno.EROFS, "Set COURSE_OUTPUT to a folder that you may write"),
        (errno.EACCES, "Set COURSE_OUTPUT to a folder that you may write"),
        (errno.ENAMETOOLONG, "Set COURSE_OUTPUT to a folder with a shorter path"),
    ],
)
def test_a_folder_that_cannot_be_written_is_reported_by_its_kind(output, monkeypatch, number, cure):
    monkeypatch.setenv("COURSE_OUTPUT", str(output))

    def refused(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(utils, "restart", refused)
    message = rf"cannot be written \({os.strerror(number)}\)\. {cure}"
    with pytest.raises(utils.CourseError, match=message), utils.remake(output / "rows", utils.settings()):
        pass


def test_trouble_with_another_file_stays_what_it_is(output, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    with pytest.raises(FileNotFoundError), utils.remake(output / "rows", utils.settings()):
        (tmp_path / "not there").read_text()
    with pytest.raises(FileNotFoundError), utils.remake(output / "tokens", utils.settings()):
        (output / "of another notebook").read_text()


# ------------------------------------------------------------------------------------------------- and kills


@pytest.mark.parametrize("moment", [0.0, 0.013, 0.031, 0.052, 0.077])
def test_a_kill_while_writing_leaves_a_whole_folder_or_none(tmp_path, monkeypatch, moment, fault):
    process = writer(tmp_path, "a", "goes on")
    assert process.stdout.readline() == "written\n"
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    try:
        whole(tmp_path, "a", monkeypatch)
    except utils.CourseError as error:  # between setting aside and putting in place
        assert "is not there yet. Run notebook 03_dataset first" in str(error)
        assert (tmp_path / "rows-previous" / "made_from.json").is_file()
    fault.record(
        "notebooks",
        "SIGKILL while a folder is written",
        "at five moments",
        "the old folder, the new one or none; never a part",
    )


@pytest.mark.parametrize("there_before", [True, False])
def test_notebook_04_killed_while_it_saves(right, output, monkeypatch, there_before, fault):
    if not there_before:
        (output / "tokens").rename(output / "gone")
    with opened("04_chat_template", output) as learner, pytest.raises(DeadKernelError):
        for number in learner.code:
            cell = learner.client.nb.cells[number]
            if "utils.remake(" in cell.source:
                kill = "import os, signal\nDataset.save_to_disk = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
                cell.source = kill + cell.source
            learner.run(number)
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    if there_before:
        assert written(output) == right
    else:
        with pytest.raises(utils.CourseError, match="Run notebook 04_chat_template first"):
            utils.require(output / "tokens", "04_chat_template", utils.settings())
    fault.record(
        "notebooks",
        "SIGKILL while 04 saves" + (" over an older result" if there_before else ""),
        "the kernel kills itself between two files",
        "what was there stays; running 04 again gives the whole",
    )


def test_a_note_is_whole_or_not_there(output, monkeypatch):
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    course, note = utils.settings(), output / "rows" / "made_from.json"
    before = note.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            utils.stamp(output / "rows", course, extra=1)
        with pytest.raises(KeyboardInterrupt):
            utils.report(course, figure=1)
    assert note.read_bytes() == before
    assert not (output / "report.json").exists()
    note.write_bytes(before[:20])  # as a kill of an older version left it
    with pytest.raises(utils.CourseError, match="Run notebook 03_dataset first"):
        utils.require(output / "rows", "03_dataset", course)


def test_a_cell_that_fails_while_writing_leaves_what_was_there(output, monkeypatch, fault):
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    before = files(output)
    with pytest.raises(ZeroDivisionError), utils.remake(output / "rows", utils.settings()) as folder:
        (folder / "train.json").write_text("half")
        1 / 0  # noqa: B018
    assert files(output) == before
    fault.record("notebooks", "a cell fails while it writes", "an exception between two files", "what was there stays")
