"""The routed experts of a layer with LoRA: tokens permuted by expert, grouped products, tokens unpermuted.

peft adds the full-size update `B A` to a layer's experts in every forward pass: 1.5 billion numbers for one fused
tensor of GLM-4.5-Air. Here `W x + s B (A x)` is computed instead, in one grouped product for all experts of a layer.
`tests/test_engine.py` holds the result to peft's. Knows nothing of how adapters are saved, or of the rest of the model.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from finetune import quantize

#: Up to so many slots (tokens x experts a token) the processor does not wait for the GPU to count those of other
#: processes; their rows are computed and thrown away. Chosen, not measured.
NO_COUNT_BELOW = 2**14


class Adapter(Protocol):
    """What the experts ask of the adapter of one fused tensor."""

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A of shape (experts, rank, in), B of shape (experts, out, rank), and the scale; None if switched off."""


def sum_slots(rows: torch.Tensor, slots: torch.Tensor, dropped: int | None) -> torch.Tensor:
    """Rows (slots, hidden), slots (tokens, k) -> (tokens, hidden): the sum over a token's slots, the dropped left out.

    Args:
        dropped: the number of the one slot for all experts of other processes; None where all are here.
    """
    if dropped is None:
        return rows[slots.flatten()].view(*slots.shape, -1).sum(1)
    return F.embedding_bag(slots, rows, mode="sum", padding_idx=dropped)  # reads only the rows that are here


class Permute(torch.autograd.Function):
    """`x[token]`: each token's row to the slots of its experts, sorted by expert.

    The gradient is the sum over a token's slots, as in `Unpermute`. That of plain indexing adds with one atomic
    operation a number, slow on a GPU and not in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, token: torch.Tensor, slots: torch.Tensor, dropped: int | None
    ) -> torch.Tensor:
        """X (tokens, hidden), token (slots,), slots (tokens, k) -> (slots, hidden)."""
        ctx.save_for_backward(slots)
        ctx.dropped = dropped
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """(slots, hidden) -> (tokens, hidden)."""
        (slots,) = ctx.saved_tensors
        return sum_slots(grad.contiguous(), slots, ctx.dropped), None, None, None


class Unpermute(torch.autograd.Function):
    """The way back: a token's row is the sum over its slots. Its gradient is that of `Permute` turned round."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, token: torch.Tensor, slots: torch.Tensor, dropped: int | None
    ) -> torch.Tensor:
        """Y (slots, hidden), token (slots,), slots (tokens, k) -> (tokens, hidden)."""
        ctx.save_for_backward(token)
        return sum_slots(y, slots, dropped)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """(tokens, hidden) -> (slots, hidden)."""
        (token,) = ctx.saved_tensors
        return grad[token], None, None, None


