"""What pre-training and chat tuning share: the model's shape, a fast forward, the optimiser, the losses.

Knows transformers' GLM-4.5 mixture-of-experts class; knows nothing of files.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedTokenizerBase
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SEQUENCE = 1024
IGNORED = -100
START = time.time()


def say(*words: object) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.time() - START:6.1f}]", *words, flush=True)


def small_config(tokenizer: PreTrainedTokenizerBase) -> Glm4MoeConfig:
    """GLM-4.5-Air's layout at 33.1 M parameters: a dense first layer, then routed and shared experts."""
    token = tokenizer.convert_tokens_to_ids
    return Glm4MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1280,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=192,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        use_qk_norm=False,
        attention_bias=True,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
        num_nextn_predict_layers=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        pad_token_id=token("<|endoftext|>"),
        eos_token_id=[token(t) for t in ("<|endoftext|>", "<|user|>", "<|observation|>")],
    )


def dense_experts(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, weighted by the router: more arithmetic than sparse experts, yet at this
    size far fewer kernels, and it compiles into one graph.

    Args:
        hidden: (tokens, hidden size). index, weights: (tokens, experts per token).

    """
    count, width, size = experts.num_experts, experts.intermediate_dim, experts.hidden_dim
    share = torch.zeros(hidden.shape[0], count, device=hidden.device, dtype=weights.dtype).scatter(1, index, weights)
    experts.load.add_(F.one_hot(index, count).sum((0, 1)).float())
    gate, up = (
        F.linear(hidden, experts.gate_up_proj.reshape(count * 2 * width, size)).view(-1, count, 2, width).unbind(2)
    )
    mixed = F.silu(gate) * up * share.unsqueeze(-1).to(up.dtype)
    down = experts.down_proj.permute(1, 0, 2).reshape(size, count * width)
    return F.linear(mixed.reshape(-1, count * width), down).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention that never builds a mask: under torch.compile, transformers' `sdpa` builds one with
    torch before 2.14, which rules out the fast kernel.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", causal_attention)


def add_dropout(model: Glm4MoeForCausalLM, share: float) -> None:
    """Drop this share of what attention and feed-forward add to the residual stream, while the model trains."""

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    for layer in model.model.layers if share else ():
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def moe_blocks(model: Glm4MoeForCausalLM) -> list[nn.Module]:
    """The layers' mixture-of-experts blocks, the dense first layer left out."""
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def prepare(model: Glm4MoeForCausalLM) -> Glm4MoeForCausalLM:
    """The model with dense experts that count their tokens, a router kept out of autocast, and mask-free attention."""
    model.set_experts_implementation("dense")
    model.set_attn_implementation("causal")
    for block in moe_blocks(model):
        load = torch.zeros(block.experts.num_experts, device=model.device)
        block.experts.register_buffer("load", load, persistent=False)
        block.gate.forward = torch.autocast(model.device.type, enabled=False)(block.gate.forward)
    return model


def expert_entropy(model: Glm4MoeForCausalLM) -> list[float]:
    """Entropy of each layer's expert use since the last call, 1 for even use; the counts are reset."""
    result = []
    for block in moe_blocks(model):
        share = block.experts.load / block.experts.load.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-9).log()).sum() / math.log(len(share))
        result.append(round(entropy.item(), 4))
        block.experts.load.zero_()
    return result


def balance(model: Glm4MoeForCausalLM, rate: float, before: list[Tensor]) -> None:
    """Move each router's correction bias towards even use (no gradient does; arXiv:2408.15664).

    Args:
        rate: size of the move. before: each layer's counts at the previous step, updated in place.

    """
    for block, last in zip(moe_blocks(model), before, strict=True):
        load = block.experts.load - last
        block.gate.e_score_correction_bias.add_(rate * torch.sign(load.mean() - load))
        last.copy_(block.experts.load)


def summed_loss(model: Glm4MoeForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats; `labels` (rows, length) are already shifted to the left by one."""
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = F.linear(hidden, model.lm_head.weight)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def shift(tokens: Tensor) -> Tensor:
    """Labels of plain text: the next token, none for the last."""
    labels = torch.full_like(tokens, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    return labels


def optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def cosine(done: float, warm: float, floor: float) -> float:
    """Share of the peak learning rate after the share `done` of the run."""
    if done < warm:
        return done / warm
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))


@torch.no_grad()
def nats_per_character(model: Glm4MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """Loss on plain texts, cut in rows of `SEQUENCE` tokens; per character, so that tokenizers compare."""
    ids: list[int] = []
    characters = 0
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        characters += len(text)
    full = len(ids) // SEQUENCE * SEQUENCE
    rows = torch.tensor(ids[:full]).view(-1, SEQUENCE)
    was_training, device = model.training, model.device
    model.eval()
    total = sum(summed_loss(model, part.to(device), shift(part).to(device)).item() for part in rows.split(32))
    model.train(was_training)
    return total / (characters * full / len(ids))


def save(model: Glm4MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """The weights in bf16 safetensors under 15 MB each, with configuration and tokenizer."""
    copy = Glm4MoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    for block, original in zip(moe_blocks(copy), moe_blocks(model), strict=True):
        block.gate.e_score_correction_bias.data = original.gate.e_score_correction_bias.float().cpu()
    copy.config.dtype = "bfloat16"
    copy.generation_config.eos_token_id = model.config.eos_token_id
    copy.generation_config.pad_token_id = model.config.pad_token_id
    copy.save_pretrained(folder, max_shard_size="15MB")
    tokenizer.save_pretrained(folder)
    # transformers 5 writes `rope_parameters` only; other engines look for the keys that it had before.
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    old = {name: config["rope_parameters"][name] for name in ("rope_theta", "partial_rotary_factor")}
    path.write_text(json.dumps(dict(sorted((config | old | {"rope_scaling": None}).items())), indent=2) + "\n", "utf-8")
