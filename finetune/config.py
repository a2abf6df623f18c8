"""What the model looks like: its shape, the groups that LoRA can adapt, parameter counts, tensor names.

Everything is computed from the configuration, so nothing has to be loaded. Knows no device, no time and no training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import Glm4MoeConfig

from course.language import marked

#: GLM-4.5-Air as published (its config.json); `tests/test_planner.py` counts its 106.9 billion parameters.
AIR = Glm4MoeConfig(
    vocab_size=151552, hidden_size=4096, num_hidden_layers=46, max_position_embeddings=131072,
    num_attention_heads=96, num_key_value_heads=8, head_dim=128, attention_bias=True, use_qk_norm=False,
    intermediate_size=10944, first_k_dense_replace=1, moe_intermediate_size=1408,
    n_routed_experts=128, num_experts_per_tok=8, n_shared_experts=1, n_group=1, topk_group=1,
    pad_token_id=151329, eos_token_id=[151329, 151336, 151338], tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip

#: The groups of weights that LoRA can adapt, and the part of a parameter's name by which each is known.
GROUPS = {
    marked("attention"): "self_attn",
    marked("dense"): "layers.0.mlp",
    marked("shared experts"): "shared_experts",
    marked("routed experts"): "mlp.experts",
}
ALL_GROUPS = tuple(GROUPS)
#: The two fused tensors in which transformers keeps all routed experts of a layer: (experts, out, in).
EXPERT_TENSORS = ("gate_up_proj", "down_proj")
#: Below this hidden size a model counts as small: it trains without gradient checkpointing, with a larger step.
SMALL_HIDDEN_SIZE = 1024


def is_small(config: Any) -> bool:
    """Whether the model is of the size of the bundled one, for which other defaults hold than for GLM-4.5-Air."""
    return config.hidden_size < SMALL_HIDDEN_SIZE


def attention_sizes(config: Any) -> tuple[int, int]:
    """Outputs of the query projection, and of the key projection (the value projection has as many)."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def lora_parameters(config: Any, rank: int, groups: tuple[str, ...] = ALL_GROUPS) -> dict[str, int]:
    """Numbers that LoRA adds to each group: rank x (inputs + outputs) of every weight; derived in notebook 05."""
    hidden, expert = config.hidden_size, config.moe_intermediate_size
    queries, keys = attention_sizes(config)
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    per_rank = {
        "attention": config.num_hidden_layers * (2 * (hidden + queries) + 2 * (hidden + keys)),
        "dense": config.first_k_dense_replace * 3 * (hidden + config.intermediate_size),
        "shared experts": moe_layers * 3 * (hidden + expert * config.n_shared_experts),
        "routed experts": moe_layers * config.n_routed_experts * ((hidden + 2 * expert) + (expert + hidden)),
    }
    return {group: rank * per_rank[group] for group in GROUPS if group in groups}


def parameters(config: Any) -> dict[str, int]:
    """Numbers in the model by kind: `routed`, `linear` (attention, shared and dense MLPs) and `rest`."""
    hidden, expert = config.hidden_size, config.moe_intermediate_size
    queries, keys = attention_sizes(config)
    layers, dense = config.num_hidden_layers, config.first_k_dense_replace
    linear = layers * (2 * hidden * queries + 2 * hidden * keys) + dense * 3 * hidden * config.intermediate_size
    linear += (layers - dense) * 3 * hidden * expert * config.n_shared_experts
    head = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    bias = layers * (queries + 2 * keys) if config.attention_bias else 0
    router = (layers - dense) * config.n_routed_experts * hidden
    return {
        "routed": (layers - dense) * config.n_routed_experts * 3 * hidden * expert,
        "linear": linear,
        "rest": head + bias + router + (2 * layers + 1) * hidden,
    }


def active_parameters(config: Any) -> float:
    """Numbers that one token is multiplied with, embeddings left out."""
    count = parameters(config)
    return count["linear"] + count["routed"] * config.num_experts_per_tok / config.n_routed_experts


def mtp_layer_prefix(config: Any) -> str:
    """How the names of the MTP layer begin: it lies behind the last layer and predicts a second token."""
    return f"model.layers.{config.num_hidden_layers}."


def tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and safetensors type of every tensor in the published checkpoint, layer by layer, MTP layer last."""
    hidden, wide = config.hidden_size, config.moe_intermediate_size
    queries, keys = attention_sizes(config)

    def mlp(prefix: str, inner: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{prefix}.gate_proj.weight", (inner, hidden), "BF16"
        yield f"{prefix}.up_proj.weight", (inner, hidden), "BF16"
        yield f"{prefix}.down_proj.weight", (hidden, inner), "BF16"

    yield "model.embed_tokens.weight", (config.vocab_size, hidden), "BF16"
    for layer in range(config.num_hidden_layers + 1):
        at = f"model.layers.{layer}"
        for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{at}.self_attn.{name}.weight", (out, hidden), "BF16"
            if config.attention_bias:
                yield f"{at}.self_attn.{name}.bias", (out,), "BF16"
        if config.use_qk_norm:
            yield f"{at}.self_attn.q_norm.weight", (config.head_dim,), "BF16"
            yield f"{at}.self_attn.k_norm.weight", (config.head_dim,), "BF16"
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries), "BF16"
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
        if layer == config.num_hidden_layers:  # the MTP layer
            yield f"{at}.eh_proj.weight", (hidden, 2 * hidden), "BF16"
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{at}.{norm}.weight", (hidden,), "BF16"
            yield f"{at}.embed_tokens.weight", (config.vocab_size, hidden), "BF16"
            yield f"{at}.shared_head.head.weight", (config.vocab_size, hidden), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden), "BF16"
