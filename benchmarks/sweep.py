"""Which `lora_alpha` and learning rate? A grid of whole training runs of notebook 05, each over several seeds.

    python benchmarks/sweep.py                        the default grid, one run at a time
    python benchmarks/sweep.py --jobs 12              twelve runs at once; for a GPU, which one run keeps half busy
    python benchmarks/sweep.py --table                the table of what `benchmarks/sweep.jsonl` holds
    python benchmarks/sweep.py --batches 8 32 128     one pass in batches of each size, with curves, to batches.jsonl

Each run is notebook 05 in float32 without its recording: the same rows and LoRA targets, batches of 16, two passes
over the rows, a cosine schedule with 5 % warmup. The rows come in random order instead of batches of similar length;
the seed decides that order and the adapter's start. It needs the tokens of notebooks 03 and 04. One line a run goes to
`benchmarks/sweep.jsonl`: the mean loss in nats a token on new wordings (the validation set), on new answers and on the
test questions, and the shares of test questions whose greedy answer stops and equals the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import utils
from course.model_folder import model_folder
from course.rows import load_rows

RESULTS = ROOT / "benchmarks" / "sweep.jsonl"
CURVES = ROOT / "benchmarks" / "batches.jsonl"
BATCH, EPOCHS, WARMUP = 16, 2, 0.05
POINTS = 12  # of a curve


def samples_of(course: utils.Settings, tokenizer: Any) -> dict[str, list[dict[str, list[int]]]]:
    """Token ids and labels of every part, and of the test questions rendered as notebook 04 does."""
    from datasets import load_from_disk

    tokens = utils.require(course.output / "tokens", "04_chat_template", course)
    parts = {path.name: list(load_from_disk(str(path))) for path in sorted(tokens.iterdir()) if path.is_dir()}
    system = json.loads((tokens / "prompt.json").read_text(encoding="utf-8"))["system"]
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    parts["test"] = []
    for row in load_rows(ROOT / "dataset" / "heldout.json"):
        turns = [{"role": "system", "content": system}, *row["messages"][:-1]]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        prompt = utils.encode(tokenizer, text)
        answer = [*utils.encode(tokenizer, "\n" + row["messages"][-1]["content"].strip()), end]
        parts["test"].append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return parts


def padded(samples: list[dict[str, list[int]]], pad: int, device: str) -> dict[str, torch.Tensor]:
    """A batch padded on the right; padding has the label -100."""
    longest = max(len(one["input_ids"]) for one in samples)
    rows = [(one["input_ids"], one["labels"], longest - len(one["input_ids"])) for one in samples]
    batch = {
        "input_ids": [ids + [pad] * rest for ids, _, rest in rows],
        "labels": [labels + [-100] * rest for _, labels, rest in rows],
        "attention_mask": [[1] * len(ids) + [0] * rest for ids, _, rest in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


@torch.no_grad()
def mean_loss(model: Any, samples: list[dict[str, list[int]]], pad: int) -> float:
    """Nats a token over all labels of the samples."""
    total = count = 0
    for start in range(0, len(samples), 64):
        batch = padded(samples[start : start + 64], pad, model.device)
        labels = int((batch["labels"] != -100).sum())
        total, count = total + model(**batch).loss.item() * labels, count + labels
    return total / count


@torch.no_grad()
def greedy_shares(model: Any, samples: list[dict[str, list[int]]], tokenizer: Any) -> tuple[float, float]:
    """The shares of samples whose greedy answer stops, and equals the reference token for token."""
    ends = set(model.generation_config.eos_token_id)
    prompts = [[i for i, label in zip(*one.values(), strict=True) if label == -100] for one in samples]
    wanted = [[label for label in one["labels"] if label != -100] for one in samples]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    answers = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    stops = [bool(ends & set(answer)) for answer in answers]
    equal = [answer[: len(right)] == right for answer, right in zip(answers, wanted, strict=True)]
    return sum(stops) / len(stops), sum(equal) / len(equal)


def trained(
    rows: list[dict[str, list[int]]],
    alpha: int,
    rate: float,
    seed: int,
    rank: int = 8,
    batch_size: int = BATCH,
    epochs: int | None = None,
    each_step: Callable[[Any, int, int], None] | None = None,
) -> tuple[Any, int]:
    """The model with an adapter trained on these samples, and the number of steps.

    Args:
        epochs: passes over the rows; None for those of notebook 05.
        each_step: called with the model, the steps made and the steps of the whole run, before the first step and
            after each.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup, set_seed

    from finetune.lora import lora_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model_folder(utils.start())
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    config = lora_config(rank)
    config.lora_alpha = alpha
    model = get_peft_model(model, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    order = torch.Generator().manual_seed(seed)
    epochs = epochs or EPOCHS
    steps, made = epochs * -(-len(rows) // batch_size), 0
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * WARMUP), steps)
    model.train()
    if each_step:
        each_step(model, 0, steps)
    for _ in range(epochs):
        shuffled = torch.randperm(len(rows), generator=order).tolist()
        for start in range(0, len(rows), batch_size):
            batch = padded([rows[i] for i in shuffled[start : start + batch_size]], pad, device)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            made += 1
            if each_step:
                each_step(model, made, steps)
    return model.eval(), steps


