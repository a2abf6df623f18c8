"""The pictures of the Chinese series: made from the English ones and the table, with no English left in them."""

import re
from collections import Counter

import pictures
import pytest
from conftest import ROOT
from test_pictures import SVG, classes, groups, root, texts

NAMES = [path.name for path in sorted(pictures.IMAGES.glob("*.svg"))]
#: The words that the Chinese prose of the course writes in Latin letters: names, terms, code.
LATIN = {
    *("LoRA", "token", "nat", "notebook", "SwanLab", "MLP", "hub", "id"),  # terms and names
    *("W", "A", "B", "M", "r", "gate", "up", "down"),  # of a formula, of the model's code
    *("user", "think", "nothink"),  # special tokens
    *("COURSE_MODEL", "ZhipuAI", "GLM", "Air", "models", "glm4", "moe", "mini"),
    *("rows", "tokens", "lora", "output", "adapter", "train", "new_wordings", "new_answers", "report", "json"),
}


def shapes(svg):
    """Everything that is drawn but the text, and the style, in order."""
    drawn = [(one.tag, one.attrib) for one in svg.iter() if one.tag.removeprefix(SVG) in ("rect", "path", "marker")]
    return [*drawn, svg.get("viewBox"), svg.find(f"{SVG}style").text]


def numbers(svg):
    return Counter(re.findall(r"-?\d[\d,.]*\d|\d", " ".join(texts(svg))))


def test_the_files_are_those_that_the_tool_makes():
    there = {path.name: path.read_text(encoding="utf-8") for path in pictures.CHINESE.glob("*.svg")}
    assert there == pictures.pictures(), "run python tools/pictures.py"


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_numbers_are_those_of_the_english_picture(name):
    english, chinese = root(name), root(f"zh/{name}")
    assert shapes(english) == shapes(chinese)
    assert numbers(english) == numbers(chinese)


@pytest.mark.parametrize("name", NAMES)
def test_no_english_is_left(name):
    svg, english = root(f"zh/{name}"), set(texts(root(name)))
    assert svg.get("lang") == "zh-CN"
    same = set(pictures.tables()["same"])
    told = [svg.find(f"{SVG}title").text, svg.find(f"{SVG}desc").text]
    for text in [*told, *(text for text in texts(svg) if text not in same)]:
        words = re.findall(r"[A-Za-z][A-Za-z_]*\d?", text)
        assert not words or re.search("[一-鿿]", text), f"in English: {text}"
        assert text not in english or not words, f"as in English: {text}"


@pytest.mark.parametrize("name", NAMES)
def test_latin_words_between_the_chinese_are_names_and_code(name):
    same = set(pictures.tables()["same"])
    words = {
        word for text in texts(root(f"zh/{name}")) if text not in same for word in re.findall(r"[A-Za-z_\d]+", text)
    }
    assert {word for word in words if re.search("[A-Za-z]", word)} <= LATIN


def test_what_stays_as_it_is_is_a_name_code_or_dialogue():
    prose = re.compile(r"[A-Za-z]{2,} [A-Za-z]{2,}")
    assert [text for text in pictures.tables()["same"] if prose.search(text)] == []


def test_the_figures_stand_in_the_chinese_readme():
    rows = {
        cells[0]: cells[1:]
        for line in (ROOT / "README.zh-CN.md").read_text(encoding="utf-8").splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5
    }
    figures = groups(root("zh/before_after.svg"), "figure")
    assert len(figures) == 4
    for figure in figures:
        assert rows[texts(figure, "name")[0]] == texts(figure, "value")
    answers = [
        text.text for text in root("zh/before_after.svg").iter(f"{SVG}text") if {"base", "adapter"} & {*classes(text)}
    ]
    said = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    assert len(answers) == 4
    assert all(f"| {answer} |" in said for answer in answers)


# ------------------------------------------------------------------------------------------------- the tool

PICTURE = '<svg role="img"><title id="title">A</title><desc id="desc">B</desc>\n<text y="10">one row</text>\n</svg>'
TOLD = {"title": "甲", "desc": "乙"}


@pytest.mark.parametrize(
    ("texts_", "fault"), [({}, "no Chinese for"), ({"one row": "一", "gone": "二"}, "no such line")]
)
def test_a_line_without_its_partner_is_said(texts_, fault):
    with pytest.raises(ValueError, match=fault):
        pictures.translated(PICTURE, {**TOLD, "texts": texts_}, set())


def test_a_line_is_exchanged_lowered_or_left_out():
    made = pictures.translated(PICTURE, {**TOLD, "texts": {"one row": ["<一>", 2.5]}}, set())
    assert '<text y="12.5">&lt;一&gt;</text>' in made
    assert '<title id="title">甲</title><desc id="desc">乙</desc>' in made
    assert "<text" not in pictures.translated(PICTURE, {**TOLD, "texts": {"one row": ""}}, set())
