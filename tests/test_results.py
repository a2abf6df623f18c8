"""What the series reached on the bundled model: the figures that the text relies on.

Run after `tools/run_nbval.py notebooks/en`, which leaves `output/test/report.json`: `make test` does both.
"""

import json

import pytest
from conftest import ROOT

from course.rows import load_rows

LOSS, STOPS, IN_ROLE, EQUAL = range(4)


@pytest.fixture(scope="module")
def report():
    path = ROOT / "output" / "test" / "report.json"
    assert path.is_file(), "run tools/run_nbval.py notebooks/en first"
    return json.loads(path.read_text(encoding="utf-8"))


def test_training_lowers_both_held_out_losses(report):
    wordings, answers = (report["heldout"][name] for name in ("new wordings", "new answers"))
    assert wordings[1][LOSS] < 0.5 * wordings[0][LOSS]
    assert answers[1][LOSS] < 0.95 * answers[0][LOSS]
    assert wordings[1][LOSS] < 0.5 * answers[1][LOSS], "a taught answer is far likelier than one never taught"


def test_new_answers_rise_again_and_new_wordings_do_not(report):
    wordings, answers = (report["validation_loss"][name] for name in ("new_wordings", "new_answers"))
    assert wordings[-1] < 1.02 * min(wordings) and wordings[-1] < 0.5 * wordings[0]
    assert min(answers) < 0.95 * answers[0] and answers[-1] > 1.02 * min(answers)


def test_the_adapter_stops_and_uses_her_words(report):
    for name, least in (("new wordings", 0.97), ("new answers", 0.95)):
        assert report["heldout"][name][1][STOPS] >= least
    base, adapter = report["heldout"]["new wordings"]
    assert adapter[IN_ROLE] >= 0.7 and adapter[IN_ROLE] > base[IN_ROLE]
    assert adapter[EQUAL] > 2 * report["heldout"]["new answers"][1][EQUAL]


def test_a_prompt_lowers_the_loss_and_training_lowers_it_further(report):
    none = report["no_prompt"]["heldout"]["new wordings"]
    prompt, adapter = report["heldout"]["new wordings"]
    assert adapter[LOSS] < prompt[LOSS] < none[LOSS]


def test_only_the_adapter_knows_her_father(report):
    _, base, adapter = report["before_after"][1]
    assert "甄远道" in adapter and "甄远道" not in base
    assert "甄嬛" in report["before_after"][0][2]


def test_no_held_out_question_is_in_training():
    rows = json.loads((ROOT / "output" / "test" / "rows" / "train.json").read_text(encoding="utf-8"))
    trained = {row["messages"][0]["content"] for row in rows if len(row["messages"]) == 2}
    for name in ("heldout", "heldout_situations", "heldout_wordings"):
        asked = {row["messages"][-2]["content"] for row in load_rows(ROOT / "dataset" / f"{name}.json")}
        assert not asked & trained, name
