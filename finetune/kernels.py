"""Work element by element, each function one kernel on a GPU: its inputs are read once and its outputs written once.

`torch.compile` makes the kernels. On a processor the functions run as they are written. Nothing here knows autograd:
who calls them brings the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call with tensors on a GPU."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest: Any) -> Any:
        return (compiled() if first.is_cuda and find_spec("triton") else function)(first, *rest)

    return call


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@one_kernel
def activated(h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Gate and up side by side (slots, 2 inner), routing weights (slots,) -> (slots, inner): `silu(gate) up weight`."""
    gate, up = wide(h).chunk(2, dim=-1)
    return (F.silu(gate) * up * wide(weights).unsqueeze(1)).to(h.dtype)


@one_kernel
def activated_backward(
    h: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of `activated` (slots, inner) -> those of `h` and `weights`, and the output once more."""
    gate, up = wide(h).chunk(2, dim=-1)
    weight, grad = wide(weights).unsqueeze(1), wide(grad)
    share = torch.sigmoid(gate)
    silu = gate * share
    inner = grad * weight
    by_gate = inner * up * (share + silu * (1 - share))  # d silu / d gate = s + gate s (1 - s)
    grad_h = torch.cat([by_gate, inner * silu], dim=-1).to(h.dtype)
    return grad_h, (grad * silu * up).sum(1).to(weights.dtype), (silu * up * weight).to(h.dtype)


@one_kernel
def summed(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows (slots, hidden), slots (tokens, k) -> (tokens, hidden): the sum over a token's slots."""
    return rows[slots].sum(1)


@one_kernel
def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first part of each head: (tokens, heads, dim); cos, sin (tokens, rotated dimensions).

    With `-sin` it is the way back, and so the gradient.
    """
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = wide(turning).chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    done = wide(turning) * wide(cos).unsqueeze(1) + half * wide(sin).unsqueeze(1)
    return torch.cat([done.to(x.dtype), rest], dim=-1)
