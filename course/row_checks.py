"""What the rows of a data file may hold: the forms they come in, their faults, their slips.

`row_files` reads the bytes, `turns` what one turn may be, `rows.load_rows` puts all together. Knows nothing of folders,
settings or tokenizers; every message says what is wrong and how to put it right.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from typing import Any

from course.language import say
from course.turns import Turn, all_turns, order_problems, text_problem, unused_keys

FIELDS = ("instruction", "input", "output")
#: What other files call the question and its answer.
SYNONYMS = {
    "instruction": ("query", "prompt", "question"),
    "output": ("response", "completion", "answer"),
}
CONVERSATIONS = ("messages", "conversations", "conversation")

#: Seen in a file, and how often: keys that are read under another name, and keys that are not used.
Seen = Counter[tuple[str, str]]
#: A row as the course works with it: `messages`, and `tools` if it offers some.
Conversation = dict[str, Any]


def one_form(row: Any, seen: Seen) -> tuple[Conversation, list[str]]:
    """A row of any known form as a conversation, and its problems, each with its fix.

    Returns:
        `messages`, a list of turns with `role` and `content`; an assistant's turn may have `reasoning_content` and
        `tool_calls`. Only where the row has them, `tools`, a list of JSON schemas. It is complete only if there are no
        problems.
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
    tools, problem = _tools(row.get("tools"))
    if talks:
        turns, used, problems = _conversation(row, talks[0], tools)
        seen.update((f"{talks[0]}.{key}", "unused") for key in unused_keys(row[talks[0]]))
    else:
        turns, used, problems = _three_fields(row, seen, tools)
    seen.update((key, "unused") for key in row if key not in used and row[key] not in ("", [], {}))
    if any("reasoning_content" in turn for turn in turns) and "<think>" in str(row):
        seen["<think>", "reasoning_content"] += 1
    made: Conversation = {"messages": turns} | ({"tools": tools} if tools else {})
    return made, problems + ([problem] if problem else [])


def _tools(given: Any) -> tuple[list[dict[str, Any]], str]:
    """The tools that a row offers, as a list of objects with a name each; and what is wrong with them."""
    try:
        tools = json.loads(given) if isinstance(given, str) and given.strip() else given or []
        if all(isinstance(tool.get("function", tool)["name"], str) for tool in tools):
            return list(tools), ""
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return [], say("'tools' is no list of tools: write [{{'type': 'function', 'function': {{'name': ...}}}}]")


def _three_fields(row: dict[str, Any], seen: Seen, tools: list[Any]) -> tuple[list[Turn], set[str], list[str]]:
    """The turns of a row with a question and its answer in fields, its used keys, its problems."""
    made: dict[str, Any] = {"input": row.get("input", "")}
    used, problems = {*FIELDS, "system", "history", "tools"}, []
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
    problems += [said for name in FIELDS if name in made and (said := text_problem(name, made[name], name == "input"))]
    history: list[Turn] = []
    if row.get("history"):
        history, faults = all_turns(row["history"])
        faults = faults or order_problems(history, tools=tools)
        problems += [say("'{talk}': {problem}", talk="history", problem=fault) for fault in faults]
    system = _system(row.get("system", ""), problems)
    if problems:
        return [], used, problems
    asked = [{"role": "user", "content": made["instruction"] + made["input"]}]
    answered, _ = all_turns([{"role": "assistant", "content": made["output"]}])  # a think block becomes a thought
    return [*system, *history, *asked, *answered], used, problems


def _missing(row: dict[str, Any], name: str) -> str:
    """Says that a field is missing, and which key may be it."""
    others = [repr(key[:30]) for key in row if key not in (*FIELDS, "system", "history", *CONVERSATIONS)][:5]
    if others:
        return say("has no field '{name}': add it, or rename one of {others}", name=name, others=", ".join(others))
    return say("has no field '{name}': add it", name=name)


def _system(text: Any, problems: list[str]) -> list[Turn]:
    """The system's turn, if there is a text for it; a fault is added to the problems."""
    if fault := text_problem("system", text, may_be_empty=True):
        problems.append(fault)
        return []
    return [{"role": "system", "content": text}] if text.strip() else []


def _conversation(row: dict[str, Any], talk: str, tools: list[Any]) -> tuple[list[Turn], set[str], list[str]]:
    """The turns of a row that is a conversation, its used keys, its problems."""
    used = {talk, "system", "tools"}
    if both := [key for key in row if key in (*FIELDS, *CONVERSATIONS) and key != talk and row[key]]:
        return [], used, [say("has '{talk}' and '{other}': keep one of them", talk=talk, other=both[0])]
    turns, problems = all_turns(row[talk])
    system = row.get("system", "")
    first = [turns.pop(0)["content"]] if turns and turns[0]["role"] == "system" else []
    if first:
        if system and system != first[0]:
            problems.append(say("has two system prompts, 'system' and that of '{talk}': keep one", talk=talk))
        system = first[0]
    problems = problems or order_problems(turns, before=len(first), tools=tools)
    problems = [say("'{talk}': {problem}", talk=talk, problem=problem) for problem in problems]
    return [*_system(system, problems), *turns], used, problems


# ----------------------------------------------------------------------------------------------------- remarks

#: Words that a placeholder in single brackets holds; others in such brackets are mostly meant.
NAMES = "name|user|username|user_name|char|character|bot|assistant|author|company|persona|your[ _]name|model_name"
PLACEHOLDER = re.compile(
    rf"\{{\{{[^{{}}\n]{{1,30}}\}}\}}|\{{(?:{NAMES})\}}|<(?:{NAMES}|{NAMES.upper()})>|\[(?:{NAMES.upper()})\]"
    r"|[\[【<](?:姓名|名字|用户名|你的名字|您的名字)[\]】>]|(?<![\w%\"'`])%s(?![\w\"'`])"
)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
REASONING = re.compile(r"</?(think|thinking|reasoning|thought)>")


def row_remarks(row: Conversation) -> list[tuple[str, str]]:
    """What may be a slip in a well-formed row, as (finding, fix); a finding says what it would do in training."""
    remarks = []
    for name, text in _texts(row):
        if text != text.strip():
            remarks.append((say("white space around '{name}'", name=name), say("delete it")))
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
        if found := REASONING.search(text):
            finding = say("reasoning in '{name}': trained as the letters of {found}", name=name, found=found[0])
            remarks.append((finding, say("move it to 'reasoning_content' of its turn")))
    return remarks


def _texts(row: Conversation) -> list[tuple[str, str]]:
    """What each text of a row is called, and the text: the role, or the turn's number where a role occurs twice."""
    often = Counter(turn["role"] for turn in row["messages"])
    named = []
    for number, turn in enumerate(row["messages"], 1):
        name = turn["role"] if often[turn["role"]] == 1 else say("turn {number}", number=number)
        named.append((name, turn["content"]))
        if thought := turn.get("reasoning_content"):
            named.append((f"{name}.reasoning_content", thought))
    return named


def few(numbers: list[int], most: int = 5) -> str:
    """The first of many row numbers, and in brackets how many there are; empty for none."""
    return ", ".join(map(str, numbers[:most])) + (f" … ({len(numbers)})" if len(numbers) > most else "")
