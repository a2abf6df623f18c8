"""Malformed and strange data files: each gets one clear message, or is handled and a line says so.

And the other half of the promise: whatever a text spells, it stays text in the tokens.
"""

from __future__ import annotations

import gzip
import json
import lzma
import pickle
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import utils
from course import plots, row_checks
from course.model_folder import model_folder
from course.row_checks import one_form
from course.rows import load_rows

GOOD = {"instruction": "你是谁？", "input": "", "output": "我是甄嬛。"}
OTHER = {"instruction": "你家在哪里？", "input": "", "output": "家在京城。"}


def rows_of(**changed: Any) -> bytes:
    """A file of two rows, the second with changed fields."""
    return json.dumps([GOOD, OTHER | changed], ensure_ascii=False).encode("utf-8", "surrogatepass")


def escaped(**changed: Any) -> bytes:
    """The same in ASCII only, everything else as escapes."""
    return json.dumps([GOOD, OTHER | changed]).encode()


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def chat(turns: list[Any], **more: Any) -> bytes:
    """A file of one row, a conversation."""
    return as_json([{"messages": turns} | more])


def talk(*texts: str, system: str = "") -> dict[str, Any]:
    """A conversation as `load_rows` gives it: the user's and the assistant's texts by turns."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


TEXT_OF_A_TURN = st.text("你我是谁在哪里abc,;\"'\t\n ", min_size=1, max_size=12).filter(lambda text: text.strip())
TEXT = rows_of().decode()
TURNS = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是甄嬛。"}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "get_time", "arguments": '{"city": "京城"}'}}]}
RESULT = {"role": "tool", "content": {"time": "15:00"}}
TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {}}}]
LINES = b"\n".join(json.dumps(row).encode() for row in (GOOD, OTHER))
TRADITIONAL = '[{"instruction": "你是誰？", "output": "我是甄嬛，我的父親是大理寺的。"}]'
LATIN = '[{"instruction": "Où est le café ?", "output": "Près de la forêt, à côté."}]'
JAPANESE = '[{"instruction": "あなたは誰ですか？", "output": "私は茶店の主人です。"}]'
KOREAN = '[{"instruction": "당신은 누구입니까?", "output": "저는 찻집 주인입니다."}]'
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:73cb\nsize 936794\n"


@dataclass(frozen=True)
class Case:
    """One strange file.

    Attributes:
        fault: what is wrong, in words. injected: the file's bytes. happened: texts that the learner sees. For a file
            that is refused they are in the one message, for one that is taken in what load_rows, the audit and the
            cell on lengths print.
    """

    fault: str
    injected: bytes
    happened: tuple[str, ...]


REFUSED = [
    # the bytes
    Case("Latin-1 in the place of UTF-8", LATIN.encode("latin-1"), ("not UTF-8 (line 1, byte", "CP1252", "iconv -f")),
    Case("Japanese in Shift JIS", JAPANESE.encode("shift_jis"), ("is in doubt", "SHIFT_JIS", "Save it again as UTF-8")),
    Case("Korean in EUC-KR", KOREAN.encode("euc_kr"), ("is in doubt", "EUC_KR", "Save it again as UTF-8")),
    Case("UTF-16 cut in the middle", TEXT.encode("utf-16")[:-1], ("not utf-16, as its first bytes say (byte",)),
    Case("an image", b"\x89PNG\r\n\x1a\n\x00\x00", ("an image or a PDF, not text",)),
    Case("a photograph", b"\xff\xd8\xff\xe0\x00\x10JFIF", ("an image or a PDF",)),
    Case("a PDF", b"%PDF-1.7\n%\xe2\xe3", ("an image or a PDF",)),
    Case("a ZIP archive", b"PK\x03\x04\x14\x00rows.json", ("an archive. Unpack it",)),
    Case("a gzip file", gzip.compress(rows_of()), ("an archive. Unpack it",)),
    Case("an xz file", lzma.compress(rows_of()), ("an archive. Unpack it",)),
    Case("a 7z archive", b"7z\xbc\xaf\x27\x1c\x00\x04", ("an archive. Unpack it",)),
    Case("a RAR archive", b"Rar!\x1a\x07\x01\x00", ("an archive. Unpack it",)),
    Case("a spreadsheet", b"PK\x03\x04\x14\x00[Content_Types].xml xl/workbook.xml", ("a spreadsheet. Save it as CSV",)),
    Case("an old spreadsheet", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ("a spreadsheet", "read_excel('mine.json')")),
    Case("a pickle", pickle.dumps([GOOD, OTHER]), ("a pickle, which can run code",)),
    Case("weights saved by torch", b"PK\x03\x04\x00\x00archive/data.pkl", ("a pickle, which can run code",)),
    Case("safetensors", (64).to_bytes(8, "little") + b'{"a": {"dtype": "F32"}}', ("weights of a model, not rows",)),
    Case("an Arrow file", b"ARROW1\x00\x00\xff\xff", ("an Arrow file", "to_parquet")),
    Case("another binary file", bytes(range(256)), ("binary, not text",)),
    Case("a Git LFS pointer", LFS_POINTER, ("a Git LFS pointer", "git lfs pull")),
    Case("a torn parquet file", b"PAR1\x15\x04", ("a parquet file that cannot be read",)),
    Case("one wrong byte on line 3", b"[\n{},\n\xff]", ("not UTF-8 (line 3, byte 6",)),
    Case("one wrong byte in much UTF-8", rows_of(output="好" * 90) + b"\xff", ("not UTF-8", "Save it again as UTF-8")),
    Case("a lone surrogate as bytes", rows_of(output="好\ud83d"), ("not UTF-8",)),
    Case("an empty file", b"", ("The file is empty", "Write [")),
    Case("only white space", b" \n\t\n", ("The file is empty",)),
    # not JSON
    Case("cut off inside a text", rows_of()[:-9], ("line 1 column", "ends too early")),
    Case("cut off between rows", TEXT.split(", {")[0].encode(), ("line 1 column", "ends too early")),
    Case("cut off after a comma", b"[" + json.dumps(GOOD).encode() + b",\n", ("line 2", "ends too early")),
    Case("JSON Lines with a slip", LINES[:-1] + b",}", ("JSON Lines, but line 2 is not JSON", "correct that one")),
    Case("two lists one after the other", rows_of() + rows_of(), ("Extra data", "put them into one list")),
    Case("a table without a head", b"1,2,3", ("a first line with the names",)),
    Case(
        "CSV with a comma too many", b"instruction,output\na,b,c", ("row 1 (line 2) has more cells", "quote its commas")
    ),
    Case("CSV with an open quote", b'instruction,output\na,"b', ("not a table", "double quotes")),
    Case("CSV with only a head", b"instruction,output\n", ("holds an empty list",)),
    Case("CSV in other words", "问题,instruction,answer\n甲,,乙".encode(), ("row 1 'instruction' is empty",)),
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
    Case(
        "an object of something else", b'{"model_type": "glm4_moe"}', ("holds one object with 'model_type'", "Write [")
    ),
    Case("an object with two lists", as_json({"train": [GOOD], "test": [GOOD]}), ("several lists ('train', 'test')",)),
    Case("an empty object", b"{}", ("holds one dict", "Write [")),
    Case("columns of two lengths", as_json({"instruction": ["a", "b"], "output": ["c"]}), ("different lengths", "2")),
    Case("a text", b'"hello"', ("holds one str", "Write [")),
    Case("null", b"null", ("holds one NoneType", "Write [")),
    Case("a list in the place of a row", b'[["a", "b"]]', ("row 1 is list", "write {'instruction'")),
    Case("a list around the list", b"[" + rows_of() + b"]", ("row 1 is list",)),
    Case("null in the place of a row", b"[null]", ("row 1 is NoneType", "write {")),
    Case("a chat that the assistant begins", chat(TURNS[::-1]), ("row 1 'messages': turn 1 is the assistant's",)),
    Case("a chat that ends with the user", chat([*TURNS, TURNS[0]]), ("'messages': ends with the user's turn 3",)),
    Case("two turns of the user", chat([TURNS[0], *TURNS]), ("turn 2 is the user's as the one before: join",)),
    Case("an unknown role", chat([*TURNS, {"role": "critic", "content": "a"}]), ("turn 3 has the role 'critic': use",)),
    Case("a result without a call", chat([*TURNS, RESULT]), ("turn 3 is a tool's result without a call",)),
    Case("a call without a result", chat([TURNS[0], CALL, TURNS[0]], tools=TOOLS), ("turn 3 follows a call",)),
    Case("a call at the end", chat([TURNS[0], CALL], tools=TOOLS), ("ends with turn 2, before the answer",)),
    Case(
        "a result without an answer",
        chat([TURNS[0], CALL, RESULT, TURNS[0]], tools=TOOLS),
        ("turn 4 follows a tool's result",),
    ),
    Case("a tool that is not offered", chat([TURNS[0], CALL, RESULT, TURNS[1]]), ("calls 'get_time', which 'tools'",)),
    Case(
        "a call of another form",
        chat([TURNS[0], {"role": "assistant", "tool_calls": [{"do": "it"}]}, RESULT, TURNS[1]]),
        ("turn 2 calls a tool in a form",),
    ),
    Case("tools that are no list", chat(TURNS, tools="get_time"), ("'tools' is no list of tools",)),
    Case("an empty turn", chat([TURNS[0], {"role": "assistant", "content": " "}]), ("turn 2 'assistant' is empty",)),
    Case("a turn without text", chat([TURNS[0], {"role": "assistant"}]), ("turn 2 has no 'content' (nor 'value')",)),
    Case("a sharegpt turn without text", as_json([{"conversations": [{"from": "human"}]}]), ("has no 'value' (nor",)),
    Case("turns of other keys", chat([{"speaker": "a", "text": "b"}]), ("the keys 'speaker', 'text': use 'role' and",)),
    Case("a turn that is a text", chat(["a", "b"]), ("turn 1 is str, not an object: write {'role'",)),
    Case(
        "a system turn in the middle", chat([*TURNS, {"role": "system", "content": "a"}]), ("turn 3 is the system's",)
    ),
    Case("a chat that is a text", as_json([{"messages": "a"}]), ("'messages': is str, not a list of turns",)),
    Case("a chat of a system prompt", chat([{"role": "system", "content": "a"}]), ("'messages': holds no turns",)),
    Case(
        "a turn with half an emoji",
        chat([TURNS[0], {"role": "user", "content": "\ud83d"}]),
        ("turn 2 'user' holds U+",),
    ),
    Case("a chat and three fields", as_json([GOOD | {"messages": TURNS}]), ("has 'messages' and 'instruction': keep",)),
    Case(
        "two system prompts",
        as_json([{"system": "a", "messages": [{"role": "system", "content": "b"}, *TURNS]}]),
        ("has two system prompts",),
    ),
    Case("a history of one half", rows_of(history=[["a", ""]]), ("row 2 'history': turn 1 'assistant' is empty",)),
    Case("a history of texts", rows_of(history="a"), ("row 2 'history': is str, not a list of turns",)),
    Case("an open history", rows_of(history=[TURNS[0]]), ("row 2 'history': ends with the user's turn 1",)),
    Case("a system prompt that is a list", rows_of(system=["a"]), ("row 2 'system' is list, not text",)),
    Case(
        "other names of the fields",
        json.dumps([{"ask": "a", "reply": "b"}]).encode(),
        ("row 1 has no field 'instruction': add it, or rename one of 'ask', 'reply'",),
    ),
    Case("a name too many", as_json([{"query": "a", "prompt": "b", "output": "c"}]), ("has 'query', 'prompt' and no",)),
    Case("a capital in a name", json.dumps([{"Instruction": "a"}]).encode(), ("rename one of 'Instruction'",)),
    Case("an empty row", b"[{}]", ("row 1 has no field 'instruction'", "row 1 has no field 'output'")),
    # wrong values
    Case("null in a field", rows_of(output=None), ("row 2 'output' is empty: write it",)),
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
    Case("the same key twice", TEXT.replace('"input": ""', '"output": "好"').encode(), ("'output' occurs twice",)),
    Case(
        "3,000 bad rows",
        json.dumps([GOOD | {"output": ""}] * 3000).encode(),
        ("3000 problems, nothing was trained", "row 10 ", "and 2990 more"),
    ),
]
TAKEN = [
    Case("a byte order mark", b"\xef\xbb\xbf" + rows_of(), ("byte order mark, which is skipped",)),
    Case("GBK in the place of UTF-8", TEXT.encode("gbk"), ("read as GB18030, in which it makes sense", "0 findings")),
    Case("Big5 in the place of UTF-8", TRADITIONAL.encode("big5"), ("read as BIG5, in which it makes sense",)),
    Case("UTF-16 with its mark", TEXT.encode("utf-16"), ("is utf-16, and was read so", "0 findings in 2 rows")),
    Case("UTF-16 without a mark", TEXT.encode("utf-16-le"), ("is utf-16-le, and was read so", "0 findings in 2 rows")),
    Case("JSON Lines", LINES, ("0 findings in 2 rows",)),
    Case("JSON Lines with Windows line ends", LINES.replace(b"\n", b"\r\n") + b"\r\n\r\n", ("0 findings in 2 rows",)),
    Case("JSON Lines of one line", as_json(GOOD), ("0 findings in 1 rows",)),
    Case("CSV", "instruction,input,output\n你好,,好".encode(), ("0 findings in 1 rows",)),
    Case("CSV of a European Excel", "instruction;output\n你好;好\n;\n".encode("utf-8-sig"), ("0 findings in 1 rows",)),
    Case("TSV", "query\tresponse\n你好\t好".encode(), ("'query' is read as 'instruction' (in 1 of 1 rows)",)),
    Case("a list under a key", as_json({"version": 1, "data": [GOOD]}), ("the rows are the list under 'data'",)),
    Case("columns of lists", as_json({"instruction": ["你好"], "output": ["好"]}), ("is a table in columns", "1 rows")),
    Case("columns numbered", as_json({"instruction": {"0": "你好"}, "output": {"0": "好"}}), ("a table in columns",)),
    Case("pandas' split", as_json({"columns": ["query", "answer"], "data": [["a", "b"]]}), ("a table in columns",)),
    Case("pandas' index", as_json({"0": GOOD, "1": OTHER}), ("0 findings in 2 rows",)),
    Case("no input", as_json([{"instruction": "a", "output": "b"}]), ("0 findings in 1 rows",)),
    Case("null in input", rows_of(input=None), ("0 findings in 2 rows",)),
    Case("prompt and completion", as_json([{"prompt": "a", "completion": "b"}]), ("'completion' is read as 'output'",)),
    Case("messages of a chat", chat(TURNS), ("0 findings in 1 rows",)),
    Case("a chat of two questions", chat([*TURNS, *TURNS]), ("0 findings in 1 rows",)),
    Case("a chat with a tool", chat([TURNS[0], CALL, RESULT, TURNS[1]], tools=TOOLS), ("0 findings in 1 rows",)),
    Case(
        "the sharegpt layout",
        as_json([GOOD, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]),
        ("0 findings in 2 rows",),
    ),
    Case("a rating beside a turn", chat([TURNS[0], TURNS[1] | {"score": 3}]), ("'messages.score' is not used",)),
    Case("reasoning beside a turn", chat([TURNS[0], TURNS[1] | {"reasoning": "a"}]), ("0 findings in 1 rows",)),
    Case("alpaca with a history", rows_of(history=[["a", "b"]]), ("0 findings in 2 rows",)),
    Case("a system prompt in the row", rows_of(system="你是甄嬛。"), ("0 findings in 2 rows",)),
    Case(
        "reasoning in the answer",
        rows_of(output="<think>嗯</think>好"),
        ("'<think>' is read as 'reasoning_content' (in 1 of 2 rows)", "0 findings"),
    ),
    Case(
        "reasoning in the middle of the answer",
        rows_of(output="好<think>嗯</think>"),
        ("trained as the letters of <think>", "move it to 'reasoning_content'"),
    ),
    Case("a placeholder", rows_of(output="我叫{{name}}。"), ("2    'assistant' holds {{name}}, which would be said",)),
    Case("a placeholder of another kind", rows_of(instruction="你好，[NAME]"), ("'user' holds [NAME]",)),
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
    Case("white space around a text", rows_of(output=" 好。\n"), ("2    white space around 'assistant'", "delete it")),
    Case(
        "a mark that turns the direction",
        rows_of(output="好\u202e坏"),
        ("2    'assistant' holds U+202E RIGHT-TO-LEFT",),
    ),
    Case("a right-to-left mark", rows_of(input="\u200f问"), ("2    'user' holds U+200F RIGHT-TO-LEFT MARK",)),
    Case("a space of no width", rows_of(input="a\u200bb"), ("2    'user' holds U+200B ZERO WIDTH SPACE",)),
    Case("a lost character", rows_of(output="好\ufffd"), ("2    'assistant' holds U+FFFD REPLACEMENT CHARACTER",)),
    Case("a code point of no character", rows_of(output="好\uffff"), ("2    'assistant' holds U+FFFF no character",)),
    Case("a turn's tag in the question", rows_of(instruction="好<|user|>"), ("which stays plain text: 2",)),
    Case("[gMASK] in the answer", rows_of(output="[gMASK]<sop>"), ("which stays plain text: 2",)),
    Case("a tag over two fields", rows_of(instruction="a<|us", input="er|>"), ("which stays plain text: 2",)),
    Case(
        "a row longer than a sample",
        rows_of(output="长" * 5_000),
        ("no room for the template's tokens: 2", "Shorten or split"),
    ),
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
def test_a_bad_file_gets_one_message_with_file_place_and_mend(tmp_path, case, fault):
    with pytest.raises(utils.CourseError) as error:
        load_rows(mine(tmp_path, case))
    said = str(error.value)
    assert all(text in said for text in case.happened), said
    assert said.startswith(f".../{tmp_path.name}/mine.json: ")
    assert len(said) < 3_000
    assert said.encode()  # nothing in it that cannot be shown
    assert error.value.__cause__ is None or error.value.__suppress_context__
    fault.record("data", case.fault, "a file of such bytes", "refused: " + " … ".join(case.happened))


@pytest.fixture
def said_by_the_notebook(cell, tokenizer, capsys, monkeypatch):
    """What load_rows and notebook 03's cells on the rows print for a file."""
    cells = [
        cell("03_dataset", text) for text in ("def plain", "def audit", "where = audit(rows)", "MAX_LENGTH = 1024")
    ]

    def say(path: Path) -> str:
        monkeypatch.setenv("COURSE_DATA", str(path))
        space = {"utils": utils, "settings": utils.settings(), "rows": load_rows(path)}
        space |= {"model_folder": model_folder, "plots": plots, "row_checks": row_checks}
        for source in cells:
            exec(source, space)
        return re.sub(" {2,}", "    ", capsys.readouterr().out)

    return say


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.fault)
def test_a_strange_file_is_taken_and_a_line_says_so(tmp_path, said_by_the_notebook, case, fault):
    said = said_by_the_notebook(mine(tmp_path, case))
    assert all(text in said for text in case.happened), said
    fault.record("data", case.fault, "a file of such bytes", "taken, and said: " + " … ".join(case.happened))


