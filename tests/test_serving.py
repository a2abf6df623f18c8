"""Fifty questions to every form of the adapter that notebook 05 has trained, and greedy answers compared.

Run after `tools/run_nbval.py notebooks/en`, whose adapter in `output/test` is used: `make test` does both.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from conftest import ROOT
from openai import OpenAI
from transformers import AutoModelForCausalLM

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


@contextmanager
def transformers_serve(model, log):
    """A running `transformers serve` that answers with thinking off; yields its address."""
    url = f"http://{llama.HOST}:{(port := llama.free_port())}"
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--host", llama.HOST, "--port", port]
    command += ["--device", "cpu", "--dtype", "float32", "--chat-template-kwargs", '{"enable_thinking": false}']
    with log.open("w") as said:
        server = subprocess.Popen(
            list(map(str, command)), stdout=said, stderr=said, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                urlopen(f"{url}/health", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail(f"no answer after two minutes: {log.read_text()[-2000:]}")
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


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
        ("f16", export.MERGED_FILE, None, 46),  # rounded to 16 bits; 47 on one processor
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


def test_transformers_serve_gives_the_answers_of_transformers(persona, questions, folder, tmp_path):
    """The same merged checkpoint, in float32 both times."""
    merged = str(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    expected, found = [], []
    with transformers_serve(merged, tmp_path / "serve.log") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for question in questions:
            turns = [{"role": "system", "content": persona.system}, {"role": "user", "content": question}]
            asked = {"model": merged, "messages": turns, "max_tokens": LONGEST, "temperature": 0}
            found.append(client.chat.completions.create(**asked).choices[0].message.content.strip())
            how = {"add_generation_prompt": True, "enable_thinking": False, "return_tensors": "pt", "return_dict": True}
            inputs = persona.tokenizer.apply_chat_template(turns, **how)
            ids = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            expected.append(persona.tokenizer.decode(ids, skip_special_tokens=True).strip())
    print(f"transformers serve: {equal(found, expected)} of {len(questions)}")
    assert found == expected


def test_the_adapters_scale_is_part_of_what_is_compared(persona, questions, expected, folder):
    assert lora.SCALE != 1
    files = [folder / "beside" / name for name in (export.BASE_FILE, export.ADAPTER_FILE)]
    with llama.Server(*files) as server:
        server.post("/lora-adapters", [{"id": 0, "scale": 1 / lora.SCALE}])
        assert equal(ask(server, persona, questions[:20]), expected[:20]) < 20
