"""What depends on the project's public address: the first cells, the links to services, the READMEs."""

import json
import os
import re
import shutil
import subprocess
import sys

import address
import nbformat
import pytest
from conftest import ROOT

ALONE = "https://git.example.org/course/glm"
GITHUB = "https://github.com/owner/glm-course"


def test_everything_agrees_with_the_setting():
    assert address.problems() == []


@pytest.mark.parametrize(
    "text", ["github.com/owner/name", "http://a.org/b/c", "https://a.org/b", "https://a.org/b/c; ls"]
)
def test_what_git_should_not_be_given_is_refused(tmp_path, text):
    (tmp_path / "ADDRESS").write_text(text)
    with pytest.raises(ValueError, match="no address like"):
        address.address(tmp_path / "ADDRESS")


@pytest.mark.parametrize("at", [GITHUB, f"{GITHUB}.git", f"{GITHUB}/"])
def test_links_open_the_notebook_on_each_service(at):
    links = address.links(at, "notebooks/zh/03_dataset.ipynb", "zh")
    assert re.findall(r"\[[^]]*\]", links) == ["[在 Colab 打开]", "[在 Kaggle 打开]", "[在 ModelScope 打开]"]
    assert links.count("owner/glm-course/blob/main/notebooks/zh/03_dataset.ipynb)") == 3
    assert "![" not in links


@pytest.mark.parametrize("at", ["", ALONE])
def test_there_are_no_links_where_no_service_could_open_them(at):
    assert address.links(at, "notebooks/en/03_dataset.ipynb") == ""


def test_a_cell_or_a_page_that_lacks_the_lines_is_named():
    for broken in ("import utils\n", address.block("") * 2):
        with pytest.raises(ValueError, match="times, not once"):
            address.with_block(broken, ALONE)
    with pytest.raises(ValueError, match="0 times"):
        address.with_part("# A page\n", ALONE, "en")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project without weights, outputs and history, and what it was in bytes."""
    folder = tmp_path_factory.mktemp("copy") / "project"
    left_out = shutil.ignore_patterns(".*", "output", "*.safetensors", "__pycache__", "fonts", "site")
    shutil.copytree(ROOT, folder, ignore=left_out, symlinks=True)
    return folder


def tool(folder, name, *arguments):
    command = [sys.executable, str(folder / "tools" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_new_address_reaches_all_and_an_empty_one_takes_it_back(copy):
    kept = {path: path.read_bytes() for path in copy.rglob("*") if path.suffix in (".ipynb", ".md", ".json")}
    unmatched = tool(copy, "languages", "check").stdout
    (copy / "deploy" / "ADDRESS").write_text(f"{GITHUB}\n")
    assert tool(copy, "address", "check").returncode == 1
    written = tool(copy, "address")
    assert written.returncode == 0, written.stderr
    assert tool(copy, "address", "check").returncode == 0
    assert tool(copy, "languages", "check").stdout == unmatched
    for path in sorted(copy.glob("notebooks/*/*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        first = next(cell.source for cell in cells if cell.cell_type == "code")
        assert f"\n!git clone --depth 1 {GITHUB} course\n%run course/deploy/hosted.py en" in first
        (header,) = (cell.source for cell in cells if "header" in cell.metadata.get("tags", []))
        place = path.relative_to(copy).as_posix()
        assert header.count(f"owner/glm-course/blob/main/{place})") == len(address.SERVICES)
        assert not re.search(r"!\[[^]]*\]\(https?:|<img", header)
    for name, language in (("README.md", "en"), ("README.zh-CN.md", "zh")):
        text = (copy / name).read_text(encoding="utf-8")
        assert f"!git clone --depth 1 {GITHUB} course\n%run course/deploy/hosted.py {language}\n" in text
        assert text.count(f"blob/main/notebooks/{language}/01_environment.ipynb)") == len(address.SERVICES)
    (copy / "deploy" / "ADDRESS").write_text("")
    assert tool(copy, "address").returncode == 0
    assert [path.name for path, before in kept.items() if path.read_bytes() != before] == []


# ------------------------------------------------------------------------------------------- the first cell

SHOWN = """
import json, sys
sys.path[:] = [one for one in sys.path if one]  # as in a kernel, which does not work where the tests do
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
result = shell.run_cell(json.loads(sys.argv[1]))
print("FOUND", shell.user_ns["utils"].__file__ if result.success else type(result.error_in_exec).__name__)
"""


def first_cell(folder, at="", **environment):
    """What the lines that find the project come to in a folder: their output, and what was found."""
    source = "import sys\nfrom pathlib import Path\n\nfrom IPython.core.error import UsageError\n\n" + address.block(at)
    command = [sys.executable, "-P", "-c", SHOWN, json.dumps(source)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=clean | environment)
    said, _, found = (done.stdout + done.stderr).partition("FOUND ")
    return said + found.partition("\n")[2], found.partition("\n")[0]


def test_a_notebook_by_itself_ends_in_the_lines_to_run_and_no_stack_trace(tmp_path):
    (tmp_path / "utils.py").write_text("'Another one.'\n")
    for at in ("", ALONE):
        said, found = first_cell(tmp_path, at)
        assert found == "UsageError"
        assert address.message(at) in said
        assert "Traceback" not in said and len(said.strip().splitlines()) == 3


@pytest.mark.parametrize("where", [".", "notebooks/en", "docs/site"])
def test_the_project_is_found_from_its_own_folders(where):
    assert first_cell(ROOT / where)[1] == str(ROOT / "utils.py")


def test_the_project_is_found_beside_the_notebook_before_a_foreign_module(tmp_path):
    (tmp_path / "utils.py").write_text("'Another one.'\n")
    (tmp_path / "course").symlink_to(ROOT)
    assert first_cell(tmp_path)[1] == str(ROOT / "utils.py")


def test_the_project_is_found_where_python_looks_for_modules(tmp_path):
    assert first_cell(tmp_path, PYTHONPATH=str(ROOT))[1] == str(ROOT / "utils.py")
