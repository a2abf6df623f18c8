"""The benchmark runs where there is no GPU too, and what the READMEs quote is what it measured."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from finetune import planner
from finetune.machine import CARDS, Machine

MEASURED = ROOT / "benchmarks" / "measured.jsonl"


@pytest.fixture(scope="module")
def measured():
    return [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]


def run(*arguments, script="benchmark.py"):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_the_table_in_the_readme_is_the_one_that_is_printed():
    printed = run("--table", str(MEASURED)).stdout.strip()
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- table -->\n(.*?)\n<!-- end -->", text, re.DOTALL)[1] == printed
    assert printed.count("\n") >= 10


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_quotes_what_was_measured(measured, name):
    text = (ROOT / name).read_text(encoding="utf-8")
    tables = {"one H100 80 GB": (1, 4), "two H200": (2, 16)}
    if name != "README.md":
        tables = {"一张 H100 80 GB": (1, 4), "两张 H200": (2, 16)}
    for heading, (gpus, bits) in tables.items():
        quoted = re.search(rf"\| {heading}[^\n]*\n\|[-:|]+\n((?:\|.*\n)+)", text)[1].strip().splitlines()
        rows = [row for row in measured if (row.get("gpus"), row["bits"], row["layers"]) == (gpus, bits, 46)]
        assert len(quoted) >= 3
        for line in quoted:
            _, what, step, tokens, gib, minutes, _ = (cell.strip() for cell in line.split("|"))
            samples, ours = int(re.search(r"\d+", what)[0]), not re.search("textbook|教科书", what)
            found = [
                row
                for row in rows
                if row.get("samples") == samples
                and (row["recipe"] == "ours") == ours
                and f"{row['step_seconds']:.2f}" == step
            ]
            assert len(found) == 1, line
            row = found[0]
            assert f"{row['tokens_per_second']:,.0f}" == tokens and f"{max(row['peak_gib']):.1f}" == gib, line
            assert re.match(r"\d+", minutes)[0] == f"{3 * 3729 / row['samples_per_second'] / 60:.0f}", line


def test_the_prediction_for_four_gpus_is_the_planners():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"<!-- predicted -->\n(.*?)\n<!-- end", text, re.DOTALL)[1].splitlines()[2:]
    assert any("4 x H100" in line for line in lines)
    for line in lines:
        _, gpus, samples, step, tokens, gib, _ = (cell.strip() for cell in line.split("|"))
        count, card = gpus.split(" x ")
        machine = Machine(int(count), CARDS[card].gib, card, 512, 500)
        made = planner.plan(recipe=planner.Recipe(int(samples)), processes=int(count), machine=machine)
        assert made.fits and f"{made.step_seconds:.2f}" == step and f"{made.peak:.1f}" == gib, line
        assert f"{int(samples) * 60.6 / made.step_seconds:,.0f}" == tokens, line


@pytest.mark.parametrize(
    "name", ["README.md", "README.zh-CN.md", "notebooks/en/08_full_size.ipynb", "notebooks/zh/08_full_size.ipynb"]
)
def test_how_much_faster_is_said_of_equal_batches(measured, name):
    """The figures in front of 'times as fast' (倍): steps of as many samples, on the same GPUs and weights."""
    whole = [row for row in measured if row["layers"] == 46 and row.get("samples") == 16]
    expected = set()
    for ours in (row for row in whole if row["recipe"] == "ours"):
        for other in (row for row in whole if row["recipe"].startswith("textbook")):
            if (ours["gpus"], ours["bits"]) == (other["gpus"], other["bits"]):
                expected.add(f"{other['step_seconds'] / ours['step_seconds']:.1f}")
    assert expected == {"5.0", "6.8", "7.3", "6.5"}
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith("ipynb"):
        text = "\n".join(cell["source"] for cell in nbformat.reads(text, as_version=4).cells)
    said = set(re.findall(r"(\d+\.\d) (?:times|倍)", text))
    assert said == expected


def test_it_runs_without_a_gpu(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run("--tiny", "--bits", "16", "--samples", "16,16s", "--steps", "1", "--processes", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["recipe"] for row in rows] == ["ours", "ours", "textbook"]
    assert [row.get("shared") for row in rows] == [None, 12, None]
    # The same batches and weights: the two recipes see the same losses.
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=0.02)
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_without_a_gpu_it_says_so():
    done = run("--out", "unused.jsonl")
    assert done.returncode == 1
    assert "--tiny" in done.stdout
    assert "does not fit" in done.stdout


def test_loading_is_timed_in_both_ways(tmp_path):
    out = tmp_path / "loading.jsonl"
    done = run("--tiny", "--layers", "2", "--out", str(out), script="loading.py")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["read_ahead"] for row in rows] == [True, False, True]
    measured = [json.loads(line) for line in (ROOT / "benchmarks/loading.jsonl").read_text("utf-8").splitlines()]
    assert all(row.keys() == measured[0].keys() for row in rows + measured)
    alone = run("--out", str(tmp_path / "unused.jsonl"), script="loading.py")
    assert (alone.returncode, alone.stdout) == (1, "")
    assert "--tiny" in alone.stderr


def test_the_seconds_of_loading_are_those_measured():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/loading.jsonl").read_text("utf-8").splitlines()]
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for bits in (4, 16):
        of_bits = {row["read_ahead"]: [] for row in rows if row["bits"] == bits}
        for row in rows:
            if row["bits"] == bits:
                of_bits[row["read_ahead"]].append(f"{row['seconds']} s")
        line = next(line for line in text.splitlines() if f"| {of_bits[False][0]}, " in line)
        assert f"| {' and '.join(of_bits[True])}, " in line
