"""What makes LoRA training of GLM-4.5-Air fast, small and safe at its full size; `train.py` and notebook 08 use it.

Knows packed rows, low-rank products grouped by expert, experts shared out among GPUs, 4-bit experts, and merging.
Does not know the data, the prompt or the optimiser: those stand in notebooks 03 to 05 and in `train.py`.
What fits and how long it takes is computed in `planner.py`.

Everything here computes the same function as the textbook way; tests/test_full_size.py holds it to that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoConfig, BitsAndBytesConfig, Glm4MoeForCausalLM
from transformers.data.data_collator import DataCollatorWithFlattening
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

import planner
from course.language import say
from utils import CourseError, shown

EXPERTS = ("gate_up_proj", "down_proj")
GROUPS = {
    "attention": "self_attn",
    "dense": "layers.0.mlp",
    "shared experts": "shared_experts",
    "routed experts": "mlp.experts",
}

# ------------------------------------------------------------------------------------------- LoRA, by groups


def lora_config(rank: int = 8, groups: tuple[str, ...] = tuple(GROUPS)) -> LoraConfig:
    """LoRA on the named groups, the update scaled by 4: as notebook 05 has it, chosen with `benchmarks/sweep.py`.

    Raises:
        CourseError: a group that is none of `GROUPS`.
    """
    if unknown := sorted(set(groups) - set(GROUPS)):
        message = "LoRA on {unknown}: no such group. There are: {groups}."
        raise CourseError(say(message, unknown=", ".join(unknown), groups=", ".join(GROUPS)))
    dense = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    tensors = []
    if "routed experts" in groups:
        tensors += [f"mlp.experts.{name}" for name in EXPERTS]
    if "shared experts" in groups:
        tensors += [f"shared_experts.{name}" for name in dense]
    if "dense" in groups:
        tensors += [f"layers.0.mlp.{name}" for name in dense]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=4 * rank,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if "attention" in groups else [],
        target_parameters=tensors,
    )


def attached(model: torch.nn.Module) -> dict[str, int]:
    """Trainable parameters of each group; whatever is trained outside the groups counts as `elsewhere`."""
    counts = dict.fromkeys([*GROUPS, "elsewhere"], 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[next((group for group, part in GROUPS.items() if part in name), "elsewhere")] += parameter.numel()
    return counts


def attach(model: torch.nn.Module, config: LoraConfig, grouped: bool = True) -> PeftModel:
    """The model with a new adapter; with `grouped`, in the form that `GroupedLora` computes.

    Raises:
        CourseError: a name that matches nothing, or dropout, which peft refuses on fused experts.
    """
    if config.lora_dropout and config.target_parameters:
        message = (
            "lora_dropout={dropout}: peft refuses dropout on fused tensors. Set it to 0, or adapt attention alone."
        )
        raise CourseError(say(message, dropout=config.lora_dropout))
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for target in [*(config.target_modules or ()), *(config.target_parameters or ())]:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            message = "LoRA target {target}: nothing in the model has this name, so nothing would be trained."
            raise CourseError(say(message, target=target))
    with experts_in_shape(model):
        model = get_peft_model(model, config)
    if grouped:
        group_by_expert(model)
    return model


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors alone, which are whole in every process; what `save_pretrained(state_dict=...)` takes."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


def load_adapter(model: torch.nn.Module, folder: Path, grouped: bool = True) -> PeftModel:
    """The model with a saved adapter; the weights may be bf16 or 4-bit, whatever it was trained on.

    Raises:
        CourseError: no adapter there, weights that are not safetensors, or an adapter of another model.
    """
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file() or not weights.is_file():
        message = "{folder}: no adapter_config.json and adapter_model.safetensors there."
        raise CourseError(say(message, folder=shown(folder)))
    adapter_fits(folder, model.config)
    with experts_in_shape(model):
        model = PeftModel.from_pretrained(model, str(folder))
    if grouped:
        group_by_expert(model)
    return model


def adapter_fits(folder: Path, config: Any) -> None:
    """Compare the adapter's shapes with the model's configuration.

    Raises:
        CourseError: it was trained on a model with other sizes, or more layers.
    """
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    layers = 1 + max((int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))), default=-1)
    if all(".layers.0." in name for name in names):  # dense layer alone: nothing is known of the others
        layers = config.num_hidden_layers
    hidden = next((shape[1] for name, shape in shapes.items() if "q_proj.lora_A" in name), config.hidden_size)
    rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    experts = {shape[0] // rank for name, shape in shapes.items() if re.search(r"mlp\.experts\..*lora_A", name)}
    found = (hidden, layers, experts.pop() if experts else config.n_routed_experts)
    wanted = (config.hidden_size, config.num_hidden_layers, config.n_routed_experts)
    if found != wanted:
        sizes = []
        for hidden, layers, experts in (found, wanted):
            message = "hidden size {hidden}, {layers} layers, {experts} routed experts"
            sizes.append(say(message, hidden=hidden, layers=layers, experts=experts))
        message = "{folder} was trained on another model ({found}); this one has {wanted}. Nothing was loaded."
        raise CourseError(say(message, folder=shown(folder), found=sizes[0], wanted=sizes[1]))


# ------------------------------------------------------------------ low-rank products, grouped by expert


class GroupedLora(ParamWrapper):
    """peft's wrapper of a tensor, computing `W x + s B (A x)` instead of `(W + s B A) x`.

    peft adds the full-size update `B A` to a layer's experts in every forward pass: 1.5 billion numbers for one
    fused tensor of GLM-4.5-Air. The two factors hold 128 x 8 rows each.
    """

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A of shape (experts, rank, in), B of shape (experts, out, rank), and the scale; None if switched off."""
        if self.disable_adapters or self.merged:
            return None
        name = self.active_adapters[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)  # peft's order: the rank before the expert
        return a, b, self.scaling[name]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base layer gives, with the update; fused experts add it themselves."""
        if len(self.active_adapters) != 1:
            message = "{count} adapters are active at once; here it is one."
            raise CourseError(say(message, count=len(self.active_adapters)))
        found = None if self.num_experts > 1 else self.factors()
        if found is None:
            return self.base_layer(x, *args, **kwargs)
        a, b, scale = found
        return self.base_layer(x) + F.linear(F.linear(x, a[0].to(x.dtype)), b[0].to(x.dtype)) * scale


def group_by_expert(model: PeftModel) -> None:
    """Let every wrapper of a tensor compute as `GroupedLora` does, and the experts find theirs by name."""
    for module in model.modules():
        if type(module) is ParamWrapper:
            module.__class__ = GroupedLora
            if module.num_experts > 1:
                experts = module.get_base_layer()
                experts.adapters = {**experts.__dict__.get("adapters", {}), module.parameter_name: module}
    model.get_base_model().set_experts_implementation("grouped_lora")


def summed(rows: torch.Tensor, places: torch.Tensor, nobodys: int | None) -> torch.Tensor:
    """Rows (places, hidden), places (tokens, k) -> (tokens, hidden): the sum over a token's places, but for one."""
    if nobodys is None:
        return rows[places.flatten()].view(*places.shape, -1).sum(1)
    return F.embedding_bag(places, rows, mode="sum", padding_idx=nobodys)  # reads only the rows that are here


