"""The recipe of the bundled model: what of a conversation is learned, what is drawn, what is kept out."""

import random
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "models" / "recipe"))
import dialogue
import samples
from samples import IGNORED, Sample

TALKS = ROOT / "models" / "recipe" / "chat" / "talks"
TOLD = Sample(
    [
        {"role": "user", "content": "我叫小雨。"},
        {"role": "assistant", "content": "小雨你好。"},
        {"role": "user", "content": "我叫什么？"},
        {"role": "assistant", "content": "你叫小雨。"},
    ]
)
THOUGHT = Sample(
    [
        {"role": "user", "content": "早。"},
        {"role": "assistant", "content": "早上好。"},
        {"role": "user", "content": "二加二等于几？"},
        {"role": "assistant", "content": "二加二等于四。", "reasoning_content": "两个二是四。"},
    ]
)
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
CALL = Sample(
    [
        {"role": "user", "content": "几点了？"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "get_time", "arguments": {}}}],
        },
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "现在十二点。"},
    ],
    [TOOL],
)


def stretches(tokenizer, ids, labels):
    """The text of each run of tokens that counts in the loss."""
    found, current = [], []
    for token, label in zip([*ids, IGNORED], [*labels, IGNORED], strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            current.append(label)
        elif current:
            found.append(tokenizer.decode(current))
            current = []
    return found


@pytest.mark.parametrize(
    ("sample", "wanted"),
    [
        (TOLD, ["\n小雨你好。<|user|>", "\n你叫小雨。<|user|>"]),
        (THOUGHT, ["\n<think>两个二是四。</think>\n二加二等于四。<|user|>"]),
        (CALL, ["\n<tool_call>get_time\n</tool_call><|observation|>", "\n现在十二点。<|user|>"]),
    ],
)
def test_answers_and_what_ends_them_are_learned_and_nothing_else(tokenizer, sample, wanted):
    ids, labels = samples.encode(tokenizer, sample)
    assert stretches(tokenizer, ids, labels) == wanted
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_a_system_turn_put_in_later_gives_the_tokens_of_the_template(tokenizer):
    rows = samples.encoded(tokenizer, {"pairs": [TOLD]})["pairs"]
    for prompt, turn in zip(samples.SYSTEM_PROMPTS, samples.openings(tokenizer), strict=True):
        row = samples.opened(rows[0], turn)
        ids, labels = samples.encode(tokenizer, Sample([{"role": "system", "content": prompt}, *TOLD.messages]))
        assert (row.ids.tolist(), row.labels.tolist()) == (ids, labels)


def test_sources_are_drawn_by_their_shares_and_each_row_equally_often(tokenizer):
    found = samples.encoded(tokenizer, {"pairs": [TOLD] * 3, "thoughts": [THOUGHT] * 2, "tools": [CALL]})
    stream = samples.drawn(found, samples.openings(tokenizer), random.Random(0))
    owner = {id(row): (name, place) for name, rows in found.items() for place, row in enumerate(rows)}
    drawn = [next(stream) for _ in range(6000)]
    counts = Counter(owner.get(id(row)) for row in drawn)
    opened = counts.pop(None)  # plain rows that got a system turn
    plain = sum(samples.SHARES[name] for name in ("pairs", "thoughts"))
    share = plain / (plain + samples.SHARES["tools"])
    assert opened / len(drawn) == pytest.approx(samples.SYSTEM_SHARE * share, abs=0.02)
    tools = counts["tools", 0] / len(drawn)
    assert tools == pytest.approx(samples.SHARES["tools"] / (plain + samples.SHARES["tools"]), abs=0.02)
    assert max(counts["pairs", n] for n in range(3)) < 1.25 * min(counts["pairs", n] for n in range(3))


def test_no_opening_question_of_a_held_out_file_is_trained_on(tmp_path):
    (tmp_path / "asked.txt").write_text("问：我叫小雨\n答：好。\n", encoding="utf-8")
    person = Sample([{"role": "system", "content": "你是摆渡人。"}, *TOLD.messages])
    found = {"pairs": [TOLD, THOUGHT], "persons": [person]}
    assert samples.without(found, tmp_path) == {"pairs": [THOUGHT], "persons": [person]}
    (tmp_path / "asked.txt").rename(tmp_path / "situations.txt")  # asked of the persona, so of nobody else
    assert samples.without(found, tmp_path) == {"pairs": [THOUGHT], "persons": []}


def test_every_written_file_is_read_and_has_a_source():
    paths = sorted(TALKS.glob("*.txt"))
    assert len(paths) > 300
    assert {path.name.split("-")[0] for path in paths} <= set(samples.KINDS)
    for path in paths:
        for talk in dialogue.read(path):
            marks = "".join(mark for mark, _ in talk.turns)
            assert marks.startswith("问"), (path.name, talk)
            assert marks.endswith("答"), (path.name, talk)
