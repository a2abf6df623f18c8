"""What every notebook of the series has to hold, whatever it teaches."""

import ast
import builtins
import copy
import os
import re
import subprocess
import sys

import cell_checks
import headers
import nbformat
import pytest
import run_nbval
import run_series
import test_exercises
from conftest import ROOT
from notebook_checks import CHECKS

import utils

PATHS = sorted((ROOT / "notebooks" / "en").glob("*.ipynb"))
BOTH = sorted((ROOT / "notebooks").glob("*/*.ipynb"))
LONGEST_CELL = 30


@pytest.fixture(params=BOTH, ids=lambda path: f"{path.parent.name}-{path.stem}")
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_nine():
    assert [path.stem[:2] for path in PATHS] == ["01", "02", "03", "04", "05", "06", "07", "08", "09"]


def test_two_to_five_exercises_with_hint_check_and_solution(notebook):
    kinds = [test_exercises.TITLE.match(f"### {title}")[2] for _, title, _, _ in test_exercises.exercises(notebook)]
    assert 2 <= len(kinds) <= 5
    assert (kinds[0], kinds[-1]) in (("reading", "building"), ("读懂", "动手写"))


def test_the_last_exercise_on_the_small_model_is_a_persona_of_ones_own():
    last = test_exercises.exercises(nbformat.read(PATHS[6], as_version=4))[-1]
    assert "persona" in last[1]


def test_cells_stay_short_and_prose_goes_before_code(notebook):
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert max(len(cell.source.splitlines()) for cell in code) <= LONGEST_CELL
    assert all(cell.source.strip() for cell in cells)
    for first, second, third in zip(code, code[1:], code[2:], strict=False):
        places = [cells.index(cell) for cell in (first, second, third)]
        assert places[2] - places[0] > 2, f"three code cells in a row from {first.id}"
    assert len(cells) - len(code) >= 0.8 * len(code)


