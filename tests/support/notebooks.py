"""Runs notebooks as a learner does: the source as it is in the repository, settings by environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import headless
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
EN = ROOT / "notebooks" / "en"


def lesson(name: str) -> nbformat.NotebookNode:
    """A notebook's code cells up to its exercises."""
    notebook = nbformat.read(EN / f"{name}.ipynb", as_version=4)
    end = next((i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## Exercises")), None)
    notebook.cells = [cell for cell in notebook.cells[:end] if cell.cell_type == "code"]
    return notebook


def run_notebook(
    name: str, lesson_only: bool = False, added: Mapping[str, str] | None = None, **environment: str
) -> None:
    """Run it from top to bottom in a fresh kernel.

    Args:
        lesson_only: without the exercises.
        added: cells that a learner could add, each behind the cell with this id.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = lesson(name) if lesson_only else nbformat.read(EN / f"{name}.ipynb", as_version=4)
    for after, source in (added or {}).items():
        number = [cell.id for cell in notebook.cells].index(after)
        notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(source))
    place = {"metadata": {"path": str(EN)}}
    client = NotebookClient(notebook, timeout=300, resources=place, kernel_manager_class=headless.Manager)
    client.execute(env=os.environ | environment)


def run_here(name: str) -> None:
    """Run its lesson in this process, which has imported torch already."""
    space: dict[str, object] = {}
    for cell in lesson(name).cells:
        exec(cell.source, space)