def test_the_default_file_gives_no_remark(said_by_the_notebook):
    said = said_by_the_notebook(utils.ROOT / "dataset" / "huanhuan.json")
    assert "0 findings in 3358 rows" in said
    assert said.count("none") == 2


@pytest.mark.parametrize("kind", ["folder", "link to nowhere", "no rights"])
def test_what_is_no_readable_file_is_named(tmp_path, monkeypatch, kind, fault):
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
        load_rows(path)
    fault.record(
        "data",
        f"the data file is a {kind}" if kind != "no rights" else "the data file may not be read",
        "in its place",
        "refused: " + said,
    )


# --------------------------------------------------------------------- files that people bring: tests/support/cases

CASES = utils.ROOT / "tests" / "support" / "cases"
FIRST = ("你是谁？", "客官问你是谁，奴家记着呢，第1桌先坐。莫急。")
READ = {
    "alpaca_crlf.jsonl": ("", 30),
    "columns_pandas.json": ("is a table in columns, read row by row", 30),
    "input_missing.json": ("", 30),
    "input_null.json": ("", 30),
    "excel_gbk.csv": ("is no UTF-8; it was read as GB18030", 30),
    "rows.parquet": ("is a parquet table, read row by row", 30),
    "xtuner_conversation.json": ("", 3),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_of_another_form_gives_the_same_rows(name, capsys, fault):
    said, count = READ[name]
    rows = load_rows(CASES / name)
    assert len(rows) == count
    assert rows[0]["messages"][-2:] == talk(*FIRST)["messages"]
    assert said in capsys.readouterr().out
    fault.record("data", f"the file {name}", "tests/support/cases", f"{count} rows are read")


def test_history_and_system_are_kept():
    turns = load_rows(CASES / "history_system.json")[0]["messages"]
    assert turns[0] == {"role": "system", "content": "你是茶馆老板娘，说话爽快。"}
    assert [turn["role"] for turn in turns[1:]] == ["user", "assistant"] * 3
    assert turns[4] == {"role": "assistant", "content": "第0壶还没开。"}
    assert load_rows(CASES / "xtuner_conversation.json")[0] == talk(*FIRST, system="你是茶馆老板娘。")


def test_a_call_is_read_in_each_form():
    call = {"name": "get_time", "arguments": {"city": "京城"}}
    wanted = [
        {"role": "user", "content": "几点了？"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "15:00"},
        {"role": "assistant", "content": "三点。"},
    ]
    asked, said = {"from": "human", "value": "几点了？"}, {"from": "gpt", "value": "三点。"}
    of_sharegpt = [
        asked,
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "15:00"},
    ]
    for row in (
        {"messages": wanted, "tools": TOOLS},
        {"conversations": [*of_sharegpt, said], "tools": json.dumps(TOOLS)},
        {
            "messages": [wanted[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *wanted[2:]],
            "tools": TOOLS,
        },
    ):
        assert one_form(row, Counter()) == ({"messages": wanted, "tools": TOOLS}, [])


@pytest.mark.parametrize("name", ["data_lfs_pointer.json", "shard_lfs_pointer.safetensors"])
def test_a_git_lfs_pointer_is_known(name):
    with pytest.raises(utils.CourseError, match=r"a Git LFS pointer, not the file itself\. Fetch it: git lfs pull"):
        load_rows(CASES / name)


def test_the_configuration_of_a_model_is_no_data():
    with pytest.raises(utils.CourseError, match="holds one object with 'architectures'"):
        load_rows(CASES / "fp8_config.json")


AUDITED = {
    "placeholders.json": ("'assistant' holds {{user}}, which would be said as it is", "'assistant' holds {{char}}"),
    "r1_think_in_output.json": ("'<think>' is read as 'reasoning_content' (in 30 of 30 rows)", "0 findings"),
    "history_system.json": ("0 findings in 20 rows",),
    "long_rows_40.json": ("template's tokens: 1, 2, 3, 4, 5 … (40)", "cuts off the end of these answers", "Shorten or"),
    "input_null.json": ("0 findings in 30 rows", "plain text: none"),
}


@pytest.mark.parametrize("name", AUDITED)
def test_the_audit_names_what_would_be_trained_wrongly(name, said_by_the_notebook, fault):
    said = said_by_the_notebook(CASES / name)
    assert all(text in said for text in AUDITED[name]), said
    named = "named by notebook 03: " + " … ".join(AUDITED[name])
    fault.record("data", f"the rows of {name}", "tests/support/cases", named)


@pytest.mark.parametrize(
    "text",
    [
        "用 `{{name}}` 渲染模板", '写 printf("%s\\n", name)', 'print("Hello %s" % name)', "长了 100%，a<b>c",
        "```\n{user}\n```", "f(x) = {x}", "<|user|>", "[gMASK]", "数组 a[NAMES]", "<table>", "集合 {1, 2}", "[1] 见注",
    ],
)  # fmt: skip
def test_code_and_signs_are_no_placeholders(text):
    assert not [said for said, _ in row_checks.row_remarks(talk("问", text)) if "would be said" in said]


@pytest.mark.parametrize(
    "text", ["我是{{ name }}。", "<NAME>你好", "<name>", "[NAME]", "你好，%s！", "【姓名】", "{user}", "[YOUR NAME]"]
)
def test_placeholders_of_every_kind_are_named(text):
    assert [said for said, _ in row_checks.row_remarks(talk("问", text)) if "would be said" in said]


TALKS = st.lists(st.tuples(TEXT_OF_A_TURN, TEXT_OF_A_TURN), min_size=1, max_size=4)


def forms(pairs: list[tuple[str, str]], system: str) -> dict[str, dict[str, Any]]:
    """One conversation in each form that people write it in."""
    (*before, (question, answer)), opening = pairs, [system] if system else []
    roles = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    named = {"user": "human", "assistant": "gpt"}
    told = {"system": system}
    return {
        "alpaca": {"instruction": question, "input": "", "output": answer, "history": list(map(list, before))} | told,
        "query": {"query": question, "response": answer, "history": list(map(list, before)), **told},
        "messages": {
            "messages": [{"role": "system", "content": one} for one in opening]
            + [{"role": role, "content": text} for role, text in roles]
        },
        "sharegpt": {"system": system, "conversations": [{"from": named[r], "value": text} for r, text in roles]},
        "xtuner": {"conversation": [{"system": system, "input": q, "output": a} for q, a in pairs]},
        "prompts": {
            "prompt": [*({"role": "system", "content": one} for one in opening)]
            + [{"role": role, "content": text} for role, text in roles[:-1]],
            "completion": [{"role": "assistant", "content": answer}],
        },
    }


@settings(derandomize=True, deadline=None, max_examples=60)
@given(pairs=TALKS, system=st.sampled_from(["", "你是甄嬛。"]))
def test_every_form_of_a_conversation_becomes_the_same_row(pairs, system):
    wanted = talk(*(text for pair in pairs for text in pair), system=system)
    for name, row in forms(pairs, system).items():
        assert one_form(row, Counter()) == (wanted, []), name


def written(rows: list[dict[str, Any]], form: str) -> bytes:
    """The rows as a file of that form."""
    if form == "json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if form == "lines":
        return "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8-sig")
    frame = pandas.DataFrame(rows)
    if form in ("csv", "tsv"):
        return frame.to_csv(index=False, sep="," if form == "csv" else "\t").encode()
    if form == "parquet":
        return frame.to_parquet(index=False)
    return frame.to_json(orient=form, force_ascii=False).encode()


