"""Several learners on one machine at the same time: each runs the whole series, with an output folder of its own.

`python workshop/learners.py 8` starts them together, which is the worst case (in a room they also read), and prints
what each held in memory and took in minutes. Their folders lie in `output/learners`; the figures in `figures.json`
there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from headers import folder_mib  # noqa: E402

import utils  # noqa: E402

SAMPLE_SECONDS = 5.0


@dataclass
class Learner:
    """One run of the series: its folder, its process and what was seen of it (memory in MiB)."""

    folder: Path
    process: subprocess.Popen
    begun: float = field(default_factory=time.time)
    most_mib: float = 0.0
    minutes: float = 0.0

    def look(self) -> float:
        """The memory of the learner's processes just now, in MiB; pages shared with other learners count in part."""
        now = 0.0
        try:
            own = psutil.Process(self.process.pid)
            for one in [own, *own.children(recursive=True)]:
                now += one.memory_full_info().pss / 2**20
        except psutil.Error:  # it has just ended
            pass
        self.most_mib = max(self.most_mib, now)
        if self.process.poll() is not None and not self.minutes:
            self.minutes = (time.time() - self.begun) / 60
        return now


def start(folder: Path, threads: int, cell_seconds: int) -> Learner:
    """Start the series for one learner; what it prints goes to `said.txt` in the folder."""
    folder.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COURSE_", "SWANLAB_"))}
    environment |= {"COURSE_OUTPUT": str(folder), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "tools" / "run_series.py"), "--cell-seconds", str(cell_seconds)]
    with (folder / "said.txt").open("w") as said:
        return Learner(folder, subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT))


def swanlab_runs(folder: Path) -> set[str]:
    """The ids of the SwanLab runs that a learner's folder holds."""
    with closing(sqlite3.connect(folder / "swanlab" / "runs.swanlab")) as connection:
        return {row[0] for row in connection.execute("SELECT run_id FROM experiment")}


def problems(learners: list[Learner]) -> list[str]:
    """What went wrong, one line each: a learner who did not finish, or whose results are another's or differ."""
    found = [
        f"{learner.folder.name}: ended with {learner.process.returncode}; see {utils.shown(learner.folder)}/said.txt"
        for learner in learners
        if learner.process.returncode
    ]
    if found:
        return found
    adapters = {
        hashlib.sha256((learner.folder / "lora" / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        for learner in learners
    }
    if len(adapters) != 1:
        found.append(f"{len(adapters)} different adapters came out of the same data, model and seed")
    runs = [swanlab_runs(learner.folder) for learner in learners]
    if len(set.union(*runs)) != sum(map(len, runs)) or len({len(one) for one in runs}) != 1:
        found.append(f"SwanLab runs of each learner: {[len(one) for one in runs]}; some are shared or missing")
    return found


def main() -> int:
    """0 when all learners finished, each with its own results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("learners", type=int)
    parser.add_argument("--threads", type=int, help="threads of a learner; without it, the cores shared out")
    options = parser.parse_args()
    machine = utils.machine()
    threads = options.threads or max(1, int(machine["cores"]) // options.learners)
    root = ROOT / "output" / "learners"
    shutil.rmtree(root, ignore_errors=True)
    before, lowest, most_together = machine["free_memory_gib"], machine["free_memory_gib"], 0.0
    print(f"{options.learners} learners of {threads} thread(s) on {machine['cores']} cores", flush=True)
    begun = time.time()
    # Alone the longest cell takes three minutes.
    learners = [start(root / f"learner-{n}", threads, 600 * options.learners) for n in range(1, options.learners + 1)]
    try:
        while any(learner.process.poll() is None for learner in learners):
            time.sleep(SAMPLE_SECONDS)
            most_together = max(most_together, sum(learner.look() for learner in learners))
            lowest = min(lowest, utils.machine()["free_memory_gib"])
    finally:
        for learner in learners:
            learner.look()
            learner.process.kill()
    figures = {
        "learners": options.learners,
        "cores": machine["cores"],
        "threads": threads,
        "minutes": round((time.time() - begun) / 60, 1),
        "most_mib_of_one": round(max(learner.most_mib for learner in learners)),
        "most_mib_together": round(most_together),
        "machine_gib": round(before - lowest, 1),
        "disk_mib_of_one": round(max(folder_mib(learner.folder) for learner in learners)),
    }
    utils.table(
        [(learner.folder.name, f"{learner.minutes:.1f}", f"{learner.most_mib:,.0f}") for learner in learners],
        ("learner", "minutes", "MiB at most"),
    )
    print(json.dumps(figures, indent=1))
    (root / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    found = problems(learners)
    print("\n".join(found) or "all finished, with the same adapter and SwanLab runs of their own")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
