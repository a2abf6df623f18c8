"""The course as a web site in English and Chinese, from the outputs stored in the notebooks (`make site`).

`python tools/website.py [--pdf] [--repository ADDRESS] [--to FOLDER]` gathers the pages of each language in a temporary
folder, rewrites the links between files of the repository to links between pages, and has Sphinx make `FOLDER/en` and
`FOLDER/zh`. Nothing is executed and nothing is asked of the network. `docs/site/` holds Sphinx's settings.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "docs" / "site"
LANGUAGES = ("en", "zh")
#: Pages that are no notebooks: the name in the site to the English source; a Chinese one lies beside it.
PAGES = {
    "index": "README.md",
    "glossary": "docs/glossary.md",
    "troubleshooting": "docs/troubleshooting.md",
    "model_card": "models/README.md",
    "datasheet": "dataset/README.md",
    "front_ends": "docs/front_ends.md",
    "other_tools": "docs/other_tools.md",
    "benchmarks": "benchmarks/README.md",
    "guide": "workshop/README.md",
    "deployment": "deploy/README.md",
    "recipe": "models/recipe/README.md",
    "judged": "models/recipe/judged/README.md",
    "pictures": "images/README.md",
    "faults": "tests/faults/README.md",
    "maintenance": "tools/README.md",
    "contributing": "CONTRIBUTING.md",
    "changes": "CHANGELOG.md",
}
#: The parts of the navigation: a title in each language, and the pages with the Chinese titles of those in English.
PARTS = (
    ("Notebooks", "Notebook", {}),
    (
        "To look things up",
        "查阅",
        {
            "glossary": "",
            "troubleshooting": "",
            "model_card": "",
            "datasheet": "",
            "front_ends": "",
            "other_tools": "",
            "benchmarks": "全尺寸训练的测速",
        },
    ),
    (
        "To teach and to maintain",
        "教学与维护",
        {
            "guide": "",
            "deployment": "",
            "recipe": "自带模型的训练方法",
            "judged": "",
            "pictures": "图片",
            "faults": "故障测试",
            "maintenance": "维护命令",
            "contributing": "参与",
            "changes": "版本变化",
        },
    ),
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+(?:\([^()]*\)[^()\s]*)*)\)")
CODE = re.compile(r"^ *(```+|~~~+).*?^ *\1[^\n]*$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE)
#: A line that leads to the same page in the other language; the site has a switch for that.
SWITCH = re.compile(r"^\[(?:中文|English)\]\([^)]+\)\n*", re.MULTILINE)
#: The line of a notebook's header that leads to the notebooks before and after it.
NEIGHBOURS = re.compile(r"^(?:←|\[全部|\[all )[^\n]*\.\./README[^\n]*$", re.MULTILINE)
#: A place that JupyterLab needs to jump to a Chinese title (headers.py); the site has its own.
PLACE = re.compile(r'^<div id="[^"\n]*"></div>\n\n(?=## )', re.MULTILINE)
#: Files above this are not copied into the site.
LARGEST = 2 * 2**20
#: In the place of a widget, which needs a kernel.
INTERACTIVE = {
    "en": "Run the notebook to use the interactive control of this cell.",
    "zh": "这个单元格的交互控件要运行 notebook 才能用。",
}
IN_ENGLISH = "这一页的正文是英文。"
#: Behind a link that leads from a Chinese page to one of those.
ENGLISH_ONLY = "（英文）"
#: How an SVG says its colours for the dark theme.
DARK = re.compile(r"@media \(prefers-color-scheme: dark\)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


class BrokenLinkError(ValueError):
    """A link or a picture of a page that leads nowhere."""


def slug(title: str) -> str:
    """The anchor of a heading: as GitHub makes it, and the same for what JupyterLab links to (`1-Will-it-fit?`)."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def sources(root: Path, language: str) -> dict[str, str]:
    """Of each page of a language: its name in the site to its file in the repository."""
    found = {f"notebooks/{path.stem}": f"notebooks/{language}/{path.name}" for path in notebooks(root, language)}
    for name, english in PAGES.items():
        if not (root / english).is_file():
            continue
        own = english.replace(".md", ".zh-CN.md")
        found[name] = own if language == "zh" and (root / own).is_file() else english
    return found


def is_english(source: str) -> bool:
    """Whether the text of a page is English; a notebook lies in the folder of its language."""
    return "zh-CN" not in source and not source.startswith("notebooks/zh/")


def notebooks(root: Path, language: str) -> list[Path]:
    """The notebooks of a language in their order."""
    return sorted((root / "notebooks" / language).glob("*.ipynb"))