@settings(derandomize=True, deadline=None, max_examples=25)
@given(pairs=TALKS, form=st.sampled_from("json lines csv tsv parquet columns index records split table".split()))
def test_every_form_of_a_file_gives_the_same_rows(tmp_path_factory, pairs, form):
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]
    path = tmp_path_factory.mktemp("forms") / f"mine.{form if form in ('csv', 'tsv') else 'dat'}"
    path.write_bytes(written(rows, form))
    assert load_rows(path) == [talk(*pair) for pair in pairs]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["huanhuan.json", "teahouse.json"])
def test_an_encoding_without_doubt_gives_the_same_rows(tmp_path, name, encoding):
    path = utils.ROOT / "dataset" / name
    (tmp_path / "mine.json").write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert load_rows(tmp_path / "mine.json") == load_rows(path)


# ------------------------------------------------------------------------------------------ text stays text

SYSTEM = "现在你要扮演甄嬛。"


@pytest.fixture(scope="module")
def formatter(cell, tokenizer) -> dict[str, Any]:
    """`render`, `one_turn` and `tokenize` of notebook 04, taken from its cells."""
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    space = {"tokenizer": tokenizer, "utils": utils, "SYSTEM_PROMPT": SYSTEM, "user_token": user}
    for part in ("def render", "def one_turn", "def prepared_turns", "def tokenize"):
        exec(cell("04_chat_template", part), space)
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


