"""What every notebook of the series has to hold, whatever it teaches."""

import copy
import re

import headers
import nbformat
import pytest
import run_nbval
import test_exercises
from conftest import ROOT

import utils

PATHS = sorted((ROOT / "notebooks" / "en").glob("*.ipynb"))
BOTH = sorted((ROOT / "notebooks").glob("*/*.ipynb"))
LONGEST_CELL = 30


@pytest.fixture(params=BOTH, ids=lambda path: f"{path.parent.name}-{path.stem}")
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_nine():
    assert [path.stem[:2] for path in PATHS] == ["01", "02", "03", "04", "05", "06", "07", "08", "09"]


def test_two_to_four_exercises_with_hint_check_and_solution(notebook):
    kinds = [test_exercises.TITLE.match(f"### {title}")[2] for _, title, _, _ in test_exercises.exercises(notebook)]
    assert 2 <= len(kinds) <= 4
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
