"""What the bundled model reads: the corpus files, turned into documents and split without leaks.

Knows the corpus folder (`*.txt.xz`, `*.jsonl.xz`, `manifest.json`) and nothing of models or tokens.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

Messages = list[dict[str, str]]

#: Works kept out of training as a whole, to measure on prose whose people and plot were never seen.
UNSEEN_WORKS = ("novel_shierlou.txt.xz", "novel_jiumingqiyuan.txt.xz")
HELDOUT_SHARE = 0.01
HELDOUT_LEAST_CHARACTERS = 1500
DOCUMENT_CHARACTERS = 4000
#: No run of this many characters is on both sides of the split.
LEAK_WINDOW = 20

#: Dialogue sets whose first exchange is free talk, not a booking or a slogan.
_FREE_TALK = ("dialog_kdconv.jsonl.xz", "dialog_oasst1_zh.jsonl.xz")
#: Questions on passages of the encyclopaedia files.
_READING = ("qa_cmrc2018.jsonl.xz", "qa_drcd.jsonl.xz")
_SPEECH = re.compile(r"：“([^“”]{2,90})”")
_ROLE_PROMPTS = ("你是《{}》里的人物。", "请用《{}》里人物的口吻说话。", "请以《{}》里人物的身份回答。")
_ASSISTANT_PROMPTS = ("你是一个乐于助人的助手。", "你是一个小小的教学模型。", "请简短地回答用户的问题。")


@dataclass
class Corpus:
    """Documents by group.

    Attributes:
        train: group name to plain documents (`novel`, `poem`, `modern`).
        train_chats: group name to conversations (`speech` cut out of novels, `chat`, `reading`).
        heldout: group name to documents that share no `LEAK_WINDOW` characters with training.
        short_chats: first exchanges of the public dialogue sets that talk freely, for chat tuning.

    """

    train: dict[str, list[str]] = field(default_factory=dict)
    train_chats: dict[str, list[Messages]] = field(default_factory=dict)
    heldout: dict[str, list[str]] = field(default_factory=dict)
    short_chats: list[Messages] = field(default_factory=list)


def read(path: Path) -> str:
    """The text of one `.xz` file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def split_tail(text: str) -> tuple[str, str]:
    """The text without its last lines, and those lines (1 % of it, 1,500 characters at least)."""
    wanted = max(int(len(text) * HELDOUT_SHARE), HELDOUT_LEAST_CHARACTERS)
    cut = text.rfind("\n", 0, max(len(text) - wanted, 0)) + 1
    return text[:cut], text[cut:]


def documents(text: str) -> list[str]:
    """The text in pieces of about `DOCUMENT_CHARACTERS`, cut at line ends."""
    pieces: list[str] = []
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length > DOCUMENT_CHARACTERS:
            pieces.append("".join(lines))
            lines, length = [], 0
    return [*pieces, "".join(lines)] if length else pieces


def speeches(text: str, work: str, rng: random.Random) -> list[Messages]:
    """Short conversations made of a novel's consecutive `：“...”` turns, as role play of that work."""
    conversations: list[Messages] = []
    turns: list[str] = []
    last_end = 0

    def close() -> None:
        usable = turns[: len(turns) // 2 * 2]
        if usable:
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(usable)]
            prompt = rng.choice(_ROLE_PROMPTS).format(work)
            conversations.append([{"role": "system", "content": prompt}, *messages])
        turns.clear()

    for match in _SPEECH.finditer(text):
        gap = text[last_end : match.start()]
        if len(gap) > 30 or ("。" in gap and len(gap) > 18) or len(turns) >= 4:
            close()
        turns.append(match.group(1))
        last_end = match.end()
    close()
    return conversations


def _look_for(windows: set[str]) -> None:
    """Keep the windows in this process of `drop_leaks`."""
    globals()["_windows"] = windows


