"""The pages in docs/ and the instructor's guide say what the code, the notebooks and the measurements say."""

import ast
import json
import re
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import go_or_no_go
import messages
import pytest
from conftest import ROOT

import utils
from course import download, swanlab_record, widgets
from course.model_folder import model_folder
from course.rows import load_rows
from finetune import checkpoint, lora, packing, planner, resume
from finetune.machine import Machine

TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GOOD = {"instruction": "你是谁？", "input": "", "output": "我是甄嬛。"}

#: Printed inside an `if` in a notebook, or by train.py, and no notice: what a cell found out.
RESULTS = {
    "fetched again: ‹›",
    "‹›: ‹› bytes sent, starting at byte ‹›",
    "‹›: ‹› points in SwanLab, the same as in the notebook: ‹›",
    "step ‹›/‹›",
    "trainable parameters: ‹›",
    "‹› s of training; adapter in ‹›",
    "‹› tensors changed; the checkpoint is in ‹›",
    "pictures by name: ‹› answers at steps: ‹›",
    "✓ right",
    "merged model and adapter give the same answer: ‹›",
    "other experts by rounding: ‹› of the tokens",
    "‹›: the loss is the table's: ‹›",
    "on the disk less than 50 MiB: ‹›",
    # exercises
    "‹› bits: ‹› GiB of weights, ‹› GiB with 15 % on top",
    "‹› GiB: ‹›",
    "‹› bytes: ‹›",
    "‹› rows repeated: ‹› saved",
    "base : ‹› cost ‹›",
    "adapter: ‹› cost ‹›",
    "eval_new_wordings_loss: lowest at ‹›; of ‹› at ‹›",
    "in_role : ‹›",
    "stricter: ‹›",
    "learning rate ‹›: perplexity ‹›",
    "at most ‹› tokens a sample: ‹› rows of 128 tokens",
    "rank ‹›: ‹› personas, ‹› on two GPUs in Q8_0",
}


def rows_of_tables(text: str) -> list[list[str]]:
    """The cells of every table row of a page, heads and rules left out."""
    lines = [line.strip() for line in text.splitlines()]
    found = []
    for number, line in enumerate(lines):
        if line.startswith("|") and not re.fullmatch(r"[|:\- ]+", line):
            head = number + 1 < len(lines) and re.fullmatch(r"[|:\- ]+", lines[number + 1])
            if not head:
                found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
    return found


def entries(page: str) -> list[str]:
    """The course's own messages on a page, as it spells them: first cells that are one piece of code."""
    return [row[0][1:-1] for row in rows_of_tables(page) if re.fullmatch(r"`[^`]+`", row[0])]


def differences(page: str, said: set[str]) -> tuple[set[str], set[str]]:
    """What the code says and the page does not explain, and what the page explains and the code does not say."""
    explained = {messages.tidy(re.sub("‹[^›]*›", messages.HOLE, entry)) for entry in entries(page)}
    return said - RESULTS - explained, explained - said


# ------------------------------------------------------------------------------------------ troubleshooting


def test_the_page_explains_what_the_code_says_and_nothing_else():
    said = set(messages.collect())
    assert said >= RESULTS, "a result that no cell prints any more: take it out of RESULTS"
    missing, stale = differences(TROUBLE, said)
    assert not missing, "docs/troubleshooting.md does not explain these"
    assert not stale, "docs/troubleshooting.md explains these, and nothing says them any more"
    assert len(entries(TROUBLE)) == len(set(entries(TROUBLE)))


