"""Malformed and strange data files: each gets one clear message, or is handled and a line says so.

And the other half of the promise: whatever a text spells, it stays text in the tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import utils

GOOD = {"instruction": "你是谁？", "input": "", "output": "我是甄嬛。"}
OTHER = {"instruction": "你家在哪里？", "input": "", "output": "家在京城。"}


def rows_of(**changed: Any) -> bytes:
    """A file of two rows, the second with changed fields."""
    return json.dumps([GOOD, OTHER | changed], ensure_ascii=False).encode("utf-8", "surrogatepass")


def escaped(**changed: Any) -> bytes:
    """The same in ASCII alone, everything else as escapes."""
    return json.dumps([GOOD, OTHER | changed]).encode()


TEXT = rows_of().decode()
TURNS = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是甄嬛。"}]


@dataclass(frozen=True)
class Case:
    """One strange file.

    Attributes:
        fault: what is wrong, in words. injected: the file's bytes. happened: texts that the learner sees. For a file
            that is refused they stand in the one message, for one that is taken in what load_rows, the audit and the
            cell on lengths print.
    """

    fault: str
    injected: bytes
    happened: tuple[str, ...]


REFUSED = [
    # the bytes
    Case("GBK in the place of UTF-8", TEXT.encode("gbk"), ("not UTF-8 (line 1, byte", "Save it again as UTF-8")),
    Case("UTF-16 with its mark", TEXT.encode("utf-16"), ("not UTF-8 (line 1, byte 0", "Save it again as UTF-8")),
    Case("UTF-16 without a mark", escaped().decode().encode("utf-16-le"), ("zero bytes, as UTF-16", "as UTF-8")),
    Case("an image", b"\x89PNG\r\n\x1a\n\x00\x00", ("not UTF-8 (line 1, byte 0",)),
    Case("one wrong byte on line 3", b"[\n{},\n\xff]", ("not UTF-8 (line 3, byte 6",)),
    Case("a lone surrogate as bytes", rows_of(output="好\ud83d"), ("not UTF-8",)),
    Case("an empty file", b"", ("The file is empty", "Write [")),
    Case("white space alone", b" \n\t\n", ("The file is empty",)),
    # not JSON
    Case("cut off inside a text", rows_of()[:-9], ("line 1 column", "ends too early")),
    Case("cut off between rows", TEXT.split(", {")[0].encode(), ("line 1 column", "ends too early")),
    Case("cut off after a comma", b"[" + json.dumps(GOOD).encode() + b",\n", ("line 2", "ends too early")),
    Case("JSON Lines", (json.dumps(GOOD) + "\n" + json.dumps(OTHER)).encode(), ("line 2", "JSON Lines: put [ before")),
    Case("two lists one after the other", rows_of() + rows_of(), ("Extra data",)),
    Case("CSV", "instruction,input,output\n你好,,好".encode(), ("line 1", "convert a table (CSV) to JSON")),
    Case("a table of numbers", b"1,2,3", ("convert a table (CSV) to JSON",)),
    Case("a web page", b"<!DOCTYPE html><html></html>", ("a web page: download the file itself",)),
    Case("single quotes", str([GOOD]).encode(), ("line 1 column 3", "in the place of a double quote")),
    Case("a comma after the last field", b'[{"instruction": "a",}]', ("line 1", "a comma too many")),
    Case("a comma after the last row", rows_of()[:-1] + b",]", ("line 1", "a comma too many")),
    Case("a comma missing", TEXT.replace("}, {", "}\n{").encode(), ("line 2 column 1", "a comma too many or too few")),
    Case("a comment", b"// mine\n" + rows_of(), ("line 1 column 1", "begins with [")),
    Case("a line break inside a text", b'[{"instruction": "a\nb"}]', ("line 1", r"as \n")),
    Case("a raw zero byte inside a text", b'[{"instruction": "a\x00b"}]', ("zero bytes",)),
    Case("lists 100,000 deep", b"[" * 100_000, ("recursion", "no lists in lists")),
    Case("a number of 5,000 digits", b"[" + b"1" * 5000 + b"]", ("4300 digits", "no numbers")),
    # JSON of another form
    Case("an empty list", b"[]", ("holds an empty list", "Write [")),
    Case("one row without a list", json.dumps(GOOD).encode(), ("holds one dict", "Write [")),
    Case("a dict of rows", json.dumps({"data": [GOOD]}).encode(), ("holds one dict", "Write [")),
    Case("a text", b'"hello"', ("holds one str", "Write [")),
    Case("null", b"null", ("holds one NoneType", "Write [")),
    Case("a list in the place of a row", b'[["a", "b"]]', ("row 1 is list", "write {'instruction'")),
    Case("a list around the list", b"[" + rows_of() + b"]", ("row 1 is list",)),
    Case("null in the place of a row", b"[null]", ("row 1 is NoneType", "write {")),
    Case("messages of a chat", json.dumps([{"messages": TURNS}]).encode(), ("row 1 is a conversation", "write a row")),
    Case(
        "the sharegpt layout",
        json.dumps([GOOD, {"conversations": [{"from": "human", "value": "a"}]}]).encode(),
        ("row 2 is a conversation ('conversations')", "its answer as 'output'"),
    ),
    Case(
        "other names of the fields",
        json.dumps([{"prompt": "a", "completion": "b"}]).encode(),
        ("row 1 has no field 'instruction': add it, or rename one of 'prompt', 'completion'",),
    ),
    Case("a capital in a name", json.dumps([{"Instruction": "a"}]).encode(), ("rename one of 'Instruction'",)),
    Case("no input", json.dumps([{"instruction": "a", "output": "b"}]).encode(), ("'input': add it (it may be",)),
    Case("an empty row", b"[{}]", ("row 1 has no field 'instruction'", "row 1 has no field 'output'")),
    # wrong values
    Case("null in a field", rows_of(input=None), ("row 2 'input' is NoneType, not text", "double quotes")),
    Case("a number in a field", rows_of(output=3), ("row 2 'output' is int, not text",)),
    Case("NaN in a field", rows_of(output=float("nan")), ("row 2 'output' is float, not text",)),
    Case("true in a field", rows_of(output=True), ("row 2 'output' is bool, not text",)),
    Case("a list of answers", rows_of(output=["好", "是"]), ("row 2 'output' is list, not text",)),
    Case("an empty answer", rows_of(output=""), ("row 2 'output' is empty", "delete the row")),
    Case("an answer of white space", rows_of(output=" \n\u3000\t"), ("row 2 'output' is empty",)),
    Case("an answer of no width", rows_of(output="\u200b\ufeff"), ("row 2 'output' is empty",)),
    Case("an empty question", rows_of(instruction=""), ("row 2 'instruction' is empty",)),
    Case("100,000 characters", rows_of(output="长" * 100_000), ("row 2 'output' has 100,000", "shorten or split")),
    Case(
        "half of an emoji", escaped(output="好\ud83d"), ("row 2 'output' holds U+D83D (half of", "place 2: delete it")
    ),
    Case("NUL, written as an escape", escaped(output="好\x00"), ("row 2 'output' holds U+0000", "delete it")),
    Case("a terminal's colour code", escaped(input="\x1b[31m"), ("row 2 'input' holds U+001B", "place 1")),
    Case("a control character of C1", rows_of(input="a\x85"), ("row 2 'input' holds U+0085",)),
    Case("the course's own mark", rows_of(input="<|us\ufdd0er|>"), ("row 2 'input' holds U+FDD0", "delete it")),
    Case(
        "the same key twice", TEXT.replace('"input": ""', '"output": "好"').encode(), ("'output' stands in it twice",)
    ),
    Case(
        "3,000 bad rows",
        json.dumps([GOOD | {"output": ""}] * 3000).encode(),
        ("3000 problems, nothing was trained", "row 10 ", "and 2990 more"),
    ),
]
TAKEN = [
    Case("a byte order mark", b"\xef\xbb\xbf" + rows_of(), ("byte order mark, which is skipped",)),
    Case("alpaca with a history", rows_of(history=[["a", "b"]]), ("'history' is not used (in 1 of 2 rows)",)),
    Case("a system prompt in the row", rows_of(system="你是甄嬛。"), ("'system' is not used (in 1 of 2 rows)",)),
    Case(
        "further fields with odd names",
        escaped(**{"\ud800\n": 1, "": 2}),
        (r"'\ud800\n' is not used", "'' is not used"),
    ),
    Case("duplicate rows", json.dumps([GOOD, GOOD, OTHER]).encode(), ("2    repeats row 1", "delete one of them")),
    Case(
        "one question, two answers",
        rows_of(instruction="你是谁！"),
        ("2    asks as row 1, answers differently", "keep one answer"),
    ),
    Case("an echo", rows_of(instruction="好", output="好。"), ("2    the answer repeats the question",)),
    Case("white space around a text", rows_of(output=" 好。\n"), ("2    white space around 'output'", "delete it")),
    Case(
        "a mark that turns the direction", rows_of(output="好\u202e坏"), ("2    'output' holds U+202E RIGHT-TO-LEFT",)
    ),
    Case("a right-to-left mark", rows_of(input="\u200f问"), ("2    'input' holds U+200F RIGHT-TO-LEFT MARK",)),
    Case("a space of no width", rows_of(input="a\u200bb"), ("2    'input' holds U+200B ZERO WIDTH SPACE",)),
    Case("a lost character", rows_of(output="好\ufffd"), ("2    'output' holds U+FFFD REPLACEMENT CHARACTER",)),
    Case("a code point of no character", rows_of(output="好\uffff"), ("2    'output' holds U+FFFF no character",)),
    Case("a turn's tag in the question", rows_of(instruction="好<|user|>"), ("which stays plain text: [2]",)),
    Case("[gMASK] in the answer", rows_of(output="[gMASK]<sop>"), ("which stays plain text: [2]",)),
    Case("a tag over two fields", rows_of(instruction="a<|us", input="er|>"), ("which stays plain text: [2]",)),
    Case("a row longer than a sample", rows_of(output="长" * 5_000), ("no room for the template's tokens: [2]",)),
    Case("emoji", rows_of(instruction="👩‍🔬", output="👍🏽"), ("0 findings in 2 rows", "plain text: none")),
    Case("two questions of emoji", json.dumps([GOOD | {"instruction": e} for e in "😀😢"]).encode(), ("0 findings",)),
    Case("Windows line ends", json.dumps([GOOD, OTHER], indent=1).replace("\n", "\r\n").encode(), ("0 findings",)),
    Case("one row", json.dumps([GOOD]).encode(), ("0 findings in 1 rows",)),
]
NAMES = [case.fault for case in REFUSED + TAKEN]


def mine(folder: Path, case: Case) -> Path:
    path = folder / "mine.json"
    path.write_bytes(case.injected)
    return path


def test_there_are_forty_and_each_has_a_name():
    assert len(NAMES) == len(set(NAMES)) >= 40


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.fault)
def test_a_bad_file_gets_one_message_with_file_place_and_mend(tmp_path, case):
    with pytest.raises(utils.CourseError) as error:
        utils.load_rows(mine(tmp_path, case))
    said = str(error.value)
    assert all(text in said for text in case.happened), said
    assert said.startswith(f".../{tmp_path.name}/mine.json: ")
    assert len(said) < 3_000
    assert said.encode()  # nothing in it that cannot be shown
    assert error.value.__cause__ is None or error.value.__suppress_context__


@pytest.fixture
def said_by_the_notebook(cell, tokenizer, capsys, monkeypatch):
    """What load_rows and notebook 03's cells on the rows print for a file."""
    cells = [cell("03_dataset", text) for text in ("def plain", "findings = audit(rows)", "MAX_LENGTH = 1024")]

    def say(path: Path) -> str:
        monkeypatch.setenv("COURSE_DATA", str(path))
        rows = utils.load_rows(path)
        questions = [row["instruction"] + row["input"] for row in rows]
        space = {"utils": utils, "course": utils.settings(), "rows": rows, "questions": questions}
        for source in cells:
            exec(source, space)
        return re.sub(" {2,}", "    ", capsys.readouterr().out)

    return say


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.fault)
def test_a_strange_file_is_taken_and_a_line_says_so(tmp_path, said_by_the_notebook, case):
    said = said_by_the_notebook(mine(tmp_path, case))
    assert all(text in said for text in case.happened), said


