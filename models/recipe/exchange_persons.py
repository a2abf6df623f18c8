"""Exchanges in which the system prompt names an invented person, and the answers are to be found in that prompt."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from exchange_sums import numeral
from exchange_tables import (
    Group,
    Message,
    Section,
    assistant,
    conversation,
    fill,
    filled,
    lines,
    sections,
    system,
    user,
)

#: The lines of `names.txt`, in this order.
SURNAMES, DOUBLE_SURNAMES, MALE, FEMALE, MONKS, TOWNS, HOBBIES, FAMILIES = (line.split("、") for line in lines("names"))
WOMENS_TRADES = {"厨娘", "绣娘", "卖花姑娘"}
MONK_TRADES = {"和尚", "道士"}
OLD = {"老汉", "老朽", "老夫", "小老儿", "老衲", "老道", "老婆子"}
YOUNG = {"小女子", "小生", "晚生", "小僧", "小道", "奴家"}
WOMENS_SELVES = {"小女子", "小妇人", "奴家", "老婆子"}
BARE = "我"


@dataclass(frozen=True)
class Trade:
    """A trade of `trades.txt`, with what its people say."""

    name: str
    ancient: bool
    selves: list[str]
    shop: str
    does: str
    goods: str
    lines: list[tuple[list[str], str]] = field(default_factory=list)


@cache
def trades() -> list[Trade]:
    """Every trade of the table."""
    found: list[Trade] = []
    for line in lines("trades"):
        if line.startswith("#"):
            name, era, selves, shop, does, goods = line[1:].strip().split("｜")
            found.append(Trade(name, era == "古", selves.split("、"), shop, does, goods))
        else:
            questions, answer = line.split("=>")
            found[-1].lines.append((questions.split("｜"), answer))
    return found


def a_name(trade: Trade, me: str, rng: random.Random) -> tuple[str, str]:
    """A name that fits trade and self-designation, and its surname."""
    if trade.name in MONK_TRADES:
        return rng.choice(MONKS), ""
    surname = rng.choice(DOUBLE_SURNAMES) if rng.random() < 0.05 else rng.choice(SURNAMES)
    woman = trade.name in WOMENS_TRADES or me in WOMENS_SELVES
    man = trade.ancient or me in {"老汉", "老夫", "俺"}
    return surname + rng.choice(FEMALE if woman or (not man and rng.random() < 0.5) else MALE), surname


def a_person(rng: random.Random) -> tuple[Trade, dict[str, str]]:
    """A trade and the facts of one person in it."""
    trade = rng.choice(trades())
    me = rng.choice(trade.selves)
    low, high = (55, 79) if me in OLD or trade.name == "老船长" else (18, 28) if me in YOUNG else (24, 55)
    name, surname = a_name(trade, me, rng)
    values = {"name": name, "trade": trade.name, "town": rng.choice(TOWNS), "shop": trade.shop, "does": trade.does}
    values |= {
        "age": numeral(rng.randint(low, high)),
        "hobby": rng.choice(HOBBIES),
        "family": family(trade, low, name, rng),
        "me": me,
    }
    values |= {"surname": surname} if surname else {}
    values |= {"goods": trade.goods} if trade.goods != "-" else {}
    values["you"] = "客官" if trade.ancient and ((surname and trade.goods != "-") or trade.name == "客栈伙计") else "您"
    return trade, values


def family(trade: Trade, age: int, name: str, rng: random.Random) -> str:
    """Relatives that someone of this trade, least age and name may have."""
    if trade.name in MONK_TRADES:
        return rng.choice(("一位师父", "两个师弟", "师父和一个师兄"))
    if age < 20 or trade.name in WOMENS_TRADES:
        return rng.choice(("一个妹妹", "两个弟弟", "奶奶和一只猫", "父母和一个哥哥", "爷爷和奶奶", "父母和两个妹妹"))
    young, old = {"小孙子", "外孙女", "老伴"}, {"父", "母", "爷爷", "奶奶"}
    unfit = (old if age > 50 else young) | ({"妻子"} if name.endswith(tuple(FEMALE)) else set())
    return rng.choice([text for text in FAMILIES if not any(word in text for word in unfit)])


def prompt_of(trade: Trade, values: dict[str, str], rng: random.Random) -> tuple[str, dict[str, str]]:
    """A system prompt, and the facts that its reader knows."""
    prompts, stated = sections("persons")[:2]
    group = rng.choice([*prompts.groups, prompts.groups[0]])
    default = trade.selves[0] if trade.name in MONK_TRADES else BARE
    known = dict(values)
    self_line = fill(rng.choice(stated.groups[0].of("?")), values) or ""
    if values["me"] == default or (rng.random() < 0.3 and values["me"] not in WOMENS_SELVES):
        self_line, known["me"] = "", default
    text = rng.choice(group.of("?")).format_map(values | {"self": self_line})
    for optional in ("age", "hobby", "family"):
        if values[optional] not in text or group.name not in ("full", optional):
            known.pop(optional)
    return text, known


def answered(group: Group, values: dict[str, str], rng: random.Random) -> tuple[list[Message], str | None] | None:
    """One question about the person and its answer, with a thought if the group has some; none if facts lack."""
    answers = [text for text in filled(group.of("!"), values) if 8 <= len(text) <= 45]
    questions = filled(group.of("?"), values)
    if not answers or not questions:
        return None
    thoughts = [text for text in filled(group.of("%"), values) if 10 <= len(text) <= 50]
    return [user(rng.choice(questions)), assistant(rng.choice(answers))], rng.choice(thoughts) if thoughts else None


def shop_talk(trade: Trade, values: dict[str, str], rng: random.Random) -> list[Message]:
    """A question that people ask in this trade, with its answer in the person's own words."""
    questions, answer = rng.choice(trade.lines)
    return [user(rng.choice(questions)), assistant(answer.format_map(values))]