def test_a_message_without_an_entry_and_an_entry_without_a_message_are_named():
    said = set(messages.collect())
    assert differences(TROUBLE, said | {"‹›: a new fault. Change it."}) == ({"‹›: a new fault. Change it."}, set())
    gone = "‹›: no such file. Check COURSE_DATA."
    assert differences(TROUBLE, said - {gone}) == (set(), {gone})


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ('raise CourseError("change it")', {"change it"}),
        ('raise utils.CourseError(f"{name}: {n:.1f} GiB")', {"‹›: ‹› GiB"}),
        ('why = "no disk" if x else "no net"\nraise CourseError(f"{why}. Stop.")', {"no disk. Stop.", "no net. Stop."}),
        ('more = ", and more" if x else ""\nraise CourseError("too many" + more)', {"too many‹›"}),
        ('def f(x):\n    raise ValueError(f"{x} is {y}")', {"‹› is ‹›"}),
        ('raise CourseError(say("{a} is {b} {{!}}.", a=x, b=say("too small")))', {"‹› is too small {!}."}),
        ('if x:\n    m = "left"\n    raise E(m + " early")\nm = "went on"\nraise E(m)', {"left early", "went on"}),
        ('m = "one thing"\nif x:\n    m = "another thing"\nraise E(m)', {"one thing", "another thing"}),
        ('m = "old text"\nm = "new text"\nraise E(m)', {"new text"}),
        ('assert x, f"no {y} here"\nassert z', {"no ‹› here"}),
        ('print("in no if")\nif x:\n    print("resuming from", y or z)', {"resuming from ‹›"}),
        ('raise CourseError(f"{a}{b}")', set()),
        ('"""A docstring."""\nx = "not said"', set()),
    ],
)  # fmt: skip
def test_messages_are_read_from_code(code, said):
    assert messages.Code(code).messages(printed=ast.If) == said


def test_the_symptoms_of_the_failure_lab_are_those_of_its_summary():
    cells = json.loads((ROOT / "notebooks/en/07_failure_lab.ipynb").read_text(encoding="utf-8"))["cells"]
    (summary,) = (text for cell in cells if (text := "".join(cell["source"])).startswith("## Summary"))
    wanted = [(row[1], row[0]) for row in rows_of_tables(summary)]
    table = TROUBLE.split("| symptom | section of 07 |")[1].split("\n\n")[0]
    assert len(wanted) == 9
    assert [tuple(row) for row in rows_of_tables(table)] == wanted


def best_entry(said: str) -> str:
    """The entry of the page that says most of a real message; before it may be a file, a model or a row."""
    said, found = said.splitlines()[-1], {"": 0}  # the rows of a data file have a line each
    for entry in entries(TROUBLE):
        parts = re.split("‹[^›]*›", entry)
        if re.search(".*".join(map(re.escape, parts)) + "$", said):
            found[entry] = len("".join(parts))
    return max(found, key=lambda entry: found[entry])


def said_by(act, capsys) -> str:
    """What is raised, or else printed."""
    try:
        act()
    except (utils.CourseError, ValueError) as error:
        return str(error)
    return capsys.readouterr().out.strip()


