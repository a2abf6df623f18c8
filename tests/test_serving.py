"""Fifty questions to every form of the adapter that notebook 05 has trained, and greedy answers compared.

Run after `tools/run_nbval.py notebooks/en`, whose adapter in `output/test` is used: `make test` does both.
"""

import json

import pytest
import torch
from conftest import ROOT

import utils
from course import llama
from finetune import export, lora
from finetune.chat import Persona
from finetune.decode import Decoder
from finetune.model import load_model

LONGEST = 64


@pytest.fixture(scope="module")
def course():
    assert (ROOT / "output" / "test" / "lora").is_dir(), "run tools/run_nbval.py notebooks/en first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("COURSE_OUTPUT", str(ROOT / "output" / "test"))
        yield utils.settings()


@pytest.fixture(scope="module")
def questions():
    """Her situations, new wordings of what was taught, and ordinary questions; none is in a row of training."""
    found = []
    for name, count in (("heldout_situations", 20), ("heldout", 20)):
        rows = json.loads((ROOT / "dataset" / f"{name}.json").read_text(encoding="utf-8"))
        found += [row["instruction"] + row.get("input", "") for row in rows[:count]]
    found += json.loads((ROOT / "dataset" / "ordinary_questions.json").read_text(encoding="utf-8"))[:10]
    assert len(set(found)) == 50
    return found


@pytest.fixture(scope="module")
def persona(course):
    return Persona(history=False)


@pytest.fixture(scope="module")
def expected(persona, questions):
    """Answers of transformers with the adapter beside the weights, in float32."""
    return [persona.answer(question, LONGEST) for question in questions]


@pytest.fixture(scope="module")
def folder(course, tmp_path_factory):
    """The forms; the files of llama.cpp in three types."""
    parent = tmp_path_factory.mktemp("serving")
    for name, form, kind in (
        ("beside", "gguf", "f32"),
        ("whole", "gguf-merged", "f32"),
        ("f16", "gguf-merged", "f16"),
        ("q8_0", "gguf-merged", "q8_0"),
        ("merged", "merged", "f16"),
    ):
        export.export(form, parent / name, course, kind, report=lambda _: None)
    return parent


def ask(server, persona, questions):
    """Greedy answers of llama.cpp to each question."""
    found = []
    for question in questions:
        turns = [{"role": "system", "content": persona.system}, {"role": "user", "content": question}]
        how = {"temperature": 0, "max_tokens": LONGEST, "cache_prompt": False}
        how["chat_template_kwargs"] = {"enable_thinking": False}
        answer = server.post("/v1/chat/completions", {"messages": turns, **how})
        found.append(answer["choices"][0]["message"]["content"].strip())
    return found


def equal(found, expected):
    return sum(one == other for one, other in zip(found, expected, strict=True))


def test_the_adapter_changes_what_is_said(persona, questions, expected):
    with persona.model.disable_adapter():
        without = [persona.answer(question, LONGEST) for question in questions[:10]]
    assert equal(without, expected[:10]) <= 2


@pytest.mark.parametrize(
    ("name", "file", "adapter", "least"),
    [
        # In float32 the order of a sum may still decide between two tokens that are equally likely.
        ("beside", export.BASE_FILE, export.ADAPTER_FILE, 49),
        ("whole", export.MERGED_FILE, None, 49),
        ("f16", export.MERGED_FILE, None, 48),
        ("q8_0", export.MERGED_FILE, None, 25),
    ],
)
def test_llama_cpp_gives_the_answers_of_peft(persona, questions, expected, folder, name, file, adapter, least):
    with llama.Server(folder / name / file, adapter and folder / name / adapter) as server:
        found = equal(ask(server, persona, questions), expected)
    print(f"{name}: {found} of {len(questions)}")
    assert found >= least


def test_the_merged_checkpoint_gives_the_answers_of_peft(persona, questions, expected, folder):
    merged = load_model(folder / "merged", attention="sdpa", grouped=False).eval()
    merged.config.use_cache = True
    other = object.__new__(Persona)
    vars(other).update(vars(persona), model=merged, turns=[], decoder=Decoder(merged))
    found = equal([other.answer(question, LONGEST) for question in questions], expected)
    print(f"merged, bf16: {found} of {len(questions)}")
    assert found >= 40  # the stored weights are rounded to bf16


def test_the_adapters_scale_is_part_of_what_is_compared(persona, questions, expected, folder):
    assert lora.SCALE != 1
    files = [folder / "beside" / name for name in (export.BASE_FILE, export.ADAPTER_FILE)]
    with llama.Server(*files) as server:
        server.post("/lora-adapters", [{"id": 0, "scale": 1 / lora.SCALE}])
        assert equal(ask(server, persona, questions[:20]), expected[:20]) < 20
