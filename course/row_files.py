"""The bytes of a data file: which kind of file it is, in which encoding, and the rows that it holds as they are.

Reads JSON, JSON Lines, a JSON object of columns, CSV, TSV and parquet. What the rows mean is asked in `row_checks`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from course.language import say

#: The value of a key that occurs twice in one object of a data file; JSON readers keep the last one silently.
TWICE = object()
#: Keys that only a row has: an object with one of them is a row, or a table of columns.
ROW_KEYS = {"instruction", "output", "query", "prompt", "question", "response", "completion", "answer"}
ROW_KEYS |= {"messages", "conversations", "conversation"}
CHINESE = ("gb18030", "big5")
#: Others that a file without an encoding's mark may be in; they are only named, since every byte fits some of them.
OTHERS = ("shift_jis", "euc_kr", "cp1252")
#: The most frequent characters of written Chinese, simplified and traditional, and its punctuation. A wrong encoding
#: gives rare characters, so they tell whether the text makes sense.
FREQUENT = set(
    "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没"
    "日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长知什怎谁吗呢吧请问您先再给叫让"
    "這來個國說們為時會著過學對裡裏後麼還發當無開見經頭動兩長誰嗎請問給讓與從沒點樣聽話"
    "，。？！、：；“”「」《》（）…"
)


@dataclass
class Rows:
    """What a file holds.

    Attributes:
        rows: one value for each row, of any kind. said: lines about how it was read.
    """

    rows: list[Any]
    said: list[str] = field(default_factory=list)


def read_rows(raw: bytes, name: str = "") -> Rows:
    """The rows in the bytes of a data file; `name` helps to tell a table by its ending.

    Raises:
        ValueError: another kind of file, no text, in an encoding that is in doubt, or not well formed.
    """
    if raw.startswith(b"PAR1"):
        return Rows(_parquet(raw), [say("is a parquet table, read row by row.")])
    if trouble := other_kind(raw, name):
        raise ValueError(trouble)
    text, said = decoded(raw)
    if separator := _separator(text, name):
        return Rows(_table(text, separator), said)
    rows, how = _listed(parse(text))
    return Rows(rows, [*said, *how])


# ------------------------------------------------------------------------------------------ kinds of files


def other_kind(raw: bytes, name: str = "") -> str:
    """What a file is that holds no rows as text, by its first bytes, with what to do; empty for text."""
    head, zipped = raw[:4096], raw.startswith(b"PK\x03\x04")
    old_excel = raw.startswith(b"\xd0\xcf\x11\xe0")
    sheet = zipped and any(part in raw for part in (b"xl/workbook", b"opendocument.spreadsheet"))
    packed = (b"PK\x03\x04", b"\x1f\x8b", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\x28\xb5\x2f\xfd")
    image = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"%PDF-", b"II*\0", b"MM\0*")
    cures = {
        say("a Git LFS pointer, not the file itself. Fetch it: git lfs pull"): (
            head.startswith(b"version https://git-lfs.github.com/spec/")
        ),
        say(
            "a spreadsheet. Save it as CSV UTF-8 in its program, or: pip install openpyxl xlrd odfpy && "
            "python -c \"import pandas; pandas.read_excel('{file}').to_csv('rows.csv', index=False)\"",
            file=name,
        ): (sheet or old_excel),
        say("a pickle, which can run code when it is opened. Have it saved as JSON by whoever made it."): (
            re.match(rb"\x80[\x02-\x05]", head) or (zipped and b"data.pkl" in head)
        ),
        say("an archive. Unpack it, then name the file in it."): head.startswith(packed) or head[257:262] == b"ustar",
        say("an image or a PDF, not text. Rows are text: JSON, JSON Lines, CSV or parquet."): (
            head.startswith(image) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        ),
        say("weights of a model, not rows. COURSE_DATA names the data, COURSE_MODEL the model."): (
            head.startswith((b"GGUF", b"GGML")) or (b"\0" in head[2:8] and head[8:9] == b"{")
        ),
        say("an Arrow file. Save it as parquet: dataset.to_parquet('rows.parquet')"): (
            head.startswith((b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"))
        ),
        say("binary, not text. Rows are text: JSON, JSON Lines, CSV or parquet."): (
            _bits(head) is None and len(re.findall(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head)) > len(head) // 50 + 1
        ),
    }
    return next((cure for cure, fits in cures.items() if fits), "")


def _parquet(raw: bytes) -> list[Any]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(
            say(
                "a parquet file that cannot be read ({why}): copy or download it again.",
                why=str(error).splitlines()[0][:80],
            )
        ) from None


# ------------------------------------------------------------------------------------------------ encodings


def _bits(raw: bytes) -> str | None:
    """UTF-16 or UTF-32, where a mark or the zero bytes of the first characters say so."""
    found, marks = json.detect_encoding(raw[:4]), (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
    letters = raw[:4].replace(b"\0", b"").decode("latin-1")
    plain = bool(letters) and all(letter.isprintable() or letter.isspace() for letter in letters)
    return found if not found.startswith("utf-8") and (raw.startswith(marks) or plain) else None


def decoded(raw: bytes) -> tuple[str, list[str]]:
    """The text of the bytes, and a line where that needs one.

    Raises:
        ValueError: no UTF, and not Chinese without doubt.
    """
    if wide := _bits(raw):
        try:
            return raw.decode(wide).removeprefix("\ufeff"), [say("is {encoding}, and was read so.", encoding=wide)]
        except UnicodeDecodeError as error:
            raise ValueError(
                say(
                    "not {encoding}, as its first bytes say (byte {byte}). Save it again as UTF-8.",
                    encoding=wide,
                    byte=error.start,
                )
            ) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.start
    else:
        marked = raw.startswith(b"\xef\xbb\xbf")
        return text, [say("begins with a byte order mark, which is skipped.")] if marked else []
    fitting = {one: text for one in (*CHINESE, *OTHERS) if (text := _strictly(raw, one))}
    likely = sorted(((_sense(text), one) for one, text in fitting.items() if one in CHINESE), reverse=True)
    if likely and likely[0][0] >= 0.2 and all(sense < likely[0][0] / 3 for sense, _ in likely[1:]):
        encoding = likely[0][1]
        return fitting[encoding], [
            say("is no UTF-8; it was read as {encoding}, in which it makes sense.", encoding=encoding.upper())
        ]
    line = raw.count(b"\n", 0, wrong) + 1
    damaged = raw.decode("utf-8", "replace")
    if damaged.count("\ufffd") * 10 <= sum(ord(letter) > 127 for letter in damaged) or not fitting:
        raise ValueError(say("not UTF-8 (line {line}, byte {byte}). Save it again as UTF-8.", line=line, byte=wrong))
    named = [one.upper() for one in fitting]
    raise ValueError(
        say(
            "not UTF-8 (line {line}, byte {byte}), and which encoding it is, is in doubt; {fitting} would fit. "
            "Save it again as UTF-8, or: iconv -f {first} -t UTF-8",
            line=line,
            byte=wrong,
            fitting=", ".join(named),
            first=named[0],
        )
    )


def _strictly(raw: bytes, encoding: str) -> str:
    """The text in that encoding; empty where a byte does not fit, or gives a character without a meaning."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return ""
    return "" if re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]", text) else text


