"""Notebook 04's mask: every turn is trained as it will be asked, whatever the text, the thoughts, the tools."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from course.turns import order_problems

SPELLED = ("<|user|>", "<|assistant|>", "<think>", "</think>", "/nothink", "[gMASK]", "<|observation|>", "<tool_call>")
TEXT = st.lists(st.sampled_from([*"你我在哪里，。 ab1\n{}'\"", *SPELLED]), min_size=1, max_size=8).map("".join)
TEXT = TEXT.filter(lambda text: text.strip())
NAME = st.sampled_from(("get_time", "get_weather"))
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("get_time", "get_weather")]


@st.composite
def conversations(draw):
    """A conversation of one to three exchanges, with a system turn, thoughts and calls of tools here and there."""
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    with_tools, thoughts = draw(st.booleans()), draw(st.booleans())

    def answer():
        turn = {"role": "assistant", "content": draw(TEXT)}
        return turn | ({"reasoning_content": draw(TEXT)} if thoughts and draw(st.booleans()) else {})

    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        if with_tools and draw(st.booleans()):
            arguments = draw(st.dictionaries(TEXT, TEXT, max_size=2))
            call = {"type": "function", "function": {"name": draw(NAME), "arguments": arguments}}
            messages.append({**answer(), "content": "", "tool_calls": [call]})
            messages += [{"role": "tool", "content": draw(TEXT)} for _ in range(draw(st.integers(1, 2)))]
        messages.append(answer())
    return {"messages": messages} | ({"tools": TOOLS} if with_tools else {})


@pytest.fixture(scope="module")
def notebook(tokenizer):
    """The functions of notebook 04's cells."""
    import json

    cells = json.loads((utils.ROOT / "notebooks/en/04_chat_template.ipynb").read_text(encoding="utf-8"))["cells"]
    space = {"utils": utils, "tokenizer": tokenizer, "SYSTEM_PROMPT": "你是甄嬛。"}
    for cell in cells:
        source = "".join(cell["source"])
        if re.search(r"^def (render|one_turn|prepared_turns|tokenize|thinks)\(", source, re.MULTILINE):
            exec(source.partition("\n\n\ndef all_samples")[0].replace("from datasets import Dataset", ""), space)
    return space


def trained(sample):
    """Where each stretch of trained tokens begins, and its tokens."""
    found, start = [], None
    for place, label in enumerate([*sample["labels"], -100]):
        if label != -100 and start is None:
            start = place
        elif label == -100 and start is not None:
            found.append((start, sample["input_ids"][start:place]))
            start = None
    return found


@settings(max_examples=300, deadline=None)
@given(row=conversations(), thinking=st.booleans())
def test_every_turn_is_trained_once_as_it_will_be_asked(notebook, tokenizer, row, thinking):
    turns = row["messages"][row["messages"][0]["role"] == "system" :]
    assert not order_problems(turns, tools=row.get("tools"))
    messages = row["messages"]
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": notebook["SYSTEM_PROMPT"]}, *messages]
    if not thinking:
        messages = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in messages]
    samples = notebook["tokenize"](row, thinking)
    found = [(tuple(s["input_ids"][:start]), tuple(ids)) for s in samples for start, ids in trained(s)]
    wanted = []
    for place, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        safe = utils.as_text(tokenizer, messages[: place + 1])
        how = {"tokenize": False, "enable_thinking": thinking, "tools": utils.as_text(tokenizer, row.get("tools"))}
        prompt = tokenizer.apply_chat_template(safe[:-1], add_generation_prompt=True, **how)
        whole = tokenizer.apply_chat_template(safe, **how)
        end = tokenizer.convert_tokens_to_ids("<|observation|>" if turn.get("tool_calls") else "<|user|>")
        answer = [*utils.encode(tokenizer, whole[len(prompt) :]), end]
        wanted.append((tuple(utils.encode(tokenizer, prompt)), tuple(answer)))
    assert found == wanted
    for sample in samples:
        assert all(label in (-100, token) for token, label in zip(sample["input_ids"], sample["labels"], strict=True))


@settings(max_examples=100, deadline=None)
@given(row=conversations())
def test_a_spelled_tag_never_becomes_a_token(notebook, tokenizer, row):
    tags = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|user|>", "<|assistant|>", "<|observation|>")}
    for sample in notebook["tokenize"](row):
        roles = [turn["role"] for turn in row["messages"]]
        calls = sum(bool(turn.get("tool_calls")) for turn in row["messages"])
        assert sample["input_ids"].count(tags["<|user|>"]) == roles.count("user") + 1
        assert sample["input_ids"].count(tags["<|assistant|>"]) == roles.count("assistant")
        assert sample["input_ids"].count(tags["<|observation|>"]) == calls


@settings(max_examples=100, deadline=None)
@given(row=conversations())
def test_only_the_last_turn_if_asked_for(notebook, row):
    (sample,) = notebook["tokenize"](row, True, only_last=True)
    (stretch,) = trained(sample)
    assert stretch == trained(notebook["tokenize"](row, True)[-1])[-1]
