"""Which terms of the glossary `docs/site/course_pages.py` finds in a text, in English and in Chinese."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from docutils import nodes

ROOT = Path(__file__).resolve().parents[2]
GLOSSARIES = {
    "en": (
        "term | 中文",
        ("special token | 特殊 token", "token | token", "rank | 秩", "GGUF | GGUF", "checkpoint | 检查点"),
    ),
    "zh": (
        "术语 | English",
        (
            "检查点 | checkpoint",
            "梯度检查点 | gradient checkpointing",
            "标签 | label",
            "LoRA、低秩适配 | LoRA",
            "秩 | rank",
            "步 | step",
            "token | token",
        ),
    ),
}


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The module as Sphinx imports it for a language."""
    monkeypatch.setenv("SITE_LANGUAGE", request.param)
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    monkeypatch.delitem(sys.modules, "course_pages", raising=False)
    yield importlib.import_module("course_pages")
    sys.modules.pop("course_pages", None)


def explained(pages: ModuleType, folder: Path, text: str) -> str:
    """A paragraph with ‹› around what became a link."""
    head, rows = GLOSSARIES[pages.LANGUAGE]
    table = "\n".join(f"| {row} | what it is | 01 | |" for row in (head, "--- | ---", *rows))
    (folder / "glossary.md").write_text(table, encoding="utf-8")
    paragraph = nodes.paragraph("", "", nodes.Text(text))
    document = nodes.section("", paragraph)

    class Builder:
        def get_relative_uri(self, here: str, there: str) -> str:
            return f"{there}.html"

    class App:
        srcdir, builder = folder, Builder()

    pages.explain_terms(App, document, "index")
    return "".join(
        f"‹{one.astext().partition('>')[2].removesuffix('</a>')}›" if isinstance(one, nodes.raw) else str(one)
        for one in paragraph.children
    )


@pytest.mark.parametrize(
    ("pages", "text", "marked"),
    [
        ("zh", "梯度检查点与检查点无关。", "‹梯度检查点›与‹检查点›无关。"),
        ("zh", "先看梯度检查点，再看梯度检查点。", "先看‹梯度检查点›，再看梯度检查点。"),
        ("zh", "打开一个标签页，看每个标签。", "打开一个标签页，看每个‹标签›。"),
        ("zh", "LoRA（低秩适配）的秩", "‹LoRA›（低秩适配）的‹秩›"),
        ("zh", "低秩矩阵；一步一步来", "低秩矩阵；一步一步来"),
        ("zh", "一个 token；tokenizer、in_token", "一个 ‹token›；tokenizer、in_token"),
        ("zh", "每个Token", "每个Token"),
        ("en", "Special tokens, a special token, a token", "‹Special tokens›, a special token, a ‹token›"),
        ("en", "the gguf package and GGUF files", "the gguf package and ‹GGUF› files"),
        ("en", "names, places, ranks; the rank", "names, places, ranks; the ‹rank›"),
        ("en", "my_token, checkpoint.py, checkpointing", "my_token, checkpoint.py, checkpointing"),
    ],
    indirect=["pages"],
)
def test_the_longest_name_is_explained_the_first_time(pages, tmp_path, text, marked):
    assert explained(pages, tmp_path, text) == marked


@pytest.mark.parametrize("kind", [nodes.title, nodes.literal, nodes.reference, nodes.literal_block])
@pytest.mark.parametrize("pages", ["zh"], indirect=True)
def test_headings_code_and_links_are_left_alone(pages, kind):
    assert pages.is_quiet(kind("", "", nodes.Text("检查点")).children[0])
    assert not pages.is_quiet(nodes.paragraph("", "", nodes.Text("检查点")).children[0])


@pytest.mark.parametrize("pages", ["en", "zh"], indirect=True)
def test_what_is_shown_beside_a_term_is_in_the_language_of_the_page(pages):
    if pages.CHINESE:
        (term,) = pages.terms("| 标签 | label | 填 `-100`。 | 04 | |")
        assert (term.shown, term.tip) == ("标签", "label：填 -100。")
    else:
        (term,) = pages.terms("| label | 标签 | or `-100`. | 04 | |")
        assert (term.shown, term.tip) == ("label", "标签: or -100.")
    assert term.anchor == "term-label"


@pytest.mark.parametrize("pages", ["en", "zh"], indirect=True)
def test_every_phrase_with_another_meaning_is_in_a_text_and_holds_a_term(pages):
    import website

    texts = []
    for path in (ROOT / source for source in website.sources(ROOT, pages.LANGUAGE).values()):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        texts.append(text)
    glossary = "docs/glossary.zh-CN.md" if pages.CHINESE else "docs/glossary.md"
    names = [name.lower() for term in pages.terms((ROOT / glossary).read_text(encoding="utf-8")) for name in term.names]
    for phrase in pages.OTHER_MEANINGS:
        assert any(phrase in text for text in texts), phrase
        assert any(name in phrase for name in names), phrase