DATA = {
    "The file is empty": b" ",
    "It holds zero bytes": b'[{"instruction": "a\x00b"}]',
    "not UTF-8": b"[\xff",
    "is in doubt": "caf\u00e9".encode("latin-1") + b" x",
    "as its first bytes say": "你好".encode("utf-16") + b"x",
    "it was read as": json.dumps([GOOD], ensure_ascii=False).encode("gbk"),
    "and was read so": json.dumps([GOOD]).encode("utf-16"),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "a spreadsheet": b"PK\x03\x04 xl/workbook.xml",
    "an archive": b"PK\x03\x04",
    "an image or a PDF": b"%PDF-1.7",
    "a pickle": b"\x80\x04\x95",
    "weights of a model": b"GGUF",
    "an Arrow file": b"ARROW1",
    "binary, not text": bytes(range(32)),
    "a parquet file that cannot": b"PAR1",
    "is a table in columns": b'{"instruction": ["a"], "output": ["b"]}',
    "is a table whose columns": b'{"instruction": ["a"], "output": ["b", "c"]}',
    "has more cells than": b"instruction,output\na,b,c",
    "not a table": b'instruction,output\na,"b',
    "the rows are the list under": json.dumps({"data": [GOOD]}).encode(),
    "holds several lists": json.dumps({"a": [GOOD], "b": [GOOD]}).encode(),
    "holds one object with": b'{"a": 1}',
    "This looks like a web page": b"<html>",
    "A data file begins with": b"1,2,3\n",
    "JSON Lines, but line": b'{"a": 1}\n{"a": 2,}\n',
    "Several lists or objects": b"[1] [2]",
    "Write a line break": b'[{"instruction": "a\nb"}]',
    "The file ends too early": b'[{"instruction": "a"',
    "A row holds three texts": b"[" * 100_000,
    "Often a comma": b'[{"a": 1,}]',
    "holds an empty list": b"[]",
    "holds one ‹kind›": b"3",
    "is ‹kind›, not an object": b'["a"]',
    "holds no turns": b'[{"messages": [{"role": "system", "content": "a"}]}]',
    "has the role": b'[{"messages": [{"role": "critic", "content": "a"}]}]',
    "a conversation begins with": b'[{"messages": [{"role": "assistant", "content": "a"}]}]',
    "ends with the user": b'[{"messages": [{"role": "user", "content": "a"}]}]',
    "has the keys": b'[{"messages": [{"text": "a"}]}]',
    "keep one of them": json.dumps([{**GOOD, "messages": [1]}]).encode(),
    "rename the one that is it": b'[{"query": "a", "prompt": "b", "output": "c"}]',
    "is read as": b'[{"query": "a", "output": "c"}]',
    "has no field": b'[{"instruction": "a", "input": ""}]',
    "occurs twice: keep": b'[{"instruction": "a", "input": "", "output": "b", "output": "c"}]',
    "not text: put it": b'[{"instruction": "a", "input": "", "output": 3}]',
    "is empty: write it": b'[{"instruction": "a", "input": "", "output": " "}]',
    "holds U+‹number› (": rb'[{"instruction": "a", "input": "", "output": "\ud83d"}]',
    "at place ‹n›: delete it": rb'[{"instruction": "a", "input": "", "output": "\u0000b"}]',
    "characters, ‹limit› at most": json.dumps([{**GOOD, "output": "长" * 20_001}]).encode(),
    "is not used": json.dumps([{**GOOD, "topic": "x"}]).encode(),
    "begins with a byte order mark": b"\xef\xbb\xbf" + json.dumps([GOOD]).encode(),
}


@pytest.mark.parametrize("entry", DATA)
def test_a_faulty_data_file_is_on_the_page(tmp_path, capsys, entry):
    (tmp_path / "mine.json").write_bytes(DATA[entry])
    assert entry in best_entry(said_by(lambda: load_rows(tmp_path / "mine.json"), capsys))


@pytest.mark.parametrize(
    ("error", "entry"),
    [
        (OSError(28, "full"), "the disk is full"),
        (ConnectionError("x"), "the connection broke off"),
        (RuntimeError("odd"), "‹model›: ‹kind of error›."),
        ("NotExistError", "the hub knows no such model"),
        ("PermissionDeniedError", "the hub asks who you are"),
        ("FileIntegrityError", "what arrived is not"),
        ("ServerError", "the hub is in trouble"),
    ],
)
def test_a_failed_download_is_on_the_page(capsys, error, entry):
    from modelscope_hub import errors

    def fail():
        with download.download_errors("owner/name"):
            raise getattr(errors, error)("x") if isinstance(error, str) else error

    assert entry in best_entry(said_by(fail, capsys))


def learner(monkeypatch, **variables) -> utils.Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return utils.settings()


def model_of(folder, *names, kind="glm4_moe"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def full(gpus=1, gib=24.0, disk=500.0, **how):
    return planner.plan(machine=Machine(gpus, gib, "H100", 64, disk), **how).require_fit


def stopped(tmp_path, error):
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        state=SimpleNamespace(global_step=3, max_steps=9),
        add_callback=lambda one: None,
        remove_callback=lambda one: None,
    )
    with resume.stoppable(trainer):
        raise error


def torn(tmp_path):
    (tmp_path / "checkpoint-50").mkdir()
    resume.newest_checkpoint(tmp_path)


