"""Several processes: how this one was started, and expert parallelism (each keeps whole experts of its own).

transformers shards the weights (`model.py` asks it to). Here is how the tokens come to the experts and back: an
all-gather before them, a reduce-scatter after them. Knows nothing of LoRA.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from course.language import say
from utils import CourseError

#: The name under which `AllGatherExperts` is registered with transformers.
ALL_GATHER = "all_gather_experts"


@dataclass(frozen=True)
class Launched:
    """How this process was started: `processes` on all hosts, its `rank` among them, and the same for its own host."""

    processes: int = 1
    rank: int = 0
    on_this_host: int = 1
    rank_on_this_host: int = 0


def launched() -> Launched:
    """What `torchrun` or `accelerate launch` has left in the environment; one process without them.

    Raises:
        CourseError: some of a launcher's variables without the others, as a shell or a job scheduler may leave them.
    """
    numbers, address = ("WORLD_SIZE", "RANK", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ.get(name, "") for name in (*numbers, *address)}
    if found["WORLD_SIZE"] in ("", "1") and found["LOCAL_RANK"] in ("", "-1"):  # torch needs one of the two to start
        return Launched()
    missing = [name for name in numbers if not found[name].isdecimal()] + [n for n in address if not found[n]]
    if missing:
        left = [name for name in numbers if found[name]]
        words = {"missing": ", ".join(missing), "left": ", ".join(left)}
        raise CourseError(
            say(
                "{name}={value} is set, but no launcher has set {missing} with it. Unset {left}, "
                "or start with torchrun.",
                name=left[0],
                value=found[left[0]],
                **words,
            )
        )
    processes, rank, own = (int(found[name]) for name in numbers)
    # `accelerate launch` on one host leaves out how many there are on it.
    return Launched(processes, rank, int(os.environ.get("LOCAL_WORLD_SIZE") or processes), own)


def expert_parallel_size(config: Any, processes: int) -> int:
    """Over how many of the processes a layer's routed experts can be divided evenly, whole experts each."""
    return gcd(processes, config.n_routed_experts)


def require_expert_share(config: Any, processes: int) -> int:
    """The expert-parallel size, when it leaves every process at least one expert.

    Raises:
        CourseError: so many processes that one of them would get no expert.
    """
    size = expert_parallel_size(config, processes)
    replicas, experts = processes // size, config.n_routed_experts // size  # FSDP splits a share over its replicas
    if -(-experts // replicas) * (replicas - 1) >= experts:
        raise CourseError(
            say(
                "{processes} processes cannot share {experts} experts out. Use a number that divides {experts}.",
                processes=processes,
                experts=config.n_routed_experts,
            )
        )
    return size


def longest_of_all(length: int, device: torch.device) -> int:
    """The largest of the processes' numbers; all of them must ask."""
    if not dist.is_initialized():
        return length
    found = torch.tensor(length, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def _gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scatter(y: torch.Tensor, group: Any) -> torch.Tensor:
    out = y.new_empty(y.shape[0] // dist.get_world_size(group), *y.shape[1:])
    dist.reduce_scatter_single(out, y.contiguous(), group=group)
    return out


class AllGather(torch.autograd.Function):
    """The rows of all processes one below the other; the gradient is the reduce-scatter of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        """(rows, n) -> (processes * rows, n)."""
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(processes * rows, n) -> (rows, n)."""
        return _scatter(grad, ctx.group), None


class ReduceScatter(torch.autograd.Function):
    """The sum over all processes of the rows that belong to this one; the gradient is the all-gather of theirs."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, group: Any) -> torch.Tensor:
        """(processes * rows, n) -> (rows, n)."""
        ctx.group = group
        return _scatter(y, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(rows, n) -> (processes * rows, n)."""
        return _gather(grad, ctx.group), None


class AllGatherExperts(EPImplementation):
    """Each process runs its own experts on the tokens of all processes; the sums go back by reduce-scatter.

    transformers' `all_to_all` sends a token once for each of its 8 experts. Here it is sent once, and the answer,
    already summed, comes once. Every process must hold as many tokens as the others: `packing.pad_to` sees to that.
    """

    def __init__(self, experts: torch.nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        # The one source of which experts are here; `experts.GroupedExperts` takes its part of the adapter by it.
        self.first = experts.first_expert = ep_mesh.get_local_rank() * self.num_local_experts

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(tokens, hidden), (tokens, k), (tokens, k) of this process -> (tokens, hidden)."""
        group = self.ep_mesh.get_group()
        x, weights = AllGather.apply(hidden_states, group), AllGather.apply(top_k_weights, group)
        index = AllGather.apply(top_k_index, group) - self.first
        here = (index >= 0) & (index < self.num_local_experts)
        y = self.experts_forward(x, index.where(here, self.num_local_experts), weights)
        return ReduceScatter.apply(y, group)


EPImplementationInterface.register(ALL_GATHER, AllGatherExperts)
