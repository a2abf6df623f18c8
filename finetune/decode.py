"""Answering one conversation token by token, at full size fast enough to read along.

A token of GLM-4.5-Air passes 46 layers of more than a hundred short kernels each. Started one by one from Python they
cost far more time than they compute. Here the keys and values lie in a cache of fixed size, so that every token is the
same work on the same memory, and a GPU can record it once (a CUDA graph) and replay it for all further tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import NoRepeatNGramLogitsProcessor, StaticCache
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from course.language import say
from finetune.experts import GroupedExperts
from utils import CourseError

#: Tokens of question and answer for which there is room; 188 KiB each for GLM-4.5-Air in bf16.
LENGTH = 2048


class Decoder:
    """Greedy decoding of one conversation.

    Args:
        model: the model, with or without an adapter, that answers; the graph follows the adapter being switched off.
        length: how many tokens question and answer may have together.
    """

    def __init__(self, model: Any, length: int = LENGTH) -> None:
        self.model, self.length = model, length
        devices = {parameter.device for parameter in model.parameters()}
        # transformers' own experts ask the GPU which of them are wanted, so their step cannot be recorded.
        experts = [module for module in model.modules() if isinstance(module, Glm4MoeExperts)]
        self.records = len(devices) == 1 and next(iter(devices)).type == "cuda"
        self.records = self.records and all(isinstance(module, GroupedExperts) for module in experts)
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.tuner = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
        room = length + 2  # recording reads two tokens that are undone
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.columns = torch.arange(room, device=model.device)
        self.token, self.position = (torch.zeros((1, 1), dtype=torch.long, device=model.device) for _ in range(2))

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Read tokens (1, n) at their positions (1, n); `token` and `position` become those of the next token."""
        seen = (self.columns <= positions.T)[None, None]  # (1, 1, n, room)
        how = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        logits = self.model(input_ids=ids, attention_mask=seen, position_ids=positions, **how).logits
        self.position.copy_(positions[:, -1:] + 1)
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def _next(self) -> None:
        """Read the token that was chosen last."""
        if not self.records:
            return self._read(self.token, self.position)
        adapted = self.tuner is not None and not self.tuner.disable_adapters
        if adapted not in self.graphs:
            self.graphs[adapted] = self._recorded()
        return self.graphs[adapted].replay()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """The graph of one token. Recording computes nothing, but wants two real steps before it: they are undone."""
        state = [self.token, self.position, *(layer.cumulative_length for layer in self.cache.layers)]
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._read(self.token, self.position)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._read(self.token, self.position)
        return graph

    def require_room(self, ids: list[int]) -> None:
        """Stop before a prompt that leaves no room for an answer.

        Raises:
            CourseError: it has as many tokens as there is room for, or more.
        """
        if len(ids) >= self.length:
            raise CourseError(
                say(
                    "The conversation has {tokens} tokens, there is room for {length}. Begin a new one.",
                    tokens=len(ids),
                    length=self.length,
                )
            )

    @torch.no_grad()
    def tokens(self, ids: list[int], most: int = 256) -> Iterator[int]:
        """The tokens of the answer, one by one; the last is one that ends an answer, unless `most` came first.

        Raises:
            CourseError: the conversation leaves no room for an answer.
        """
        self.require_room(ids)
        self.cache.reset()
        device, ends = self.token.device, ending_tokens(self.model)
        self._read(torch.tensor([ids], device=device), torch.arange(len(ids), device=device)[None])
        for count in range(1, min(most, self.length - len(ids)) + 1):
            yield (token := int(self.token))
            if token in ends:
                return
            if count < most:
                self._next()

    def texts(self, tokenizer: Any, ids: list[int], most: int = 256) -> Iterator[str]:
        """The answer as it grows: each text is the one before it, and more. At least one, though it may be empty."""
        found: list[int] = []
        said = ""
        for token in self.tokens(ids, most):
            found.append(token)
            text = tokenizer.decode(found, skip_special_tokens=True).strip()
            if not text.endswith("\ufffd") and text != said:  # a character of several tokens is not whole yet
                yield (said := text)
        if not said:
            yield ""


class NoRepeatInAnswer(NoRepeatNGramLogitsProcessor):
    """No run of `ngram_size` tokens twice in an answer; unlike `no_repeat_ngram_size`, the prompt may be repeated.

    Args:
        start: tokens of the prompt, with its padding.
    """

    def __init__(self, ngram_size: int, start: int) -> None:
        super().__init__(ngram_size)
        self.start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (answers, vocabulary) with minus infinity at every token that would complete a run said before."""
        return super().__call__(input_ids[:, self.start :], scores)


def ending_tokens(model: Any) -> Collection[int]:
    """The tokens that end an answer, of the model's generation configuration."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())
