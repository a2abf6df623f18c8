"""What a container or a service may hold counts as the machine's memory.

The trees of files are made here; a real limit is tried by `deploy/proof/proof_image.py`.
"""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

import utils
from course import memory

GIB = 2**30


def group(folder, **files: object) -> None:
    """A control group with these files; a line break follows each, as in the real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path):
    """A root whose `/proc` names the control group `/a/b`, of version 2 and of version 1."""
    group(tmp_path / "proc" / "self", cgroup="9:cpu,memory:/a/b\n8:pids:/x\n0::/a/b")
    return tmp_path


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert list(memory.memory_limits(tmp_path)) == []


def test_a_limit_of_a_group_above_holds_too_and_caches_are_not_counted(root):
    top = root / "sys/fs/cgroup"
    stat = f"anon {2 * GIB}\ninactive_file {GIB}"
    group(top / "a", memory_max=4 * GIB, memory_current=3 * GIB, memory_stat=stat)
    group(top / "a/b", memory_max="max", memory_current=GIB, memory_stat=stat)
    assert list(memory.memory_limits(root)) == [(4 * GIB, 2 * GIB)]


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_version_1_in_a_container_and_outside(root, inside):
    files = {"memory_limit_in_bytes": 3 * GIB, "memory_usage_in_bytes": 2 * GIB}
    group(root / "sys/fs/cgroup/memory" / inside, **files, memory_stat=f"total_inactive_file {GIB}")
    assert list(memory.memory_limits(root)) == [(3 * GIB, GIB)]


@pytest.mark.parametrize(
    ("limits", "total", "free"),
    [([], 16, 8), ([(2**63, GIB)], 16, 8), ([(4 * GIB, GIB)], 4, 3), ([(4 * GIB, GIB), (2 * GIB, 3 * GIB)], 2, 0)],
)
def test_the_smallest_counts(monkeypatch, limits, total, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=8 * GIB))
    monkeypatch.setattr(memory, "memory_limits", lambda: limits)
    assert memory.machine_memory_gib() == (total, free)
    assert (utils.machine()["memory_gib"], utils.machine()["free_memory_gib"]) == (total, free)
