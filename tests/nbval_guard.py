"""A pytest plugin: a dead kernel fails its cell within seconds, where nbval alone would wait for the cell's limit."""

from __future__ import annotations

import time
from queue import Empty

from nbval.kernel import RunningKernel

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
