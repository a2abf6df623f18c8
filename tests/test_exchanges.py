"""Conversations made out of tables: enough of each kind, none twice, and right where that can be computed."""

import json
import re
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "models" / "recipe"))

NAME_QUESTIONS = (
    "你叫什么名字？ 怎么称呼您？ 请问尊姓大名？ 你的名字是什么？ 我该怎么叫你？ 能告诉我你的名字吗？".split()
)
FORBIDDEN = "甄嬛 甄 皇后 皇上 妃 贵人 本宫 臣妾 娘娘 后宫 嫔".split()
PLACES = {"十": 10, "百": 100, "千": 1000}
NUMBER = "[零一二三四五六七八九十百千两]+"
STATEMENT = re.compile(
    rf"({NUMBER}|\d+)(加|减|乘|除以|[-+×÷])({NUMBER}|\d+)(?:，算一算，|，结果|的结果)?(?:等于|是|得|=)({NUMBER}|\d+)"
)
QUESTION = re.compile(rf"({NUMBER}|\d+)(加|减|乘|除以|[-+×÷])({NUMBER}|\d+)")
ACTS = {"加": "+", "减": "-", "乘": "*", "除以": "/", "×": "*", "÷": "/"}


def value(text):
    """A Chinese numeral or digits, read place by place and not by the code under test."""
    if text.isdigit():
        return int(text)
    total, digit = 0, None
    for character in text:
        if character in PLACES:
            total += (1 if digit is None else digit) * PLACES[character]
            digit = None
        else:
            digit = 2 if character == "两" else "零一二三四五六七八九".index(character)
    return total + (digit or 0)


def computed(left, sign, right):
    sign = ACTS.get(sign, sign)
    a, b = value(left), value(right)
    if sign == "/":
        assert a % b == 0
        return a // b
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


@pytest.fixture(scope="module")
def made():
    import exchanges

    return exchanges.generated()


def said(item, role):
    return [m["content"] for m in item["messages"] if m["role"] == role]


def test_there_are_enough_of_each_kind(made):
    turns = Counter(len(said(item, "user")) for item in made)
    assert len(made) >= 11_000
    assert sum(turns[n] for n in range(2, 6)) >= 3_000
    assert sum("reasoning_content" in json.dumps(item) for item in made) >= 800
    assert sum("tools" in item for item in made) >= 500
    assert sum(item["topic"].startswith("person") for item in made) >= 2_500
    assert all(item["messages"][0]["role"] == "system" for item in made if item["topic"].startswith("person"))


def test_no_conversation_is_there_twice_and_a_seed_gives_one_list(made):
    import exchanges

    assert len({json.dumps(item["messages"], ensure_ascii=False) for item in made}) == len(made)
    assert exchanges.generated(0) == made


def test_all_render_through_the_chat_template(made, tokenizer):
    plain, others = [i for i in made if "tools" not in i], [i for i in made if "tools" in i]
    texts = tokenizer.apply_chat_template([item["messages"] for item in plain], tokenize=False)
    texts += [tokenizer.apply_chat_template(i["messages"], tools=i["tools"], tokenize=False) for i in others]
    for item, text in zip([*plain, *others], texts, strict=True):
        last = item["messages"][-1]
        assert last["role"] == "assistant"
        assert text.endswith(last["content"])
        assert f"<think>{last.get('reasoning_content', '')}</think>" in text
        for message in item["messages"]:
            for call in message.get("tool_calls", []):
                assert f"<tool_call>{call['function']['name']}\n" in text
        assert "{" not in text or "tools" in item


def test_calls_fit_the_tools_and_their_results_are_used(made):
    for item in (item for item in made if "tools" in item):
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in item["tools"]}
        for before, message in zip(item["messages"], item["messages"][1:], strict=False):
            for call in message.get("tool_calls", []):
                function = call["function"]
                assert list(function["arguments"]) == schemas[function["name"]]["required"]
                earlier = "".join(said(item, "user"))
                assert function["name"] == "calculate" or all(v in earlier for v in function["arguments"].values())
            assert (message["role"] == "tool") == bool(before.get("tool_calls"))


def test_answers_are_short_and_thoughts_too(made):
    for item in made:
        for message in item["messages"]:
            if message["role"] == "assistant" and "tool_calls" not in message:
                least = 2 if item["topic"] == "form-brief" else 4 if item["topic"].startswith("profile") else 8
                assert least <= len(message["content"]) <= 45, (item["topic"], message["content"])
            if "reasoning_content" in message:
                assert 10 <= len(message["reasoning_content"]) <= 50, message


def test_only_plain_characters(made):
    for item in made:
        for message in item["messages"]:
            text = message["content"] + message.get("reasoning_content", "")
            assert not any(word in text for word in FORBIDDEN), text
            if "tools" not in item and not item["topic"].startswith("sum"):
                assert not re.search("[0-9A-Za-z{}|｜]", text), text


def test_no_question_of_the_written_pairs_is_answered_anew(made):
    written = set()
    for path in (ROOT / "models" / "recipe" / "chat").glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").splitlines()
        written |= {re.sub(r"[\W_]+", "", json.loads(row)["question"]) for row in rows}
    plain = [i for i in made if "tools" not in i and i["messages"][0]["role"] == "user"]
    assert not written & {re.sub(r"[\W_]+", "", said(item, "user")[0]) for item in plain}


