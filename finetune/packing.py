"""Packed rows: the samples of a batch end to end in one row, without padding, and attention that keeps them apart.

Samples that all begin with the same tokens, a system prompt, may share them: causal attention gives these tokens the
same hidden states in every sample, so they are computed once a batch, and the samples' keys and values begin with
theirs. Loss and gradients stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import AttentionInterface
from transformers.data.data_collator import DataCollatorWithFlattening
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention

from course.language import say
from finetune.kernels import rotated, turns
from utils import CourseError


def shared_prefix(rows: Iterable[dict[str, Any]]) -> int:
    """How many tokens all rows begin with that one computation may serve: none of them may predict a label.

    Args:
        rows: each with `input_ids` and `labels`, as notebook 04 saves them.
    """
    ids, labels = zip(*((row["input_ids"], row["labels"]) for row in rows), strict=True)
    each = (min(len(own) - 1, max(first_label(its) - 1, 0)) for own, its in zip(ids, labels, strict=True))
    pairs = enumerate(zip(min(ids), max(ids), strict=False))  # what these two begin with, all of them begin with
    differ = (place for place, (one, other) in pairs if one != other)
    return min(next(differ, len(min(ids))), *each)


def first_label(labels: list[int]) -> int:
    """The place of the first label that counts in the loss; behind the end if none does."""
    return next((place for place, label in enumerate(labels) if label != -100), len(labels))


class PackedRows(DataCollatorWithFlattening):
    """The samples of a batch end to end in one row, with what the model needs to keep them apart.

    Adds to transformers' collator: logits are computed only where a label is (151,552 numbers for each position
    saved), and the labels come already shifted to the position that predicts them.

    Args:
        shared: so many tokens at the beginning of the samples come once, if they are the same (`shared_prefix`).
    """

    def __init__(self, shared: int = 0) -> None:
        super().__init__(return_flash_attn_kwargs=True)
        self.shared = shared

    def __call__(self, features: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """[{input_ids, labels}, ...] -> input_ids, labels, position_ids (1, tokens); the kept positions and their
        labels (kept,); where samples begin (samples + 1,). With shared tokens `key_places` too (`Gathered`).
        """
        samples = [{key: sample[key] for key in ("input_ids", "labels")} for sample in features]
        shared = self.shared if self.shared and shared_prefix(samples) >= self.shared else 0
        parts = [slice(shared), *[slice(shared, None)] * len(samples)] if shared else [slice(None)] * len(samples)
        owners = [samples[0], *samples] if shared else samples
        batch = super().__call__(
            [{key: one[key][part] for key in one} for one, part in zip(owners, parts, strict=True)], *args, **kwargs
        )
        if shared:
            batch |= behind_shared(batch, shared)
        # Position t predicts label t + 1. The last one predicts nothing.
        predicts = torch.nonzero(batch["labels"][0, 1:] != -100).squeeze(1)
        batch["logits_to_keep"] = predicts
        batch["shift_labels"] = batch["labels"][0, predicts + 1]
        return batch


def behind_shared(batch: dict[str, Any], shared: int) -> dict[str, Any]:
    """What changes in a packed batch whose first part the others have in common.

    Args:
        batch: of parts: the shared tokens, then the rest of each sample.

    Returns:
        `position_ids` that go on behind the shared tokens; `key_places` (keys,): the places in the row that a sample
        attends to, for the shared part and then for each sample; where these begin (parts + 1,), and the most of them.
    """
    ends = batch["cu_seq_lens_q"].tolist()
    head = torch.arange(shared)
    reads = [head, *(torch.cat([head, torch.arange(start, end)]) for start, end in pairwise(ends[1:]))]
    sizes = torch.tensor([0, *map(len, reads)])
    positions = batch["position_ids"].clone()
    positions[:, shared:] += shared
    return {
        "position_ids": positions,
        "key_places": torch.cat(reads),
        "cu_seq_lens_k": sizes.cumsum(0).to(batch["cu_seq_lens_q"].dtype),
        "max_length_k": int(sizes.max()),
    }


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
    positions = torch.arange(more, device=ids.device, dtype=batch["position_ids"].dtype)[None]
    added = {
        "input_ids": F.pad(ids, (0, more)),
        "labels": F.pad(batch["labels"], (0, more), value=-100),
        "position_ids": torch.cat([batch["position_ids"], positions], dim=1),
    }
    for name in ("q", "k"):
        ends = batch[f"cu_seq_lens_{name}"]
        added[f"cu_seq_lens_{name}"] = torch.cat([ends, ends[-1:] + more])
        added[f"max_length_{name}"] = max(int(batch[f"max_length_{name}"]), more)
    if "key_places" in batch:
        own = torch.arange(ids.shape[1], length, device=ids.device)
        added["key_places"] = torch.cat([batch["key_places"], own])
    return batch | {name: value for name, value in added.items() if name in batch}


class Gathered(torch.autograd.Function):
    """Keys or values in the order in which the samples read them; those of shared tokens come for each sample.

    Its own backward adds up in float32: the gradient of a shared token is a sum over all samples of the batch.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(tokens, key heads, dim), (keys,) -> (keys, key heads, dim)."""
        ctx.save_for_backward(places)
        ctx.tokens = x.shape[0]
        return x[places]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradients of each token, added up."""
        (places,) = ctx.saved_tensors
        total = grad.new_zeros((ctx.tokens, *grad.shape[1:]), dtype=torch.float32)
        return total.index_add_(0, places, grad.float()).to(grad.dtype), None


