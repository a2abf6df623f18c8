"""Each notebook in JupyterLab: Run All, then everything a learner can click, fold out, follow or reach by keyboard.

Of the Chinese series those that others build on or that have widgets. The long ones of the English series run on demand
only; `make test` has run all their cells. The long ones of the Chinese series run without the cells that take minutes,
and with them on demand.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import run_nbval
from conftest import ROOT, Lab, Sheet
from playwright.sync_api import BrowserContext, Locator, expect

from course.language import CHINESE as CHINESE_CHARACTER
from course.language import say_in

CONTROLS = ".jupyter-widgets :is(input, select, textarea, button, [role=slider])"
#: Who may write to the error stream, which JupyterLab shows on red, and what.
RED_BY_INTENT = {"02_download": "the client's own words while it tries a broken download again"}
ENGLISH = sorted(path.stem for path in (ROOT / "notebooks" / "en").glob("0*.ipynb"))
CHINESE = ["03_dataset", "04_chat_template", "05_lora_training", "06_inference", "09_serving"]
#: They compute for minutes: looked at as they are with BROWSER_LONG set, `make test-browser LONG=1`.
LONG = ("05_lora_training", "06_inference", "07_failure_lab", "08_full_size")
#: What takes the minutes in those of the Chinese series: from the first cell up to the second, which stays.
LONG_CELLS = {"05_lora_training": ("05-40", "05-08"), "06_inference": ("06-23b", "06-49")}
#: Quick cells among those, whose rule against repetition and whose import the chat uses.
QUICK_CELLS = {"05_lora_training": (), "06_inference": ("06-46i", "06-46m", "06-46r", "06-46z1", "06-46z3")}
#: Cells behind these that use what they make (figures for the report, an exercise), and the merged model.
USE_THEM = {"05_lora_training": (), "06_inference": ("06-55", "06-57", "06-58", "06-68", "06-69")}
ALL = bool(os.environ.get("BROWSER_LONG"))
SERIES = [("en", name) for name in ENGLISH if ALL or name not in LONG] + [("zh", name) for name in CHINESE]
#: What matplotlib says there when it draws for the first time on a machine that is slow.
FIRST_PLOT = "Matplotlib is building the font cache; this may take a moment.\n"
ANSWER_SECONDS = 120
SOMETHING = re.compile(r"\S")


def shorten(path: Path, name: str) -> None:
    """Take the code that computes for minutes out of a notebook; its text stays."""
    notebook = nbformat.read(path, as_version=4)
    ids = [cell.id for cell in notebook.cells]
    first, end = map(ids.index, LONG_CELLS[name])
    gone = {*ids[first:end], *USE_THEM[name]} - {*QUICK_CELLS[name]}
    assert {*USE_THEM[name], *QUICK_CELLS[name]} <= set(ids)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type != "code" or cell.id not in gone]
    nbformat.write(notebook, path)


@pytest.fixture(scope="module", params=SERIES, ids=lambda one: "-".join(one))
def sheet(request: pytest.FixtureRequest, lab: Lab, context: Callable[[], BrowserContext]) -> Iterator[Sheet]:
    """A notebook that was run, in the order of the series; its kernel lives until the next one's turn."""
    language, name = request.param
    sheet = Sheet(name, lab, context().new_page(), language)
    if language == "zh" and name in LONG:
        if not ALL:
            shorten(lab.root / sheet.path, name)
        elif name == "05_lora_training":
            run_nbval.share_training(lab.root / "output")
    sheet.open()
    sheet.run_all(minutes=45)
    yield sheet
    sheet.close()


