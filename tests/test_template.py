"""The bundled template against every rule of GLM-4.5-Air's format, written out by hand."""

import pytest

U = {"role": "user", "content": "问"}


def render(tokenizer, messages, **how):
    return tokenizer.apply_chat_template(messages, tokenize=False, **how)


def test_the_36_added_tokens_stand_last_and_in_order(tokenizer):
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    assert len(added) == 36
    assert [i for _, i in added] == list(range(8156, 8192))
    names = [name for name, _ in added]
    assert names[:10] == [
        "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
        "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    ]  # fmt: skip
    assert names[21:31] == [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
        "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    ]  # fmt: skip
    plain = {t.content for t in tokenizer.added_tokens_decoder.values() if not t.special}
    assert plain == set(names[21:31])


@pytest.mark.parametrize(
    ("how", "end"),
    [
        ({}, "问<|assistant|>"),
        ({"enable_thinking": True}, "问<|assistant|>"),
        ({"enable_thinking": False}, "问/nothink<|assistant|>\n<think></think>"),
    ],
)
def test_thinking_unset_on_and_off(tokenizer, how, end):
    assert render(tokenizer, [U], add_generation_prompt=True, **how) == f"[gMASK]<sop><|user|>\n{end}"


def test_nothink_is_not_added_twice_and_not_to_system(tokenizer):
    messages = [{"role": "system", "content": " 系 "}, {"role": "user", "content": " 问/nothink"}]
    assert render(tokenizer, messages, enable_thinking=False) == "[gMASK]<sop><|system|>\n 系 <|user|>\n 问/nothink"


@pytest.mark.parametrize("thinking", [True, False])
def test_history_has_an_empty_thought_and_stripped_content(tokenizer, thinking):
    mark = "" if thinking else "/nothink"
    messages = [U, {"role": "assistant", "content": " 答\n"}, U, {"role": "assistant", "content": ""}]
    assert render(tokenizer, messages, enable_thinking=thinking) == (
        f"[gMASK]<sop><|user|>\n问{mark}<|assistant|>\n<think></think>\n答<|user|>\n问{mark}<|assistant|>\n<think></think>"
    )


@pytest.mark.parametrize(
    "answer", [{"content": "<think>想</think>\n答"}, {"content": "答", "reasoning_content": " 想 "}]
)
@pytest.mark.parametrize("thinking", [True, False])
def test_reasoning_is_kept_only_after_the_last_user_turn(tokenizer, answer, thinking):
    mark = "" if thinking else "/nothink"
    turn = {"role": "assistant", **answer}
    assert render(tokenizer, [U, turn, U, turn], enable_thinking=thinking) == (
        f"[gMASK]<sop><|user|>\n问{mark}<|assistant|>\n<think></think>\n答"
        f"<|user|>\n问{mark}<|assistant|>\n<think>想</think>\n答"
    )


def test_tools_calls_and_results(tokenizer):
    tools = [{"type": "function", "function": {"name": "天气"}}]
    call = {"function": {"name": "天气", "arguments": {"城": "京", "天": 3, "列": ["雪"]}}}
    messages = [
        {"role": "system", "content": "系"},
        U,
        {"role": "assistant", "content": "查", "tool_calls": [call]},
        {"role": "tool", "content": "晴"},
        {"role": "tool", "content": "冷"},
    ]
    text = render(tokenizer, messages, tools=tools, add_generation_prompt=True)
    assert text.startswith("[gMASK]<sop><|system|>\n# Tools\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "天气"}}\n</tools>' in text
    assert text.endswith(
        "...\n</tool_call><|system|>\n系<|user|>\n问<|assistant|>\n<think></think>\n查\n<tool_call>天气\n"
        "<arg_key>城</arg_key>\n<arg_value>京</arg_value>\n<arg_key>天</arg_key>\n<arg_value>3</arg_value>\n"
        '<arg_key>列</arg_key>\n<arg_value>["雪"]</arg_value>\n</tool_call>'
        "<|observation|>\n<tool_response>\n晴\n</tool_response>\n<tool_response>\n冷\n</tool_response><|assistant|>"
    )


def test_content_in_parts_is_joined(tokenizer):
    parts = [{"type": "text", "text": "甲"}, {"type": "text", "text": "乙"}]
    assert render(tokenizer, [{"role": "user", "content": parts}]) == "[gMASK]<sop><|user|>\n甲乙"


def test_decoding_keeps_the_think_tags_and_drops_special_tokens(tokenizer):
    ids = tokenizer("<think></think>答<|user|>/nothink", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think></think>答"
