"""LoRA: which weights get an adapter, attaching it, and reading a saved one.

The adapter's form is peft's, so what is saved here loads with peft alone. `GroupedLora` changes how the update of a
tensor is computed, not what it is.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

from course.language import say
from finetune.adapter_folder import adapter_settings, adapter_shapes
from finetune.config import ALL_GROUPS, EXPERT_TENSORS, GROUPS
from finetune.experts import GroupedExperts
from utils import CourseError, shown

#: How far the update is scaled, alpha / rank; chosen with `benchmarks/sweep.py`.
SCALE = 4


class GroupedLora(ParamWrapper):
    """peft's wrapper of a tensor, computing `W x + s B (A x)` instead of `(W + s B A) x`."""

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, parameter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, **kwargs)
        base = self.get_base_layer()
        if isinstance(base, GroupedExperts):
            base.adapters[parameter_name] = self  # the experts add the update themselves

    def get_param(self) -> torch.Tensor:
        """The wrapped tensor; for one that is stored in 4 bits, the shape and type that it has unpacked, in no memory.

        peft sizes the factors by it.
        """
        base, stored = self.get_base_layer(), super().get_param()
        state = base.packed.get(self.parameter_name) if isinstance(base, GroupedExperts) else None
        if state is None:
            return stored
        return torch.empty(1, dtype=state.dtype, device=stored.device).expand(state.shape)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A of shape (experts, rank, in), B of shape (experts, out, rank), and the scale; None if switched off.

        Raises:
            CourseError: several adapters are active at once.
        """
        if self.disable_adapters or self.merged:
            return None
        if len(self.active_adapters) != 1:
            raise CourseError(
                say("{count} adapters are active at once; here it is one.", count=len(self.active_adapters))
            )
        name = self.active_adapters[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)  # peft's order: the rank before the expert
        return a, b, self.scaling[name]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base layer gives, with the update; fused experts add it themselves."""
        found = None if isinstance(self.get_base_layer(), GroupedExperts) else self.factors()
        if found is None:
            return self.base_layer(x, *args, **kwargs)
        a, b, scale = found
        return self.base_layer(x) + F.linear(F.linear(x, a[0].to(x.dtype)), b[0].to(x.dtype)) * scale


@functools.cache
def _four_bit_lora() -> type[torch.nn.Module]:
    """A LoRA of a 4-bit linear layer that adds its update in one kernel; peft's in all else.

    That of peft copies the product, scales the update and adds the two, which reads and writes the size of the result
    five times more. The result of q_proj is three times as wide as the hidden states.
    """
    from peft.tuners.lora.bnb import Linear4bit

    class OneSumLinear4bit(Linear4bit):
        def _plain(self) -> bool:
            """Whether there is one adapter, without dropout, bias or a variant."""
            name, *more = self.active_adapters
            if self.disable_adapters or self.merged or more or name not in self.lora_A or name in self.lora_variant:
                return False
            return isinstance(self.lora_dropout[name], torch.nn.Identity) and self.lora_B[name].bias is None

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args or kwargs or not self._plain():
                return super().forward(x, *args, **kwargs)
            name = self.active_adapters[0]
            a, b = self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]
            y = self.base_layer(x)
            narrow = F.linear(x.to(y.dtype), a.to(y.dtype))
            return torch.addmm(y.flatten(0, -2), narrow.flatten(0, -2), b.to(y.dtype).T).view(y.shape)

    return OneSumLinear4bit


# peft tells a wrapper of a tensor from its other layers by the name of the class, and nests wrappers only of this one.
GroupedLora.__name__ = "ParamWrapper"


