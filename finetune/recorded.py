"""Training steps as CUDA graphs: the kernels of a forward and a backward pass, recorded once and replayed.

A step of GLM-4.5-Air starts tens of thousands of short kernels. With few samples the GPU has done each before Python
has started the next one, so the step takes as long as Python needs. A recorded step is started by one call. What it
reads lies at fixed addresses and has fixed sizes, so batches are filled up to a few sizes, each recorded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from finetune.packing import pad_to

#: Rows are filled up to a multiple of so many tokens; fewer would mean more graphs, more would mean more idle work.
TOKENS = 128


def filled(batch: dict[str, Any], step: int = TOKENS) -> dict[str, Any]:
    """A batch of `PackedRows` in one of a few sizes, with the same loss and gradients.

    A sample without labels fills the row up, as in `packing.pad_to`; there is always one, so that a batch of so many
    samples has always as many beginnings. The positions whose logits are kept are filled up with position 0 and the
    label -100. The longest sample is said to be longer than it is, which attention allows.

    Args:
        batch: of `PackedRows`, on its device.
        step: sizes are multiples of it.
    """
    tokens, kept = batch["input_ids"].shape[1], batch["logits_to_keep"].shape[0]
    batch = pad_to(batch, step * (tokens // step + 1))
    more = -(-kept // step) * step - kept
    longest = -(-max(int(batch["max_length_q"]), int(batch["max_length_k"])) // step) * step
    return batch | {
        "logits_to_keep": F.pad(batch["logits_to_keep"], (0, more)),
        "shift_labels": F.pad(batch["shift_labels"], (0, more), value=-100),
        "max_length_q": longest,
        "max_length_k": longest,
    }


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
        self.inputs: dict[tuple[int, ...], dict[str, Any]] = {}
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph | None, torch.Tensor]] = {}
        self.pool: Any = None

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

    def _record(self, size: tuple[int, ...]) -> tuple[torch.cuda.CUDAGraph | None, torch.Tensor]:
        held = self.inputs[size]
        if not held["input_ids"].is_cuda:
            return None, torch.zeros(())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self._compute({name: value for name, value in held.items() if name != "items"}, held["items"])
        self.pool = graph.pool()  # all graphs share it: one replays at a time
        return graph, loss

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
        size += (batch["max_length_q"],)
        if size not in self.seen or (size not in self.graphs and len(self.graphs) >= self.most):
            self.seen.add(size)  # its kernels run once before they are recorded
            return self._compute(batch, items)
        if size not in self.graphs:
            self.inputs[size] = {
                n: v.clone() if torch.is_tensor(v) else v for n, v in (batch | {"items": items}).items()
            }
            self.graphs[size] = self._record(size)
        held, (graph, loss) = self.inputs[size], self.graphs[size]
        for name, value in (batch | {"items": items}).items():
            if torch.is_tensor(value):
                held[name].copy_(value)
        if graph is None:
            return self._compute({name: value for name, value in held.items() if name != "items"}, held["items"])
        graph.replay()
        return loss.clone()
