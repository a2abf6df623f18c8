"""Turns the pre-trained model into a plain small assistant, without losing the language it learned.

`python chat_tune.py PRETRAINED CHAT_FOLDER OUTPUT`. Reads our question-and-answer pairs (`*.jsonl`), the short
public dialogues that pre-training passes on, and its replay rows; writes the final model and `chat_tune.json`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import training
from corpus import Messages
from training import IGNORED, say

LENGTH = 256
CHAT_ROWS = 64
DECAY = 0.05
#: Share of our pairs whose wording is kept out, to see whether the answers carry over to new wordings.
HELDOUT_SHARE = 0.05
#: A base that obeyed a role prompt would leave LoRA nothing to show, so some prompts ask for a role in vain.
SYSTEM_PROMPTS = (
    "你是一个乐于助人的助手。",
    "你是一个小小的教学模型。",
    "请简短地回答用户的问题。",
    "你是一个友好的人工智能助手，请用中文回答。",
    "现在你要扮演一位古代的公主。",
    "你是孙悟空，请用他的口吻说话。",
    "请扮演一位宫里的妃子。",
    "现在你要扮演林黛玉。",
    "你是一位古代的大将军，请以他的身份回答。",
    "现在你要扮演皇上身边的一位女子。",
)


def read_pairs(folder: Path) -> list[dict[str, str]]:
    """Every row of the `*.jsonl` files: `cluster`, `question`, `answer`."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def hold_out(pairs: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out pairs; a cluster gives up one wording at most, so its fact stays in training."""
    rng = random.Random(0)
    clusters: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        clusters.setdefault(pair["cluster"], []).append(index)
    chosen = [rng.choice(indices) for indices in clusters.values() if len(indices) >= 4]
    heldout = set(rng.sample(chosen, min(int(len(pairs) * HELDOUT_SHARE), len(chosen))))
    return [p for i, p in enumerate(pairs) if i not in heldout], [pairs[i] for i in sorted(heldout)]


def encode(tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation: every answer is trained on, and the `<|user|>` that ends it."""
    ids: list[int] = []
    labels: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"][len(ids) :]
        written = "\n" + ("<think></think>\n" if thinking else "") + message["content"].strip()
        answer = tokenizer(written, add_special_tokens=False)["input_ids"]
        # What follows an earlier answer is the <|user|> that ended it, so that token is trained on.
        labels += ([head[0]] if ids else [IGNORED]) + [IGNORED] * (len(head) - 1) + answer
        ids += head + answer
    terminator = tokenizer.convert_tokens_to_ids("<|user|>")
    ids.append(terminator)
    labels.append(terminator)
    return ids[:LENGTH], labels[:LENGTH]


def conversations(pairs: list[dict[str, str]], public: list[Messages], rng: random.Random) -> Iterator[Messages]:
    """Our pairs alone or two in a row, with or without a system prompt; one in ten is a public dialogue."""
    while True:
        for pair in rng.sample(pairs, len(pairs)):
            if rng.random() < 0.1:
                yield rng.choice(public)
                continue
            messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.5 else []
            for part in [rng.choice(pairs), pair] if rng.random() < 0.2 else [pair]:
                messages.append({"role": "user", "content": part["question"]})
                messages.append({"role": "assistant", "content": part["answer"]})
            yield messages


def pad(rows: list[tuple[list[int], list[int]]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and left-shifted labels, both (rows, LENGTH), padded on the right."""
    tokens = torch.full((len(rows), LENGTH), filler)
    labels = torch.full((len(rows), LENGTH), IGNORED)
    for row, (ids, targets) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids) - 1] = torch.tensor(targets[1:])
    return tokens, labels