CASES = {
    "is unknown. Use one of": lambda t, m: learner(m, SWANLAB_MODE="clowd"),
    "SWANLAB_PROJECT is set": lambda t, m: learner(m, SWANLAB_PROJECT="x"),
    "no folder there, and no model id": lambda t, m: model_folder(learner(m, COURSE_MODEL="a/b/c")),
    "is not on this machine yet": lambda t, m: model_folder(learner(m, COURSE_MODEL="a/b", COURSE_OUTPUT=t)),
    "no config.json there": lambda t, m: model_folder(learner(m, COURSE_MODEL=t)),
    "The course is made for": lambda t, m: model_folder(learner(m, COURSE_MODEL=model_of(t, kind="qwen3"))),
    "no *.safetensors there": lambda t, m: model_folder(learner(m, COURSE_MODEL=model_of(t, "model.bin"))),
    "is not there yet": lambda t, m: utils.require(t / "rows", "03_dataset", learner(m)),
    "no such file. Check COURSE_DATA; ": lambda t, m: load_rows(t / "nowhere.json"),
    "a folder, not a file": lambda t, m: load_rows(t),
    "no local SwanLab run": lambda t, m: swanlab_record.recorded(t, "train/loss"),
    "There is no checkpoint yet": lambda t, m: stopped(t, KeyboardInterrupt()),
    "The disk is full: free some of it": lambda t, m: stopped(t, OSError(28, "No space left on device")),
    "was not written to its end": lambda t, m: torn(t),
    "SwanLab records in": lambda t, m: swanlab_record.log_folder(model_of(t) / "config.json"),
    "does not answer": lambda t, m: print(
        m.setenv("SWANLAB_API_HOST", "http://127.0.0.1:1") or swanlab_record.cloud_trouble()
    ),
    "○ open": lambda t, m: utils.check(...),
    "✗ not yet": lambda t, m: utils.check(3, (lambda a: a > 3, "more")),
    "a label belongs to each token": lambda t, m: widgets.mask_view(None, [1], []),
    "no such group": lambda t, m: lora.lora_config(8, ("head",)),
    "peft refuses dropout": lambda t, m: lora.attach(None, SimpleNamespace(lora_dropout=1, target_parameters=[1])),
    "shards are missing": lambda t, m: checkpoint.check_shards(t),
    "is cut short or damaged": lambda t, m: checkpoint.shard_header(model_of(t) / "config.json"),
    "no adapter_config.json": lambda t, m: lora.load_adapter(None, t),
    "Packed attention got a batch": lambda t, m: packing.packed_attention(None, None, None, None, None, 1.0),
    "This needs ‹n› GiB on each device": lambda t, m: full()(),
    "processes were started for": lambda t, m: full(processes=2)(),
    "Three checkpoints take": lambda t, m: full(gib=300.0, disk=1.0)(),
}


@pytest.mark.parametrize("entry", CASES)
def test_a_message_that_is_provoked_is_on_the_page(tmp_path, monkeypatch, capsys, entry):
    assert entry in best_entry(said_by(lambda: CASES[entry](tmp_path, monkeypatch), capsys))


@pytest.mark.parametrize(
    ("gpus", "gib", "rank", "entry"),
    [
        (4, 80.0, 8, "This would fit in ‹n› GiB: ‹command›."),
        (1, 24.0, 8, "would do (‹n› GiB each)."),
        (1, 24.0, 4096, "Nothing up to 16 GPUs"),
    ],
)
def test_the_advice_of_a_plan_is_on_the_page(gpus, gib, rank, entry):
    machine = Machine(gpus, gib, "H100", 64, 99_999)
    advice = planner.plan(recipe=planner.Recipe(lora_rank=rank), machine=machine).advice
    assert entry in best_entry(advice), advice


# ------------------------------------------------------------------------------------------------- glossary

