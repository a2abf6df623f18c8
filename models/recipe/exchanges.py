"""Conversations made out of small tables: facts, sums, persons of the system prompt, tools, chains of questions.

`generated(seed)` is the whole interface; the tables are in `tables/`, their form is told in `exchange_tables`.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import exchange_facts
import exchange_persons
import exchange_profiles
import exchange_sums
import exchange_tools

CHAT_FOLDER = Path(__file__).resolve().parent / "chat"
_MARKS = re.compile(r"[\W_]+")


def bare(text: str) -> str:
    """The text without punctuation and blanks, to compare wordings."""
    return _MARKS.sub("", text)


def written_questions(folder: Path = CHAT_FOLDER) -> set[str]:
    """The questions that the written pairs answer already, without punctuation."""
    rows = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    return {bare(json.loads(row)["question"]) for row in rows if row.strip()}


def first_question(item: dict[str, Any]) -> str | None:
    """What a conversation without system prompt and tools begins with; none for the others."""
    first = item["messages"][0]
    return None if first["role"] == "system" or "tools" in item else bare(first["content"])


def generated(seed: int = 0) -> list[dict[str, Any]]:
    """All made conversations in a mixed order, none twice; the same seed gives the same list.

    Each is `{"topic", "messages"}`, with `"tools"` where tools are offered. None begins with a question that the
    written pairs hold, so that the two never contradict each other.
    """
    rng = random.Random(seed)
    made = [
        *exchange_facts.singles(rng),
        *exchange_facts.thoughts(rng),
        *exchange_facts.chains(rng, 2000),
        *exchange_facts.quizzes(rng, 350),
        *exchange_facts.told(rng, 700),
        *exchange_facts.manners(rng, 600),
        *exchange_sums.exchanges(rng),
        *exchange_persons.persons(rng, 3400),
        *exchange_profiles.profiles(rng, 24_000),
        *exchange_tools.exchanges(rng),
    ]
    written = written_questions()
    different = {json.dumps(item["messages"], ensure_ascii=False): item for item in made}
    result = [item for item in different.values() if first_question(item) not in written]
    rng.shuffle(result)
    return result
