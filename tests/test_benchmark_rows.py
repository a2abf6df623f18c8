"""`benchmarks/rows.py`: which rows a run reads, and one short run."""

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import rows

import utils
from finetune import lora
from finetune.model import load_model

ROWS = json.loads((ROOT / "dataset" / "huanhuan.json").read_text("utf-8"))
OWN = {name: value for name, value in os.environ.items() if not name.startswith("COURSE_")}
QUESTIONS = [row["instruction"] + row["input"] for row in ROWS]


def asked(**options):
    """The first questions of the rows that are chosen."""
    samples = rows.chosen(Namespace(**({"share": 1.0, "also": [], "repeated": 0} | options)))
    assert all(sample.messages[0] == rows.SYSTEM for sample in samples)
    return [sample.messages[1]["content"] for sample in samples]


def test_the_rows_are_a_share_of_each_file_and_the_first_ones_are_there_twice():
    every, half, more = asked(), asked(share=0.5), asked(also=[("more_rows", 0.1)])
    assert set(QUESTIONS) <= set(every) and len(half) == round(len(every) / 2) and set(half) < set(every)
    lines = (ROOT / "dataset" / "more_rows.jsonl").read_text("utf-8").splitlines()
    assert len(more) == len(every) + round(0.1 * len(lines))
    lines = (ROOT / "dataset" / "court_rows.jsonl").read_text("utf-8").splitlines()
    assert len(asked(also=[("court_rows", 0.1)])) == len(every) + round(0.1 * len(lines))
    twice = asked(repeated=100)
    assert len(twice) == len(every) + 100 and all(twice.count(question) == 2 for question in QUESTIONS[:100])
    assert twice.count(QUESTIONS[100]) == 1


def test_rows_can_be_read_more_than_once():
    every, found = asked(), asked(share=2.5)
    counts = {found.count(question) for question in QUESTIONS}
    assert len(found) == 2 * len(every) + round(len(every) / 2) and counts == {2, 3}


def test_a_file_that_is_not_there_is_named():
    assert rows.other_file("her_rows=2") == ("her_rows", 2.0) and rows.other_file("her_rows") == ("her_rows", 1.0)
    with pytest.raises(ArgumentTypeError, match="hers"):
        rows.other_file("hers=2")


def test_a_batch_has_rows_of_similar_length_and_a_pass_has_each_once():
    made = [rows.Row(list(range(length)), [], False) for length in range(1, 161)]
    several = rows.batches(made, seed=0)
    batches = [next(several) for _ in range(10)]
    assert sorted(len(row.ids) for batch in batches for row in batch) == list(range(1, 161))
    assert all(max(len(row.ids) for row in batch) - min(len(row.ids) for row in batch) == 15 for batch in batches)


def test_a_short_run_lowers_the_loss_and_writes_losses_and_answers(tmp_path):
    out, answers = tmp_path / "rows.jsonl", tmp_path / "answers.json"
    command = [sys.executable, ROOT / "benchmarks" / "rows.py", "--share", "0.02", "--out", out]
    for steps in ("1", "12"):
        more = ["--answers", answers, "--strengths", "1", "0", "--save", tmp_path / "run"] if steps == "12" else []
        subprocess.run([*command, "--steps", steps, *more], cwd=ROOT, env=OWN, check=True)
    first, second, base = (json.loads(line) for line in out.read_text("utf-8").splitlines())
    assert second["losses"].keys() == {"situations", "wordings", "second_turns", "third_turns", "taught"}
    assert second["losses"]["taught"] < first["losses"]["taught"] and second["passes"] > 2
    said = json.loads(answers.read_text("utf-8"))
    assert base["strength"] == 0 and base["losses"]["taught"] > second["losses"]["taught"]
    trained = lora.load_adapter(load_model(utils.BUNDLED, attention="sdpa"), tmp_path / "run" / "adapter")
    saved = {name: tensor for name, tensor in lora.adapter_state(trained).items() if "lora_B" in name}
    assert saved and all(tensor.abs().sum() > 0 for tensor in saved.values())
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert settings["base_model_name_or_path"] == "models/glm4-moe-mini"
    assert "甄嬛" in json.loads((tmp_path / "run" / "prompt.json").read_text("utf-8"))["system"]
    assert len(said) == 320 and all(row["answer"] and row["asked"][-1]["role"] == "user" for row in said)
