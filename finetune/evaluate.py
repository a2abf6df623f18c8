"""What notebook 06 measures, from the command line: base and adapter on questions that were never trained on.

Three conditions, as there: the base without a system prompt (on two of the sets), the base and the adapter with it.
The weights may be bf16 or 4-bit. Answers are greedy, and asked in batches; the loss is that of the reference answers.
Whether an answer is in role is left to notebook 06, whose list of words is this persona's, and to readers: all answers
are in the file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import utils
from course.language import marked, say, translated
from course.model_folder import trained_folder
from course.rows import Conversation, load_rows
from finetune.adapter_folder import WEIGHTS
from finetune.chat import Persona
from finetune.config import is_small
from finetune.decode import ending_tokens

LONGEST = 64  # tokens of an answer, as in notebook 06
BATCH = 32  # questions that are asked at once
FILE = "evaluation.json"
#: What notebook 06 calls each condition, by its key in the file.
CONDITIONS = {"no_prompt": marked("no prompt"), "base": marked("prompt only"), "adapter": "LoRA"}
WITHOUT_PROMPT = ("new wordings", "situations")  # the sets that are asked without a system prompt too


@dataclass(frozen=True)
class Figures:
    """One model on one set: nats a token of the reference answers, and shares of the answers that it gave.

    Attributes:
        loss: mean over all tokens of the reference answers, the token that ends each included.
        stops: share of answers that end by themselves. equal: share that are the reference, letter for letter.
    """

    loss: float
    stops: float
    equal: float


def held_out(course: utils.Settings, most: int) -> dict[str, list[Conversation]]:
    """The sets of notebook 06, at most so many rows of each; with data of your own, its two validation sets.

    Raises:
        CourseError: notebook 03 has not run, or a file has bad rows.
    """
    own = utils.require(course.output / "rows", "03_dataset", course)
    files = {"new wordings": own / "new_wordings.json", "new answers": own / "new_answers.json"}
    if course.default_data:
        dataset = utils.ROOT / "dataset"
        files |= {"new wordings": dataset / "heldout.json", "situations": dataset / "heldout_situations.json"}
        files |= {"conversations": dataset / "heldout_conversations.jsonl"}
    sets = {name: load_rows(path) for name, path in files.items() if path.is_file()}
    talks = sets.pop("conversations", [])
    for name, length in (("second turns", 4), ("third turns", 6)) if talks else ():
        sets[name] = [row for row in talks if len(row["messages"]) == length]
    return {name: rows[:most] for name, rows in sets.items()}


def ask(persona: Persona, rows: list[Conversation], prompted: bool = True) -> list[tuple[str, bool]]:
    """The greedy answer to each conversation's last question, and whether it ended by itself."""
    ends, found = ending_tokens(persona.model), []
    for start in range(0, len(rows), BATCH):
        prompts = [persona.prompt_ids(row["messages"][:-1], prompted) for row in rows[start : start + BATCH]]
        padded = persona.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        padded = padded.to(persona.model.device)
        with torch.no_grad():
            output = persona.model.generate(**padded, max_new_tokens=LONGEST, do_sample=False)
        for tokens in output[:, padded["input_ids"].shape[1] :]:
            text = persona.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            found.append((text, bool(ends & set(tokens.tolist()))))
    return found


@torch.no_grad()
def reference_loss(persona: Persona, rows: list[Conversation], prompted: bool = True) -> float:
    """Nats a token of the reference answers; logits are computed for their tokens only."""
    total, count, tokenizer = 0.0, 0, persona.tokenizer
    for row in rows:
        prompt = persona.prompt_ids(row["messages"][:-1], prompted)
        text = utils.as_text(tokenizer, row["messages"][-1]["content"].strip())
        reference = [*utils.encode(tokenizer, "\n" + text), tokenizer.convert_tokens_to_ids("<|user|>")]
        ids = torch.tensor([[*prompt, *reference]], device=persona.model.device)
        logits = persona.model(input_ids=ids, logits_to_keep=len(reference) + 1, use_cache=False).logits
        total += F.cross_entropy(logits[0, :-1].float(), ids[0, len(prompt) :], reduction="sum").item()
        count += len(reference)
    return total / count