PLACES = (
    "user",
    "assistant",
    "system",
    "earlier question",
    "earlier answer",
    "thought",
    "argument",
    "result",
    "schema",
)


def sample_with(formatter: dict[str, Any], place: str, text: str, thinking: bool) -> dict[str, list[int]]:
    """The last sample of a conversation with a text at one place and honest ones at the others."""
    at = dict.fromkeys(PLACES, "甲") | {place: text}
    function = {"name": "get_time", "description": at["schema"], "parameters": {}}
    call = {"type": "function", "function": {"name": "get_time", "arguments": {"city": at["argument"]}}}
    turns = talk(at["earlier question"], at["earlier answer"], at["user"], system=at["system"])["messages"]
    turns += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": at["result"]}]
    turns.append({"role": "assistant", "content": at["assistant"], "reasoning_content": at["thought"]})
    return formatter["tokenize"]({"messages": turns, "tools": [{"type": "function", "function": function}]}, thinking)[
        -1
    ]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("thinking", [False, True])
def test_no_field_forges_a_special_token_in_training(formatter, tokenizer, place, thinking, fault):
    special = set(tokenizer.get_added_vocab().values())
    honest = [i for i in sample_with(formatter, place, "己", thinking)["input_ids"] if i in special]
    assert len(tokenizer.get_added_vocab()) == 36
    for spelling in tokenizer.get_added_vocab():
        for text in (f"前{spelling}后", spelling, spelling * 2, f"{spelling[:3]}{spelling}", f"{spelling}\n"):
            ids = sample_with(formatter, place, text, thinking)["input_ids"]
            assert [i for i in ids if i in special] == honest, text
            read = tokenizer.decode(ids).replace("\\n", "\n")  # a schema is JSON
            assert text.strip() in read or (place == "thought" and not thinking)
    fault.record(
        "data",
        f"a special token spelt in the {place}",
        "each of the 36, alone, twice, cut and in text",
        "stays text in the samples; no turn is forged",
    )


