"""The verdict on machines that are not here: too small, too full, half installed."""

import json
from dataclasses import replace

import go_or_no_go
import pytest
from conftest import ROOT

import utils

ROOM = json.loads(go_or_no_go.ROOM.read_text(encoding="utf-8"))
GOOD = go_or_no_go.Found(
    cores=8,
    free_memory=64.0,
    free_disk=100.0,
    port_free=True,
    model_sha256=go_or_no_go.MODEL_SHA256,
    unwritable="",
    fonts=["Noto Sans CJK SC"],
)
EASY = ROOM | {"learners": 8, "cores": 2, "training_minutes": 20.0, "training_minutes_alone": 3.0}
EASY |= {"most_mib_of_one": 2048, "disk_mib_of_one": 512}


def judged(learners=8, room=EASY, **changed):
    checks = go_or_no_go.hardware(replace(GOOD, **changed), learners, room)
    return go_or_no_go.verdict(checks), {check.what: check for check in checks}


def test_a_good_machine_is_a_go():
    assert judged()[0] == "GO"
    assert go_or_no_go.verdict(go_or_no_go.software((3, 12), [])) == "GO"


@pytest.mark.parametrize(
    ("changed", "said", "found", "cure"),
    [
        ({"free_memory": 15.9}, "NO-GO: memory", "15.9 GiB free; 8 x 2.0 = 16.0 GiB needed", "enough for 7"),
        ({"free_disk": 3.9}, "NO-GO: disk", "3.9 GiB free; 8 x 0.50 = 4.0 GiB needed", "COURSE_OUTPUT"),
        ({"cores": 1}, "NO-GO: cores", "takes about 40 minutes if all 8", "2 cores would do it in 30; or let 6 train"),
        ({"port_free": False}, "NO-GO: port", "5092 is taken", "PORT=5093"),
        ({"model_sha256": "0"}, "NO-GO: bundled model", "not those recorded", "git checkout"),
        ({"unwritable": "output: Read-only"}, "NO-GO: output folder", "Read-only", "set COURSE_OUTPUT"),
        ({"fonts": []}, "NO-GO: Chinese font", "none", "fonts-noto-cjk"),
    ],
)
def test_what_is_missing_is_a_no_go_with_its_mend(changed, said, found, cure):
    verdict, checks = judged(**changed)
    assert verdict == said
    check = checks[said.removeprefix("NO-GO: ")]
    assert found in check.found
    assert cure in check.cure


@pytest.mark.parametrize("changed", [{"free_memory": 16.0}, {"free_disk": 4.0}, {"cores": 2}, {"fonts": None}])
def test_just_enough_is_enough(changed):
    assert judged(**changed)[0] == "GO"


def test_more_learners_need_more():
    assert judged(learners=33)[0] == "NO-GO: memory"
    assert judged(learners=12, cores=2)[1]["cores"].good
    assert not judged(learners=13, cores=2)[1]["cores"].good


def test_one_learner_waits_as_long_as_one_learner_does():
    assert go_or_no_go.training_minutes(1, 64, EASY) == 3.0
    assert go_or_no_go.training_minutes(8, 2, EASY) == 20.0
    assert go_or_no_go.training_minutes(4, 4, EASY) == 5.0


def test_fonts_of_other_machines_are_not_looked_at():
    assert all(one.good for one in go_or_no_go.hardware(replace(GOOD, fonts=[]), 8, EASY, fonts_here=False))


@pytest.mark.parametrize(
    ("python", "wrong", "said", "found"),
    [
        ((3, 10), [], "NO-GO: Python", "3.10"),
        ((3, 14), [], "NO-GO: Python", "3.14"),
        ((3, 11), ["peft: not installed, 0.21.2 wanted"], "NO-GO: packages", "peft: not installed"),
        ((3, 11), list("abcdef"), "NO-GO: packages", "a; b; c; and 3 more"),
    ],
)
def test_a_wrong_python_or_package_is_named(python, wrong, said, found):
    checks = go_or_no_go.software(python, wrong)
    assert go_or_no_go.verdict(checks) == said
    assert any(found in check.found and check.cure for check in checks if not check.good)


def test_a_missing_package_stops_the_rest(monkeypatch, capsys):
    monkeypatch.setattr(utils, "wrong_packages", lambda: ["psutil: not installed, 7.2.2 wanted"])
    monkeypatch.setattr(go_or_no_go, "look", lambda: pytest.fail("looked at the machine"))
    monkeypatch.setattr("sys.argv", ["go_or_no_go.py", "4"])
    assert go_or_no_go.main() == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "NO-GO: packages"
    assert any(line.startswith("✗  packages") and line.endswith("make setup") for line in out)


@pytest.mark.parametrize(("free", "last", "status"), [(64.0, "GO", 0), (0.5, "NO-GO: memory", 1)])
def test_the_last_line_and_the_exit_status_are_the_verdict(monkeypatch, capsys, free, last, status):
    monkeypatch.setattr(utils, "wrong_packages", list)
    monkeypatch.setattr(go_or_no_go, "look", lambda: replace(GOOD, free_memory=free))
    monkeypatch.setattr(go_or_no_go, "smoke", lambda learners, cores: go_or_no_go.Check("short run", True, "4 of 4"))
    monkeypatch.setattr("sys.argv", ["go_or_no_go.py", "4"])
    assert go_or_no_go.main() == status
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_this_machine_can_be_looked_at(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "new" / "folder"))
    found = go_or_no_go.look()
    assert found.cores >= 1
    assert found.free_memory > 0
    assert found.free_disk > 0
    assert found.unwritable == ""
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "file"))
    assert go_or_no_go.look().unwritable


def test_the_recorded_model_is_the_one_that_is_here(tmp_path):
    assert go_or_no_go.model_sha256(utils.BUNDLED) == go_or_no_go.MODEL_SHA256
    for path in utils.BUNDLED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert go_or_no_go.model_sha256(tmp_path) == go_or_no_go.MODEL_SHA256
    (tmp_path / "config.json").write_text("{}")
    assert go_or_no_go.model_sha256(tmp_path) != go_or_no_go.MODEL_SHA256


def test_the_short_run_runs(tmp_path, monkeypatch):
    done = go_or_no_go.smoke(1, 2)
    assert done.good, done
    assert done.found.startswith("1 of 1 kernels ran")
    # The same with a notebook that stops: its message is the cure.
    monkeypatch.setattr(go_or_no_go.subprocess, "Popen", failing(go_or_no_go.subprocess.Popen))
    done = go_or_no_go.smoke(2, 2)
    assert not done.good
    assert done.found.startswith("0 of 2")
    assert "03_dataset: CourseError" in done.cure


def failing(start):
    """The same process, with a data file that is not there."""

    def begin(command, env, **how):
        return start(command, env=env | {"COURSE_DATA": str(ROOT / "nowhere.json")}, **how)

    return begin
