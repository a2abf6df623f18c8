"""What the course says when something is wrong, read from its code: the texts that docs/troubleshooting.md explains.

A message is the literal text of a `raise`, of a notice that is printed, or of an `assert` in a notebook. What is put
in while it runs stands as `HOLE`: the value of an f-string, or a part that may be missing.
`python tests/messages.py` lists them all.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOLE = "‹›"
MODULES = ("utils.py", "row_checks.py", "runs.py", "planner.py", "full_size.py", "train.py")
#: Functions that hand a message, or a part of one, to whoever raises or prints it.
SPEAKING = {"_download_advice", "_name_error", "row_problems", "parse", "cloud_trouble", "nearest"}


def alternatives(node: ast.expr | None, names: dict[str, list[ast.expr]]) -> list[str]:
    """The texts that an expression can have; `names` are the assignments of the function or cell around it."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(one) for one in product(*(alternatives(part, names) for part in parts))]
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return alternatives(value, names)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return [a + b for a, b in product(alternatives(left, names), alternatives(right, names))]
        case ast.IfExp(body=body, orelse=orelse):
            both = alternatives(body, names) + alternatives(orelse, names)
            return [HOLE] if "" in both else both
        case ast.Name(id=name) if name in names:
            known = {key: value for key, value in names.items() if key != name}
            texts = [text for value in names[name] for text in alternatives(value, known)]
            return texts if all(says_something(text) for text in texts) else [HOLE]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [text for element in elements for text in alternatives(element, names)]
    return [HOLE]


def says_something(text: str) -> bool:
    """Whether there are words in a text, besides its holes."""
    return bool(re.search(r"[A-Za-z]{2}", text.replace(HOLE, "")))


def tidy(text: str) -> str:
    """One line, one hole in the place of several."""
    return re.sub(rf"(?:{HOLE}\s*)+(?<!\s)", HOLE, re.sub(r"\s+", " ", text)).strip()


def assignments(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """Name to the values that are assigned to it somewhere in a function or a cell."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for name, value in pairs:
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, []).append(value)
    return found


def spoken(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions in a speaking function that may become text."""
    for node in ast.walk(tree):
        match node:
            case ast.Return(value=ast.expr() as value) | ast.Assign(value=value):
                yield value
            case ast.Call(func=ast.Attribute(attr="append" | "_showtraceback"), args=args):
                yield from args
            case ast.Dict(keys=keys):
                yield from (key for key in keys if key)


def called(node: ast.Call) -> str:
    """The last part of the name of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def in_code(code: str, printed: type[ast.AST] | None = None) -> set[str]:
    """All messages of a piece of code: what it raises and asserts, and what it prints inside `printed` (everywhere)."""
    tree = ast.parse(code)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    texts: set[str] = set()
    pieces: set[str] = set()

    def add(values: list[ast.expr], scope: ast.AST) -> None:
        each = [alternatives(value, assignments(scope)) for value in values]
        texts.update(tidy(" ".join(one)) for one in product(*each))

    def innermost(node: ast.AST) -> ast.AST:
        around = [one for one in functions if one.lineno <= node.lineno <= (one.end_lineno or 0)]
        return max(around, key=lambda one: one.lineno, default=tree)

    where = [tree] if printed is None else [node for node in ast.walk(tree) if isinstance(node, printed)]
    for node in {inner for outer in where for inner in ast.walk(outer)}:
        if isinstance(node, ast.Call) and called(node) in ("print", "getpass"):
            add(node.args, innermost(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            add(node.exc.args[:1], innermost(node))
        elif isinstance(node, ast.Assert) and isinstance(node.msg, (ast.Constant, ast.JoinedStr)):
            add([node.msg], innermost(node))
        elif isinstance(node, ast.FunctionDef) and node.name in SPEAKING:
            for value in spoken(node):
                pieces.update(map(tidy, alternatives(value, assignments(node))))
    whole = texts | {
        piece for piece in pieces if not any(piece != other and piece in other for other in texts | pieces)
    }
    return {text for text in whole if says_something(text) and " " in text}


def collect() -> dict[str, set[str]]:
    """Message to the files that say it."""
    found: dict[str, set[str]] = {}
    for name in MODULES:
        for text in in_code((ROOT / name).read_text(encoding="utf-8")):
            found.setdefault(text, set()).add(name)
    for text in in_code((ROOT / "tests" / "run_series.py").read_text(encoding="utf-8"), printed=ast.ExceptHandler):
        found.setdefault(text, set()).add("make run")
    for path in sorted((ROOT / "notebooks" / "en").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                for text in in_code("".join(cell["source"]), printed=ast.If):
                    found.setdefault(text, set()).add(path.stem)
    for text in re.findall(r'echo "([^"]+)"', (ROOT / "Makefile").read_text(encoding="utf-8")):
        found.setdefault(tidy(re.sub(r"\$\(\w+\)", HOLE, text)), set()).add("Makefile")
    return found


if __name__ == "__main__":
    for text, places in sorted(collect().items(), key=lambda item: (sorted(item[1]), item[0])):
        print(", ".join(sorted(places)), "|", text)
