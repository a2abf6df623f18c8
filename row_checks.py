"""What a data file may hold: reading its bytes, checking its rows. `utils.load_rows` puts it together.

Knows nothing of folders, settings or tokenizers; every message says what is wrong and how to mend it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from typing import Any

from language import say

FIELDS = ("instruction", "input", "output")
LONGEST_FIELD = 20_000
#: The value of a key that stands twice in one object of a data file; JSON readers keep the last one silently.
TWICE = object()
#: A character that Unicode reserves for no text at all; it marks where a special token's spelling is broken up.
BREAK = "\ufdd0"
#: What no field may hold: control characters (tab and line ends are welcome), halves of characters, and `BREAK`.
STRAY = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff{BREAK}]")


def row_problems(row: Any) -> list[str]:
    """What is wrong with one row, each with its mend; empty for a good row."""
    if not isinstance(row, dict):
        message = "is {kind}, not an object: write {{'instruction': ..., 'input': ..., 'output': ...}}"
        return [say(message, kind=type(row).__name__)]
    if talk := next((name for name in ("messages", "conversations") if name in row), ""):
        return [say("is a conversation ('{name}'): write a row for each question, its answer as 'output'", name=talk)]
    problems, others = [], [repr(name[:30]) for name in row if name not in FIELDS][:5]
    for name in FIELDS:
        text = row.get(name)
        holes: dict[str, Any] = {}
        if name not in row:
            message = "has no field '{name}': add it"
            if name == "input":
                message = "has no field '{name}': add it (it may be empty)"
            elif others:
                message = "has no field '{name}': add it, or rename one of {others}"
                holes = {"others": ", ".join(others)}
        elif text is TWICE:
            message = "'{name}' stands in it twice: keep one"
        elif not isinstance(text, str):
            message = "'{name}' is {kind}, not text: put it in double quotes"
            holes = {"kind": type(text).__name__}
        elif stray := STRAY.search(text):
            half = "\ud800" <= stray[0] <= "\udfff"
            what = say("half of a character") if half else say("which stands for no text")
            message = "'{name}' holds U+{code:04X} ({what}) at place {place}: delete it"
            holes = {"code": ord(stray[0]), "what": what, "place": stray.start() + 1}
        elif name != "input" and all(c.isspace() or unicodedata.category(c) == "Cf" for c in text):
            message = "'{name}' is empty: write it, or delete the row"
        elif len(text) > LONGEST_FIELD:
            message = "'{name}' has {count:,} characters, {most:,} at most: shorten or split it"
            holes = {"count": len(text), "most": LONGEST_FIELD}
        else:
            continue
        problems.append(say(message, name=name, **holes))
    return problems


def row_remarks(row: dict[str, str]) -> list[tuple[str, str]]:
    """What may be a slip in a well-formed row, as (finding, fix): white space around a text, characters nobody sees."""
    around = [name for name, text in row.items() if text != text.strip()]
    remarks = [(say("white space around '{name}'", name=name), say("delete it")) for name in around]
    for name, text in row.items():
        unseen = {c for c in text if unicodedata.category(c) in ("Cf", "Cn", "Co") or c == "\ufffd"}
        for c in sorted(unseen - {"\u200d"}):  # that one joins several emoji to one
            called = unicodedata.name(c, say("no character"))
            finding = say("'{name}' holds U+{code:04X} {called}", name=name, code=ord(c), called=called)
            remarks.append((finding, say("delete it, unless you mean it")))
    return remarks


def parse(raw: bytes) -> Any:
    """The JSON in the bytes of a data file; a key that stands in an object twice has the value `TWICE`.

    Raises:
        ValueError: not UTF-8, or not JSON.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = "not UTF-8 (line {line}, byte {byte}). Save it again as UTF-8."
        raise ValueError(say(message, line=line, byte=error.start)) from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = {key: TWICE for key, count in Counter(key for key, _ in pairs).items() if count > 1}
        return dict(pairs) | twice

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: a number may have too many digits
        where, start = str(error).split(" (char")[0].split(";")[0], text.lstrip()[:1]
        pos = getattr(error, "pos", -1)
    hints = {
        say("It holds zero bytes, as UTF-16 does: save it again as UTF-8."): "\0" in text,
        say("The file is empty. Write [ {{...}}, {{...}} ]."): not start,
        say("This looks like a web page: download the file itself."): start == "<",
        say("A data file begins with [ ; convert a table (CSV) to JSON first."): start not in "[{",
        say("This looks like JSON Lines: put [ before, ] after, and commas between the rows."): "Extra data" in where,
        say(r"Write a line break in a text as \n; delete other control characters."): "Invalid control" in where,
        say("The file ends too early: copy or download it again, or write what is missing."): (
            where.startswith("Unterminated") or pos >= len(text.rstrip())
        ),
        say("A row holds three texts in double quotes: no lists in lists, no numbers."): pos < 0,
        say("Often a comma too many or too few, a missing bracket, or ' in the place of a double quote."): True,
    }
    hint = next(hint for hint, fits in hints.items() if fits)
    raise ValueError(say("not JSON ({where}). {hint}", where=where, hint=hint))