def test_every_picture_has_alt_text_and_a_caption(notebook):
    html = "".join(o.data.get("text/html", "") for c in notebook.cells for o in c.get("outputs", []) if "data" in o)
    images = re.findall("<img [^>]*>", html)
    assert all(re.search('alt="[^"]{20,}"', image) for image in images)
    assert len(images) == html.count("<figcaption>")
    assert not any("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))


def test_the_pictures_are_there():
    found = {}
    for path in PATHS:
        found[path.stem[:2]] = path.read_text(encoding="utf-8").count("<figcaption>")
    assert found["03"] >= 2
    assert found["05"] >= 4
    assert found["06"] >= 1
    assert found["07"] >= 1


@pytest.mark.parametrize("path", BOTH, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_nbval_will_take_the_stored_form(path):
    assert run_nbval.problems(path) == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_notebook_01_was_stored_with_the_pins_of_today(language):
    """A new pin changes one line of 01's outputs; here it shows in the first minute, not after the long notebooks."""
    stored = (ROOT / "notebooks" / language / "01_environment.ipynb").read_text(encoding="utf-8")
    assert f"all {len(utils.pins())} pinned packages" in stored, "store notebook 01 again"


@pytest.mark.parametrize("path", BOTH, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_header_says_what_its_metadata_says(path):
    notebook, name, language = nbformat.read(path, as_version=4), path.stem, path.parent.name
    assert headers.problems(notebook, name, language) == []
    required = set(re.findall(r'utils\.require\([^"]*"[^"]*", "(\w+)"', "".join(c.source for c in notebook.cells)))
    needs = notebook.metadata["course"]["needs"]
    assert max(required - {name}, default="") == needs  # the others it needs come before that one
    changed = copy.deepcopy(notebook)
    changed.metadata["course"]["packages"] = {"torch": "0.0"}
    assert len(headers.problems(changed, name, language)) == 2
    changed = copy.deepcopy(notebook)
    changed.cells[2:2] = [nbformat.v4.new_markdown_cell("## A section that no link leads to")]
    assert len(headers.problems(changed, name, language)) == 1


def test_a_title_that_a_link_encodes_has_a_place_to_jump_to():
    text = "## 1 `a` 与乙？\n\nx\n\n```\n## 丙\n```\n\n## Plain"
    made = headers.with_places(text)
    assert made == f'<div id="1-a-%E4%B8%8E%E4%B9%99%EF%BC%9F"></div>\n\n{text}'
    assert headers.with_places(made) == made
    assert headers.with_places(made.replace("与乙", "b").replace("？", "?")).startswith("## 1 `a` b?")
    for path in sorted((ROOT / "notebooks" / "zh").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        cell = next(cell for cell in notebook.cells if headers.PLACE.search(cell.source))
        cell.source = headers.PLACE.sub("", cell.source)
        assert len(headers.problems(notebook, path.stem, "zh")) == 1


@pytest.mark.parametrize(
    ("seconds", "memory", "disk", "count"),
    [
        (60, 1000, 50, 0),
        (600, 1000, 50, 1),
        (4, 1000, 50, 1),
        (60, 1500, 50, 1),
        (60, 1000, 500, 1),
        (900, 300, 900, 3),
    ],
)
def test_a_run_far_from_the_header_is_named(seconds, memory, disk, count):
    course = {"minutes_cpu": 1.5, "memory_mib": 1000, "disk_mib": 50}
    cost = {"seconds": seconds, "memory_mib": memory, "disk_mib": disk}
    assert len(headers.differences(course, cost, "x")) == count


def test_the_demo_questions_that_are_looked_up_are_those_that_are_asked(cell):
    asked = re.search(r"questions = (\[.+?\])", cell("06_inference", "seen = {row"))[1]
    assert f"demo = {asked}" in cell("03_dataset", "demo = [")


# ------------------------------------------------------------------------------- what must be true after a cell


def names_made(source: str) -> set[str]:
    """The names that a cell gives to something."""
    nodes = list(ast.walk(ast.parse(source)))
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return made | {a.asname or a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}


def test_the_checks_are_expressions_of_names_that_their_cells_know():
    left = set(CHECKS)
    for path in PATHS:
        known = set(dir(builtins))
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                known |= names_made(cell.source)
                for expression, otherwise in CHECKS.get(cell.id, {}).items():
                    compile(expression, cell.id, "eval")
                    assert set(cell_checks.names_in(expression)) <= known | names_made(expression), expression
                    assert otherwise and not otherwise.endswith("."), cell.id
                left.discard(cell.id)
    assert not left, "no English notebook has a code cell with these ids"


TRUE, FALSE = "x == 3 and max(abs(y - 1) for y in [1, 2]) < x", "double(x) > 6"
CHECKED = {"01-a": {TRUE: "never said"}, "01-b": {FALSE: "three is too small", "gone": "it was never made"}}


@pytest.fixture
def small_series(tmp_path):
    """A notebook whose second cell has checks that are not true; both cells show what is stored."""
    shown = {"output_type": "execute_result", "data": {"text/plain": "3"}, "metadata": {}, "execution_count": 1}
    cells = [
        nbformat.v4.new_code_cell("x = 3\nx", id="01-a", execution_count=1, outputs=[nbformat.from_dict(shown)]),
        nbformat.v4.new_code_cell("def double(n):\n    return 2 * n", id="01-b", execution_count=2),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "01_try.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def test_a_check_that_is_not_true_fails_its_cell_and_a_true_one_is_not_seen(small_series):
    folder = small_series.parent
    (folder / "own_checks.py").write_text(f"import cell_checks\ncell_checks.CHECKS.update({CHECKED})\n")
    paths = os.pathsep.join([str(ROOT / "tools"), str(folder)])
    plugins = ["-p", "nbval_guard", "-p", "own_checks", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval", *plugins, str(small_series)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "COURSE_OUTPUT": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert f"01-b: three is too small. Not true: {FALSE}\n    x = 3\n" in done.stdout
    assert "01-b: it was never made. Not true: gone\n    NameError: " in done.stdout
    assert "never said" not in done.stdout


def test_a_run_that_is_to_be_stored_stops_at_a_check_that_is_not_true(small_series, monkeypatch):
    for cell_id, checks in CHECKED.items():
        monkeypatch.setitem(CHECKS, cell_id, checks)
    with pytest.raises(utils.CourseError, match="01-b: three is too small") as stopped:
        run_series.run(small_series, small_series.parent, 60, checked=True)
    assert "01-a" not in str(stopped.value)
    notebook, _ = run_series.run(small_series, small_series.parent, 60, checked=False)
    assert notebook.cells[0].outputs[0].data["text/plain"] == "3"
