"""The written dialogue: a plain text format, its wordings and slots, and the conversations that come out of it.

    # topic
    问：今天好冷啊。｜外面真冷。
    答：冷就多穿一件衣服，再喝杯热水暖一暖。

A blank line ends a conversation. `系：` is a system prompt and `想：` a thought. `｜` separates wordings of the first
question. `## person` opens a person whose `系：` lines hold for every conversation until the next `##`; slots such as
`{名}` or `{茶=龙井｜毛尖}` are drawn anew for each conversation, the same value in all of its turns.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, Any]

LINE = re.compile(r"(系|问|答|想)：(.+)$")
#: The header of a person: trade, time, man or woman.
PERSON = re.compile(r"-(?:old|modern)-[mf]$")
#: Values of the slots that every person has, by name of the list.
VALUES = {
    line.partition(":")[0]: line.partition(":")[2].split()
    for line in (Path(__file__).parent / "tables" / "slots.txt").read_text(encoding="utf-8").splitlines()
}
ORDER = re.compile(r"(问想?答)+")
SLOT = re.compile(r"\{([^{}=]+)(?:=([^{}]+))?\}")


@dataclass
class Talk:
    """One written conversation.

    Attributes:
        topic: its header, or the person's.
        systems: system prompts, any of which may open it.
        turns: kind (问, 想 or 答) and text, in order.
        where: file and line, for messages.
    """

    topic: str
    systems: list[str]
    turns: list[tuple[str, str]] = field(default_factory=list)
    where: str = ""


def read(path: Path) -> list[Talk]:
    """The conversations of one file.

    Raises:
        ValueError: a line that is none of the format, or turns in another order; with file and line.
    """
    talks: list[Talk] = []
    topic, persons, open_talk = "", [], None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path.name}, line {number}"
        if not line.strip():
            open_talk = None
        elif line.startswith("#"):
            topic, persons, open_talk = line.strip("# "), [], None
        elif not (match := LINE.match(line)):
            raise ValueError(f"{where}: begin the line with 系：, 问：, 答：, 想： or #")
        elif match[1] == "系" and open_talk is None and PERSON.search(topic):
            persons.append(match[2])
        else:
            if open_talk is None:
                open_talk = Talk(topic, persons, where=where)
                talks.append(open_talk)
            open_talk.turns.append((match[1], match[2]))
    for talk in talks:
        if talk.turns and talk.turns[0][0] == "系":
            talk.systems = [talk.turns.pop(0)[1]]
        if not ORDER.fullmatch("".join(kind for kind, _ in talk.turns)):
            raise ValueError(f"{talk.where}: 问, 答 and 想 are not in order")
    return talks


def names(topic: str, rng: random.Random) -> dict[str, str]:
    """Values for the slots that every person has."""
    draw = lambda name: rng.choice(VALUES[name])  # noqa: E731
    surname, given = draw("surnames"), draw("women" if topic.endswith("-f") else "men")
    place = draw("old places" if "-old-" in topic else "new places")
    return {"姓": surname, "名": surname + given, "地": place, "岁": draw("ages")}


def fill(texts: list[str], values: dict[str, str], rng: random.Random) -> list[str]:
    """The texts with every slot filled; a list is drawn from at its first use and kept.

    Raises:
        ValueError: a slot without a value.
    """
    values = dict(values)
    for text in texts:
        for name, choices in SLOT.findall(text):
            if choices:
                values[name] = rng.choice(choices.split("｜"))

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"no value for the slot {{{match[1]}}} in {texts}")
        return values[match[1]]

    return [SLOT.sub(value, text) for text in texts]


def conversations(talk: Talk, rng: random.Random, draws: int = 1) -> Iterator[list[Message]]:
    """One conversation for each wording of the first question; for a person, `draws` of each."""
    lists = [text for text in talk.systems if "=" in text]  # where a slot's choices are listed
    for wording in SLOT.sub(lambda m: m[0].replace("｜", "\0"), talk.turns[0][1]).split("｜"):
        turns = [(talk.turns[0][0], wording.replace("\0", "｜")), *talk.turns[1:]]
        for _ in range(draws if talk.systems and len(talk.systems) > 1 else 1):
            chosen = [rng.choice(talk.systems)] if talk.systems else []
            texts = fill([*lists, *chosen, *(text for _, text in turns)], names(talk.topic, rng), rng)[len(lists) :]
            messages = [{"role": "system", "content": texts[0]}] if chosen else []
            for (kind, _), text in zip(turns, texts[len(chosen) :], strict=True):
                if kind == "想":
                    messages.append({"role": "assistant", "reasoning_content": text})
                elif messages and "content" not in messages[-1]:
                    messages[-1]["content"] = text
                else:
                    messages.append({"role": "user" if kind == "问" else "assistant", "content": text})
            yield messages


def all_conversations(folder: Path, seed: int = 0, draws: int = 3) -> list[tuple[str, list[Message]]]:
    """File name and messages of every conversation in the folder's `*.txt`."""
    rng = random.Random(seed)
    return [
        (path.name, messages)
        for path in sorted(folder.glob("*.txt"))
        for talk in read(path)
        for messages in conversations(talk, rng, draws)
    ]
