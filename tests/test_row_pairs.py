"""Similar questions: the pairs that are kept give the groups that all pairs would, in bounded memory and time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import networkx as nx
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz, process

import utils
from course import plots, row_pairs
from course.rows import load_rows

ROWS = json.loads((ROOT / "dataset" / "huanhuan.json").read_text(encoding="utf-8"))
QUESTIONS = [row["instruction"] + row["input"] for row in ROWS]


def all_pairs(texts: list[str], least: int) -> dict[tuple[int, int], int]:
    """By the plain way, in a square of memory."""
    scores = process.cdist(texts, texts, scorer=fuzz.ratio, dtype=np.uint8)
    return {(int(i), int(j)): int(scores[i, j]) for i, j in np.argwhere(scores >= least) if i < j}


def groups(size: int, pairs: dict[tuple[int, int], int], threshold: int) -> list[list[int]]:
    graph = nx.Graph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from(pair for pair, score in pairs.items() if score >= threshold)
    return sorted(map(sorted, nx.connected_components(graph)))


def test_the_pairs_of_the_default_file_are_those_of_the_plain_way():
    assert row_pairs.shared_ends(QUESTIONS) == ("", "")
    count, kept = row_pairs.similar_pairs(QUESTIONS, 70)
    assert list(kept.items()) == list(all_pairs(QUESTIONS, 70).items())
    assert count == 962


TEXTS = st.lists(st.text("abcde我你", max_size=12), min_size=1, max_size=40)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(texts=TEXTS, least=st.sampled_from([1, 50, 70, 80, 95, 100]), most=st.sampled_from([0, 5, 1000]))
def test_kept_pairs_give_the_groups_of_all_pairs_at_every_threshold(texts, least, most):
    count, kept = row_pairs.similar_pairs(texts, least, most)
    known = all_pairs(texts, least)
    assert count == len(known)
    assert kept.items() <= known.items()
    for threshold in range(least, 101, 5):
        assert groups(len(texts), kept, threshold) == groups(len(texts), known, threshold)


def test_long_texts_and_repeated_letters_are_compared_exactly():
    draw = random.Random(1)
    texts = [draw.choice(["a b ", "的"]) * draw.randint(20, 90) + str(draw.random())[2:6] for _ in range(300)]
    assert row_pairs.similar_pairs(texts, 75)[1] == all_pairs(texts, 75)


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        ([], ("", "")),
        (["你是谁？", "你是何人？"], ("", "")),
        (["问：甲。", "问：乙乙。", "问：丙丙丙。"], ("问：", "。")),
        (["同", "同", "同"], ("同", "")),
        (["", "甲", "乙"], ("", "")),
        ([f"任务：{i}" for i in range(40)] + ["别的"], ("任务：", "")),
        ([f"任务：{i}" for i in range(40)] + ["别的"] * 9, ("", "")),
    ],
)
def test_what_nearly_all_texts_begin_or_end_with(texts, ends):
    assert row_pairs.shared_ends(texts) == ends


@pytest.fixture
def split(cell, capsys):
    """Runs notebook 03's cells from the similarity to the split on rows; what is printed, and the groups."""
    cells = [
        cell("03_dataset", text)
        for text in (
            "def plain",
            "answers = Counter",
            "shared_ends",
            "LEAST =",
            "def group_rows",
            "shuffled =",
            "def nearest",
        )
    ]
    cells[2:2] = [cell("03_dataset", "fuzz, process")]

    def run(rows: list[dict[str, str]]) -> dict:
        space = {"utils": utils, "settings": utils.settings(), "rows": rows, "plots": plots, "row_pairs": row_pairs}
        for source in cells:
            exec(source, space)
        return space | {"said": capsys.readouterr().out}

    return run


@pytest.mark.parametrize("name", ["constant_instruction_200.json", "persona_in_instruction_30.json"])
def test_a_text_that_all_rows_share_ties_no_rows_together(split, name):
    path = ROOT / "tests" / "support" / "cases" / name
    opening = json.loads(path.read_text(encoding="utf-8"))[0]["instruction"]
    rows = load_rows(path)
    space = split(rows)
    assert f"left out at the beginning: {opening}" in space["said"]
    assert len(space["groups"]) > len(rows) / 2
    assert max(map(len, space["groups"])) <= 5
    assert len(space["kept"]) + len(space["new_answers"]) == len(rows)


def rows_of(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


TEAS = [f"我想喝一壶热热的{tea}，可以吗？" for tea in ("龙井", "普洱", "毛尖", "花茶")]
ONE_GROUP = {
    "one answer": (rows_of(("你是谁？", "我"), ("茶呢？", "我"), ("下雨了", "我")), "all rows have the same answer"),
    "one question": (
        rows_of(("那要多久？", "一刻"), ("那要多久？", "两刻"), ("那要多久？", "三刻")),
        "all rows ask the same",
    ),
    "similar questions": (
        rows_of(("茶多少钱一碗？", "甲"), ("茶多少钱两碗？", "乙"), ("酒多少钱两碗？", "丙"), ("酒多少钱两壶？", "丁")),
        "all questions are similar, some through others",
    ),
    "both": (
        rows_of(("茶多少钱一碗？", "甲"), ("请问茶多少钱一碗？", "乙"), ("家在何处", "甲")),
        "equal answers and similar questions tie all rows together",
    ),
}


@pytest.mark.parametrize("kind", ONE_GROUP)
def test_when_one_group_is_left_the_message_says_why(split, kind, fault):
    rows, said = ONE_GROUP[kind]
    with pytest.raises(utils.CourseError, match=said):
        split(rows)
    fault.record("data", f"rows that make one group: {kind}", "such rows", f"refused: {said}")


MEASURED = """
import random, sys, time
sys.path.insert(0, ".")
from course import row_pairs
kind, count, draw = sys.argv[1], int(sys.argv[2]), random.Random(1)
letters = [chr(0x4E00 + i) for i in range(800)]
texts = ["".join(draw.choices(letters, k=draw.randint(6, 20))) for _ in range(count)]
if kind == "alike":
    texts = [f"请问第{i}号客人今天想喝什么{draw.choice(letters)}茶？" for i in range(count)]
found, kept = row_pairs.similar_pairs(texts, 70)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss is the parent's, too
print(int(peak.split()[1]) // 1024, time.process_time(), found, len(kept))
"""


@pytest.mark.parametrize(
    ("kind", "count", "mib", "seconds", "least"),
    [("alike", 2_500, 300, 20, 1_000_000), ("drawn", 20_000, 300, 20, 0)],  # 25 of the last make 100,000 rows
)
def test_memory_and_time_are_bounded(kind, count, mib, seconds, least):
    command = [sys.executable, "-c", MEASURED, kind, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    memory, used, found, kept = map(float, done)
    assert found >= least
    assert kept <= 100_000 + 31 * count
    assert memory < mib
    assert used < seconds
