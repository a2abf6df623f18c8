"""Exchanges that are answered by copying: facts that a prompt, a passage or the user has just stated.

Names, places and shops are put together from characters, so that hardly one comes twice: a model that learns these
exchanges has to read the context, since there is nothing to remember.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from exchange_sums import numeral
from exchange_tables import Message, assistant, conversation, lines, system, user

#: Slots filled with one word of the list of that name.
LISTS = {
    "pet": "pets",
    "store": "stores",
    "animal": "animals",
    "food": "foods",
    "drink": "drinks",
    "colour": "colours",
    "fear": "fears",
    "hobby": "hobbies",
    "skill": "skills",
    "hour": "hours",
    "room": "rooms",
    "tree": "trees",
    "flower": "flowers",
    "goods": "goods",
    "thing": "things",
    "month": "months",
    "season": "seasons",
    "crop": "crops",
    "spot": "spots",
    "lesson": "lessons",
    "subject": "subjects",
}


@dataclass(frozen=True)
class Clause:
    """A fact about somebody, with questions about it and answers; `{S}` is whom one asks about, `{R}` the reply's."""

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@cache
def table() -> dict[str, list[str]]:
    """The lines of `profiles.txt` by section."""
    found: dict[str, list[str]] = {}
    for line in lines("profiles"):
        if line.startswith("#"):
            found[line[1:].strip()] = current = []
        else:
            current.append(line)
    return found


@cache
def words(section: str) -> list[str]:
    """The words of a section, which stand on one line."""
    return table()[section][0].split()


@cache
def characters(section: str) -> str:
    """The characters of a section."""
    return table()[section][0]


@cache
def clauses() -> list[Clause]:
    """Every clause of the table."""
    rows = [line.split("=>") for line in table()["clauses"]]
    return [Clause(text, tuple(asked.split("｜")), tuple(said.split("｜"))) for text, asked, said in rows]


def a_name(rng: random.Random) -> str:
    """A name: mostly surname and one or two characters, now and then what neighbours call somebody."""
    surname, given = rng.choice(characters("surnames")), [rng.choice(characters("given")) for _ in range(2)]
    kind = rng.random()
    if kind < 0.2:
        return surname + given[0]
    if kind < 0.75:
        return surname + "".join(given)
    number, elder = rng.choice("二三四五六七八九"), rng.choice("娘叔爷嫂")
    plain = ("老{0}", "老{0}头", "{0}老{2}", "阿{1}", "小{1}", "{0}大{3}", "{0}小{1}")
    return rng.choice(plain).format(surname, given[0], number, elder)


def a_place(rng: random.Random) -> str:
    """A place of two or three parts that is on no map."""
    middle = rng.choice(characters("placemid")) if rng.random() < 0.7 else ""
    return rng.choice(characters("placehead")) + middle + rng.choice(words("placetail"))


def joined(rng: random.Random, head: str, tail: str) -> str:
    """Two characters of one section and an ending of another."""
    return "".join(rng.sample(characters(head), 2)) + rng.choice(words(tail))


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "n": lambda rng: numeral(rng.randint(11, 69)),
    "k": lambda rng: numeral(rng.randint(3, 9)),
    "place": a_place,
    "who": a_name,
    "trade": lambda rng: rng.choice(words("trades")),
    "shop": lambda rng: joined(rng, "shophead", "shoptail"),
    "book": lambda rng: joined(rng, "bookhead", "booktail"),
    "boat": lambda rng: "".join(rng.sample(characters("shophead"), 2)) + "号",
}
MAKERS |= {slot: (lambda rng, section=section: rng.choice(words(section))) for slot, section in LISTS.items()}


def filled(clause: Clause, trade: str, rng: random.Random) -> Clause:
    """The clause with a value in each slot but `{S}` and `{R}`."""
    slots = set(re.findall(r"{(\w+)}", clause.text))
    values = {slot: trade if slot == "trade" else MAKERS[slot](rng) for slot in sorted(slots)}
    values |= {"S": "{S}", "R": "{R}"}
    return Clause(
        clause.text.format_map(values),
        tuple(text.format_map(values) for text in clause.questions),
        tuple(text.format_map(values) for text in clause.answers),
    )


def some(count: int, trade: str, rng: random.Random) -> list[Clause]:
    """Facts that do not contradict each other: no two of them answer the same question."""
    chosen: list[Clause] = []
    for clause in rng.sample(clauses(), len(clauses())):
        start, asked = clause.text[:2], set(clause.questions)
        if all(start != other.text[:2] and asked.isdisjoint(other.questions) for other in chosen):
            chosen.append(clause)
        if len(chosen) == count:
            break
    return [filled(clause, trade, rng) for clause in chosen]


def asked(clause: Clause, about: str, reply: str, rng: random.Random) -> list[Message]:
    """A question about the fact and its answer."""
    question, answer = rng.choice(clause.questions), rng.choice(clause.answers)
    return [user(question.format(S=about, R=reply)), assistant(answer.format(S=about, R=reply))]


def played(rng: random.Random) -> list[Message]:
    """A person named in the system prompt answers one to four questions about what the prompt says."""
    trade, name = rng.choice(words("trades")), a_name(rng)
    facts = some(rng.choice((1, 2, 2, 3, 3, 4)), trade, rng)
    values = {"trade": trade, "name": name, "manner": rng.choice(words("manners"))}
    text = rng.choice(table()["prompts"]).format_map(values | {"facts": "，".join(fact.text for fact in facts)})
    you = rng.choice(("您", "您", "你"))
    questions, answers = (line.split("｜") for line in table()["names"])
    introduced = [user(rng.choice(questions)), assistant(rng.choice(answers).format_map(values))]
    parts = [asked(fact, you, "我", rng) for fact in rng.sample(facts, rng.randint(1, len(facts)))]
    if rng.random() < 0.35:
        parts = [introduced, *parts][: rng.choice((1, 1, 4))]
    return [system(text), *[message for part in parts for message in part]]


def passage(rng: random.Random) -> list[Message]:
    """The user states facts about one or two people and asks for one of them, then perhaps for another."""
    people = [a_name(rng) for _ in range(rng.choice((1, 2, 2)))]
    facts = [(name, fact) for name in people for fact in some(rng.choice((1, 2)), rng.choice(words("trades")), rng)]
    text = "".join(f"{name}{'，'.join(f.text for owner, f in facts if owner == name)}。" for name in people)
    turns = [asked(fact, name, name, rng) for name, fact in rng.sample(facts, min(len(facts), rng.choice((1, 1, 2))))]
    turns[0][0] = user(rng.choice((text + "{}", "{}" + text)).format(turns[0][0]["content"]))
    return [message for turn in turns for message in turn]


def told(rng: random.Random) -> list[Message]:
    """The user says something about themselves and asks for it in a later turn."""
    facts = some(rng.choice((1, 1, 2)), rng.choice(words("trades")), rng)
    about_user = "，".join(f"你{fact.text}" if place == 0 else fact.text for place, fact in enumerate(facts))
    said = rng.choice(table()["told"][0].split("｜")).format(told=about_user)
    opening = [user("我" + "，".join(fact.text for fact in facts) + "。"), assistant(said)]
    parts = [asked(fact, "我", "你", rng) for fact in rng.sample(facts, rng.randint(1, len(facts)))]
    return [*opening, *[message for part in parts for message in part]]


def profiles(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Conversations of the three kinds, most of them with a person in the system prompt."""
    kinds = {"profile-person": played, "profile-passage": passage, "profile-told": told}
    names = rng.choices(list(kinds), (6, 2, 1), k=count)
    return [conversation(name, *kinds[name](rng)) for name in names]