@dataclass
class Links:
    """The links of one language: which page a file of the repository is, and which files the pages need beside them.

    Attributes:
        repository: an address below which the repository's files can be read, or nothing.
        files: files to copy into the site, by their path in the repository.
    """

    root: Path
    language: str
    repository: str = ""
    files: set[str] = field(default_factory=set)
    pages: dict[str, str] = field(init=False)
    in_english: set[str] = field(init=False)

    def __post_init__(self) -> None:
        every = [sources(self.root, language) for language in (*LANGUAGES, self.language)]
        self.pages = {source: name for known in every for name, source in known.items()}
        self.in_english = set(filter(is_english, every[-1].values()))

    def rewrite(self, text: str, source: str) -> str:
        """Markdown of a page with its links made links of the site; code is left as it is.

        Raises:
            BrokenLinkError: a link to a file that does not exist, or a picture that nothing describes.
        """
        kept: list[str] = []

        def keep(match: re.Match[str]) -> str:
            kept.append(match[0])
            return f"\0{len(kept) - 1}\0"

        text = CODE.sub(keep, SWITCH.sub("", text))
        text = LINK.sub(lambda match: self._link(match, source), text)
        return re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], text)

    def _link(self, match: re.Match[str], source: str) -> str:
        picture, text, target = match.groups()
        if picture and not text.strip():
            raise BrokenLinkError(f"{source}: no alt text for {target}")
        new = self.target(target, source)
        if not new:
            return text
        return f"{picture}[{text}]({new}){ENGLISH_ONLY if self._leads_to_english(target, source) else ''}"

    def _leads_to_english(self, target: str, source: str) -> bool:
        """Whether a link of a Chinese page leads to a page that the Chinese site has in English."""
        path = self._path(target.partition("#")[0], source)
        return self.language == "zh" and not is_english(source) and path in self.in_english

    def target(self, target: str, source: str) -> str:
        """Where a link of a page leads in the site, or nothing if it can only be text.

        Raises:
            BrokenLinkError: the file does not exist.
        """
        if urlsplit(target).scheme:
            return target
        file, _, anchor = target.partition("#")
        path = self._path(file, source)
        end = f"#{slug(unquote(anchor))}" if anchor else ""
        if path in self.pages:
            own = self.pages[path] == self.pages[source]
            return end if own and end else self._relative(self._file(path), source) + end
        there = self.root / path
        if path.startswith("..") or not there.exists():
            raise BrokenLinkError(f"{source}: {target} does not exist")
        if there.is_file() and there.stat().st_size <= LARGEST and there.suffix not in (".md", ".ipynb"):
            self.files.add(path)
            return self._relative(f"files/{path}", source)
        return f"{self.repository.rstrip('/')}/{path}{end}" if self.repository else ""

    def _path(self, file: str, source: str) -> str:
        return os.path.normpath(PurePosixPath(source).parent / unquote(file)) if file else source

    def _file(self, path: str) -> str:
        return self.pages[path] + PurePosixPath(path).suffix

    def _relative(self, file: str, source: str) -> str:
        return os.path.relpath(file, PurePosixPath(self.pages[source]).parent).replace(os.sep, "/")


# ---------------------------------------------------------------------------------------------------- one page


def page(text: str, source: str, links: Links) -> str:
    """A page that is no notebook, with the navigation if it is the first one."""
    text = links.rewrite(text, source)
    if links.language == "zh" and is_english(source):
        head, _, rest = text.partition("\n")
        text = f"{head}\n\n:::{{note}}\n{IN_ENGLISH}\n:::\n{rest}"
    if links.pages[source] == "index":
        text += "\n" + "\n".join(navigation(links.root, links.language))
    return text


def navigation(root: Path, language: str) -> Iterator[str]:
    """The lists of pages that Sphinx makes the navigation of."""
    for number, (english, chinese, pages) in enumerate(PARTS):
        yield f"```{{toctree}}\n:hidden:\n:caption: {english if language == 'en' else chinese}\n"
        names = pages if number else {f"notebooks/{path.stem}": "" for path in notebooks(root, language)}
        known = sources(root, language)
        for name, title in ((name, title) for name, title in names.items() if name in known):
            marked = f"{title}{ENGLISH_ONLY}" if is_english(known[name]) else title
            yield f"{marked} <{name}>" if title and language == "zh" else name
        yield "```\n"


def notebook(content: dict, source: str, links: Links) -> dict:
    """A notebook as the site shows it: no links to its neighbours (the theme has them), no dead widgets."""
    cells = []
    for cell in content["cells"]:
        if "footer" in cell["metadata"].get("tags", []):
            continue
        if cell["cell_type"] == "markdown":
            cell = {**cell, "source": links.rewrite(PLACE.sub("", NEIGHBOURS.sub("", "".join(cell["source"]))), source)}
        elif cell["cell_type"] == "code":
            cell = {**cell, "outputs": list(outputs(cell["outputs"], links.language))}
        cells.append(cell)
    return {**content, "cells": cells}


