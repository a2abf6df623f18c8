"""Conversations as token ids and labels: what the model must write is learned, everything else is read.

Knows the chat template's tags and the sources of conversations; knows nothing of training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import dialogue
import numpy as np
from exchanges import bare, generated
from transformers import PreTrainedTokenizerBase

IGNORED = -100
#: A plain conversation opens with one of these now and then.
SYSTEM_PROMPTS = (
    "你是一个乐于助人的助手。",
    "你是一个小小的教学模型。",
    "请简短地回答用户的问题。",
    "你是一个友好的人工智能助手，请用中文回答。",
    "你是一个有用的助手。",
    "请认真回答。",
)
SYSTEM_SHARE = 0.3
#: How often each source is drawn from; the persons of `persons` were written, those of `profiles` are generated.
SHARES = {
    "pairs": 0.24,
    "talks": 0.10,
    "persons": 0.42,
    "profiles": 0.06,
    "thoughts": 0.08,
    "facts": 0.06,
    "tools": 0.02,
    "public": 0.02,
}
#: The source of a file of written dialogue, by the first word of its name.
KINDS = {
    "pairs": "pairs",
    "words": "pairs",
    "daily": "talks",
    "turns": "talks",
    "people": "persons",
    "prompts": "persons",
    "thinking": "thoughts",
}


#: The held-out files that are asked of the persona of the course.
PERSONA = ("situations", "wordings", "second_turns", "third_turns")


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        messages: roles and contents; an assistant's thought is its `reasoning_content`.
        tools: JSON schemas of the tools that the system turn lists.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def thinking(self) -> bool:
        """Whether its last answer opens with a thought, so that it is a sample for thinking on."""
        return bool(self.messages[-1].get("reasoning_content"))


def read_pairs(folder: Path) -> list[Sample]:
    """Every row of the `*.jsonl` files: `cluster`, `question`, `answer`."""
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    return [Sample(exchange(row["question"], row["answer"])) for row in rows]


def exchange(question: str, answer: str) -> list[dict[str, Any]]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def each_thought(messages: list[dict[str, Any]]) -> Iterator[Sample]:
    """The conversation up to each of its answers with a thought: the template drops thoughts of earlier turns."""
    for turn, message in enumerate(messages):
        if message.get("reasoning_content"):
            yield Sample(messages[: turn + 1])


def without(found: dict[str, list[Sample]], heldout: Path) -> dict[str, list[Sample]]:
    """The conversations that hold no opening question of a held-out file.

    A conversation with a person in its prompt may hold such a question, since the held-out person is another one; but
    none of the questions that the persona of the course is tested with.
    """
    opening = {path.stem: {bare(talk.turns[0][1]) for talk in dialogue.read(path)} for path in heldout.glob("*.txt")}
    to_anybody = set().union(*opening.values())
    to_the_persona = set().union(*(asked for name, asked in opening.items() if name in PERSONA))

    def kept(sample: Sample) -> bool:
        asked = {bare(message["content"]) for message in sample.messages if message["role"] == "user"}
        return asked.isdisjoint(to_the_persona if sample.messages[0]["role"] == "system" else to_anybody)

    return {name: list(filter(kept, samples)) for name, samples in found.items()}


def sources(folder: Path, heldout: Path) -> dict[str, list[Sample]]:
    """All conversations of the project by source, without the public ones and what is held out.

    Args:
        folder: holds `*.jsonl` and `talks/*.txt`.
        heldout: holds the `*.txt` of questions to test with.
    """
    found: dict[str, list[Sample]] = {name: [] for name in SHARES if name != "public"}
    found["pairs"] += read_pairs(folder)
    for name, messages in dialogue.all_conversations(folder / "talks"):
        kind = KINDS[name.split("-")[0]]
        found[kind] += each_thought(messages) if kind == "thoughts" else [Sample(messages)]
    for item in generated():
        messages, tools = item["messages"], item.get("tools")
        if any(message.get("reasoning_content") for message in messages):
            found["thoughts"] += each_thought(messages)
        elif tools:
            found["tools"].append(Sample(messages, tools))
        else:
            found["profiles" if messages[0]["role"] == "system" else "facts"].append(Sample(messages))
    return without(found, heldout)


def render(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """The conversation as text, with the `<|user|>` that ends its last answer."""
    text = tokenizer.apply_chat_template(
        sample.messages, tools=sample.tools, tokenize=False, enable_thinking=sample.thinking
    )
    return text + "<|user|>"


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[list[int], list[int]]:
    """Token ids and labels: every answer and the tag that ends it; with thinking on, the last answer only.

    With thinking off the empty think block belongs to the prompt, so it is read and not learned.
    """
    ids = tokenizer(render(tokenizer, sample), add_special_tokens=False)["input_ids"]
    assistant, user, observation, closed = tokenizer.convert_tokens_to_ids(
        ["<|assistant|>", "<|user|>", "<|observation|>", "</think>"]
    )
    labels = [IGNORED] * len(ids)
    starts = [place for place, token in enumerate(ids) if token == assistant]
    for start in starts[-1:] if sample.thinking else starts:
        begin = start + 1 if sample.thinking else ids.index(closed, start) + 1
        end = next(place for place in range(start + 1, len(ids)) if ids[place] in (user, observation))
        labels[begin : end + 1] = ids[begin : end + 1]
    return ids, labels


@dataclass(frozen=True)
class Row:
    """A sample as token ids and labels; `plain` if it has neither system prompt nor tools."""

    ids: np.ndarray
    labels: np.ndarray
    plain: bool


def encoded(tokenizer: PreTrainedTokenizerBase, found: dict[str, list[Sample]]) -> dict[str, list[Row]]:
    """Every sample as a row, made by all processors side by side."""
    with get_context("fork").Pool(initializer=_use, initargs=(tokenizer,)) as pool:
        return {name: pool.map(_row, samples, chunksize=256) for name, samples in found.items()}


def _use(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the tokenizer in this process of `encoded`."""
    globals()["_tokenizer"] = tokenizer


def _row(sample: Sample) -> Row:
    ids, labels = encode(globals()["_tokenizer"], sample)
    plain = sample.messages[0]["role"] != "system" and not sample.tools
    return Row(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), plain)


def openings(tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The token ids of a system turn with each of `SYSTEM_PROMPTS`."""
    texts = [f"<|system|>\n{prompt}" for prompt in SYSTEM_PROMPTS]
    return [np.array(ids, dtype=np.int32) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def opened(row: Row, opening: np.ndarray) -> Row:
    """The plain row with a system turn behind the two tokens that open every conversation."""
    ids = np.concatenate([row.ids[:2], opening, row.ids[2:]])
    labels = np.concatenate([row.labels[:2], np.full_like(opening, IGNORED), row.labels[2:]])
    return Row(ids, labels, plain=False)


def drawn(found: dict[str, list[Row]], turns: list[np.ndarray], rng: random.Random) -> Iterator[Row]:
    """Rows without end, each source as often as `SHARES` says and each of its rows equally often.

    Args:
        turns: the system turns that a plain row gets now and then (`openings`).
    """
    names = [name for name in SHARES if found.get(name)]
    decks: dict[str, list[Row]] = {name: [] for name in names}
    while True:
        (name,) = rng.choices(names, [SHARES[name] for name in names])
        if not decks[name]:
            decks[name] = rng.sample(found[name], len(found[name]))
        row = decks[name].pop()
        yield opened(row, rng.choice(turns)) if row.plain and rng.random() < SYSTEM_SHARE else row
