"""Loading the model for training or answering: on a processor, one GPU (bf16 or 4 bits), or several processes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, Glm4MoeForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, Glm4MoeRMSNorm

from finetune import checkpoint, packing, parallel, quantize
from finetune.config import mtp_layer_prefix
from finetune.experts import GroupedExperts
from finetune.read_ahead import ReadAhead


class NoMtpGlm4MoeForCausalLM(Glm4MoeForCausalLM):
    """The model without its MTP layer, which the checkpoint holds and training does not use."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = {re.escape(mtp_layer_prefix(config))}

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, files: Any, load_config: Any, *args: Any) -> Any:
        """As in transformers, with the weights for a GPU read ahead unless each process takes a share of a tensor."""
        load = Glm4MoeForCausalLM._load_pretrained_model
        if state_dict is not None or not _only_gpus(load_config):
            return load(model, state_dict, files, load_config, *args)
        with ReadAhead(files, unused=mtp_layer_prefix(model.config)) as tensors:
            return load(model, tensors, files, load_config, *args)

    # transformers looks into the source of the class's module for these two, and does not find its own classes here.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


def _only_gpus(load_config: Any) -> bool:
    """Whether every tensor goes whole to a GPU, none of them to memory, disk, or in parts to several processes."""
    places = [str(place) for place in (load_config.device_map or {}).values()]
    on_gpus = all(place.isdigit() or place.startswith("cuda") for place in places)
    return bool(places) and on_gpus and load_config.device_mesh is None and torch.cuda.is_available()


class OneKernelNorm(Glm4MoeRMSNorm):
    """The norm by torch's own kernel: transformers' writes a float32 copy of its input and reads it four times."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., hidden)."""
        if not hidden_states.is_cuda:
            return super().forward(hidden_states)
        with torch.autocast("cuda", enabled=False):  # which would give float32 back
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class GroupedGlm4MoeForCausalLM(NoMtpGlm4MoeForCausalLM):
    """The same with experts that compute an adapter's update as grouped products, and fewer kernels in each layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers[config.first_k_dense_replace :]:
            layer.mlp.experts = GroupedExperts(config)
        faster = {Glm4MoeRMSNorm: OneKernelNorm, Glm4MoeAttention: packing.PackedAttention}
        for module in self.modules():  # the same weights, computed with in another way
            module.__class__ = faster.get(type(module), type(module))


def load_model(
    folder: Path, load_in_4bit: bool = False, attention: str = "packed", grouped: bool = True
) -> NoMtpGlm4MoeForCausalLM:
    """The model, ready for an adapter, in bounded host memory.

    Shards are mapped, or for one GPU read a little ahead (`read_ahead`), and their tensors go to the device at once.

    On a CPU it is float32. On one GPU bf16, or with `load_in_4bit` packed while it is read. Started by `torchrun` on
    several GPUs, each process keeps whole experts of its own, to which the others send their tokens (expert
    parallelism), and its share of all other weights (FSDP2), both by transformers; 4-bit weights are small enough
    that each process keeps all of them.

    Args:
        attention: `packed` for batches of `PackedRows`, else a name that transformers knows.
        grouped: experts of `GroupedGlm4MoeForCausalLM`; else transformers' own, to whose weights peft adds the adapter.

    Raises:
        CourseError: missing or damaged shards, or more processes than experts to share out.
    """
    checkpoint.check_shards(folder)
    config = AutoConfig.from_pretrained(folder)
    processes, gpu = parallel.launched().processes, torch.cuda.is_available()
    how: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.bfloat16 if gpu else torch.float32}
    if not grouped and not load_in_4bit:
        how["experts_implementation"] = "grouped_mm"
    if load_in_4bit:
        how["quantization_config"] = quantize.FourBit(bnb_4bit_compute_dtype=how["dtype"])
        how["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0")) if gpu else "cpu"}
    elif processes > 1:
        from transformers.distributed import DistributedConfig

        share = parallel.require_expert_share(config, processes)
        how["distributed_config"] = DistributedConfig(
            fsdp_size=processes, ep_size=share, ep_implementation=parallel.ALL_GATHER
        )
    elif gpu:
        how["device_map"] = "auto"
    kind = GroupedGlm4MoeForCausalLM if grouped or load_in_4bit else NoMtpGlm4MoeForCausalLM
    model = kind.from_pretrained(folder, **how)
    for module in model.modules():
        # On a processor with AVX512-BF16, bitsandbytes (0.50.2) lays the weights out anew in the first evaluation, and
        # no training step can follow it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False  # training reads each row once
    return model
