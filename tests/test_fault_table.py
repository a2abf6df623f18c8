"""The table of faults says what the tests found, or the session fails."""

import os
import subprocess
import sys

import fault_table
import pytest
from conftest import ROOT

CONFTEST = """
import sys
from pathlib import Path
sys.path.insert(0, {support!r})
pytest_plugins = ["fault_table"]
import fault_table
fault_table.TABLE = Path(__file__).with_name("faults.md")
"""
TWO = """
def test_one(fault):
    fault.record("download", "one", "by hand | once", "resumed")

def test_two(fault):
    fault.record("download", "two", "by hand", "refused")
"""


@pytest.fixture
def session(tmp_path):
    """Run a session over a folder of its own with one test file; returns its exit code and what it said."""
    (tmp_path / "conftest.py").write_text(CONFTEST.format(support=str(ROOT / "tests" / "support")))

    def run(tests, *options):
        (tmp_path / "test_some.py").write_text(tests)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *options]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    run.table = tmp_path / "faults.md"
    return run


def test_a_row_is_new_true_or_stale(session):
    code, said = session(TWO)
    assert code == 1
    assert "not in the table: download | one | by hand \\| once | resumed | nothing | test_some.py" in said
    assert session(TWO, "--write-faults")[0] == 0
    written = session.table.read_text()
    assert written.count("test_some.py") == 2
    assert session(TWO)[0] == 0
    code, said = session(TWO.replace("refused", "lost"))
    assert code == 1
    assert "not in the table: download | two | by hand | lost" in said
    assert "no longer true: download | two | by hand | refused" in said
    assert session.table.read_text() == written


def test_workers_side_by_side_find_the_same(session):
    side_by_side = ("-p", "xdist.plugin", "-n", "2", "--dist", "loadfile")
    code, said = session(TWO, *side_by_side)
    assert code == 1 and "not in the table: download | two | by hand | refused" in said
    assert session(TWO, *side_by_side, "--write-faults")[0] == 0
    assert session.table.read_text().count("test_some.py") == 2
    assert session(TWO, *side_by_side)[0] == 0
    code, said = session(TWO.replace("refused", "lost"), *side_by_side)
    assert code == 1
    assert "no longer true: download | two | by hand | refused" in said


def test_only_a_whole_run_can_take_a_row_away(session):
    session(TWO, "--write-faults")
    alone = TWO[: TWO.index("def test_two")]
    assert session(TWO, "-k", "test_one")[0] == 0
    assert (
        session(TWO.replace("def test_two(fault):", "def test_two(fault):\n    import pytest; pytest.skip()"))[0] == 0
    )
    code, said = session(alone)
    assert code == 1
    assert "no longer true: download | two" in said
    assert session(TWO, "-k", "test_one", "--write-faults")[0] == 0
    assert len(fault_table.read(session.table.read_text())) == 2
    session(alone, "--write-faults")
    assert len(fault_table.read(session.table.read_text())) == 1


def test_rows_of_other_files_stay():
    other = ("training", "SIGKILL", "a signal", "resumed", "nothing", "test_other.py")
    mine = ("download", "404", "a status", "said", "nothing", "test_some.py")
    recorder = fault_table.Recorder({mine}, {"test_some.py": True})
    assert fault_table.merged({other}, recorder) == {other, mine}
    assert fault_table.differences({other, mine}, recorder) == []
    text = fault_table.render({other, mine})
    assert fault_table.read(text) == {other, mine}
    assert text.index("404") < text.index("SIGKILL")


def test_the_stored_table_is_as_the_tests_write_it():
    text = fault_table.TABLE.read_text(encoding="utf-8")
    rows = fault_table.read(text)
    assert text == fault_table.render(rows)
    assert {row[-1] for row in rows} <= {fault_table.named(path) for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(rows) > 30
