"""The built site (`make site`) as a reader meets it: in Chromium, by keyboard, on a phone, in light and in dark."""

from __future__ import annotations

import functools
import http.server
import importlib.resources
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

SITE = Path(os.environ.get("SITE_FOLDER", Path(__file__).resolve().parents[2] / "output" / "site"))
HTML = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
#: For axe, which needs seconds for a long page: one of each kind.
LOOKED_AT = ("en/index", "zh/notebooks/04_chat_template", "en/notebooks/05_lora_training")
LOOKED_AT += ("zh/glossary", "en/troubleshooting", "zh/search")
AXE = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
#: Everything of a page that the Tab key should reach, by a number of its own.
FOCUSABLE = """() => [...document.querySelectorAll('a[href], button, input, summary, [tabindex="0"]')]
    .filter(e => e.checkVisibility({visibilityProperty: true}) && e.getClientRects().length)
    .filter(e => e.tabIndex >= 0 && !e.disabled)
    .map((e, number) => { e.dataset.number = number; return `${number} ${e.outerHTML.slice(0, 120)}` })"""


#: Cells of a page's tables whose text is a column of a word or two, and links that are cut into characters.
SQUEEZED = """() => [...document.querySelectorAll("main td")].filter(cell => {
    const text = document.createRange();
    text.selectNodeContents(cell);
    const box = text.getBoundingClientRect();
    const numbers = [...cell.querySelectorAll("a")].filter(link => /^\\d\\d$/.test(link.textContent));
    const cut = numbers.some(link => link.getClientRects().length > 1);
    return cut || box.height > 200 && box.width < 150;
}).map(cell => cell.textContent)"""
#: The colour of a picture near its corner, in its panel, as the browser draws it.
FIRST_PANEL = """async image => {
    await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [...context.getImageData(8, 8, 1, 1).data].slice(0, 3);
}"""


