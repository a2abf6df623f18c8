"""Thoughts mixed in: what counts as one, which samples are made of the base's replies, and what the file says."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
SPEC = importlib.util.spec_from_file_location("thoughts", ROOT / "benchmarks" / "thoughts.py")
thoughts = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(thoughts)
RUNS = [json.loads(line) for line in thoughts.RESULTS.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("\n<think>三加四。</think>\n七。<|user|>", "三加四。"),
        ("\n<think></think>\n七。<|user|>", ""),
        ("\n七。<|user|>", ""),
        ("\n<think>没有结束", ""),
    ],
)
def test_a_thought_is_what_stands_before_the_closing_token(tokenizer, reply, found):
    assert thoughts.thought(tokenizer, tokenizer(reply, add_special_tokens=False)["input_ids"]) == found


def test_samples_are_made_of_replies_that_think_and_end(tokenizer, monkeypatch):
    """Their prompt has thinking on and is read only; the reply is trained, closed by the user tag."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    said = [
        "\n<think>想一想。</think>\n好。<|endoftext|>",
        "\n<think></think>\n好。<|user|>",
        "\n<think>想。</think>\n好",
    ]
    monkeypatch.setattr(
        thoughts, "replies", lambda model, tokenizer, asked: [ids(said[i % 3]) for i in range(len(asked))]
    )
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|user|>")]
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
    samples = thoughts.own_thoughts(model, tokenizer, 3)
    assert len(samples) == 2  # of twice three questions every third has a thought and an end
    for sample in samples:
        read = sum(label == -100 for label in sample["labels"])
        assert tokenizer.decode(sample["input_ids"][:read]).endswith("<|assistant|>")
        assert sample["labels"][read:] == sample["input_ids"][read:] == ids("\n<think>想一想。</think>\n好。<|user|>")


def test_the_measured_runs_say_what_notebook_06_says():
    by_count = {run["thoughts"]: run for run in RUNS}
    assert set(by_count) == {0, 100, 300, 600}
    assert all(run["before"] == RUNS[0]["before"] for run in RUNS)
    none, hundred = by_count[0]["after"]["situations"][0], by_count[100]["after"]["situations"][0]
    assert none < 0.7 * RUNS[0]["before"]["situations"][0] and hundred > 0.9 * RUNS[0]["before"]["situations"][0]


def test_the_table_has_the_base_and_each_run(capsys):
    thoughts.table(RUNS)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + len(RUNS)
