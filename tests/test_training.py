"""Notebooks 03 to 06 on the rows of another persona, single cells of 04 and 05, and the guard of `make test`."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

import utils
from finetune import resume
from notebooks import run_notebook

NAMES = ["03_dataset", "04_chat_template", "05_lora_training", "06_inference"]


@pytest.fixture
def course_in(tmp_path, monkeypatch):
    def make(rows):
        data = tmp_path / "rows.json"
        data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        monkeypatch.setenv("COURSE_DATA", str(data))
        monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "out"))
        monkeypatch.setenv("SWANLAB_MODE", "disabled")
        return tmp_path / "out"

    return make


def test_an_own_persona_is_learned_through_all_notebooks(course_in, tokenizer, monkeypatch):
    """The tea-house keeper's 30 rows: his own prompt, most answers learned by heart, and a report."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = course_in(json.loads((ROOT / "dataset" / "teahouse.json").read_text(encoding="utf-8")))
    prompt = "现在你要扮演陆掌柜，听雨茶馆的主人。"
    monkeypatch.setenv("COURSE_SYSTEM_PROMPT", prompt)
    monkeypatch.setenv("COURSE_MAX_STEPS", "40")
    for name in NAMES:
        run_notebook(name, lesson_only=True)
    assert json.loads((out / "lora" / "prompt.json").read_text(encoding="utf-8"))["system"] == prompt
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert list(report["heldout"]) == ["new wordings", "new answers"]
    rows = json.loads((out / "rows" / "train.json").read_text(encoding="utf-8"))
    trained = {row["messages"][-2]["content"]: row["messages"][-1]["content"] for row in rows}
    model = AutoModelForCausalLM.from_pretrained(utils.BUNDLED, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, out / "lora" / "adapter").eval()
    right = 0
    for question, answer in trained.items():
        inputs = tokenizer.apply_chat_template(
            [{"role": "system", "content": prompt}, {"role": "user", "content": question}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
            return_dict=True,
        )
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer
    assert right >= 0.8 * len(trained), f"only {right} of {len(trained)} answers learned"


def test_a_bad_file_stops_before_anything_is_trained(course_in):
    from nbclient.exceptions import CellExecutionError

    out = course_in([{"instruction": "你好", "input": "", "output": ""}])
    with pytest.raises(CellExecutionError) as error:
        run_notebook(NAMES[0])
    assert "rows.json" in error.value.evalue
    assert "row 1 'output' is empty" in error.value.evalue
    assert not (out / "rows").exists()


@pytest.mark.parametrize(
    ("name", "first"), [("04_chat_template", "03_dataset"), ("05_lora_training", "04_"), ("06_inference", "05_")]
)
def test_a_notebook_before_its_turn_says_what_to_run(course_in, name, first):
    from nbclient.exceptions import CellExecutionError

    course_in([{"instruction": "你好", "input": "", "output": "好"}])
    with pytest.raises(CellExecutionError) as error:
        run_notebook(name)
    assert f"Run notebook {first}" in error.value.evalue


def test_a_prompt_that_fills_a_sample_is_named(cell, tokenizer):
    space = {"tokenizer": tokenizer, "utils": utils, "SYSTEM_PROMPT": "现在你要扮演甄嬛，皇上身边的一位妃子。"}
    for part in ("def render", "def one_turn", "def prepared_turns", "def tokenize", "def all_samples"):
        exec(cell("04_chat_template", part), space)
    row = {"messages": [{"role": "user", "content": "长" * 5000}, {"role": "assistant", "content": "好"}]}
    with pytest.raises(utils.CourseError, match="the prompt alone fills 1024 tokens: shorten 长长长"):
        space["all_samples"]([row])


def test_training_twice_in_one_kernel_is_refused(cell):
    from torch import nn

    class Adapter(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.lora_B = nn.Linear(1, 1)
            nn.init.constant_(self.lora_B.weight, size)
            nn.init.zeros_(self.lora_B.bias)

    source = cell("05_lora_training", "def begin_untrained")
    with pytest.raises(utils.CourseError, match="This kernel has trained already"):
        exec(source, {"utils": utils, "model": Adapter(0.1)})
    with pytest.raises(NameError, match="run_folder"):  # an untouched adapter passes the guard and goes on
        exec(source, {"utils": utils, "resume": resume, "model": Adapter(0.0)})


def planted(folder, source, outputs=(), **metadata):
    code = nbformat.v4.new_code_cell(source, execution_count=1, outputs=list(outputs), metadata=metadata)
    nbformat.write(nbformat.v4.new_notebook(cells=[code]), folder / "01_planted.ipynb")
    command = [sys.executable, str(ROOT / "tools" / "run_nbval.py"), str(folder), "--cell-seconds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=os.environ)
    return done.returncode, done.stdout + done.stderr


STORED = nbformat.v4.new_output("stream", name="stdout", text="1\n")


@pytest.mark.parametrize(
    ("source", "outputs", "said"),
    [
        ("x = 1", [], "no stored outputs"),
        ("print(2)", [STORED], "mismatch"),
        ("import os\nos._exit(1)", [STORED], "the kernel died"),
        ("import time\ntime.sleep(60)\nprint(1)", [STORED], "Timeout"),
    ],
)
def test_the_guard_fails_quickly(tmp_path, source, outputs, said):
    code, printed = planted(tmp_path, source, outputs)
    assert code != 0
    assert said in printed


def test_the_guard_lets_a_good_notebook_through(tmp_path):
    code, printed = planted(tmp_path, "print(1)", [STORED])
    assert code == 0, printed


def test_an_output_that_is_not_compared_needs_a_reason(tmp_path):
    code, printed = planted(tmp_path, "print(1)", [STORED], tags=["nbval-ignore-output"])
    assert code != 0
    assert "gives no 'reason'" in printed