def test_the_default_file_gives_no_remark(said_by_the_notebook):
    said = said_by_the_notebook(utils.ROOT / "dataset" / "huanhuan.json")
    assert "0 findings in 1600 rows" in said
    assert said.count("none") == 2


@pytest.mark.parametrize("kind", ["folder", "link to nowhere", "no rights"])
def test_what_is_no_readable_file_is_named(tmp_path, monkeypatch, kind):
    path, said = tmp_path / "mine.json", "a folder, not a file"
    if kind == "folder":
        path.mkdir()
    elif kind == "link to nowhere":
        path.symlink_to("gone.json")
        said = "no such file"
    else:  # root may read everything, so the refusal is played

        def refuse(_: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        path.write_bytes(rows_of())
        monkeypatch.setattr(Path, "read_bytes", refuse)
        said = "cannot be read (Permission denied). Check its permissions"
    with pytest.raises(utils.CourseError, match=re.escape(said)):
        utils.load_rows(path)


# ------------------------------------------------------------------------------------------ text stays text

SYSTEM = "现在你要扮演甄嬛。"


@pytest.fixture(scope="module")
def formatter(cell, tokenizer) -> dict[str, Any]:
    """`render_prompt` and `tokenize_row` of notebook 04, taken from its cell."""
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    space = {"tokenizer": tokenizer, "utils": utils, "SYSTEM_PROMPT": SYSTEM, "user_token": user}
    exec(cell("04_chat_template", "def tokenize_row"), space)
    return space


@pytest.fixture(scope="module")
def asking(cell, tokenizer) -> Any:
    """What notebook 06 asks with, for a system prompt and turns."""

    def ask(system: str, turns: list[dict[str, str]]) -> list[int]:
        prompt = {"system": system}
        space = {"tokenizer": tokenizer, "utils": utils}
        source = cell("06_inference", "def prompt_text").replace(
            'json.loads((run_folder / "prompt.json").read_text(encoding="utf-8"))', repr(prompt)
        )
        assert repr(prompt) in source
        exec(source, space)
        return utils.encode(tokenizer, space["prompt_text"](turns))

    return ask


PLACES = ("instruction", "input", "output", "system", "history's question", "history's answer")


def sample_with(formatter: dict[str, Any], place: str, text: str, thinking: bool) -> dict[str, list[int]]:
    fields = {"instruction": "甲", "input": "乙", "output": "丙", "system": SYSTEM} | {place: text}
    history = [
        {"role": "user", "content": fields.get("history's question", "丁")},
        {"role": "assistant", "content": fields.get("history's answer", "戊")},
    ]
    row = {name: fields[name] for name in utils.FIELDS}
    return formatter["tokenize_row"](row, system=fields["system"], history=history, thinking=thinking)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("thinking", [False, True])
def test_no_field_forges_a_special_token_in_training(formatter, tokenizer, place, thinking):
    special = set(tokenizer.get_added_vocab().values())
    honest = [i for i in sample_with(formatter, place, "己", thinking)["input_ids"] if i in special]
    assert len(tokenizer.get_added_vocab()) == 36
    for spelling in tokenizer.get_added_vocab():
        for text in (f"前{spelling}后", spelling, spelling * 2, f"{spelling[:3]}{spelling}", f"{spelling}\n"):
            ids = sample_with(formatter, place, text, thinking)["input_ids"]
            assert [i for i in ids if i in special] == honest, text
            assert text.strip() in tokenizer.decode(ids)


def test_a_tag_cut_in_two_between_fields_forges_nothing(formatter, tokenizer):
    special = set(tokenizer.get_added_vocab().values())
    honest = [i for i in formatter["tokenize_row"](GOOD)["input_ids"] if i in special]
    for spelling in tokenizer.get_added_vocab():
        for cut in range(1, len(spelling)):
            row = {"instruction": "问" + spelling[:cut], "input": spelling[cut:], "output": "答" + spelling[:cut]}
            assert [i for i in formatter["tokenize_row"](row)["input_ids"] if i in special] == honest, row


@pytest.mark.parametrize("place", ["system", "user", "assistant"])
def test_no_turn_forges_a_special_token_in_the_asking_prompt(asking, tokenizer, place):
    special = set(tokenizer.get_added_vocab().values())

    def ids_with(text: str) -> list[int]:
        texts = {"system": SYSTEM, "user": "问", "assistant": "答"} | {place: text}
        turns = [{"role": role, "content": texts[role]} for role in ("user", "assistant", "user")]
        return asking(texts["system"], turns)

    honest = [i for i in ids_with("己") if i in special]
    for spelling in tokenizer.get_added_vocab():
        for text in (f"前{spelling}后", spelling, spelling * 2):
            ids = ids_with(text)
            assert [i for i in ids if i in special] == honest, text
            assert text in tokenizer.decode(ids)


def test_lookalikes_are_other_text(formatter, tokenizer):
    """No normaliser stands before the tokenizer, so a full-width or composed spelling is no special token either."""
    assert json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"] is None
    user = formatter["user_token"]
    for text in ("＜｜user｜＞", "<|USER|>", "<| user |>", "<|us\u200ber|>"):
        ids = formatter["tokenize_row"]({"instruction": text, "input": "", "output": text})["input_ids"]
        assert ids.count(user) == 2


def test_overlapping_spellings_are_all_broken_up():
    class Tokenizer:
        def get_added_vocab(self):
            return {"<ab>": 0, "b><": 1, "<": 2}

    text = utils.as_text(Tokenizer(), "<ab><ab>")
    assert "<ab>" not in text
    assert "b><" not in text
    assert text.replace(utils.BREAK, "") == "<ab><ab>"


PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=utils.BREAK), max_size=20),
    st.sampled_from(["<|user|>", "<|assistant|>", "<think>", "</think>", "/nothink", "[gMASK]", "<sop>", "<|", "|>"]),
    st.sampled_from([" ", "\n", "\r\n", "\u3000", "\u00a0", "嬛", "👩‍🔬", "<|endoftext|>", "<tool_call>"]),
)
TEXTS = st.lists(PIECES, max_size=5).map("".join)


