"""What the course says when something is wrong, read from its code: the texts that docs/troubleshooting.md explains.

A message is the text of an error that is raised, of a notice that is printed, or of an `assert` in a notebook. What is
put in while it runs is written `HOLE`: the value of a field, or a part that may be missing.
`python tests/support/messages.py` lists them all.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import Formatter

ROOT = Path(__file__).resolve().parents[2]
HOLE = "‹›"
MODULES = ("utils.py", "tools/headless.py", "deploy/hosted.py")
MODULES += tuple(f"course/{path.name}" for path in sorted((ROOT / "course").glob("*.py")))
MODULES += tuple(f"finetune/{path.name}" for path in sorted((ROOT / "finetune").glob("*.py")))
#: Functions that hand a message, or a part of one, to whoever raises or prints it.
SPEAKING = {"_name_error", "_download_advice", "cloud_trouble", "nearest", "parse", "other_kind", "read_rows"}
SPEAKING |= {"decoded", "_listed", "one_form", "_three_fields", "_missing", "_conversation", "_tools", "_line"}
SPEAKING |= {"text_problem", "one_turn", "_of_role", "_calls", "all_turns", "order_problems", "_misplaced"}
LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def says_something(text: str) -> bool:
    """Whether there are words in a text, besides its holes."""
    return bool(re.search(r"[A-Za-z]{2}", text.replace(HOLE, "")))


def tidy(text: str) -> str:
    """One line, one hole in the place of several."""
    return re.sub(rf"{HOLE}(?:\s*{HOLE})+", HOLE, re.sub(r"\s+", " ", text)).strip()


def called(node: ast.AST | None) -> str:
    """The last part of the name of what is called, or nothing."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


class Code:
    """A module or a cell, and which texts its expressions can have."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        #: A node to the statement it is part of; a statement to its block, its place in it, and the statement around.
        self.statement: dict[ast.AST, ast.stmt] = {}
        self.place: dict[ast.stmt, tuple[list[ast.stmt], int, ast.stmt | None]] = {}
        self._note(self.tree, None)

    def _note(self, node: ast.AST, around: ast.stmt | None) -> None:
        for _, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for index, child in enumerate(children):
                if isinstance(child, ast.stmt):
                    self.place[child] = (children, index, around)
                    self._note(child, child)
                elif isinstance(child, ast.AST):
                    if around:
                        self.statement[child] = around
                    self._note(child, around)

    def values(self, name: ast.Name) -> list[ast.expr]:
        """What was assigned to a name before it is used, in its function: the last value on each way there."""
        found: list[ast.expr] = []
        here: ast.stmt | None = self.statement.get(name)
        while here and not isinstance(here, ast.FunctionDef):
            block, index, here = self.place[here]
            for before in reversed(block[:index]):
                values = list(assigned(before, name.id))
                found += values
                if values and isinstance(before, ast.Assign):
                    return found
        return found

    def texts(self, node: ast.expr | None) -> list[str]:
        """The texts that an expression can have."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(one) for one in product(*map(self.texts, parts))]
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return self.texts(value)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return [a + b for a, b in product(self.texts(left), self.texts(right))]
            case ast.IfExp(body=body, orelse=orelse):
                both = self.texts(body) + self.texts(orelse)
                return [HOLE] if "" in both else both
            case ast.Name():
                found = [text for value in self.values(node) for text in self.texts(value)]
                return found if found and all(map(says_something, found)) else [HOLE]
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [text for element in elements for text in self.texts(element)]
            case ast.Call(args=[ast.List(elts=elements)]) if called(node) == "join":
                return [" ".join(one) for one in product(*map(self.texts, elements))]
            case ast.Call(args=[ast.Constant(value=str(template)), *_]) if called(node) == "say":
                return self.filled(template, node)
        return [HOLE]

    def filled(self, template: str, call: ast.Call) -> list[str]:
        """The texts of a template whose {fields} are filled in by the keywords of the call."""
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        parts: list[list[str]] = []
        for literal, field, _, _ in Formatter().parse(template):
            parts.append([literal])
            if field is not None:
                parts.append(self.texts(keywords.get(field)))
        return ["".join(one) for one in product(*parts)]

    def messages(self, printed: type[ast.AST] = ast.Module) -> set[str]:
        """What it raises and asserts, and what it prints inside `printed`."""
        whole, pieces = set(), set()

        def add(values: list[ast.expr]) -> None:
            whole.update(tidy(" ".join(one)) for one in product(*map(self.texts, values)))

        for node in ast.walk(self.tree):
            if isinstance(node, printed):
                for inner in ast.walk(node):
                    if called(inner) in ("print", "getpass"):
                        add(inner.args)
            if called(getattr(node, "exc", None)) == "UsageError":
                continue  # a first cell's, with the project's address: tools/address.py writes it
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                add(node.exc.args[:1])
            elif called(node) == "CourseError":
                add(node.args[:1])
            elif isinstance(node, ast.Assert) and node.msg:
                add([node.msg])
            elif isinstance(node, ast.FunctionDef) and node.name in SPEAKING:
                pieces.update(tidy(text) for value in spoken(node) for text in self.texts(value))
        others = whole | pieces
        # What is put into another text is no message of its own; what another one only begins with, is.
        whole |= {piece for piece in pieces if not any(other.find(piece) > 0 for other in others)}
        return {text for text in whole if says_something(text) and " " in text}


def assigned(statement: ast.stmt, name: str) -> Iterator[ast.expr]:
    """The values that a statement assigns to a name, except on ways that leave the block."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            pairs = [(target, statement.value)]
            if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                pairs = list(zip(target.elts, statement.value.elts, strict=True))
            yield from (value for one, value in pairs if isinstance(one, ast.Name) and one.id == name)
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return
    blocks = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
    blocks += [handler.body for handler in getattr(statement, "handlers", [])]
    for block in blocks:
        if block and not isinstance(block[-1], LEAVES):
            for inner in block:
                yield from assigned(inner, name)


def spoken(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """The expressions in a speaking function that may become text; where `say` is used, what it is given."""
    if said := [node for node in ast.walk(function) if called(node) == "say"]:
        yield from said
        yield from (node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value)
        return
    for node in ast.walk(function):
        match node:
            case ast.Return(value=ast.expr() as value) | ast.Assign(value=value):
                yield value
            case ast.Call(func=ast.Attribute(attr="append" | "_showtraceback"), args=args):
                yield from args
            case ast.Dict(keys=keys):
                yield from (key for key in keys if key)


def collect() -> dict[str, set[str]]:
    """Message to the files that say it."""
    sources = [(name, (ROOT / name).read_text(encoding="utf-8"), ast.Module) for name in MODULES]
    sources.append(("make run", (ROOT / "tools" / "run_series.py").read_text(encoding="utf-8"), ast.ExceptHandler))
    for path in sorted((ROOT / "notebooks" / "en").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += [(path.stem, "".join(cell["source"]), ast.If) for cell in cells if cell["cell_type"] == "code"]
    found: dict[str, set[str]] = {}
    for name, source, printed in sources:
        for text in Code(source).messages(printed):
            found.setdefault(text, set()).add(name)
    for text in re.findall(r'echo "([^"]+)"', (ROOT / "Makefile").read_text(encoding="utf-8")):
        found.setdefault(tidy(re.sub(r"\$\(\w+\)", HOLE, text)), set()).add("Makefile")
    return found


if __name__ == "__main__":
    for text, places in sorted(collect().items(), key=lambda item: (sorted(item[1]), item[0])):
        print(", ".join(sorted(places)), "|", text)
