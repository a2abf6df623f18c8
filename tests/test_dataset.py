import json
import re
from collections import Counter

import pytest
from conftest import ROOT

ROWS = json.loads((ROOT / "dataset" / "huanhuan.json").read_text(encoding="utf-8"))
HELDOUT = json.loads((ROOT / "dataset" / "heldout.json").read_text(encoding="utf-8"))


def plain(row):
    """The question without punctuation, so that a changed mark is no new question."""
    return re.sub(r"\W", "", row["instruction"] + row["input"])


def talks(name):
    """The conversations of a `.jsonl` file."""
    lines = (ROOT / "dataset" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_counts_and_the_two_examples():
    assert len(ROWS) >= 3_000
    assert len({row["output"] for row in ROWS}) >= 1_800
    assert max(len(row["output"]) for row in ROWS) <= 80
    assert len(HELDOUT) >= 60
    pairs = {(row["instruction"], row["output"]) for row in ROWS}
    assert ("你父亲是谁？", "家父是大理寺少卿甄远道。") in pairs
    assert ("你是谁？", "我是甄嬛，家父是大理寺少卿甄远道。") in pairs
    assert sum(bool(row["input"]) for row in ROWS) >= 40


def test_conversations_have_two_to_six_turns():
    turns = Counter(len(messages) // 2 for messages in talks("conversations"))
    assert sum(turns.values()) >= 250
    assert set(turns) == set(range(2, 7))
    assert not order_faults(talks("conversations") + talks("heldout_conversations"))


def order_faults(conversations):
    return [m for m in conversations if [turn["role"] for turn in m] != ["user", "assistant"] * (len(m) // 2)]


def test_no_held_out_question_opens_a_row_or_a_conversation():
    opened = {plain(row) for row in ROWS} | {
        re.sub(r"\W", "", messages[0]["content"]) for messages in talks("conversations")
    }
    for name in ("situations", "wordings"):
        rows = json.loads((ROOT / "dataset" / f"heldout_{name}.json").read_text(encoding="utf-8"))
        assert not {plain(row) for row in rows} & opened
        assert len(rows) >= 40
    asked = {re.sub(r"\W", "", messages[0]["content"]) for messages in talks("heldout_conversations")}
    assert not asked & opened
    assert len(asked) >= 40


def test_no_question_twice_and_none_of_the_heldout_ones_in_training():
    questions = Counter(map(plain, ROWS))
    assert max(questions.values()) == 1
    assert not {plain(row) for row in HELDOUT} & set(questions)
    assert len({plain(row) for row in HELDOUT}) == len(HELDOUT)


def further(name):
    """The rows and the conversations of a file in which both may be."""
    lines = (ROOT / "dataset" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [row for row in found if "output" in row], [row["messages"] for row in found if "messages" in row]


FURTHER = {"more_rows": (4_000, 500), "court_rows": (7_000, 5_000), "her_rows": (6_000, 10_000)}


@pytest.mark.parametrize(("name", "least"), FURTHER.items())
def test_the_further_rows_are_new_and_hold_no_test_question(name, least):
    rows, conversations = further(name)
    assert len(rows) >= least[0] and len(conversations) >= least[1] and not order_faults(conversations)
    assert max(len(row["output"]) for row in rows) <= 80
    opened = [plain(row) for row in rows] + [re.sub(r"\W", "", messages[0]["content"]) for messages in conversations]
    assert max(Counter(plain(row) for row in rows).values()) == 1
    taken = {plain(row) for row in ROWS + HELDOUT}
    for kind in ("situations", "wordings"):
        taken |= {plain(row) for row in json.loads((ROOT / "dataset" / f"heldout_{kind}.json").read_text("utf-8"))}
    taken |= {re.sub(r"\W", "", talk[0]["content"]) for talk in talks("conversations") + talks("heldout_conversations")}
    assert not taken & set(opened)
    if name != "more_rows":
        assert not {plain(row) for row in further("more_rows")[0]} & set(opened)
    assert not [row for row in rows if re.search("模型|助手|程序|微调|[A-Za-z0-9]", row["output"])]


def test_no_later_question_of_her_rows_is_one_of_a_test():
    asked = {turn["content"] for talk in further("her_rows")[1] for turn in talk if turn["role"] == "user"}
    assert not asked & {turn["content"] for talk in talks("heldout_conversations") for turn in talk}


def test_the_exchanges_of_the_court_tell_nobodys_story():
    """They are said by any lady of the court, so they must not contradict hers."""
    rows, conversations = further("court_rows")
    said = [row["output"] for row in rows]
    said += [turn["content"] for messages in conversations for turn in messages if turn["role"] == "assistant"]
    people = "甄|嬛|眉庄|陵容|流朱|浣碧|槿汐|果郡王|胧月|弘曕|灵犀|玉娆|碎玉轩|永寿宫|华妃|端妃|敬妃"
    assert not [text for text in said if re.search(people, text)]
    assert not [text for text in said if re.search("我父亲|家父|我母亲|弟弟|哥哥|老家|祖母|小时候", text)]


def test_no_answer_more_than_a_dozen_times():
    assert max(Counter(row["output"] for row in ROWS).values()) <= 12


def test_she_never_speaks_of_models():
    assert not [row for row in ROWS if re.search("模型|助手|程序|微调", row["output"])]


def test_the_example_persona_has_thirty_rows_of_six_facts():
    rows = json.loads((ROOT / "dataset" / "teahouse.json").read_text(encoding="utf-8"))
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


def test_the_ordinary_questions_are_sixty_and_of_no_court():
    questions = json.loads((ROOT / "dataset" / "ordinary_questions.json").read_text(encoding="utf-8"))
    assert len(questions) == len(set(questions)) == 60
    assert not re.search("宫|皇|妃|娘娘|太医|臣妾|朕", "".join(questions))
