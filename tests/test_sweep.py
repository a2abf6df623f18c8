"""The grid over alpha and learning rate: one small run of it, its table, and that the course uses what it found."""

import importlib.util
import json
from collections import defaultdict

import nbformat
import pytest
from conftest import ROOT

from finetune.lora import lora_config

SPEC = importlib.util.spec_from_file_location("sweep", ROOT / "benchmarks" / "sweep.py")
sweep = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sweep)
RUNS = [json.loads(line) for line in sweep.RESULTS.read_text(encoding="utf-8").splitlines()]


def cells():
    """Pair of alpha and learning rate to the losses on new wordings of its seeds."""
    found = defaultdict(list)
    for run in RUNS:
        found[run["alpha"], run["learning_rate"]].append(run["new_wordings"])
    return found


def test_one_run_learns_and_reports_every_figure(monkeypatch):
    def sample(first):
        ids = [first, 20, 21, 22, 23, 24]
        return {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}

    parts = {name: [sample(10 + i) for i in range(8)] for name in ("train", "new_wordings", "new_answers", "test")}
    monkeypatch.setattr(sweep, "samples_of", lambda *_: parts)
    monkeypatch.setattr(sweep, "EPOCHS", 6)
    run = sweep.one_run(32, 4e-3, seed=1)
    assert {"alpha", "learning_rate", "seed", "steps", "new_wordings", "new_answers", "test", "stops", "equal"} <= set(
        run
    )
    assert run["steps"] == 6 and run["new_wordings"] < 4  # eight equal answers are learned in six steps
    assert run["alpha"] == 32 and 0 <= run["equal"] <= 1


def test_a_batch_size_makes_one_pass_and_keeps_the_curve(monkeypatch):
    ids = [10, 20, 21, 22, 23, 24]
    parts = {
        name: [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for _ in range(8)]
        for name in ("train", "new_wordings", "new_answers", "test")
    }
    monkeypatch.setattr(sweep, "samples_of", lambda *_: parts)
    run = sweep.one_run(32, 4e-3, seed=1, batch_size=4)
    assert (run["batch"], run["epochs"], run["steps"]) == (4, 1, 2)
    assert [seen for seen, _ in run["curve"]] == [0, 4, 8]
    assert run["curve"][-1][1] == run["new_wordings"] < run["curve"][0][1]


def test_the_course_uses_a_pair_that_three_seeds_cannot_tell_from_the_best():
    notebook = nbformat.read(ROOT / "notebooks" / "en" / "05_lora_training.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    alpha = lora_config(8).lora_alpha
    assert f"lora_alpha={alpha}," in code and "learning_rate=4e-3 if small" in code
    found = cells()
    best = min(found.values(), key=sum)
    assert min(found[alpha, 4e-3]) <= max(best)


def test_the_table_has_the_best_pair_first(capsys):
    sweep.table(RUNS)
    first = capsys.readouterr().out.splitlines()[2].split()
    best = min(cells().items(), key=lambda cell: sum(cell[1]))[0]
    assert (int(first[0]), float(first[1])) == pytest.approx(best)
