"""What `tools/website.py` makes of links, widgets and languages, before Sphinx sees a page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
import test_pins
import website
from conftest import ROOT


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A small repository: two notebooks in two languages, a page in both and one in English, a script, a picture."""
    files = {
        "README.md": "# A\n\n[中文](README.zh-CN.md)\n\nText.\n",
        "README.zh-CN.md": "# 甲\n\n[English](README.md)\n\n文字。\n",
        "docs/glossary.md": "# Glossary\n\n| term | 中文 |\n|---|---|\n",
        "benchmarks/README.md": "# Fast\n",
        "docs/troubleshooting.md": "# T\n",
        "docs/troubleshooting.zh-CN.md": "# 乙\n",
        "deploy/install.sh": "true",
        "images/path.svg": "<svg/>",
        **{
            f"notebooks/{language}/{name}.ipynb": '{"cells": []}'
            for language in ("en", "zh")
            for name in ("01_a", "02_b")
        },
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


LINKS = [
    ("README.md", "[one](notebooks/en/01_a.ipynb)", "[one](notebooks/01_a.ipynb)"),
    ("docs/glossary.md", "[01](../notebooks/en/01_a.ipynb)", "[01](notebooks/01_a.ipynb)"),
    ("notebooks/en/01_a.ipynb", "[next](02_b.ipynb#1-Will-it-fit?)", "[next](02_b.ipynb#1-will-it-fit)"),
    ("notebooks/en/01_a.ipynb", "[6 `LoraConfig`](#6-LoraConfig)", "[6 `LoraConfig`](#6-loraconfig)"),
    ("notebooks/en/01_a.ipynb", "[all](../../README.md)", "[all](../index.md)"),
    ("notebooks/en/01_a.ipynb", "![a path](../../images/path.svg)", "![a path](../files/images/path.svg)"),
    ("README.md", "[the script](deploy/install.sh)", "[the script](files/deploy/install.sh)"),
    ("README.md", "see [`deploy/`](deploy)", "see `deploy/`"),
    ("README.md", "[paper](https://arxiv.org/abs/2305.14314)", "[paper](https://arxiv.org/abs/2305.14314)"),
    ("README.md", "`[x](nowhere.md)` and ``[y](`nowhere`)``", "`[x](nowhere.md)` and ``[y](`nowhere`)``"),
    ("README.md", "```\n[x](nowhere.md)\n```", "```\n[x](nowhere.md)\n```"),
    ("README.md", "[in Chinese](README.zh-CN.md)", "[in Chinese](index.md)"),
]


@pytest.mark.parametrize(("source", "before", "after"), LINKS)
def test_a_link_between_files_becomes_a_link_between_pages(course, source, before, after):
    links = website.Links(course, "en")
    assert links.rewrite(before, source) in (after, after.replace("index.md", "index.zh-CN.md"))


def test_a_page_in_one_language_leads_to_notebooks_of_the_language_that_is_read(course):
    links = website.Links(course, "zh")
    assert links.rewrite("[01](../notebooks/en/01_a.ipynb)", "docs/glossary.md") == "[01](notebooks/01_a.ipynb)"
    assert links.rewrite("[乙](troubleshooting.zh-CN.md#没有消息，结果却不对)", "docs/glossary.md") == (
        "[乙](troubleshooting.md#没有消息结果却不对)"
    )


@pytest.mark.parametrize("text", ["[x](nowhere.md)", "![x](../outside.png)", "![](images/path.svg)"])
def test_a_link_to_nothing_and_a_picture_without_words_stop_the_build(course, text):
    with pytest.raises(website.BrokenLinkError):
        website.Links(course, "en").rewrite(text, "README.md")


def test_a_folder_is_a_link_where_the_repository_has_an_address(course):
    links = website.Links(course, "en", repository="https://example.org/tree/")
    assert links.rewrite("[deploy](deploy)", "README.md") == "[deploy](https://example.org/tree/deploy)"
    assert links.files == set()


@pytest.mark.parametrize(
    ("title", "anchor"),
    [
        ("1 Will it fit?", "1-will-it-fit"),
        ("1-Will-it-fit?", "1-will-it-fit"),
        ("6 `LoraConfig`", "6-loraconfig"),
        ("3 CPU 核、内存、磁盘", "3-cpu-核内存磁盘"),
    ],
)
def test_the_anchor_of_a_heading(title, anchor):
    assert website.slug(title) == anchor


def test_the_line_to_the_other_language_goes_and_an_english_page_says_so_in_chinese(course):
    english = website.page((course / "README.md").read_text(encoding="utf-8"), "README.md", website.Links(course, "en"))
    assert "中文" not in english and "notebooks/01_a\nnotebooks/02_b" in english
    links = website.Links(course, "zh")
    assert "这一页的正文是英文" in website.page("# Glossary\n\nText.", "docs/glossary.md", links)
    assert "这一页的正文是英文" not in website.page("# 乙\n", "docs/troubleshooting.zh-CN.md", links)


def test_a_chinese_page_says_which_links_and_parts_of_the_navigation_lead_to_english(course):
    links = website.Links(course, "zh")
    assert links.rewrite("见[测速](benchmarks/README.md)。", "README.zh-CN.md") == "见[测速](benchmarks.md)（英文）。"
    assert links.rewrite("[测速](../../benchmarks/README.md#a)", "notebooks/zh/01_a.ipynb").endswith("#a)（英文）")
    assert links.rewrite("[乙](docs/troubleshooting.zh-CN.md)", "README.zh-CN.md") == "[乙](troubleshooting.md)"
    assert links.rewrite("[02](notebooks/zh/02_b.ipynb)", "README.zh-CN.md") == "[02](notebooks/02_b.ipynb)"
    assert links.rewrite("[speed](../benchmarks/README.md)", "docs/glossary.md") == "[speed](benchmarks.md)"
    chinese, english = ("\n".join(website.navigation(course, language)) for language in ("zh", "en"))
    assert "全尺寸训练的测速（英文） <benchmarks>" in chinese and "\ntroubleshooting\n" in chinese
    assert "（英文）" not in english and website.ENGLISH_ONLY not in website.Links(course, "en").rewrite(
        "[speed](benchmarks/README.md)", "README.md"
    )


def test_what_jupyterlab_needs_to_jump_to_a_chinese_title_is_left_out(course):
    source = '<div id="1-%E4%B8%80"></div>\n\n## 1 一\n\n<div id="own"></div>\n\ntext'
    cells = [{"cell_type": "markdown", "metadata": {}, "source": source}]
    shown = website.notebook({"cells": cells}, "notebooks/zh/01_a.ipynb", website.Links(course, "zh"))["cells"]
    assert shown[0]["source"] == '## 1 一\n\n<div id="own"></div>\n\ntext'


STYLED = """<svg><style>
  .box { fill: white; }
  @media (prefers-color-scheme: dark) {
    .box { fill: black; }
    text { fill: #eee; }
  }
  @media print { .box { fill: none; } }
</style><text>a { b }</text></svg>"""


def test_a_picture_for_both_themes_becomes_one_for_each(course, tmp_path):
    (course / "images" / "path.svg").write_text(STYLED, encoding="utf-8")
    (course / "README.md").write_text("# A\n\n![a path](images/path.svg)\n", encoding="utf-8")
    website.gather(course, "en", tmp_path / "pages")
    images = tmp_path / "pages" / "files" / "images"
    both, light, dark = ((images / f"path{name}.svg").read_text() for name in ("", ".light", ".dark"))
    assert both == STYLED
    assert "black" not in light and "prefers" not in light + dark and dark.index("white") < dark.index("black")
    for one in (light, dark):
        assert one.count("{") == one.count("}") and "@media print { .box" in one and "<text>a { b }</text>" in one


@pytest.mark.parametrize("picture", sorted((ROOT / "images").rglob("*.svg")), ids=lambda one: one.name)
def test_every_drawn_picture_has_both_themes(picture):
    light, dark = website.themes(picture).values()
    assert "prefers-color-scheme" not in light + dark and light != dark
    xml.etree.ElementTree.fromstring(light), xml.etree.ElementTree.fromstring(dark)


def test_a_widget_becomes_a_note_and_a_finished_bar_goes():
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "interactive(children=(IntSlider(…"}
    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Downloading:   0%|          | 0/6"}
    steps = {"text/html": "<div><progress value='4' max='4'></progress> steps: 4 of 4</div>", "text/plain": "x"}
    stored = [{"output_type": "display_data", "data": data, "metadata": {}} for data in (widget, bar, steps)]
    shown = list(website.outputs([*stored, {"output_type": "stream", "text": "hello"}], "zh"))
    assert [list(output.get("data", {})) for output in shown] == [["text/html"], ["text/html", "text/plain"], []]
    assert "控件" in shown[0]["data"]["text/html"]
    assert shown[1]["data"]["text/html"] == "<div> steps: 4 of 4</div>"


@pytest.mark.parametrize("language", website.LANGUAGES)
def test_every_page_of_the_course_can_be_gathered(tmp_path, language):
    website.gather(ROOT, language, tmp_path)
    for name, source in website.sources(ROOT, language).items():
        assert (tmp_path / f"{name}{Path(source).suffix}").is_file()
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not re.search(r"\.\./README|^←", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)


def test_the_sites_packages_change_none_that_the_notebooks_use():
    used = test_pins.locked("requirements.lock") | test_pins.pinned("requirements.txt")
    assert not test_pins.pinned("docs/site/requirements.txt").keys() & used.keys()
