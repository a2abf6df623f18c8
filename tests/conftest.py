import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("", "tools", "workshop", "tests/support", "tests")]
LANGUAGE = os.environ.get("COURSE_LANGUAGE") or "en"  # for those that execute notebooks; helpers are tested in English
for name in [n for n in os.environ if n.startswith(("COURSE_", "SWANLAB_"))]:
    del os.environ[name]
pytest_plugins = ["fault_table"]


@pytest.fixture(scope="session", autouse=True)
def around_proxies():
    """Servers of the tests listen on this machine, whatever proxy it has."""
    from course import download

    with download.around_proxies():
        yield


@pytest.fixture(scope="module")
def no_gpu():
    """The tests of a module run on the processor, also where there is a GPU."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "models" / "glm4-moe-mini")


@pytest.fixture(scope="session")
def cell() -> Callable[[str, str], str]:
    """The source of the one code cell of a notebook that holds a text."""

    def find(notebook: str, text: str) -> str:
        path = ROOT / "notebooks" / "en" / f"{notebook}.ipynb"
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and text in "".join(c["source"])]
        assert len(found) == 1, f"{notebook}: {len(found)} cells hold {text!r}"
        return found[0]

    return find
