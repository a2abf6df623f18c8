"""The products of a layer's routed experts with LoRA, forward and backward, as one node of autograd's graph.

Left to itself, autograd keeps for the backward pass every tensor between two operations: the permuted rows, the gate,
its activation, the weighted rows, and weights that were unpacked from 4 bits. Here it keeps the hidden states and the
first product, and computes the rest again. So at few samples a step the activations of all layers fit beside the
weights, and no layer has to be computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from finetune.kernels import activated, activated_backward


class Routing(NamedTuple):
    """Which rows go to which expert.

    Attributes:
        token: (slots,), the token of each slot; slots are sorted by expert.
        slots: (tokens, k), the slots of each token.
        ends: (experts,) int32, where each expert's slots end.
        dropped: the number of the one slot for all experts of other processes; None where all are here.
    """

    token: torch.Tensor
    slots: torch.Tensor
    ends: torch.Tensor
    dropped: int | None

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (slots, hidden) -> (tokens, hidden): the sum over a token's slots, the dropped left out.

        It is also the gradient of `rows[token]`. Autograd's own adds with one atomic operation a number, which is slow
        on a GPU and not in a fixed order.
        """
        if self.dropped is None:
            return rows[self.slots.flatten()].view(*self.slots.shape, -1).sum(1)
        return F.embedding_bag(self.slots, rows, mode="sum", padding_idx=self.dropped)  # reads only what is here


class Experts(Protocol):
    """What the products ask of the layer."""

    keep_unpacked: bool
    packed: dict[str, Any]

    def read(self, name: str) -> torch.Tensor:
        """The fused tensor (experts, out, in), unpacked if it is stored in 4 bits."""


class Factors(NamedTuple):
    """The adapter of one fused tensor: A (experts, rank, in), B (experts, out, rank), the scale of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def prepared(self, like: torch.Tensor) -> Factors:
        """As grouped products want them: in the weights' type, the scale in B, rows of 16 bytes.

        A rank below 8 (in bf16) is filled up with zeros.
        """
        fill = -self.a.shape[1] % (16 // like.element_size())
        a = F.pad(self.a.to(like.dtype), (0, 0, 0, fill))
        return Factors(a, F.pad(self.b.to(like.dtype) * self.scale, (0, fill)).contiguous(), 1.0)

    def gradients(self, grad_a: torch.Tensor, grad_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the factors, from those of the prepared ones."""
        rank = self.a.shape[1]
        return grad_a[:, :rank].to(self.a.dtype), grad_b[..., :rank].to(self.b.dtype) * self.scale


def _product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`W x` in each group: (slots, in), (experts, out, in) -> (slots, out)."""
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def project(
    x: torch.Tensor, weight: torch.Tensor, factors: Factors | None, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`W x + B (A x)` in each group, and `A x`; without an adapter `W x` and None.

    Args:
        x: (slots, in). weight: (experts, out, in). factors: prepared. ends: (experts,).
    """
    y = _product(x, weight, ends)
    if factors is None:
        return y, None
    narrow = _product(x, factors.a, ends)
    return y.add_(_product(narrow, factors.b, ends)), narrow


def project_backward(
    weight: torch.Tensor, factors: Factors | None, ends: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of `project` (slots, out) -> those of `x` and of `A x`."""
    grad_x = F.grouped_mm(grad, weight, offs=ends)
    if factors is None:
        return grad_x, None
    grad_narrow = F.grouped_mm(grad, factors.b, offs=ends)
    return grad_x.add_(F.grouped_mm(grad_narrow, factors.a, offs=ends)), grad_narrow


class ExpertProducts(torch.autograd.Function):
    """All routed experts of a layer: permute, gate and up, activation, down, unpermute."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: Experts,
        routing: Routing,
        scales: tuple[float, float],
        hidden: torch.Tensor,
        weights: torch.Tensor,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden (tokens, hidden), weights (slots,), A and B of gate_up and of down -> (tokens, hidden).

        Args:
            layer: where the weights are. routing: of the slots. scales: of gate_up's adapter and of down's.
        """
        first, second = _both(factors, scales)
        gate_up = layer.read("gate_up_proj")
        x = hidden.to(gate_up.dtype)[routing.token]
        # The routing weights are applied before the last product, where the rows are short.
        h, narrow = project(x, gate_up, first and first.prepared(gate_up), routing.ends)
        del x
        down = layer.read("down_proj")
        y, narrow_down = project(activated(h, weights), down, second and second.prepared(down), routing.ends)
        ctx.layer, ctx.dropped, ctx.scales = layer, routing.dropped, scales
        # Saved as tensors, so that a layer to be computed again does not keep them after its first forward pass.
        kept = (gate_up, down) if layer.keep_unpacked or not layer.packed else (None, None)
        ctx.save_for_backward(hidden, weights, h, narrow, narrow_down, *routing[:3], *kept, *factors)
        return routing.sums(y).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """(tokens, hidden) -> the gradients of hidden, weights and factors."""
        hidden, weights, h, narrow, narrow_down, token, slots, ends, gate_up, down, *factors = ctx.saved_tensors
        first, second = _both(factors, ctx.scales)
        grad_a = grad_b = grad_a_down = grad_b_down = None

        grad_y = grad.to(h.dtype)[token]
        down = ctx.layer.read("down_proj") if down is None else down
        grad_z, grad_narrow = project_backward(down, second and second.prepared(down), ends, grad_y)
        del down
        grad_h, grad_weights, z = activated_backward(h, weights, grad_z)
        if second is not None:
            grad_a_down, grad_b_down = second.gradients(*_outer(z, narrow_down, grad_narrow, grad_y, ends))
        del grad_y, grad_z, z

        gate_up = ctx.layer.read("gate_up_proj") if gate_up is None else gate_up
        grad_x, grad_narrow = project_backward(gate_up, first and first.prepared(gate_up), ends, grad_h)
        del gate_up
        if first is not None:
            x = hidden.to(h.dtype)[token]
            grad_a, grad_b = first.gradients(*_outer(x, narrow, grad_narrow, grad_h, ends))
        grad_hidden = Routing(token, slots, ends, ctx.dropped).sums(grad_x).to(hidden.dtype)
        return None, None, None, grad_hidden, grad_weights, grad_a, grad_b, grad_a_down, grad_b_down


def _both(factors: Any, scales: tuple[float, float]) -> list[Factors | None]:
    pairs = zip(factors[::2], factors[1::2], scales, strict=True)
    return [Factors(a, b, scale) if a is not None else None for a, b, scale in pairs]


def _outer(
    x: torch.Tensor, narrow: Any, grad_narrow: Any, grad: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of A (experts, rank, in) and of B (experts, out, rank)."""
    return (
        F.grouped_mm(grad_narrow.transpose(0, 1), x, offs=ends),
        F.grouped_mm(grad.transpose(0, 1), narrow, offs=ends),
    )
