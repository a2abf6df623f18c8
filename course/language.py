"""The language of what the course says to a learner: that of the notebook it is said in.

The code holds the English texts. The standard library's `gettext` takes the Chinese from
`locale/zh/LC_MESSAGES/course.mo`, which is made from the `course.po` beside it. A text is a literal in its call of
`say`, so that Babel finds it (`tools/translations.py`); one that is shown later, by `translated`, is the argument of
`marked`.
`notebooks/en/glosses.json` holds the English of the Chinese dialogue that the notebooks show.
"""

from __future__ import annotations

import gettext
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "zh")
LOCALE = Path(__file__).parent / "locale"
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHINESE = re.compile("[\u4e00-\u9fff]")


def _opened() -> Path:
    """The notebook that VS Code has opened, by the variable that it leaves in the kernel; elsewhere an empty path."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return Path(getattr(shell, "user_ns", {}).get("__vsc_ipynb_file__") or "")


def current() -> str:
    """The name of the folder that the notebook lies in; elsewhere `COURSE_LANGUAGE`.

    A kernel works in that folder. VS Code may start it in the folder of the project, but says which notebook it is for.
    """
    names = [folder.name for folder in (Path.cwd(), _opened().parent) if folder.parent.name == "notebooks"]
    name = names[0] if names else os.environ.get("COURSE_LANGUAGE")
    return name if name in LANGUAGES else "en"


@cache
def catalogue(language: str) -> gettext.NullTranslations:
    """The translations into a language; for English, and for a language without a file, none."""
    return gettext.translation("course", LOCALE, [language], fallback=True)


def translated(english: str) -> str:
    """A text that is `marked` or comes from a notebook, in the language of the notebook; else as it is."""
    return catalogue(current()).gettext(english) if english else ""  # under "" a catalogue has its header


def marked(english: str) -> str:
    """The text itself: says to Babel that `translated` will be asked for it."""
    return english


def say_in(language: str, english: str, /, **holes: Any) -> str:
    """The text in that language, its {holes} filled in as `str.format` does."""
    return catalogue(language).gettext(english).format(**holes)


def say(english: str, /, **holes: Any) -> str:
    """The same in the language of the notebook."""
    return say_in(current(), english, **holes)


@cache
def glosses(language: str) -> dict[str, str]:
    """Chinese texts to what they say in the language; empty where it needs no glosses."""
    path = NOTEBOOKS / language / "glosses.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def gloss(text: str) -> str:
    """In an English notebook, what a Chinese text of the course says; empty for any other text, never a guess."""
    return glosses(current()).get(text.strip(), "")


def glossed(text: str) -> str:
    """The text with its gloss behind it where the language has glosses; a Chinese text without one says so."""
    if not glosses(current()) or not CHINESE.search(text):
        return text
    return f"{text} ({gloss(text) or 'no gloss'})"
