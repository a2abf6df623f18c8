"""What the site has beside the theme: terms explained where they are, formulas as MathML, search in Chinese."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import jieba
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.search.zh import SearchChinese
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxTranslator

LANGUAGE = os.environ.get("SITE_LANGUAGE", "en")
CHINESE = LANGUAGE == "zh"
WORDS = {
    "en": {"other": "中文", "notebook": "Notebook", "pdf": "PDF", "links": "Language and downloads"},
    "zh": {"other": "English", "notebook": "Notebook", "pdf": "PDF", "links": "语言与下载"},
}[LANGUAGE]
#: In these a term is left as it is.
QUIET = (nodes.title, nodes.literal, nodes.literal_block, nodes.reference, nodes.raw, nodes.math, nodes.math_block)
#: Terms of one Chinese character that are looked for all the same; the others are in too many words.
SINGLE = ("秩",)
#: Longer words and phrases in which a term's name means something else.
OTHER_MEANINGS = {
    "en": (
        "Views on rank",
        "a step is the distance",
        "asks for its token",
        "half a step",
        "keep the token",
        "keeps its token",
        "key, token",
        "keys and tokens",
        "larger steps",
        "password or token",
        "places, ranks",
        "sets the step",
        "the steps, in this order",
        "to herself, a rank",
        "with its token",
    ),
    "zh": (
        "低秩",
        "分片送",
        "加上标签",
        "各部分合并",
        "里留出",
        "密码或 token",
        "密钥、token",
        "带 token 的地址",
        "标签页",
        "每个标签后",
        "被截断",
        "验证 token",
    ),
}[LANGUAGE]
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
    """A row of the glossary: its English and Chinese names as they stand there, and its meaning."""

    english: str
    chinese: str
    meaning: str

    @property
    def shown(self) -> str:
        """Its first cell on the glossary's page."""
        return self.chinese if CHINESE else self.english

    @property
    def names(self) -> list[str]:
        """What a text calls it; a Chinese name of one character only where it is in `SINGLE`."""
        if not CHINESE:
            return [self.english]
        return [name for name in self.chinese.split("、") if len(name) > 1 or name in SINGLE]

    @property
    def anchor(self) -> str:
        """Its place on the glossary's page."""
        return "term-" + re.sub(r"\W+", "-", self.english.lower())

    @property
    def tip(self) -> str:
        """What is shown beside the term: its name in the other language, and what it means."""
        meaning = re.sub(r"`([^`]*)`", r"\1", self.meaning).replace(r"\|", "|")
        return f"{self.english}：{meaning}" if CHINESE else f"{self.chinese}: {meaning}"


def terms(text: str) -> list[Term]:
    """The rows of the glossary's tables; the Chinese one has the Chinese name first."""
    rows = (re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in text.splitlines() if line.startswith("|"))
    cells = ([cell.strip() for cell in row] for row in rows if len(row) == 5)
    names = [row[:3] for row in cells if row[0] not in ("term", "术语") and set(row[0]) - set("-: ")]
    return [Term(*((own, other) if not CHINESE else (other, own)), meaning) for own, other, meaning in names]


@cache
def glossary(folder: str) -> list[Term]:
    """The terms in the glossary's order."""
    return terms((Path(folder) / "glossary.md").read_text(encoding="utf-8"))


def in_text(name: str) -> str:
    """The pattern of a name in a text: Chinese has no spaces between words; elsewhere it is a word by itself."""
    if not name.isascii():
        return re.escape(name)
    stem = re.escape(name).replace(r"\-", "[- ]").replace(r"\ ", r"[- \n]")
    case = "i:" if name.islower() else ":"
    return rf"(?<![\w./-])(?{case}{stem}){'' if CHINESE else 's?'}(?![\w/-]|\.\w)"


@cache
def finder(folder: str) -> tuple[re.Pattern[str], list[Term | None]]:
    """The pattern of all names, the longest first, and the term of each of its groups.

    A longer name, or one of `OTHER_MEANINGS`, takes its characters away from the names in it, wherever it occurs.
    """
    known = [(name, term) for term in glossary(folder) for name in term.names]
    known += [(name, None) for name in OTHER_MEANINGS]
    known.sort(key=lambda one: -len(one[0]))
    pattern = "|".join(f"({in_text(name) if term else re.escape(name)})" for name, term in known)
    return re.compile(pattern), [term for _, term in known]


def name_the_rows(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give each row of the glossary an anchor."""
    if docname == "glossary":
        for term in terms(source[0]):
            named = f'\n| <span id="{term.anchor}"></span>{term.shown} |'
            source[0] = source[0].replace(f"\n| {term.shown} |", named)


def explain_terms(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """Make the first use of each term on a page a link to the glossary that carries the meaning."""
    if docname == "glossary":
        return
    address = app.builder.get_relative_uri(docname, "glossary")
    pattern, owners = finder(str(app.srcdir))
    seen: set[Term | None] = {None}
    for text in [text for text in tree.findall(nodes.Text) if not is_quiet(text)]:
        first = []
        for match in pattern.finditer(str(text)):
            if (term := owners[match.lastindex - 1]) not in seen:
                seen.add(term)
                first.append((match, term))
        if first:
            text.parent.replace(text, list(linked(str(text), first, address)))


def linked(text: str, first: list[tuple[re.Match[str], Term]], address: str) -> Iterator[nodes.Node]:
    """A text with links in the place of the terms that were found in it."""
    end = 0
    for match, term in first:
        tip = html.escape(term.tip)
        link = f'<a class="course-term" href="{address}#{term.anchor}" title="{tip}">{html.escape(match[0])}</a>'
        yield nodes.Text(text[end : match.start()])
        yield nodes.raw("", link, format="html")
        end = match.end()
    yield nodes.Text(text[end:])


class TwoThemes(SphinxTransform):
    """A picture that follows light and dark becomes two, of which the theme shows the one that its switch asks for.

    `tools/website.py` puts the two beside it.
    """

    default_priority = 100

    def apply(self, **kwargs: object) -> None:
        """Put both in the place of each such picture."""
        here = Path(self.env.srcdir, self.env.docname).parent
        for picture in list(self.document.findall(nodes.image)):
            both = [(theme, re.sub(r"\.svg$", f".{theme}.svg", picture["uri"])) for theme in ("light", "dark")]
            if all(uri != picture["uri"] and (here / unquote(uri)).is_file() for _, uri in both):
                picture.parent.replace(picture, [self.of_theme(picture, theme, uri) for theme, uri in both])

    @staticmethod
    def of_theme(picture: nodes.image, theme: str, uri: str) -> nodes.image:
        """The picture of one theme."""
        own = picture.deepcopy()
        own["uri"] = uri
        own["classes"] = [*picture["classes"], f"only-{theme}"]
        return own


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
            for name in term.chinese.split("、"):
                if not name.isascii():
                    jieba.add_word(name)

    def word_filter(self, word: str) -> bool:
        """Which words the index takes."""
        return len(word) > 1 or bool(re.fullmatch("[\u3400-\u9fff]", word))


def setup(app: Sphinx) -> dict[str, bool]:
    """Join Sphinx."""
    app.add_transform(TwoThemes)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    if CHINESE:
        app.add_search_language(CourseChinese)
        app.config.html_search_options = {"folder": str(app.srcdir)}
    app.connect("source-read", name_the_rows)
    app.connect("doctree-resolved", explain_terms)
    app.connect("doctree-resolved", mark_english, priority=600)
    app.connect("html-page-context", page_context)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
