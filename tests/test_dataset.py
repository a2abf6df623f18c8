import json
import re
from collections import Counter

from conftest import ROOT

from course.rows import load_rows

ROWS = load_rows(ROOT / "dataset" / "huanhuan.json")
HELDOUT = load_rows(ROOT / "dataset" / "heldout.json")


def plain(row):
    """The question without punctuation, so that a changed mark is no new question."""
    return re.sub(r"\W", "", row["instruction"] + row["input"])


def test_counts_and_the_two_examples():
    assert len(ROWS) >= 800
    assert len(HELDOUT) >= 60
    pairs = {(row["instruction"], row["output"]) for row in ROWS}
    assert ("你父亲是谁？", "家父是大理寺少卿甄远道。") in pairs
    assert ("你是谁？", "我是甄嬛，家父是大理寺少卿甄远道。") in pairs
    assert sum(bool(row["input"]) for row in ROWS) >= 40


def test_no_question_twice_and_none_of_the_heldout_ones_in_training():
    questions = Counter(map(plain, ROWS))
    assert max(questions.values()) == 1
    assert not {plain(row) for row in HELDOUT} & set(questions)
    assert len({plain(row) for row in HELDOUT}) == len(HELDOUT)


def test_no_answer_more_than_a_dozen_times():
    assert max(Counter(row["output"] for row in ROWS).values()) <= 12


def test_she_never_speaks_of_models():
    assert not [row for row in ROWS if re.search("模型|助手|程序|微调", row["output"])]


def test_the_example_persona_has_thirty_rows_of_six_facts():
    rows = load_rows(ROOT / "dataset" / "teahouse.json")
    assert len(rows) == len({plain(row) for row in rows}) == 30
    assert all(re.search("老朽|陆|茶馆|客官|阿福", row["output"]) for row in rows)


def test_the_judged_answers_are_new_and_of_both_kinds():
    judged = json.loads((ROOT / "dataset" / "judged_answers.json").read_text(encoding="utf-8"))
    assert all(set(one) == {"question", "answer", "in_role", "why"} for one in judged)
    assert Counter(one["in_role"] for one in judged) == {True: 30, False: 30}
    assert not {one["answer"] for one in judged} & {row["output"] for row in [*ROWS, *HELDOUT]}


def test_the_ordinary_prose_names_nothing_of_the_court():
    lines = (ROOT / "dataset" / "ordinary_prose.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 24
    assert not re.search("宫|皇|妃|娘娘|太医|臣妾|朕", "".join(lines))
