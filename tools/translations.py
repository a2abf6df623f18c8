"""The Chinese of what the code says: `course/locale/zh/LC_MESSAGES/course.po`, kept up to date by Babel.

    python tools/translations.py update     take up new texts; a changed one is marked fuzzy, a lost one obsolete
    python tools/translations.py compile    make `course.mo` of it, which the course reads
    python tools/translations.py extract    write all texts to `output/course.pot`, to begin another language with

`make translations` does the first two. Between them a translator fills in the empty texts and takes away each `fuzzy`.
"""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_file
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).resolve().parents[1]
PO = ROOT / "course" / "locale" / "zh" / "LC_MESSAGES" / "course.po"
#: Functions to the place of the text among their arguments.
KEYWORDS = {"say": (1,), "say_in": (2,), "translated": (1,), "marked": (1,)}
PYTHON = ("utils.py", "course/*.py", "finetune/*.py", "tools/*.py", "deploy/hosted.py")


def cell_texts(file: IO[bytes], *_: Any, **__: Any) -> Iterator[tuple[int, None, str, list[str]]]:
    """Of a notebook, as Babel asks it of an extractor: the advice of every check and the words of every bar.

    Raises:
        ValueError: one of them is no plain text.
    """
    for number, cell in enumerate(json.load(file)["cells"], 1):
        for node in ast.walk(ast.parse("".join(cell["source"]))) if cell["cell_type"] == "code" else ():
            match node:
                case ast.Call(func=ast.Attribute(attr="check"), args=[_, *tests]):
                    found = [pair.elts[1] for pair in tests]
                case ast.Call(func=ast.Attribute(attr="progress"), args=[_, what]):
                    found = [what]
                case _:
                    continue
            for text in found:
                if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                    raise ValueError(f"{file.name}, cell {cell['id']}: {ast.unparse(text)} is no plain text")
                yield number, None, text.value, []


def template() -> Catalog:
    """All English texts, with the files that hold each."""
    made = Catalog(project="course", fuzzy=False)
    for pattern, method in (*((one, "python") for one in PYTHON), ("notebooks/en/*.ipynb", cell_texts)):
        for path in sorted(ROOT.glob(pattern)):
            for line, text, _, _ in extract_from_file(method, path, KEYWORDS):
                made.add(text, locations=[(path.relative_to(ROOT).as_posix(), line)])
    return made


def read() -> Catalog:
    """The translations as they are in `course.po`."""
    with PO.open("rb") as file:
        return read_po(file, locale="zh", domain="course")


def written(catalogue: Catalog) -> bytes:
    """The catalogue as a `.po` or `.pot` file; it names files without lines, which change with every edit."""
    for message in catalogue:
        message.flags.discard("python-format")  # "5 % of" looks like it; the course fills in {holes} alone
    file = io.BytesIO()
    write_po(file, catalogue, width=120, include_lineno=False, include_previous=True)
    return file.getvalue()


def compiled(catalogue: Catalog) -> bytes:
    """The catalogue as a `.mo` file."""
    file = io.BytesIO()
    write_mo(file, catalogue)
    return file.getvalue()


def main() -> int:
    """Run the commands."""
    for command in sys.argv[1:] or [""]:
        if command == "update":
            catalogue = read()
            catalogue.update(template(), update_creation_date=False)
            PO.write_bytes(written(catalogue))
            missing = sum(not message.string for message in catalogue if message.id)
            fuzzy, obsolete = sum(message.fuzzy for message in catalogue), len(catalogue.obsolete)
            print(f"{len(catalogue)} texts; without Chinese: {missing}, fuzzy: {fuzzy}, obsolete: {obsolete}")
        elif command == "compile":
            PO.with_suffix(".mo").write_bytes(compiled(read()))
        elif command == "extract":
            (ROOT / "output").mkdir(exist_ok=True)
            (ROOT / "output" / "course.pot").write_bytes(written(template()))
        else:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