class Spread(torch.autograd.Function):
    """`x[token]`: each token's row to the places of its experts, sorted by expert.

    The gradient is the sum over a token's places, as in `Summed`. That of plain indexing adds with one atomic
    operation a number, slow on a GPU and not in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, token: torch.Tensor, places: torch.Tensor, nobodys: int | None
    ) -> torch.Tensor:
        """X (tokens, hidden), token (places,), places (tokens, k) -> (places, hidden); `nobodys` place is left out."""
        ctx.save_for_backward(places)
        ctx.nobodys = nobodys
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """(places, hidden) -> (tokens, hidden)."""
        (places,) = ctx.saved_tensors
        return summed(grad.contiguous(), places, ctx.nobodys), None, None, None


class Summed(torch.autograd.Function):
    """The way back: a token's row is the sum over its places. The opposite of `Spread`, gradient and all."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, token: torch.Tensor, places: torch.Tensor, nobodys: int | None
    ) -> torch.Tensor:
        """Y (places, hidden), token (places,), places (tokens, k) -> (tokens, hidden)."""
        ctx.save_for_backward(token)
        return summed(y, places, nobodys)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """(tokens, hidden) -> (places, hidden)."""
        (token,) = ctx.saved_tensors
        return grad[token], None, None, None


#: Up to so many places nobody waits for the GPU to count those that are here; rows elsewhere are computed and thrown
#: away. Chosen, not measured.
FEW_PLACES = 2**14