def _seen(text: str) -> set[str]:
    """The windows that this text holds."""
    windows = globals()["_windows"]
    return {piece for i in range(len(text) - LEAK_WINDOW + 1) if (piece := text[i : i + LEAK_WINDOW]) in windows}


def drop_leaks(heldout: list[str], train: list[str]) -> list[str]:
    """The held-out texts without every line that shares `LEAK_WINDOW` characters with a training text."""
    windows = {text[i : i + LEAK_WINDOW] for text in heldout for i in range(len(text) - LEAK_WINDOW + 1)}
    with get_context("fork").Pool(initializer=_look_for, initargs=(windows,)) as pool:
        leaked = set().union(*pool.imap_unordered(_seen, train, chunksize=256))
    clean = []
    for text in heldout:
        bad = bytearray(len(text))
        for i in range(len(text) - LEAK_WINDOW + 1):
            if text[i : i + LEAK_WINDOW] in leaked:
                bad[i : i + LEAK_WINDOW] = b"\1" * LEAK_WINDOW
        kept, start = [], 0
        for line in text.splitlines(keepends=True):
            if not any(bad[start : start + len(line)]):
                kept.append(line)
            start += len(line)
        clean.append("".join(kept))
    return [text for text in clean if text.strip()]


def chats(path: Path) -> list[Messages]:
    """The conversations of one `.jsonl.xz` file, ended after the last assistant turn."""
    result = []
    for line in read(path).splitlines():
        messages = json.loads(line)["messages"]
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if len(messages) >= 2:
            result.append(messages)
    return result


def load(folder: Path, seed: int = 0) -> Corpus:
    """The whole corpus, split.

    Raises:
        FileNotFoundError: the folder holds no `manifest.json`.

    """
    rng = random.Random(seed)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest}: no corpus here. Pass the folder that holds the *.txt.xz files.")
    works = {row["file"]: row["work"] for row in json.loads(manifest.read_text(encoding="utf-8"))}
    result = Corpus(
        train={"novel": [], "poem": [], "modern": []},
        train_chats={"speech": [], "chat": [], "reading": []},
        heldout={"novel": [], "poem": [], "modern": [], "unseen_work": []},
    )
    for path in sorted(folder.glob("*.txt.xz")):
        group = path.name.split("_")[0]
        if group not in result.train:
            continue  # dialogue is read from its .jsonl.xz twin
        text = read(path)
        if path.name in UNSEEN_WORKS:
            result.heldout["unseen_work"].append(text)
            continue
        kept, tail = split_tail(text)
        result.train[group] += documents(kept)
        result.heldout[group].append(tail)
        if group == "novel":
            work = re.sub(r"[^\u4e00-\u9fff].*", "", works.get(path.name, "")) or "红楼梦"
            result.train_chats["speech"] += speeches(kept, work, rng)
    for path in sorted(folder.glob("dialog_*.jsonl.xz")):
        for messages in chats(path):
            prompt = rng.choice(_ASSISTANT_PROMPTS) if rng.random() < 0.3 else None
            system = [{"role": "system", "content": prompt}] if prompt else []
            result.train_chats["chat"].append([*system, *messages])
            if path.name in _FREE_TALK and len(messages[1]["content"]) <= 80:
                result.short_chats.append(messages[:2])
    # Questions and their passage are in one turn; a passage of the held-out encyclopaedia part must not
    # come back through its questions, so such conversations are left out of training.
    heldout_modern = "".join(result.heldout["modern"])
    for messages in [one for name in _READING for one in chats(folder / name)]:
        passage = messages[0]["content"]
        if not any(passage[i : i + LEAK_WINDOW] in heldout_modern for i in range(0, len(passage), LEAK_WINDOW)):
            result.train_chats["reading"].append(messages)

    train_texts = [text for group in result.train.values() for text in group]
    train_texts += [m["content"] for group in result.train_chats.values() for c in group for m in c]
    result.heldout = {name: drop_leaks(texts, train_texts) for name, texts in result.heldout.items()}
    return result
