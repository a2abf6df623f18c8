"""The memory meter: how much this or another process holds or has held. It knows no GPUs."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path


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
