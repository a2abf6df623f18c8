"""Runs the notebooks in order, each in a fresh kernel, and says what came out.

`python tools/run_series.py` leaves executed copies in `output/executed` and what each cost in `output/measured.json`;
with `--store` the outputs and the measured headers are stored in the notebooks themselves, which is how they are made.
All of them are stored at the end or none: nothing when a notebook fails, nothing when a check of
`tests/notebook_checks.py` is not true after its cell, and nothing when other programs took so much
of the processor that the measured minutes are not the notebooks' (`--disturbed-anyway` stores them all the same).
The language is that of `COURSE_LANGUAGE`.
Every cell has a limit: `--cell-seconds N`, else the variable `COURSE_CELL_SECONDS`, else 40 minutes with the bundled
model and a day with another. A cell that takes more than a minute is named while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import disturbance
import headless
import languages
import nbformat
from headers import folder_mib, record, write
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402
from course.language import current, glossed, say, translated  # noqa: E402
from course.memory import peak_memory_gib  # noqa: E402


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


async def check_cell(client: NotebookClient, cell_id: str) -> None:
    """Ask the kernel for the checks of a cell that has just run.

    Raises:
        CourseError: one of them is not true.
    """
    import cell_checks  # it needs the folder of the tests, which a learner may have deleted

    if not (asked := cell_checks.request(cell_id)):
        return
    sent, reply = client.kc.execute(**asked), None
    while reply is None or reply["parent_header"].get("msg_id") != sent:
        reply = await client.kc.get_shell_msg(timeout=cell_checks.SECONDS)
    if found := cell_checks.complaints(cell_id, reply):
        raise utils.CourseError("\n".join(found))


def run(path: Path, output: Path, limit: int, checked: bool = False) -> tuple[nbformat.NotebookNode, dict[str, float]]:
    """The executed notebook, and what it cost: seconds, memory of its kernel and disk in MiB.

    Raises:
        CellExecutionError, DeadKernelError: a cell failed, or its kernel died.
        CourseError: a cell took longer than `limit` seconds, or a check of it is not true, if they are `checked`.

    """
    notebook = nbformat.read(path, as_version=4)
    peaks = [0.0]

    async def after(client: NotebookClient, cell: nbformat.NotebookNode) -> None:
        peaks.append(1024 * peak_memory_gib(client.km.provisioner.pid))
        if checked:
            await check_cell(client, cell.id)

    begun, before = time.time(), folder_mib(output)
    headless.execute(
        notebook,
        path,
        limit,
        tell=lambda line: print(f"\n{line} ", end="", flush=True),
        on_cell_executed=after,
    )
    clean(notebook)
    cost = {"seconds": time.time() - begun, "memory_mib": max(peaks), "disk_mib": folder_mib(output) - before}
    return notebook, cost


def summary(course: utils.Settings, seconds: float) -> None:
    """Print the before and after, the figures, and how to see the run."""
    figures = json.loads((course.output / "report.json").read_text(encoding="utf-8"))
    print("\n" + say("Before and after (greedy decoding)"))
    for question, base, adapter in figures["before_after"]:
        print(f"  {glossed(question)}")
        print(say("    base     {answer}", answer=glossed(base)))
        print(say("    adapter  {answer}", answer=glossed(adapter)))
    for name, (base, adapter) in figures["heldout"].items():
        on = say("On {name}", name=translated(name))
        lines = [(say("loss, nats a token"), *(f"{one[0]:.2f}" for one in (base, adapter)))]
        lines += [
            (what, *(f"{one[place]:.0%}" for one in (base, adapter)))
            for place, what in ((1, say("stops by itself")), (2, say("in role, by the rule of notebook 06")))
        ]
        print()
        utils.table(lines, (on, say("base"), say("adapter")))
    training, gib = figures["training_seconds"] / 60, figures["training_kernel_gib"]
    print(
        "\n"
        + say(
            "{minutes:.1f} minutes in all, {training:.1f} of them training; "
            "the training kernel held at most {gib:.2f} GiB.",
            minutes=seconds / 60,
            training=training,
            gib=gib,
        )
    )
    print(say("Executed notebooks, adapter and SwanLab run are in {folder}/.", folder=utils.shown(course.output)))
    print(say("See the run in the SwanLab dashboard:  make dashboard"))


def store(executed: dict[Path, tuple[nbformat.NotebookNode, dict[str, float]]]) -> None:
    """Put outputs and measured headers into the notebooks of the series: all of them, or none if one has a fault.

    Raises:
        ValueError: a Chinese notebook has another output than the English where no helper speaks.
    """
    made = {}
    for path, (notebook, cost) in executed.items():
        if path.parent == languages.EN:
            write(notebook, path.stem, cost)
            made[path] = notebook
        else:  # figures and all that no helper says come from the English run
            english = nbformat.read(languages.EN / path.name, as_version=4)
            made[path] = languages.stored(english, notebook, path.stem)
    for path, notebook in made.items():
        nbformat.write(notebook, path)


def main() -> int:
    """Run the series; 0 when every notebook ran and, with `--store`, was stored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="store_true", help="store outputs and headers in the notebooks")
    parser.add_argument("--disturbed-anyway", action="store_true", help="store a run that others have slowed down, too")
    parser.add_argument("--cell-seconds", type=int, help="limit of a cell, instead of COURSE_CELL_SECONDS")
    options = parser.parse_args()
    try:
        course = utils.start()
        limit = headless.cell_seconds(options.cell_seconds, course.bundled)
    except utils.CourseError as error:
        print(error)
        return 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    executed = course.output / "executed"
    executed.mkdir(parents=True, exist_ok=True)
    (course.output / "report.json").unlink(missing_ok=True)
    started = time.time()
    paths = sorted((ROOT / "notebooks" / current()).glob("0*.ipynb"))
    finished = {}
    for number, path in enumerate(paths, 1):
        print(f"[{number}/{len(paths)}] {path.stem:20} ", end="", flush=True)
        begun, watch = time.time(), disturbance.Watch.start()
        try:
            notebook, cost = run(path, course.output, limit, options.store)
        except (CellExecutionError, DeadKernelError, utils.CourseError) as error:
            reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
            print(say("FAILED after {seconds:.0f} s", seconds=time.time() - begun), reason, sep="\n")
            return 1
        record(course.output, path.stem, **cost)
        nbformat.write(notebook, executed / path.name)
        print(say("{seconds:5.0f} s  {mib:6,.0f} MiB of memory", seconds=cost["seconds"], mib=cost["memory_mib"]))
        finished[path] = (notebook, cost)
        # Only the English run's minutes are stored.
        minutes_count = options.store and current() == "en" and not options.disturbed_anyway
        if minutes_count and (refusal := disturbance.refusal(cost["seconds"], watch.share())):
            print(refusal)
            return 1
    if options.store:
        store(finished)
    summary(course, time.time() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
