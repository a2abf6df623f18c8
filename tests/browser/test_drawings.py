"""The drawn pictures in both languages, as a browser draws them: no text leaves its box or lies on another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from playwright.sync_api import BrowserContext

DRAWN = sorted((ROOT / "images").rglob("*.svg"))
#: Texts that begin inside a box and end outside, or the other way round; and pairs that overlap.
MISPLACED = """() => {
    const texts = [...document.querySelectorAll('text')].map(text => [text.textContent, text.getBBox()])
    const boxes = [...document.querySelectorAll('rect')].map(box => box.getBBox())
    const inside = (box, x, y) => x >= box.x && x <= box.x + box.width && y >= box.y && y <= box.y + box.height
    const found = []
    texts.forEach(([text, at], number) => {
        const middle = at.y + at.height / 2
        const ends = [at.x + 1, at.x + at.width - 1]
        const box = boxes.findLast(box => ends.some(x => inside(box, x, middle)))  // the last one is drawn on top
        if (!ends.every(x => inside(box, x, middle))) found.push(text)
        for (const [other, its] of texts.slice(0, number)) {
            const wide = Math.min(at.x + at.width, its.x + its.width) - Math.max(at.x, its.x)
            const high = Math.min(at.y + at.height, its.y + its.height) - Math.max(at.y, its.y)
            if (wide > 1 && high > 5) found.push(`${text} / ${other}`)
        }
    })
    return found
}"""


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_text_leaves_its_box_or_lies_on_another(path: Path, context: Callable[[], BrowserContext]):
    page = context().new_page()
    page.set_content(path.read_text(encoding="utf-8"))
    assert page.locator("text").count() > 10
    assert page.evaluate(MISPLACED) == []
    longest = page.locator("text").evaluate_all(
        "all => all.map(one => one.textContent).sort((a, b) => b.length - a.length)[0]"
    )
    page.locator("text").filter(has_text=longest).last.evaluate("one => one.textContent = one.textContent.repeat(3)")
    assert page.evaluate(MISPLACED)
    page.context.close()