def test_every_cell_ran_and_none_is_red(sheet):
    cells = [cell for cell in sheet.cells() if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    errors = [output for output in outputs if output["output_type"] == "error"]
    assert [f"{error['ename']}: {error['evalue']}" for error in errors] == []
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    red = "".join("".join(output["text"]) for output in outputs if output.get("name") == "stderr")
    assert not red.replace(FIRST_PLOT, "") or sheet.name in RED_BY_INTENT, red
    expect(sheet.page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.error"]')).to_have_count(0)


def test_checks_and_chat_speak_the_language_of_the_series(sheet):
    cells = sheet.cells()
    checks = [cell for cell in cells if "check" in cell["metadata"].get("tags", [])]
    said = ["".join("".join(output.get("text", "")) for output in cell["outputs"]) for cell in checks]
    chats = [number for number, cell in enumerate(cells) if "chat_box(" in "".join(cell["source"])]
    for number in chats:
        chat = sheet.page.locator(f'.jp-Cell[data-windowed-list-index="{number}"]')
        chat.scroll_into_view_if_needed()
        expect(chat.locator(".jupyter-widgets button")).to_have_text(SOMETHING)
        words = chat.locator(".jupyter-widgets").locator("label, button, .widget-label").all_text_contents()
        labels = {text for text in words if text.strip(" \u200b")}  # question, button, two boxes, two columns
        assert len(labels) >= 6
        said += labels
    assert checks
    assert {text: bool(CHINESE_CHARACTER.search(text)) for text in said} == dict.fromkeys(said, sheet.language == "zh")


def test_pictures_are_there_and_say_what_they_show(sheet):
    kept = [output.get("data", {}) for cell in sheet.stored.cells for output in cell.get("outputs", [])]
    images = sheet.page.locator(".jp-Notebook img")
    expect(sheet.page.locator(".jp-OutputArea img")).to_have_count(
        sum("".join(data.get("text/html", "")).count("<img ") for data in kept)
    )
    sheet.page.wait_for_function("[...document.querySelectorAll('.jp-Notebook img')].every(one => one.complete)")
    found = images.evaluate_all("all => all.map(one => [one.alt.trim(), one.naturalWidth])")
    assert all(alt and width > 0 for alt, width in found), found


#: Text with a contrast below 4.5 to 1, the limit of WCAG 2.2 at level AA; how much text was looked at.
FAINT = """() => {
    const colour = css => css.match(/[\\d.]+/g).map(Number)
    const linear = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4
    const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255)
    const ground = one => {
        const found = colour(getComputedStyle(one).backgroundColor)
        return (found[3] ?? 1) > 0.5 || !one.parentElement ? found : ground(one.parentElement)
    }
    const ours = document.querySelectorAll('.jp-Notebook :is(.jp-RenderedMarkdown, .jp-OutputArea-output) *')
    // SwanLab prints its own lines in colours of its own (by rich, which names a decoration's colour).
    const swanlab = one => one.style.textDecorationColor
    const seen = [...ours].filter(one => one.checkVisibility() && !one.closest('svg, mjx-container') && !swanlab(one))
    const written = seen.filter(one => (
        (one.type && one.value) || [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())))
    const faint = written.map(one => {
        const [dark, bright] = [colour(getComputedStyle(one).color), ground(one)].map(light).sort((a, b) => a - b)
        return [(bright + 0.05) / (dark + 0.05), one.outerHTML.slice(0, 200)]
    }).filter(([contrast]) => contrast < 4.5)
    return [faint, written.length]
}"""


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_text_is_legible(sheet, theme):
    sheet.theme(theme)
    sheet.photograph(theme.lower())
    faint, looked_at = sheet.page.evaluate(FAINT)
    assert faint == []
    assert looked_at > 20


# ------------------------------------------------------------------------------------------------- widgets


def style(control: Locator) -> list[str]:
    """What of a control's look can show that it has the focus."""
    looks = "[s.outlineStyle, s.outlineColor, s.borderColor, s.boxShadow, s.backgroundColor]"
    return control.evaluate(f"e => (s => {looks})(getComputedStyle(e))")


class Hand:
    """Uses the controls of one cell, by the mouse or by the keyboard alone."""

    def __init__(self, sheet: Sheet, cell: Locator, keyboard: bool) -> None:
        self.page, self.language, self.cell, self.keyboard = sheet.page, sheet.language, cell, keyboard
        self.used: set[str] = set()
        cell.scroll_into_view_if_needed()
        if keyboard:  # the shortcuts of JupyterLab that go to the notebook and, with the arrows, to the cell
            number = int(cell.get_attribute("data-windowed-list-index"))
            here = "jupyterapp.shell.currentWidget.content"
            self.page.evaluate("jupyterapp.shell.activateById(jupyterapp.shell.currentWidget.id)")
            self.page.keyboard.press("Escape")
            while (at := self.page.evaluate(f"{here}.activeCellIndex")) != number:
                self.page.keyboard.press("ArrowDown" if at < number else "ArrowUp")
                self.page.wait_for_function(f"{here}.activeCellIndex !== {at}")

    def take(self, control: Locator) -> None:
        """Give the control the focus: Tab forwards, Shift+Tab backwards, and it must be seen that it arrived."""
        self.used.add(control.evaluate("e => e.dataset.hand ??= crypto.randomUUID()"))
        if not self.keyboard:
            return
        before = style(control)
        where = "e => [e === document.activeElement, !!(document.activeElement.compareDocumentPosition(e) & 4)]"
        for _ in range(40):
            here, further = control.evaluate(where)
            if here:
                assert style(control) != before, (
                    f"the focus does not show: {control.evaluate('e => e.outerHTML')[:200]}"
                )
                return
            self.page.keyboard.press("Tab" if further else "Shift+Tab")
        pytest.fail(f"not reached with Tab: {control.evaluate('e => e.outerHTML')[:200]}")

    def press(self, control: Locator) -> None:
        """Press a button, or change a box, by its mouse button or the space bar."""
        self.take(control)
        self.page.keyboard.press("Space") if self.keyboard else control.click()

    def write(self, control: Locator, text: str) -> None:
        """Write into a field of text."""
        self.take(control)
        self.page.keyboard.insert_text(text) if self.keyboard else control.fill(text)

    def turn(self, control: Locator) -> None:
        """Change a slider, a menu or a box to another value."""
        kind = control.evaluate("e => e.getAttribute('role') ?? e.type")
        if kind == "checkbox":
            self.press(control)
            return
        self.take(control)
        if kind == "slider" and self.keyboard:
            self.page.keyboard.press("ArrowRight")
        elif kind == "slider":
            track = control.locator("xpath=ancestor::div[contains(@class, 'noUi-target')]")
            box = track.bounding_box()
            track.click(position={"x": box["width"] * 0.8, "y": box["height"] / 2})
        else:
            chosen, last = control.evaluate("e => [e.selectedIndex, e.options.length - 1]")
            if self.keyboard:  # unfolded first: JupyterLab takes the arrows of a folded menu for its own
                for key in ("Space", "ArrowDown" if chosen < last else "ArrowUp", "Enter"):
                    self.page.keyboard.press(key)
            else:
                control.select_option(index=chosen + 1 if chosen < last else chosen - 1)


def use_interact(hand: Hand) -> None:
    """Every control changes what is below the controls."""
    shown = hand.cell.locator(".widget-interact .widget-output")
    for control in hand.cell.locator(".widget-interact").locator("input, select, [role=slider]").all():
        expect(shown).to_contain_text(SOMETHING, timeout=30_000)
        before = shown.text_content()
        hand.turn(control)
        expect(shown).not_to_have_text(before, timeout=30_000)


def use_chat_box(hand: Hand) -> None:
    """Ask, read both answers, ask on, look at what the template made."""
    told = partial(say_in, hand.language)
    question, ask = hand.cell.locator("input[type=text]"), hand.cell.get_by_role("button", name=told("Ask"))
    keep = hand.cell.get_by_label(told("keep the conversation"))
    unfold = hand.cell.get_by_label(told("show the template's text"))
    prompt = hand.cell.get_by_title(told("what the adapter reads"))
    names = {name: told("answer of the {name}", name=told(name)) for name in ("base", "adapter", "longer training")}
    answers = {name: hand.cell.get_by_title(title) for name, title in names.items()}

    def ask_and_read(text: str, number: int, enter: bool = False) -> str:
        if text:
            hand.write(question, text)
        hand.page.keyboard.press("Enter") if enter else hand.press(ask)
        asked = told("Q: {question}", question=text or question.get_attribute("placeholder"))
        said = re.compile(rf"^{re.escape(asked)}.*\n.*\S", re.DOTALL)
        for column in answers.values():
            expect(column).to_have_count(number, timeout=ANSWER_SECONDS * 1000)
            expect(column.first).to_have_value(said, timeout=ANSWER_SECONDS * 1000)
        expect(ask).to_be_enabled()
        return answers["adapter"].first.input_value().partition("\n")[2]

    begun = answers["adapter"].count()
    first = ask_and_read("你叫什么名字？", begun + 1)
    expect(prompt).to_be_hidden()
    hand.press(unfold)
    expect(prompt).to_be_visible()
    expect(prompt).to_have_value(re.compile("你叫什么名字？"))
    ask_and_read("你父亲是谁？", begun + 2, enter=hand.keyboard)
    expect(prompt).to_have_value(re.compile(f"你叫什么名字？.*{re.escape(first[:5])}.*你父亲是谁？", re.DOTALL))
    hand.press(keep)
    ask_and_read("", begun + 3)
    expect(prompt).not_to_have_value(re.compile("你父亲是谁？"))
    hand.press(keep)
    hand.press(unfold)
    expect(prompt).to_be_hidden()


@pytest.mark.parametrize("keyboard", [False, True], ids=["mouse", "keyboard"])
def test_every_widget_does_what_it_says(sheet, keyboard):
    used = 0
    for call, use in (("interact(", use_interact), ("chat_box(", use_chat_box)):
        sources = ["".join(cell["source"]) for cell in sheet.cells()]
        for number in [number for number, source in enumerate(sources) if call in source]:
            hand = Hand(sheet, sheet.page.locator(f'.jp-Cell[data-windowed-list-index="{number}"]'), keyboard)
            use(hand)
            assert hand.used
            used += len(hand.used)
    # The readers of answers (`textarea`) are not used, only read.
    assert used == sheet.page.locator(CONTROLS).locator("xpath=self::*[not(self::textarea)]").count()


def test_folded_parts_open_by_keyboard(sheet):
    for part in sheet.page.locator(".jp-RenderedMarkdown details").all():
        hand = Hand(sheet, part.locator("xpath=ancestor::div[contains(@class, 'jp-Cell ')]"), keyboard=True)
        folded = part.locator("> :not(summary)").first
        expect(folded).to_be_hidden()
        hand.take(part.locator("> summary"))
        sheet.page.keyboard.press("Enter")
        expect(folded).to_be_visible()
        assert folded.inner_text().strip()
        sheet.page.keyboard.press("Space")
        expect(folded).to_be_hidden()


# --------------------------------------------------------------------------------------------------- links


IN_VIEW = "e => { const box = e.getBoundingClientRect(); return box.bottom > 0 && box.top < innerHeight }"


def anchor(sheet: Sheet, fragment: str) -> Locator:
    """What JupyterLab scrolls to: it matches a heading's words, and letters must be of the same case."""
    words = json.dumps(unquote(fragment), ensure_ascii=False)
    return sheet.page.locator(f".jp-NotebookPanel:not(.lm-mod-hidden) [data-jupyter-id={words}]")


def test_every_link_of_the_series_leads_somewhere(sheet):
    page, lab = sheet.page, sheet.lab
    links = page.locator(".jp-RenderedMarkdown a[href]:not(.jp-InternalAnchorLink)")
    targets = links.evaluate_all("all => all.map(e => e.getAttribute('href'))")
    inside = [href for href in dict.fromkeys(targets) if href.startswith(("#", lab.url))]
    assert [href for href in targets if href not in inside and not href.startswith("https://")] == []
    for href in inside:
        link = links.locator(f"xpath=self::*[@href='{href}']").first
        if href.startswith("#"):
            expect(anchor(sheet, href[1:])).to_have_count(1)
            for _ in range(3):  # JupyterLab guesses the height of what it has not drawn, so a jump may fall short
                link.click()
                page.wait_for_timeout(500)
                if anchor(sheet, href[1:]).evaluate(IN_VIEW):
                    break
            expect(anchor(sheet, href[1:])).to_be_in_viewport()
            continue
        path = unquote(urlsplit(href).path).partition("/files/")[2]
        link.evaluate("e => e.closest('details')?.setAttribute('open', '')")  # a link in a solution, say
        assert (lab.root / path).is_file(), f"{sheet.name} links to {path}, which is no file"
        link.click()
        page.wait_for_function("path => jupyterapp.shell.currentWidget?.context?.path === path", arg=path)
        if fragment := urlsplit(href).fragment:
            expect(anchor(sheet, fragment)).to_be_in_viewport()
        sheet.back()


# ----------------------------------------------------------------------- last, for it looks at all of the above


def test_no_trouble_and_nothing_asked_outside(sheet):
    """No error in the console, no dialog, no offer of news, no request that leaves this machine."""
    # A link opens a notebook that has not been run; of its stored widgets the kernel is gone.
    assert [said for said in sheet.troubles if "widget model not found" not in said] == []
    here = ("data:", "blob:", sheet.lab.url, sheet.lab.url.replace("http", "ws"))
    assert [url for url in sheet.asked if not url.startswith(here)] == []
    assert [url for url in sheet.asked if "/lab/api/" in url and url.endswith(("news", "update"))] == []
    expect(sheet.page.locator(".Toastify__toast, .jp-Notification-Toast")).to_have_count(0)
