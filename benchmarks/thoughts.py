"""Does the persona still think? Notebook 05's training with and without the base's own thoughts mixed in.

    python benchmarks/thoughts.py --thoughts 0 300       train with none and with 300 such samples
    python benchmarks/thoughts.py --table                the table of what `benchmarks/thoughts.jsonl` holds

Each run is a run of `benchmarks/sweep.py` (alpha 32, 4e-3). The samples that are mixed in are questions of
everyday life from the text of the bundled model, with the thought and the answer that the base itself gives to them:
they teach nothing new, they keep what is there. Measured with thinking on, before and after: the share of answers with
a thought and its mean length in characters, on the 60 questions of `dataset/ordinary_questions.json` without a system
prompt and on the 60 of `dataset/heldout_situations.json` with hers; and the loss on new wordings, which says whether
the persona learns as much.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sweep

import utils
from course.model_folder import model_folder

RESULTS = sweep.ROOT / "benchmarks" / "thoughts.jsonl"
QUESTIONS = sweep.ROOT / "models" / "recipe" / "chat" / "life.jsonl"
SETS = ("ordinary", "situations")


def prompts(tokenizer: Any, questions: list[str], system: str | None = None) -> list[list[int]]:
    """Token ids that ask each question with thinking on."""
    opening = [{"role": "system", "content": system}] if system else []
    turns = [[*opening, {"role": "user", "content": question}] for question in questions]
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    return [utils.encode(tokenizer, tokenizer.apply_chat_template(one, **how)) for one in turns]


@torch.no_grad()
def replies(model: Any, tokenizer: Any, asked: list[list[int]]) -> list[list[int]]:
    """The greedy reply to each prompt up to the token that ends it; without one, as far as it was generated."""
    ends, found = set(model.generation_config.eos_token_id), []
    for start in range(0, len(asked), 60):
        batch = {"input_ids": asked[start : start + 60]}
        inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for ids in out.tolist():
            stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            found.append(ids[:stop])
    return found


def thought(tokenizer: Any, reply: list[int]) -> str:
    """What a server takes for the thought: the text before the token `</think>`, "" without one."""
    closed = tokenizer.convert_tokens_to_ids("</think>")
    before = reply[: reply.index(closed)] if closed in reply else []
    return str(tokenizer.decode(before)).replace("<think>", "").strip()


def measured(model: Any, tokenizer: Any, system: str) -> dict[str, list[float]]:
    """Share of replies with a thought and mean length of a thought, for each set."""
    ordinary = json.loads((sweep.ROOT / "dataset" / "ordinary_questions.json").read_text(encoding="utf-8"))
    situations = json.loads((sweep.ROOT / "dataset" / "heldout_situations.json").read_text(encoding="utf-8"))
    asked = (prompts(tokenizer, ordinary), prompts(tokenizer, [row["instruction"] for row in situations], system))
    shares = {}
    for name, ids in zip(SETS, asked, strict=True):
        found = [thought(tokenizer, reply) for reply in replies(model, tokenizer, ids)]
        written = [one for one in found if one]
        shares[name] = [len(written) / len(found), sum(map(len, written)) / max(1, len(written))]
    return shares


def own_thoughts(model: Any, tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """Samples of the base's own replies with a thought, to everyday questions drawn with a fixed seed."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    questions = sorted({json.loads(line)["question"] for line in lines})
    random.Random(0).shuffle(questions)
    asked, ends = prompts(tokenizer, questions[: 2 * count]), set(model.generation_config.eos_token_id)
    pairs = zip(asked, replies(model, tokenizer, asked), strict=True)
    good = [(ask, reply) for ask, reply in pairs if reply[-1] in ends and thought(tokenizer, reply)]
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    samples = [(ask, [*reply[:-1], end]) for ask, reply in good[:count]]
    return [{"input_ids": ask + reply, "labels": [-100] * len(ask) + reply} for ask, reply in samples]


def one_run(count: int, seed: int = 1) -> dict[str, Any]:
    """Train with so many of the base's thoughts mixed in; measure before and after."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    course = utils.start()
    folder = model_folder(course)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = sweep.samples_of(course, tokenizer)
    system = json.loads((course.output / "tokens" / "prompt.json").read_text(encoding="utf-8"))["system"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    before = measured(base, tokenizer, system)
    mixed = own_thoughts(base, tokenizer, count)
    model, steps = sweep.trained([*parts["train"], *mixed], 32, 4e-3, seed)
    loss = sweep.mean_loss(model, parts["new_wordings"], tokenizer.pad_token_id)
    made = {"thoughts": len(mixed), "seed": seed, "steps": steps, "new_wordings": round(loss, 4)}
    return made | {"before": before, "after": measured(model, tokenizer, system)} | sweep.where_run()


def table(lines: list[dict[str, Any]]) -> None:
    """One row for the base and one for each run."""
    rows = [("base", "-", lines[0]["before"])] if lines else []
    rows += [(f"{line['thoughts']} samples", f"{line['new_wordings']:.2f}", line["after"]) for line in lines]
    shown = [
        (name, *(f"{found[kind][0]:.0%}, {found[kind][1]:.0f} characters" for kind in SETS), loss)
        for name, loss, found in rows
    ]
    utils.table(shown, ("thoughts mixed in", "ordinary questions", "her situations", "loss on new wordings"))


def main() -> int:
    """Run what is asked for, or print the table."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--thoughts", type=int, nargs="+", default=[0, 300])
    parse.add_argument("--results", type=Path, default=RESULTS)
    parse.add_argument("--table", action="store_true")
    chosen = parse.parse_args()
    for count in [] if chosen.table else chosen.thoughts:
        line = json.dumps(one_run(count))
        with chosen.results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    text = chosen.results.read_text(encoding="utf-8") if chosen.results.is_file() else ""
    table([json.loads(line) for line in text.splitlines()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
