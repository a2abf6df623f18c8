"""The two languages of the course. English leads; in the Chinese a translator touches prose alone.

    python tools/languages.py sync           make notebooks/zh follow notebooks/en: code, order, outputs, headers
    python tools/languages.py mark [NAME...] note that the two texts of every prose cell and section match as they are
    python tools/languages.py check          what is wrong, one line each; `tests/test_languages.py` asks the same

A prose cell that has no Chinese yet is put there in English under `UNTRANSLATED`. `notebooks/matching.json` holds two
hashes for each pair of texts that was marked. What a helper says follows the language, so only a cell in which one
speaks may have another output; `speaking` tells which these are. `make store` executes both languages.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import headers  # noqa: E402

EN, ZH = ROOT / "notebooks" / "en", ROOT / "notebooks" / "zh"
MARKS = ROOT / "notebooks" / "matching.json"
#: Whether every notebook and document must have its Chinese; until all is translated, what is there is checked.
COMPLETE = True
UNTRANSLATED = "<!-- untranslated -->\n"
MADE = {"header", "footer"}  # tags of the cells that headers.py writes
#: The modules whose functions speak to a learner.
HELPERS = (
    "utils.py",
    "course/cells.py",
    "course/download.py",
    "course/llama.py",
    "course/model_folder.py",
    "course/plots.py",
    "course/row_checks.py",
    "course/row_files.py",
    "course/row_pairs.py",
    "course/rows.py",
    "course/swanlab_record.py",
    "course/turns.py",
    "course/widgets.py",
    "finetune/planner.py",
    "finetune/machine.py",
    "finetune/resume.py",
    "finetune/lora.py",
    "finetune/checkpoint.py",
    "finetune/export.py",
    "finetune/gguf_file.py",
    "finetune/parallel.py",
    "finetune/packing.py",
    "finetune/train.py",
    "finetune/chat.py",
    "finetune/__main__.py",
    "tools/run_series.py",
    "tools/headless.py",
    "deploy/hosted.py",
)
MODULES = {Path(name).stem for name in HELPERS}
SAY = {"say", "glossed", "gloss", "translated"}


# ------------------------------------------------------------------------------------------- where a helper speaks


def names_in(node: ast.AST) -> tuple[set[str], set[str]]:
    """The bare names that are read below a node, and those of a helper module (`utils.check`: check).

    Not in a `raise`, for it ends a cell and so is in no stored output; but a caught CourseError may be printed.
    """
    bare, of_helpers, todo = set(), set(), [node]
    while todo:
        one = todo.pop()
        if isinstance(one, ast.Raise):
            continue
        if isinstance(one, ast.ExceptHandler) and one.type is not None and "CourseError" in ast.unparse(one.type):
            of_helpers.add("say")
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load):
            bare.add(one.id)
        elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id in MODULES:
            of_helpers.add(one.attr)
        todo += ast.iter_child_nodes(one)
    return bare, of_helpers


def spread(defined: dict[str, set[str]], known: set[str]) -> set[str]:
    """The names known to speak and those defined through them, step by step."""
    found = set(known)
    while more := {name for name, used in defined.items() if used & found} - found:
        found |= more
    return found


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes of a module or a cell."""
    return (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))


@cache
def helpers() -> frozenset[str]:
    """The functions and classes of the helpers that say something, themselves or through another."""
    trees = (ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in HELPERS)
    defined = {node.name: set.union(*names_in(node)) for tree in trees for node in definitions(tree)}
    return frozenset(spread(defined, SAY))


