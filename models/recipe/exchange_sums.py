"""Exchanges about numbers up to one hundred, in Chinese numerals and a fifth of the sums in digits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exchange_tables import Message, assistant, conversation, user

DIGITS = "零一二三四五六七八九"
DIGIT_SHARE = 0.2
#: Things to count, with their measure word and a verb for getting them.
THINGS = (
    ("个", "苹果", "买了", "吃了"),
    ("本", "书", "借了", "还了"),
    ("支", "铅笔", "买了", "送了"),
    ("颗", "糖", "得到", "吃了"),
    ("张", "邮票", "收到", "送了"),
    ("朵", "花", "摘了", "送了"),
    ("条", "鱼", "钓了", "放了"),
    ("只", "鸡", "买了", "卖了"),
    ("块", "饼干", "拿了", "吃了"),
    ("个", "气球", "买了", "放了"),
    ("枚", "硬币", "捡了", "花了"),
    ("张", "贴纸", "得到", "用了"),
    ("个", "橘子", "摘了", "吃了"),
    ("只", "鸭子", "买了", "卖了"),
)
NAMES = "小明 小红 小华 小丽 小军 妈妈 爷爷 弟弟 妹妹 小兰 小林 奶奶".split()


def numeral(number: int) -> str:
    """A number from 0 to 9999 in Chinese numerals."""
    if number < 10:
        return DIGITS[number]
    if number < 20:
        return "十" + (DIGITS[number % 10] if number % 10 else "")
    for size, unit in ((1000, "千"), (100, "百"), (10, "十")):
        if number >= size:
            head, rest = divmod(number, size)
            if not rest:
                return DIGITS[head] + unit
            inner = numeral(rest) if rest >= 20 or rest < 10 else "一" + numeral(rest)
            return DIGITS[head] + unit + ("零" if rest < size // 10 else "") + (inner if size > 10 else DIGITS[rest])
    raise ValueError(number)


def counted(number: int) -> str:
    """A number before a measure word: 两 for two."""
    return "两" if number == 2 else numeral(number)


@dataclass(frozen=True)
class Sum:
    """Two numbers and what is done with them."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """What it comes to; a division is exact."""
        left, right = self.left, self.right
        return {"加": left + right, "减": left - right, "乘": left * right, "除以": left // right if right else 0}[
            self.sign
        ]

    def thought(self) -> str:
        """The way to the result, in words."""
        a, b, n = self.left, self.right, numeral
        if self.sign == "乘":
            return f"{n(a)}乘{n(b)}，就是{n(b)}个{n(a)}相加，等于{n(self.result)}。"
        if self.sign == "除以":
            return f"{n(b)}乘{n(self.result)}等于{n(a)}，所以{n(a)}除以{n(b)}是{n(self.result)}。"
        if self.sign == "加" and a > 9 and b > 9:
            tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
            return (
                f"先算整十：{n(a // 10 * 10)}加{n(b // 10 * 10)}等于{n(tens)}；"
                f"再算个位：{n(a % 10)}加{n(b % 10)}等于{n(ones)}；合起来是{n(self.result)}。"
            )
        if self.sign == "减" and b > 9 and b % 10:
            rest = a - b // 10 * 10
            return f"先减整十：{n(a)}减{n(b // 10 * 10)}等于{n(rest)}，再{n(rest)}减{n(b % 10)}等于{n(self.result)}。"
        if self.sign == "加" and a % 10 + b % 10 > 10 and b < 10:
            gap, full = 10 - a % 10, n(a + 10 - a % 10)
            return f"{n(a)}加{n(gap)}等于{full}，{n(b)}还剩{n(b - gap)}，{full}加{n(b - gap)}等于{n(self.result)}。"
        return f"{n(a)}{self.sign}{n(b)}，算一算，等于{n(self.result)}。"


QUESTIONS = (
    "{a}{s}{b}等于几？",
    "{a}{s}{b}是多少？",
    "算一下{a}{s}{b}。",
    "请问{a}{s}{b}等于多少？",
    "{a}{s}{b}得多少？",
    "帮我算算{a}{s}{b}。",
    "{a}{s}{b}的结果是什么？",
    "你会算{a}{s}{b}吗？",
)
ANSWERS = (
    "{a}{s}{b}等于{r}。",
    "算出来了，{a}{s}{b}等于{r}。",
    "答案是{r}，{a}{s}{b}等于{r}。",
    "{a}{s}{b}，结果是{r}。",
    "{a}{s}{b}得{r}。",
)
SYMBOLS = {"加": "+", "减": "-", "乘": "×", "除以": "÷"}
DIGIT_QUESTIONS = (
    "{a}{s}{b}等于几？",
    "{a}{s}{b}=?",
    "{a}{s}{b}是多少？",
    "算一下{a}{s}{b}。",
    "计算{a}{s}{b}。",
)
DIGIT_ANSWERS = (
    "{a}{s}{b}等于{r}。",
    "{a}{s}{b}={r}，答案是{r}。",
    "算出来了，{a}{s}{b}等于{r}。",
)


#: So many stay small enough to be learned by heart: sums of numbers to ten and the table of nine times nine, and
#: questions about single numbers to twenty.
SMALL_SHARE = 0.8


def some_sum(rng: random.Random) -> Sum:
    """A sum with numbers and result within one hundred."""
    sign, small = rng.choice(("加", "加", "减", "减", "乘", "除以")), rng.random() < SMALL_SHARE
    if sign == "加" and small:
        return Sum(rng.randint(1, 10), sign, rng.randint(1, 10))
    if sign == "加":
        left = rng.randint(1, 60)
        return Sum(left, sign, rng.randint(1, min(9 if rng.random() < 0.4 else 60, 100 - left)))
    if sign == "减":
        left = rng.randint(2, 20) if small else rng.randint(4, 99)
        return Sum(left, sign, rng.randint(1, min(left - 1, 10) if small else left - 1))
    left, right = rng.randint(2, 9 if small else 12), rng.randint(2, 9)
    while left * right > 100:
        left = rng.randint(2, 12)
    return Sum(left, sign, right) if sign == "乘" else Sum(left * right, sign, right)


def asked(one: Sum, rng: random.Random, digits: bool = False) -> tuple[str, str]:
    """The question for a sum and its answer."""
    write: Callable[[int], str] = str if digits else numeral
    sign = SYMBOLS[one.sign] if digits and rng.random() < 0.8 else one.sign
    values = {"a": write(one.left), "s": sign, "b": write(one.right), "r": write(one.result)}
    answers = [text for form in (DIGIT_ANSWERS if digits else ANSWERS) if len(text := form.format_map(values)) >= 8]
    return rng.choice(DIGIT_QUESTIONS if digits else QUESTIONS).format_map(values), rng.choice(
        answers or [f"答案是{values['a']}{sign}{values['b']}等于{values['r']}。"]
    )


def sums(rng: random.Random, count: int, thinking: bool = False) -> list[dict[str, Any]]:
    """Plain sums, with the way to the result as a thought or without."""
    result = []
    while len(result) < count:
        one = some_sum(rng)
        thought = one.thought() if thinking else None
        if thought and not 10 <= len(thought) <= 50:
            continue
        question, answer = asked(one, rng, digits=rng.random() < DIGIT_SHARE)
        result.append(conversation("sum", user(question), assistant(answer, thought)))
    return result


def carried(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Sums of two to four turns, each going on from the last result."""
    result = []
    while len(result) < count:
        one = some_sum(rng)
        messages: list[Message] = [*map(lambda f, t: f(t), (user, assistant), asked(one, rng))]
        total = one.result
        for _ in range(rng.choice((1, 1, 2, 3))):
            more = rng.random() < 0.55 and total < 90
            if not more and total < 2:
                break
            step = (
                Sum(total, "加", rng.randint(1, min(10, 100 - total)))
                if more
                else Sum(total, "减", rng.randint(1, min(10, total)))
            )
            ask = rng.choice(("再{}{}呢？", "再{}{}等于几？", "那再{}{}呢？", "结果再{}{}是多少？"))
            reply = rng.choice(("{a}{s}{b}等于{r}。", "再{s}{b}，{a}{s}{b}等于{r}。", "在{a}上{s}{b}，等于{r}。"))
            values = {"a": numeral(total), "s": step.sign, "b": numeral(step.right), "r": numeral(step.result)}
            text = reply.format_map(values)
            messages += [user(ask.format(step.sign, values["b"])), assistant(text if len(text) >= 8 else "现在" + text)]
            total = step.result
        if len(messages) > 2:
            result.append(conversation("sum-carried", *messages))
    return result