def one_run(alpha: int, rate: float, seed: int, rank: int = 8, batch_size: int | None = None) -> dict[str, Any]:
    """Train once and measure; a loss of NaN is kept as such.

    Args:
        batch_size: with it one pass is made in batches of this size, and the curve of the loss on new wordings is kept.
    """
    from transformers import AutoTokenizer

    course = utils.start()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(course))
    parts = samples_of(course, tokenizer)
    train, curve = parts.pop("train"), []

    def note(model: Any, made: int, steps: int) -> None:
        if made * POINTS // steps > (made - 1) * POINTS // steps or not made:
            loss = mean_loss(model.eval(), parts["new_wordings"], tokenizer.pad_token_id)
            curve.append([min(made * batch_size, len(train)), round(loss, 4)])
            model.train()

    once = {"batch_size": batch_size, "epochs": 1, "each_step": note} if batch_size else {}
    model, steps = trained(train, alpha, rate, seed, rank, **once)
    losses = {name: round(mean_loss(model, part, tokenizer.pad_token_id), 4) for name, part in parts.items()}
    stops, equal = greedy_shares(model, parts["test"], tokenizer)
    made = {"rank": rank, "alpha": alpha, "learning_rate": rate, "seed": seed, "steps": steps}
    if batch_size:
        made |= {"batch": batch_size, "epochs": 1, "curve": curve}
    return made | losses | {"stops": round(stops, 3), "equal": round(equal, 3)} | where_run()


def where_run() -> dict[str, str]:
    """The processor and the release of torch, for the line of a result."""
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"on": on, "torch": torch.__version__}


def table(lines: list[dict[str, Any]]) -> None:
    """Mean and range over the seeds of each cell of the grid, the best on new wordings first."""
    cells = defaultdict(list)
    for line in lines:
        cells[line["alpha"], line["learning_rate"]].append(line)

    def mean(runs: list[dict[str, Any]], name: str) -> float:
        return sum(run[name] for run in runs) / len(runs)

    rows = []
    for (alpha, rate), runs in sorted(cells.items(), key=lambda cell: mean(cell[1], "new_wordings")):
        least, most = (pick(run["new_wordings"] for run in runs) for pick in (min, max))
        figures = [f"{mean(runs, name):.3f}" for name in ("new_wordings", "new_answers", "test")]
        figures += [f"{least:.3f} to {most:.3f}", *(f"{mean(runs, name):.0%}" for name in ("stops", "equal"))]
        rows.append((alpha, f"{rate:g}", len(runs), *figures))
    head = ("alpha", "learning rate", "seeds", "new wordings", "new answers", "test", "range", "stops", "equal")
    utils.table(rows, head)


def main() -> int:
    """Run what is missing of the grid, some runs at once, or print the table."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--alphas", type=int, nargs="+", default=[16, 32, 64])
    parse.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parse.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parse.add_argument("--jobs", type=int, default=1)
    parse.add_argument("--results", type=Path, default=RESULTS)
    parse.add_argument("--table", action="store_true")
    parse.add_argument("--batches", type=int, nargs="+", help="batch sizes to compare, at an alpha of 32")
    parse.add_argument("--one", nargs="+", help="one run (alpha, rate, seed, batch size or none), its line is printed")
    chosen = parse.parse_args()
    if chosen.one:
        alpha, rate, seed, *batch = chosen.one
        line = one_run(int(alpha), float(rate), int(seed), batch_size=int(batch[0]) if batch else None)
        print("RESULT " + json.dumps(line), flush=True)
        return 0
    if chosen.batches:
        chosen.alphas, chosen.results = [32], CURVES if chosen.results == RESULTS else chosen.results
    text = chosen.results.read_text(encoding="utf-8") if chosen.results.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    if chosen.table:
        table(lines)
        return 0
    names = ["batch"] * bool(chosen.batches) + ["seed", "learning_rate", "alpha"]
    there = {tuple(line[name] for name in reversed(names)) for line in lines}
    parts = [chosen.batches] * bool(chosen.batches) + [chosen.seeds, chosen.rates, chosen.alphas]
    grid = (cell[::-1] for cell in product(*parts))  # one whole grid a seed
    todo, running, failed = [cell for cell in grid if cell not in there], [], 0
    while todo or running:
        while todo and len(running) < chosen.jobs:
            command = [sys.executable, __file__, "--one", *map(str, todo.pop(0))]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        process = running.pop(0)
        said = process.communicate()[0]
        failed += process.returncode != 0
        with chosen.results.open("a", encoding="utf-8") as file:
            file.writelines(line[7:] + "\n" for line in said.splitlines() if line.startswith("RESULT "))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
