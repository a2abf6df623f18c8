"""Short exchanges of the court, said by a consort whose name changes: how one answers there, and nobody's story.

Two sources: `chat/court/*.txt`, written without any name, and the rows of `dataset/more_rows.jsonl` that neither name
somebody of the course's persona nor give an answer of `dataset/huanhuan.json`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import dialogue
from dialogue import Message, Talk

DATASET = Path(__file__).resolve().parents[2] / "dataset"
#: A person of this kind gets a woman's name of old times (`dialogue.names`).
TOPIC = "consort-old-f"
PROMPTS = [
    "现在你要扮演{名}，皇上身边的一位妃子。",
    "你现在是{名}，皇上的妃子。",
    "请你扮演{名}，宫里的一位娘娘，说话像宫里人。",
    "你是{姓}妃，皇上身边的人。",
    "请扮演{姓}贵人，住在宫里，说话简短。",
    "你叫{名}，是宫里的妃子，对皇上自称臣妾，对下人自称本宫。",
    "你是后宫里的{姓}嫔，名叫{名}。",
    "从现在起你是{名}，一位进宫多年的妃子。",
    "扮演{名}：皇上的妃子，端庄，话不多。",
    "你要扮演宫里的{姓}贵妃，名叫{名}。",
]
#: People, homes and turns of the persona's story. A row that holds one of these stays with her.
HER_STORY = re.compile(
    "甄|嬛|莞|菀|熹|四郎|眉庄|眉姐姐|沈|陵容|安妹妹|安嫔|流朱|浣碧|槿汐|品儿|佩儿|允子|允礼|实初|温太医|温大人|卫临|苏培盛|苏公公|王爷|"
    "清河|胧月|弘曕|灵犀|玉娆|玉姚|碎玉|永寿|甘露|凌云|出宫|修行|莫愁|静岸|双生|三个孩子|大理寺|华妃|年家|年大将军|年妃|曹|"
    "端妃|敬妃|祺|淳|瑾|纯元|剪秋|翊坤|景仁|倚梅|惊鸿|杏花"
)


def rows_of_nobody(dataset: Path = DATASET) -> Iterator[list[tuple[str, str]]]:
    """The turns, kind and text, of each row of `more_rows.jsonl` that is not about the persona."""
    taught = {row["output"] for row in json.loads((dataset / "huanhuan.json").read_text(encoding="utf-8"))}
    for line in (dataset / "more_rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "messages" in row:
            turns = [("问" if turn["role"] == "user" else "答", turn["content"]) for turn in row["messages"]]
        else:
            turns = [("问", row["instruction"] + row["input"]), ("答", row["output"])]
        told = any(HER_STORY.search(text) for _, text in turns)
        if not told and not any(text in taught for kind, text in turns if kind == "答"):
            yield turns


def conversations(folder: Path, rng: random.Random, draws: int = 3) -> Iterator[list[Message]]:
    """Each wording of each exchange, `draws` times, each time with another name and prompt.

    Args:
        folder: holds the `*.txt` of written exchanges.
    """
    talks = [talk for path in sorted(folder.glob("*.txt")) for talk in dialogue.read(path)]
    turns = [talk.turns for talk in talks] + list(rows_of_nobody())
    for one in turns:
        yield from dialogue.conversations(Talk(TOPIC, PROMPTS, one), rng, draws)
