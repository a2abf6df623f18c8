"""Reading a checkpoint ahead of its loading, in several threads.

While weights are packed into 4 bits, transformers reads them tensor by tensor in one thread, out of mapped files: the
GPU waits while the processor brings page after page into memory. Here threads read the tensors that are wanted next,
with plain reads into page-locked memory, from which a GPU copies fastest. `benchmarks/README.md` has the seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from finetune.checkpoint import damaged, shard_header

#: Bytes that are read and not yet asked for, at most (and one tensor more).
WINDOW = 2**30
#: Larger tensors are not page-locked: torch keeps such memory, in powers of two.
LOCKED = 2**26
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored: its file, its first byte there, its type and its shape."""

    path: Path
    begin: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor.

        Raises:
            CourseError: the file ends before it does.
        """
        locked = torch.cuda.is_available() and self.length <= LOCKED
        numbers = torch.empty(self.length, dtype=torch.uint8, pin_memory=locked)
        room = memoryview(numbers.numpy())
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            while room:
                if not (got := file.readinto(room)):
                    raise damaged(self.path)
                room = room[got:]
        return numbers.view(self.dtype).view(self.shape)


class Ahead:
    """Stands for one tensor in a state dict, as the slices of safetensors do: `ahead[...]` is the tensor."""

    def __init__(self, take: Callable[[], torch.Tensor]) -> None:
        self._take = take

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._take()[index]


class ReadAhead:
    """The tensors of a checkpoint, by name, read before they are asked for if they are asked for in the usual order.

    Args:
        files: the safetensors files. unused: the prefix of tensors that nobody will ask for.
        window: bytes to be read ahead. threads: how many read.

    Raises:
        CourseError: a file that is cut short; also when that is seen while tensors are read.
        KeyError: a type of numbers that `TYPES` does not have.
    """

    def __init__(self, files: Iterable[Path | str], unused: str, window: int = WINDOW, threads: int = 0) -> None:
        self._stored = {name: stored for file in files for name, stored in _tensors(Path(file))}
        order = sorted((name for name in self._stored if not name.startswith(unused)), key=_turn)
        self._waiting = dict.fromkeys(order)
        self._reading: dict[str, Future[torch.Tensor]] = {}
        self._window, self._ahead, self._lock = window, 0, Lock()
        self._pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 4))

    def __enter__(self) -> dict[str, Ahead]:
        self._fill()
        return {name: Ahead(lambda name=name: self._take(name)) for name in self._stored}

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _take(self, name: str) -> torch.Tensor:
        """The tensor; one that no thread has begun with is read here, so that any order comes to its end."""
        stored = self._stored[name]
        with self._lock:
            self._waiting.pop(name, None)
            if (begun := self._reading.pop(name, None)) is not None:
                self._ahead -= stored.length
        self._fill()
        return stored.read() if begun is None else begun.result()

    def _fill(self) -> None:
        """Have the next tensors read, until the window is full."""
        with self._lock:
            while self._waiting and self._ahead < self._window:
                name = next(iter(self._waiting))
                del self._waiting[name]
                self._ahead += self._stored[name].length
                self._reading[name] = self._pool.submit(self._stored[name].read)


def _tensors(path: Path) -> Iterable[tuple[str, Stored]]:
    with path.open("rb") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
    for name, entry in shard_header(path).items():
        begin, end = entry["data_offsets"]
        yield name, Stored(path, first + begin, end - begin, TYPES[entry["dtype"]], tuple(entry["shape"]))


def _turn(name: str) -> list[str | int]:
    """Sorts names as transformers asks for them: by layer, and one projection of all experts after the other."""
    moved = re.sub(r"experts\.(\d+)\.(\w+)", r"experts.\2.\1", name)
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", moved)]
