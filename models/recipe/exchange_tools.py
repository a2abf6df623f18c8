"""Exchanges with tools: calls with arguments out of the question, answers out of the results.

Also failing tools, arguments that have to be asked for, and questions that need no call.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from exchange_facts import answers_of
from exchange_sums import Sum, numeral, some_sum
from exchange_tables import Message, assistant, conversation, facts, filled, sections, user

CITIES = (
    "北京 上海 广州 成都 杭州 西安 武汉 南京 昆明 青岛 厦门 长沙 哈尔滨 大连 桂林 "
    "兰州 苏州 济南 沈阳 贵阳 福州 郑州 天津 重庆 合肥 南昌 太原 洛阳 石家庄 银川"
).split()
NORTHERN = "北京 哈尔滨 大连 兰州 沈阳 太原 银川 天津 石家庄".split()
FAR = "东京 巴黎 伦敦 柏林 罗马 曼谷 开罗 莫斯科 首尔 悉尼 马德里 维也纳".split()
SKIES = ("晴", "多云", "阴", "小雨", "大雨", "小雪", "大雾")


def schema(name: str, description: str, **arguments: str) -> dict[str, Any]:
    """The JSON schema of a function whose arguments are all required strings."""
    properties = {key: {"type": "string", "description": text} for key, text in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    "get_weather": schema("get_weather", "查询一个城市今天的天气", city="城市名"),
    "get_time": schema("get_time", "查询一个城市现在的时间", city="城市名"),
    "calculate": schema("calculate", "计算一个算式", expression="算式，如 3+5"),
    "look_up_word": schema("look_up_word", "查词语的意思", word="要查的词"),
    "search_train": schema("search_train", "查询两地之间的火车", **{"from": "出发城市", "to": "到达城市"}),
}


def call(name: str, **arguments: str) -> Message:
    """A message of the assistant that calls one tool."""
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def result_of(values: dict[str, Any], text: str, rng: random.Random) -> Message:
    """A tool's result, as JSON or as a line of text."""
    return {"role": "tool", "content": json.dumps(values, ensure_ascii=False) if rng.random() < 0.6 else text}


def weather(rng: random.Random) -> list[Message]:
    """The weather of a city."""
    sky = rng.choice(SKIES)
    city = rng.choice(NORTHERN if "雪" in sky else CITIES)
    degrees = rng.randint(-8, 1) if "雪" in sky else rng.randint(6, 34)
    asks = (
        "{}今天天气怎么样？",
        "查一下{}的天气。",
        "{}今天冷不冷？",
        "我要去{}，那边天气如何？",
        "今天{}会下雨吗？",
        "帮我看看{}今天的天气。",
    )
    below = f"零下{numeral(-degrees)}" if degrees < 0 else numeral(degrees)
    wet = (
        "，记得带伞" if "雨" in sky else "，路上小心" if sky in ("大雾", "小雪") else "，多喝水" if degrees > 30 else ""
    )
    forms = (
        f"{city}今天{sky}，气温{below}度{wet}。",
        f"{city}现在是{sky}，{below}度{wet}。",
        f"查到了，{city}今天{sky}，{below}度{wet}。",
    )
    values = {"city": city, "weather": sky, "temperature": degrees}
    question, answer = rng.choice(asks).format(city), rng.choice(forms)
    if "会下雨" in question:
        answer = f"{'会' if '雨' in sky else '不会'}，{city}今天{sky}，{below}度{wet}。"
    told = result_of(values, f"{city}：{sky}，{degrees}度", rng)
    return [user(question), call("get_weather", city=city), told, assistant(answer)]


def clock(rng: random.Random) -> list[Message]:
    """The time in a city."""
    city, hour, minute = rng.choice(CITIES + FAR), rng.randrange(24), rng.choice((0, 5, 10, 15, 20, 30, 45, 50))
    asks = ("{}现在几点？", "查一下{}的时间。", "请问{}现在是什么时间？", "{}那边几点了？", "现在{}是几点钟？")
    part = "凌晨" if hour < 6 else "上午" if hour < 12 else "中午" if hour == 12 else "下午" if hour < 18 else "晚上"
    twelve = 12 if hour == 12 else hour % 12
    hours = "零" if twelve == 0 else "两" if twelve == 2 else numeral(twelve)
    said = f"{part}{hours}点" + (
        "整" if minute == 0 else "半" if minute == 30 else ("零五" if minute == 5 else numeral(minute)) + "分"
    )
    forms = (f"{city}现在是{said}。", f"查到了，{city}现在{said}。", f"现在{city}的时间是{said}。")
    text = f"{hour:02d}:{minute:02d}"
    return [
        user(rng.choice(asks).format(city)),
        call("get_time", city=city),
        result_of({"city": city, "time": text}, text, rng),
        assistant(rng.choice(forms)),
    ]


