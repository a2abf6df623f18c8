"""What a cell shows: tables, pictures with a plain twin, and whether the answer to an exercise is right.

Knows of the course its two languages only.
"""

from __future__ import annotations

import html
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from course.language import CHINESE, gloss, say, translated


@dataclass(frozen=True)
class Shown:
    """What a cell shows: `html` in a browser, and the same facts as plain `text` for everybody else; `png` if drawn."""

    html: str
    text: str
    png: bytes = b""

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        """The plain twin; nbval compares it."""
        return self.text


def shell() -> Any:
    """IPython's shell in a notebook's kernel; None in a plain process."""
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


def columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(2 if ord(c) > 0x2E80 else 1 for c in text)


def table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> None:
    """Show a table. In plain text a Chinese character counts as two columns, as in a terminal.

    The fonts of a browser keep to no such rule, so a notebook shows a table that holds Chinese as HTML: its columns
    stay straight, and a long text is broken within its own. In an English notebook the glosses of a row's Chinese
    texts stand below it, each in its column. A row without any gloss, say of data of your own, has no such lines.
    """
    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(columns(line[i]) for line in lines) for i in range(len(head))]
    glosses = [
        [(gloss(cell) or "(no gloss)" * bool(CHINESE.search(cell))) * any(map(gloss, line)) for cell in line]
        for line in lines
    ]
    text = []
    for line, meant in zip(lines, glosses, strict=True):
        text.append("  ".join(cell + " " * (w - columns(cell)) for cell, w in zip(line, widths, strict=True)).rstrip())
        for below in zip_longest(*map(textwrap.wrap, meant, (max(w, 1) for w in widths)), fillvalue=""):
            text.append("  ".join(map(str.ljust, below, widths)).rstrip())
    text.insert(1, "  ".join("-" * w for w in widths))
    if shell() and any(map(CHINESE.search, text)):
        from IPython.display import display

        display(Shown(_table_html(lines, glosses), "\n".join(text)))
    else:
        print("\n".join(text))


def _table_html(lines: Sequence[Sequence[str]], glosses: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head, each text with its gloss, if any, below it."""
    made = ""
    for number, pairs in enumerate(map(zip, lines, glosses)):
        cell = '<td style="text-align:left">{}</td>' if number else '<th style="text-align:left">{}</th>'
        texts = (in_html(text) + f"<br><i>{in_html(meant)}</i>" * bool(meant) for text, meant in pairs)
        made += f"<tr>{''.join(map(cell.format, texts))}</tr>"
    return f"<table>{made}</table>"


def in_html(text: str) -> str:
    """The text for HTML that shows it as it is: no tag in it works, and no MathJax takes `$...$` for a formula."""
    return re.sub(r"[$\\]", r"<span>\g<0></span>", html.escape(text))


def check(given: Any, *tests: tuple[Callable[[Any], bool], str]) -> None:
    """Say whether the answer to an exercise is right, and if not, why.

    Args:
        given: the learner's answer; `...` means that there is none yet.
        tests: pairs of a function of the answer that is true for a right one, and what to say when it is not. The
            first that fails speaks; an exception in it counts as a failure and is named.
    """
    if given is ...:
        print(say("○ open: put your answer in the place of ... and run both cells"))
        return
    for right, advice in tests:
        try:
            passed, trouble = bool(right(given)), ""
        except Exception as error:  # the learner's code may do anything
            passed, trouble = False, f" ({type(error).__name__}: {error})"
        if not passed:
            print(say("✗ not yet: {advice}{trouble}", advice=translated(advice), trouble=trouble))
            return
    print(say("✓ right"))
