"""What a data file may hold: reading its bytes, checking its rows. `utils.load_rows` puts it together.

Knows nothing of folders, settings or tokenizers; every message says what is wrong and how to mend it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from typing import Any

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
        return [f"is {type(row).__name__}, not an object: write {{'instruction': ..., 'input': ..., 'output': ...}}"]
    if talk := next((name for name in ("messages", "conversations") if name in row), ""):
        return [f"is a conversation ('{talk}'): write a row for each question, its answer as 'output'"]
    problems, others = [], [repr(name[:30]) for name in row if name not in FIELDS][:5]
    for name in FIELDS:
        text = row.get(name)
        if name not in row:
            mend = ", or rename one of " + ", ".join(others) if others and name != "input" else ""
            problems.append(f"has no field '{name}': add it{mend}" + (" (it may be empty)" if name == "input" else ""))
        elif text is TWICE:
            problems.append(f"'{name}' stands in it twice: keep one")
        elif not isinstance(text, str):
            problems.append(f"'{name}' is {type(text).__name__}, not text: put it in double quotes")
        elif stray := STRAY.search(text):
            what = "half of a character" if "\ud800" <= stray[0] <= "\udfff" else "which stands for no text"
            problems.append(f"'{name}' holds U+{ord(stray[0]):04X} ({what}) at place {stray.start() + 1}: delete it")
        elif name != "input" and all(c.isspace() or unicodedata.category(c) == "Cf" for c in text):
            problems.append(f"'{name}' is empty: write it, or delete the row")
        elif len(text) > LONGEST_FIELD:
            problems.append(f"'{name}' has {len(text):,} characters, {LONGEST_FIELD:,} at most: shorten or split it")
    return problems


def row_remarks(row: dict[str, str]) -> list[tuple[str, str]]:
    """What may be a slip in a well-formed row, as (finding, fix): white space around a text, characters nobody sees."""
    remarks = [(f"white space around '{name}'", "delete it") for name, text in row.items() if text != text.strip()]
    for name, text in row.items():
        unseen = {c for c in text if unicodedata.category(c) in ("Cf", "Cn", "Co") or c == "\ufffd"}
        for c in sorted(unseen - {"\u200d"}):  # that one joins several emoji to one
            finding = f"'{name}' holds U+{ord(c):04X} {unicodedata.name(c, 'no character')}"
            remarks.append((finding, "delete it, unless you mean it"))
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
        raise ValueError(f"not UTF-8 (line {line}, byte {error.start}). Save it again as UTF-8.") from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = {key: TWICE for key, count in Counter(key for key, _ in pairs).items() if count > 1}
        return dict(pairs) | twice

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: a number may have too many digits
        where, start = str(error).split(" (char")[0].split(";")[0], text.lstrip()[:1]
        pos = getattr(error, "pos", -1)
    hints = {
        "It holds zero bytes, as UTF-16 does: save it again as UTF-8.": "\0" in text,
        "The file is empty. Write [ {...}, {...} ].": not start,
        "This looks like a web page: download the file itself.": start == "<",
        "A data file begins with [ ; convert a table (CSV) to JSON first.": start not in "[{",
        "This looks like JSON Lines: put [ before, ] after, and commas between the rows.": "Extra data" in where,
        r"Write a line break in a text as \n; delete other control characters.": where.startswith("Invalid control"),
        "The file ends too early: copy or download it again, or write what is missing.": (
            where.startswith("Unterminated") or pos >= len(text.rstrip())
        ),
        "A row holds three texts in double quotes: no lists in lists, no numbers.": pos < 0,
        "Often a comma too many or too few, a missing bracket, or ' in the place of a double quote.": True,
    }
    raise ValueError(f"not JSON ({where}). {next(hint for hint, fits in hints.items() if fits)}")
