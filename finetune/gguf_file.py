"""GGUF, the file format of llama.cpp: a checkpoint of this model as one file, and its adapter as another.

Only the tensor being written is in memory, at full size 2.8 GiB for one fused tensor of a layer in float32. The names
of tensors and keys come from the `gguf` package (MIT licence), which llama.cpp's own converter uses too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open

from course.language import say
from finetune.adapter_folder import adapter_settings
from finetune.config import mtp_layer_prefix
from utils import CourseError, shown

ARCHITECTURE = "glm4moe"
#: Types that a file can have, by their name in llama.cpp: its number for the whole file, and that of a tensor.
TYPES = {
    "f32": (0, GGMLQuantizationType.F32),
    "f16": (1, GGMLQuantizationType.F16),
    "bf16": (32, GGMLQuantizationType.BF16),
    "q8_0": (7, GGMLQuantizationType.Q8_0),
}
#: Changes of tensors by their name in the checkpoint, as `checkpoint.updates` makes them.
Changes = dict[str, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name there, its shape, its type, and how to read it as float32."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        block, length = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * length


# ------------------------------------------------------------------------------------------------------- the model


def entries(folder: Path, config: Any, kind: str, changes: Changes | None = None) -> list[Entry]:
    """What a file of the checkpoint in this folder holds, experts of a layer fused, in the checkpoint's order.

    One-dimensional tensors and the router stay float32, as llama.cpp wants them.

    Args:
        kind: a name of `TYPES`. changes: what is added to a tensor, in float32 and before it is rounded.

    Raises:
        CourseError: a tensor for which llama.cpp has no name, or a length that the type cannot hold.
    """
    where = {name: path for path in sorted(folder.glob("*.safetensors")) for name in safe_open(path, "pt").keys()}  # noqa: SIM118
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, blocks(config, where))

    def read(name: str) -> np.ndarray:
        tensor = safe_open(where[name], "pt").get_tensor(name).float()
        if changes and name in changes:
            tensor = tensor + changes[name]()
        return tensor.numpy()

    def read_experts(name: str) -> np.ndarray:
        return np.stack([read(name.replace(".experts.0.", f".experts.{i}.")) for i in range(config.n_routed_experts)])

    found = []
    for name, path in where.items():
        if ".mlp.experts." in name and ".mlp.experts.0." not in name:
            continue
        shape = tuple(safe_open(path, "pt").get_slice(name).get_shape())
        routed = ".mlp.experts.0." in name
        asked = name.replace(".experts.0.", ".experts.").replace("e_score_correction_bias", "e_score_correction.bias")
        target = names.get_name(asked, (".weight", ".bias"))
        if target is None:
            raise CourseError(say("{folder}: llama.cpp has no name for {tensor}.", folder=shown(folder), tensor=name))
        plain = len(shape) == 1 or "ffn_gate_inp" in target
        wanted = GGMLQuantizationType.F32 if plain else TYPES[kind][1]
        if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            raise CourseError(
                say("{tensor} has rows of {length} numbers; {kind} wants a multiple of 32.",
                    tensor=name, length=shape[-1], kind=kind)
            )  # fmt: skip
        shape = (config.n_routed_experts, *shape) if routed else shape
        found.append(Entry(target, shape, wanted, lambda n=name, r=routed: read_experts(n) if r else read(n)))
    return found


def blocks(config: Any, names: Any) -> int:
    """Layers in the file: with the MTP layer, if the checkpoint has it."""
    return config.num_hidden_layers + any(name.startswith(mtp_layer_prefix(config)) for name in names)


def write_model(folder: Path, config: Any, target: Path, kind: str, changes: Changes | None = None) -> int:
    """Write the checkpoint in `folder` as one GGUF file with its tokenizer and its chat template.

    Returns:
        How many tensors the file holds.

    Raises:
        CourseError: as `entries`.
    """
    found = entries(folder, config, kind, changes)
    writer = GGUFWriter(target, ARCHITECTURE)
    describe(writer, config, kind)
    add_tokenizer(writer, folder, config)
    mtp_layers = sum(entry.name.endswith("nextn.eh_proj.weight") for entry in found)
    writer.add_block_count(config.num_hidden_layers + mtp_layers)
    if mtp_layers:
        writer.add_nextn_predict_layers(mtp_layers)
    write(writer, found)
    return len(found)


def describe(writer: GGUFWriter, config: Any, kind: str) -> None:
    """The sizes of the model, under llama.cpp's keys."""
    rope = config.rope_parameters
    writer.add_file_type(TYPES[kind][0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def add_tokenizer(writer: GGUFWriter, folder: Path, config: Any) -> None:
    """Vocabulary, merges, special tokens and the chat template of the checkpoint in this folder."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    words |= {number: token["content"] for number, token in added.items()}

    def kind(number: int) -> gguf.TokenType:
        if number not in words:
            return gguf.TokenType.UNUSED
        if number not in added:
            return gguf.TokenType.NORMAL
        return gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED

    numbers = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in numbers])
    writer.add_token_types([kind(number) for number in numbers])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    ids = {token["content"]: number for number, token in added.items()}
    writer.add_bos_token_id(ids["[gMASK]"])
    writer.add_eos_token_id(ids["<|endoftext|>"])
    writer.add_eot_token_id(ids["<|user|>"])
    writer.add_eom_token_id(ids["<|observation|>"])
    writer.add_unk_token_id(ids["<|endoftext|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)  # the chat template writes [gMASK] itself
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------- the adapter


def write_adapter(adapter: Path, config: Any, target: Path) -> int:
    """Write the adapter as a file to load beside a GGUF file of its base, in float32.

    Returns:
        How many tensors the file holds.

    Raises:
        CourseError: a tensor for which llama.cpp has no name.
    """
    settings = adapter_settings(adapter)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, config.num_hidden_layers)
    found = []
    for name, a, b in fused_factors(adapter, config):
        asked = names.get_name(f"{name}.weight", (".weight",))
        if asked is None:
            raise CourseError(say("{folder}: llama.cpp has no name for {tensor}.", folder=shown(adapter), tensor=name))
        for part, tensor in (("lora_a", a), ("lora_b", b)):
            array = tensor.float().contiguous().numpy()
            found.append(Entry(f"{asked}.{part}", array.shape, GGMLQuantizationType.F32, lambda array=array: array))
    writer = GGUFWriter(target, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    write(writer, found)
    return len(found)


def fused_factors(adapter: Path, config: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name of each adapted weight and its factors A (rank, in) and B (out, rank), with the experts first where fused.

    peft stores all experts of a layer in one matrix each: in A the expert is the slowest index of the rows, in B the
    fastest of the columns. The fused `gate_up_proj` becomes two weights that share one A.
    """
    experts, half = config.n_routed_experts, config.moe_intermediate_size
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            if not key.endswith(".lora_A.weight"):
                continue
            a, b = file.get_tensor(key), file.get_tensor(key.replace(".lora_A.", ".lora_B."))
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if ".mlp.experts" not in name:
                yield name, a, b
                continue
            stem = name[: name.index(".mlp.experts")] + ".mlp.experts"
            a = a.reshape(experts, -1, a.shape[-1])
            b = b.reshape(len(b), -1, experts).permute(2, 0, 1)
            if b.shape[1] == 2 * half and a.shape[-1] == config.hidden_size:
                yield f"{stem}.gate_proj", a, b[:, :half]
                yield f"{stem}.up_proj", a, b[:, half:]
            else:
                yield f"{stem}.down_proj", a, b


# --------------------------------------------------------------------------------------------------------- writing


def write(writer: GGUFWriter, found: list[Entry]) -> None:
    """Write header, keys and then the tensors, one in memory at a time; the file is closed whatever happens."""
    try:
        for entry in found:
            kind = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(
                entry.kind, np.uint8
            )
            shape = entry.shape if kind != np.uint8 else gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)
            writer.add_tensor_info(entry.name, shape, np.dtype(kind), entry.size, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in found:
            writer.write_tensor_data(gguf.quantize(entry.read(), entry.kind))
    finally:
        writer.close()


def names_in(path: Path) -> set[str]:
    """Names of the tensors in a GGUF file, read back from it."""
    return {tensor.name for tensor in gguf.GGUFReader(path).tensors}