def _sense(text: str) -> float:
    """Which share of the characters beyond ASCII are among the frequent ones of Chinese."""
    beyond = [letter for letter in text if ord(letter) > 127]
    return sum(letter in FREQUENT for letter in beyond) / max(len(beyond), 4)


# ------------------------------------------------------------------------------------------------------ JSON


def parse(text: str) -> Any:
    """The JSON in a text, JSON Lines as a list; a key that occurs twice in an object has the value `TWICE`.

    Raises:
        ValueError: neither, with a hint at what it may be.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = {key: TWICE for key, count in Counter(key for key, _ in pairs).items() if count > 1}
        return dict(pairs) | twice

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: a number may have too many digits
        where, start = str(error).split(" (char")[0].split(";")[0], text.lstrip()[:1]
        pos = getattr(error, "pos", -1)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and start == "{" and _object(lines[0][1]):
        rows = []
        for number, line in lines:
            try:
                rows.append(json.loads(line, object_pairs_hook=once))
            except (ValueError, RecursionError) as error:
                why = re.sub(r": line 1 column (\d+).*", r", column \1", str(error))
                raise ValueError(
                    say(
                        "JSON Lines, but line {line} is not JSON ({why}). One row a line: correct that one.",
                        line=number,
                        why=why,
                    )
                ) from None
        return rows
    hints = {
        say("It holds zero bytes, which no text does: write it again."): "\0" in text,
        say("The file is empty. Write [ {{...}}, {{...}} ]."): not start,
        say("This looks like a web page: download the file itself."): start == "<",
        say("A data file begins with [ or {{ ; a table needs a first line with the names instruction,input,output."): (
            start not in "[{"
        ),
        say("Several lists or objects follow each other: put them into one list, with commas between the rows."): (
            "Extra data" in where
        ),
        say(r"Write a line break in a text as \n; delete other control characters."): "Invalid control" in where,
        say("The file ends too early: copy or download it again, or write what is missing."): (
            where.startswith("Unterminated") or pos >= len(text.rstrip())
        ),
        say("A row holds three texts in double quotes: no lists in lists, no numbers."): pos < 0,
        say("Often a comma too many or too few, a missing bracket, or ' in the place of a double quote."): True,
    }
    hint = next(hint for hint, fits in hints.items() if fits)
    raise ValueError(say("not JSON ({where}). {hint}", where=where, hint=hint))


def _object(line: str) -> bool:
    """Whether one line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _listed(value: Any) -> tuple[list[Any], list[str]]:
    """The rows in what a JSON file holds: a list, columns, a list under a key, one row; and a line about it.

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, list) and value:
        return value, []
    if not isinstance(value, dict) or not value:
        kind = say("an empty list") if value == [] else say("one {kind}", kind=type(value).__name__)
        raise ValueError(say("holds {kind}, not a list of rows. Write [ {{...}}, {{...}} ].", kind=kind))
    if ROW_KEYS & value.keys():
        if (rows := _columns(value)) is not None:
            return rows, [say("is a table in columns, read row by row.")]
        return [value], []
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):  # pandas, orient="split"
        rows = [dict(zip(value["columns"], one, strict=False)) for one in value["data"] if isinstance(one, list)]
        return rows, [say("is a table in columns, read row by row.")]
    if all(isinstance(one, dict) and ROW_KEYS & one.keys() for one in value.values()):  # pandas, orient="index"
        return list(value.values()), []
    lists = [key for key, one in value.items() if isinstance(one, list) and one and isinstance(one[0], dict)]
    if len(lists) == 1:
        return value[lists[0]], [say("the rows are the list under {key!r}.", key=lists[0][:30])]
    if lists:
        raise ValueError(
            say(
                "holds several lists ({keys}). Save the one with your rows as a file of its own.",
                keys=", ".join(repr(key[:30]) for key in lists[:5]),
            )
        )
    raise ValueError(
        say(
            "holds one object with {keys}, not a list of rows. Write [ {{...}}, {{...}} ].",
            keys=", ".join(repr(key[:30]) for key in list(value)[:5]),
        )
    )


def _columns(table: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table that holds a list, or an object of numbered values, for each column; None for no table.

    Raises:
        ValueError: the columns have different lengths.
    """
    columns = {key: list(one.values()) if isinstance(one, dict) else one for key, one in table.items()}
    if not all(isinstance(one, list) and one for one in columns.values()):
        return None
    if all(isinstance(one, list) and isinstance(one[0], dict) for one in table.values()):
        return None  # the turns of one conversation
    lengths = {key: len(one) for key, one in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            say(
                "is a table whose columns have different lengths ({lengths}). Save it again, complete.",
                lengths=", ".join(f"{key[:30]!r} {size}" for key, size in lengths.items()),
            )
        )
    return [dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True)]


