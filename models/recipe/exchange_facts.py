"""Exchanges out of the tables of facts: single questions, thoughts, chains of questions, things the user tells."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from exchange_tables import (
    Group,
    Message,
    Row,
    Section,
    assistant,
    conversation,
    facts,
    fill,
    filled,
    lines,
    sections,
    system,
    user,
    with_others,
)

#: At most this many single questions of one group, so that no table drowns the others.
GROUP_LIMIT = 120
SURE = ("你确定吗？", "真的吗？", "你没记错吧？", "你肯定吗？", "确定是这样吗？")
SURE_ANSWERS = ("确定，{}", "我确定，{}", "没有记错，{}", "可以肯定，{}")
AGAIN = ("我没听清，再说一遍。", "请再说一次。", "你刚才说什么？", "能重复一下吗？")
AGAIN_ANSWERS = ("再说一遍：{}", "我说的是：{}", "刚才说的是：{}")
RECALL = ("我刚才问了什么？", "我上一个问题是什么？", "你记得我刚才问的话吗？")
RECALL_ANSWERS = ("你刚才问的是：{}", "你问的是：{}", "上一个问题是：{}")
THANKS = ("谢谢。", "谢谢你。", "明白了，谢谢。", "知道了，多谢。", "谢谢你告诉我。")
THANKS_ANSWERS = (
    "不客气，还想知道什么就问我。",
    "不用谢，能帮到你就好。",
    "不客气，很高兴能帮上你。",
    "不用客气，随时可以再问。",
)
TURNS = ("还有个问题，", "换个问题，", "那我再问一个，", "另外，", "对了，", "再问你一下，")
QUIZ = ("考考我吧。", "给我出道题。", "问我一个问题吧。", "来一道小题目。", "你来提问，我来答。", "我想做个小测验。")
RIGHT = ("答对了，{}", "没错，{}", "完全正确，{}", "你答得对，{}")
WRONG = ("不对，{}", "差一点，{}", "这次答错了，{}", "不是的，{}")


@dataclass(frozen=True)
class Asked:
    """A question about a row, answered."""

    section: Section
    group: Group
    values: dict[str, str]
    question: str
    answer: str

    @property
    def statement(self) -> str:
        """The plainest answer, which can stand after a comma."""
        return fill(self.group.of("!")[0], self.values) or self.answer


def answers_of(group: Group, values: dict[str, str]) -> list[str]:
    """The answers of a fitting length; none if the values do not suffice for each of them."""
    answers = filled(group.of("!"), values)
    return [text for text in answers if 8 <= len(text) <= 45] if len(answers) == len(group.of("!")) else []


def asked(section: Section, group: Group, row: Row, mark: str, rng: random.Random) -> Asked | None:
    """One question with this mark about the row, and one of its answers; none if the row lacks a field."""
    values = with_others(section, row, rng)
    questions, answers = filled(group.of(mark), values), answers_of(group, values)
    if not questions or not answers:
        return None
    return Asked(section, group, values, rng.choice(questions), rng.choice(answers))


def singles(rng: random.Random) -> list[dict[str, Any]]:
    """Every question form of every row, within `GROUP_LIMIT`, with one of the answer forms."""
    result = []
    for section in facts():
        for group in section.groups:
            items = []
            for row in section.rows:
                values = with_others(section, row, rng)
                answers = answers_of(group, values)
                for question in filled(group.of("?"), values) if answers else []:
                    items.append(conversation(group.name, user(question), assistant(rng.choice(answers))))
            result += rng.sample(items, min(len(items), GROUP_LIMIT))
    return result


def thoughts(rng: random.Random, share: float = 0.4) -> list[dict[str, Any]]:
    """Questions of the tables with a thought before the answer, and the written ones of `thoughts.txt`."""
    result = []
    for section in facts():
        for group in section.groups:
            for row in section.rows if group.of("%") else []:
                one = asked(section, group, row, "?", rng)
                if one and rng.random() < share:
                    thought = rng.choice(filled(group.of("%"), one.values))
                    if 10 <= len(thought) <= 50:
                        result.append(conversation(group.name, user(one.question), assistant(one.answer, thought)))
    for line in lines("thoughts"):
        questions, thought, answer = line.split("=>")
        result += [conversation("thought", user(q), assistant(answer, thought)) for q in questions.split("｜")]
    return result


def pair(one: Asked) -> list[Message]:
    """The question and its answer as two messages."""
    return [user(one.question), assistant(one.answer)]


def chained(section: Section, group: Group, rng: random.Random) -> list[Asked]:
    """One to three questions of one group, each about another row, the later ones leaning on the first."""
    rows = rng.sample(section.rows, min(len(section.rows), rng.choice((1, 2, 2, 3, 3))))
    made = [asked(section, group, row, "~" if i else "?", rng) for i, row in enumerate(rows)]
    return [one for one in made if one] if made[0] else []


def about_one(section: Section, rng: random.Random) -> list[Asked]:
    """Two or three questions about one row, the later ones calling it 它, and perhaps the last about another row."""
    groups = [g for g in section.groups if g.of("~") or g.of("@")]
    leaning = [g for g in groups if g.of("@")]
    if not leaning:
        return []
    row, first = rng.choice(section.rows), rng.choice(groups)
    rest = [g for g in leaning if g is not first]
    made = [asked(section, first, row, "?", rng)]
    made += [asked(section, g, row, "@", rng) for g in rng.sample(rest, min(len(rest), rng.choice((1, 1, 2))))]
    found = [one for one in made if one]
    last = found[-1].group if found else first
    if made[0] and len(found) > 1 and last.of("~") and rng.random() < 0.4:
        other = rng.choice([r for r in section.rows if r["a"] != row["a"]])
        found += [one for one in [asked(section, last, other, "~", rng)] if one]
    return found if made[0] and len(found) > 1 else []


def ending(one: Asked, rng: random.Random) -> list[Message]:
    """What the user says after an answer: doubt, a request to repeat or recall it, thanks."""
    kind = rng.randrange(5)
    if kind == 0:
        return [user(rng.choice(SURE)), assistant(rng.choice(SURE_ANSWERS).format(one.statement))]
    if kind == 1:
        return [user(rng.choice(AGAIN)), assistant(rng.choice(AGAIN_ANSWERS).format(one.answer))]
    if kind == 2 and len(one.question) > 6:
        return [user(rng.choice(RECALL)), assistant(rng.choice(RECALL_ANSWERS).format(one.question))]
    return [user(rng.choice(THANKS)), assistant(rng.choice(THANKS_ANSWERS))]


def another(rng: random.Random) -> list[Message]:
    """A question out of any table, opened as a change of subject."""
    section = rng.choice([s for s in facts() if s.groups[0].key != "-"])
    group = rng.choice([g for g in section.groups if g.key != "-"])
    one = asked(section, group, rng.choice(section.rows), "?", rng)
    return [user(rng.choice(TURNS) + one.question), assistant(one.answer)] if one else []


def chains(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Conversations of two to five turns in which later questions need the earlier ones."""
    tables = [s for s in facts() if any(g.of("~") for g in s.groups)]
    result = []
    while len(result) < count:
        section = rng.choice(tables)
        group = rng.choice([g for g in section.groups if g.of("~")])
        made = about_one(section, rng) if rng.random() < 0.35 else chained(section, group, rng)
        if not made:
            continue
        messages = [message for one in made for message in pair(one)]
        if len(made) == 1 or rng.random() < 0.3:
            messages += ending(made[-1], rng)
        if len(messages) <= 6 and rng.random() < 0.25:
            messages += another(rng)
        if len(messages) <= 8 and rng.random() < 0.1 and messages[-2]["content"] not in THANKS:
            messages += [user(rng.choice(THANKS)), assistant(rng.choice(THANKS_ANSWERS))]
        result.append(conversation("chain-" + section.name, *messages))
    return result


