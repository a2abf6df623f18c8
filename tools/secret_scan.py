r"""Finds keys, tokens and private keys in text: in tracked files, in notebooks with their outputs, in logs.

detect-secrets 1.5.0 was tried first: it has no pattern for ModelScope tokens, and of keys that stand in a notebook's
cell or output it found none that is only assigned to a name (its keyword search does not see through JSON's `\"`).
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

_VALUE = r"(?P<value>[A-Za-z0-9_+/.\-]{16,})"
PATTERNS = {
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "ModelScope token": re.compile(r"\bms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,})"),
    "AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "key of the form sk-": re.compile(r"\bsk-[A-Za-z0-9_\-]{32,}"),
    "private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "password in an address": re.compile(r"\w://[^/\s:@\"']+:(?P<value>[^/\s:@\"'{}$]{6,})@"),
    # SwanLab's keys have no prefix of their own; the name before them gives them away, as it does others.
    "assigned secret": re.compile(
        r"(?i)(?:api_?key|access_?key|token|secret|passw(?:or)?d)[\w-]{0,12}[\\\"'\]\s]{0,8}[=:(][\\\"'\s]{0,6}"
        + _VALUE
    ),
}
LARGEST = 30_000_000


def secrets(text: str) -> Iterator[tuple[int, str]]:
    """Line number (from 1) and kind of each secret in a text; the secret itself is not given on."""
    for kind, pattern in PATTERNS.items():
        for found in pattern.finditer(text):
            if kind == "assigned secret" and not _looks_random(found["value"]):
                continue
            yield text.count("\n", 0, found.start()) + 1, kind


def _looks_random(value: str) -> bool:
    """Whether a value is more like a key than like a name: many changes between small, capital and digit."""
    kinds = ["0" if c.isdigit() else "A" if c.isupper() else "a" if c.islower() else "." for c in value]
    changes = sum(one != other for one, other in itertools.pairwise(kinds) if "." not in one + other)
    return len(set(value)) >= 8 and changes / (len(value) - 1) >= (0.25 if "0" in kinds else 0.45)


def tracked(root: Path) -> list[Path]:
    """The files that git keeps, and those that it would not ignore."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    return [root / name for name in names if name and (root / name).is_file()]


def scan(paths: Iterable[Path]) -> list[str]:
    """One line (file, line number, kind) for each secret in the files."""
    found = []
    for path in paths:
        if path.stat().st_size > LARGEST or path.suffix in (".safetensors", ".png"):
            continue
        # A database of SwanLab holds text between its bytes, so what is no text is read too.
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path.name}:{line}: {kind}" for line, kind in secrets(text)]
    return found