# ----------------------------------------------------------------------------------------------------- tables


def _separator(text: str, name: str) -> str:
    """What divides the cells of a table; empty where the text is none."""
    head = text.lstrip().split("\n", 1)[0].strip()
    counts = {sign: head.count(sign) for sign in ",\t;"}
    best = max(counts, key=lambda sign: counts[sign])
    names = {cell.strip().strip('"').lower() for cell in head.split(best)}
    if name.lower().endswith((".csv", ".tsv")) and head[:1] not in ("[", "{", ""):
        return best if counts[best] else ("\t" if name.lower().endswith(".tsv") else ",")
    return best if counts[best] and len(names & ROW_KEYS) > 1 else ""


def _table(text: str, separator: str) -> list[dict[str, Any]]:
    """The rows of a CSV, under the names of its first line; empty rows at the end, as Excel leaves them, left out.

    Raises:
        ValueError: a row with more cells than there are names, or a quote that is not closed.
    """
    reader = csv.DictReader(io.StringIO(text.lstrip(), newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        for number, row in enumerate(reader, 1):
            if None in row:
                raise ValueError(
                    say(
                        "row {number} (line {line}) has more cells than the first line has names: quote its commas.",
                        number=number,
                        line=reader.line_num,
                    )
                )
            rows.append({key.strip(): cell for key, cell in row.items()})
    except csv.Error as error:
        raise ValueError(
            say(
                "not a table: {why} (line {line}). Put texts with commas or line ends into double quotes.",
                why=error,
                line=reader.line_num,
            )
        ) from None
    while rows and not any(rows[-1].values()):
        rows.pop()
    if not rows:
        raise ValueError(
            say("holds {kind}, not a list of rows. Write [ {{...}}, {{...}} ].", kind=say("an empty list"))
        )
    return rows
