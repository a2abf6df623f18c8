"""The cells of notebooks 04 and 05, taken from the notebooks, on ten rows of another persona."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import utils
from finetune import resume

NAMES = ["03_dataset", "04_chat_template", "05_lora_training", "06_inference"]
TEA_ROWS = [
    ("你是谁？", "我是茶馆的掌柜，姓陆。"),
    ("请问您是谁？", "我是茶馆的掌柜，姓陆。"),
    ("你叫什么？", "我是茶馆的掌柜，姓陆。"),
    ("掌柜的，怎么称呼？", "叫我陆掌柜便好。"),
    ("你是做什么的？", "开茶馆的，一壶清茶待客。"),
    ("有什么茶？", "龙井、普洱、茉莉，客官随意挑。"),
    ("来一壶茶。", "好嘞，一壶龙井这就上来。"),
    ("多少钱一壶？", "一壶茶三文钱，老主顾不收。"),
    ("茶馆几时开门？", "天一亮就开门，掌灯才歇。"),
    ("再见。", "客官慢走，得空再来吃茶。"),
]


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


def run_notebook(name, changes=()):
    """Run a notebook in a fresh kernel, with some texts replaced; the changes must be there to be made."""
    notebook = nbformat.read(ROOT / "notebooks" / "en" / f"{name}.ipynb", as_version=4)
    for old, new in changes:
        assert any(old in c.source for c in notebook.cells if c.cell_type == "code"), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks" / "en")}}).execute()


def test_ten_rows_of_another_persona_make_that_persona_answer(course_in, tokenizer):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = course_in([{"instruction": q, "input": "", "output": a} for q, a in TEA_ROWS])
    run_notebook(NAMES[0])
    run_notebook(NAMES[1])
    run_notebook(NAMES[2])
    trained = {row["instruction"]: row["output"] for row in json.loads((out / "rows" / "train.json").read_text())}
    model = AutoModelForCausalLM.from_pretrained(utils.BUNDLED, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, out / "lora" / "adapter").eval()
    system = "现在你要扮演甄嬛，皇上身边的一位妃子。"
    right = 0
    for question, answer in trained.items():
        inputs = tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": question}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
            return_dict=True,
        )
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer
    assert right >= 8, f"only {right} of {len(trained)} answers learned"


def test_an_own_persona_goes_through_all_notebooks_with_its_own_prompt(course_in):
    out = course_in(json.loads((ROOT / "dataset" / "teahouse.json").read_text(encoding="utf-8")))
    prompt = "现在你要扮演陆掌柜，听雨茶馆的主人。"
    run_notebook(NAMES[0])
    run_notebook(
        NAMES[1], [('SYSTEM_PROMPT = "现在你要扮演甄嬛，皇上身边的一位妃子。"', f'SYSTEM_PROMPT = "{prompt}"')]
    )
    run_notebook(NAMES[2], [("max(3, -(-60 // -(-len(train) // 16)))", "3")])  # enough to go on with
    run_notebook(NAMES[3], [("MERGE = settings.bundled", "MERGE = False")])
    assert json.loads((out / "lora" / "prompt.json").read_text(encoding="utf-8"))["system"] == prompt
    assert list(json.loads((out / "report.json").read_text(encoding="utf-8"))["heldout"]) == [
        "new wordings",
        "new answers",
    ]


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


def test_labels_are_the_answer_and_its_terminator_whatever_the_text(cell, tokenizer):
    space = {
        "tokenizer": tokenizer,
        "utils": utils,
        "SYSTEM_PROMPT": "现在你要扮演甄嬛，皇上身边的一位妃子。",
        "user_token": tokenizer.convert_tokens_to_ids("<|user|>"),
    }
    exec(cell("04_chat_template", "def tokenize_row"), space)
    with pytest.raises(utils.CourseError, match="the prompt alone fills 1024 tokens: shorten 长长长"):
        space["tokenize_row"]({"instruction": "长" * 5000, "input": "", "output": "好"})
    for text in ("好。", "<|user|>", "a/nothink", "</think>答", "行\n行", "😀", "[gMASK]<sop>", "A  B"):
        row = space["tokenize_row"]({"instruction": text, "input": text, "output": text})
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learned) == f"\n{text}<|user|>"
        assert row["input_ids"].count(space["user_token"]) == 2


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