class GroupedExperts(Glm4MoeExperts):
    """All routed experts of one layer, their adapters and their 4-bit states.

    Attributes:
        adapters: name of a fused tensor to its adapter; `lora.GroupedLora` enters itself.
        packed: name of a fused tensor to its quantisation state; `quantize.FourBitExperts` enters it.
        first_expert: which of the layer's experts is the first here; `parallel.AllGatherExperts` sets it.
        num_experts: how many experts are here; transformers lowers it where processes share them out.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.adapters: dict[str, Adapter] = {}
        self.packed: dict[str, Any] = {}
        self.first_expert = 0

    def read(self, name: str, experts: torch.Tensor | None = None) -> torch.Tensor:
        """The fused tensor (experts, out, in), unpacked if it is stored in 4 bits; of some experts only if given."""
        stored = getattr(self, name)
        return quantize.unpacked(stored, self.packed[name], experts) if name in self.packed else stored

    def _factors(self, name: str, experts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """The adapter's factors of the experts that are here, or of those given."""
        adapter = self.adapters.get(name)
        found = adapter.factors() if adapter else None
        if found is None:
            return None
        a, b, scale = found
        if a.shape[0] > self.num_experts:  # the factors are whole in every process, the experts shared out
            assert self.first_expert % self.num_experts == 0 and self.first_expert < a.shape[0], self.first_expert
            a, b = (factor[self.first_expert : self.first_expert + self.num_experts] for factor in (a, b))
        return (a, b, scale) if experts is None else (a[experts], b[experts], scale)

    def _project(self, name: str, x: torch.Tensor, ends: torch.Tensor, experts: torch.Tensor | None) -> torch.Tensor:
        """Rows sorted by expert (slots, in) -> (slots, out): the weights' product and the adapter's."""
        weight = self.read(name, experts)
        x = x.to(weight.dtype)
        y = F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
        if (found := self._factors(name, experts)) is None:
            return y
        a, b, scale = found
        # A grouped product wants rows of 16 bytes, so a rank below 8 (in bf16) is filled up with zeros.
        fill = -a.shape[1] % (16 // x.element_size())
        a = F.pad(a.to(x.dtype), (0, 0, 0, fill)).transpose(-2, -1)
        b = F.pad(b.to(x.dtype) * scale, (0, fill)).contiguous().transpose(-2, -1)
        return y + F.grouped_mm(F.grouped_mm(x, a, offs=ends), b, offs=ends)

    def _one_token(self, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One token: only the weights of its experts, in batched products whose sizes are always the same.

        Nothing here makes the processor wait for the GPU, so that the whole step can be recorded as a CUDA graph.

        Args:
            hidden: (1, hidden). experts, weights: (k,), k different experts.

        Returns:
            (1, hidden), in the type of `hidden`.
        """

        def project(name: str, x: torch.Tensor) -> torch.Tensor:  # (k, in) -> (k, out)
            weight = self.read(name, experts) if name in self.packed else getattr(self, name)[experts]
            x = x.to(weight.dtype).unsqueeze(2)
            y = torch.bmm(weight, x)
            if (found := self._factors(name, experts)) is not None:
                a, b, scale = found
                y = y + torch.bmm(b.to(x.dtype) * scale, torch.bmm(a.to(x.dtype), x))
            return y.squeeze(2)

        x = self._apply_gate(project("gate_up_proj", hidden.expand(experts.shape[0], -1)))
        y = project("down_proj", x * weights.unsqueeze(1).to(x.dtype))
        return y.sum(0, keepdim=True).to(hidden.dtype)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens sorted by expert, then one grouped product for each weight and each factor.

        Args:
            hidden_states: (tokens, hidden). top_k_index, top_k_weights: (tokens, k); where the experts are shared out
                among processes, an index of `num_experts` is an expert elsewhere, which adds nothing here.

        Returns:
            (tokens, hidden), in the type of `hidden_states`.
        """
        tokens, k = top_k_index.shape
        if tokens == 1 and not torch.is_grad_enabled() and not self._is_expert_parallel:
            with torch.autocast(hidden_states.device.type, enabled=False):
                return self._one_token(hidden_states, top_k_index[0], top_k_weights[0])
        asked, dropped = None, None
        if self.packed and tokens * k < self.num_experts and not torch.is_grad_enabled():
            asked, top_k_index = torch.unique(top_k_index, return_inverse=True)  # unpack only these
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(order.shape[0], device=order.device)
        edges = torch.arange(1, (self.num_experts if asked is None else asked.shape[0]) + 1, device=order.device)
        ends = torch.searchsorted(chosen, edges).to(torch.int32)  # where each expert's rows end
        if self._is_expert_parallel:  # experts elsewhere come last: drop their slots
            dropped = order.shape[0] if order.shape[0] <= NO_COUNT_BELOW else int(ends[-1])
            order = torch.cat([order[:dropped], order[:1]])  # one slot more, for whatever is elsewhere
            slots = torch.where(slots < ends[-1], slots, dropped)
        slots = slots.view(tokens, k)
        token, weights = order // k, top_k_weights.reshape(-1).gather(0, order)
        if dropped is not None:
            weights = torch.where(torch.arange(dropped + 1, device=order.device) < ends[-1], weights, 0)
        with torch.autocast(hidden_states.device.type, enabled=False):  # grouped products do not take part in autocast
            x = Permute.apply(hidden_states, token, slots, dropped)
            x = self._apply_gate(self._project("gate_up_proj", x, ends, asked))
            # The routing weights are applied before the last product, where the rows are short.
            y = self._project("down_proj", x * weights.unsqueeze(1).to(x.dtype), ends, asked)
            return Unpermute.apply(y, token, slots, dropped).to(hidden_states.dtype)