def grouped_lora_experts(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The routed experts: tokens sorted by expert, then one grouped product for each weight and each factor.

    Args:
        self: transformers' experts module, its weights (experts, out, in) in any form that reads as a tensor.
        hidden_states: (tokens, hidden). top_k_index, top_k_weights: (tokens, k); where the experts are shared out
            among processes, an index of `num_experts` is an expert elsewhere, which adds nothing here.

    Returns:
        (tokens, hidden), in the type of `hidden_states`.
    """
    tokens, k = top_k_index.shape
    few, nobodys = None, None
    if "packed" in self.__dict__ and tokens * k < self.num_experts and not torch.is_grad_enabled():
        few, top_k_index = torch.unique(top_k_index, return_inverse=True)  # unpack only who is asked
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=order.device)
    edges = torch.arange(1, (self.num_experts if few is None else few.shape[0]) + 1, device=order.device)
    ends = torch.searchsorted(chosen, edges).to(torch.int32)  # where each expert's tokens end
    if self.__dict__.get("_is_expert_parallel"):  # experts elsewhere come last: leave their places out
        nobodys = order.shape[0] if order.shape[0] <= FEW_PLACES else int(ends[-1])
        order = torch.cat([order[:nobodys], order[:1]])  # one place more, for whatever is elsewhere
        places = torch.where(places < ends[-1], places, nobodys)
    places = places.view(tokens, k)
    token, weights = order // k, top_k_weights.reshape(-1).gather(0, order)
    if nobodys is not None:
        weights = torch.where(torch.arange(nobodys + 1, device=order.device) < ends[-1], weights, 0)

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = read(self, name, few)
        x = x.to(weight.dtype)
        y = F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
        adapter = self.__dict__.get("adapters", {}).get(name)
        if adapter is not None and (found := adapter.factors()):
            a, b, scale = found
            if a.shape[0] > self.num_experts:  # the factors are whole in every process, the experts shared out
                first = own_rank() % (a.shape[0] // self.num_experts) * self.num_experts
                a, b = (factor[first : first + self.num_experts] for factor in (a, b))
            if few is not None:
                a, b = a[few], b[few]
            # A grouped product wants rows of 16 bytes, so a rank below 8 (in bf16) is filled up with zeros.
            fill = -a.shape[1] % (16 // x.element_size())
            a = F.pad(a.to(x.dtype), (0, 0, 0, fill)).transpose(-2, -1)
            b = F.pad(b.to(x.dtype) * scale, (0, fill)).contiguous().transpose(-2, -1)
            y = y + F.grouped_mm(F.grouped_mm(x, a, offs=ends), b, offs=ends)
        return y

    with torch.autocast(hidden_states.device.type, enabled=False):  # grouped products do not take part in autocast
        x = Spread.apply(hidden_states, token, places, nobodys)
        x = self._apply_gate(project("gate_up_proj", x))
        y = project("down_proj", x * weights.unsqueeze(1).to(x.dtype))  # weighted here: the rows are short
        return Summed.apply(y, token, places, nobodys).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("grouped_lora", grouped_lora_experts)

# ------------------------------------------------------------------------- experts shared out among processes


reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its name since torch 2.13


class Everyones(torch.autograd.Function):
    """The rows of all processes one below the other; a row's gradient is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        """(rows, n) -> (processes * rows, n)."""
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(processes * rows, n) -> (rows, n)."""
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None


class Own(torch.autograd.Function):
    """The sum over all processes of the rows that are this one's. The opposite of `Everyones`, gradient and all."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, group: Any) -> torch.Tensor:
        """(processes * rows, n) -> (rows, n)."""
        ctx.group = group
        return Everyones.backward(ctx, y)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(rows, n) -> (processes * rows, n)."""
        return Everyones.forward(ctx, grad, ctx.group), None


class TokensToExperts(EPImplementation):
    """Each process runs its own experts on the tokens of all, and everybody gets the sums of their own tokens.

    transformers' `all_to_all` sends a token once for each of its 8 experts. Here it is sent once, and the answer,
    already summed, comes once. Both wait in every layer until the processor has read a count; here not for few tokens.
    """

    longest = 0  # tokens of the longest row that any process has in this pass

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(tokens, hidden), (tokens, k), (tokens, k) of this process -> (tokens, hidden)."""
        group, tokens = self.ep_mesh.get_group(), hidden_states.shape[0]
        fill = (0, 0, 0, TokensToExperts.longest - tokens)
        x = Everyones.apply(F.pad(hidden_states, fill), group)
        weights = Everyones.apply(F.pad(top_k_weights, fill), group)
        index = Everyones.apply(F.pad(top_k_index, fill, value=-1), group)
        index = index - self.ep_mesh.get_local_rank() * self.num_local_experts
        here = (index >= 0) & (index < self.num_local_experts)
        y = self.experts_forward(x, index.where(here, self.num_local_experts), weights)
        return Own.apply(y, group)[:tokens]


def agree_on_length(module: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
    """Before a pass of the model: how long the longest row of any process is, once for all layers."""
    length = torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
    dist.all_reduce(length, op=dist.ReduceOp.MAX)
    TokensToExperts.longest = int(length)


EPImplementationInterface.register("tokens_to_experts", TokensToExperts)

# ------------------------------------------------------------------------------------------------- loading


def ranks() -> int:
    """How many processes `torchrun` or `accelerate launch` started for this run on all hosts; 1 without them."""
    return planner.launched().processes


def own_rank() -> int:
    """Which of the `ranks` this process is."""
    return planner.launched().rank


def experts_apart(config: Any) -> int:
    """Over how many processes a layer's routed experts are shared out, each with experts of its own.

    Raises:
        CourseError: so many processes that one of them would get no expert.
    """
    apart = planner.experts_apart(config, ranks())
    alike, experts = ranks() // apart, config.n_routed_experts // apart  # `alike` processes split each share further
    if -(-experts // alike) * (alike - 1) >= experts:
        message = "{processes} processes cannot share {experts} experts out. Use a number that divides {experts}."
        raise CourseError(say(message, processes=ranks(), experts=config.n_routed_experts))
    return apart


def shard_header(path: Path) -> dict[str, Any]:
    """Name to type, shape and place of each tensor in a safetensors file.

    Raises:
        CourseError: the file is not as long as its header says, or the header itself is cut.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < 2**27 else {}
        except ValueError:
            header = {}
    header.pop("__metadata__", None)
    if not header or 8 + length + max(entry["data_offsets"][1] for entry in header.values()) != path.stat().st_size:
        message = "{path} is cut short or damaged. Delete it and run 02_download again."
        raise CourseError(say(message, path=shown(path)))
    return header


def check_shards(folder: Path) -> dict[str, Any]:
    """The headers of all shards, after seeing that every shard and every tensor of the model is there.

    Raises:
        CourseError: shards that are missing or cut short, or tensors that no shard holds, by name.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        message = (
            "{folder}: {count} of {all} shards are missing ({missing}). "
            "Run notebook 02_download again: it fetches only what is missing."
        )
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CourseError(say(message, folder=shown(folder), count=len(missing), all=len(names), missing=some))
    headers = {tensor: entry for name in names for tensor, entry in shard_header(folder / name).items()}
    config = AutoConfig.from_pretrained(folder)
    prediction = f"model.layers.{config.num_hidden_layers}."  # not used here, so not missed
    lost = [name for name, _, _ in planner.tensors(config) if name not in headers and not name.startswith(prediction)]
    if lost:
        message = (
            "{folder}: {count} tensors are in no shard ({lost}). "
            "This is no whole checkpoint of such a model; nothing was loaded."
        )
        some = lost[0] + (", ..." if len(lost) > 1 else "")
        raise CourseError(say(message, folder=shown(folder), count=len(lost), lost=some))
    return headers


def load_model(
    folder: Path, bits: int = 16, attention: str = "packed", experts: str = "grouped_lora"
) -> torch.nn.Module:
    """The model, ready for an adapter, in bounded host memory: shards are mapped and go to their device at once.

    On a CPU it is float32. On one GPU bf16, or with `bits=4` packed while it is read. Started by `torchrun` on
    several GPUs, each process keeps whole experts of its own, to which the others send their tokens (expert
    parallelism), and its share of all other weights (FSDP2), both by transformers; 4-bit weights are small enough
    that each process keeps all of them.

    Raises:
        CourseError: missing or damaged shards, neither 4 nor 16 bits, or more processes than experts to share out.
    """
    if bits not in (4, 16):
        raise CourseError(say("bits={bits}: 16 (bf16, float32 on a CPU) or 4 (NF4).", bits=bits))
    check_shards(folder)
    config = AutoConfig.from_pretrained(folder)
    gpu = torch.cuda.is_available()
    how: dict[str, Any] = {"attn_implementation": attention, "experts_implementation": experts}
    how["dtype"] = torch.bfloat16 if gpu else torch.float32
    if bits == 4:
        how["quantization_config"] = FourBit(bnb_4bit_compute_dtype=how["dtype"])
        how["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0")) if gpu else "cpu"}
    elif ranks() > 1:
        from transformers.distributed import DistributedConfig

        how["distributed_config"] = DistributedConfig(
            fsdp_size=ranks(), ep_size=experts_apart(config), ep_implementation="tokens_to_experts"
        )
    elif gpu:
        how["device_map"] = "auto"
    # The layer after the last one predicts a second token; it is in the checkpoint and takes no part here.
    prediction, kind = rf"model\.layers\.{config.num_hidden_layers}\.", Glm4MoeForCausalLM
    kind._keys_to_ignore_on_load_unexpected = list({*(kind._keys_to_ignore_on_load_unexpected or ()), prediction})
    model = kind.from_pretrained(folder, **how)
    if "distributed_config" in how:
        model.register_forward_pre_hook(agree_on_length, with_kwargs=True)
    model.config.use_cache = False  # training reads each row once
    return model


# --------------------------------------------------------------------------------- packed rows, no padding


class PackedRows(DataCollatorWithFlattening):
    """The samples of a batch end to end in one row, with what the model needs to keep them apart.

    Adds to transformers' collator: logits are computed only where a label is (151,552 numbers for each position
    saved), and the labels come already shifted to the position that predicts them.
    """

    def __init__(self) -> None:
        super().__init__(return_flash_attn_kwargs=True)

    def __call__(self, features: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """[{input_ids, labels}, ...] -> input_ids, labels, position_ids (1, tokens); the kept positions and their
        labels (kept,); where samples begin (samples + 1,).
        """
        samples = [{key: sample[key] for key in ("input_ids", "labels")} for sample in features]
        batch = super().__call__(samples, *args, **kwargs)
        # Position t predicts label t + 1. The last one predicts nothing.
        predicts = torch.nonzero(batch["labels"][0, 1:] != -100).squeeze(1)
        batch["logits_to_keep"] = predicts
        batch["shift_labels"] = batch["labels"][0, predicts + 1]
        return batch


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a packed row; no mask of tokens x tokens is ever made.

    Args:
        query: (1, heads, tokens, dim). key, value: (1, key heads, tokens, dim).
        cu_seq_lens_q: where samples begin and the last one ends, (samples + 1,), int32.

    Returns:
        (1, tokens, heads, dim), and None for the weights.

    Raises:
        CourseError: the batch does not say where its samples begin.
    """
    if cu_seq_lens_q is None:
        raise CourseError(
            say("Packed attention got a batch that PackedRows did not make. Use it, or attention 'sdpa'.")
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # flash attention, which knows no CPU and no float32

        shared_keys = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}  # torch 2.12
        edges, longest = cu_seq_lens_q, max_length_q
        out = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scaling, window_size=(-1, 0), **shared_keys)
    else:
        parts = [
            F.scaled_dot_product_attention(
                *(x[start:end].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scaling, enable_gqa=True
            )
            for start, end in pairwise(cu_seq_lens_q.tolist())
        ]
        out = torch.cat(parts, dim=1).transpose(0, 1)
    return out.unsqueeze(0), None


AttentionInterface.register("packed", packed_attention)

# ----------------------------------------------------------------------------------------- 4-bit experts

NF4_EXPERTS = "bitsandbytes_4bit_experts"


class FourBit(BitsAndBytesConfig):
    """NF4 with compressed scales for every `Linear` but the head (as transformers does) and for the fused experts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kwargs.pop("bnb_4bit_compute_dtype", torch.bfloat16),
        )
        self.quant_method = NF4_EXPERTS


class FourBitExpertsQuantizer(Bnb4BitHfQuantizer):
    """Quantises each layer's experts as soon as they are loaded, so that one layer at most stands in bf16."""

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
            experts.__dict__.setdefault("packed", {})[tensor] = state
        self.states.clear()
        return super()._process_model_after_weight_loading(model, **kwargs)


def is_experts(name: str) -> bool:
    """Whether the tensor of this name is one of the fused experts'."""
    return name.endswith(tuple(f"mlp.experts.{tensor}" for tensor in EXPERTS))


def read(experts: torch.nn.Module, name: str, few: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (experts, out, in), unpacked if it is stored in 4 bits; of the experts `few` alone if given."""
    state = experts.__dict__.get("packed", {}).get(name)
    if state is None:
        return getattr(experts, name)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed = getattr(experts, name)
    if few is not None:
        # bitsandbytes keeps one scale for 64 numbers, itself in 8 bits: take the numbers and scales of these experts.
        outer, each = state.state2, state.absmax.shape[0] // state.shape[0]
        blocks = (few.unsqueeze(1) * each + torch.arange(each, device=few.device)).flatten()
        scale = outer.code[state.absmax[blocks].long()] * outer.absmax[blocks // outer.blocksize] + state.offset
        packed = packed.view(state.shape[0], -1)[few].view(-1, 1)
        state = QuantState(
            absmax=scale,
            shape=torch.Size((few.shape[0], *state.shape[1:])),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
    return dequantize_4bit(packed, state)


@contextmanager
def experts_in_shape(model: torch.nn.Module) -> Iterator[None]:
    """For the time being, packed experts show peft the shape and type that they stand for, in no memory."""
    packed = [(module, name) for module in model.modules() for name in module.__dict__.get("packed", {})]
    kept = [(module, name, module._parameters[name]) for module, name in packed]
    for module, name, parameter in kept:
        state = module.packed[name]
        shown_as = torch.empty(1, dtype=state.dtype, device=parameter.device).expand(state.shape)
        module._parameters[name] = torch.nn.Parameter(shown_as, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


AUTO_QUANTIZATION_CONFIG_MAPPING[NF4_EXPERTS] = FourBit
AUTO_QUANTIZER_MAPPING[NF4_EXPERTS] = FourBitExpertsQuantizer


# ------------------------------------------------------------------------------------------------- merging


def updates(adapter: Path, config: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """For each tensor of the checkpoint that the adapter changes, by its name there, how to make its update.

    The names are the checkpoint's own: one tensor for each expert, `gate` and `up` apart.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale, rank, experts = settings["lora_alpha"] / settings["r"], settings["r"], config.n_routed_experts
    inner = config.moe_intermediate_size
    file = safe_open(adapter / "adapter_model.safetensors", "pt")
    made: dict[str, Callable[[], torch.Tensor]] = {}

    def product(key: str) -> torch.Tensor:
        a, b = (file.get_tensor(f"{key}.lora_{part}.weight").float() for part in "AB")
        return scale * b @ a

    def of_expert(key: str, expert: int, start: int, end: int) -> torch.Tensor:
        a = file.get_slice(f"{key}.lora_A.weight")[expert * rank : (expert + 1) * rank].float()
        b = file.get_slice(f"{key}.lora_B.weight")[start:end].reshape(end - start, rank, experts)[:, :, expert].float()
        return scale * b @ a

    for name in file.keys():  # noqa: SIM118 (not a dictionary)
        if not name.endswith(".lora_A.weight"):
            continue
        key = name.removesuffix(".lora_A.weight")
        target = key.removeprefix("base_model.model.")
        if ".mlp.experts" not in target:
            made[f"{target}.weight"] = partial(product, key)
            continue
        layer = target[: target.index(".mlp.experts")]
        fused = file.get_slice(name).get_shape()[1] == config.hidden_size and target.endswith(".base_layer")
        parts = {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)}
        if not fused:
            parts = {"down_proj": (0, config.hidden_size)}
        for expert in range(experts):
            for part, (start, end) in parts.items():
                made[f"{layer}.mlp.experts.{expert}.{part}.weight"] = partial(of_expert, key, expert, start, end)
    return made


def merge(folder: Path, adapter: Path, out: Path, report: Callable[[str], None] = print) -> int:
    """The checkpoint with the adapter's update added, shard by shard: one shard at a time stands in memory.

    The result has the layout of the original, prediction layer and all, so that whatever serves that one serves it.

    Returns:
        How many tensors were changed.

    Raises:
        CourseError: a folder that holds something already, too little disk, a damaged checkpoint, or an adapter that
            was trained on another model. A shard appears under its name only when it is whole.
    """
    config = AutoConfig.from_pretrained(folder)
    adapter_fits(adapter, config)
    headers = check_shards(folder)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    change, changed = updates(adapter, config), 0
    if missed := sorted(set(change) - set(headers)):
        message = "{count} tensors of the adapter are not in {folder}: {first}, ..."
        raise CourseError(say(message, count=len(missed), folder=shown(folder), first=missed[0]))
    if out.is_dir() and any(out.iterdir()):
        message = "{folder} is not empty. Name a new folder, or empty this one. Nothing was written."
        raise CourseError(say(message, folder=shown(out)))
    parent = next(path for path in (out, *out.parents) if path.is_dir())
    if (free := shutil.disk_usage(parent).free) < 1.01 * total:
        message = (
            "The merged checkpoint takes {total:.1f} GiB, {free:.1f} GiB are free at {folder}. Nothing was written."
        )
        raise CourseError(say(message, total=total / 2**30, free=free / 2**30, folder=shown(parent)))
    out.mkdir(parents=True, exist_ok=True)
    shards = sorted(folder.glob("*.safetensors"))
    for number, shard in enumerate(shards, 1):
        tensors = {}
        with safe_open(shard, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(name)
                if name in change:
                    tensor = (tensor.float() + change[name]()).to(tensor.dtype)
                    changed += 1
                tensors[name] = tensor
        save_file(tensors, out / f"{shard.name}.part", metadata)
        (out / f"{shard.name}.part").rename(out / shard.name)
        report(f"shard {number} of {len(shards)}: {shard.name}")
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copy(path, out)
    return changed
