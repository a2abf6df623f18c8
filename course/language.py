"""The language of what the course says to a learner: that of the notebook it is said in.

The code holds the English texts. `notebooks/zh/words.json` holds the Chinese of each under the English one, and
`notebooks/en/glosses.json` the English of the Chinese dialogue that the notebooks show. A text goes to `say` as a
literal, or by a variable called `message`, so that `tests/test_languages.py` finds it and says what is missing.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "zh")
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHINESE = re.compile("[\u4e00-\u9fff]")


def current() -> str:
    """The name of the folder that the notebook lies in, a kernel's working folder; elsewhere `COURSE_LANGUAGE`."""
    here = Path.cwd()
    name = here.name if here.parent.name == "notebooks" else os.environ.get("COURSE_LANGUAGE")
    return name if name in LANGUAGES else "en"


@cache
def table(name: str, language: str) -> dict[str, str]:
    """A file of texts beside the notebooks of a language; empty where that language needs none."""
    path = NOTEBOOKS / language / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def translated(english: str) -> str:
    """The text in the language of the notebook, from `words.json`; English where that has none."""
    return table("words.json", current()).get(english, english)


def say_in(language: str, english: str, /, **holes: Any) -> str:
    """The text in that language, its {holes} filled in as `str.format` does."""
    return table("words.json", language).get(english, english).format(**holes)


def say(english: str, /, **holes: Any) -> str:
    """The same in the language of the notebook."""
    return say_in(current(), english, **holes)


def gloss(text: str) -> str:
    """In an English notebook, what a Chinese text of the course says; empty for any other text, never a guess."""
    return table("glosses.json", current()).get(text.strip(), "")


def glossed(text: str) -> str:
    """The text with its gloss behind it where the language has glosses; a Chinese text without one says so."""
    if not table("glosses.json", current()) or not CHINESE.search(text):
        return text
    return f"{text} ({gloss(text) or 'no gloss'})"
