"""How much of the processor other programs took while something was measured: `make store` keeps no such minutes."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

#: From here on other programs change what is measured: with two cores this is a third of one.
MOST = 0.15
#: A notebook that trains takes longer than this. In a shorter one a single short job is already a large share, and its
#: minutes would stay the same.
SHORTEST_SECONDS = 30.0


def cores() -> list[int]:
    """The cores on which this process may run; all of them where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def all_seconds() -> float:
    """CPU seconds that the cores have spent on anything since the machine started, those that a host took included."""
    times = psutil.cpu_times(percpu=True)
    return sum(sum(getattr(times[core], kind, 0.0) for kind in ("user", "nice", "system", "steal")) for core in cores())


def own_seconds() -> float:
    """CPU seconds of this process and all that it started, running or ended."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):  # it has just ended: its parent has its seconds
            total += sum(process.cpu_times()[:4])  # user, system, and both of the children that have ended
    return total


@dataclass
class Watch:
    """Measures from its making on: `Watch.start()`, some work, `watch.share()`."""

    begun: float
    all_before: float
    own_before: float

    @classmethod
    def start(cls) -> Watch:
        """Begin to measure."""
        return cls(time.monotonic(), all_seconds(), own_seconds())

    def share(self) -> float:
        """The share of the cores that others took since the start, from 0 to 1."""
        others = (all_seconds() - self.all_before) - (own_seconds() - self.own_before)
        return min(1.0, max(0.0, others / ((time.monotonic() - self.begun) * len(cores()))))


def refusal(seconds: float, share: float) -> str:
    """Why the minutes of a notebook cannot be stored: they say more about other programs; empty if they can."""
    if seconds < SHORTEST_SECONDS or share <= MOST:
        return ""
    taken = f"Other programs took {share:.0%} of the cores meanwhile; {MOST:.0%} is the most. Nothing is stored."
    return f"{taken} Stop them and run `make store` again, or add DISTURBED=anyway."