class Samples(NamedTuple):
    """Where the samples of a packed row are, as `PackedRows` says it.

    Attributes:
        ends: where samples begin and the last one ends, (samples + 1,), int32. longest: tokens of the longest at least.
        key_ends, longest_key: the same for the keys that they read; None: their own tokens.
        key_places: which tokens these are, (keys,).
    """

    ends: torch.Tensor
    longest: int | None
    key_ends: torch.Tensor | None = None
    longest_key: int | None = None
    key_places: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Samples | None:
        """From the arguments that the model passes on; None for a batch that is not packed."""
        if (ends := batch.get("cu_seq_lens_q")) is None:
            return None
        if (places := batch.get("key_places")) is None:
            return cls(ends, batch.get("max_length_q"))
        return cls(ends, batch.get("max_length_q"), batch["cu_seq_lens_k"], batch["max_length_k"], places)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, samples: Samples, scaling: float) -> torch.Tensor:
    """Causal attention within each sample; no mask of tokens x tokens is ever made.

    The last query of a sample reads all of its keys: shared tokens are before its own.

    Args:
        q: (tokens, heads, dim). k, v: (tokens, key heads, dim). scaling: of the products.

    Returns:
        (tokens, heads, dim).
    """
    ends, longest, key_ends, longest_key, places = samples
    if places is None:
        key_ends, longest_key = ends, longest
    else:
        k, v = Gathered.apply(k, places), Gathered.apply(v, places)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # flash attention, which knows no CPU and no float32

        how = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": True}
        return varlen_attn(q, k, v, ends, key_ends, longest, longest_key, **how)
    parts = []
    for (start, end), (first, last) in zip(pairwise(ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        triple = (x.transpose(0, 1) for x in (q[start:end], k[first:last], v[first:last]))
        own, read = end - start, last - first
        seen = None if own == read else torch.ones(own, read, dtype=torch.bool, device=q.device).tril(read - own)
        how = {"attn_mask": seen, "is_causal": seen is None, "scale": scaling, "enable_gqa": True}
        parts.append(F.scaled_dot_product_attention(*triple, **how))
    return torch.cat(parts, dim=1).transpose(0, 1)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
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
    if (samples := Samples.of(kwargs)) is None:
        raise CourseError(
            say("Packed attention got a batch that PackedRows did not make. Use it, or attention 'sdpa'.")
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, samples, scaling).unsqueeze(0), None


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
        samples, packed = Samples.of(kwargs), self.config._attn_implementation == "packed"
        if samples is None or not packed or self.use_qk_norm or kwargs.get("past_key_values") is not None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states)[0].unflatten(-1, (-1, self.head_dim)) for project in projections)
        turn = turns(*(x[0] for x in position_embeddings), self.head_dim)
        q, k = Rotate.apply(q, *turn), Rotate.apply(k, *turn)
        y = attend(q, k, v, samples, self.scaling)
        return self.o_proj(y.flatten(1).unsqueeze(0)), None


AttentionInterface.register("packed", packed_attention)
