"""Turns the pre-trained model into a plain small assistant, without losing the language it learned.

`python chat_tune.py PRETRAINED CHAT_FOLDER HELDOUT_FOLDER OUTPUT`. Reads our conversations (`samples.sources`), the
short public dialogues that pre-training passes on, and its replay rows; writes the final model, `chat_tune.json`, and
`answers.json`, the answers to questions that are in no training text, for readers to judge.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dialogue
import numpy as np
import torch
from samples import IGNORED, PERSONA, Row, Sample, drawn, encoded, openings, sources
from transformers import AutoModelForCausalLM, AutoTokenizer

import training
from training import SEQUENCE, say

LENGTH = 128  # longer conversations, nearly all of them with tools, go into rows of SEQUENCE tokens
CHAT_ROWS, LONG_ROWS = 256, 4
DECAY = 0.1
#: One conversation in so many of each source is kept out, to stop by: another wording, another person, other numbers.
HELDOUT_EVERY = 50
#: System prompt of notebook 04, under which the persona's held-out questions are asked.
PERSONA_PROMPT = "现在你要扮演甄嬛，皇上身边的一位妃子。"


def hold_out(found: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """Take one conversation in `HELDOUT_EVERY`, drawn at random, out of each source, and return those."""
    rng, heldout = random.Random(0), {}
    for name, samples in found.items():
        chosen = set(rng.sample(range(len(samples)), len(samples) // HELDOUT_EVERY))
        heldout[name] = [sample for place, sample in enumerate(samples) if place in chosen]
        found[name] = [sample for place, sample in enumerate(samples) if place not in chosen]
    return heldout


def pad(rows: list[Row], filler: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and left-shifted labels, both (rows, length), padded on the right or cut."""
    tokens = np.full((len(rows), length), filler)
    labels = np.full((len(rows), length), IGNORED)
    for place, row in enumerate(rows):
        ids, targets = row.ids[:length], row.labels[1 : length + 1]
        tokens[place, : len(ids)] = ids
        labels[place, : len(targets)] = targets
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def batches(
    rows: dict[str, list[Row]], turns: list[np.ndarray], filler: int, replay: np.ndarray, replay_rows: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """What each step reads: short conversations, and rows of conversations with tools and of pre-training text.

    Yields tokens and labels of (`CHAT_ROWS`, `LENGTH`), then tokens and labels of (`LONG_ROWS` + `replay_rows`,
    `SEQUENCE`).
    """
    stream, long = drawn(rows, turns, random.Random(0)), []
    for part in itertools.cycle(np.array_split(replay, len(replay) // replay_rows)):
        short: list[Row] = []
        while len(short) < CHAT_ROWS:
            row = next(stream)
            if len(row.ids) <= LENGTH:
                short.append(row)
            elif len(long) < 4 * LONG_ROWS:
                long.append(row)
        chosen, long = long[:LONG_ROWS], long[LONG_ROWS:]
        tokens = torch.full((LONG_ROWS, SEQUENCE), filler)
        labels = torch.full((LONG_ROWS, SEQUENCE), IGNORED)
        tokens[: len(chosen)], labels[: len(chosen)] = pad(chosen, filler, SEQUENCE)
        text = torch.from_numpy(part[:replay_rows].astype(np.int64))
        both = torch.cat([tokens, text]), torch.cat([labels, training.shift(text)])
        yield *pad(short, filler, LENGTH), *both


def messages_of(path: Path) -> list[list[dict[str, Any]]]:
    """The conversations of a held-out file."""
    rng = random.Random(0)
    return [next(dialogue.conversations(talk, rng)) for talk in dialogue.read(path)]


def reference_rows(tokenizer: Any, folder: Path) -> dict[str, list[Row]]:
    """The held-out conversations with the answers of their writer, who saw no training text, by file."""
    system = {"role": "system", "content": PERSONA_PROMPT}
    found = {
        path.stem: [Sample([system, *talk] if path.stem in PERSONA else talk) for talk in messages_of(path)]
        for path in sorted(folder.glob("*.txt"))
    }
    return encoded(tokenizer, found)


@torch.no_grad()
def written(
    folder: Path, asked: list[list[dict[str, Any]]], thinking: bool = False, longest: int = 96
) -> list[tuple[str, bool]]:
    """Greedy answers of a saved model by the library's own forward, each with whether it ended by itself.

    Args:
        asked: messages that end with a user's turn.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    result = []
    for start in range(0, len(asked), 64):
        prompts = [
            tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
            for one in asked[start : start + 64]
        ]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
        output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for row in output:
            ended = any(int(token) in model.generation_config.eos_token_id for token in row)
            text = tokenizer.decode([t for t in row if int(t) not in model.generation_config.eos_token_id])
            result.append((text.strip(), ended))
    return result


def answer_heldout(folder: Path, heldout: Path) -> list[dict[str, Any]]:
    """The model's answers to every held-out file: the last user's turn, after the answers that the file gives.

    The rows have the form that `tools/judging.py` reads.
    """
    rows: list[dict[str, Any]] = []
    for name in ("everyday", "everyday_turns", "system_persons", "thinking"):
        talks = messages_of(heldout / f"{name}.txt")
        asked = [[m for m in talk[:-1] if m.get("content")] for talk in talks]
        answers = written(folder, asked, thinking=name == "thinking")
        new = [
            {"set": name, "author": "assistant", "asked": one, "reference": talk[-1], "answer": said, "ended": ended}
            for one, talk, (said, ended) in zip(asked, talks, answers, strict=True)
        ]
        say(name, "ended by itself", sum(row["ended"] for row in new), "of", len(new))
        rows += new
    return rows


def losses_by_source(model: Any, heldout: dict[str, list[Row]]) -> dict[str, float]:
    """Nats a token on what the held-out conversations of each source teach."""
    result, was_training, device = {}, model.training, model.device
    model.eval()
    for name, rows in heldout.items():
        total = count = 0.0
        with torch.no_grad():
            for start in range(0, len(rows), 256):
                part = rows[start : start + 256]
                tokens, labels = pad(part, model.config.pad_token_id, min(max(len(row.ids) for row in part), SEQUENCE))
                total += training.summed_loss(model, tokens.to(device), labels.to(device)).item()
                count += (labels != IGNORED).sum().item()
        result[name] = round(total / max(count, 1), 4)
    model.train(was_training)
    return result


def tune(
    model: Any, steps: Iterator[tuple[torch.Tensor, ...]], heldout: dict[str, list[Row]], options: Any
) -> Iterator[dict[str, Any]]:
    """Train in place; yields a point of the curve now and then."""
    device = model.device.type
    loss_of = torch.compile(training.summed_loss, dynamic=False) if device == "cuda" else training.summed_loss
    optimizer = training.optimizer(model, options.rate, DECAY)
    for step, (tokens, labels, long_tokens, long_labels) in enumerate(steps, start=1):
        for group in optimizer.param_groups:
            group["lr"] = options.rate * training.cosine(step / options.steps, 0.05, 0.0)
        loss = loss_of(model, tokens.to(device), labels.to(device)) / (labels != IGNORED).sum()
        loss.backward()
        again = loss_of(model, long_tokens.to(device), long_labels.to(device)) / (long_labels != IGNORED).sum()
        (options.replay_weight * again).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(options.steps // 6, 1) == 0 or step == options.steps:
            point = {"step": step, "chat": loss.item(), "rows": again.item()}
            point["heldout"] = losses_by_source(model, heldout)
            say(point)
            yield point
        if step == options.steps:
            return


def main() -> None:
    """Run the chat tuning, measure it, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pretrained", type=Path)
    parser.add_argument("chat", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--replay", type=int, default=16, help="rows of pre-training text a step, read round and round")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--replay-weight", type=float, default=1.0)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    tokenizer = AutoTokenizer.from_pretrained(options.pretrained)
    model = AutoModelForCausalLM.from_pretrained(options.pretrained, dtype=torch.float32).to(device)
    training.prepare(model.train())
    training.add_dropout(model, options.dropout)
    found = sources(options.chat, options.heldout)
    counts = {name: len(samples) for name, samples in found.items()}
    held = json.loads((options.pretrained / "heldout.json").read_text(encoding="utf-8"))
    heldout = encoded(tokenizer, hold_out(found))
    found["public"] = [Sample(messages) for messages in held["public_chats"]]
    replay = np.load(options.pretrained / "replay.npy")
    say("conversations", counts)
    steps = batches(encoded(tokenizer, found), openings(tokenizer), tokenizer.pad_token_id, replay, options.replay)
    curve = [{"step": 0, "heldout": losses_by_source(model, heldout)}]
    curve += tune(model, steps, heldout, options)
    model.eval()
    references = losses_by_source(model, reference_rows(tokenizer, options.heldout))
    training.expert_entropy(model)
    texts = {name: training.nats_per_character(model, tokenizer, texts) for name, texts in held["texts"].items()}
    entropy = training.expert_entropy(model)
    options.output.mkdir(parents=True, exist_ok=True)
    training.save(model, tokenizer, str(options.output))
    answers = answer_heldout(options.output, options.heldout)
    ended = [row["ended"] for row in answers]
    report = {
        "conversations": counts | {"public": len(found["public"])},
        "kept_out": {name: len(samples) for name, samples in heldout.items()},
        "steps": options.steps,
        "rate": options.rate,
        "dropout": options.dropout,
        "replay_rows_a_step": options.replay,
        "curve": curve,
        "heldout_references": references,
        "heldout_nats_per_character": texts,
        "heldout_expert_entropy": entropy,
        "stops_by_itself": sum(ended) / len(ended),
    }
    for name, value in {"chat_tune": report, "answers": answers}.items():
        path = options.output / f"{name}.json"
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    say(texts, "entropy", entropy, "stops", report["stops_by_itself"])


if __name__ == "__main__":
    main()
