"""Other front ends than an English JupyterLab: its Chinese interface, and commands that run a notebook alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------------------ JupyterLab's own language

#: Asks JupyterLab's server which language its pages take, and for its word for a menu.
INTERFACE = """
import sys
from pathlib import Path
from jupyterlab.commands import get_app_dir
from jupyterlab_server.settings_utils import get_settings
from jupyterlab_server.translation_utils import get_language_pack

folder = Path(get_app_dir())
plugin = "@jupyterlab/translation-extension:plugin"
found, _ = get_settings(str(folder / "settings"), str(folder / "schemas"), sys.argv[1], plugin)
locale = found["schema"]["properties"]["locale"]["default"]
locale = found["settings"].get("locale", locale)
words = get_language_pack(locale)[0].get("jupyterlab", {})
print(locale, words.get("menu\\x04File", words.get("File", ["File"]))[0])
"""


def interface(language: str, own_settings: Path) -> str:
    """The locale that JupyterLab takes when `make lab` starts it, and what the menu *File* is called there."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "JUPYTER"))}
    environment["COURSE_LANGUAGE"] = language
    commands = subprocess.run(
        ["make", "-n", "lab"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    environment["JUPYTER_CONFIG_PATH"] = re.search(r'JUPYTER_CONFIG_PATH="([^"]+)"', commands)[1]
    return subprocess.run(
        [sys.executable, "-c", INTERFACE, own_settings],
        env=environment | {"HOME": str(own_settings)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize(("language", "expected"), [("en", "en File"), ("zh", "zh_CN 文件")])
def test_jupyterlab_speaks_the_language_of_the_series(tmp_path, language, expected):
    assert interface(language, tmp_path) == expected


def test_a_language_that_the_learner_chose_stays(tmp_path):
    """As its menu *Settings > Language* stores it."""
    own = tmp_path / "@jupyterlab" / "translation-extension" / "plugin.jupyterlab-settings"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({"locale": "en"}))
    assert interface("zh", tmp_path) == "en File"
