"""Faults in the middle of training: notebook 05's own cells, and train.py, in processes that are killed.

Whatever happens, running the same again has to end with the very numbers of a run that nothing disturbed.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_training import run_notebook
from training_process import ROOT, Run, cells, run_cells, run_script

import runs
import utils

AREA = "training"
EQUAL = "final loss and adapter equal the uninterrupted run's, bit by bit"
SCRIPT = "--samples 4 --epochs 2 --save-steps 3".split()
KEPT = re.compile(r"checkpoint-(\d+) holds the adapter and all that is needed to go on: run this again\.")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Rows and tokens of notebooks 03 and 04, made once; a run of its own copies them."""
    place = tmp_path_factory.mktemp("prepared")
    rows = json.loads((ROOT / "dataset" / "huanhuan.json").read_text(encoding="utf-8"))[:40]
    (place / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_DATA", str(place / "rows.json"))
        patch.setenv("COURSE_OUTPUT", str(place / "out"))
        patch.setenv("SWANLAB_MODE", "disabled")
        run_notebook("03_dataset")
        run_notebook("04_chat_template")
    return place


class Course:
    """A copy of what was prepared, and the processes that train in it."""

    def __init__(self, prepared, place, **environment):
        self.out, self.log = place / "out", place.with_name(f"{place.name}.log")
        shutil.copytree(prepared / "out", self.out)
        self.environment = {"COURSE_DATA": str(prepared / "rows.json"), "COURSE_OUTPUT": str(self.out)}
        self.environment |= {"SWANLAB_MODE": "disabled", **environment}

    def notebook(self, *changes, before_training=""):
        return Run(run_cells, self.log, self.environment, cells(changes, before_training))

    def script(self, *more, before=""):
        return Run(run_script, self.log, self.environment, [*SCRIPT, *more], before)

    @property
    def checkpoints(self):
        return self.out / "lora" / "checkpoints"

    def result(self):
        """What training ended with: the adapter's bytes, every loss by step, and the optimiser's state."""
        last = max(self.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
        losses = {
            (row["step"], key): row[key] for row in state["log_history"] for key in row if key.endswith("loss")
        }
        adapter = (self.out / "lora" / "adapter" / "adapter_model.safetensors").read_bytes()
        return last.name, losses, adapter, (last / "optimizer.pt").read_bytes()


@pytest.fixture
def course(prepared, tmp_path):
    return Course(prepared, tmp_path / "course")


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    course = Course(prepared, tmp_path_factory.mktemp("undisturbed") / "course")
    run = course.notebook()
    assert run.end() == 0, run.said
    return course


def step(run):
    found = re.findall(r"@step (\d+)", run.said)
    return int(found[-1]) if found else -1


def test_two_runs_that_nothing_disturbs_are_equal(undisturbed, course):
    run = course.notebook()
    assert run.end() == 0, run.said
    assert course.result() == undisturbed.result()


def assert_clear(run, *said):
    """One message of the course, no stack trace, whatever else the run has printed."""
    messages = [line for line in run.said.splitlines() if line.startswith(("CourseError: ", "train.py: "))]
    assert len(messages) == 1, run.said
    assert "Traceback" not in run.said
    for one in said:
        assert re.search(one, messages[0]), messages[0]
    return messages[0]


# ---------------------------------------------------------------------------------------- killed processes


def killed_ten_times(start, last_step, seed):
    """Kill it ten times at random moments of training, each run resuming the one before; returns where each resumed."""
    chance, resumed = random.Random(seed), []
    targets = sorted(chance.sample(range(last_step), 10))
    for target in targets:
        run = start()
        assert run.wait_for(lambda run=run, target=target: step(run) >= target), run.said
        time.sleep(chance.random() * 0.5)  # anywhere in a step: forward, backward, saving, evaluating
        run.kill()
        assert run.process.exitcode == -signal.SIGKILL
        resumed.append(re.search(r"resuming from (?:\S+checkpoint-(\d+)|nothing)", run.said)[1])
    return resumed


def test_ten_kills_in_one_training(course, undisturbed, fault):
    last_step = int(undisturbed.result()[0].split("-")[1])
    resumed = killed_ten_times(course.notebook, last_step, seed=20)
    assert len(set(resumed)) >= 4, resumed  # the kills did spread over the training
    run = course.notebook()
    assert run.end() == 0, run.said
    assert "resuming from" in run.said
    assert course.result() == undisturbed.result()
    fault.record(
        AREA,
        "the kernel is killed ten times in one training",
        "SIGKILL at ten random moments (seeded) of notebook 05's training cell, each run resuming the one before",
        f"the cell resumes each time; {EQUAL}",
    )
