"""What keeps the course in order: workflows, issue forms, the version, and the commands that documents name."""

import json
import re
import subprocess
from importlib import import_module, metadata

import pytest
import test_pins
from conftest import ROOT
from packaging.utils import canonicalize_name

#: Nothing but the tests needs it, so it has no pin of its own. The lock has one: other packages bring it.
yaml = import_module("yaml")

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
CONTRIBUTING = [ROOT / "CONTRIBUTING.md", ROOT / "CONTRIBUTING.zh-CN.md"]
CHINESE = re.compile("[\u4e00-\u9fff]")
#: What an action may be: one of GitHub's or the link checker, by its major version.
ACTION = re.compile(r"(actions|lycheeverse)/[\w-]+@v\d+")


def name(path):
    return path.name


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def targets(text):
    """The targets of make that a text names: in a line of a block of code, or in a piece of code."""
    code = re.findall(r"^```bash\n.*?^```|`[^`\n]+`", text, re.DOTALL | re.MULTILINE)
    return {target for piece in code for target in re.findall(r"\bmake ([a-z][a-z-]*)", piece)}


def known_targets():
    """The targets of the Makefile, as make itself reads it."""
    printed = subprocess.run(["make", "-pRrnq", "-C", ROOT, "clean"], capture_output=True, text=True).stdout
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", printed, re.MULTILINE))


def test_yaml_is_read_by_a_locked_package():
    assert test_pins.locked("requirements.lock")["pyyaml"] == metadata.version("pyyaml")


# --------------------------------------------------------------------------------------------------- the version


def test_the_version_is_the_same_wherever_it_is_written():
    citation = read(ROOT / "CITATION.cff")
    versions = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(re.fullmatch(r"20\d\d\.\d\d\.\d\d", version) for version in versions)
    assert versions == sorted(set(versions), reverse=True), "newest first"
    assert citation["version"] == versions[0]
    date = (ROOT / "deploy" / "VERSION").read_text(encoding="utf-8").strip()
    assert date == citation["date-released"] == versions[0].replace(".", "-")


def test_the_citation_names_the_course_and_no_person():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert f"# {citation['title']}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert [set(author) for author in citation["authors"]] == [{"name"}]
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith(citation["license"])


# ------------------------------------------------------------------------------------------------------ workflows


def test_there_are_the_workflows_that_contributing_names():
    named = set(re.findall(r"[a-z]+\.yml", CONTRIBUTING[0].read_text(encoding="utf-8")))
    assert {"ci.yml", "weekly.yml"} <= named <= set(map(name, WORKFLOWS))


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_a_workflow_may_read_only_and_ends(path):
    workflow, text = read(path), path.read_text(encoding="utf-8")
    assert "secrets" not in text
    if path.name == "site.yml":  # publishing may need more than reading
        return
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())
    assert all("permissions" not in job for job in workflow["jobs"].values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_a_workflow_uses_known_actions_and_no_index_by_name(path):
    text = path.read_text(encoding="utf-8")
    used = [step["uses"] for step in steps(read(path)) if "uses" in step]
    assert used and all(ACTION.fullmatch(action) for action in used), used
    assert not re.search(r"https?://|index-url", text)


@pytest.mark.parametrize("path", [*WORKFLOWS, *CONTRIBUTING, ROOT / ".ci" / "run"], ids=name)
def test_every_target_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        named = targets(text)
        assert {"setup", "test", "store", "lock"} <= named
    else:
        named = set(re.findall(r"^\s*(?:run: )?make ([a-z][a-z-]*)", text, re.MULTILINE))
        assert named or path.suffix == ".yml"
    assert named <= known_targets()


def test_a_target_that_does_not_exist_is_seen():
    assert targets("Call `make nothing`, then\n```bash\nmake setup  # so\n```\nto make sense.") == {"nothing", "setup"}
    assert "setup" in known_targets() and "nothing" not in known_targets()


def test_the_files_that_the_workflows_name_are_there():
    for path in WORKFLOWS:
        for step in steps(read(path)):
            for word in re.findall(r"(?:notebooks|tools|tests|deploy)/[\w/]+\.(?:ipynb|cfg|py)", step.get("run", "")):
                assert (ROOT / word).is_file(), f"{path.name}: {word}"


def test_the_weekly_tests_leave_out_what_make_test_leaves_out_first():
    """And test_pins.py, which would say that the newest releases are not the pinned ones."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    first = re.search(r"--ignore=tests/,([\w. ]+)\)", makefile)[1].split()
    weekly = (GITHUB / "workflows" / "weekly.yml").read_text(encoding="utf-8")
    ignored = re.findall(r"--ignore=tests/(\S+)", weekly)
    assert {*first, "test_pins.py"} <= set(ignored)


def test_the_cell_that_is_not_compared_weekly_is_the_one_about_the_pins(cell):
    weekly = read(GITHUB / "workflows" / "weekly.yml")
    (not_compared,) = [step["env"]["NOT_COMPARED"] for step in steps(weekly) if "NOT_COMPARED" in step.get("env", {})]
    cells = json.loads((ROOT / "notebooks" / "en" / "01_environment.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(one["source"]) for one in cells if one["id"] == not_compared]
    assert source == cell("01_environment", "utils.wrong_packages()")


def test_the_pins_can_be_taken_off():
    """By the workflow's own line: what is left are names, with extras and comments."""
    weekly = (GITHUB / "workflows" / "weekly.yml").read_text(encoding="utf-8")
    command = re.search(r"(sed -E '[^']+' requirements\.txt) >", weekly)[1]
    left = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [line.partition("#")[0].strip() for line in left.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?", one) for one in names)
    assert {canonicalize_name(one.partition("[")[0]) for one in names} == set(test_pins.pinned("requirements.txt"))


def test_what_a_link_check_leaves_out_is_a_pattern_each():
    lines = (ROOT / ".lycheeignore").read_text(encoding="utf-8").splitlines()
    patterns = [re.compile(line) for line in lines]
    assert all(line.startswith("^") for line in lines)
    assert any(pattern.search("http://127.0.0.1:8888/lab") for pattern in patterns)
    assert not any(pattern.search("https://arxiv.org/abs/2305.14314") for pattern in patterns)


# ---------------------------------------------------------------------------------------------- forms and documents


@pytest.mark.parametrize("path", FORMS, ids=name)
def test_a_form_asks_in_both_languages_for_what_is_needed(path):
    form = read(path)
    assert set(form) == {"name", "description", "body"}
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in asked} <= {"textarea", "input", "dropdown", "checkboxes"}
    ids = [field["id"] for field in asked]
    assert len(ids) == len(set(ids)) and {"environment", "message"} <= set(ids)
    labels = [form["name"], form["description"], *(field["attributes"]["label"] for field in asked)]
    said = [*labels, *(text for field in asked if (text := field["attributes"].get("description")))]
    assert len(labels) == len(set(labels))
    for text in said:
        english, _, chinese = text.partition("/ ")
        assert not CHINESE.search(english) and CHINESE.search(chinese), text
    for page in re.findall(r"`(docs/\S+?)`", path.read_text(encoding="utf-8")):
        assert (ROOT / page).is_file(), page


def test_a_fault_report_holds_what_is_needed_to_repeat_it():
    form = read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert required == {"environment", "command", "expected", "message"}
    assert read(GITHUB / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": True}


@pytest.mark.parametrize("path", [*CONTRIBUTING, ROOT / "CHANGELOG.md"], ids=name)
def test_a_document_is_short_and_its_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_leads_to_them(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert f"]({readme.replace('README', 'CONTRIBUTING')})" in text and "](CHANGELOG.md)" in text
