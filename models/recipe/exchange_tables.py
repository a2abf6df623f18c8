"""The tables behind the made exchanges: how they are written, read and filled in.

A table is a text file of sections. `# name` opens a section, `= name` a group of forms in it, and `- a｜b｜c` is a
row of it (`-` for an unknown field). A group has `?` questions, `!` answers, `%` thoughts, `~` questions that follow
the same group's question about another row, and `@` questions that follow one about the same row. `{a}` in a form is
the row's first field, `{xb}` the second field of another row.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).resolve().parent / "tables"
FACT_TABLES = ("places", "nature", "words", "times", "culture", "daily")
LETTERS = "abcdefgh"

Message = dict[str, Any]
Row = dict[str, str]


@dataclass
class Group:
    """Forms that ask one thing of a row, by their mark."""

    name: str
    key: str = "-"
    forms: dict[str, list[str]] = field(default_factory=dict)

    def of(self, mark: str) -> list[str]:
        """The forms with this mark, none if there are none."""
        return self.forms.get(mark, [])


@dataclass
class Section:
    """Groups and the rows they can be asked of."""

    name: str
    groups: list[Group] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    _others: dict[tuple[str, str, str], list[str]] = field(default_factory=dict, repr=False)

    def group(self, name: str) -> Group:
        """The group of this name."""
        return next(group for group in self.groups if group.name == name)

    def others(self, letter: str, subject: str, own: str) -> list[str]:
        """What this field holds in rows about something else, where it neither holds this value nor is held by it."""
        if (letter, subject, own) not in self._others:
            same = {row[letter] for row in self.rows if row["a"] == subject and letter in row}
            every = {row[letter] for row in self.rows if letter in row} - same
            self._others[letter, subject, own] = sorted(o for o in every if o not in own and own not in o)
        return self._others[letter, subject, own]


def lines(name: str) -> list[str]:
    """The lines of a table that are not empty."""
    return [line for line in (TABLES / f"{name}.txt").read_text(encoding="utf-8").splitlines() if line.strip()]


@cache
def sections(name: str) -> list[Section]:
    """The sections of one table."""
    found: list[Section] = []
    for line in lines(name):
        mark, text = line[0], line[1:].strip()
        if mark == "#":
            found.append(Section(text))
        elif mark == "=":
            head, _, key = text.partition(" ")
            found[-1].groups.append(Group(head, key or "-"))
        elif mark == "-":
            fields = zip(LETTERS, text.split("｜"), strict=False)
            found[-1].rows.append({letter: value for letter, value in fields if value != "-"})
        else:
            found[-1].groups[-1].forms.setdefault(mark, []).extend(text.split("｜"))
    return found


@cache
def facts() -> list[Section]:
    """The sections of every table of facts."""
    return [section for name in FACT_TABLES for section in sections(name)]


def fill(form: str, values: dict[str, str]) -> str | None:
    """The form with the values in it; none when one is missing."""
    try:
        return form.format_map(values)
    except KeyError:
        return None


def filled(forms: list[str], values: dict[str, str]) -> list[str]:
    """Every form that the values suffice for."""
    return [text for form in forms if (text := fill(form, values))]


def with_others(section: Section, row: Row, rng: random.Random) -> dict[str, str]:
    """The row's fields, and for each an `x` field: what another row has there and this one has not."""
    values = dict(row)
    for letter, own in row.items():
        if others := section.others(letter, row["a"], own):
            values["x" + letter] = rng.choice(others)
    return values


def user(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str, thought: str | None = None) -> Message:
    """A message of the assistant, with its thought if it has one."""
    message = {"role": "assistant", "content": text}
    return message | {"reasoning_content": thought} if thought else message


def system(text: str) -> Message:
    """A system prompt."""
    return {"role": "system", "content": text}


def conversation(topic: str, *messages: Message, tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """One item of the output."""
    return {"topic": topic, **({"tools": tools} if tools else {}), "messages": list(messages)}
