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


def turns(cos: torch.Tensor, sin: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `rotated` wants, from cos and sin of (tokens, rotated dimensions), which come first in a head of `dim`.

    Returns:
        (tokens, dim) what each number is multiplied with, (tokens, dim) what its partner is, and (dim,) which that is.
    """
    half, rest = cos.shape[-1] // 2, dim - cos.shape[-1]
    order = torch.arange(dim, device=cos.device)
    partner = torch.cat([order[half : 2 * half], order[:half], order[2 * half :]])
    sign = torch.where(order[: 2 * half] < half, -1.0, 1.0)
    return F.pad(wide(cos), (0, rest), value=1.0), F.pad(wide(sin) * sign, (0, rest)), partner


@one_kernel
def rotated(x: torch.Tensor, own: torch.Tensor, others: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of each head, (tokens, heads, dim); the rest from `turns`.

    With `-others` it is the way back, and so the gradient.
    """
    return (wide(x) * own.unsqueeze(1) + wide(x[..., partner]) * others.unsqueeze(1)).to(x.dtype)
