"""Markup in an answer, a token or a file is shown as text and never executed, whichever way the course shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import nbformat
import pytest
from conftest import Lab, Sheet
from playwright.sync_api import BrowserContext, Page, expect

from course.language import LANGUAGES, say_in

MARKUP = '<img src="x" onerror="window.harmed = 1"><script>window.harmed = 2</script><b class="harm">bold</b> $\\alpha$'
SETUP = f"""
import sys
sys.path.append("../..")
import utils
from course import plots, widgets
MARKUP = {MARKUP!r}
class Tokenizer:
    def decode(self, ids):
        return MARKUP
"""
WAYS = {
    "chat box": "widgets.chat_box(lambda name, turns: MARKUP, lambda turns: MARKUP)",
    "chat box, error": "widgets.chat_box(lambda name, turns: exec('raise ValueError(MARKUP)'), lambda turns: MARKUP)",
    "mask view": "widgets.mask_view(Tokenizer(), [1, 2], [-100, 2])",
    "table": "utils.table([[MARKUP, 1]], ('answer', 'n'))",
    "table with Chinese": "utils.table([[MARKUP, '你是谁？']], ('answer', 'question'))",
    "picture": "plots.picture(plots.axes()[0], MARKUP)",
    "picture of losses": "plots.loss_picture([{f'eval_{MARKUP}_loss': 1.0, 'step': 1}])",
    "check": "utils.check(1, (lambda answer: False, MARKUP))",
    "text": "print(MARKUP)\nMARKUP",
    "error": "raise utils.CourseError(MARKUP)",
}
#: What utils must not do. Each shows that the test below would see it.
WRONG_WAYS = {
    "widgets.HTML": "import ipywidgets\nipywidgets.Textarea = ipywidgets.HTML\n" + WAYS["chat box"],
    "no escape": "import html\nhtml.escape = lambda text, **_: text\n" + WAYS["mask view"],
}


class Shown:
    """A notebook of its own with a cell for each way; every chat box in it was asked with markup."""

    def __init__(self, name: str, ways: dict[str, str], lab: Lab, page: Page, language: str = "en") -> None:
        cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *ways.values())]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, lab.root / "notebooks" / language / f"{name}.ipynb")
        self.sheet, told = Sheet(name, lab, page, language), partial(say_in, language)
        self.sheet.open()
        self.sheet.run_all()
        self.cells = dict(zip(ways, page.locator(".jp-CodeCell").all()[1:], strict=True))
        for way, source in ways.items():
            if "chat_box" in source:
                cell = self.cells[way]
                cell.get_by_label(told("Question")).fill(MARKUP)
                cell.get_by_label(told("show the template's text")).check()
                ask = cell.get_by_role("button", name=told("Ask"))
                ask.click()
                for model in ("base", "adapter"):
                    expect(cell.get_by_title(told("answer of the {name}", name=told(model)))).to_have_count(1)
                expect(ask).to_be_enabled()

    def harm(self, way: str) -> list[str]:
        """What the markup has become in the way's output, other than text."""
        output = self.cells[way].locator(".jp-OutputArea")
        self.sheet.page.wait_for_timeout(500)  # an `onerror` comes a little later
        found = [what for what in ("img[src='x']", "script", ".harm", "[onerror]") if output.locator(what).count()]
        found += ["executed"] if self.sheet.page.evaluate("window.harmed") else []
        return found + [trouble for trouble in self.sheet.troubles if trouble.startswith("dialog")]


@pytest.fixture(scope="module", params=LANGUAGES)
def shown(request: pytest.FixtureRequest, lab: Lab, context: Callable[[], BrowserContext]) -> Iterator[Shown]:
    shown = Shown("markup", WAYS, lab, context().new_page(), request.param)
    yield shown
    shown.sheet.close()


@pytest.mark.parametrize("way", WAYS)
def test_markup_is_shown_and_not_executed(shown, way):
    assert shown.harm(way) == []
    output = shown.cells[way].locator(".jp-OutputArea")
    read = output.locator("textarea:visible").evaluate_all("all => all.map(one => one.value)")
    if "chat_box" in WAYS[way]:  # the prompt, and in each column the question and the answer
        assert [text.count(MARKUP) for text in read] == [1, 2, 2]
    else:
        expect(output).to_contain_text(MARKUP)


@pytest.mark.parametrize("way", WRONG_WAYS)
def test_a_wrong_way_would_be_seen(lab, context, way):
    shown = Shown("wrong_way", {way: WRONG_WAYS[way]}, lab, context().new_page())
    assert {"executed", ".harm"} <= set(shown.harm(way))
    shown.sheet.close()
