"""Answers that readers judge: asked of base and adapter, mixed, shown without their author, and counted afterwards.

python tools/judging.py ask ANSWERS [--load-in-4bit]
                                              base and adapter (of COURSE_OUTPUT) answer the held-out sets of dataset/
python tools/judging.py sheet ANSWERS SHEET   the answers in mixed order, without who gave them, for two readers
python tools/judging.py result ANSWERS MARKS MARKS
                                              what each author reached, and how far the two readers agree

A reader writes one JSON list: `{"number", "role", "point", "sense", "address"}` for each answer, each mark 0 or 1
(models/recipe/judged/README.md is the rubric).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CRITERIA = ("role", "point", "sense", "address")
#: Sets in which nobody is played: an answer is good if it is to the point and makes sense.
PLAIN_SETS = ("everyday", "everyday_turns", "thinking")
#: What the sheet puts before a turn.
SPEAKER = {"system": "系：", "user": "问：", "assistant": "答："}


def held_out() -> dict[str, list[list[dict[str, str]]]]:
    """The conversations of each held-out set up to the question to be answered."""
    sets = {}
    for name in ("situations", "wordings"):
        rows = json.loads((ROOT / "dataset" / f"heldout_{name}.json").read_text(encoding="utf-8"))
        sets[name] = [[{"role": "user", "content": row["instruction"] + row["input"]}] for row in rows]
    lines = (ROOT / "dataset" / "heldout_conversations.jsonl").read_text(encoding="utf-8").splitlines()
    talks = [json.loads(line)["messages"] for line in lines]
    for name, length in (("second_turns", 4), ("third_turns", 6)):
        sets[name] = [talk[:-1] for talk in talks if len(talk) == length]
    return sets


def ask(target: Path, load_in_4bit: bool = False) -> None:
    """What base and adapter answer to every held-out question: greedily, by beam search, and as in the chat."""
    from finetune.chat import BEAMS, STRENGTH, Persona

    authors = [(author, beams, 1.0) for beams in (1, BEAMS) for author in ("adapter", "base")]
    authors.append(("adapter", BEAMS, STRENGTH))
    persona = Persona(load_in_4bit, history=True)
    rows = []
    for name, conversations in held_out().items():
        for messages in conversations:
            for author, persona.beams, persona.strength in authors:
                with persona.model.disable_adapter() if author == "base" else contextlib.nullcontext():
                    persona.turns = messages[:-1]
                    said = persona.answer(messages[-1]["content"])
                by = f"{author} at {persona.strength}" if persona.strength < 1 else author
                by += f", {persona.beams} beams, no pair twice" if persona.beams > 1 else ""
                rows.append({"set": name, "author": by, "asked": messages, "answer": said})
    target.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(len(rows), "answers in", target)


def order(count: int) -> list[int]:
    """The places of the answers as the readers see them: the answer shown as number n is `order(count)[n]`."""
    return random.Random(0).sample(range(count), count)


def sheet(answers: list[dict[str, Any]], target: Path) -> None:
    """One line of JSON for each answer: its number, what was asked (with earlier turns), the answer."""
    lines = [
        {"number": number, "asked": " ".join(SPEAKER[m["role"]] + m["content"] for m in answers[place]["asked"])}
        | {"answer": answers[place]["answer"]}
        for number, place in enumerate(order(len(answers)))
    ]
    target.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def good(mark: dict[str, int], name: str) -> bool:
    """Whether an answer of the set with this name meets everything wanted there."""
    return all(mark[criterion] for criterion in (("point", "sense") if name in PLAIN_SETS else CRITERIA))


def kappa(pairs: list[tuple[bool, bool]]) -> float:
    """Cohen's kappa of two readers' verdicts: agreement beyond chance, 1 for full agreement.

    Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960).
    """
    seen = sum(a == b for a, b in pairs) / len(pairs)
    first, second = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    chance = first * second + (1 - first) * (1 - second)
    return 1.0 if chance == 1 else (seen - chance) / (1 - chance)


def results(answers: list[dict[str, Any]], readings: list[list[dict[str, int]]]) -> dict[str, Any]:
    """Shares of good answers by author, set and reader; the readers' agreement and Cohen's kappa.

    Raises:
        SystemExit: a reader left an answer out, or gave a mark that is not 0 or 1.
    """
    places, verdicts = order(len(answers)), []
    for reader, marks in enumerate(readings, start=1):
        by_place = {places[mark["number"]]: mark for mark in marks if 0 <= mark["number"] < len(answers)}
        missing = [number for number, place in enumerate(places) if place not in by_place]
        wrong = [mark["number"] for mark in marks if any(mark.get(c) not in (0, 1) for c in CRITERIA)]
        if missing or wrong:
            raise SystemExit(f"Reader {reader}: no marks for {missing[:5]}, marks other than 0 and 1 for {wrong[:5]}.")
        verdicts.append([good(by_place[place], row["set"]) for place, row in enumerate(answers)])
    cells: dict[tuple[str, str], list[tuple[bool, ...]]] = defaultdict(list)
    for row, *both in zip(answers, *verdicts, strict=True):
        cells[row["author"], row["set"]].append(tuple(both))
    pairs = list(zip(*verdicts, strict=True))
    shares = [
        {"author": author, "set": name, "answers": len(found)}
        | {f"reader_{n + 1}": round(sum(v[n] for v in found) / len(found), 3) for n in range(len(readings))}
        | {"both": round(sum(all(v) for v in found) / len(found), 3)}
        for (author, name), found in cells.items()
    ]
    agreement = sum(a == b for a, b in pairs) / len(pairs)
    return {"shares": shares, "agreement": round(agreement, 3), "kappa": round(kappa(pairs), 3)}


def main() -> None:
    """One of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("ask", "sheet", "result"))
    parser.add_argument("answers", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    parser.add_argument("--load-in-4bit", action="store_true", help="ask: with the weights in 4 bits")
    options = parser.parse_args()
    if options.command == "ask":
        return ask(options.answers, options.load_in_4bit)
    answers = json.loads(options.answers.read_text(encoding="utf-8"))
    if options.command == "sheet":
        return sheet(answers, *options.others)
    marks = [json.loads(path.read_text(encoding="utf-8")) for path in options.others]
    print(json.dumps(results(answers, marks), ensure_ascii=False, indent=1))
    return None


if __name__ == "__main__":
    main()
