"""Other front ends than an English JupyterLab: its Chinese interface, and commands that run a notebook alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"

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


# ----------------------------------------------------------------------------- commands that run a notebook alone


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_jupyter_execute_runs_a_notebook_from_another_folder(tmp_path):
    """The command of nbclient, as a learner calls it; the helpers speak the language of the notebook's folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JUPYTER", "PYTHON", "MPL"))}
    command = [sys.executable, "-m", "jupyter", "execute", NOTEBOOKS / "zh" / "01_environment.ipynb"]
    done = subprocess.run(
        [*command, "--startup_timeout=300", f"--output={tmp_path / 'executed'}"],
        cwd=tmp_path,
        env=kept | {"COURSE_OUTPUT": str(tmp_path / "output")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    executed = code_cells(tmp_path / "executed.ipynb")
    assert all(cell.execution_count for cell in executed)
    said = "".join(output.get("text", "") for cell in executed for output in cell.outputs)
    assert "pinned packages are installed in the pinned version" in said and "○ 待作答" in said


# ------------------------------------------------------------------------------------------------------ VS Code

#: Draws with the fonts of the course and of matplotlib only; a character that they lack is an error.
DRAWN = """
import warnings
from course import plots
plots.pyplot().rcParams["font.family"] = ["Huanhuan Hei", "DejaVu Sans"]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    display(plots.length_picture([3, 5, 8], 16))
"""


@pytest.fixture
def kernel(tmp_path) -> Iterator[BlockingKernelClient]:
    """A kernel as VS Code starts it: in the project's folder, with none of the settings of `make lab`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JUPYTER", "PYTHON", "MPL"))}
    manager, client = start_new_kernel(
        startup_timeout=300, kernel_name="python3", cwd=str(ROOT), env=kept | {"COURSE_OUTPUT": str(tmp_path)}
    )
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_kernel_that_starts_in_the_projects_folder_speaks_the_notebooks_language(kernel):
    path = NOTEBOOKS / "zh" / "01_environment.ipynb"
    said: list[dict] = []
    sources = [f"__vsc_ipynb_file__ = {str(path)!r}", *(cell.source for cell in code_cells(path)), DRAWN]
    for source in sources:
        reply = kernel.execute_interactive(
            source, output_hook=lambda message: said.append(message["content"]), allow_stdin=False, timeout=120
        )
        assert reply["content"]["status"] == "ok", reply["content"]
    assert any("○ 待作答" in content.get("text", "") for content in said)
    (drawn,) = [content["data"] for content in said if "样本，长度" in content.get("data", {}).get("text/plain", "")]
    assert "data:image/png" in drawn["text/html"]
