"""The turns of a conversation, whatever form a file has them in: read, checked, put in order.

Knows nothing of files, rows or tokenizers; every message says what is wrong and how to put it right.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from course.language import say
from course.row_files import TWICE
from utils import BREAK

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # its text is the call
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
#: Keys of a turn that holds a question and its answer at once.
PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"), ("query", "response"))
#: What others call the thought before an answer.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
KNOWN = {"role", "content", "from", "value", "system", "tool_calls", "tool_call_id", "name", *THOUGHTS}
KNOWN |= {key for pair in PAIRS for key in pair}
THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
LONGEST_FIELD = 20_000
#: What no field may hold: control characters (tab and line ends are welcome), halves of characters, and `BREAK`.
STRAY = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff{BREAK}]")

#: Which roles may follow which; `call` is an assistant's turn that calls a tool.
MAY_FOLLOW = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}

Turn = dict[str, Any]


def text_problem(name: str, text: Any, may_be_empty: bool = False) -> str:
    """What is wrong with one text, with its fix; empty for a good one."""
    if text is TWICE:
        return say("'{name}' occurs twice: keep one", name=name)
    if not isinstance(text, str):
        return say("'{name}' is {kind}, not text: put it in double quotes", name=name, kind=type(text).__name__)
    if stray := STRAY.search(text):
        half = "\ud800" <= stray[0] <= "\udfff"
        what = say("half of a character") if half else say("which stands for no text")
        holes = {"code": ord(stray[0]), "what": what, "place": stray.start() + 1}
        return say("'{name}' holds U+{code:04X} ({what}) at place {place}: delete it", name=name, **holes)
    if not may_be_empty and all(c.isspace() or unicodedata.category(c) == "Cf" for c in text):
        return say("'{name}' is empty: write it, or delete the row", name=name)
    if len(text) > LONGEST_FIELD:
        return say(
            "'{name}' has {count:,} characters, {most:,} at most: shorten or split it",
            name=name,
            count=len(text),
            most=LONGEST_FIELD,
        )
    return ""


# ------------------------------------------------------------------------------------------------ one turn


def one_turn(turn: Any) -> tuple[list[Turn], str]:
    """A turn, or the question and answer that it holds, as {"role", "content", ...}; and what is wrong with it."""
    if isinstance(turn, (list, tuple)) and len(turn) == 2:
        return [_said("user", turn[0]), _said("assistant", turn[1])], ""
    if not isinstance(turn, dict):
        return [], say("is {kind}, not an object: write {{'role': ..., 'content': ...}}", kind=type(turn).__name__)
    for question, answer in PAIRS:
        if question in turn and answer in turn:
            system = [_said("system", turn["system"])] if turn.get("system") else []
            asked = [_said("user", turn[question])] if turn[question] or not system else []
            return [*system, *asked, _said("assistant", turn[answer])], ""
    if "role" not in turn and "from" not in turn:
        keys = ", ".join(repr(key[:30]) for key in turn)
        return [], say("has the keys {keys}: use 'role' and 'content', or 'from' and 'value'", keys=keys or "{}")
    given = turn.get("role", turn.get("from"))
    if given not in ROLES:
        return [], say("has the role {role!r}: use 'system', 'user', 'assistant' or 'tool'", role=str(given)[:30])
    return _of_role(turn, given)


def _said(role: str, text: Any) -> Turn:
    return {"role": role, "content": text}


def _of_role(turn: dict[str, Any], given: str) -> tuple[list[Turn], str]:
    """A turn with a role that is known."""
    role, text = ROLES[given], turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls") or None
    if given == "function_call":
        calls, text = text, ""
    if text is None and not calls:
        key, other = ("content", "value") if "role" in turn else ("value", "content")
        return [], say("has no '{key}' (nor '{other}'): write its text there", key=key, other=other)
    if role == "tool" and isinstance(text, (dict, list)):
        text = json.dumps(text, ensure_ascii=False)
    made = _said(role, "" if text is None else text)
    if role != "assistant":
        return [made], ""
    thoughts = [turn[key] for key in THOUGHTS if isinstance(turn.get(key), str) and turn[key].strip()]
    if not thoughts and isinstance(made["content"], str) and (block := THINK_BLOCK.match(made["content"])):
        made["content"] = made["content"][block.end() :].strip()
        thoughts = [block[1].strip()]
    if thoughts and thoughts[0]:
        made["reasoning_content"] = thoughts[0]
    if calls:
        made["tool_calls"], problem = _calls(calls)
        return [made], problem
    return [made], ""


def _calls(given: Any) -> tuple[list[dict[str, Any]], str]:
    """Calls of tools as {"type": "function", "function": {"name", "arguments"}}, arguments an object; a problem."""
    wrong = say("calls a tool in a form that is not known: write {{'name': ..., 'arguments': {{...}}}}")
    try:
        given = json.loads(given) if isinstance(given, str) else given
        made = []
        for call in given if isinstance(given, list) else [given]:
            function = call.get("function", call)
            arguments = function.get("arguments", function.get("parameters", {}))
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(function["name"], str) or not isinstance(arguments, dict):
                return [], wrong
            made.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    except (ValueError, KeyError, AttributeError):
        return [], wrong
    return made, ""


# ------------------------------------------------------------------------------------------------ all of them


def all_turns(talk: Any) -> tuple[list[Turn], list[str]]:
    """The turns of a conversation, a system turn first; and its problems, counted from turn 1."""
    if not isinstance(talk, list):
        return [], [say("is {kind}, not a list of turns", kind=type(talk).__name__)]
    turns: list[Turn] = []
    problems: list[str] = []
    for number, turn in enumerate(talk, 1):
        made, problem = one_turn(turn)
        if not problem and made[0]["role"] == "system" and turns:  # repeated with each pair by some
            if made[0] == turns[0]:
                made = made[1:]
            else:
                problem = say("is the system's: only the first turn may be")
        problem = problem or next(_problems(made), "")
        if problem:
            problems.append(say("turn {number} {problem}", number=number, problem=problem))
        turns += made
    return turns, problems


def _problems(turns: list[Turn]) -> Iterator[str]:
    """What is wrong with the texts of turns."""
    for turn in turns:
        if problem := text_problem(turn["role"], turn["content"], bool(turn.get("tool_calls"))):
            yield problem
        if problem := text_problem("reasoning_content", turn.get("reasoning_content", ""), may_be_empty=True):
            yield problem


def order_problems(turns: list[Turn], before: int = 0, tools: Any = None) -> list[str]:
    """What is wrong with the order of the turns; none for a good one.

    The user begins, the assistant ends. A call of the assistant's is followed by one result or several.

    Args:
        turns: without the system's. before: how many came before these in the file. tools: what the row offers.
    """
    if not turns:
        return [say("holds no turns: write them, or delete the row")]
    last, offered = "start", {tool.get("function", tool).get("name") for tool in tools or []}
    for number, turn in enumerate(turns, before + 1):
        role, calls = turn["role"], turn.get("tool_calls") or []
        if role not in MAY_FOLLOW[last]:
            return [_misplaced(number, role, last)]
        unknown = [call["function"]["name"] for call in calls if call["function"]["name"] not in offered]
        if unknown:
            said = say(
                "turn {number} calls {name!r}, which 'tools' does not list: add its schema there",
                number=number,
                name=unknown[0][:30],
            )
            return [said]
        last = "call" if calls else role
    if last == "user":
        return [say("ends with the user's turn {number}: add the answer, or delete it", number=number)]
    if last != "assistant":
        return [say("ends with turn {number}, before the answer to its call: add the answer", number=number)]
    return []


def _misplaced(number: int, role: str, last: str) -> str:
    """Says why a turn of this role may not follow one of the role `last`."""
    if role == last:
        return say("turn {number} is the {role}'s as the one before: join them", number=number, role=role)
    if last == "start":
        return say(
            "turn {number} is the {role}'s: a conversation begins with the user; delete it or add a question",
            number=number,
            role=role,
        )
    if role == "tool":
        return say("turn {number} is a tool's result without a call before it: add the call", number=number)
    if last == "call":
        return say("turn {number} follows a call of a tool: add the tool's result before it", number=number)
    return say("turn {number} follows a tool's result: add the assistant's answer before it", number=number)


def unused_keys(talk: Any) -> set[str]:
    """Keys of turns that nothing reads."""
    turns = [turn for turn in talk if isinstance(turn, dict)] if isinstance(talk, list) else []
    return {key for turn in turns for key in turn if key not in KNOWN and turn[key] not in (None, "", [])}
