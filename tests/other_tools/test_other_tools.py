"""Each tool still trains what docs/other_tools.md says: `make test-other-tools`, by hand or once a week.

Every tool has an environment of its own in `output/other_tools/TOOL/.venv`; the first run installs it, which takes
minutes and gigabytes. A run trains four steps of 16 rows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from transformers import AutoModelForCausalLM

HERE, OUTPUT = Path(__file__).parent, ROOT / "output" / "other_tools"
CONFIGURATIONS = ROOT / "docs" / "other_tools"
sys.path.insert(0, str(CONFIGURATIONS))
from look import GROUPS, held  # noqa: E402

ROWS, STEPS = 64, 4
#: The column of the page's table, and how the training is started with few rows and steps.
TOOLS = {
    "llama_factory": (
        "LLaMA-Factory",
        f"llamafactory-cli train docs/other_tools/llama_factory.yaml max_steps={STEPS} \"eval_strategy='no'\"",
    ),
    "ms_swift": ("ms-swift", f"bash docs/other_tools/ms_swift.sh --max_steps {STEPS} --eval_strategy no"),
    "trl": ("TRL", f"python docs/other_tools/train_trl.py --max-steps {STEPS} --rows {ROWS}"),
}


def page_says(column: str) -> dict[str, str]:
    """Of the table of what each tool trains: row to cell."""
    page = (ROOT / "docs" / "other_tools.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in row] for row in rows]
    head = next(cells for cells in lines if "LLaMA-Factory" in cells)
    return {cells[0]: cells[head.index(column)] for cells in lines if len(cells) == len(head)}


def run(command: str | list[str], **how) -> str:
    """What a command prints.

    Raises:
        AssertionError: it failed; with the end of what it printed.
    """
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, shell=isinstance(command, str), check=False, **how)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def samples() -> Path:
    """Rows and samples of notebooks 03 and 04, made now."""
    environment = {**os.environ, "COURSE_OUTPUT": str(OUTPUT / "course")}
    for name in ("03_dataset", "04_chat_template"):
        execute = str(Path(sys.executable).with_name("jupyter-execute"))
        run([execute, f"notebooks/en/{name}.ipynb"], cwd=ROOT, env=environment)
    return OUTPUT / "course"


def installed(tool: str) -> dict[str, str]:
    """The variables with which commands of the tool's environment run; it is installed anew when a pin has changed."""
    folder, pins = OUTPUT / tool / ".venv", HERE / f"requirements-{tool}.txt"
    ready, python = folder / "ready", folder / "bin" / "python"
    if not ready.is_file() or ready.read_text(encoding="utf-8") != pins.read_text(encoding="utf-8"):
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(folder)])
        run([str(python), "-m", "pip", "install", "-q", "-r", str(pins)])
        if tool == "llama_factory" and subprocess.run([python, "-c", "import torchvision, torchaudio"]).returncode:
            # Their builds on the index need the CUDA libraries; torch here is a build for processors.
            run([str(python), "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio"])
            shutil.copy(HERE / "without_sound" / "torchaudio.py", next(folder.glob("lib/python*/site-packages")))
        ready.write_text(pins.read_text(encoding="utf-8"), encoding="utf-8")
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_DISABLED": "true"}
    return {**os.environ, **offline, "PATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


@dataclass
class Trained:
    """A finished training: the folder with the adapter, what the Trainer was given, and the page's column."""

    adapter: Path
    record: dict
    page: dict[str, str]


@pytest.fixture(scope="module", params=TOOLS)
def trained(request, samples, tmp_path_factory) -> Trained:
    """The tool's configuration of the page, run in a folder of its own."""
    tool = request.param
    column, command = TOOLS[tool]
    environment, place = installed(tool), tmp_path_factory.mktemp(tool)
    for name in ("models", "docs"):
        (place / name).symlink_to(ROOT / name)
    folder, record = place / "output" / "other_tools" / tool, place / "record.json"
    prepare = [sys.executable, str(CONFIGURATIONS / "prepare.py"), tool, "--rows", str(ROWS), "--target", str(folder)]
    run(prepare, env={**os.environ, "COURSE_OUTPUT": str(samples)})
    noted = {"OTHER_TOOLS_RECORD": str(record), "PYTHONPATH": str(HERE / "recorder")}
    run(command, cwd=place, env=environment | noted)
    if tool == "llama_factory":
        turn = [sys.executable, str(CONFIGURATIONS / "turn_experts.py"), str(folder / "trained")]
        run([*turn, str(folder / "lora" / "adapter")])
    return Trained(folder / "lora" / "adapter", json.loads(record.read_text(encoding="utf-8")), page_says(column))


def test_it_trains_the_groups_that_the_page_says(trained):
    counts = dict.fromkeys([*GROUPS, "elsewhere"], 0)
    for name, numbers in trained.record["trained"].items():
        counts[next((group for group, part in GROUPS.items() if part in name), "elsewhere")] += numbers
    assert {group: f"{count:,}" for group, count in counts.items()} == {group: trained.page[group] for group in counts}
    assert held(trained.adapter) == counts


def test_an_answer_ends_in_training_as_the_page_says(trained, tokenizer):
    ends = {tokenizer.decode([[label for label in row if label != -100][-1]]) for row in trained.record["labels"]}
    assert ends == {trained.page["ends an answer"].strip("`").replace("\\|", "|")}


def test_the_prompt_is_that_of_the_course(trained, tokenizer, samples):
    from datasets import load_from_disk

    course = {tuple(ids) for ids in load_from_disk(str(samples / "tokens" / "train"))["input_ids"]}
    padding = tokenizer.pad_token_id
    for row in trained.record["input_ids"]:
        kept = [token for token in row if token != padding]
        assert tuple(kept) in course, tokenizer.decode(kept)


def test_the_adapter_loads_as_in_notebook_06_and_changes_the_model(trained, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "glm4-moe-mini", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) (adapter )?keys.*")
        model = PeftModel.from_pretrained(base, trained.adapter).eval()
    prompt = "[gMASK]<sop><|user|>\n你是谁？/nothink<|assistant|>\n<think></think>"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        with_adapter = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(with_adapter, model(input_ids=ids).logits, atol=1e-3)
    moved = {name for name, value in model.named_parameters() if "lora_B" in name and value.abs().max() > 0}
    assert {group for group, part in GROUPS.items() if any(part in name for name in moved)} == set(GROUPS)