def stories(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Small stories with a sum in them; a third with the sum as a thought."""
    result = []
    while len(result) < count:
        measure, thing, get, lose = rng.choice(THINGS)
        name, more = rng.choice(NAMES), rng.random() < 0.5
        left = rng.randint(3, 20)
        one = Sum(left, "加", rng.randint(1, 10)) if more else Sum(left, "减", rng.randint(1, left - 1))
        a, b, r = (counted(n) + measure for n in (one.left, one.right, one.result))
        verb = get if more else lose
        end = rng.choice(
            ("现在一共有几{}？", "一共多少{}？", "现在有多少{}？")
            if more
            else ("还剩几{}？", "剩下多少{}？", "现在还有几{}？")
        )
        question = rng.choice(("{n}有{a}{t}，又{v}{b}，", "{n}原来有{a}{t}，后来{v}{b}，")).format(
            n=name, a=a, t=thing, v=verb, b=b
        )
        equal = f"{numeral(one.left)}{one.sign}{numeral(one.right)}等于{numeral(one.result)}"
        answer = rng.choice(
            (f"一共有{r}{thing}，{equal}。", f"{equal}，所以有{r}{thing}。", f"{name}现在有{r}{thing}。")
            if more
            else (f"还剩{r}{thing}，{equal}。", f"{equal}，所以剩下{r}{thing}。", f"{name}还剩{r}{thing}。")
        )
        thought = f"{'多了要用加法' if more else '少了要用减法'}，{equal}。" if rng.random() < 0.33 else None
        result.append(conversation("sum-story", user(question + end.format(measure)), assistant(answer, thought)))
    return result


def single_number(rng: random.Random) -> tuple[str, str, str]:
    """A question about one number, its answer and a thought."""
    number = rng.randint(2, 20 if rng.random() < SMALL_SHARE else 98)
    n, after, before = numeral(number), numeral(number + 1), numeral(number - 1)
    kind = rng.randrange(6)
    if kind > 3:
        return doubled(rng, half=kind == 5)
    if kind < 2:
        side, size, way, found = (("后", "大", "下", after), ("前", "小", "上", before))[kind]
        question = rng.choice(
            (
                f"{n}{side}面是几？",
                f"数数的时候，{n}之{side}是多少？",
                f"比{n}{size}一的数是几？",
                f"{n}的{way}一个数是什么？",
            )
        )
        last = f"数完{n}就是{found}。" if kind == 0 else f"比{n}小一的数是{found}。"
        answer = rng.choice((f"{n}{side}面是{found}。", f"{n}的{way}一个数是{found}。", last))
        return question, answer, f"数数往{side}一个，{n}之{side}是{found}。"
    if kind == 2:
        parity, digit = "双数" if number % 2 == 0 else "单数", DIGITS[number % 10]
        question = rng.choice(("{}是单数还是双数？", "{}是双数吗？", "{}是单数吗？", "请问{}算单数还是双数？")).format(
            n
        )
        return (
            question,
            rng.choice(
                (
                    f"{n}是{parity}，个位是{digit}。",
                    f"{n}的个位是{digit}，所以是{parity}。",
                    f"看个位就知道，{n}是{parity}。",
                )
            ),
            f"看{n}的个位，是{digit}，所以是{parity}。",
        )
    question = rng.choice(("从{}往后数三个数。", "接着{}再数三个数。", "{}后面的三个数是什么？")).format(n)
    row = "、".join(numeral(number + i) for i in (1, 2, 3))
    return (
        question,
        rng.choice((f"{n}后面是{row}。", f"接着{n}数：{row}。", f"往后数三个是{row}。")),
        f"从{n}往后，一个一个数：{row}。",
    )


def doubled(rng: random.Random, half: bool) -> tuple[str, str, str]:
    """A question about the double or the half of a number, its answer and a thought."""
    if not half:
        number = rng.randint(2, 49)
        n, twice = numeral(number), numeral(number * 2)
        question = rng.choice(("{}的两倍是多少？", "两个{}加起来是几？", "{}翻一倍是多少？")).format(n)
        return (
            question,
            rng.choice((f"{n}的两倍是{twice}。", f"两个{n}加起来是{twice}。", f"{n}翻一倍就是{twice}。")),
            f"{n}加{n}等于{twice}，两倍就是{twice}。",
        )
    number = rng.randint(1, 49)
    n, twice = numeral(number), numeral(number * 2)
    question = rng.choice(("{}的一半是多少？", "{}平分成两份，每份几个？", "把{}分成一样的两份，一份是几？")).format(
        twice
    )
    return (
        question,
        rng.choice((f"{twice}的一半是{n}。", f"{twice}分成两份，每份是{n}。", f"一半就是{n}，{n}加{n}等于{twice}。")),
        f"{n}加{n}等于{twice}，一半就是{n}。",
    )


def numbers(rng: random.Random, count: int, thinking: bool = False) -> list[dict[str, Any]]:
    """Questions about one number: its neighbours, odd or even, counting on, double and half."""
    result = []
    while len(result) < count:
        question, answer, thought = single_number(rng)
        if len(answer) >= 8:
            result.append(conversation("number", user(question), assistant(answer, thought if thinking else None)))
    return result


def compared(rng: random.Random, count: int, thinking: bool = False) -> list[dict[str, Any]]:
    """Which of two or three numbers is bigger or smaller."""
    result = []
    while len(result) < count:
        chosen = rng.sample(range(1, 21 if rng.random() < SMALL_SHARE else 101), rng.choice((2, 2, 3)))
        big = rng.random() < 0.5
        best = numeral(max(chosen) if big else min(chosen))
        word, names = "大" if big else "小", [numeral(n) for n in chosen]
        if len(chosen) == 2:
            other = next(n for n in names if n != best)
            forms = ("{}和{}，哪个更%s？", "{}跟{}比，谁%s？", "{}和{}哪个数%s一些？", "比一比，{}和{}谁更%s？")
            answers = (
                f"{best}更{word}，{best}比{other}{word}。",
                f"{best}比{other}{word}。",
                f"更{word}的是{best}，不是{other}。",
            )
            thought = f"比较{names[0]}和{names[1]}，{best}比{other}{word}。"
        else:
            forms = ("{}、{}、{}里哪个最%s？", "{}、{}和{}，谁最%s？", "在{}、{}、{}中，最%s的数是几？")
            order = "、".join(numeral(n) for n in sorted(chosen, reverse=big))
            answers = (
                f"三个数里，{best}最{word}。",
                f"最{word}的数是{best}。",
                f"{best}最{word}，别的都比它{'小' if big else '大'}。",
            )
            thought = f"从{word}到{'小' if big else '大'}排一排：{order}，最{word}的是{best}。"
        text = rng.choice([a for a in answers if len(a) >= 8])
        question = (rng.choice(forms) % word).format(*names)
        result.append(conversation("number-compare", user(question), assistant(text, thought if thinking else None)))
    return result


def rows(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """What comes next in a row of numbers with an even step; half of them with a thought."""
    result = []
    while len(result) < count:
        start, step = rng.randint(1, 40), rng.choice((1, 2, 3, 5, 10))
        shown, following = "、".join(numeral(start + i * step) for i in range(4)), numeral(start + 4 * step)
        question = rng.choice(
            ("{}，下一个数是几？", "找规律：{}，后面是几？", "{}，接下来是什么数？", "按规律接着数：{}。")
        ).format(shown)
        answer = rng.choice(
            (
                f"下一个数是{following}，每次多{numeral(step)}。",
                f"后面是{following}，规律是每次加{numeral(step)}。",
                f"接下来是{following}，一个比一个多{numeral(step)}。",
            )
        )
        thought = f"每个数都比前一个多{numeral(step)}，所以下一个是{following}。" if rng.random() < 0.5 else None
        result.append(conversation("number-row", user(question), assistant(answer, thought)))
    return result


def exchanges(rng: random.Random) -> list[dict[str, Any]]:
    """Everything about numbers."""
    return [
        *sums(rng, 2200),
        *sums(rng, 1000, thinking=True),
        *carried(rng, 500),
        *stories(rng, 1000),
        *numbers(rng, 500),
        *numbers(rng, 120, thinking=True),
        *compared(rng, 350),
        *compared(rng, 250, thinking=True),
        *rows(rng, 150),
    ]
