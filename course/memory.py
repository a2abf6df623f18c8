"""The memory meter: how much there is, and how much this or another process holds or has held. It knows no GPUs."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

#: Where Linux keeps what a container or a service may hold. By the version of control groups: the folder, the file of
#: the limit, the file of what is held, and what of it the kernel can drop at any time, in `memory.stat`.
GROUPS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Each limit on the memory of this process's control groups, and what is held of it, in bytes.

    A container may see its own group as the root of all, though `/proc` names another path; so that is looked at too.

    Args:
        root: the folder that has `proc` and `sys`.
    """
    file = root / "proc/self/cgroup"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit, held, droppable = GROUPS[1 if controllers else 2]
        own = root / top / path.strip("/")
        for folder in {own, *own.parents, root / top}:
            try:
                most, now = int((folder / limit).read_text()), int((folder / held).read_text())
                counts = dict(pair.split() for pair in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or no limit ("max")
                continue
            yield most, now - int(counts.get(droppable, 0))


def machine_memory_gib() -> tuple[float, float]:
    """Memory in GiB: what the processes here may hold together, and how much of it is free.

    It is the machine's, or less where a limit holds: `docker run --memory`, or systemd's of a learner on the hub.
    """
    import psutil

    total, free = (memory := psutil.virtual_memory()).total, memory.available
    for most, held in memory_limits():
        total, free = min(total, most), min(free, max(most - held, 0))
    return total / 2**30, free / 2**30


def peak_memory_gib(pid: int | None = None) -> float:
    """The most memory in GiB that this process has held, mapped files included.

    Args:
        pid: another process, asked on Linux only; elsewhere the answer is 0.
    """
    if pid is not None:
        status = Path(f"/proc/{pid}/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
        return int(found[1]) / 2**20 if found else 0.0
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def own_memory_gib() -> float:
    """GiB that this process holds now, on Linux. Mapped files, which the kernel can drop at any time, do not count."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) / 2**20


class MemoryWatch:
    """The most of `own_memory_gib` while a block runs, in `most`."""

    def __enter__(self) -> MemoryWatch:
        self.most, self.done = own_memory_gib(), threading.Event()

        def look() -> None:
            while not self.done.wait(0.2):
                self.most = max(self.most, own_memory_gib())

        self.thread = threading.Thread(target=look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.done.set()
        self.thread.join()
        self.most = max(self.most, own_memory_gib())