def speaking(notebook: nbformat.NotebookNode) -> set[str]:
    """The ids of the code cells in which a helper may speak, called there or by a function of another cell."""
    trees = {cell.id: ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"}

    def through(node: ast.AST) -> set[str]:
        bare, of_helpers = names_in(node)
        return bare | ({"a helper"} if of_helpers & helpers() else set())

    by_name = {
        alias.asname or alias.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[-1] in MODULES
        for alias in node.names
        if alias.name in helpers()
    }
    defined = {node.name: through(node) for tree in trees.values() for node in definitions(tree)}
    found = spread(defined, {"a helper"} | by_name)
    return {name for name, tree in trees.items() if through(tree) & found}


def numbers(outputs: list[Any]) -> Counter[str]:
    """The numbers in the plain text of a cell's outputs, where they do not stand in a gloss."""
    text = "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


# --------------------------------------------------------------------------------------------- carrying across


def synced(english: nbformat.NotebookNode, chinese: nbformat.NotebookNode | None, name: str) -> nbformat.NotebookNode:
    """The Chinese notebook that follows the English one: its own prose, and its own outputs where a helper speaks."""
    old = {cell.id: cell for cell in chinese.cells} if chinese else {}
    made, may_differ = copy.deepcopy(english), speaking(english)
    for cell in made.cells:
        before = old.get(cell.id)
        if before is not None and before.cell_type != cell.cell_type:
            before = None
        if cell.cell_type == "markdown":
            cell.source = before.source if before is not None else UNTRANSLATED + cell.source
        elif before is not None and cell.id in may_differ and before.source == cell.source:
            cell.outputs = before.outputs
    headers.write(made, name, language="zh")
    return made


def stored(english: nbformat.NotebookNode, executed: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The Chinese notebook after a run of its own: English outputs, but where a helper speaks those of the run.

    Raises:
        ValueError: a compared cell in which no helper speaks has another output.
    """
    may_differ, own = speaking(english), {cell.id: cell for cell in executed.cells}
    for cell in english.cells:
        if cell.cell_type == "code" and cell.id not in may_differ and compared(cell):
            shown = [
                "".join(output.get("text", "") for output in one.outputs if output.output_type == "stream")
                for one in (cell, own[cell.id])
            ]
            if shown[0] != shown[1]:
                raise ValueError(f"{name}: cell {cell.id} has another output in Chinese, though no helper speaks in it")
    return synced(english, executed, name)


def compared(cell: nbformat.NotebookNode) -> bool:
    """Whether nbval compares the cell's output."""
    return "nbval-ignore-output" not in cell.metadata.get("tags", [])


# --------------------------------------------------------------------------------------------- what is wrong


def prose(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The prose that people write, by the cell's id; the places to jump to are made by headers.py."""
    return {
        cell.id: headers.PLACE.sub("", cell.source)
        for cell in notebook.cells
        if cell.cell_type == "markdown" and not MADE & set(cell.metadata.get("tags", []))
    }


def sections(text: str) -> list[str]:
    """A Markdown document in parts that each begin with a heading; a line in a code block is none."""
    parts, fenced = [""], False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if not fenced and re.match("#{1,6} ", line):
            parts.append("")
        parts[-1] += line
    return [part for part in parts if part.strip()]


def mark_of(english: str, chinese: str) -> str:
    """The pair of hashes of two matching texts."""
    return " ".join(hashlib.sha256(text.strip().encode()).hexdigest()[:10] for text in (english, chinese))


def drift(place: str, english: str, chinese: str, marks: Iterable[str]) -> Iterator[str]:
    """What is wrong with one pair of texts."""
    if chinese.startswith(UNTRANSLATED):
        yield f"{place}: not translated yet"
        return
    if re.findall(r"```python\n.*?```", english, re.DOTALL) != re.findall(r"```python\n.*?```", chinese, re.DOTALL):
        yield f"{place}: the Python in it differs"
    pair = mark_of(english, chinese)
    if pair in marks:
        return
    known = [set(half) for half in zip(*(mark.split() for mark in marks), strict=True)] or [set(), set()]
    changed = [
        name for name, half, old in zip(("English", "Chinese"), pair.split(), known, strict=True) if half not in old
    ]
    if len(changed) == 1:
        yield f"{place}: changed in {changed[0]} since both were marked as matching"
    else:
        yield f"{place}: never marked as matching"


def notebook_problems(
    english: nbformat.NotebookNode, chinese: nbformat.NotebookNode, name: str, marks: Iterable[str]
) -> list[str]:
    """What is wrong with a pair of notebooks, one line each."""
    ids = [[cell.id for cell in notebook.cells] for notebook in (english, chinese)]
    found = [f"{name}: cell {one} is missing in Chinese" for one in ids[0] if one not in ids[1]]
    found += [f"{name}: cell {one} is in no English notebook" for one in ids[1] if one not in ids[0]]
    if not found and ids[0] != ids[1]:
        found.append(f"{name}: the cells stand in another order")
    if english.metadata != chinese.metadata:
        found.append(f"{name}: other metadata")
    other, may_differ = {cell.id: cell for cell in chinese.cells}, speaking(english)
    for cell in english.cells:
        if (twin := other.get(cell.id)) is None:
            continue
        place = f"{name}: cell {cell.id}"
        if cell.cell_type != twin.cell_type or cell.metadata != twin.metadata:
            found.append(f"{place} is of another kind or has other metadata")
        elif cell.cell_type == "code":
            if cell.source != twin.source:
                found.append(f"{place} has other code")
            elif cell.execution_count != twin.execution_count:
                found.append(f"{place} has another execution count")
            elif cell.outputs != twin.outputs and cell.id not in may_differ:
                found.append(f"{place} has another output, though no helper speaks in it")
            elif compared(cell) and numbers(cell.outputs) != numbers(twin.outputs):
                found.append(f"{place} shows other numbers")
    texts = prose(chinese)
    for one, text in prose(english).items():
        if one in texts:
            found += drift(f"{name}: cell {one}", text, texts[one], marks)
    return found + headers.problems(chinese, name, "zh")


def document_problems(english: str, chinese: str, name: str, marks: Iterable[str]) -> list[str]:
    """What is wrong with a pair of Markdown documents, one line each."""
    parts = [sections(text) for text in (english, chinese)]
    levels = [[len(re.match("#*", part)[0]) for part in each] for each in parts]
    if levels[0] != levels[1]:
        return [f"{name}: other sections: headings of levels {levels[0]} in English, {levels[1]} in Chinese"]
    pairs = zip(*parts, strict=True)
    return [line for number, pair in enumerate(pairs, 1) for line in drift(f"{name}: section {number}", *pair, marks)]


def notebook_pairs() -> dict[str, tuple[Path, Path]]:
    """Name to the two files of each notebook; the second may not be there yet."""
    names = {path.stem for folder in (EN, ZH) for path in folder.glob("*.ipynb")}
    return {name: (EN / f"{name}.ipynb", ZH / f"{name}.ipynb") for name in sorted(names)}


def document_pairs() -> dict[str, tuple[Path, Path]]:
    """Name to the two files of each document."""
    files = [ROOT / "README.md", ROOT / "dataset/README.md", ROOT / "models/README.md", ROOT / "workshop/README.md"]
    files += [ROOT / "CONTRIBUTING.md", ROOT / "models/recipe/judged/README.md", ROOT / "deploy/README.md"]
    files += ROOT.glob("docs/*.md")
    files = [path for path in files if not path.name.endswith(".zh-CN.md")]
    return {path.relative_to(ROOT).as_posix(): (path, path.with_suffix(".zh-CN.md")) for path in files}


def read_marks() -> dict[str, list[str]]:
    """Name of a notebook or document to its marked pairs."""
    return json.loads(MARKS.read_text(encoding="utf-8")) if MARKS.is_file() else {}


def problems(complete: bool = COMPLETE) -> list[str]:
    """What is wrong with the two languages, one line each."""
    marks, found = read_marks(), []
    for name, files in (notebook_pairs() | document_pairs()).items():
        missing = [path for path in files if not path.is_file()]
        if missing and (complete or missing[0] == files[0]):
            found += [f"{name}: {'/'.join(path.parts[-3:])} is not there" for path in missing]
        elif not missing and files[0].suffix == ".ipynb":
            found += notebook_problems(
                *(nbformat.read(path, as_version=4) for path in files), name, marks.get(name, ())
            )
        elif not missing:
            texts = (path.read_text(encoding="utf-8") for path in files)
            found += document_problems(*texts, name, marks.get(name, ()))
    return found


# ---------------------------------------------------------------------------------------------------- commands


def sync() -> None:
    """Make notebooks/zh follow notebooks/en."""
    for name, (english, chinese) in notebook_pairs().items():
        if not english.is_file():
            chinese.unlink()
            continue
        old = nbformat.read(chinese, as_version=4) if chinese.is_file() else None
        chinese.parent.mkdir(exist_ok=True)
        nbformat.write(synced(nbformat.read(english, as_version=4), old, name), chinese)


def mark(only: list[str]) -> None:
    """Note for every pair of texts, or for those of the named notebooks and documents, that they match."""
    marks = read_marks()
    for name, files in (notebook_pairs() | document_pairs()).items():
        if (only and name not in only) or not all(path.is_file() for path in files):
            continue
        if files[0].suffix == ".ipynb":
            english, chinese = (prose(nbformat.read(path, as_version=4)) for path in files)
            pairs = [(text, chinese[one]) for one, text in english.items() if one in chinese]
        else:
            pairs = list(zip(*(sections(path.read_text(encoding="utf-8")) for path in files), strict=True))
        marks[name] = [mark_of(*pair) for pair in pairs if not pair[1].startswith(UNTRANSLATED)]
    MARKS.write_text(json.dumps(marks, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    """Run a command."""
    command, *names = sys.argv[1:] or [""]
    if command == "sync":
        sync()
    elif command == "mark":
        mark(names)
    elif command == "check":
        print("\n".join(found := problems()) or "both languages match")
        return int(bool(found))
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