def _grouped(target: torch.nn.Module, adapter_name: str, **kwargs: Any) -> torch.nn.Module | None:
    """What peft asks first for each target; None leaves the target to peft."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base).__name__ == "Linear4bit" and not kwargs.get("parameter_name"):
        return _four_bit_lora()(target, adapter_name, **kwargs)
    wanted = isinstance(base, GroupedExperts) or type(base) is torch.nn.Linear  # bitsandbytes' linears have their own
    return GroupedLora(target, adapter_name, **kwargs) if wanted and kwargs.get("parameter_name") else None


def lora_config(rank: int = 8, groups: tuple[str, ...] = ALL_GROUPS) -> LoraConfig:
    """LoRA on the named groups, with `lora_alpha = 4 * rank` as in notebook 05.

    Raises:
        CourseError: a group that is none of `config.GROUPS`.
    """
    if unknown := sorted(set(groups) - set(GROUPS)):
        raise CourseError(
            say(
                "LoRA on {unknown}: no such group. There are: {groups}.",
                unknown=", ".join(unknown),
                groups=", ".join(GROUPS),
            )
        )
    dense = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    tensors = []
    if "routed experts" in groups:
        tensors += [f"mlp.experts.{name}" for name in EXPERT_TENSORS]
    if "shared experts" in groups:
        tensors += [f"shared_experts.{name}" for name in dense]
    if "dense" in groups:
        tensors += [f"layers.0.mlp.{name}" for name in dense]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=SCALE * rank,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if "attention" in groups else [],
        target_parameters=tensors,
    )


def trainable_by_group(model: torch.nn.Module) -> dict[str, int]:
    """Trainable parameters of each group; whatever is trained outside the groups counts as `elsewhere`."""
    counts = dict.fromkeys([*GROUPS, "elsewhere"], 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[next((group for group, part in GROUPS.items() if part in name), "elsewhere")] += parameter.numel()
    return counts


def attach(model: torch.nn.Module, config: LoraConfig) -> PeftModel:
    """The model with a new adapter; on a model of `model.load_model` the experts' updates are grouped products.

    Raises:
        CourseError: a name that matches nothing, or dropout, which peft refuses on fused experts.
    """
    if config.lora_dropout and config.target_parameters:
        raise CourseError(
            say(
                "lora_dropout={dropout}: peft refuses dropout on fused tensors. Set it to 0, or adapt attention alone.",
                dropout=config.lora_dropout,
            )
        )
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for target in [*(config.target_modules or ()), *(config.target_parameters or ())]:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise CourseError(
                say(
                    "LoRA target {target}: nothing in the model has this name, so nothing would be trained.",
                    target=target,
                )
            )
    return get_peft_model(model, _with_grouped(config, model))


def _with_grouped(config: PeftConfig, model: torch.nn.Module) -> PeftConfig:
    """The configuration with `GroupedLora` registered, if the model has experts that compute with it."""
    if any(isinstance(module, GroupedExperts) for module in model.modules()):
        config._register_custom_module({torch.nn.Module: _grouped})  # peft's documented way, though its name is private
    return config


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, which are whole in every process; what `save_pretrained(state_dict=...)` takes."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


def load_adapter(model: torch.nn.Module, folder: Path) -> PeftModel:
    """The model with a saved adapter; the weights may be bf16 or 4-bit, whatever it was trained on.

    Raises:
        CourseError: no adapter there, weights that are not safetensors, or an adapter of another model.
    """
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file() or not weights.is_file():
        raise CourseError(
            say("{folder}: no adapter_config.json and adapter_model.safetensors there.", folder=shown(folder))
        )
    adapter_fits(folder, model.config)
    config = _with_grouped(PeftConfig.from_pretrained(str(folder)), model)
    config.inference_mode = True
    return PeftModel.from_pretrained(model, str(folder), config=config)


def adapter_fits(folder: Path, config: Any) -> None:
    """Compare the adapter's shapes with the model's configuration.

    Raises:
        CourseError: it was trained on a model with other sizes, or more layers, or its files are damaged.
    """
    shapes = adapter_shapes(folder)
    names = list(shapes)
    layers = 1 + max((int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))), default=-1)
    if all(".layers.0." in name for name in names):  # the dense layer only: nothing is known of the others
        layers = config.num_hidden_layers
    hidden = next((shape[1] for name, shape in shapes.items() if "q_proj.lora_A" in name), config.hidden_size)
    rank = adapter_settings(folder)["r"]
    experts = {shape[0] // rank for name, shape in shapes.items() if re.search(r"mlp\.experts\..*lora_A", name)}
    found = (hidden, layers, experts.pop() if experts else config.n_routed_experts)
    wanted = (config.hidden_size, config.num_hidden_layers, config.n_routed_experts)
    if found != wanted:
        sizes = []
        for hidden, layers, experts in (found, wanted):
            sizes.append(
                say(
                    "hidden size {hidden}, {layers} layers, {experts} routed experts",
                    hidden=hidden,
                    layers=layers,
                    experts=experts,
                )
            )
        raise CourseError(
            say(
                "{folder} was trained on another model ({found}); this one has {wanted}. Nothing was loaded.",
                folder=shown(folder),
                found=sizes[0],
                wanted=sizes[1],
            )
        )
