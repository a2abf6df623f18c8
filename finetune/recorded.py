"""Training steps as CUDA graphs: the kernels of a forward and a backward pass, recorded once and replayed.

A step of GLM-4.5-Air starts tens of thousands of short kernels. With few samples the GPU has done each before Python
has started the next one, so the step takes as long as Python needs. A recorded step is started by one call. What it
reads lies at fixed addresses and has fixed sizes, so batches are filled up to a few sizes, each recorded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from finetune.packing import pad_to

#: Rows are filled up to a multiple of so many tokens; fewer would mean more graphs, more would mean more idle work.
TOKENS = 128


def size_of(tokens: int, step: int = TOKENS) -> int:
    """To how many tokens a batch of so many is filled up; always more, so that a sample is added."""
    return step * (tokens // step + 1)


def filled(batch: dict[str, Any], step: int = TOKENS) -> dict[str, Any]:
    """A batch of `PackedRows` in one of a few sizes, with the same loss and gradients.

    A sample without labels fills the row up, as in `packing.pad_to`; there is always one, so that a batch of so many
    samples has always as many beginnings, and with shared tokens as many keys. The positions whose logits are kept are
    filled up with position 0 and the label -100. The longest sample is said to be longer than it is, which attention
    allows.

    Args:
        batch: of `PackedRows`, on its device.
        step: sizes are multiples of it.
    """
    tokens, kept = batch["input_ids"].shape[1], batch["logits_to_keep"].shape[0]
    batch = pad_to(batch, size_of(tokens, step))
    more = -(-kept // step) * step - kept
    longest = -(-max(int(batch["max_length_q"]), int(batch["max_length_k"])) // step) * step
    return batch | {
        "logits_to_keep": F.pad(batch["logits_to_keep"], (0, more)),
        "shift_labels": F.pad(batch["shift_labels"], (0, more), value=-100),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def one_thread() -> torch.autograd.set_multithreading_enabled:
    """The backward pass in the thread that asks for it; one of its own would take its memory elsewhere."""
    return torch.autograd.set_multithreading_enabled(False)


class Recorded(NamedTuple):
    """One size: where its batches are put, its graph (None on a processor), and where the loss appears."""

    held: dict[str, Any]
    graph: torch.cuda.CUDAGraph | None
    loss: torch.Tensor


class RecordedSteps:
    """Forward and backward of a packed batch, recorded for each size from its second batch on.

    Gradients are added to those that are there, in buffers of their own that stay where they are. On a processor
    nothing is recorded, but the batch takes the same way through fixed memory.

    Args:
        model: what is called with the batch; all of it on one device, without dropout.
        most: so many sizes at most are recorded; others are computed kernel by kernel.
    """

    def __init__(self, model: torch.nn.Module, most: int = 32) -> None:
        self.model, self.most = model, most
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.seen: set[tuple[int, ...]] = set()
        self.graphs: dict[tuple[int, ...], Recorded] = {}
        self.pool = torch.cuda.MemPool() if torch.cuda.is_available() else None
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def _compute(self, batch: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        loss = self.model(**batch, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def _hold_gradients(self) -> None:
        """Gradients that an optimizer step has dropped are zero, and in their buffers again."""
        dropped = [i for i, parameter in enumerate(self.parameters) if parameter.grad is None]
        if dropped:
            torch._foreach_zero_([self.gradients[i] for i in dropped])
        for i in dropped:
            self.parameters[i].grad = self.gradients[i]

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Work in the memory of the recorded passes, beside which there may be none; its results have to be copied."""
        if self.pool is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with one_thread(), torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _record(self, batch: dict[str, Any]) -> Recorded:
        held = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
        if not held["input_ids"].is_cuda:
            return Recorded(held, None, torch.zeros(()))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            one_thread(),
            torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream),
        ):  # one replays at a time: they share it
            loss = self._compute({name: value for name, value in held.items() if name != "items"}, held["items"])
        return Recorded(held, graph, loss)

    def __call__(self, batch: dict[str, Any], items: torch.Tensor | int) -> torch.Tensor:
        """Add the gradients of a batch, and return its loss.

        Args:
            batch: of `PackedRows`, on the model's device.
            items: by how many labels the sum of the losses is divided.
        """
        batch = filled(batch)
        self._hold_gradients()
        items = torch.as_tensor(items, device=batch["input_ids"].device)
        size = (*batch["input_ids"].shape, *batch["cu_seq_lens_q"].shape, *batch["logits_to_keep"].shape)
        size += (batch["max_length_q"], *batch.get("key_places", torch.empty(0)).shape)
        if size not in self.seen or (size not in self.graphs and len(self.graphs) >= self.most):
            self.seen.add(size)  # its kernels run once before they are recorded
            with self.memory():
                loss = self._compute(batch, items)
            return loss.clone()  # the next pass writes over it
        batch = batch | {"items": items}
        if size not in self.graphs:
            self.graphs[size] = self._record(batch)
        held, graph, loss = self.graphs[size]
        for name, value in batch.items():
            if torch.is_tensor(value):
                held[name].copy_(value)
        if graph is None:
            return self._compute({name: value for name, value in held.items() if name != "items"}, held["items"])
        graph.replay()
        return loss.clone()