def measure(persona: Persona, rows: list[Conversation], condition: str) -> tuple[Figures, list[str]]:
    """Figures of one condition on one set, and its answers."""
    prompted = condition != "no_prompt"
    with nullcontext() if condition == "adapter" else persona.model.disable_adapter():
        said, loss = ask(persona, rows, prompted), reference_loss(persona, rows, prompted)
    equal = [text == row["messages"][-1]["content"].strip() for (text, _), row in zip(said, rows, strict=True)]
    stops = sum(stopped for _, stopped in said) / len(rows)
    return Figures(loss, stops, sum(equal) / len(rows)), [text for text, _ in said]


def evaluate(load_in_4bit: bool = False, most: int | None = None, adapter: str = "") -> Path:
    """Measure base and adapter on every set, print a table, and write figures and answers to `evaluation.json`.

    In the file, `base` and `adapter` are with the persona's prompt, and `no_prompt` is the base without one.

    Args:
        most: rows of a set; None for 96 of a small model and 32 of a large one, as in notebook 06.
        adapter: the folder of another training than notebook 05's; its file is called after it, as
            `evaluation-huanhuan-lora.json`, and the learner's own stays.

    Raises:
        CourseError: no trained adapter, or something of an earlier notebook is missing.
    """
    course = utils.settings()
    target, trained = course.output / FILE, trained_folder(course, adapter)
    if adapter:
        target = target.with_stem(f"{target.stem}-{trained.resolve().name}")
    with utils.writing(target):  # before minutes or hours of measuring
        course.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=course.output).close()
    persona = Persona(load_in_4bit, adapter=adapter)
    sets = held_out(course, most or (96 if is_small(persona.model.config) else 32))
    found: dict[str, Any] = {}
    for name, rows in sets.items():
        asked = [one for one in CONDITIONS if one != "no_prompt" or name in WITHOUT_PROMPT]
        measured = {one: measure(persona, rows, one) for one in asked}
        found[name] = {"rows": len(rows), **{one: asdict(figures) for one, (figures, _) in measured.items()}}
        found[name]["answers"] = [
            {
                "asked": row["messages"][:-1],
                "reference": row["messages"][-1]["content"],
                **{one: texts[i] for one, (_, texts) in measured.items()},
            }
            for i, row in enumerate(rows)
        ]
        conditions = ", ".join(translated(CONDITIONS[one]) for one in asked)
        told = say("{name}: {count} questions asked ({conditions})", name=name, count=len(rows), conditions=conditions)
        print(told, flush=True)
    lines = [
        (name, translated(shown), f"{one[key]['loss']:.2f}", f"{one[key]['stops']:.0%}", f"{one[key]['equal']:.0%}")
        for name, one in found.items()
        for key, shown in CONDITIONS.items()
        if key in one
    ]
    head = ("", "", say("loss, nats a token"), say("stops by itself"), say("equals the reference"))
    utils.table(lines, head)
    facts = {"model": utils.shown(course.model), "load_in_4bit": load_in_4bit, "sets": found}
    if adapter:
        weights = hashlib.sha256((trained / "adapter" / WEIGHTS).read_bytes()).hexdigest()
        facts |= {"trained": utils.shown(Path(adapter)), "weights_sha256": weights}
        _keep_another(target, weights)
    with utils.writing(target):
        utils.write_whole(target, json.dumps(facts, ensure_ascii=False, indent=1))
    print(say("figures and answers in {file}", file=utils.shown(target)))
    return target


def _keep_another(target: Path, weights: str) -> None:
    """Keep the figures of another adapter whose folder has the same name, as `NAME-previous.json`, and say so."""
    try:
        found = json.loads(target.read_text(encoding="utf-8")).get("weights_sha256")
    except (OSError, ValueError, AttributeError):
        return
    if found not in (None, weights):
        kept = target.with_stem(f"{target.stem}-previous")
        target.replace(kept)
        print(say("the figures of another adapter are kept in {file}", file=utils.shown(kept)))
