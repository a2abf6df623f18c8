"""Asks a kernel whether what `tests/notebook_checks.py` says about the cell that has just run is true.

The kernel evaluates the expressions beside an empty, silent request. So the cell's source, its outputs and the count
of executed cells stay as they are.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from notebook_checks import CHECKS

#: Seconds that an answer may take, and characters of a value that a complaint shows.
SECONDS, LONGEST = 120, 300


def names_in(expression: str) -> list[str]:
    """The names that an expression reads."""
    nodes = ast.walk(ast.parse(expression, mode="eval"))
    return sorted({node.id for node in nodes if isinstance(node, ast.Name)})


def request(cell_id: str) -> dict[str, Any]:
    """The arguments for the `execute` of a kernel's client; none if the cell has no checks."""
    asked = {}
    for expression in CHECKS.get(cell_id, {}):
        asked[f"bool({expression})"] = f"bool({expression})"
        asked |= {name: f"'' if callable({name}) else repr({name})[:{LONGEST}]" for name in names_in(expression)}
    how = {"code": "", "silent": True, "store_history": False, "allow_stdin": False}
    return {**how, "user_expressions": asked} if asked else {}


def value(answer: dict[str, Any]) -> str:
    """What an expression of a request gave; nothing if it could not be evaluated."""
    return str(ast.literal_eval(answer["data"]["text/plain"])) if answer.get("status") == "ok" else ""


def complaints(cell_id: str, reply: dict[str, Any]) -> list[str]:
    """What is not true, one line each, with the values of the names in it; `reply` answers the request."""
    answers, found = reply["content"].get("user_expressions", {}), []
    for expression, otherwise in CHECKS.get(cell_id, {}).items():
        answer = answers.get(f"bool({expression})", {})
        if value(answer) == "True":
            continue
        found.append(f"{cell_id}: {otherwise}. Not true: {expression}")
        if "ename" in answer:
            found.append(f"    {answer['ename']}: {answer['evalue']}")
        known = {name: value(answers.get(name, {})) for name in names_in(expression)}
        found += [f"    {name} = {shown}" for name, shown in known.items() if shown]
    return found
