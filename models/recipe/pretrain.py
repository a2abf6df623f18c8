"""Pre-trains the bundled model on plain text, novel dialogue and our own conversations.

`python pretrain.py CORPUS TOKENIZER_FOLDER CHAT_FOLDER HELDOUT_FOLDER OUTPUT [--steps N]`. Writes the weights,
`replay.npy` (rows that chat tuning mixes in), `heldout.json` (held-out texts, and short public dialogues for chat
tuning) and `pretrain.json` (sizes, curve, held-out losses).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chat_tune import hold_out
from samples import render, sources
from transformers import AutoTokenizer, Glm4MoeForCausalLM, PreTrainedTokenizerBase

import corpus
import training
from training import SEQUENCE, say

#: How often a group is read in one epoch; modern text is scarce, poems are plentiful.
WEIGHTS = {"novel": 1.0, "poem": 0.4, "modern": 2.0, "speech": 0.6, "chat": 1.0, "reading": 0.3, "own": 1.0}
PEAK_RATE, WARM_SHARE, DECAY = 2e-3, 0.02, 0.1


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, in batches."""
    result: list[np.ndarray] = []
    for start in range(0, len(texts), 20_000):
        batch = tokenizer(texts[start : start + 20_000], add_special_tokens=False, verbose=False)["input_ids"]
        result += [np.array(ids, dtype=np.uint16) for ids in batch]
    return result


def rows(groups: dict[str, list[np.ndarray]], rng: random.Random) -> np.ndarray:
    """One epoch: weighted, shuffled documents cut into rows of `SEQUENCE` tokens, shuffled again."""
    chosen: list[np.ndarray] = []
    for name, texts in groups.items():
        weight = WEIGHTS[name]
        chosen += texts * int(weight) + rng.sample(texts, int(len(texts) * (weight % 1)))
    rng.shuffle(chosen)
    tokens = np.concatenate(chosen)[rng.randrange(SEQUENCE) :]
    table = tokens[: len(tokens) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)
    return table[np.random.default_rng(rng.randrange(2**31)).permutation(len(table))]


def batches(groups: dict[str, list[np.ndarray]], size: int, device: str) -> Iterator[torch.Tensor]:
    """Batches of token rows without end."""
    rng = random.Random(0)
    while True:
        epoch = rows(groups, rng)
        for start in range(0, len(epoch) - size + 1, size):
            yield torch.from_numpy(epoch[start : start + size].astype(np.int64)).to(device)


def read_options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("chat", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--own", type=float, default=1.0, help="how often our own conversations are read in an epoch")
    parser.add_argument("--modern", type=float, default=1.5, help="how often modern prose is read in an epoch")
    parser.add_argument("--floor", type=float, default=1.0, help="share of the rate at the end; 1 leaves it constant")
    return parser.parse_args()


def texts_by_group(options: argparse.Namespace, data: Any, tokenizer: Any) -> dict[str, list[str]]:
    """Every text to train on, by the name of its group; conversations are rendered by the chat template."""
    prose = [path.read_text(encoding="utf-8") for path in sorted((options.chat.parent / "prose").glob("*.txt"))]
    data.train["modern"] += [piece for text in prose for piece in text.split("\n\n") if piece.strip()]
    plain = {name: [text + "<|endoftext|>" for text in texts] for name, texts in data.train.items()}
    talks = {
        name: [tokenizer.apply_chat_template(c, tokenize=False) + "<|user|>" for c in conversations]
        for name, conversations in data.train_chats.items()
    }
    found = sources(options.chat, options.heldout)
    hold_out(found)
    talks["own"] = [render(tokenizer, sample) for samples in found.values() for sample in samples]
    return plain | talks


def train(
    model: Any,
    groups: dict[str, Any],
    options: argparse.Namespace,
    device: str,
    measured: Callable[[], dict[str, float]],
) -> list[dict[str, float]]:
    """Train the model in place.

    Args:
        groups: tokens of each group's texts. measured: the held-out figures, asked for eight times in a run.

    Returns:
        The curve: loss and tokens read at 40 steps, held-out figures at eight of them.
    """
    loss_of = torch.compile(training.summed_loss, dynamic=False) if device == "cuda" else training.summed_loss
    counts = [torch.zeros_like(block.experts.load) for block in training.moe_blocks(model)]
    optimizer = training.optimizer(model, PEAK_RATE, DECAY)
    curve, started = [], time.time()
    for step, tokens in enumerate(batches(groups, options.batch, device), start=1):
        done = step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * training.cosine(done, WARM_SHARE, options.floor)
        loss = loss_of(model, tokens, training.shift(tokens)) / (tokens.shape[0] * (SEQUENCE - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        training.balance(model, 1e-3 if done < 0.9 else 1e-4, counts)
        if step in (1, 20) or step % max(options.steps // 40, 1) == 0:
            entropy = training.expert_entropy(model)
            for count in counts:
                count.zero_()
            seconds = time.time() - started
            point = {"step": step, "tokens": step * tokens.numel(), "seconds": round(seconds, 1), "loss": loss.item()}
            say(point, "least even layer", min(entropy))
            if step % max(options.steps // 8, 1) == 0:
                point |= (figures := measured())
                say("held out", figures)
                training.expert_entropy(model)
            curve.append(point)
        if step == options.steps:
            break
    return curve


def main() -> None:
    """Run the whole pre-training and write its results."""
    options = read_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    WEIGHTS.update(own=options.own, modern=options.modern)
    data = corpus.load(options.corpus)
    texts = texts_by_group(options, data, tokenizer)
    groups = {name: encode(tokenizer, one) for name, one in texts.items()}
    sizes = {
        name: {"documents": len(one), "characters": sum(map(len, one)), "tokens": sum(map(len, groups[name]))}
        for name, one in texts.items()
    }
    say("groups", sizes)

    model = training.prepare(Glm4MoeForCausalLM(training.small_config(tokenizer)).to(device))
    training.add_dropout(model, options.dropout)
    parameters = sum(p.numel() for p in model.parameters())
    say("parameters", parameters, "tokens a step", options.batch * SEQUENCE)

    def held_out(*names: str) -> dict[str, float]:
        return {name: training.nats_per_character(model, tokenizer, data.heldout[name]) for name in names}

    def on_the_way() -> dict[str, float]:
        return {f"heldout_{name}": nats for name, nats in held_out("novel", "modern").items()}

    started = time.time()
    curve = train(model, groups, options, device, on_the_way)
    training.expert_entropy(model)
    report = {
        "parameters": parameters,
        "groups": sizes,
        "dropout": options.dropout,
        "floor": options.floor,
        "weights": WEIGHTS,
        "tokens": options.steps * options.batch * SEQUENCE,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "curve": curve,
        "heldout_nats_per_character": held_out(*data.heldout),
        "heldout_expert_entropy": training.expert_entropy(model),
        "seconds": round(time.time() - started, 1),
    }
    say(report["heldout_nats_per_character"], report["heldout_expert_entropy"])
    options.output.mkdir(parents=True, exist_ok=True)
    training.save(model, tokenizer, str(options.output))
    others = {name: tokens for name, tokens in groups.items() if name != "own"}  # those come as conversations
    np.save(options.output / "replay.npy", rows(others, random.Random(1)))
    held = {"texts": data.heldout, "public_chats": data.short_chats}
    (options.output / "heldout.json").write_text(json.dumps(held, ensure_ascii=False), encoding="utf-8")
    (options.output / "pretrain.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    say("saved", options.output)


if __name__ == "__main__":
    main()
