"""The two languages: every text has its Chinese, every pair of texts was marked as matching, every drift is named."""

import ast
import copy
import io
import json
import os
import re
import string
import subprocess

import headers
import languages
import nbformat
import pytest
import run_nbval
import translations
from conftest import ROOT

import utils
from course import language, plots

#: The Chinese of what the code says, by the English; and all English texts that Babel finds in the code.
CATALOGUE = translations.read()
FOUND = translations.template()
WORDS = {message.id: message.string for message in CATALOGUE if message.id}
GLOSSES = json.loads((languages.EN / "glosses.json").read_text(encoding="utf-8"))
SOURCES = [ROOT / name for name in (*languages.HELPERS, "tools/headers.py")]
#: English in both languages: notebook 08 and the bar of `widgets.watched` read these lines.
READ_BY_CODE = {"resuming from", "nothing: a new run", "step ", "finetune: "}
SAYS = {"say", "say_in", "glossed"}


def called(node):
    """The last name of what a call calls."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def unfound(source):
    """Calls whose text Babel does not find: it is no literal, or is in an f-string or in a call within a call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and called(node) in translations.KEYWORDS.keys() - {"translated"}:
            text = node.args[translations.KEYWORDS[called(node)][0] - 1]
            if not (isinstance(text, ast.Constant) and text.value in FOUND):
                yield ast.unparse(node)


def unsaid(source):
    """Words that reach a learner past `say`: in a message, a printed line, a picture, a widget."""
    words = {"xlabel", "ylabel", "title", "description", "tooltip"}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        todo = [keyword.value for keyword in node.keywords if keyword.arg in words and called(node) != "ArgumentParser"]
        if called(node) in ("print", "CourseError", "picture"):
            todo += node.args
        while todo:
            one = todo.pop()
            if isinstance(one, ast.Subscript) or (isinstance(one, ast.Call) and called(one) in SAYS):
                continue
            if isinstance(one, ast.Constant) and isinstance(one.value, str) and any(map(str.isalpha, one.value)):
                yield one.value
            todo += [child for child in ast.iter_child_nodes(one) if not isinstance(child, ast.keyword)]


