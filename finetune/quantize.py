"""4-bit weights: NF4 with double quantisation for every linear layer and for the fused experts.

bitsandbytes packs `Linear` modules only; 93 % of GLM-4.5-Air are fused experts, which are none. Here a layer's experts
are packed as soon as they are read, through transformers' own extension point for quantisers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.config import EXPERT_TENSORS

#: Bytes a number: 4 bits, a scale in 8 bits for 64 numbers, and the scale of those in 32 bits for 256 of them.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
METHOD = "bitsandbytes_4bit_experts"


class FourBit(BitsAndBytesConfig):
    """NF4 with compressed scales for every `Linear` but the head (as transformers does) and for the fused experts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kwargs.pop("bnb_4bit_compute_dtype", torch.bfloat16),
        )
        self.quant_method = METHOD


class FourBitExperts(Bnb4BitHfQuantizer):
    """Quantises each layer's experts as soon as they are loaded, so that at most one layer is held in bf16."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.states: dict[str, Any] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """The fused experts too."""
        return is_experts(param_name) or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        """How a tensor is packed once all its experts are read."""
        from bitsandbytes.functional import quantize_4bit
        from transformers.integrations.bitsandbytes import Bnb4bitQuantize

        states = self.states

        class Quantize(Bnb4bitQuantize):
            def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
                done = {}
                for name in [name for name in input_dict if is_experts(name)]:
                    value = input_dict.pop(name)
                    value = value[0] if isinstance(value, list) else value
                    packed, states[name] = quantize_4bit(value.contiguous(), quant_type="nf4", compress_statistics=True)
                    done[name] = torch.nn.Parameter(packed, requires_grad=False)
                return done | (super().convert(input_dict, *args, **kwargs) if input_dict else {})

        return Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, state in self.states.items():
            experts, tensor = get_module_from_name(model, name)
            experts.packed[tensor] = state
        self.states.clear()
        return super()._process_model_after_weight_loading(model, **kwargs)


def is_experts(name: str) -> bool:
    """Whether the tensor of this name is one of the fused experts'."""
    return name.endswith(tuple(f"mlp.experts.{tensor}" for tensor in EXPERT_TENSORS))


def unpacked(packed: torch.Tensor, state: Any, experts: torch.Tensor | None = None) -> torch.Tensor:
    """The fused tensor (experts, out, in) that is stored in 4 bits; of some experts only, if they are given.

    Args:
        packed: the stored bytes. state: bitsandbytes' `QuantState` of all experts. experts: their numbers.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    if experts is not None:
        # bitsandbytes keeps one scale for 64 numbers, itself in 8 bits: take the numbers and scales of these experts.
        outer, each = state.state2, state.absmax.shape[0] // state.shape[0]
        blocks = (experts.unsqueeze(1) * each + torch.arange(each, device=experts.device)).flatten()
        scale = outer.code[state.absmax[blocks].long()] * outer.absmax[blocks // outer.blocksize] + state.offset
        packed = packed.view(state.shape[0], -1)[experts].view(-1, 1)
        state = QuantState(
            absmax=scale,
            shape=torch.Size((experts.shape[0], *state.shape[1:])),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
    return dequantize_4bit(packed, state)


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FourBit
AUTO_QUANTIZER_MAPPING[METHOD] = FourBitExperts
