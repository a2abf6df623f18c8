"""Answers token by token (`finetune.decode`) against transformers' own `generate`, on the bundled model on the CPU."""

import json
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import utils
from finetune import lora
from finetune.decode import Decoder, NoRepeatInAnswer
from finetune.model import load_model


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "4 bits"])
def model(request):
    """The bundled model with an adapter of random numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        base = load_model(utils.BUNDLED, load_in_4bit=request.param, attention="sdpa")
    made = lora.attach(base, lora.lora_config()).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    made.config.use_cache = True
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(utils.BUNDLED)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Ordinary questions of different lengths, as the template asks them."""
    questions = json.loads((ROOT / "dataset" / "ordinary_questions.json").read_text(encoding="utf-8"))[:6]
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": one}], **how) for one in questions]
    return [utils.encode(tokenizer, text) for text in texts]


def generated(model, ids, most):
    prompt = torch.tensor([ids])
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": most, "do_sample": False}
    with torch.no_grad():
        return model.generate(input_ids=prompt, **how)[0, len(ids) :].tolist()


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "base"])
def test_the_tokens_are_those_of_generate(model, prompts, adapter):
    decoder = Decoder(model, length=128)
    with nullcontext() if adapter else model.disable_adapter():
        for ids in prompts:  # one decoder for all: nothing of an earlier conversation may be left in it
            assert list(decoder.tokens(ids, 24)) == generated(model, ids, 24)


def test_switching_the_adapter_off_changes_the_answer_of_the_same_decoder(model, prompts):
    decoder = Decoder(model, length=128)
    first = list(decoder.tokens(prompts[0], 16))
    with model.disable_adapter():
        assert list(decoder.tokens(prompts[0], 16)) != first
    assert list(decoder.tokens(prompts[0], 16)) == first


def test_an_answer_ends_where_the_room_does(model, prompts):
    ids = prompts[0]
    whole = list(Decoder(model, length=128).tokens(ids, 20))
    assert len(whole) > 4, "the answer is too short for this test"
    assert list(Decoder(model, length=len(ids) + 4).tokens(ids, 20)) == whole[:4]
    assert list(Decoder(model, length=128).tokens(ids, 3)) == whole[:3]


def test_a_conversation_without_room_for_an_answer_is_refused(model, prompts):
    ids = prompts[0]
    with pytest.raises(utils.CourseError, match=f"has {len(ids)} tokens, there is room for {len(ids)}"):
        list(Decoder(model, length=len(ids)).tokens(ids))


def test_a_growing_text_never_takes_anything_back(model, tokenizer, prompts):
    texts = list(Decoder(model, length=128).texts(tokenizer, prompts[1], 24))
    assert len(texts) > 3
    for before, after in pairwise(texts):
        assert after.startswith(before) and len(after) > len(before)
    whole = tokenizer.decode(generated(model, prompts[1], 24), skip_special_tokens=True).strip()
    assert texts[-1] == whole.rstrip("\ufffd")


class Says:
    """In the place of a decoder's model: it says these tokens, whatever is asked."""

    def __init__(self, tokens):
        self.said = tokens

    def tokens(self, ids, most):
        yield from self.said


def test_a_character_of_several_tokens_appears_when_it_is_whole(tokenizer):
    tokens = tokenizer("好🦩啊", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 3, "the tokenizer has the character in one piece now; take a rarer one"
    assert list(Decoder.texts(Says(tokens), tokenizer, [])) == ["好", "好🦩", "好🦩啊"]


@pytest.mark.parametrize("said", [[], ["<|user|>"]], ids=["nothing", "only the end"])
def test_an_empty_answer_is_one_empty_text(tokenizer, said):
    tokens = tokenizer.convert_tokens_to_ids(said)
    assert list(Decoder.texts(Says(tokens), tokenizer, [])) == [""]


def test_no_pair_of_tokens_comes_twice_in_an_answer_while_the_prompt_may_be_repeated():
    no_pair_twice = NoRepeatInAnswer(2, start=3)
    said = torch.tensor([[4, 5, 9, 6, 7, 8, 6], [4, 5, 9, 4, 4, 4, 4], [4, 5, 9, 6, 7, 8, 4]])
    scores = no_pair_twice(said, torch.zeros(3, 10))
    forbidden = [set(row.isinf().nonzero().flatten().tolist()) for row in scores]
    assert forbidden == [{7}, {4}, set()]  # 4 5 is in the last prompt, so it may be said once
    assert not no_pair_twice(said[:, :3], torch.zeros(3, 10)).isinf().any()  # nothing has been said yet