def cells(folder=languages.EN):
    for path in sorted(folder.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            yield path.stem, cell


def holes(template):
    return sorted(str(part[1:]) for part in string.Formatter().parse(template) if part[1] is not None)


# ------------------------------------------------------------------------------------------- what helpers say


def test_every_text_of_the_code_has_its_chinese_and_no_chinese_is_left_over():
    texts = {message.id for message in FOUND if message.id}
    assert texts - set(WORDS) == set(), "run `make translations`, and translate what is new"
    assert set(WORDS) - texts == set() and not CATALOGUE.obsolete, (
        "nothing says these: run `make translations`, then delete"
    )
    assert [message.id for message in CATALOGUE if message.fuzzy] == [], "English that changed: look at its Chinese"
    for english, chinese in WORDS.items():
        signs_alone = not re.search("[a-z]", re.sub(r"\{\w+\}", "", english))
        assert language.CHINESE.search(chinese) or signs_alone, english
        assert "！" not in chinese


def test_the_holes_of_a_text_are_in_its_chinese():
    for message in CATALOGUE:
        if any(not place.endswith(".ipynb") for place, _ in message.locations):
            assert holes(message.id) == holes(message.string), message.id


def test_the_compiled_catalogue_is_that_of_the_texts():
    compiled = translations.PO.with_suffix(".mo").read_bytes()
    assert compiled == translations.compiled(CATALOGUE), "run `make translations`"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_babel_finds_the_text_of_every_call(path):
    assert list(unfound(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "call", ["say(message)", 'say("new")', 'say("a " + kind)', "marked(name)", "say_in('zh', text)"]
)
def test_a_text_that_babel_does_not_find_is_named(call):
    assert list(unfound(f"print({call})")) == [ast.unparse(ast.parse(call))]


def test_update_marks_a_changed_text_and_a_lost_one(monkeypatch, tmp_path, capsys):
    before = translations.PO.read_text(encoding="utf-8")
    changed = before.replace('msgid "✓ right"', 'msgid "✓ right."') + '\nmsgid "What was said once"\nmsgstr "从前"\n'
    monkeypatch.setattr(translations, "PO", tmp_path / "course.po")
    translations.PO.write_text(changed, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["translations.py", "update", "compile"])
    assert translations.main() == 0
    assert f"{len(WORDS)} texts; without Chinese: 0, fuzzy: 1, obsolete: 1" in capsys.readouterr().out
    updated = translations.read()
    assert updated["✓ right"].fuzzy and updated["✓ right"].string == "✓ 正确"
    assert list(updated.obsolete) == ["What was said once"]
    assert b"What was said once" not in translations.PO.with_suffix(".mo").read_bytes()


def test_the_texts_of_exercises_and_bars_are_found_and_must_be_plain():
    cells = 'utils.check(a, (lambda a: a, "too few"))', 'for x in widgets.progress(rows, "rows"):\n    pass'
    for found in (cells, ("utils.check(a, (lambda a: a, advice))",), ("widgets.progress(rows, f'{n} rows')",)):
        file = io.BytesIO(
            json.dumps({"cells": [{"cell_type": "code", "id": "x", "source": [c]} for c in found]}).encode()
        )
        file.name = "a.ipynb"
        if found == cells:
            assert [text for _, _, text, _ in translations.cell_texts(file)] == ["too few", "rows"]
        else:
            with pytest.raises(ValueError, match=r"a\.ipynb, cell x: .* is no plain text"):
                list(translations.cell_texts(file))


def test_every_name_of_a_panel_stands_in_a_notebook():
    code = "\n".join(cell.source for _, cell in cells() if cell.cell_type == "code")
    assert [name for name in plots.NAMES if f'"{name}"' not in code] == []


def test_a_message_about_a_file_begins_as_in_english():
    """Notebook 03 cuts the name off at the first colon and blank."""
    for english, chinese in WORDS.items():
        name, colon, _ = english.partition(": ")
        if colon and name in ("{name}", "{path}", "{folder}", "{model}") and "{near}" not in english:
            assert chinese.startswith(f"{name}: "), english


@pytest.mark.parametrize("path", SOURCES[:-1], ids=lambda path: path.stem)
def test_nothing_reaches_a_learner_past_say(path):
    assert set(unsaid(path.read_text(encoding="utf-8"))) <= READ_BY_CODE


@pytest.mark.parametrize(
    "source",
    [
        'raise CourseError(f"{name}: no such file")',
        'print("○ open")',
        'picture(figure, f"Histogram: {n} samples")',
        'plot.set(xlabel="step")',
        'widgets.Button(description="Ask")',
    ],
)
def test_a_text_past_say_is_found(source):
    assert list(unsaid(source))


def test_the_language_is_that_of_the_folder_and_else_of_the_variable(monkeypatch, tmp_path):
    monkeypatch.chdir(languages.EN)
    monkeypatch.setenv("COURSE_LANGUAGE", "zh")
    assert language.current() == "en"
    monkeypatch.chdir(tmp_path)
    assert language.current() == "zh"
    assert language.say("✓ right") == "✓ 正确"
    monkeypatch.delenv("COURSE_LANGUAGE")
    assert language.current() == "en"
    monkeypatch.chdir(languages.ZH)
    assert language.current() == "zh"


def test_an_unknown_language_is_named(monkeypatch):
    monkeypatch.setenv("COURSE_LANGUAGE", "fr")
    with pytest.raises(utils.CourseError, match=r"COURSE_LANGUAGE=fr is unknown\. Use one of: en, zh"):
        utils.settings()


def test_a_check_speaks_the_language_of_its_notebook(monkeypatch, capsys):
    monkeypatch.chdir(languages.ZH)
    utils.check(...)
    utils.check(1, (lambda a: a == 2, "a whole number is asked"))
    utils.check(2, (lambda a: a == 2, "a whole number is asked"))
    said = capsys.readouterr().out.splitlines()
    assert said == ["○ 待作答：把 ... 换成你的答案，然后运行这两个单元格", "✗ 还不对：应填整数", "✓ 正确"]


@pytest.mark.parametrize("target", ["run", "lab", "test"])
@pytest.mark.parametrize("setting", ["en", "zh"])
def test_make_takes_the_language_from_one_setting(target, setting):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    shown = subprocess.run(
        ["make", "--dry-run", "--eval", 'print-language: ; @echo "$(COURSE_LANGUAGE)"', target, "print-language"],
        cwd=ROOT,
        env=environment | ({"COURSE_LANGUAGE": setting} if setting != "en" else {}),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f'echo "{setting}"' in shown
    assert target == "run" or f"notebooks/{setting}" in shown


# ---------------------------------------------------------------------------------------------------- glosses

#: Cells whose Chinese the prose beside them explains, since they show tokens, templates or rows as they are.
IN_PROSE = set(
    "03-03 03-04a 03-08 03-19 04-03 04-06 04-09 04-17 04-19 04-21b 04-21d 04-21f 04-21h 04-21j 04-21l 04-21n"
    " 04-23 04-27 04-28a 06-06 06-14 07-56 07-60 07-94b 07-94l 07-95o 07-105 09-49b".split()
)


def test_all_chinese_dialogue_that_an_english_notebook_shows_has_a_gloss():
    shown, seen = "", set()
    for name, cell in cells():
        text = "\n".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.get("outputs", []))
        shown += text
        if not language.CHINESE.search(text):
            continue
        seen.add(cell.id)
        if cell.id in IN_PROSE:
            continue
        assert "utils.glossed(" in cell.source or "utils.table(" in cell.source, f"{name}: cell {cell.id} has no gloss"
        text = text.split("<think></think>\n")[-1]  # a prompt is explained in prose
        for known in sorted(GLOSSES, key=len, reverse=True):
            text = text.replace(known, "")
        left = [line for line in text.splitlines() if language.CHINESE.search(line)]
        assert not left, f"{name}: cell {cell.id}, without a gloss: {left}"
    assert seen >= IN_PROSE
    assert [text for text in GLOSSES if text not in shown] == []


def test_a_gloss_is_never_guessed(monkeypatch):
    monkeypatch.chdir(languages.EN)
    assert utils.glossed("你是谁？") == "你是谁？ (Who are you?)"
    assert utils.glossed("你是猫？") == "你是猫？ (no gloss)"
    assert utils.glossed("plain") == "plain"
    monkeypatch.chdir(languages.ZH)
    assert utils.glossed("你是谁？") == "你是谁？"


def test_a_table_has_its_glosses_below_each_row_in_english_alone(monkeypatch, capsys):
    rows = [("a", "你是谁？"), ("b", "你是猫？"), ("你是猫？", "你是谁？")]
    monkeypatch.chdir(languages.EN)
    utils.table(rows, ("", "question"))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "a         你是谁？",
        "          Who are",
        "          you?",
        "b         你是猫？",
        "你是猫？  你是谁？",
        "(no       Who are",
        "gloss)    you?",
    ]
    monkeypatch.chdir(languages.ZH)
    utils.table(rows, ("", "question"))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "a         你是谁？",
        "b         你是猫？",
        "你是猫？  你是谁？",
    ]


