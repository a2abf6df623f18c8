"""The rows of a data file, read and checked: `row_files` reads the bytes, `row_checks` makes conversations of them.

Knows how both are put together and what is said about a file. Knows nothing of tokenizers or training.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import utils
from course.language import say
from course.row_checks import Conversation, one_form
from course.row_files import read_rows


def load_rows(path: Path) -> list[Conversation]:
    """The rows of a data file in any of the forms that `row_files` and `row_checks` know, every one checked.

    Returns:
        One conversation for each row: `messages`, and `tools` where it offers some (`row_checks.one_form`). Further
        fields are dropped. A line says so, and how the file was read if not as a list of rows.

    Raises:
        CourseError: no file, no text, an encoding in doubt, not well formed, no rows, or bad ones. One message names
            the file, each bad row (counted from 1; ten at most) and the fix.
    """
    name = utils.shown(path)
    if not path.is_file():
        what = say("a folder, not a file") if path.is_dir() else say("no such file")
        raise utils.CourseError(
            say("{name}: {what}. Check COURSE_DATA; the default is dataset/huanhuan.json.", name=name, what=what)
        )
    try:
        read = read_rows(path.read_bytes(), path.name)
    except OSError as error:
        raise utils.CourseError(
            say("{name}: cannot be read ({reason}). Check its permissions.", name=name, reason=error.strerror)
        ) from None
    except ValueError as error:
        raise utils.CourseError(f"{name}: {error}") from None
    print(*(f"{name}: {line}\n" for line in read.said), sep="", end="")
    seen: Counter[tuple[str, str]] = Counter()
    rows, bad = [], []
    for number, row in enumerate(read.rows, 1):
        made, problems = one_form(row, seen)
        rows.append(made)
        bad += [say("row {number} {problem}", number=number, problem=problem) for problem in problems]
    if bad:
        first = say("{name}: {count} problems, nothing was trained.", name=name, count=len(bad))
        more = [say("... and {count} more", count=len(bad) - 10)] if len(bad) > 10 else []
        raise utils.CourseError("\n  ".join([first, *bad[:10], *more]))
    for (key, field_name), count in seen.items():
        holes = {"name": name, "key": key[:30], "count": count, "rows": len(rows)}
        if field_name == "unused":
            print(say("{name}: {key!r} is not used (in {count} of {rows} rows).", **holes))
        else:
            print(say("{name}: {key!r} is read as {field!r} (in {count} of {rows} rows).", field=field_name, **holes))
    return rows


def asked(row: Conversation) -> str:
    """What the user of a conversation says first."""
    return next(turn["content"] for turn in row["messages"] if turn["role"] == "user")


def answers(row: Conversation) -> list[str]:
    """What the assistant says in a conversation, turn by turn; calls of tools left out."""
    return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant" and turn["content"]]
