"""The drawn pictures in Chinese: `python tools/pictures.py` makes `images/zh/*.svg`.

A picture is drawn once, in English, in `images`. `images/zh/texts.json` holds, for each of its lines of text, the
Chinese: a text; a text and by how much it stands lower; or "" for a line that is left out, such as the English of
Chinese dialogue. Lines without a Latin letter stay, and so do the names and code listed under "same".
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "images"
CHINESE = IMAGES / "zh"
TEXTS = CHINESE / "texts.json"
TEXT = re.compile(r"( *)(<text [^>]*>)([^<]*)</text>(\n?)")
TOLD = re.compile(r'(<(title|desc) id="\2">)([^<]*)')


def escaped(text: str) -> str:
    """Text as an SVG holds it."""
    return html.escape(text, quote=False)


def lowered(tag: str, by: float) -> str:
    """The tag of a text that stands lower by so much."""
    return re.sub(r'\by="([\d.]+)"', lambda y: f'y="{float(y[1]) + by:g}"', tag)


def translated(svg: str, table: dict[str, Any], same: set[str]) -> str:
    """A picture with the texts of a table in the place of its own.

    Args:
        svg: the English picture.
        table: `title`, `desc`, and under `texts` the Chinese of each line by its English.
        same: lines that are names or code.

    Raises:
        ValueError: a line has no Chinese, or a Chinese line has no English one any more.
    """
    texts, missing, used = table["texts"], [], set()

    def line(match: re.Match[str]) -> str:
        before, tag, text, after = match.groups()
        english = html.unescape(text)
        used.add(english)
        if english not in texts:
            if re.search("[A-Za-z]", english) and english not in same:
                missing.append(english)
            return f"{before}{tag}{re.sub(r'(?<=[0-9]) %', '%', text)}</text>{after}"
        chinese, by = texts[english] if isinstance(texts[english], list) else (texts[english], 0)
        return f"{before}{lowered(tag, by)}{escaped(chinese)}</text>{after}" if chinese else ""

    made = TEXT.sub(line, svg)
    if missing or (left := texts.keys() - used):
        raise ValueError(f"no Chinese for {missing}" if missing else f"no such line in English: {sorted(left)}")
    made = TOLD.sub(lambda match: match[1] + escaped(table[match[2]]), made)
    return made.replace('role="img"', 'role="img" lang="zh-CN"', 1)


def tables() -> dict[str, Any]:
    """The Chinese of each picture by its file name, and under "same" what stays."""
    return json.loads(TEXTS.read_text(encoding="utf-8"))


def pictures() -> dict[str, str]:
    """File name to the Chinese picture, of every drawn picture.

    Raises:
        ValueError: the texts of one do not match; its name is said.
    """
    known, made = tables(), {}
    for path in sorted(IMAGES.glob("*.svg")):
        try:
            made[path.name] = translated(path.read_text(encoding="utf-8"), known[path.name], set(known["same"]))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{TEXTS.relative_to(ROOT)}, {path.name}: {error}") from error
    return made


def main() -> None:
    """Write every picture."""
    for name, svg in pictures().items():
        (CHINESE / name).write_text(svg, encoding="utf-8")
        print(f"images/zh/{name}")


if __name__ == "__main__":
    main()