def test_a_notebook_shows_a_table_with_chinese_as_html(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr("course.cells.shell", lambda: "a notebook's")
    monkeypatch.chdir(languages.EN)
    utils.table([("<b>", 1)], ("sign", "n"))
    assert not shown and "<b>" in capsys.readouterr().out
    utils.table([("<b>", "你是谁？")], ("sign", "question"))
    cells = re.findall(r"<(t[hd])[^>]*>(.*?)</t[hd]>", shown[0].html)
    assert cells == [
        ("th", "sign"),
        ("th", "question"),
        ("td", "&lt;b&gt;"),
        ("td", "你是谁？<br><i>Who are you?</i>"),
    ]
    assert str(shown[0]).splitlines() == [
        "sign  question",
        "----  --------",
        "<b>   你是谁？",
        "      Who are",
        "      you?",
    ]
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ pairs


def test_the_two_languages_match():
    assert languages.problems() == []


def test_without_its_chinese_nothing_is_complete(monkeypatch, tmp_path):
    monkeypatch.setattr(languages, "ZH", tmp_path)
    missing = [line for line in languages.problems(complete=True) if line.endswith("is not there")]
    assert len(missing) >= 8


NAME = "01_environment"


@pytest.fixture
def pair():
    """A small pair of notebooks that match, and its marks."""
    new = nbformat.v4
    english = new.new_notebook(
        metadata={"course": {"minutes_cpu": 1, "memory_mib": 10, "disk_mib": 1, "verified": "x"}}
    )
    shown = new.new_output("stream", text="3 rows\n")
    verdict = new.new_output("stream", text="○ open: put your answer in the place of ... and run both cells\n")
    english.cells = [
        new.new_markdown_cell("# Title", id="t-0"),
        new.new_markdown_cell("Prose.\n\n```python\nanswer = 1\n```", id="t-1"),
        new.new_code_cell("print(3, 'rows')", id="t-2", outputs=[shown], execution_count=1),
        new.new_code_cell("import utils\nutils.check(...)", id="t-3", outputs=[verdict], execution_count=2),
        new.new_markdown_cell("## End", id="t-4"),
    ]
    headers.write(english, NAME)
    chinese = languages.synced(english, None, NAME)
    for cell in chinese.cells:
        if cell.id in languages.prose(chinese):
            assert cell.source.startswith(languages.UNTRANSLATED)
            cell.source = cell.source[len(languages.UNTRANSLATED) :].replace("Prose", "正文").replace("End", "结尾")
        if cell.id == "t-3":
            cell.outputs[0].text = "○ 待作答：把 ... 换成你的答案，然后运行这两个单元格\n"
    headers.write(chinese, NAME, language="zh")
    texts = languages.prose(english), languages.prose(chinese)
    marks = [languages.mark_of(text, texts[1][one]) for one, text in texts[0].items()]
    assert languages.notebook_problems(english, chinese, NAME, marks) == []
    return english, chinese, marks


def by_id(notebook, one):
    return next(cell for cell in notebook.cells if cell.id == one)


def drop(notebook, one):
    notebook.cells = [cell for cell in notebook.cells if cell.id != one]


def swap(notebook):
    notebook.cells[2], notebook.cells[3] = notebook.cells[3], notebook.cells[2]


DRIFTS = {
    "English prose": (lambda en, zh: by_id(en, "t-1").update(source="Other."), "t-1: changed in English since"),
    "Chinese prose": (lambda en, zh: by_id(zh, "t-4").update(source="## 另一个"), "t-4: changed in Chinese since"),
    "both": (lambda en, zh: [by_id(one, "t-4").update(source="## X") for one in (en, zh)], "t-4: never marked"),
    "untranslated": (lambda en, zh: by_id(zh, "t-4").update(source="<!-- untranslated -->\n## End"), "not translated"),
    "English code": (lambda en, zh: by_id(en, "t-2").update(source="print(4)"), "t-2 has other code"),
    "Chinese code": (lambda en, zh: by_id(zh, "t-2").update(source="print(4)"), "t-2 has other code"),
    "output": (lambda en, zh: by_id(zh, "t-2").outputs[0].update(text="3 行\n"), "t-2 has another output"),
    "number": (lambda en, zh: by_id(zh, "t-3").outputs[0].update(text="○ 待作答 7\n"), "t-3 shows other numbers"),
    "count": (lambda en, zh: by_id(zh, "t-2").update(execution_count=9), "t-2 has another execution count"),
    "tags": (lambda en, zh: by_id(zh, "t-2").metadata.update(tags=["x"]), "t-2 is of another kind"),
    "metadata": (lambda en, zh: zh.metadata.update(x=1), "other metadata"),
    "missing": (lambda en, zh: drop(zh, "t-2"), "t-2 is missing in Chinese"),
    "missing prose": (lambda en, zh: drop(zh, "t-4"), "t-4 is missing in Chinese"),
    "extra": (lambda en, zh: drop(en, "t-2"), "t-2 is in no English notebook"),
    "order": (lambda en, zh: swap(zh), "another order"),
    "solution": (
        lambda en, zh: by_id(zh, "t-1").update(source="正文.\n\n```python\nanswer = 2\n```"),
        "t-1: the Python in it differs",
    ),
    "header": (lambda en, zh: by_id(zh, "01-header").update(source="| 用时 |"), "header or footer"),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_a_planted_drift_is_named(pair, name):
    english, chinese, marks = pair
    change, said = DRIFTS[name]
    change(english, chinese)
    found = languages.notebook_problems(english, chinese, NAME, marks)
    assert any(said in line for line in found), found


def test_sync_mends_all_but_the_prose(pair):
    english, chinese, marks = pair
    by_id(english, "t-2").source = "print(3, 'rows')  # counted"
    by_id(english, "t-1").source = "Other prose."
    english.cells.insert(5, nbformat.v4.new_markdown_cell("New.", id="t-5"))
    swap(chinese)
    drop(chinese, "t-3")
    chinese.cells.append(nbformat.v4.new_markdown_cell("多余", id="t-9"))
    found = languages.notebook_problems(english, languages.synced(english, chinese, NAME), NAME, marks)
    assert len(found) == 3, found
    assert "t-1: the Python in it differs" in found[0]
    assert "t-1: changed in English since" in found[1]
    assert "t-5: not translated yet" in found[2]


def test_a_run_of_its_own_gives_outputs_only_where_a_helper_speaks(pair):
    english, chinese, _ = pair
    executed = copy.deepcopy(chinese)
    by_id(executed, "t-3").outputs[0].text = "○ 另一句\n"
    made = languages.stored(english, executed, NAME)
    assert by_id(made, "t-3").outputs[0].text == "○ 另一句\n"
    assert by_id(made, "t-2").outputs == by_id(english, "t-2").outputs
    by_id(executed, "t-2").outputs[0].text = "4 rows\n"
    with pytest.raises(ValueError, match="cell t-2 has another output in Chinese, though no helper speaks"):
        languages.stored(english, executed, NAME)


def test_a_helper_speaks_where_it_is_called_and_through_functions_of_a_notebook():
    new = nbformat.v4
    sources = {
        "quiet": "print(len(rows)); rest = [check(a) for a in b]",
        "raises": "if bad:\n    raise utils.CourseError('no')",
        "settings": "settings = utils.settings()",
        "direct": "plots.loss_picture([])",
        "defines": "def draw(h):\n    return plots.loss_picture(h)",
        "calls": "draw(history)",
        "deeper": "class Live:\n    def on_log(self):\n        draw(1)",
        "plan": "print(planner.plan(recipe=planner.Recipe(load_in_4bit=True)).text())",
        "imported": "from course.rows import load_rows\nload_rows(path)",
        "imported-above": "load_rows(path)",
        "caught": "try:\n    f()\nexcept utils.CourseError as error:\n    print(error)",
    }
    notebook = new.new_notebook(cells=[new.new_code_cell(text, id=name) for name, text in sources.items()])
    assert languages.speaking(notebook) == set(sources) - {"quiet", "raises", "settings"}


def test_sync_carries_the_whole_series_over_and_mark_notes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(languages, "ZH", tmp_path)
    monkeypatch.setattr(languages, "MARKS", tmp_path / "matching.json")
    monkeypatch.setattr(languages, "document_pairs", dict)
    languages.sync()
    found = languages.problems(complete=True)
    assert len(found) > 200 and all(line.endswith("not translated yet") for line in found), found[:5]
    for path in tmp_path.glob("*.ipynb"):
        path.write_text(path.read_text(encoding="utf-8").replace("<!-- untranslated -->\\n", ""), encoding="utf-8")
    languages.mark(["01_environment"])
    assert all(not line.startswith("01_environment") for line in languages.problems())
    assert len(languages.problems()) > 200
    languages.mark([])
    assert languages.problems(complete=True) == []


DOCUMENT = "# Course\n\nText.\n\n```bash\n# not a heading\n```\n\n## Use\n\nMore.\n"


@pytest.mark.parametrize(
    ("english", "chinese", "said"),
    [
        ("", "", ""),
        ("More.", "", "section 2: changed in English since"),
        ("", "更多。", "section 2: changed in Chinese since"),
        ("", "## 用法", "other sections"),
        ("# Course", "", "other sections"),
    ],
)
def test_a_document_is_compared_section_by_section(english, chinese, said):
    other = "# 课程\n\n正文。\n\n```bash\n# 不是标题\n```\n\n## 用法\n\n更多。\n"
    pairs = zip(languages.sections(DOCUMENT), languages.sections(other), strict=True)
    marks = [languages.mark_of(*one) for one in pairs]
    assert len(marks) == 2
    changed = DOCUMENT.replace(english, "Other." if english == "More." else "") if english else DOCUMENT
    twin = other.replace(chinese, "别的。" if chinese == "更多。" else "") if chinese else other
    found = languages.document_problems(changed, twin, "README.md", marks)
    assert len(found) == bool(said) and said in "".join(found), found


# -------------------------------------------------------------------------------------------- shared training


def test_a_shared_training_is_resumed_from_its_last_checkpoint_but_one(tmp_path):
    for step in (50, 250, 270):
        (tmp_path / f"lora/checkpoints/checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no finished run to share"):
        run_nbval.share_training(tmp_path)
    (tmp_path / "lora/made_from.json").write_text("{}")
    run_nbval.share_training(tmp_path)
    assert not (tmp_path / "lora/made_from.json").exists()
    left = sorted(path.name for path in tmp_path.glob("lora/checkpoints/*"))
    assert left == ["checkpoint-250", "checkpoint-50"]


def test_the_cells_that_a_shared_run_does_not_compare_are_there():
    sources = {cell.id: cell.source for name, cell in cells() if name == "05_lora_training"}
    assert "start_or_resume(" in sources[run_nbval.RESUMED[0]]
    assert "points in SwanLab" in sources[run_nbval.RESUMED[1]]
