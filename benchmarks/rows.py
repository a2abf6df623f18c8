"""More rows or more passes? LoRA of notebook 05 on other choices of rows, measured on answers that no row has.

python benchmarks/rows.py --steps 208 --share 0.5          half of the rows, as often as 208 steps read them
python benchmarks/rows.py --steps 620 --also more_rows=1 --repeated 1600
                                        all rows and `dataset/more_rows.jsonl`, the first 1,600 rows twice
python benchmarks/rows.py --steps 2000 --share 2 --also more_rows=2 her_rows=2 court_rows=1 --batch 32 --save FOLDER
                                        all files of `dataset/`, those of the court once; the adapter in peft's format
Each run adds a line to `--out`: the losses at its end, in nats a token, on the reference answers of the four sets for
readers and on `dataset/heldout.json` (taught answers). `--answers` writes what it answers, as `tools/judging.py` reads
it: greedily, or with `--beams 4` as the chat does. The rows are in random order, those of a batch of similar length.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "models" / "recipe")]
import utils

utils.start()  # before torch is imported

import torch
from chat_tune import PERSONA_PROMPT, losses_by_source, messages_of, pad, reference_rows
from peft.helpers import rescale_adapter_scale
from samples import IGNORED, PERSONA, Row, Sample, encoded
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

import training
from course.rows import load_rows
from finetune import lora
from finetune.decode import NoRepeatInAnswer
from finetune.packing import SimilarLengths

BATCH, WARMUP = 16, 0.05  # samples of a step in notebook 05; share of the steps
SYSTEM = {"role": "system", "content": PERSONA_PROMPT}
DATA, HELD_OUT = ROOT / "dataset", ROOT / "models" / "recipe" / "heldout"


def conversations(*names: str) -> list[Sample]:
    """The rows of files of `dataset/`, under the prompt of notebook 04."""
    return [Sample([SYSTEM, *row["messages"]]) for name in names for row in load_rows(DATA / name)]


def times(samples: list[Sample], often: float, draw: random.Random) -> list[Sample]:
    """The samples in random order, so often: 2.5 is each one twice, and a random half of them once more."""
    order = list(samples)
    draw.shuffle(order)
    return order * int(often) + order[: round((often - int(often)) * len(order))]


def chosen(options: argparse.Namespace) -> list[Sample]:
    """The rows of a run: those of notebook 05, the first ones once more if asked for, and those of other files."""
    draw = random.Random(1)
    usual = conversations("huanhuan.json", "conversations.jsonl")
    found = times(usual + usual[: options.repeated], options.share, draw)
    for name, often in options.also:
        found += times(conversations(f"{name}.jsonl"), often, draw)
    return found


def other_file(text: str) -> tuple[str, float]:
    """`more_rows=2` as argparse takes it: the name of a file of `dataset/`, and how often its rows are read."""
    name, _, often = text.partition("=")
    if not (DATA / f"{name}.jsonl").is_file():
        raise argparse.ArgumentTypeError(f"dataset/{name}.jsonl is not there")
    return name, float(often or 1)


def batches(rows: list[Row], seed: int, size: int = BATCH) -> Iterator[list[Row]]:
    """Batches without end, pass after pass, in notebook 05's order."""
    order = SimilarLengths([len(row.ids) for row in rows], size, seed)
    for epoch in count():
        order.set_epoch(epoch)
        numbers = list(order)
        yield from ([rows[i] for i in numbers[at : at + size]] for at in range(0, len(numbers), size))