def test_a_tag_cut_in_two_between_fields_forges_nothing(formatter, tokenizer, fault):
    special = set(tokenizer.get_added_vocab().values())

    def ids_of(instruction: str, material: str, output: str) -> list[int]:
        row, problems = one_form({"instruction": instruction, "input": material, "output": output}, Counter())
        assert not problems
        return [i for i in formatter["tokenize"](row)[0]["input_ids"] if i in special]

    honest = ids_of("问", "", "答")
    for spelling in tokenizer.get_added_vocab():
        for cut in range(1, len(spelling)):
            assert ids_of("问" + spelling[:cut], spelling[cut:], "答" + spelling[:cut]) == honest, spelling
    fault.record(
        "data",
        "a special token cut in two between fields",
        "each of the 36, at each place",
        "stays text; no turn is forged",
    )


@pytest.mark.parametrize("place", ["system", "user", "assistant"])
def test_no_turn_forges_a_special_token_in_the_asking_prompt(asking, tokenizer, place, fault):
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
    fault.record(
        "data",
        f"a special token spelt in a {place} turn",
        "each of the 36, in the prompt of notebook 06",
        "stays text; no turn is forged",
    )


def test_lookalikes_are_other_text(formatter, tokenizer):
    """There is no normaliser before the tokenizer, so a full-width or composed spelling is no special token either."""
    assert json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"] is None
    user = formatter["user_token"]
    for text in ("＜｜user｜＞", "<|USER|>", "<| user |>", "<|us\u200ber|>"):
        (sample,) = formatter["tokenize"](talk(text, text))
        assert sample["input_ids"].count(user) == 2


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
@given(question=TEXTS, answer=TEXTS.filter(str.strip), system=TEXTS, thinking=st.booleans())
@example(question="问/nothink", answer=" 答\n", system="", thinking=False)
@example(question="<|user|>", answer="</think>", system="<|user|>", thinking=True)
def test_labels_are_the_answer_and_its_terminator(formatter, asking, tokenizer, question, answer, system, thinking):
    """White space around an answer is stripped, as the template does with it in a history; inside, all is kept.

    Questions and system prompts are kept as they are.
    """
    (sample,) = formatter["tokenize"](talk(question, answer, system=system), thinking)
    system = system or SYSTEM  # a row without one gets the course's
    ids, labels = sample["input_ids"], sample["labels"]
    assert len(ids) == len(labels) < formatter["MAX_LENGTH"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    opening = "\n<think></think>\n" if thinking else "\n"
    assert tokenizer.decode(labels[start:]) == f"{opening}{answer.strip()}<|user|>"  # once begun, nothing is left out
    assert labels[start:] == ids[start:]
    assert labels[-1] == formatter["user_token"]
    asked = question + ("" if thinking else "/nothink")
    assert tokenizer.decode(ids[:start]) == (
        f"[gMASK]<sop><|system|>\n{system}<|user|>\n{asked}<|assistant|>" + ("" if thinking else "\n<think></think>")
    )
    assert ids.count(formatter["user_token"]) == 2
    if not thinking:  # notebook 06 asks with the very prompt
        assert asking(system, [{"role": "user", "content": question}]) == ids[:start]


def test_the_template_strips_an_answer_as_the_formatter_does(formatter, tokenizer):
    for space in " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u2029\u3000":
        row = talk("问", f"{space}答{space}案{space}", system="系")
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False, enable_thinking=False)
        (sample,) = formatter["tokenize"](row)
        assert tokenizer.decode(sample["input_ids"]) == f"{whole}<|user|>"