def talk(asks: Section, trade: Trade, values: dict[str, str], turns: int, rng: random.Random) -> list[list[Message]]:
    """Exchanges with the person: greeting first, farewell last, no question kind twice."""
    ends = {"bye", "thanks"}
    found: list[list[Message]] = []
    if turns > 1 and rng.random() < 0.3 and (hello := answered(asks.group("hello"), values, rng)):
        found.append(hello[0])
    middle = [g for g in asks.groups if g.name not in ends | {"hello"}]
    rng.shuffle(middle)
    last = rng.random() < 0.25 and turns > 2
    while len(found) < turns - last:
        if rng.random() < 0.25:
            part = shop_talk(trade, values, rng)
            if part[1] not in [p[1] for p in found]:
                found.append(part)
        elif middle and (made := answered(middle.pop(), values, rng)):
            found.append(made[0])
        elif not middle:
            break
    if last and (made := answered(asks.group(rng.choice(sorted(ends))), values, rng)):
        found.append(made[0])
    return found


def persons(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Conversations with invented persons, half of them of more than one turn."""
    asks = sections("persons")[2]
    names = [a_person(random.Random(i))[1]["name"] for i in range(200)]
    result = []
    while len(result) < count:
        trade, values = a_person(rng)
        prompt, known = prompt_of(trade, values, rng)
        other = rng.choice([n for n in names if n != known["name"]])
        known["other"] = other
        turns = rng.choice((1, 1, 1, 1, 2, 2, 3, 3, 4, 5))
        if turns == 1 and rng.random() < 0.15:
            made = answered(rng.choice([g for g in asks.groups if g.of("%")]), known, rng)
            if made and made[1]:
                question, reply = made[0]
                messages = [system(prompt), question, reply | {"reasoning_content": made[1]}]
                result.append(conversation("person-thought", *messages))
            continue
        if turns == 1 and rng.random() < 0.7:
            made = answered(rng.choice(asks.groups), known, rng)
            parts = [made[0]] if made else []
        else:
            parts = talk(asks, trade, known, turns, rng)
        if parts:
            result.append(conversation("person", system(prompt), *[m for part in parts for m in part]))
    return result