#: What the context states of somebody, and how it is asked for.
STATED = {
    r"叫(\w+?)的狗": r"狗叫",
    r"叫(\w+?)的猫": r"猫叫",
    r"有一条叫(\w+?)的船": r"船叫",
    r"今年(\w+?)岁": r"多大|几岁",
    r"每天([^，。]+?)起床": r"几点起",
    r"师父叫(\w+)": r"师父|跟谁学",
    r"随身带着一(\w+)": r"身上带|随身",
}


def test_profiles_are_answered_with_what_the_context_states(made):
    checked, names = 0, set()
    for item in (item for item in made if item["topic"].startswith("profile")):
        first = item["messages"][0]["content"]
        for question, answer in zip(said(item, "user"), said(item, "assistant"), strict=True):
            for stated, how in STATED.items():
                found = re.findall(stated, first)
                if len(found) == 1 and question != first and re.search(how, question):
                    assert found[0] in answer, item
                    names.add(found[0])
                    checked += 1
    assert checked > 1_000
    assert len(names) > 400


def test_every_sum_is_right(made):
    checked, digits = 0, 0
    for item in made:
        for message in item["messages"]:
            for text in (message["content"], message.get("reasoning_content", "")):
                for left, sign, right, result in STATEMENT.findall(text):
                    assert computed(left, sign, right) == value(result), text
                    checked += 1
    plain = [item for item in made if item["topic"] == "sum"]
    for item in plain:
        question, answer = item["messages"][0]["content"], item["messages"][1]["content"]
        left, sign, right = QUESTION.search(question).groups()
        results = re.findall(rf"(?:等于|=|是|得)({NUMBER}|\d+)", answer)
        assert {value(result) for result in results} == {computed(left, sign, right)}, item
        digits += left.isdigit()
    assert checked >= 3_000
    assert 0.15 < digits / len(plain) < 0.25


def test_carried_sums_go_on_from_the_last_result(made):
    for item in (item for item in made if item["topic"] == "sum-carried"):
        total = None
        for question, answer in zip(said(item, "user"), said(item, "assistant"), strict=True):
            if total is None:
                total = computed(*QUESTION.search(question).groups())
            else:
                sign, step = re.search(rf"再(加|减)({NUMBER})", question).groups()
                total += value(step) if sign == "加" else -value(step)
            assert value(re.findall(rf"(?:等于|=|是|得)({NUMBER}|\d+)", answer)[-1]) == total, item


def test_comparisons_stories_and_tools_compute(made):
    for item in made:
        first, last = item["messages"][0]["content"], item["messages"][-1]["content"]
        if item["topic"] == "number-compare":
            numbers = [value(n) for n in re.findall(NUMBER, re.sub("一些|比一比", "", first))]
            best = max(numbers) if "大" in first else min(numbers)
            assert value(re.search(NUMBER, last.removeprefix("三个数里")).group()) == best, item
        if item["topic"] == "sum-story":
            left, right = [value(n) for n in re.findall(NUMBER, first.replace("一共", ""))][:2]
            result = (
                left + right if re.search("[买得收摘钓拿捡借][了到][一二三四五六七八九十两]", first) else left - right
            )
            if re.search("还剩|剩下", first):
                result = left - right
            counts = [value(n) for n in re.findall(NUMBER, last.replace("一共", ""))]
            assert result in counts, item
    tables = [item["messages"] for item in made if item["topic"] == "tool-calculate"]
    for messages in tables:
        left, sign, right = re.fullmatch(
            r"(\d+)([-+*/])(\d+)", messages[1]["tool_calls"][0]["function"]["arguments"]["expression"]
        ).groups()
        result = computed(left, sign, right)
        assert str(result) in messages[2]["content"]
        assert value(re.search(rf"(?:等于|是)({NUMBER}|\d+)", messages[3]["content"]).group(1)) == result, messages


def test_numerals_read_back_and_calendars_close():
    from exchange_sums import numeral
    from exchange_tables import facts

    assert all(value(numeral(n)) == n for n in range(10_000))
    assert [
        numeral(n) for n in (10, 12, 20, 31, 100, 105, 110, 1010)
    ] == "十 十二 二十 三十一 一百 一百零五 一百一十 一千零一十".split()
    rings = {"weekday": 7, "month": 12, "season": 4, "zodiac": 12}
    for section in facts():
        if section.name in rings:
            rows = section.rows
            assert len(rows) == rings[section.name]
            for i, row in enumerate(rows):
                assert row["b"] == rows[(i + 1) % len(rows)]["a"]
                assert row["c"] == rows[i - 1]["a"]
        if section.name == "direction":
            ways = {row["a"]: row["b"] for row in section.rows}
            assert all(ways[ways[way]] == way for way in ways)


def test_persons_answer_out_of_the_prompt(made):
    names = set()
    for item in (item for item in made if item["topic"].startswith("person")):
        prompt, answers = item["messages"][0]["content"], said(item, "assistant")
        for question, answer in zip(said(item, "user"), answers, strict=True):
            if question in NAME_QUESTIONS:
                name = re.search("(?:名叫|叫|名字是)([^，。]+)", answer).group(1)
                assert name in prompt, item
                names.add(name)
            if question in ("你多大了？", "你几岁了？"):
                assert re.search(f"{NUMBER}岁", answer).group() in prompt
            assert "模型" not in answer
    from exchange_persons import trades as all_trades

    prompts = "".join(item["messages"][0]["content"] for item in made if item["topic"].startswith("person"))
    trades = {trade.name for trade in all_trades() if trade.name in prompts}
    assert len(trades) >= 70
    assert len(names) >= 150
