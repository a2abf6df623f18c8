"""What the learners of a room have solved: reads their saved notebooks, runs nothing.

`python workshop/results.py /home/*/course` prints a table, one line for each learner: exercises that are right (✓), not
yet (✗) and open (○). `--csv FILE` writes the same for a spreadsheet.

It counts what the check cells said when the notebook was saved. A learner can edit that: it is for helping, not for
marks.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils

SIGNS = ("✓", "✗", "○")
LARGEST = 50_000_000  # bytes; a notebook of the series has 0.3 million


@dataclass(frozen=True)
class Result:
    """What a saved notebook says of its exercises; `trouble` when it could not be read."""

    right: int = 0
    wrong: int = 0
    open: int = 0
    trouble: str = ""

    def __str__(self) -> str:
        return self.trouble or f"{self.right}✓ {self.wrong}✗ {self.open}○"


def said(cell: dict[str, Any]) -> str:
    """The sign that a check cell shows: what it printed last, ✗ if an error stopped it, ○ if it was not run."""
    sign = "○"
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            return "✗"
        text = output.get("text", "")
        lines = (text if isinstance(text, str) else "".join(text)).splitlines()
        sign = next((line[0] for line in reversed(lines) if line.startswith(SIGNS)), sign)
    return sign


def result(path: Path) -> Result:
    """The exercises of one saved notebook; a file that is no whole notebook is a trouble of its own."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
            return Result(trouble="no notebook")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        signs = [said(cell) for cell in cells if "check" in cell["metadata"].get("tags", [])]
    except OSError as error:
        return Result(trouble=str(error.strerror or error).lower())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the last: thousands of brackets, nested
        return Result(trouble="broken")
    return Result(*map(signs.count, SIGNS))


def printable(name: str) -> str:
    """A name of a file in letters that can be shown: a file system may hold bytes that are none."""
    return name.encode("utf-8", "replace").decode("utf-8")


def learner(folder: Path) -> dict[str, Result]:
    """Notebook to result. Of several copies (another language, a new version beside it) the best one counts."""
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("notebooks/*/0*.ipynb")):
        name, one = printable(path.name.partition(".")[0]), result(path)
        if name not in found or (not one.trouble, one.right) > (not found[name].trouble, found[name].right):
            found[name] = one
    return found


def names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths without the parts that all of them begin and end with."""
    parts = [list(folder.resolve().parts) for folder in folders]
    for end in (0, -1):
        while len(parts) > 1 and all(len(one) > 1 for one in parts) and len({one[end] for one in parts}) == 1:
            for one in parts:
                del one[end]
    return [printable("/".join(one) if len(parts) > 1 else one[-1]) for one in parts]


def lines(folders: Sequence[Path]) -> Iterator[tuple[str, dict[str, Result]]]:
    """Each learner's name and results."""
    yield from zip(names(folders), map(learner, folders), strict=True)


def write(path: Path, learners: Iterable[tuple[str, dict[str, Result]]]) -> None:
    """A file for a spreadsheet, one line for each learner and notebook."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("learner", "notebook", "right", "wrong", "open", "trouble"))
        for name, found in learners:
            writer.writerows((name, stem, r.right, r.wrong, r.open, r.trouble) for stem, r in found.items())


def main() -> int:
    """0 when every notebook could be read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="the learners' folders, each with notebooks/ in it")
    parser.add_argument("--csv", type=Path, help="write the results there too")
    options = parser.parse_args()
    if missing := [str(folder) for folder in options.folders if not (folder / "notebooks").is_dir()]:
        print(f"No notebooks/ in {', '.join(missing)}. Name the folders that the learners work in.")
        return 1
    learners = list(lines(options.folders))
    stems = sorted({stem for _, found in learners for stem in found})
    utils.table([(name, *(found.get(stem, "-") for stem in stems)) for name, found in learners], ("learner", *stems))
    print("✓ right  ✗ not yet  ○ open  - no such notebook")
    if options.csv:
        write(options.csv, learners)
        print(f"Written: {options.csv}")
    return int(any(one.trouble for _, found in learners for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
