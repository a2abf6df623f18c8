"""Keeps `tests/faults/README.md`: which fault was injected how, what happened, and what was lost.

A test asks for the fixture `fault` and, after its own assertions, says `fault.record(area, fault, injected, happened)`.
At the end of a session, what was recorded is compared with the table; `pytest tests --write-faults` writes it. So a
row cannot outlive its test, and no test can record what the table does not say. Nothing that varies from run to run
(times, bytes, ports) belongs in a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS / "faults" / "README.md"
HEAD = ("area", "fault", "how it was injected", "what happened", "lost", "test")
INTRODUCTION = """# Faults

Written by the tests (`pytest tests --write-faults`) and compared with what they find in every run.

"""

Row = tuple[str, ...]


@dataclass
class Recorder:
    """What the tests of one session recorded.

    Attributes:
        rows: the rows. ran: test files that were run, with whether every test of theirs ran and passed.
    """

    rows: set[Row] = field(default_factory=set)
    ran: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """The fixture's value: records rows for one test."""

    recorder: Recorder
    test: str

    def record(self, area: str, fault: str, injected: str, happened: str, lost: str = "nothing") -> None:
        """Add a row; call it when everything it says has been asserted."""
        cells = (area, fault, injected, happened, lost, self.test)
        self.recorder.rows.add(tuple(" ".join(cell.split()).replace("|", "\\|") for cell in cells))


def named(path: Path) -> str:
    """How the table names a test file: by its path below tests/, since two folders may hold files of one name."""
    return path.relative_to(TESTS).as_posix() if path.is_relative_to(TESTS) else path.name


def render(rows: Iterable[Row]) -> str:
    """The table as markdown, rows sorted."""
    lines = [HEAD, tuple("---" for _ in HEAD), *sorted(rows)]
    return INTRODUCTION + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read(text: str) -> set[Row]:
    """The rows of a rendered table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return {tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in lines}


def differences(stored: set[Row], recorder: Recorder) -> list[str]:
    """One line for each row that was recorded and is not stored, or is stored and its test file no longer records."""
    whole = {name for name, complete in recorder.ran.items() if complete}
    new = [f"not in the table: {' | '.join(row)}" for row in sorted(recorder.rows - stored)]
    return new + [f"no longer true: {' | '.join(row)}" for row in sorted(stored - recorder.rows) if row[-1] in whole]


def merged(stored: set[Row], recorder: Recorder) -> set[Row]:
    """The stored rows with those of every test file that ran replaced by what it recorded."""
    whole = {name for name, complete in recorder.ran.items() if complete}
    return {row for row in stored if row[-1] not in whole} | recorder.rows


# ----------------------------------------------------------------------------------- hooks and the fixture

RECORDER = pytest.StashKey[Recorder]()
FOUND = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-faults", action="store_true", help="write tests/faults/README.md anew")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDER] = Recorder()


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    return Fault(request.config.stash[RECORDER], named(request.node.path))


def pytest_collection_finish(session: pytest.Session) -> None:
    ran = session.config.stash[RECORDER].ran
    picked = any("::" in argument for argument in session.config.args)
    for item in session.items:
        if "fault" in getattr(item, "fixturenames", ()):
            ran.setdefault(named(item.path), not picked)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[RECORDER].ran[named(item.path)] = False


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = (yield).get_result()
    if "fault" in getattr(item, "fixturenames", ()) and (report.failed or report.skipped):
        item.config.stash[RECORDER].ran[named(item.path)] = False


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist has ended: what it recorded counts, and a file is whole if it is so in every worker."""
    recorder, found = node.config.stash[RECORDER], getattr(node, "workeroutput", {}).get("faults")
    if not found:  # it crashed
        recorder.ran = dict.fromkeys(recorder.ran, False)
        return
    recorder.rows |= set(map(tuple, found["rows"]))
    recorder.ran = {name: recorder.ran.get(name, True) and whole for name, whole in found["ran"].items()}


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = session.config.stash[RECORDER]
    if hasattr(session.config, "workeroutput"):  # a worker hands over what it knows
        session.config.workeroutput["faults"] = {"rows": sorted(map(list, recorder.rows)), "ran": recorder.ran}
        return
    stored = read(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else set()
    if session.config.getoption("--write-faults"):
        TABLE.write_text(render(merged(stored, recorder)), encoding="utf-8")
    elif not session.config.getoption("collectonly") and (found := differences(stored, recorder)):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        session.config.stash[FOUND] = found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if found := config.stash.get(FOUND, []):
        terminalreporter.section("tests/faults/README.md is stale; look, then write it with --write-faults", red=True)
        terminalreporter.write_line("\n".join(found))