@pytest.fixture
def saved(formatter, cell, tmp_path, capsys):
    """What notebook 04's cells on all rows make of them, and what they print."""

    def make(**parts: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
        for name, rows in parts.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        space = formatter | {"rows_folder": tmp_path, "json": json}
        exec(cell("04_chat_template", "def all_samples"), space)
        exec(cell("04_chat_template", "parts, cut"), space)
        return space["parts"], capsys.readouterr().out

    return make


def test_a_cut_sample_has_no_terminator(formatter, saved):
    labels = saved(train=[talk("问", "长" * 5000)])[0]["train"][0]["labels"]
    assert len(labels) == formatter["MAX_LENGTH"]
    assert labels.count(formatter["user_token"]) == 0


def test_a_row_with_a_thought_is_trained_with_thinking_on(saved, tokenizer):
    thoughtful = talk("问", "答")
    thoughtful["messages"][1]["reasoning_content"] = "想"
    parts, _ = saved(train=[talk("问", "答"), thoughtful])
    texts = [tokenizer.decode([i for i in row["labels"] if i != -100]) for row in parts["train"]]
    assert texts == ["\n答<|user|>", "\n<think>想</think>\n答<|user|>"]
    assert "/nothink" not in tokenizer.decode(parts["train"][1]["input_ids"])


def test_notebook_04_names_the_rows_whose_answers_were_cut(saved):
    rows = load_rows(CASES / "long_rows_40.json")
    _, said = saved(train=[*rows[:3], talk("你是谁？", "我是甄嬛。")], new_answers=rows[3:5])
    assert "longest sample: 1024 tokens; samples that lost their terminator: 5" in said
    assert "Shorten or split them in your file:" in said
    assert all(row["messages"][-2]["content"][:30] in said for row in rows[:5])
    assert "你是谁" not in said
