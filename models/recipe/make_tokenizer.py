"""Trains the byte-level BPE tokenizer of the bundled model.

`python make_tokenizer.py CORPUS CHAT_FOLDER HELDOUT_FOLDER CHAT_TEMPLATE OUTPUT`. Knows which tokens GLM-4.5-Air adds
and in which order.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from samples import sources
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import corpus

VOCABULARY = 8192
#: The 36 tokens that GLM-4.5-Air adds, in its order. Those in `NOT_SPECIAL` stay in decoded text.
ADDED = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|begin_of_audio|> <|end_of_audio|> "
    "<|begin_of_transcription|> <|end_of_transcription|> <|code_prefix|> <|code_middle|> <|code_suffix|> "
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> </arg_key> "
    "<arg_value> </arg_value> /nothink <|begin_of_box|> <|end_of_box|> <|image|> <|video|>"
).split()
NOT_SPECIAL = set(ADDED[ADDED.index("<think>") : ADDED.index("/nothink")])
#: Runs of Chinese characters, Latin words, single digits, punctuation and white space are merged apart.
PIECES = Regex(r"\p{Han}+|[A-Za-z]+| ?\p{N}|\p{P}|\n+|\s+|[^\s\p{Han}\p{P}\p{N}A-Za-z]+")
#: Share of the lines of a group that the trainer sees; modern text is seen twice, it is scarce.
SHARES = {"novel": 0.25, "poem": 0.08, "modern": 2.0}


def conversation_lines(chat: Path, heldout: Path) -> Iterator[str]:
    """Every message of our own conversations."""
    for samples in sources(chat, heldout).values():
        for sample in samples:
            yield from (message["content"] for message in sample.messages if message.get("content"))


def corpus_lines(folder: Path) -> Iterator[str]:
    """The sampled lines of every text file of the corpus, held-out parts left out."""
    rng = random.Random(0)
    for path in sorted(folder.glob("*.txt.xz")):
        share = SHARES.get(path.name.split("_")[0])
        if share is None or path.name in corpus.UNSEEN_WORKS:
            continue
        kept, _ = corpus.split_tail(corpus.read(path))
        for line in kept.splitlines():
            for _ in range(int(share) if share >= 1 else int(rng.random() < share)):
                yield line


def train(lines: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY` tokens, the added ones at its end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        max_token_length=12,  # bytes: four Chinese characters
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_tokens([AddedToken(t, special=t not in NOT_SPECIAL, normalized=False) for t in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Train the tokenizer, give it the chat template, and save both."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("corpus", "chat", "heldout", "template", "output"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    tokenizer = train(chain(corpus_lines(options.corpus), conversation_lines(options.chat, options.heldout)))
    tokenizer.chat_template = options.template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(options.output)
    sample = corpus.read(options.corpus / "novel_hongloumeng.txt.xz")[:200_000]
    ids = tokenizer(sample, verbose=False)["input_ids"]
    print(f"{len(tokenizer)} tokens, {len(sample) / len(ids):.2f} characters a token")


if __name__ == "__main__":
    main()