GLOSSARIES = {
    "en": (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"),
    "zh": (ROOT / "docs" / "glossary.zh-CN.md").read_text(encoding="utf-8"),
}


class Entry(NamedTuple):
    """A row of a glossary: its English and Chinese names, what they mean, the notebook they are first in, the rest."""

    english: str
    chinese: str
    meaning: str
    notebook: str
    variants: list[str]

    def names(self, language: str) -> list[str]:
        """What a text of the language calls it."""
        return [self.english] if language == "en" else self.chinese.split("、")


def entries_of(language: str) -> list[Entry]:
    """The rows of a glossary in their order; the Chinese one has the Chinese name first."""
    rows = [row for row in rows_of_tables(GLOSSARIES[language]) if len(row) == 5]
    turned = [row if language == "en" else [row[1], row[0], *row[2:]] for row in rows]
    return [Entry(*row[:4], [name for name in re.split("; |；", row[4]) if name]) for row in turned]


def word(term: str) -> re.Pattern[str]:
    """A term as a whole word, in any case, hyphen or space, with the endings that English gives it."""
    if not term.isascii():
        return re.compile(re.escape(term))
    stem = re.escape(term).replace(r"\-", "[- ]").replace(r"\ ", r"[- \n]")
    return re.compile(rf"(?<![\w./-]){stem}(?:s|es|d|ed|r|rs)?(?![\w/-]|\.\w)", re.IGNORECASE)


@cache
def texts_of(language: str, kind: str) -> dict[str, str]:
    """The prose or the code of each notebook by its number, without names of files; the overview of 01 left out."""
    texts = {}
    for path in sorted((ROOT / "notebooks" / language).glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"][1 if path.name.startswith("01") else 0 :]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == kind)
        texts[path.stem[:2]] = re.sub(r"(?<=\])\([^)]*\)|\b\d\d_\w+", "", text).replace("_", " ")
    return texts


def first_use(names: list[str], language: str) -> str:
    """The first notebook whose text uses one of the names, else whose code does."""
    for kind in ("markdown", "code"):
        for number, text in texts_of(language, kind).items():
            if any(word(name).search(text) for name in names):
                return number
    return "nowhere"


#: Characters that are in too many words of Chinese: where such a term is first used, only the English text can tell.
SINGLE = ("步", "轮")
BOTH = [(language, one) for language in GLOSSARIES for one in entries_of(language)]


@pytest.mark.parametrize(("language", "entry"), BOTH, ids=[f"{language}-{one.english}" for language, one in BOTH])
def test_a_term_is_first_used_where_the_glossary_says(language, entry):
    names = entry.names(language)
    names += [name for name in entry.variants if name.isascii()] if language == "en" else []
    found = first_use(names, language)
    if language == "zh" and entry.chinese in SINGLE:
        (found,) = (first_use([one.english], "en") for one in entries_of("en") if one.english == entry.english)
    (linked,) = re.findall(r"^\[(\d\d)\]\(\.\./notebooks/(\w\w)/(\d\d)_\w+\.ipynb\)$", entry.notebook)
    assert linked == (found, language, found)
    assert {*map(str.lower, [entry.english, *entry.chinese.split("、")])}.isdisjoint(map(str.lower, entry.variants))


def test_both_glossaries_have_the_same_terms_in_the_same_order():
    english, chinese = entries_of("en"), entries_of("zh")
    assert [one[:2] for one in english] == [one[:2] for one in chinese]
    assert len({one.english for one in english}) == len(english) > 50
    for own, other in zip(chinese, english, strict=True):
        assert set(own.variants) <= set(other.variants), own.english
        assert set(own.variants) >= {name for name in other.variants if not name.isascii()}, own.english


@pytest.mark.parametrize("entry", entries_of("zh"), ids=lambda one: one.english)
def test_the_chinese_glossary_leaves_no_english_where_there_is_chinese(entry):
    meaning = re.sub("`[^`]*`", "", entry.meaning)
    assert len(re.findall("[\u3400-\u9fff]", meaning)) >= 5
    chinese = [one.english for one in entries_of("zh") if not any(map(str.isascii, one.names("zh")))]
    assert [name for name in chinese if word(name).search(meaning)] == []
    assert not re.search("[,;:!?]|[\u3400-\u9fff]\\.", meaning), "a mark of English in a Chinese sentence"


# ------------------------------------------------------------------------------------- the instructor's guide

GUIDE = (ROOT / "workshop" / "README.md").read_text(encoding="utf-8")
ROOM = json.loads((ROOT / "workshop" / "measured_room.json").read_text(encoding="utf-8"))
HEADERS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))["metadata"]["course"]
    for path in sorted((ROOT / "notebooks" / "en").glob("*.ipynb"))
}
MINUTES = {"90 minutes": 90, "Half a day": 210, "A day": 480}