def calculation(rng: random.Random) -> list[Message]:
    """A sum that is worth a tool; half of them written in digits."""
    one = (
        Sum(rng.randint(11, 99), rng.choice(("加", "减", "乘")), rng.randint(11, 99))
        if rng.random() < 0.7
        else some_sum(rng)
    )
    if one.result < 0:
        one = Sum(one.right, one.sign, one.left)
    write: Callable[[int], str] = str if rng.random() < 0.5 else numeral
    sign = {"加": "+", "减": "-", "乘": "*", "除以": "/"}[one.sign]
    asks = ("{}{}{}等于多少？", "帮我算一下{}{}{}。", "用计算器算{}{}{}。", "请算出{}{}{}的结果。", "{}{}{}是多少？")
    said = f"{write(one.left)}{one.sign}{write(one.right)}"
    forms = (
        f"{said}等于{write(one.result)}。",
        f"算好了，{said}等于{write(one.result)}。",
        f"{said}的结果是{write(one.result)}。",
    )
    question = user(rng.choice(asks).format(write(one.left), one.sign, write(one.right)))
    made = [question, call("calculate", expression=f"{one.left}{sign}{one.right}")]
    answer = rng.choice([form for form in forms if len(form) >= 8] or [forms[1]])
    return [*made, result_of({"result": one.result}, str(one.result), rng), assistant(answer)]


def word(rng: random.Random) -> list[Message]:
    """The meaning of an idiom out of the tables."""
    row = rng.choice(next(s for s in sections("words") if s.name == "idiom").rows)
    a, b = row["a"], row["b"]
    asks = (
        "查一下{}的意思。",
        "{}是什么意思？帮我查查词典。",
        "用词典查查{}。",
        "请帮我查{}这个词。",
        "我想知道{}在词典里怎么解释。",
    )
    forms = (f"{a}的意思是{b}。", f"词典里说，{a}是说{b}。", f"查到了，{a}是说{b}。")
    return [
        user(rng.choice(asks).format(a)),
        call("look_up_word", word=a),
        result_of({"word": a, "meaning": b}, b, rng),
        assistant(rng.choice(forms)),
    ]


def train(rng: random.Random) -> list[Message]:
    """The next train between two cities; sometimes there is none."""
    start, end = rng.sample(CITIES, 2)
    hour, minute = rng.randint(6, 21), rng.choice((0, 10, 15, 30, 40))
    number = f"{rng.choice('GDK')}{rng.randint(11, 999)}"
    asks = (
        "从{}到{}有火车吗？",
        "查一下{}到{}的火车。",
        "我要从{}去{}，帮我查车。",
        "{}去{}的火车几点开？",
        "帮我看看{}到{}的车次。",
    )
    asked = [user(rng.choice(asks).format(start, end)), call("search_train", **{"from": start, "to": end})]
    if rng.random() < 0.15:
        nothing = rng.choice((f"没有查到{start}到{end}的火车，换个日子试试。", f"今天从{start}到{end}没有车了。"))
        return [*asked, result_of({"trains": []}, "没有车次", rng), assistant(nothing)]
    time = f"{hour:02d}:{minute:02d}"
    forms = (
        f"有的，{start}到{end}的{number}次{time}开。",
        f"从{start}去{end}，可以坐{time}的{number}次。",
        f"查到{number}次，{time}从{start}开往{end}。",
    )
    values = {"trains": [{"number": number, "depart": time}]}
    return [*asked, result_of(values, f"{number} {start}-{end} {time}", rng), assistant(rng.choice(forms))]


def failing(rng: random.Random) -> list[Message]:
    """A tool that fails, which the answer says."""
    city = rng.choice(CITIES)
    name, thing = rng.choice((("get_weather", "天气"), ("get_time", "时间")))
    asks = ("查一下{}的{}。", "帮我查{}现在的{}。", "我想知道{}的{}。")
    forms = (f"没有查到{city}的{thing}，请过一会儿再试。", f"这会儿查不到{city}的{thing}，稍后再问我吧。")
    said = rng.choice(({"error": "timeout"}, {"error": "服务暂时不可用"}))
    return [
        user(rng.choice(asks).format(city, thing)),
        call(name, city=city),
        {"role": "tool", "content": json.dumps(said, ensure_ascii=False)},
        assistant(rng.choice(forms)),
    ]


