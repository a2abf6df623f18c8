"""`make store` stores a whole, undisturbed run or nothing, and a header fits the outputs below it."""

from __future__ import annotations

import subprocess
import sys
import time

import disturbance
import headers
import languages
import nbformat
import pytest
import run_series
from nbclient.exceptions import DeadKernelError

BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass"


@pytest.fixture
def series(tmp_path, monkeypatch):
    """Two English notebooks that are not executed: their cost and what others took are given.

    Returns a function: shares of others -> exit code and whether the two files changed; a share of None fails the
    notebook.
    """
    folder = tmp_path / "notebooks" / "en"
    folder.mkdir(parents=True)
    paths = [folder / name for name in ("01_first.ipynb", "02_second.ipynb")]
    for path in paths:
        cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    for module in (run_series, headers):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(languages, "EN", folder)
    monkeypatch.setattr(run_series, "current", lambda: "en")
    monkeypatch.setattr(run_series, "summary", lambda *_: None)
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "output"))

    def run(shares, *options, seconds=100.0):
        left = iter(shares)
        now = [None]

        def executed(path, output, cell_seconds, checked):
            assert checked == ("--store" in options)
            now[0] = next(left)
            if now[0] is None:
                raise DeadKernelError("died")
            return nbformat.read(path, as_version=4), {"seconds": seconds, "memory_mib": 1.0, "disk_mib": 1.0}

        monkeypatch.setattr(run_series, "run", executed)
        monkeypatch.setattr(disturbance.Watch, "share", lambda _: now[0])
        monkeypatch.setattr(sys, "argv", ["run_series.py", *options])
        before = [path.read_bytes() for path in paths]
        code = run_series.main()
        return code, [path.read_bytes() != old for path, old in zip(paths, before, strict=True)]

    return run


def test_an_undisturbed_run_is_stored(series):
    assert series([0.05, 0.1], "--store") == (0, [True, True])


@pytest.mark.parametrize("shares", [[0.5, 0.0], [0.0, 0.5]])
def test_a_disturbed_run_stores_nothing_and_says_why(series, capsys, shares):
    assert series(shares, "--store") == (1, [False, False])
    assert "Other programs took 50% of the cores" in capsys.readouterr().out


def test_it_is_stored_when_that_is_asked_for(series):
    assert series([0.5, 0.5], "--store", "--disturbed-anyway") == (0, [True, True])


def test_a_short_notebook_and_a_run_that_stores_nothing_are_never_disturbed(series):
    assert series([0.5, 0.5], "--store", seconds=5.0) == (0, [True, True])
    assert series([0.5, 0.5]) == (0, [False, False])


def test_a_run_that_fails_stores_nothing(series):
    assert series([0.0, None], "--store") == (1, [False, False])


def test_the_work_of_ones_own_children_is_ones_own():
    before = disturbance.own_seconds()
    subprocess.run([sys.executable, "-c", BURN.format(0.5)], check=True)
    ended = disturbance.own_seconds()
    assert ended - before >= 0.45
    with subprocess.Popen([sys.executable, "-c", BURN.format(0.5)]) as running:
        time.sleep(0.1)
        while disturbance.own_seconds() - ended < 0.4 and running.poll() is None:
            time.sleep(0.05)
        assert disturbance.own_seconds() - ended >= 0.4


def test_the_work_of_others_is_seen(tmp_path):
    watch = disturbance.Watch.start()
    done = tmp_path / "done"
    code = BURN.format(1.0) + f"\nopen({str(done)!r}, 'w')"
    # Started by a shell that ends at once, so it is no child of this process.
    subprocess.run(["sh", "-c", '"$0" -c "$1" >/dev/null 2>&1 &', sys.executable, code], check=True)
    while not done.exists():
        time.sleep(0.05)
    seconds = watch.share() * (time.monotonic() - watch.begun) * len(disturbance.cores())
    assert seconds >= 0.8


@pytest.mark.parametrize(("trained", "right"), [(519, False), (200, True), (283, True), (290, False), (90, False)])
def test_the_stored_training_fits_the_header(trained, right):
    path = languages.EN / "05_lora_training.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["course"]["minutes_cpu"] = 4.7
    headers.write(notebook, path.stem)
    (cell,) = [one for one in notebook.cells if headers.training_seconds(nbformat.v4.new_notebook(cells=[one]))]
    cell.outputs = [nbformat.v4.new_output("stream", text=f"{trained} s of training, at most 1.42 GiB of memory\n")]
    assert headers.problems(notebook, path.stem) == [
        f"05_lora_training: the header says 282 s, the stored output {trained} s of training, "
        "so they are of two runs; run `make store`"
    ] * (not right)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_notebook_05_stores_how_long_its_training_took(language):
    notebook = nbformat.read(languages.EN.parent / language / "05_lora_training.ipynb", as_version=4)
    assert len(headers.training_seconds(notebook)) == 1
