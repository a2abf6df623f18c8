"""Judging: the sheet hides who answered, marks find their way back, agreement is counted as in the literature."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import judging

ALL_MET = dict.fromkeys(judging.CRITERIA, 1)


def answer(number, author, name="situations"):
    asked = [{"role": "user", "content": f"问题{number}"}]
    return {"set": name, "author": author, "asked": asked, "answer": f"回答{number}"}


@pytest.fixture
def answers():
    return [answer(n, "adapter" if n % 2 else "base") for n in range(20)]


def marks(answers, met):
    """Marks in the numbers of the sheet: all met for the answers at these places, one criterion missed elsewhere."""
    return [
        {"number": number} | ALL_MET | ({} if place in met else {"point": 0})
        for number, place in enumerate(judging.order(len(answers)))
    ]


def test_the_sheet_says_neither_author_nor_order(answers, tmp_path):
    judging.sheet(answers, tmp_path / "sheet.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "sheet.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"number", "asked", "answer"} for line in lines)
    assert sorted(line["answer"] for line in lines) == sorted(row["answer"] for row in answers)
    assert [line["answer"] for line in lines] != [row["answer"] for row in answers]
    assert all(line["answer"][2:] == line["asked"][4:] for line in lines)


def test_marks_are_counted_for_the_author_who_gave_the_answer(answers):
    adapter = {n for n, row in enumerate(answers) if row["author"] == "adapter"}
    found = judging.results(answers, [marks(answers, adapter), marks(answers, adapter - {1})])
    by_author = {row["author"]: row for row in found["shares"]}
    assert (by_author["adapter"]["reader_1"], by_author["adapter"]["reader_2"]) == (1.0, 0.9)
    assert (by_author["adapter"]["both"], by_author["base"]["both"]) == (0.9, 0.0)
    assert found["agreement"] == 0.95


def test_in_a_set_without_a_role_the_role_does_not_count():
    answers = [answer(n, "assistant", "everyday") for n in range(4)]
    plain = [{"number": n, "role": 0, "point": 1, "sense": 1, "address": 0} for n in range(4)]
    assert judging.results(answers, [plain, plain])["shares"][0]["both"] == 1.0


def test_kappa_of_the_textbook_example():
    """20 yes-yes, 15 no-no, 5 and 10 that differ: 0.4 (Wikipedia, "Cohen's kappa", simple example)."""
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    assert judging.kappa(pairs) == pytest.approx(0.4)
    assert judging.kappa([(True, True)] * 3) == 1.0


@pytest.mark.parametrize("spoil", [lambda m: m[:-1], lambda m: [m[0] | {"sense": 2}, *m[1:]]])
def test_an_incomplete_reading_is_refused(answers, spoil):
    whole = marks(answers, set())
    with pytest.raises(SystemExit, match="Reader 2"):
        judging.results(answers, [whole, spoil(whole)])
