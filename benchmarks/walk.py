"""The whole way on one 80 GB GPU, at the full size with random weights: plan, train, chat, evaluate, export.

    python benchmarks/walk.py prepare FOLDER    on any machine: rows and tokens, for the model in FOLDER/model
    python benchmarks/walk.py FOLDER            on the GPU: each command of `python -m finetune`, one after the other

The model is a checkpoint of holes with the bundled model's tokenizer, so nothing is downloaded and no disk is taken.
Each command is the real one, in a process of its own; only what it loads is filled with random weights, always the
same. What is answered means nothing. Every command's output, seconds and GiB go to `FOLDER/walk.log`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import utils

#: What is run, with `--load-in-4bit` where the weights are loaded; the questions that `chat` is asked.
STEPS = (
    ("plan", "--load-in-4bit", "--max-steps", "6"),
    ("train", "--load-in-4bit", "--max-steps", "6", "--save-steps", "3"),
    ("chat", "--load-in-4bit"),
    ("evaluate", "--load-in-4bit", "--rows", "4"),
    ("export", "adapter", "{folder}/adapter"),
    ("export", "split", "{folder}/split"),
)
QUESTIONS = "你是谁？\n你父亲是谁？\n\n"
SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def environment(folder: Path) -> dict[str, str]:
    """The variables of every command."""
    own = {"COURSE_MODEL": str(folder / "model"), "COURSE_OUTPUT": str(folder / "output"), "SWANLAB_MODE": "disabled"}
    return {key: value for key, value in os.environ.items() if not key.startswith("COURSE_")} | own


def write_model(folder: Path, tiny: bool) -> None:
    """A checkpoint of holes with the bundled model's tokenizer."""
    from transformers import AutoConfig

    from finetune.checkpoint import write_holes
    from finetune.config import AIR

    bundled = AutoConfig.from_pretrained(utils.BUNDLED)
    config = bundled if tiny else deepcopy(AIR)
    for name in ("eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(bundled, name))
    write_holes(folder / "model", config, shards=2 if tiny else 47)
    for name in SMALL_FILES:
        shutil.copy(utils.BUNDLED / name, folder / "model" / name)


def prepare(folder: Path, tiny: bool) -> None:
    """Run notebooks 03 and 04 for that model."""
    write_model(folder, tiny)
    for name in ("03_dataset", "04_chat_template"):
        cells = json.loads((ROOT / "notebooks" / "en" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        source = ["".join(cell["source"]) for cell in cells]
        end = next(i for i, text in enumerate(source) if text.startswith("## Exercises"))
        code = [text for text, cell in zip(source[:end], cells, strict=False) if cell["cell_type"] == "code"]
        script = "\n".join(code)
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT / "notebooks" / "en", env=environment(folder), check=True
        )


def run(arguments: list[str]) -> int:
    """One command of the engine in this process, with random weights in whatever it loads."""
    from finetune import __main__ as commands

    utils.start()  # before torch is imported
    import torch
    from benchmark import randomise

    from finetune import chat, train
    from finetune.model import load_model

    def with_random_weights(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        randomise(model)
        return model

    train.load_model = chat.load_model = with_random_weights
    status = commands.main(arguments)
    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB at most")
    return status


def walk(folder: Path, tiny: bool) -> int:
    """Every command in a process of its own; stops at the first that fails."""
    if not (folder / "model").is_dir():
        write_model(folder, tiny)
    with (folder / "walk.log").open("w", encoding="utf-8") as log:
        for step in STEPS:
            arguments = [part.format(folder=folder) for part in step]
            if tiny and not shutil.which("nvidia-smi"):
                arguments = [part for part in arguments if part != "--load-in-4bit"]
            began = time.time()
            done = subprocess.run(
                [sys.executable, __file__, "run", str(folder), *arguments],
                env=environment(folder),
                input=QUESTIONS if step[0] == "chat" else "",
                capture_output=True,
                text=True,
                check=False,
            )
            told = [line for line in done.stderr.splitlines() if "warn" not in line.lower() and "%|" not in line]
            head = f"$ python -m finetune {' '.join(arguments)}"
            text = "\n".join(
                [head, done.stdout.strip(), *told, f"{time.time() - began:.0f} s, status {done.returncode}", ""]
            )
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()
            if done.returncode:
                return done.returncode
    return 0


def main() -> int:
    """Prepare, walk, or (for the walk's own use) run one command."""
    if sys.argv[1:2] == ["run"]:
        return run(sys.argv[3:])
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("words", nargs="+", metavar="[prepare] FOLDER", help="where everything is written")
    parse.add_argument("--tiny", action="store_true", help="the bundled model's sizes, for a machine without a GPU")
    options = parse.parse_args()
    folder = Path(options.words[-1]).absolute()
    if options.words[0] == "prepare":
        prepare(folder, options.tiny)
        return 0
    return walk(folder, options.tiny)


if __name__ == "__main__":
    sys.exit(main())