def agenda(title: str) -> list[list[str]]:
    """The rows of the agenda under a heading."""
    return rows_of_tables(re.search(rf"### {title}:.*?\n(.+?)(?=\n##)", GUIDE, re.DOTALL)[1])


@pytest.mark.parametrize("title", MINUTES)
def test_an_agenda_adds_up_and_quotes_the_headers(title):
    now = 0
    for start, what, computes, plan in agenda(title):
        assert start == f"{now // 60}:{now % 60:02}", what
        now += int(plan)
        linked = re.search(r"notebooks/en/(\w+)\.ipynb", what)
        assert computes == (str(HEADERS[linked[1]]["minutes_cpu"]) if linked else ""), what
    assert now == MINUTES[title]


def test_the_agendas_name_notebooks_in_their_order():
    for title in MINUTES:
        named = re.findall(r"notebooks/en/(\w+)\.ipynb", str(agenda(title)))
        assert named == sorted(set(named))
    assert len(named) == 9


def measured_rows() -> list[str]:
    """The table of what was measured, as it should be in the guide."""
    return [
        f"| machine | {ROOM['hardware']} |",
        f"| measured on | {ROOM['date']} |",
        f"| all eight notebooks, until the last learner ended | {ROOM['minutes']:.0f} minutes |",
        f"| of that notebook 05, the slowest learner | {ROOM['training_minutes']:.1f} minutes |",
        f"| memory of one learner at most, all processes | {ROOM['most_mib_of_one']:,} MiB |",
        f"| memory of all learners together at most | {ROOM['most_mib_together']:,} MiB |",
        f"| files of one learner | {ROOM['disk_mib_of_one']:,} MiB |",
    ]


def derived_row(learners: int) -> str:
    """A row of the table of what other rooms need, by the rule of workshop/go_or_no_go.py."""
    sizes = [f"{learners * ROOM[key] / 1024:.1f}" for key in ("most_mib_of_one", "disk_mib_of_one")]
    minutes = [f"{go_or_no_go.training_minutes(learners, cores, ROOM):.0f}" for cores in (2, 4, 8, 16)]
    return f"| {learners} learners | {' | '.join([*sizes, *minutes])} |"


def test_the_room_is_the_measured_one():
    for row in [*measured_rows(), *map(derived_row, (4, 8, 16, 32))]:
        assert row in GUIDE
    assert f"Measured: {ROOM['learners']} learners on one machine" in GUIDE
    assert f"Not tried: more than {ROOM['learners']} learners, more than {ROOM['cores']} cores" in GUIDE
    assert f"never less than the {ROOM['training_minutes_alone']} that one learner alone took" in GUIDE
    assert f"more than {go_or_no_go.LONGEST_TRAINING_MINUTES} minutes" in GUIDE


def test_the_sums_of_the_headers_are_right():
    together = sum(header["memory_mib"] for header in HEADERS.values())
    assert f"all nine together up to {together:,} MiB" in GUIDE
    largest = max(header["memory_mib"] for name, header in HEADERS.items() if name != "08_full_size")
    assert f"without it 05 is the largest, {largest:,} MiB by its header" in GUIDE
    assert HEADERS["05_lora_training"]["memory_mib"] == largest
    assert f"{sum(header['minutes_cpu'] for header in HEADERS.values()):.1f} minutes on two cores" in GUIDE


PAGES = sorted(path for folder in ("docs", "workshop", "tools") for path in (ROOT / folder).glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target
