"""Runs the notebooks in order, each in a fresh kernel, and says what came out.

`python tests/run_series.py` leaves executed copies in `output/executed` and what each cost in `output/measured.json`;
with `--store` the outputs and the measured headers are stored in the notebooks themselves, which is how they are made.
With `--cell-seconds N` a cell may take so long; several learners on one machine need it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from headers import folder_mib, peak_mib, record, write
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs in every run and tells nothing: cell times, widget state, this machine's paths."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            for holder, key in (
                (output, "text"),
                (output.get("data", {}), "text/plain"),
                (output.get("data", {}), "text/html"),
            ):
                if key in holder:
                    holder[key] = holder[key].replace(f"{ROOT}/", "")


def run(path: Path, output: Path, cell_seconds: int) -> tuple[nbformat.NotebookNode, dict[str, float]]:
    """The executed notebook, and what it cost: seconds, memory of its kernel and disk in MiB.

    Raises:
        CellExecutionError, DeadKernelError: a cell failed, or its kernel died.

    """
    notebook = nbformat.read(path, as_version=4)
    # A full-size run takes hours in one cell, so only the bundled model has a limit.
    limit = cell_seconds if utils.settings().bundled else None
    resources = {"metadata": {"path": str(path.parent)}}
    # The kernel's warning about its (signed, local) TCP ports would break the progress lines.
    client = NotebookClient(notebook, timeout=limit, resources=resources, extra_arguments=["--log-level=40"])
    peaks = [0.0]
    client.on_cell_executed = lambda **_: peaks.append(peak_mib(client.km.provisioner.pid))
    begun, before = time.time(), folder_mib(output)
    client.execute()
    clean(notebook)
    cost = {"seconds": time.time() - begun, "memory_mib": max(peaks), "disk_mib": folder_mib(output) - before}
    return notebook, cost


def summary(course: utils.Settings, seconds: float) -> None:
    """Print the before and after, the figures, and how to see the run."""
    figures = json.loads((course.output / "report.json").read_text(encoding="utf-8"))
    print("\nBefore and after (greedy decoding)")
    for question, base, adapter in figures["before_after"]:
        print(f"  {question}\n    base     {base}\n    adapter  {adapter}")
    for name, (base, adapter) in figures["heldout"].items():
        print(f"\n{'On ' + name:42} base   adapter")
        print(f"  loss, nats a token                     {base[0]:6.2f}    {adapter[0]:6.2f}")
        print(f"  stops by itself                        {base[1]:6.0%}    {adapter[1]:6.0%}")
        print(f"  in role, by the rule of notebook 06    {base[2]:6.0%}    {adapter[2]:6.0%}")
    print(
        f"\n{seconds / 60:.1f} minutes in all, {figures['training_seconds'] / 60:.1f} of them training; "
        f"the training kernel held at most {figures['training_kernel_gib']:.2f} GiB."
    )
    print(f"Executed notebooks, adapter and SwanLab run are in {utils.shown(course.output)}/.")
    print("See the run in the SwanLab dashboard:  make dashboard")


def main() -> int:
    """Run the series; 0 when every notebook ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="store_true", help="store outputs and headers in the notebooks")
    parser.add_argument("--cell-seconds", type=int, default=900, help="limit of a cell with the bundled model")
    options = parser.parse_args()
    try:
        course = utils.settings()
    except utils.CourseError as error:
        print(error)
        return 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    executed = course.output / "executed"
    executed.mkdir(parents=True, exist_ok=True)
    (course.output / "report.json").unlink(missing_ok=True)
    started = time.time()
    paths = sorted((ROOT / "notebooks" / "en").glob("0*.ipynb"))
    for number, path in enumerate(paths, 1):
        print(f"[{number}/{len(paths)}] {path.stem:20} ", end="", flush=True)
        begun = time.time()
        try:
            notebook, cost = run(path, course.output, options.cell_seconds)
        except (CellExecutionError, DeadKernelError, TimeoutError) as error:
            reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
            print(f"FAILED after {time.time() - begun:.0f} s\n{reason}")
            return 1
        record(course.output, path.stem, **cost)
        if options.store:
            write(notebook, path.stem, cost)
        nbformat.write(notebook, path if options.store else executed / path.name)
        print(f"{cost['seconds']:5.0f} s  {cost['memory_mib']:6,.0f} MiB of memory")
    summary(course, time.time() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
