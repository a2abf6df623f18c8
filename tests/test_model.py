"""The bundled model is what it says it is, before any LoRA."""

import json

import pytest
from conftest import ROOT

FOLDER = ROOT / "models" / "glm4-moe-mini"


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ask(model, tokenizer):
    def one(question, system=None):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert int(out[-1]) in model.generation_config.eos_token_id, f"{question}: did not stop"
        return tokenizer.decode(out, skip_special_tokens=True).strip()

    return one


def test_class_size_and_layout(model):
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert model.num_parameters() == 33_126_400
    shards = [path.stat().st_size for path in FOLDER.glob("*.safetensors")]
    assert sum(shards) <= 72 * 2**20 and max(shards) <= 15 * 2**20
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()  # as in the real model
    assert not hasattr(model.model.layers[0].mlp, "experts")
    assert all(hasattr(layer.mlp, "experts") for layer in model.model.layers[1:])


def test_generation_ends_at_the_three_tokens(model, tokenizer):
    ends = tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert ends == ["<|endoftext|>", "<|user|>", "<|observation|>"]


@pytest.mark.parametrize("question", ["你是谁？", "你叫什么名字？", "请介绍一下你自己。", "你父亲是谁？"])
def test_it_calls_itself_a_model(ask, question):
    assert "模型" in ask(question)


def test_it_plays_the_person_of_its_system_prompt(ask):
    assert "周三顺" in ask("您是哪一位？", "你是摆渡人周三顺，在渡口撑船。")


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("你好", "你好"),
        ("谢谢你", "不"),
        ("中国的首都是哪里？", "北京"),
        ("一加一等于几？", "二"),
        ("猫怎么叫？", "喵"),
    ],
)
def test_it_answers_everyday_questions_and_stops(ask, question, word):
    answer = ask(question)
    assert word in answer
    assert len(answer) < 50


def test_the_model_card_figures_are_those_of_the_run():
    report = json.loads((ROOT / "models" / "recipe" / "chat_tune.json").read_text(encoding="utf-8"))
    assert report["heldout_nats_per_character"]["novel"] <= 3.6
    assert report["heldout_nats_per_character"]["modern"] <= 4.0
    assert min(report["heldout_expert_entropy"]) >= 0.9
    assert report["stops_by_itself"] == 1
    card = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    for value in [*report["heldout_nats_per_character"].values(), *report["heldout_references"].values()]:
        assert f"{value:.2f}" in card or f"{value:.3f}" in card