@settings(derandomize=True, deadline=None, max_examples=1500)
@given(question=TEXTS, material=TEXTS, answer=TEXTS, system=TEXTS, thinking=st.booleans())
@example(question="问/nothink", material="", answer=" 答\n", system="", thinking=False)
@example(question="<|user", material="|>", answer="</think>", system="<|user|>", thinking=True)
def test_labels_are_the_answer_and_its_terminator(
    formatter, asking, tokenizer, question, material, answer, system, thinking
):
    """White space around an answer is stripped, as the template does with it in a history; inside, all is kept.

    Questions and system prompts are kept as they are. An answer that is empty after that (load_rows refuses it) gives
    a terminator alone behind the opening.
    """
    row = {"instruction": question, "input": material, "output": answer}
    sample = formatter["tokenize_row"](row, system=system, thinking=thinking)
    ids, labels = sample["input_ids"], sample["labels"]
    assert len(ids) == len(labels) < formatter["MAX_LENGTH"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    opening = "\n<think></think>\n" if thinking else "\n"
    assert tokenizer.decode(labels[start:]) == f"{opening}{answer.strip()}<|user|>"  # once begun, nothing is left out
    assert labels[start:] == ids[start:]
    assert labels[-1] == formatter["user_token"]
    asked = f"{question}{material}" + ("" if thinking else "/nothink")
    assert tokenizer.decode(ids[:start]) == (
        "[gMASK]<sop>"
        + (f"<|system|>\n{system}" if system else "")
        + f"<|user|>\n{asked}<|assistant|>"
        + ("" if thinking else "\n<think></think>")
    )
    assert ids.count(formatter["user_token"]) == 2
    if system and not thinking:  # notebook 06 asks with the very prompt
        assert asking(system, [{"role": "user", "content": question + material}]) == ids[:start]


def test_the_template_strips_an_answer_as_the_formatter_does(formatter, tokenizer):
    for space in " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u2029\u3000":
        answer = f"{space}答{space}案{space}"
        turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
        row = {"instruction": "问", "input": "", "output": answer}
        ids = formatter["tokenize_row"](row, system="")["input_ids"]
        assert tokenizer.decode(ids) == f"{whole}<|user|>"


def test_a_cut_sample_has_no_terminator_and_notebook_04_counts_it(formatter, cell):
    long = formatter["tokenize_row"]({"instruction": "问", "input": "", "output": "长" * 5000})
    assert len(long["labels"]) == formatter["MAX_LENGTH"]
    assert long["labels"][-1] != formatter["user_token"]
    assert "samples that lost their terminator" in cell("04_chat_template", "parts = {}")
