"""Packed rows: the samples of a batch end to end in one row, without padding, and attention that keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import AttentionInterface
from transformers.data.data_collator import DataCollatorWithFlattening
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention

from course.language import say
from finetune.kernels import rotated, turns
from utils import CourseError


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


class SimilarLengths(Sampler[int]):
    """Row numbers in a new order each epoch, so that the rows of a step are of similar length; as in notebook 05.

    The rows are shuffled, sorted by length within pools of 50 steps, and the steps shuffled. The order depends on the
    seed and the epoch only, so that an interrupted run repeats it.

    Args:
        lengths: tokens of each row. step: rows of one optimizer step, over all processes. seed: of the shuffling.
    """

    def __init__(self, lengths: list[int], step: int, seed: int) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """`Trainer` says which epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        rows, pool = torch.randperm(len(self.lengths), generator=draw).tolist(), 50 * self.step
        pools = [sorted(rows[i : i + pool], key=self.lengths.__getitem__) for i in range(0, len(rows), pool)]
        steps = [part[i : i + self.step] for part in pools for i in range(0, len(part), self.step)]
        order = torch.randperm(len(steps), generator=draw).tolist()
        order.sort(key=lambda i: len(steps[i]) < self.step)  # an incomplete step comes last
        return iter([row for i in order for row in steps[i]])


def pad_to(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """A packed batch with one sample more, without labels, that fills the row up to `length` tokens.

    Processes that exchange tokens need rows of the same length. The added sample is kept apart as every other, so it
    changes neither loss nor gradients.
    """
    more = length - batch["input_ids"].shape[1]
    if more <= 0:
        return batch
    ids = batch["input_ids"]
    end = torch.full((1,), length, dtype=batch["cu_seq_lens_q"].dtype, device=ids.device)
    positions = torch.arange(more, device=ids.device, dtype=batch["position_ids"].dtype)[None]
    added = {
        "input_ids": F.pad(ids, (0, more)),
        "labels": F.pad(batch["labels"], (0, more), value=-100),
        "position_ids": torch.cat([batch["position_ids"], positions], dim=1),
    }
    for name in ("q", "k"):
        added[f"cu_seq_lens_{name}"] = torch.cat([batch[f"cu_seq_lens_{name}"], end])
        added[f"max_length_{name}"] = max(int(batch[f"max_length_{name}"]), more)
    return batch | {name: value for name, value in added.items() if name in batch}


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int | None, scaling: float
) -> torch.Tensor:
    """Causal attention within each sample; no mask of tokens x tokens is ever made.

    Args:
        q: (tokens, heads, dim). k, v: (tokens, key heads, dim). ends: where samples begin and the last one ends,
            (samples + 1,), int32. longest: tokens of the longest sample at least. scaling: of the products.

    Returns:
        (tokens, heads, dim).
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # flash attention, which knows no CPU and no float32

        how = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": True}
        return varlen_attn(q, k, v, ends, ends, longest, longest, **how)
    parts = [
        F.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scaling, enable_gqa=True
        )
        for start, end in pairwise(ends.tolist())
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


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
    """`attend` in the form that transformers calls.

    Args:
        query: (1, heads, tokens, dim). key, value: (1, key heads, tokens, dim).

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
    return attend(q, k, v, cu_seq_lens_q, max_length_q, scaling).unsqueeze(0), None


class Rotate(torch.autograd.Function):
    """Rotary embedding of (tokens, heads, dim) with what `kernels.turns` gives."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, own: torch.Tensor, others: torch.Tensor, partner: torch.Tensor
    ) -> torch.Tensor:
        """Each head rotated by its position."""
        ctx.save_for_backward(own, others, partner)
        return rotated(x, own, others, partner)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient rotated back."""
        own, others, partner = ctx.saved_tensors
        return rotated(grad.contiguous(), own, -others, partner), None, None, None


class PackedAttention(Glm4MoeAttention):
    """The attention of a layer; for packed rows without transformers' copies of queries and keys."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(1, tokens, hidden) -> the same, and None for the weights."""
        ends, packed = kwargs.get("cu_seq_lens_q"), self.config._attn_implementation == "packed"
        if ends is None or not packed or self.use_qk_norm or kwargs.get("past_key_values") is not None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states)[0].unflatten(-1, (-1, self.head_dim)) for project in projections)
        turn = turns(*(x[0] for x in position_embeddings), self.head_dim)
        q, k = Rotate.apply(q, *turn), Rotate.apply(k, *turn)
        y = attend(q, k, v, ends, kwargs.get("max_length_q"), self.scaling)
        return self.o_proj(y.flatten(1).unsqueeze(0)), None


AttentionInterface.register("packed", packed_attention)