def quizzes(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """The assistant asks, the user answers right or wrong, the assistant judges."""
    result = []
    while len(result) < count:
        section = rng.choice(facts())
        group = rng.choice([*[g for g in section.groups if g.key != "-" and g.of("~")], section.groups[0]])
        one = asked(section, group, rng.choice(section.rows), "?", rng)
        wrong = "x" + group.key
        plain = one and len(one.question) >= 8 and one.question.endswith("？") and "你" not in one.question
        if (
            not one
            or not plain
            or any(word in one.question for word in ("我", "请", "那"))
            or group.key not in one.values
        ):
            continue
        right = rng.random() < 0.6 or wrong not in one.values or section.name in DOUBTFUL
        said = one.values[group.key if right else wrong]
        messages = [user(rng.choice(QUIZ)), assistant(one.question)]
        messages += [user(rng.choice(("{}。", "是{}。", "我想是{}。", "应该是{}吧。")).format(said))]
        messages += [assistant(rng.choice(RIGHT if right else WRONG).format(one.statement))]
        result.append(conversation("quiz-" + section.name, *messages, *(another(rng) if rng.random() < 0.2 else [])))
    return result


#: Sections where another row's field may be right as well, so that it must not be called wrong.
DOUBTFUL = {
    "synonym",
    "opposite",
    "measure",
    "idiom",
    "advice-feel",
    "advice-event",
    "weather",
    "city",
    "yesno",
    "thing-use",
}
DOUBTFUL |= {
    "buy-place",
    "material",
    "food-made",
    "symbol",
    "manners",
    "season",
    "daytime",
    "nature-why",
    "animal",
    "crop",
}
DOUBTFUL |= {"profession", "body", "weather-sign", "invention", "festival", "colour", "direction"}


def told(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """The user tells one or two things about himself and asks for them, at once or after another question."""
    tables = sections("self")
    result = []
    while len(result) < count:
        chosen = rng.sample(tables, rng.choice((1, 1, 2)))
        rows = [rng.choice(section.rows) for section in chosen]
        messages: list[Message] = []
        for section, row in zip(chosen, rows, strict=True):
            one = asked(section, section.group("say"), row, "?", rng)
            messages += pair(one) if one else []
        if rng.random() < 0.4:
            messages += another(rng)
        index = rng.randrange(len(chosen))
        one = asked(chosen[index], chosen[index].group("ask"), rows[index], "?", rng)
        messages += pair(one) if one else []
        if len(messages) <= 8 and rng.random() < 0.25:
            messages += [user(rng.choice(THANKS)), assistant(rng.choice(THANKS_ANSWERS))]
        result.append(conversation("told-" + chosen[index].name, *messages))
    return result


def each_sentence(text: str, end: str) -> str:
    """The text with a particle before the end of every sentence."""
    return "".join(end + c if c in "。！" else c for c in text)


#: Instructions on form: the prompts, and what becomes of an answer.
MANNERS: dict[str, tuple[tuple[str, ...], Any]] = {
    "form-ya": (
        (
            "每句话的结尾都要加一个呀字。",
            "回答时，每句话都用呀结尾。",
            "请在每句话的末尾加上呀。",
            "你说话总以呀结尾。",
        ),
        lambda one: each_sentence(one.answer, "呀"),
    ),
    "form-guest": (
        ("称呼用户为客官。", "回答时先叫一声客官。", "请把用户叫作客官。", "你对用户的称呼是客官。"),
        lambda one: "客官，" + one.answer,
    ),
    "form-student": (
        ("称呼用户为同学。", "回答前先叫一声同学。", "请把用户叫作同学。", "你对用户的称呼是同学。"),
        lambda one: "同学，" + one.answer,
    ),
    "form-greeting": (
        ("每次回答都先说您好。", "回答之前先问好，说您好。", "请先说您好，再回答问题。", "开口先说您好。"),
        lambda one: "您好！" + one.answer,
    ),
    "form-wish": (
        ("回答完都要说祝您愉快。", "每次回答的最后加一句祝您愉快。", "请在末尾说祝您愉快。", "答完之后说祝您愉快。"),
        lambda one: one.answer + "祝您愉快。",
    ),
    "form-brief": (
        ("请简短回答，只说答案。", "只说答案，不要多说。", "回答越短越好，只给答案。", "用最少的字回答。"),
        lambda one: one.values[one.group.key] + "。",
    ),
}


def manners(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Questions under a system prompt that asks for a form, one or two turns long."""
    result = []
    tables = [s for s in facts() if any(g.key != "-" and g.of("~") for g in s.groups)]
    while len(result) < count:
        name = rng.choice(list(MANNERS))
        prompts, shape = MANNERS[name]
        section = rng.choice(tables)
        group = rng.choice([g for g in section.groups if g.key != "-" and g.of("~")])
        made = chained(section, group, rng)[: rng.choice((1, 1, 2))]
        if not made or any(one.group.key not in one.values or len(shape(one)) > 45 for one in made):
            continue
        messages = [system(rng.choice(prompts))]
        for one in made:
            messages += [user(one.question), assistant(shape(one))]
        result.append(conversation(name, *messages))
    return result