def train(model: Any, rows: list[Row], options: argparse.Namespace) -> float:
    """Train in place with notebook 05's schedule; the mean training loss of the last steps."""
    base, running = model.get_base_model(), 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    for step, batch in zip(range(1, options.steps + 1), batches(rows, options.seed, options.batch), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = options.rate * training.cosine(step / options.steps, WARMUP, 0.0)
        ids, labels = pad(batch, base.config.pad_token_id, max(len(row.ids) for row in batch))
        ids, labels = ids.to(base.device), labels.to(base.device)
        loss = training.summed_loss(base, ids, labels) / (labels != IGNORED).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = 0.95 * running + 0.05 * loss.item()
    return running / (1 - 0.95**options.steps)


@torch.no_grad()
def answered(model: Any, tokenizer: Any, name: str, beams: int = 1) -> list[dict[str, Any]]:
    """Answers to the questions of the sets for readers: greedy, or with beams and no pair of tokens twice."""
    rows: list[dict[str, Any]] = []
    tokenizer.padding_side = "left"
    for kind in PERSONA:
        asked = [[turn for turn in talk[:-1] if turn.get("content")] for talk in messages_of(HELD_OUT / f"{kind}.txt")]
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        prompts = [tokenizer.apply_chat_template([SYSTEM, *turns], **how) for turns in asked]
        given = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        length = given["input_ids"].shape[1]
        search: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "num_beams": beams}
        if beams > 1:
            search["logits_processor"] = LogitsProcessorList([NoRepeatInAnswer(2, length)])
        said = model.generate(**given, **search)[:, length:]
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        found = zip(asked, texts, strict=True)
        rows += [{"set": kind, "author": name, "asked": turns, "answer": text.strip()} for turns, text in found]
    return rows


def save(model: Any, folder: Path) -> None:
    """The adapter in bf16, with the system prompt it was trained with."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in lora.adapter_state(model).items()}
    model.save_pretrained(folder / "adapter", state_dict=state)
    utils.name_base(folder / "adapter", utils.settings())
    (folder / "prompt.json").write_text(json.dumps({"system": PERSONA_PROMPT}, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    """One run."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--steps", type=int, default=343)
    parse.add_argument("--share", type=float, default=1.0, help="of the rows that notebook 05 reads; 2: each twice")
    parse.add_argument(
        "--also", type=other_file, nargs="+", default=[], metavar="NAME=TIMES", help="rows of dataset/NAME.jsonl too"
    )
    parse.add_argument("--repeated", type=int, default=0, help="so many of the first rows are there twice")
    parse.add_argument("--batch", type=int, default=BATCH, help="samples of a step")
    parse.add_argument("--rate", type=float, default=4e-3)
    parse.add_argument("--dropout", type=float, default=0.0)
    parse.add_argument("--rank", type=int, default=8)
    parse.add_argument("--seed", type=int, default=42)
    parse.add_argument("--strengths", type=float, nargs="+", default=[1.0], help="of the adapter, when it is measured")
    parse.add_argument("--out", type=Path, default=Path("output/rows.jsonl"))
    parse.add_argument("--answers", type=Path, help="write its answers to this file")
    parse.add_argument(
        "--beams", type=int, default=1, help="for the answers; with more than one no pair of tokens twice"
    )
    parse.add_argument("--save", type=Path, help="write the adapter to this folder")
    options = parse.parse_args()
    torch.manual_seed(options.seed)
    device, started = "cuda" if torch.cuda.is_available() else "cpu", time.time()
    tokenizer = AutoTokenizer.from_pretrained(utils.BUNDLED)
    rows = encoded(tokenizer, {"rows": chosen(options)})["rows"]
    model = AutoModelForCausalLM.from_pretrained(utils.BUNDLED, dtype=torch.float32).to(device)
    model = lora.attach(model, lora.lora_config(options.rank))
    training.add_dropout(model.get_base_model(), options.dropout)
    loss = train(model.train(), rows, options)
    model.eval()
    if options.save:
        save(model, options.save)
    held_out = {kind: found for kind, found in reference_rows(tokenizer, HELD_OUT).items() if kind in PERSONA}
    held_out["taught"] = encoded(tokenizer, {"rows": conversations("heldout.json")})["rows"]
    run = {name: value for name, value in vars(options).items() if name not in ("out", "answers", "strengths", "save")}
    run |= {
        "rows": len(rows),
        "passes": round(options.steps * options.batch / len(rows), 2),
        "training": round(loss, 3),
    }
    run |= {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    said: list[dict[str, Any]] = []
    for strength in options.strengths:
        with rescale_adapter_scale(model, strength):  # 0 is the base, 1 the trained adapter
            losses = losses_by_source(model.get_base_model(), held_out)
            if options.answers:
                said += answered(model, tokenizer, f"{options.answers.stem}, strength {strength}", options.beams)
                options.answers.write_text(json.dumps(said, ensure_ascii=False, indent=1), encoding="utf-8")
        measured = run | {"strength": strength, "losses": losses, "seconds": round(time.time() - started)}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measured) + "\n")
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