def missing(rng: random.Random) -> list[Message]:
    """A question without its city or words: the assistant asks back, then calls."""
    kind = rng.randrange(4)
    if kind < 2:
        full, questions = (
            (weather, clock)[kind](rng),
            (
                ("今天天气怎么样？", "帮我查天气。", "外面天气如何？查一下。"),
                ("现在几点了？查一下。", "帮我查一下时间。"),
            )[kind],
        )
        backs = ("请问你要查哪个城市？", "你想查哪个城市的？告诉我城市名。", "要查哪座城市呢？")
        city = full[1]["tool_calls"][0]["function"]["arguments"]["city"]
        return [
            user(rng.choice(questions)),
            assistant(rng.choice(backs)),
            user(rng.choice(("{}。", "查{}的。", "{}吧。")).format(city)),
            *full[1:],
        ]
    if kind == 2:
        full = train(rng)
        ends = full[1]["tool_calls"][0]["function"]["arguments"]
        back = rng.choice(("请问从哪个城市出发？", "你从哪里出发？告诉我城市名。"))
        asks = rng.choice(("我要坐火车去{}。", "查一下去{}的火车。", "有去{}的车吗？")).format(ends["to"])
        return [
            user(asks),
            assistant(back),
            user(rng.choice(("从{}出发。", "{}。", "我在{}。")).format(ends["from"])),
            *full[1:],
        ]
    full = word(rng)
    asked = full[1]["tool_calls"][0]["function"]["arguments"]["word"]
    return [
        user(rng.choice(("帮我查个词。", "我想查一个成语。", "查词典。"))),
        assistant(rng.choice(("请问要查哪个词？", "你想查什么词？请告诉我。"))),
        user(asked + "。"),
        *full[1:],
    ]


def uncalled(rng: random.Random) -> list[Message]:
    """A question that none of the tools is for."""
    section = rng.choice([s for s in facts() if s.name not in {"idiom", "clock", "weather", "zodiac-has"}])
    group = rng.choice([g for g in section.groups if g.key != "-"])
    row = rng.choice([r for r in section.rows if group.key in r])
    questions = filled(group.of("?"), row)
    answers = answers_of(group, row)
    return [user(rng.choice(questions)), assistant(rng.choice(answers))] if questions and answers else uncalled(rng)


MAKERS = {
    "weather": weather,
    "time": clock,
    "calculate": calculation,
    "word": word,
    "train": train,
    "failing": failing,
    "missing": missing,
    "none": uncalled,
}
SHARES = {"weather": 6, "time": 4, "calculate": 6, "word": 3, "train": 5, "failing": 1, "missing": 4, "none": 6}


def offered(messages: list[Message], rng: random.Random) -> list[dict[str, Any]]:
    """One to all of the tools, among them those that are called."""
    called = {c["function"]["name"] for message in messages for c in message.get("tool_calls", [])}
    chosen = called | set(rng.sample(sorted(TOOLS), rng.randint(1, 3)))
    if not called and messages[0]["content"].endswith("。"):
        chosen |= {"get_weather"}
    return [TOOLS[name] for name in rng.sample(sorted(chosen), len(chosen))]


def exchanges(rng: random.Random, count: int = 900) -> list[dict[str, Any]]:
    """Conversations with tools; one in five goes on with a second request, one in eight has a thought."""
    reasons = {
        "get_weather": "要知道天气，得查{}的天气。",
        "get_time": "要知道时间，得查{}的时间。",
        "calculate": "要算{}，用计算工具最稳。",
    }
    reasons |= {"look_up_word": "要解释{}，先查一查词典。", "search_train": "要找从{}出发的车，先查车次。"}
    result = []
    while len(result) < count:
        name = rng.choices(list(SHARES), list(SHARES.values()))[0]
        messages = MAKERS[name](rng)
        if rng.random() < 0.2:
            messages += MAKERS[rng.choices(list(SHARES), list(SHARES.values()))[0]](rng)
        elif rng.random() < 0.12 and len(messages) == 4 and "tool_calls" in messages[1]:
            function = messages[1]["tool_calls"][0]["function"]
            messages[1]["reasoning_content"] = reasons[function["name"]].format(
                next(iter(function["arguments"].values()))
            )
        result.append(conversation("tool-" + name, *messages, tools=offered(messages, rng)))
    return result
