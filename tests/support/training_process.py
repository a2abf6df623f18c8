"""Runs the training cells of notebook 05, or the command, in processes that a test can kill.

Importing torch and transformers takes most of a short run's time, so a fork server does it once: each run is a
process of its own, with an interpreter state in which nothing has been trained.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
#: The cells that train, of all that teach: settings, rows, plan, model, adapter, arguments, dropout, SwanLab, trainer,
#: training, saving.
CELLS = "01 16b 16d 18 20 25 40 41b 41d 43 44 47 47b 48a 48b 48 50 50b 52 53 58 60 64".split()
CELLS = [f"05-{cell}" for cell in CELLS]
#: A cell that a learner could add: 18 steps on the 40 rows of the test, checkpoints and losses close together.
SHORT = """
arguments.per_device_train_batch_size, arguments.num_train_epochs = 4, 2
arguments.logging_steps, arguments.eval_steps, arguments.save_steps = 3, 9, 3
"""
TELL = """
from transformers import TrainerCallback
class Told(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        print(f"@step {state.global_step}\\n", end="", flush=True)
trainer.add_callback(Told())
"""


def cells(before_training: str = "") -> list[str]:
    """The sources of the training cells, with the short run's and one that tells each step added."""
    notebook = json.loads((ROOT / "notebooks" / "en" / "05_lora_training.ipynb").read_text(encoding="utf-8"))
    sources = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"}
    added = {"05-40": SHORT, "05-50b": TELL + before_training}
    return [source for name in CELLS for source in (sources[name], added.get(name)) if source]


def warm() -> Any:
    """The context whose processes have torch, transformers, peft and the rest imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_imports"])
    return context


def _start(log: Path, environment: dict[str, str]) -> None:
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    for name in [n for n in os.environ if n.startswith(("COURSE_", "SWANLAB_"))]:
        del os.environ[name]
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # torch has read it before the fork
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    os.chdir(ROOT / "notebooks" / "en")
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_cells(log: Path, environment: dict[str, str], sources: list[str]) -> None:
    """In the child: run the cells as Jupyter does, stop at the first that fails."""
    _start(log, environment)
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance(colors="NoColor")
    for source in sources:
        if not shell.run_cell(source).success:
            sys.stdout.flush()
            os._exit(1)


def run_script(log: Path, environment: dict[str, str], arguments: list[str], before: str = "") -> None:
    """In the child: the command with these arguments."""
    _start(log, environment)
    exec(before, {})
    from finetune.__main__ import main

    sys.exit(main(["train", *arguments]))


class Run:
    """A process that trains, and what it has printed."""

    def __init__(self, target: Callable[..., None], log: Path, environment: dict[str, str], *arguments: Any) -> None:
        self.log, self.begin = log, log.stat().st_size if log.is_file() else 0
        log.touch()
        self.process = warm().Process(target=target, args=(log, environment, *arguments))
        self.process.start()

    @property
    def said(self) -> str:
        return self.log.read_bytes()[self.begin :].decode("utf-8", "replace")

    def wait_for(self, found: Callable[[], Any], seconds: float = 120.0) -> bool:
        """Whether it came to that before the process ended."""
        until = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < until, self.said
            if not self.process.is_alive():
                return bool(found())
            time.sleep(0.0005)
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the signal, and wait for the end."""
        os.kill(self.process.pid, number)
        self.end()

    def end(self, seconds: float = 300.0) -> int:
        """The exit status, once the process has ended."""
        self.process.join(seconds)
        ended = self.process.exitcode is not None
        if not ended:
            self.process.kill()  # else pytest would wait for it at its own end
        assert ended, self.said
        return self.process.exitcode
