"""What another tool reads, made of the rows and samples of notebooks 03 and 04.

    python docs/other_tools/prepare.py TOOL      llama_factory, ms_swift or trl

Writes `output/other_tools/TOOL`. In it are the rows and samples of the course, what the tool reads, and the place for
the adapter, so that `COURSE_OUTPUT=output/other_tools/TOOL` shows notebook 06 the adapter of that tool.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from datasets import DatasetDict, load_from_disk

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import utils  # noqa: E402
from course.model_folder import model_folder  # noqa: E402

TOOLS = ("llama_factory", "ms_swift", "trl")
HELD_OUT = ("new_wordings", "new_answers")


def messages(row: dict, system: str, ending: str = "") -> dict:
    """A row with the system prompt of notebook 04; `ending` is put at the end of each question."""
    turns = [
        turn | {"content": turn["content"] + ending} if turn["role"] == "user" else turn for turn in row["messages"]
    ]
    own = turns if turns[0]["role"] == "system" else [{"role": "system", "content": system}, *turns]
    return {"messages": own}


def for_llama_factory(target: Path, settings: utils.Settings, most: int | None) -> None:
    """The samples of notebook 04 in the form of `tokenized_path`, and an untrained adapter on all four groups.

    LLaMA-Factory computes in the type in which the weights are stored. On a processor bfloat16 is slow, so there the
    bundled model gets a copy in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from turn_experts import turn

    from finetune import lora

    parts = {"train": "train"} | {f"validation_{name}": name for name in HELD_OUT}
    samples = {part: load_from_disk(str(target / "tokens" / name)) for part, name in parts.items()}
    if most:
        samples = {part: rows.select(range(min(most, len(rows)))) for part, rows in samples.items()}
    DatasetDict(samples).save_to_disk(target / "samples")
    folder = model_folder(settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(target / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(target / "model")
    set_seed(42)
    model = lora.attach(model, lora.lora_config())
    model.save_pretrained(target / "untrained")
    utils.name_base(target / "untrained", settings)
    turn(target / "untrained", target / "start")  # LLaMA-Factory has peft 0.18


def for_ms_swift(target: Path, system: str, most: int | None) -> None:
    """JSON Lines with messages. ms-swift's template leaves out `/nothink`, so it is put at the end of each question."""
    for name in ("train", *HELD_OUT):
        rows = json.loads((target / "rows" / f"{name}.json").read_text(encoding="utf-8"))[:most]
        lines = [json.dumps(messages(row, system, "/nothink"), ensure_ascii=False) for row in rows]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare(tool: str, target: Path, most: int | None = None) -> None:
    """Make the folder of a tool.

    Raises:
        CourseError: notebook 03 or 04 has not run.
    """
    settings = utils.settings()
    for part, notebook in (("rows", "03_dataset"), ("tokens", "04_chat_template")):
        shutil.copytree(utils.require(settings.output / part, notebook, settings), target / part, dirs_exist_ok=True)
    prompt = (target / "tokens" / "prompt.json").read_text(encoding="utf-8")
    utils.stamp(target / "lora", settings)
    (target / "lora" / "prompt.json").write_text(prompt, encoding="utf-8")
    if tool == "llama_factory":
        for_llama_factory(target, settings, most)
    if tool == "ms_swift":
        for_ms_swift(target, json.loads(prompt)["system"], most)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--rows", type=int, help="of each file only so many rows")
    parser.add_argument("--target", type=Path, help="in the place of output/other_tools/TOOL")
    given = parser.parse_args()
    prepare(given.tool, given.target or ROOT / "output" / "other_tools" / given.tool, given.rows)