def outputs(stored: list[dict], language: str) -> Iterator[dict]:
    """What a cell has left, as a page without a kernel can show it: a note for a widget, no progress bars."""
    for output in stored:
        data = output.get("data", {})
        if "application/vnd.jupyter.widget-view+json" in data:
            if not re.search(r"\d+%\||\[\d\d:\d\d[,<]", "".join(data["text/plain"])):  # the rest are progress bars
                note = f'<p class="course-interactive">{INTERACTIVE[language]}</p>'
                yield {**output, "data": {"text/html": note}}
            continue
        if "text/html" in data:
            html = re.sub(r"<progress[^>]*>\s*</progress>", "", "".join(data["text/html"]))
            output = {**output, "data": {**data, "text/html": html}}
        yield output


# ---------------------------------------------------------------------------------------------------- the site


def gather(root: Path, language: str, folder: Path, repository: str = "") -> None:
    """Lay out a language's pages, and the files that they show or offer, as Sphinx reads them."""
    links = Links(root, language, repository)
    for name, source in sources(root, language).items():
        path = folder / f"{name}{Path(source).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (root / source).read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            download = folder / "extra" / "notebooks" / path.name
            download.parent.mkdir(parents=True, exist_ok=True)
            download.write_text(text, encoding="utf-8")
            text = json.dumps(notebook(json.loads(text), source, links), ensure_ascii=False)
        else:
            text = page(text, source, links)
        path.write_text(text, encoding="utf-8")
    for file in links.files:
        path = folder / "files" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / file, path)
        for theme, text in themes(path).items():
            path.with_suffix(f".{theme}.svg").write_text(text, encoding="utf-8")


def themes(picture: Path) -> dict[str, str]:
    """Of an SVG that follows the system's light or dark: one for each, so that the site's switch can choose."""
    text = picture.read_text(encoding="utf-8") if picture.suffix == ".svg" else ""
    if not DARK.search(text):
        return {}
    return {"light": DARK.sub("", text), "dark": DARK.sub(lambda match: match[1].strip(), text)}


def sphinx(folder: Path, target: Path, language: str, pdf: bool) -> tuple[int, str]:
    """Have Sphinx make the pages of a folder; returns its exit code and what it said. A warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", str(SETTINGS)]
    command += ["-D", f"html_extra_path={folder / 'extra'}"]
    command += ["-d", str(folder.with_name(f"{folder.name}-doctrees")), str(folder), str(target)]
    environment = {**os.environ, "SITE_LANGUAGE": language, "SITE_PDF": "1" if pdf else "", "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def print_pdf(browser: str, html: Path) -> str:
    """Print a page to the PDF beside it; returns what went wrong, or nothing."""
    pdf = html.with_suffix(".pdf")
    with tempfile.TemporaryDirectory(prefix="course-print-") as profile:
        command = [browser, "--headless", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={profile}"]
        command += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        command += ["--virtual-time-budget=10000", f"--print-to-pdf={pdf}", html.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return f"{html.name}: the browser did not end within 120 s"
    return "" if pdf.is_file() else f"{html.name}: {done.stderr[-500:]}"


def leave_out(site: Path) -> None:
    """Delete what Sphinx and the theme write and no page leads to."""
    for pattern in ("jupyter_execute", "*/_sources", "*/_static/*-macros.html", "*/.buildinfo"):
        for path in site.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def build(target: Path, repository: str, browser: str) -> list[str]:
    """Make the site in both languages, with a PDF of each page if a browser is given.

    Returns:
        What went wrong; the folder is changed only if nothing did.
    """
    with tempfile.TemporaryDirectory(prefix="course-site-") as temporary:
        work = Path(temporary)
        new = work / "site"
        for language in LANGUAGES:
            gather(ROOT, language, work / language, repository)
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(lambda one: sphinx(work / one, new / one, one, bool(browser)), LANGUAGES)
            troubles = [said for code, said in made if code]
            if troubles:
                return troubles
            if browser:
                pages = [new / one / f"{name}.html" for one in LANGUAGES for name in sources(ROOT, one)]
                troubles = [trouble for trouble in pool.map(lambda html: print_pdf(browser, html), pages) if trouble]
        leave_out(new)
        shutil.copy2(SETTINGS / "choose.html", new / "index.html")
        (new / ".nojekyll").touch()  # GitHub Pages would leave out the folders whose names begin with _
        if not troubles:
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(new, target)
    return troubles


def main() -> None:
    """Make the site and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pdf", action="store_true", help="a PDF of each page too, printed by Chromium")
    parser.add_argument("--repository", default=os.environ.get("SITE_REPOSITORY", ""), help="address of its files")
    parser.add_argument("--to", type=Path, default=ROOT / "output" / "site")
    options = parser.parse_args()
    browser = shutil.which(os.environ.get("CHROMIUM", "chromium")) if options.pdf else ""
    if browser is None:
        sys.exit("No Chromium for the PDFs: name one with CHROMIUM=path, or leave out --pdf.")
    start = time.monotonic()
    if troubles := build(options.to.resolve(), options.repository, browser):
        sys.exit("\n".join(troubles))
    count = len(list(options.to.rglob("*.html")))
    print(f"{count} pages in {options.to} ({time.monotonic() - start:.0f} s). Open index.html, or serve the folder.")


if __name__ == "__main__":
    main()
