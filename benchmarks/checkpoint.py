"""A checkpoint in GLM-4.5-Air's own layout that takes no room: every shard is a hole with a true header.

One tensor for each expert, as many shards as asked for, the prediction layer behind the last one. It reads as zeros,
so it shows how loading behaves at full size (order, memory, time) where 206 GiB do not fit on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from transformers import Glm4MoeConfig

from planner import AIR


def tensors(config: Glm4MoeConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every tensor in the published checkpoint, layer by layer."""
    hidden, wide = config.hidden_size, config.moe_intermediate_size
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def mlp(prefix: str, inner: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{prefix}.gate_proj.weight", (inner, hidden), "BF16"
        yield f"{prefix}.up_proj.weight", (inner, hidden), "BF16"
        yield f"{prefix}.down_proj.weight", (hidden, inner), "BF16"

    yield "model.embed_tokens.weight", (config.vocab_size, hidden), "BF16"
    for layer in range(config.num_hidden_layers + 1):  # the last one predicts a second token
        at = f"model.layers.{layer}"
        for name, out in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
            yield f"{at}.self_attn.{name}.weight", (out, hidden), "BF16"
            yield f"{at}.self_attn.{name}.bias", (out,), "BF16"
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads), "BF16"
        yield f"{at}.input_layernorm.weight", (hidden,), "BF16"
        yield f"{at}.post_attention_layernorm.weight", (hidden,), "BF16"
        if layer < config.first_k_dense_replace:
            yield from mlp(f"{at}.mlp", config.intermediate_size)
        else:
            yield f"{at}.mlp.gate.weight", (config.n_routed_experts, hidden), "BF16"
            yield f"{at}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,), "F32"
            yield from mlp(f"{at}.mlp.shared_experts", wide * config.n_shared_experts)
            for expert in range(config.n_routed_experts):
                yield from mlp(f"{at}.mlp.experts.{expert}", wide)
        if layer == config.num_hidden_layers:
            yield f"{at}.eh_proj.weight", (hidden, 2 * hidden), "BF16"
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{at}.{norm}.weight", (hidden,), "BF16"
            yield f"{at}.embed_tokens.weight", (config.vocab_size, hidden), "BF16"
            yield f"{at}.shared_head.head.weight", (config.vocab_size, hidden), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    yield "lm_head.weight", (config.vocab_size, hidden), "BF16"


def write(folder: Path, config: Glm4MoeConfig = AIR, shards: int = 47) -> int:
    """Write the checkpoint of holes and return the bytes it reads as."""
    folder.mkdir(parents=True, exist_ok=True)
    size = {"BF16": 2, "F32": 4}
    entries = []
    for name, shape, kind in tensors(config):
        count = 1
        for length in shape:
            count *= length
        entries.append((name, shape, kind, count * size[kind]))
    total = sum(entry[3] for entry in entries)
    weight_map, headers, at, filled = {}, [{}], 0, 0
    for name, shape, kind, length in entries:
        if filled >= total / shards * len(headers):
            headers.append({})
            at = 0
        headers[-1][name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + length]}
        at, filled = at + length, filled + length
    for number, header in enumerate(headers, 1):
        file = f"model-{number:05d}-of-{len(headers):05d}.safetensors"
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            out.truncate(8 + len(head) + max(entry["data_offsets"][1] for entry in header.values()))
        weight_map |= dict.fromkeys(header, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = ["Glm4MoeForCausalLM"]
    config.save_pretrained(folder)
    return total
