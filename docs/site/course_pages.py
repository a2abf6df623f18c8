"""What the site has beside the theme: terms explained where they are, formulas as MathML, search in Chinese."""

from __future__ import annotations

import html
import os
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import jieba
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.search.zh import SearchChinese
from sphinx.util.docutils import SphinxTranslator

LANGUAGE = os.environ.get("SITE_LANGUAGE", "en")
CHINESE = LANGUAGE == "zh"
WORDS = {
    "en": {"other": "中文", "notebook": "Notebook", "pdf": "PDF", "links": "Language and downloads"},
    "zh": {"other": "English", "notebook": "Notebook", "pdf": "PDF", "links": "语言与下载"},
}[LANGUAGE]
#: In these a term is left as it is.
QUIET = (nodes.title, nodes.literal, nodes.literal_block, nodes.reference, nodes.raw, nodes.math, nodes.math_block)
#: The words of a query of Chinese are the longest that the index knows; the rest as the browser divides it.
SPLIT_QUERY = """
var splitQuery = (query) => {
  const known = (word) => Search._index && (Object.hasOwn(Search._index.terms, word)
    || Object.hasOwn(Search._index.titleterms, word));
  const words = [];
  for (const [run] of query.matchAll(/[\\u3400-\\u9fff]+|[\\p{Letter}\\p{Number}_]+/gu)) {
    if (!/[\\u3400-\\u9fff]/.test(run)) { words.push(run); continue; }
    for (let start = 0; start < run.length;) {
      let end = run.length;
      while (end > start + 1 && !known(run.slice(start, end))) end -= 1;
      words.push(run.slice(start, end));
      start = end;
    }
  }
  return words;
};
"""


@dataclass(frozen=True)
class Term:
    """A row of the glossary."""

    english: str
    chinese: str
    meaning: str

    @property
    def anchor(self) -> str:
        """Its place on the glossary's page."""
        return "term-" + re.sub(r"\W+", "-", self.english.lower())

    @property
    def tip(self) -> str:
        """What is shown beside the term: its name in the other language, and what it means."""
        other = self.english if CHINESE else self.chinese
        meaning = re.sub(r"`([^`]*)`", r"\1", self.meaning).replace(r"\|", "|")
        return f"{other}: {meaning}"

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The term in a text; in Chinese, not where its characters belong to the words around."""
        if CHINESE and not self.chinese.isascii():
            return re.compile(re.escape(self.chinese))
        stem = re.escape(self.english).replace(r"\-", "[- ]").replace(r"\ ", r"[- \n]")
        return re.compile(rf"(?<![\w./-]){stem}s?(?![\w/-]|\.\w)", re.IGNORECASE)


def terms(text: str) -> list[Term]:
    """The rows of the glossary's tables."""
    rows = (re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in text.splitlines() if line.startswith("|"))
    cells = ([cell.strip() for cell in row] for row in rows if len(row) == 5)
    return [Term(*row[:3]) for row in cells if row[0] != "term" and set(row[0]) - set("-: ")]


@cache
def glossary(folder: str) -> list[Term]:
    """The terms, the longest first: a name that holds another one is looked for before it."""
    found = terms((Path(folder) / "glossary.md").read_text(encoding="utf-8"))
    return sorted(found, key=lambda term: -len(term.chinese if CHINESE else term.english))


def name_the_rows(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give each row of the glossary an anchor."""
    if docname == "glossary":
        for term in terms(source[0]):
            named = f'\n| <span id="{term.anchor}"></span>{term.english} |'
            source[0] = source[0].replace(f"\n| {term.english} |", named)


def explain_terms(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """Make the first use of each term on a page a link to the glossary that carries the meaning."""
    if docname == "glossary":
        return
    address = app.builder.get_relative_uri(docname, "glossary")
    texts = [text for text in tree.findall(nodes.Text) if not is_quiet(text)]
    for term in glossary(str(app.srcdir)):
        found = ((place, term.pattern.search(str(text))) for place, text in enumerate(texts))
        if CHINESE and len(term.chinese) < 2:
            continue  # one character is part of too many words
        place, match = next(((place, match) for place, match in found if match), (0, None))
        if match:
            texts[place : place + 1] = link_term(texts[place], match, term, address)


def link_term(text: nodes.Text, match: re.Match[str], term: Term, address: str) -> list[nodes.Text]:
    """Put a link in the place of a term in a text; returns the texts before and after it."""
    around = [nodes.Text(str(text)[: match.start()]), nodes.Text(str(text)[match.end() :])]
    tip = html.escape(term.tip)
    link = f'<a class="course-term" href="{address}#{term.anchor}" title="{tip}">{html.escape(match[0])}</a>'
    text.parent.replace(text, [around[0], nodes.raw("", link, format="html"), around[1]])
    return around


def is_quiet(node: nodes.Node) -> bool:
    """Whether a text is of a kind in which no term is explained."""
    while node := node.parent:
        if isinstance(node, QUIET):
            return True
    return False


def mark_english(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """Say to screen readers that a page of the Chinese site is in English, below its note."""
    note = next(iter(tree.findall(nodes.note)), None)
    if CHINESE and note is not None and "英文" in note.astext():
        section = note.parent
        section.insert(section.index(note) + 1, nodes.raw("", '<div lang="en">', format="html"))
        section.append(nodes.raw("", "</div>", format="html"))


def formula(translator: SphinxTranslator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML."""
    block = isinstance(node, nodes.math_block)
    mathml = convert(node.astext().strip(), display="block" if block else "inline")
    translator.body.append(f'<div class="math">{mathml}</div>' if block else f'<span class="math">{mathml}</span>')
    raise nodes.SkipNode


def page_context(app: Sphinx, pagename: str, template: str, context: dict, tree: nodes.document | None) -> None:
    """What the template of the header needs: the same page in the other language, and the downloads."""
    other = "en" if CHINESE else "zh"
    root, name = context["content_root"], pagename.rpartition("/")[2]
    downloads = [(WORDS["notebook"], f"{name}.ipynb")] if pagename.startswith("notebooks/") else []
    downloads += [(WORDS["pdf"], f"{name}.pdf")] if os.environ.get("SITE_PDF") and tree is not None else []
    context["course"] = {
        **WORDS,
        "other_language": {"en": "en", "zh": "zh-CN"}[other],
        "other_page": f"{root}../{other}/{pagename}.html",
        "downloads": downloads,
    }


class CourseChinese(SearchChinese):
    """Chinese search that knows the glossary's terms, single characters, and how to divide a query."""

    lang = "zh"
    language_name = "English"  # of the stemmer; Sphinx 9.0 names one for Chinese that it does not bring
    js_splitter_code = SPLIT_QUERY

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(options)
        for term in glossary(options["folder"]) if "folder" in options else []:
            if not term.chinese.isascii():
                jieba.add_word(term.chinese)

    def word_filter(self, word: str) -> bool:
        """Which words the index takes."""
        return len(word) > 1 or bool(re.fullmatch("[\u3400-\u9fff]", word))


def setup(app: Sphinx) -> dict[str, bool]:
    """Join Sphinx."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    if CHINESE:
        app.add_search_language(CourseChinese)
        app.config.html_search_options = {"folder": str(app.srcdir)}
    app.connect("source-read", name_the_rows)
    app.connect("doctree-resolved", explain_terms)
    app.connect("doctree-resolved", mark_english, priority=600)
    app.connect("html-page-context", page_context)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
