"""What the rows of a data file may hold: the forms they come in, their faults, their slips.

`row_files` reads the bytes, `rows.load_rows` puts both together. Knows nothing of folders, settings or tokenizers;
every message says what is wrong and how to put it right.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from course.language import say
from course.row_files import TWICE
from utils import BREAK

FIELDS = ("instruction", "input", "output")
#: What other files call the question and its answer.
SYNONYMS = {
    "instruction": ("query", "prompt", "question"),
    "output": ("response", "completion", "answer"),
}
CONVERSATIONS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
#: Keys of a turn that holds a question and its answer at once.
PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"), ("query", "response"))
LONGEST_FIELD = 20_000
#: What no field may hold: control characters (tab and line ends are welcome), halves of characters, and `BREAK`.
STRAY = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff{BREAK}]")

#: Seen in a file, and how often: keys that are read under another name, and keys that are not used.
Seen = Counter[tuple[str, str]]
Turn = dict[str, str]


def one_form(row: Any, seen: Seen) -> tuple[dict[str, Any], list[str]]:
    """A row of any known form as the one form of the course, and its problems, each with its fix.

    Returns:
        An object with the three `FIELDS`, all text, and where the row has more than that: `system`, a text, and
        `history`, the turns before the question as {"role": "user" or "assistant", "content": text}. It is complete
        only if there are no problems.
    """
    if not isinstance(row, dict):
        return {}, [
            say(
                "is {kind}, not an object: write {{'instruction': ..., 'input': ..., 'output': ...}}",
                kind=type(row).__name__,
            )
        ]
    row = {key: value for key, value in row.items() if value is not None or key in ("instruction", "output")}
    talks = [key for key in CONVERSATIONS if row.get(key)]
    if not talks and isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        row["messages"], talks = row.pop("prompt") + row.pop("completion"), ["messages"]
    if talks:
        made, used, problems = _conversation(row, talks[0])
        seen.update((f"{talks[0]}.{key}", "unused") for key in _unused_of_turns(row[talks[0]]))
    else:
        made, used, problems = _three_fields(row, seen)
    seen.update((key, "unused") for key in row if key not in used and row[key] not in ("", [], {}))
    return made, problems


def _three_fields(row: dict[str, Any], seen: Seen) -> tuple[dict[str, Any], set[str], list[str]]:
    """A row with a question and its answer in fields, its used keys, its problems."""
    made: dict[str, Any] = {"input": row.get("input", "")}
    used, problems = {*FIELDS, "system", "history"}, []
    for name, others in SYNONYMS.items():
        found = [key for key in others if key in row]
        if name in row:
            made[name] = row[name] if row[name] is not None else ""
        elif len(found) == 1:
            made[name] = row[found[0]]
            used.add(found[0])
            seen[found[0], name] += 1
        elif found:
            problems.append(
                say(
                    "has {keys} and no '{name}': rename the one that is it", keys=", ".join(map(repr, found)), name=name
                )
            )
        else:
            problems.append(_missing(row, name))
    problems += [said for name in FIELDS if name in made and (said := _problem(name, made[name], name == "input"))]
    system, turns = row.get("system", ""), []
    if history := row.get("history"):
        turns, faults = _turns(history)
        faults = faults or _order(turns, closed=True)
        problems += [say("'{talk}': {problem}", talk="history", problem=fault) for fault in faults]
    return _with_context(made, system, turns, problems), used, problems


def _missing(row: dict[str, Any], name: str) -> str:
    """Says that a field is missing, and which key may be it."""
    others = [repr(key[:30]) for key in row if key not in (*FIELDS, "system", "history", *CONVERSATIONS)][:5]
    if others:
        return say("has no field '{name}': add it, or rename one of {others}", name=name, others=", ".join(others))
    return say("has no field '{name}': add it", name=name)


def _problem(name: str, text: Any, may_be_empty: bool = False) -> str:
    """What is wrong with one text, with its fix; empty for a good one."""
    if text is TWICE:
        return say("'{name}' stands in it twice: keep one", name=name)
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


def _with_context(made: dict[str, Any], system: Any, turns: list[Turn], problems: list[str]) -> dict[str, Any]:
    """The row in the order of its fields, with what comes before its question, if anything does."""
    if fault := _problem("system", system, may_be_empty=True):
        problems.append(fault)
    elif system.strip():
        made["system"] = system
    if turns:
        made["history"] = turns
    return {key: made[key] for key in (*FIELDS, "system", "history") if key in made}


# ----------------------------------------------------------------------------------------------- conversations


def _conversation(row: dict[str, Any], talk: str) -> tuple[dict[str, Any], set[str], list[str]]:
    """A row that is a conversation: its last answer is the output, the question before it the instruction."""
    used = {talk, "system"}
    if both := [key for key in row if key in (*FIELDS, *CONVERSATIONS) and key != talk and row[key]]:
        return {}, used, [say("has '{talk}' and '{other}': keep one of them", talk=talk, other=both[0])]
    turns, problems = _turns(row[talk])
    system = row.get("system", "")
    systems = [turn["content"] for turn in turns if turn["role"] == "system"]
    if systems and turns[0]["role"] == "system":
        turns = turns[1:]
        if system and system != systems[0]:
            problems.append(say("has two system prompts, 'system' and that of '{talk}': keep one", talk=talk))
        system = systems[0]
    problems = problems or _order(turns, before=1 if systems else 0)
    if problems:
        return {}, used, [say("'{talk}': {problem}", talk=talk, problem=problem) for problem in problems]
    made = {"instruction": turns[-2]["content"], "input": "", "output": turns[-1]["content"]}
    return _with_context(made, system, turns[:-2], problems), used, problems


def _unused_of_turns(talk: Any) -> set[str]:
    """Keys of turns that nothing reads, such as `reasoning_content`."""
    known = {"role", "content", "from", "value", "system", *(key for pair in PAIRS for key in pair)}
    turns = [turn for turn in talk if isinstance(turn, dict)] if isinstance(talk, list) else []
    return {key for turn in turns for key in turn if key not in known and turn[key] not in (None, "", [])}


def _turns(talk: Any) -> tuple[list[Turn], list[str]]:
    """The turns of a conversation as {"role", "content"}, whatever its form; and its problems, counted from turn 1."""
    if not isinstance(talk, list):
        return [], [say("is {kind}, not a list of turns", kind=type(talk).__name__)]
    turns: list[Turn] = []
    problems: list[str] = []
    for number, turn in enumerate(talk, 1):
        made, problem = _turn(turn)
        if not problem and made[0][0] == "system" and turns:  # repeated with each pair by some
            if made[0][1] == turns[0]["content"] and turns[0]["role"] == "system":
                made = made[1:]
            else:
                problem = say("is the system's: only the first turn may be")
        problem = problem or next((said for role, text in made if (said := _problem(role, text))), "")
        if problem:
            problems.append(say("turn {number} {problem}", number=number, problem=problem))
        turns += [{"role": role, "content": text} for role, text in made]
    return turns, problems


def _turn(turn: Any) -> tuple[list[tuple[str, Any]], str]:
    """The role and text of a turn, or of the question and answer that it holds; and what is wrong with it."""
    if isinstance(turn, (list, tuple)) and len(turn) == 2:
        return [("user", turn[0]), ("assistant", turn[1])], ""
    if not isinstance(turn, dict):
        return [], say("is {kind}, not an object: write {{'role': ..., 'content': ...}}", kind=type(turn).__name__)
    for question, answer in PAIRS:
        if question in turn and answer in turn:
            system = [("system", turn["system"])] if turn.get("system") else []
            asked = [("user", turn[question])] if turn[question] or not system else []
            return [*system, *asked, ("assistant", turn[answer])], ""
    if "role" in turn or "from" in turn:
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            return [], say("has the role {role!r}: use 'system', 'user' or 'assistant'", role=str(role)[:30])
        if text is None:
            key, other = ("content", "value") if "role" in turn else ("value", "content")
            return [], say("has no '{key}' (nor '{other}'): write its text there", key=key, other=other)
        return [(ROLES[role], text)], ""
    keys = ", ".join(repr(key[:30]) for key in turn)
    return [], say("has the keys {keys}: use 'role' and 'content', or 'from' and 'value'", keys=keys or "{}")


def _order(turns: list[Turn], before: int = 0, closed: bool = False) -> list[str]:
    """What is wrong with the order of user and assistant; `before` turns came first, `closed` is a history."""
    if not turns:
        return [say("holds no turns: write them, or delete the row")]
    for number, turn in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if turn["role"] == wanted:
            continue
        place, role = number + before + 1, turn["role"]
        if number:
            return [say("turn {number} is the {role}'s as the one before: join them", number=place, role=role)]
        return [
            say(
                "turn {number} is the {role}'s: a conversation begins with the user; delete it or add a question",
                number=place,
                role=role,
            )
        ]
    if len(turns) % 2:
        return [say("ends with the user's turn {number}: add the answer, or delete it", number=len(turns) + before)]
    return []


# ----------------------------------------------------------------------------------------------------- remarks

#: Words that a placeholder in single brackets holds; others in such brackets are mostly meant.
NAMES = "name|user|username|user_name|char|character|bot|assistant|author|company|persona|your[ _]name|model_name"
PLACEHOLDER = re.compile(
    rf"\{{\{{[^{{}}\n]{{1,30}}\}}\}}|\{{(?:{NAMES})\}}|<(?:{NAMES}|{NAMES.upper()})>|\[(?:{NAMES.upper()})\]"
    r"|[\[【<](?:姓名|名字|用户名|你的名字|您的名字)[\]】>]|(?<![\w%\"'`])%s(?![\w\"'`])"
)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
REASONING = re.compile(r"</?(think|thinking|reasoning|thought)>")


def row_remarks(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What may be a slip in a well-formed row, as (finding, fix); a finding says what it would do in training."""
    texts = {name: text for name, text in row.items() if isinstance(text, str)}
    remarks = [
        (say("white space around '{name}'", name=name), say("delete it"))
        for name, text in texts.items()
        if text != text.strip()
    ]
    for name, text in texts.items():
        unseen = {
            c for c in text if not c.isascii() and (unicodedata.category(c) in ("Cf", "Cn", "Co") or c == "\ufffd")
        }
        for c in sorted(unseen - {"\u200d"}):  # that one joins several emoji to one
            called = unicodedata.name(c, say("no character"))
            finding = say("'{name}' holds U+{code:04X} {called}", name=name, code=ord(c), called=called)
            remarks.append((finding, say("delete it, unless you mean it")))
        for found in sorted({match[0] for match in PLACEHOLDER.finditer(CODE.sub("", text))}):
            finding = say("'{name}' holds {found}, which would be said as it is", name=name, found=found)
            remarks.append((finding, say("write what is meant there, unless it is meant")))
    if found := REASONING.search(texts["output"]):
        finding = say(
            "reasoning in 'output': trained as the letters of {found}, said before each answer", found=found[0]
        )
        remarks.append((finding, say("move it to a field of its own, such as 'reasoning'")))
    if row.get("system"):
        finding = say("'system' is not trained on: notebook 04 has one SYSTEM_PROMPT for all rows")
        remarks.append((finding, say("set SYSTEM_PROMPT in notebook 04; one file for each system prompt")))
    if row.get("history"):
        finding = say("'history' is not trained on: the question is read without it")
        remarks.append(
            (finding, say("put what the question needs into 'instruction'; earlier answers: rows of their own"))
        )
    return remarks


def few(numbers: list[int], most: int = 5) -> str:
    """The first of many row numbers, and in brackets how many there are; empty for none."""
    return ", ".join(map(str, numbers[:most])) + (f" … ({len(numbers)})" if len(numbers) > most else "")
