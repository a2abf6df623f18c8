"""A pytest plugin for nbval: a dead kernel fails its cell within seconds, each notebook's cost is measured, and a cell
that takes more than a minute is named while it runs. After a cell, what `tests/notebook_checks.py` says must be true.

nbval alone would wait for the cell's limit. The costs go to `measured.json` in the folder that `COURSE_OUTPUT` names.
Cells whose ids `NOT_COMPARED` holds are executed, and their outputs are not compared (run_nbval.py says which and why).
"""

from __future__ import annotations

import os
import time
from queue import Empty
from typing import Any

import cell_checks
import headless
from headers import ROOT, folder_mib, record
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile

from course.memory import peak_memory_gib

_get_message = RunningKernel.get_message
SLICE_SECONDS = 2.0


def get_message_of_living_kernel(kernel: RunningKernel, stream: str, timeout: float | None = None) -> dict:
    """As `RunningKernel.get_message`, looking every two seconds whether the kernel is alive.

    Raises:
        Empty: no message within `timeout` seconds.
        RuntimeError: the kernel died.

    """
    deadline = None if timeout is None else time.monotonic() + float(timeout)
    while True:
        left = SLICE_SECONDS if deadline is None else min(SLICE_SECONDS, max(deadline - time.monotonic(), 0.01))
        try:
            return _get_message(kernel, stream, timeout=left)
        except Empty:
            if not kernel.is_alive():
                raise RuntimeError("the kernel died in this cell") from None
            if deadline is not None and time.monotonic() >= deadline:
                raise


RunningKernel.get_message = get_message_of_living_kernel

_compare = IPyNbCell.compare_outputs


def compare_outputs(item: IPyNbCell, *args: Any, **kwargs: Any) -> bool:
    """As `IPyNbCell.compare_outputs`, but for the cells that are not compared."""
    return item.cell.id in os.environ.get("NOT_COMPARED", "").split() or _compare(item, *args, **kwargs)


IPyNbCell.compare_outputs = compare_outputs


def check_cell(item: IPyNbCell) -> None:
    """Ask the kernel for the checks of a cell that has just run.

    Raises:
        NbCellError: one of them is not true.
    """
    if not (asked := cell_checks.request(item.cell.get("id", ""))):
        return
    sent, reply = item.parent.kernel.kc.execute(**asked), None
    while reply is None or reply["parent_header"].get("msg_id") != sent:
        reply = item.parent.kernel.get_message("shell", timeout=cell_checks.SECONDS)
    if found := cell_checks.complaints(item.cell.id, reply):
        item.raise_cell_error("A check of tests/notebook_checks.py failed", "\n".join(found))


_runtest = IPyNbCell.runtest


def runtest(item: IPyNbCell) -> None:
    """As `IPyNbCell.runtest`, with a line on the terminal about a cell that takes long, and with the cell's checks."""
    plugins = item.config.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")

    def tell(line: str) -> None:
        with capture.global_and_fixture_disabled():  # what a test prints is shown only where it fails
            terminal.write_line(f"\n{line}")

    limit = int(float(item.config.option.nbval_cell_timeout))
    waiting = headless.Waiting(item.parent.path.stem, limit, tell)
    waiting.begin(item.cell)
    try:
        _runtest(item)
        check_cell(item)
    finally:
        waiting.end()


IPyNbCell.runtest = runtest

_setup, _teardown = IPyNbFile.setup, IPyNbFile.teardown


def setup(file: IPyNbFile) -> None:
    """As `IPyNbFile.setup`, and note when and with what on disk the notebook began."""
    file.began, file.disk_before = time.monotonic(), folder_mib(ROOT / os.environ["COURSE_OUTPUT"])
    _setup(file)


def teardown(file: IPyNbFile) -> None:
    """Measure while the kernel still lives, then as `IPyNbFile.teardown`."""
    folder = ROOT / os.environ["COURSE_OUTPUT"]
    if file.kernel is not None and file.kernel.is_alive():
        seconds, pid = time.monotonic() - file.began, file.kernel.km.provisioner.pid
        record(folder, file.path.stem, seconds, 1024 * peak_memory_gib(pid), folder_mib(folder) - file.disk_before)
    _teardown(file)


IPyNbFile.setup, IPyNbFile.teardown = setup, teardown
