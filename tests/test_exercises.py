"""Runs every exercise of the series: open, wrong and solved, each through its check cell.

Run after `tools/run_nbval.py notebooks/en`, whose adapter in `output/test` the exercises of notebook 06 use:
`python -m pytest -q tests/test_exercises.py`. `COURSE_LANGUAGE` says in which language. One is enough: their exercises
are the same cells, and `tests/test_languages.py` compares the solutions.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from pathlib import Path

import headless
import nbformat
import pytest
from conftest import LANGUAGE

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks" / LANGUAGE).glob("*.ipynb"))
#: What the exercises of a notebook do not use and what would take minutes: from the first cell up to the second.
NOT_NEEDED = {
    "05_lora_training": ("05-39", "05-67"),
    "06_inference": ("06-28", "06-59"),
    "07_failure_lab": ("07-18", "07-97"),
    "08_full_size": ("08-28", "08-58"),
    "09_serving": ("09-19", "09-50"),
}
#: The words that every exercise has, in both languages.
TITLE = re.compile(r"### ((?:Exercise|练习) \d · (reading|changing|building|读懂|改动|动手写).*)")
HINT = re.compile("<summary>(?:Hint|提示)</summary>")
SOLUTION = re.compile(r"<summary>(?:Solution|答案)</summary>\n\n```python\n(.+?)```", re.DOTALL)
#: Which folders of an earlier run a notebook reads.
READS = {
    "04_chat_template": ["rows"],
    "05_lora_training": ["tokens"],
    "06_inference": ["rows", "tokens", "lora"],
    "08_full_size": ["tokens", "lora"],
    "09_serving": ["rows", "lora"],
}


def exercises(notebook: nbformat.NotebookNode) -> list[tuple[int, str, str, str]]:
    """For each exercise: place of its cell, its title, a wrong answer, the solution.

    Raises:
        AssertionError: an exercise without a task, hint, check, solution or wrong answer.

    """
    found = []
    for place, cell in enumerate(notebook.cells):
        if "exercise" not in cell.metadata:
            continue
        task, check, after = notebook.cells[place - 1], notebook.cells[place + 1], notebook.cells[place + 2]
        title = TITLE.search(task.source)
        assert title, f"no heading above cell {cell.id}"
        assert HINT.search(task.source), f"{title[1]}: no hint"
        assert re.search(r"= \.\.\.", cell.source), f"{title[1]}: the stored answer is not open"
        assert "check" in check.metadata.get("tags", []), f"{title[1]}: no check cell"
        solution = SOLUTION.search(after.source)
        assert solution, f"{title[1]}: no solution"
        found.append((place, title[1], cell.metadata["exercise"]["wrong"], solution[1]))
    return found


def with_answers(notebook: nbformat.NotebookNode, skip: tuple[str, str] | None) -> nbformat.NotebookNode:
    """The notebook with each exercise's cell and check three times over: as stored, wrong, solved."""
    answers = {place: (wrong, solution) for place, _, wrong, solution in exercises(notebook)}
    cells, skipping = [], False
    for place, cell in enumerate(notebook.cells):
        if skip and cell.id in skip:
            skipping = cell.id == skip[0]
        if skipping:
            continue
        cells.append(cell)
        if place - 1 in answers:  # a check cell
            for kind, source in zip(("wrong", "solved"), answers[place - 1], strict=True):
                check = copy.deepcopy(cell)
                check.metadata["exercise_test"] = kind
                cells += [nbformat.v4.new_code_cell(source), check]
            cell.metadata["exercise_test"] = "open"
    notebook.cells = cells
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_exercise_tells_right_from_wrong(path, monkeypatch):
    output = ROOT / "output" / "exercises" / path.stem
    shutil.rmtree(output, ignore_errors=True)
    for name in READS.get(path.stem, []):
        assert (ROOT / "output" / "test" / name).is_dir(), "run tools/run_nbval.py notebooks/en first"
        shutil.copytree(ROOT / "output" / "test" / name, output / name)
    for name in [name for name in os.environ if name.startswith(("COURSE_", "SWANLAB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    notebook = nbformat.read(path, as_version=4)
    titles = [title for _, title, _, _ in exercises(notebook)]
    assert 2 <= len(titles) <= 5, titles
    notebook = with_answers(notebook, NOT_NEEDED.get(path.stem))
    headless.execute(notebook, path, 300)
    said: dict[str, list[str]] = {"open": [], "wrong": [], "solved": []}
    for cell in notebook.cells:
        if kind := cell.metadata.get("exercise_test"):
            said[kind].append("".join(output.get("text", "") for output in cell.outputs))
    for number, title in enumerate(titles):
        assert said["open"][number].startswith(("○ open", "○ 待作答")), (title, said["open"][number])
        assert said["wrong"][number].startswith(("✗ not yet: ", "✗ 还不对：")), (title, said["wrong"][number])
        assert "Error:" not in said["wrong"][number], f"{title}: the wrong answer only crashes"
        assert said["solved"][number] in ("✓ right\n", "✓ 正确\n"), (title, said["solved"][number])