class Markup(HTMLParser):
    """The anchors, the links and the pictures of a page."""

    def __init__(self, path: str):
        super().__init__()
        self.ids, self.links, self.pictures = set(), [], []
        self.feed((SITE / path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found["id"]} if found.get("id") else set()
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        self.pictures += [found] if tag == "img" else []


@functools.cache
def markup(path: str) -> Markup:
    return Markup(path)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The site as a server on this machine gives it out."""
    if not HTML:
        pytest.fail("output/site is empty: run make site first")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *said: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    server.handle_error = lambda *asked: None  # a browser that leaves a page breaks off what it was fetching
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which(os.environ.get("CHROMIUM", "chromium")))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Opens a page of the site in a new profile; at the end, that it asked nobody else and complained of nothing."""
    troubles, contexts = [], []

    def ask(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            troubles.append(request.url)

    def open_page(path: str, **options) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", ask)
        page.on("websocket", lambda socket: troubles.append(socket.url))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.goto(f"{address}/{path}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


# ------------------------------------------------------------------------------------------------- every page


@pytest.mark.parametrize("path", HTML)
def test_links_anchors_and_pictures(path):
    for link in markup(path).links:
        parts = urlsplit(link)
        if parts.scheme or link.startswith("//"):
            continue
        there = (SITE / path).parent / unquote(parts.path) if parts.path else SITE / path
        assert there.is_file(), link
        if parts.fragment and there.suffix == ".html":
            anchors = markup(os.path.relpath(there, SITE)).ids
            assert unquote(parts.fragment) in anchors | {"main-content"}, link
    for picture in markup(path).pictures:
        assert picture.get("alt", "").strip(), str(picture)[:200]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_page_asks_others_or_is_wider_than_a_phone(visit, address, language):
    page = visit(f"{language}/index.html", viewport={"width": 390, "height": 844})
    wide = {}
    for path in (path for path in HTML if path.startswith(language)):
        page.goto(f"{address}/{path}")
        wide[path] = page.evaluate("document.documentElement.scrollWidth")
    assert {path: pixels for path, pixels in wide.items() if pixels > 390} == {}


@pytest.mark.parametrize("path", ["zh/glossary", "en/glossary", "en/troubleshooting", "zh/benchmarks"])
def test_a_table_of_sentences_is_not_squeezed_on_a_phone(visit, path):
    page = visit(f"{path}.html", viewport={"width": 390, "height": 844})
    page.wait_for_load_state("networkidle")
    squeezed = page.evaluate(SQUEEZED)
    assert squeezed == []
    if "glossary" in path:
        page.goto(f"{page.url}#term-temperature")
        page.reload()
        expect(page.locator("#term-temperature")).to_be_in_viewport()
        labels = page.locator("tr:has(#term-temperature) td").evaluate_all("all => all.map(e => e.dataset.label)")
        assert labels == page.locator("th").all_text_contents()[:5]
    page.set_viewport_size({"width": 1280, "height": 900})
    expect(page.locator("table.course-stacked")).to_have_count(0)


def test_both_languages_have_the_same_pages():
    english, chinese = ({path[3:] for path in HTML if path[:2] == language} for language in ("en", "zh"))
    assert english == chinese and len(english) > 20


# ----------------------------------------------------------------------------------------- what a reader does


@pytest.mark.parametrize(("locale", "language"), [("zh-CN", "zh"), ("en-GB", "en"), ("de-DE", "en")])
def test_the_first_page_leads_to_the_language_of_the_browser(visit, locale, language):
    page = visit("index.html", locale=locale)
    page.wait_for_url(f"**/{language}/index.html")


def test_the_switch_leads_to_the_same_page_and_back(visit):
    page = visit("en/notebooks/06_inference.html")
    page.get_by_role("link", name="中文").click()
    page.wait_for_url("**/zh/notebooks/06_inference.html")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.get_by_role("link", name="English").click()
    page.wait_for_url("**/en/notebooks/06_inference.html")


@pytest.mark.parametrize(
    ("language", "words", "found"),
    [
        ("zh", "专家", "notebooks/05_lora_training"),
        ("zh", "损失", "notebooks/04_chat_template"),
        ("zh", "混合专家层", "notebooks/05_lora_training"),
        ("zh", "秩", "notebooks/05_lora_training"),
        ("zh", "LoRA 训练", "notebooks/05_lora_training"),
        ("en", "router", "notebooks/05_lora_training"),
        ("en", "loss", "notebooks/04_chat_template"),
    ],
)
def test_the_search_finds_it(visit, language, words, found):
    page = visit(f"{language}/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=**")
    page.wait_for_function("document.querySelectorAll('#search-results li').length > 2")
    expect(page.locator(f"#search-results a[href^='{found}']").first).to_be_attached()


@pytest.mark.parametrize(
    ("language", "page", "name", "said", "anchor"),
    [
        ("en", "notebooks/05_lora_training", "mixture of experts", "^混合专家: Layers", "term-mixture-of-experts"),
        ("zh", "notebooks/05_lora_training", "混合专家", "^mixture of experts：一层里", "term-mixture-of-experts"),
        ("zh", "notebooks/04_chat_template", "对话模板", "^chat template：把对话", "term-chat-template"),
        ("zh", "index", "LoRA", "^LoRA：微调的一种", "term-lora"),
    ],
)
def test_a_term_is_explained_under_the_pointer_and_by_keyboard(visit, language, page, name, said, anchor):
    page = visit(f"{language}/{page}.html")
    term, tip = page.locator("a.course-term", has_text=name).first, page.get_by_role("tooltip")
    for tries_left in (2, 1, 0):  # on a slow machine the page may still move away under the pointer
        page.mouse.move(0, 0)
        term.hover()
        try:
            expect(tip).to_have_text(re.compile(said), timeout=3000)
            break
        except AssertionError:
            if not tries_left:
                raise
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    term.focus()
    expect(tip).to_be_visible()
    assert term.get_attribute("aria-describedby") == tip.get_attribute("id")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/glossary.html#{anchor}")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_terms_are_explained_once_a_page_and_in_text_alone(visit, address, language):
    page = visit(f"{language}/index.html")
    pages = [path for path in HTML if path.startswith((f"{language}/notebooks", f"{language}/index"))]
    for path in pages:
        page.goto(f"{address}/{path}")
        found = page.locator("a.course-term").evaluate_all("all => all.map(e => e.getAttribute('href'))")
        assert len(found) == len(set(found)) > 3, path
        quiet = "main :is(code, pre, h1, h2, h3, h4, summary, a:not(.course-term)) a.course-term, nav a.course-term"
        assert page.locator(quiet).count() == 0, path


def test_a_notebook_can_be_downloaded(visit):
    page = visit("zh/notebooks/02_download.html")
    with page.expect_download() as download:
        page.get_by_role("link", name="Notebook", exact=True).click()
    assert download.value.suggested_filename == "02_download.ipynb"
    original = Path(__file__).resolve().parents[2] / "notebooks" / "zh" / "02_download.ipynb"
    assert Path(download.value.path()).stat().st_size > 0.5 * original.stat().st_size


def test_light_and_dark_can_be_chosen(visit):
    page = visit("en/index.html", color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.locator(".theme-switch-button").click()
    page.locator(".theme-change-button[data-mode=dark]").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(background) != light


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("system", ["light", "dark"])
def test_a_picture_follows_the_switch_and_not_the_system(visit, language, system):
    page = visit(f"{language}/index.html", color_scheme=system)
    pictures = page.locator("main img[src*='path.']")
    for theme in ("light", "dark"):
        page.locator(".theme-switch-button").click()
        page.locator(f".theme-change-button[data-mode={theme}]").click()
        shown = [one for one in pictures.all() if one.is_visible()]
        assert [re.search(r"\.(\w+)\.svg$", one.get_attribute("src"))[1] for one in shown] == [theme]
        corner = shown[0].evaluate(FIRST_PANEL)
        assert (sum(corner) < 200) == (theme == "dark"), corner


def test_what_is_folded_is_unfolded_by_a_key_and_printed(visit):
    page = visit("en/notebooks/05_lora_training.html")
    fold = page.locator("main details").first
    inside = fold.locator("p").first
    expect(inside).to_be_hidden()
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(inside).to_be_visible()
    page.keyboard.press("Enter")
    page.emulate_media(media="print")
    assert inside.evaluate("e => e.getBoundingClientRect().height") > 0


def test_the_keyboard_reaches_everything(visit):
    page = visit("en/notebooks/02_download.html")
    page.wait_for_load_state("networkidle")
    wanted = page.evaluate(FOCUSABLE)
    reached = []
    for _ in range(len(wanted) + 20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.dataset.number"))
    missing = [one for one in wanted if one.partition(" ")[0] not in reached]
    assert missing == []
    assert 'href="#main-content"' in page.evaluate("document.querySelector('[data-number=\"0\"]').outerHTML")


def test_the_first_key_skips_to_the_content(visit):
    page = visit("zh/index.html")
    page.wait_for_load_state("networkidle")
    page.keyboard.press("Tab")
    expect(page.locator("a[href='#main-content']")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#main-content$"), timeout=60_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", LOOKED_AT)
def test_axe_finds_nothing_serious(visit, path, scheme):
    page = visit(f"{path}.html", color_scheme=scheme)
    page.wait_for_load_state("networkidle")
    page.add_style_tag(content="* { transition: none !important }")  # or it meets colours on their way
    page.evaluate(AXE)
    found = page.evaluate("axe.run({resultTypes: ['violations'], preload: false})")["violations"]
    serious = {
        one["id"]: (len(one["nodes"]), [node["html"][:200] for node in one["nodes"][:3]])
        for one in found
        if one["impact"] in ("serious", "critical")
    }
    assert serious == {}
