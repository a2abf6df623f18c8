"""The machine: which GPUs, how much memory and disk, and what the measured cards can do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from course.language import say
from course.memory import machine_memory_gib
from finetune.parallel import launched

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Attributes:
        gib: memory that torch can use. tflops: bf16 matrix products. copies: TB/s of memory.
        link: TB/s that one GPU receives from its neighbours; assumed, and of little weight in the measured runs.
    """

    gib: float
    tflops: float
    copies: float
    link: float


#: The cards that were measured; `OTHER_GPU` and `CPU` are assumed for all others.
CARDS = {"H100": Card(79.2, 792, 3.0, 0.35), "H200": Card(139.8, 782, 4.3, 0.35)}
OTHER_GPU = Card(79.2, 250, 1.7, 0.25)
CPU = Card(0, 0.1, 0.02, 0.005)


@dataclass(frozen=True)
class Machine:
    """What there is: GPUs (0 for none), GiB of each, what kind, free host memory and disk in GiB."""

    gpus: int
    gib_each: float
    card: str
    host_gib: float
    disk_gib: float

    def words(self) -> str:
        """The machine in a few words."""
        if not self.gpus:
            return say("no GPU, {gib:.0f} GiB of memory free", gib=self.host_gib)
        return say("{gpus} x {card} of {gib:.0f} GiB", gpus=self.gpus, card=self.card, gib=self.gib_each)

    def rates(self) -> Card:
        """What its card can do, measured or assumed."""
        return CARDS.get(self.card, OTHER_GPU if self.gpus else CPU)


def this_machine(folder: Path) -> Machine:
    """The GPUs, host memory and disk of this machine; the disk is that of `folder`.

    A process that a launcher started asks its own GPU only: asking for free memory opens a context on a GPU, which
    takes about half a GiB there.
    """
    import torch

    gpus, started = torch.cuda.device_count(), launched()
    asked = [started.rank_on_this_host % max(gpus, 1)] if started.processes > 1 else list(range(gpus))
    name = torch.cuda.get_device_name(asked[0]) if gpus else "CPU"
    gib = min((torch.cuda.mem_get_info(i)[0] / GIB for i in asked), default=0.0) if gpus else 0.0
    while not folder.exists():
        folder = folder.parent
    return Machine(
        gpus=gpus,
        gib_each=gib,
        card=next((card for card in CARDS if card in name), name),
        host_gib=machine_memory_gib()[1],
        disk_gib=shutil.disk_usage(folder).free / GIB,
    )