@torch.no_grad()
def answers(folder: Path, questions: list[str], system: str | None = None) -> list[tuple[str, bool]]:
    """Greedy answers of a saved model by the library's own forward, each with whether it ended by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    result = []
    head = [{"role": "system", "content": system}] if system else []
    for start in range(0, len(questions), 64):
        prompts = [
            tokenizer.apply_chat_template(
                [*head, {"role": "user", "content": q}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for q in questions[start : start + 64]
        ]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for row in output:
            ended = any(int(t) in model.generation_config.eos_token_id for t in row)
            result.append((tokenizer.decode(row, skip_special_tokens=True).strip(), ended))
    return result


def main() -> None:
    """Run the chat tuning, measure it, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pretrained", type=Path)
    parser.add_argument("chat", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=380)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--replay", type=int, default=32, help="rows of pre-training text a step; each is seen once")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    rng = random.Random(0)

    tokenizer = AutoTokenizer.from_pretrained(options.pretrained)
    model = AutoModelForCausalLM.from_pretrained(options.pretrained, dtype=torch.float32).to(device)
    training.prepare(model)
    loss_of = torch.compile(training.summed_loss, dynamic=False) if device == "cuda" else training.summed_loss
    pairs, heldout_pairs = hold_out(read_pairs(options.chat))
    held = json.loads((options.pretrained / "heldout.json").read_text(encoding="utf-8"))
    public = held["public_chats"]
    replay = np.load(options.pretrained / "replay.npy")
    as_messages = [
        [{"role": "user", "content": p["question"]}, {"role": "assistant", "content": p["answer"]}]
        for p in heldout_pairs
    ]

    @torch.no_grad()
    def pair_loss() -> float:
        """Nats a token on the answers to held-out wordings."""
        total = count = 0.0
        for start in range(0, len(as_messages), CHAT_ROWS):
            part = [encode(tokenizer, m, thinking=False) for m in as_messages[start : start + CHAT_ROWS]]
            tokens, labels = pad(part, tokenizer.pad_token_id)
            total += training.summed_loss(model, tokens.to(device), labels.to(device)).item()
            count += (labels != IGNORED).sum().item()
        return total / count

    stream = conversations(pairs, public, rng)
    optimizer = training.optimizer(model, options.rate, DECAY)
    curve = [{"step": 0, "heldout_pairs": pair_loss()}]
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.rate * training.cosine(step / options.steps, 0.05, 0.0)
        rows = [encode(tokenizer, next(stream), thinking=rng.random() < 0.3) for _ in range(CHAT_ROWS)]
        tokens, labels = pad(rows, tokenizer.pad_token_id)
        loss = loss_of(model, tokens.to(device), labels.to(device)) / (labels != IGNORED).sum()
        loss.backward()
        first = (step - 1) * options.replay % (len(replay) - options.replay + 1)
        tokens = torch.from_numpy(replay[first : first + options.replay].astype(np.int64)).to(device)
        again = loss_of(model, tokens, training.shift(tokens)) / tokens.numel()
        again.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == options.steps:
            curve.append({"step": step, "chat": loss.item(), "replay": again.item(), "heldout_pairs": pair_loss()})
            say(curve[-1])
    model.eval()
    training.expert_entropy(model)
    texts = {
        name: training.nats_per_character(lambda x, y: training.summed_loss(model, x, y), tokenizer, t, device)
        for name, t in held["texts"].items()
    }
    entropy = training.expert_entropy(model)
    options.output.mkdir(parents=True, exist_ok=True)
    training.save(model, tokenizer, str(options.output))
    questions = [p["question"] for p in heldout_pairs]
    given = answers(options.output, questions)
    report = {
        "pairs": len(pairs),
        "heldout_pairs": len(heldout_pairs),
        "public_dialogues": len(public),
        "steps": options.steps,
        "rate": options.rate,
        "replay_rows_a_step": options.replay,
        "curve": curve,
        "heldout_nats_per_character": texts,
        "heldout_expert_entropy": entropy,
        "stops_by_itself": sum(ended for _, ended in given) / len(given),
        "answers": [[q, a, ended] for q, (a, ended) in zip(questions, given, strict=True)],
    }
    (options.output / "chat_tune.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    say(texts, "entropy", entropy, "stops", report["stops_by_itself"])


if __name__ == "__main__":
    main()
