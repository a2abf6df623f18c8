"""The routed experts of a layer with LoRA: tokens permuted by expert, grouped products, tokens unpermuted.

peft adds the full-size update `B A` to a layer's experts in every forward pass: 1.5 billion numbers for one fused
tensor of GLM-4.5-Air. Here `W x + s B (A x)` is computed instead, in one grouped product for all experts of a layer.
`tests/test_engine.py` holds the result to peft's. Knows nothing of how adapters are saved, or of the rest of the model.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from finetune import products, quantize
from finetune.config import EXPERT_TENSORS
from finetune.kernels import activated

#: Up to so many slots (tokens x experts a token) the processor does not wait for the GPU to count those of other
#: processes; their rows are computed and thrown away. Chosen, not measured.
NO_COUNT_BELOW = 2**14


class Adapter(Protocol):
    """What the experts ask of the adapter of one fused tensor."""

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A of shape (experts, rank, in), B of shape (experts, out, rank), and the scale; None if switched off."""


class GroupedExperts(Glm4MoeExperts):
    """All routed experts of one layer, their adapters and their 4-bit states.

    Attributes:
        adapters: name of a fused tensor to its adapter; `lora.GroupedLora` enters itself.
        packed: name of a fused tensor to its quantisation state; `quantize.FourBitExperts` enters it.
        first_expert: which of the layer's experts is the first here; `parallel.AllGatherExperts` sets it.
        keep_unpacked: whether weights that a forward pass unpacked are kept for its backward pass. That saves time
            where a layer is computed again just before its backward pass, and is far too much for all layers at once.
        num_experts: how many experts are here; transformers lowers it where processes share them out.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.adapters: dict[str, Adapter] = {}
        self.packed: dict[str, Any] = {}
        self.first_expert = 0
        self.keep_unpacked = False

    def read(self, name: str, experts: torch.Tensor | None = None) -> torch.Tensor:
        """The fused tensor (experts, out, in), unpacked if it is stored in 4 bits; of some experts only if given."""
        stored = getattr(self, name)
        return quantize.unpacked(stored, self.packed[name], experts) if name in self.packed else stored

    def _factors(self, name: str, experts: torch.Tensor | None) -> products.Factors | None:
        """The adapter's factors of the experts that are here, or of those given."""
        adapter = self.adapters.get(name)
        found = adapter.factors() if adapter else None
        if found is None:
            return None
        a, b, scale = found
        if a.shape[0] > self.num_experts:  # the factors are whole in every process, the experts shared out
            assert self.first_expert % self.num_experts == 0 and self.first_expert < a.shape[0], self.first_expert
            a, b = (factor[self.first_expert : self.first_expert + self.num_experts] for factor in (a, b))
        return products.Factors(*((a, b) if experts is None else (a[experts], b[experts])), scale)

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
        routing = products.Routing(token, slots, ends, dropped)
        with torch.autocast(hidden_states.device.type, enabled=False):  # grouped products do not take part in autocast
            if torch.is_grad_enabled():
                found = [self._factors(name, None) or (None, None, 1.0) for name in EXPERT_TENSORS]
                (a, b, scale), (a_down, b_down, scale_down) = found
                both = scale, scale_down
                return products.ExpertProducts.apply(self, routing, both, hidden_states, weights, a, b, a_down, b_down)
            x = hidden_states[token]
            for name in EXPERT_TENSORS:
                weight, factors = self.read(name, asked), self._factors(name, asked)
                x = products.project(x.to(weight.dtype), weight, factors and factors.prepared(weight), ends)[0]
                if name == "gate_up_proj":
                    x = activated(x, weights)
            return routing.sums(x).to(hidden_states.dtype)


def keep_unpacked(model: torch.nn.Module, checkpointing: bool) -> None:
    """Say to all experts of a model whether their layers are computed again before their backward pass."""
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.keep_unpacked = checkpointing
