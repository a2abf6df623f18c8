"""Runs a notebook without a browser: every cell has a limit, a cell that takes long is named, and no reply is lost.

nbclient waits for the reply to a cell on a socket, and writes to the same socket what a widget's output holds. A write
may take the signal that a reply has come; nbclient then waits for a signal that never comes, with the reply in reach.
The longer the output, the likelier. So the wait is cut into slices, and each slice looks for a reply itself.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client import AsyncKernelClient, AsyncKernelManager
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError
from nbformat import NotebookNode
from traitlets import Type

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402
from course.language import say  # noqa: E402

SLICE_SECONDS = 1.0
#: After so long, and twice as long, and so on, a line says which cell is waited for.
SAID_AFTER_SECONDS = 60.0
BUNDLED_SECONDS, OWN_SECONDS = 2_400, 24 * 3600


def cell_seconds(asked: int | None, bundled: bool) -> int:
    """The limit of a cell in seconds: as asked, else `COURSE_CELL_SECONDS`, else by the model.

    Training the bundled model takes minutes in one cell, GLM-4.5-Air hours.

    Raises:
        CourseError: `COURSE_CELL_SECONDS` is no whole number above 0.
    """
    return asked or utils.whole_number("COURSE_CELL_SECONDS") or (BUNDLED_SECONDS if bundled else OWN_SECONDS)


class Channel(AsyncZMQSocketChannel):
    """A channel whose wait for a message looks again every `SLICE_SECONDS`, signal or not."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message.

        Raises:
            Empty: none came within `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = SLICE_SECONDS if deadline is None else min(SLICE_SECONDS, max(deadline - time.monotonic(), 0))
            try:
                return await super().get_msg(timeout=left)
            except Empty:
                if deadline is not None and time.monotonic() >= deadline:
                    raise


class Client(AsyncKernelClient):
    """A kernel's client with such channels."""

    shell_channel_class = Type(Channel)
    iopub_channel_class = Type(Channel)


class Manager(AsyncKernelManager):
    """A kernel's manager that makes such clients."""

    client_factory = Type(Client)


class Waiting:
    """Says which cell is waited for, once it takes long; one cell at a time."""

    def __init__(self, name: str, limit: int, tell: Callable[[str], None]) -> None:
        self.name, self.limit, self.tell, self.cell, self.timer = name, limit, tell, "", None

    def begin(self, cell: NotebookNode, **_: Any) -> None:
        """A cell starts."""
        first = next((line for line in cell.source.splitlines() if line.strip()), "")
        self.cell = f"{cell.get('id', '')} ({first[:60]})"
        self._after(SAID_AFTER_SECONDS, SAID_AFTER_SECONDS)

    def _after(self, pause: float, waited: float) -> None:
        self.timer = threading.Timer(pause, self._say, (waited,))
        self.timer.daemon = True
        self.timer.start()

    def _line(self, waited: float) -> str:
        return say(
            "{notebook}: cell {cell} has been running for {seconds:.0f} s; it may take {limit} s.",
            notebook=self.name,
            cell=self.cell,
            seconds=waited,
            limit=self.limit,
        )

    def _say(self, waited: float) -> None:
        self.tell(self._line(waited))
        self._after(waited, 2 * waited)

    def end(self, **_: Any) -> None:
        """The cell has ended, or the run has."""
        if self.timer:
            self.timer.cancel()


def execute(
    notebook: NotebookNode,
    path: Path,
    limit: int,
    tell: Callable[[str], None] = print,
    on_cell_executed: Callable[[NotebookClient, NotebookNode], Awaitable[None] | None] = lambda client, cell: None,
) -> None:
    """Execute a notebook in place, in a fresh kernel that works in the folder of `path`.

    Args:
        notebook: what is executed. path: where it lies. limit: seconds that a cell may take.
        tell: takes the line about a cell that takes long.
        on_cell_executed: called after each cell that ran without an error, while the kernel lives.

    Raises:
        CellExecutionError, DeadKernelError: a cell failed, or its kernel died.
        CourseError: a cell took longer than its limit; the message names notebook and cell.
    """
    waiting = Waiting(path.stem, limit, tell)

    def ended(cell: NotebookNode, execute_reply: dict[str, Any], **_: Any) -> Awaitable[None] | None:
        waiting.end()
        return on_cell_executed(client, cell) if execute_reply["content"]["status"] == "ok" else None

    client = NotebookClient(
        notebook,
        timeout=limit,
        kernel_manager_class=Manager,
        resources={"metadata": {"path": str(path.parent)}},
        # The kernel's warning about its (signed, local) TCP ports would break the progress lines.
        extra_arguments=["--log-level=40"],
        on_cell_execute=waiting.begin,
        on_cell_executed=ended,
    )
    try:
        client.execute()
    except CellTimeoutError:
        raise utils.CourseError(
            say(
                "{notebook}: cell {cell} did not end within {seconds} s and was stopped. "
                "If it only needs longer, set COURSE_CELL_SECONDS.",
                notebook=path.stem,
                cell=waiting.cell,
                seconds=limit,
            )
        ) from None
    finally:
        waiting.end()
