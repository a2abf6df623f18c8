"""deploy/hosted.py on made-up machines, and widgets where there are none; nothing is installed here."""

import ast
import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from conftest import ROOT

import utils
from course import widgets

SPEC = importlib.util.spec_from_file_location("hosted", ROOT / "deploy" / "hosted.py")
hosted = sys.modules["hosted"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hosted)

#: A machine with all pins, as far as they are wanted here.
COMPLETE = {name: pin for name, (_, pin) in hosted.pins().items() if name not in hosted.SERVICE | hosted.CHECKS}
TORCH = hosted.pins()["torch"][1]


def test_every_pin_has_its_place():
    names = set(hosted.pins())
    groups = (hosted.SERVICE, hosted.CHECKS, set(hosted.SHARED), {"torch"})
    assert all(group <= names for group in groups)
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert names == {hosted.canonical(name) for name in utils.pins()}
    assert hosted.within(TORCH, hosted.TORCH)
    assert all(hosted.release(hosted.pins()[name][1]) >= least for name, least in hosted.SHARED.items())


def test_what_the_notebooks_import_is_installed_or_a_part_of_the_service():
    imported, texts = set(), [path.read_text(encoding="utf-8") for path in (ROOT / "course").glob("*.py")]
    for path in (ROOT / "notebooks" / "en").glob("*.ipynb"):
        texts += [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        imported |= {hosted.canonical(name.partition(".")[0]) for name in names}
    wanted = imported & set(hosted.pins())
    assert {"transformers", "peft", "swanlab", "openai"} <= wanted
    assert wanted - set(COMPLETE) == {"ipython", "ipywidgets"}


def test_where_all_fits_pip_is_not_asked():
    assert hosted.planned(COMPLETE) == hosted.Plan((), f"torch=={TORCH}")
    later = COMPLETE | {"numpy": "2.9.1", "pandas": "4.0", "torch": f"{TORCH}+cu130"}
    assert hosted.planned(later) == hosted.Plan((), f"torch=={TORCH}+cu130")


@pytest.mark.parametrize("found", ["2.11.0", "2.11.0+cu128", "2.12.1", "2.13.0+cpu", "2.13.1"])
def test_a_torch_that_was_tried_stays(found):
    plan = hosted.planned({"torch": found, "torchvision": "0.26"})
    assert (plan.torch, plan.replaced) == (f"torch=={found}", "")
    assert not [line for line in plan.requirements if line.startswith("torch")]


@pytest.mark.parametrize("found", ["2.10.0", "2.9.1+cu126", "2.14.0", "3.0"])
def test_another_torch_is_replaced_and_what_is_built_for_it_too(found):
    plan = hosted.planned(COMPLETE | {"torch": found, "torchvision": "0.26"})
    assert (plan.torch, plan.replaced) == (f"torch=={TORCH}", found)
    assert plan.requirements[:2] == (f"torch=={TORCH}", "torchvision")
    assert "torchaudio" not in plan.requirements


def test_what_is_missing_too_old_or_of_another_release_is_asked_for():
    here = COMPLETE | {"numpy": "1.26.4", "pillow": "11.3.0", "transformers": "4.57.0"}
    del here["peft"]
    lines = hosted.planned(here).requirements
    assert {f"transformers=={COMPLETE['transformers']}", f"peft=={COMPLETE['peft']}", "pillow>=11.0"} <= set(lines)
    assert f"numpy=={COMPLETE['numpy']}" in lines
    assert f"swanlab[dashboard]=={COMPLETE['swanlab']}" in lines


@pytest.fixture
def pip(monkeypatch):
    """In the place of pip: notes what it is asked and what the constraints hold, and ends as it is told."""
    calls, ends = [], []

    def run(command, **_):
        arguments = command[command.index("--no-input") + 1 :]
        held = arguments[arguments.index("--constraint") + 1]
        calls.append((arguments, open(held, encoding="utf-8").read().splitlines()))  # noqa: PTH123, SIM115
        code, said = ends.pop(0) if ends else (0, "")
        return SimpleNamespace(returncode=code, stdout="", stderr=said)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(hosted, "installed", lambda: {"torch": "2.11.0+cu128", "numpy": "2.0.2"})
    return SimpleNamespace(calls=calls, ends=ends, plan=hosted.planned(hosted.installed()))


def test_pip_may_not_touch_torch_and_takes_what_is_missing_from_the_lock(pip, capsys):
    hosted.install(pip.plan)
    ((arguments, held),) = pip.calls
    assert arguments[0] == "install" and "numpy>=2.0" in arguments
    assert held[0] == "torch==2.11.0+cu128"
    assert [line for line in held if line.startswith("tokenizers==")]
    assert not [line for line in held if line.startswith("numpy==")], "numpy is there and may stay"
    assert not [line for line in held if "--hash" in line or "\\" in line]


def test_where_a_kept_package_does_not_fit_to_the_lock_pip_chooses(pip):
    pip.ends += [(1, "ERROR: Cannot install a and b\nERROR: ResolutionImpossible: for help visit a page")]
    hosted.install(pip.plan)
    assert [len(held) for _, held in pip.calls[1:]] == [1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("WARNING: Retrying\nERROR: No matching distribution found for peft==0.21.2", r"not reached \(ERROR: No match"),
        ("connection broken by NewConnectionError: name resolution", "Settings > Internet"),
        ("error: externally-managed-environment\n\nx This environment", "environment of your own"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: Failed building wheel for x\nsomething", r"could not install the packages \(ERROR: Failed building"),
        ("", r"could not install the packages \(\)"),
    ],
)
def test_each_trouble_of_pip_is_one_message_and_is_not_tried_twice(pip, said, message):
    pip.ends += [(1, said)] * 2
    with pytest.raises(utils.CourseError, match=message):
        hosted.install(pip.plan)
    assert len(pip.calls) == 1


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 14)])
def test_another_python_is_named(version):
    with pytest.raises(utils.CourseError, match=rf"Python 3\.{version[1]}\. The packages need 3.11 to 3.13"):
        hosted.check_python(version)


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_a_python_that_was_tried_is_taken(version):
    hosted.check_python(version)


def test_too_little_disk_is_named():
    hosted.need_room(0)
    with pytest.raises(utils.CourseError, match=r"GiB of disk are free, 1000000 are needed"):
        hosted.need_room(1e6)


# ----------------------------------------------------------------------------------------------- the kernel


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A kernel in another folder, with all that is wanted installed; changes to it are taken back."""
    monkeypatch.chdir(tmp_path)
    for name in ("COURSE_LANGUAGE", "COURSE_OUTPUT", hosted.REPLACED):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(hosted, "installed", lambda: dict(COMPLETE))
    monkeypatch.setattr(hosted, "drop_foreign", lambda: None)
    return monkeypatch


def test_where_all_is_there_the_kernel_goes_to_the_notebooks_of_the_language(machine, capsys):
    hosted.set_up("zh")
    assert os.getcwd() == str(ROOT / "notebooks" / "zh")  # noqa: PTH109
    said = capsys.readouterr().out
    assert f"保留 torch {TORCH}" in said and "已就绪" in said and "重启" not in said


@pytest.mark.parametrize("used", [True, False])
def test_a_restart_is_asked_for_only_where_a_replaced_package_is_in_use(machine, capsys, tmp_path, used):
    versions = [COMPLETE | {"pandas": "2.1.0"}, COMPLETE]
    machine.setattr(hosted, "installed", lambda: dict(versions[0] if len(versions) == 1 else versions.pop(0)))
    machine.setattr(hosted, "install", lambda plan: None)
    machine.setattr(hosted, "need_room", lambda gib: None)
    if used:
        machine.setitem(sys.modules, "pandas", ModuleType("pandas"))
    else:
        for name in [name for name in sys.modules if name.partition(".")[0] == "pandas"]:
            machine.delitem(sys.modules, name)
    hosted.set_up("en")
    assert ("Restart the kernel now: it still holds the old pandas." in capsys.readouterr().out) is used
    assert (os.getcwd() == str(tmp_path)) is used  # noqa: PTH109
    hosted.set_up("en")  # the same kernel again: what it holds has not changed
    assert ("Restart the kernel now" in capsys.readouterr().out) is used
    machine.setenv(hosted.REPLACED, os.environ.get(hosted.REPLACED, "").replace(str(os.getpid()), "1"))
    hosted.set_up("en")  # as after a restart
    assert "Ready after" in capsys.readouterr().out


def test_a_read_only_project_writes_beside_the_notebook(machine, capsys, tmp_path):
    real = os.access
    machine.setattr(os, "access", lambda path, mode: path != ROOT and real(path, mode))
    hosted.set_up("en")
    assert os.environ["COURSE_OUTPUT"] == str(tmp_path / "course-output")
    machine.setenv("COURSE_OUTPUT", "mine")
    hosted.choose_output(tmp_path)
    assert os.environ["COURSE_OUTPUT"] == "mine"


def test_an_unknown_language_is_named(machine):
    with pytest.raises(utils.CourseError, match="fr: no notebooks in this language"):
        hosted.set_up("fr")


def test_modules_of_another_project_go_and_ours_stay(monkeypatch, tmp_path):
    foreign = ModuleType("utils")
    foreign.__file__ = str(tmp_path / "utils.py")
    monkeypatch.setitem(sys.modules, "utils", foreign)
    monkeypatch.setitem(sys.modules, "course.nothing", ModuleType("course.nothing"))  # below a folder, not a package
    ours = sys.modules["course.widgets"]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    hosted.drop_foreign()
    assert "utils" not in sys.modules and "course.nothing" not in sys.modules
    assert sys.modules["course.widgets"] is ours
    assert sys.path[0] == str(ROOT)


def test_in_a_terminal_a_mistake_is_a_line():
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "hosted.py"), "fr"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "fr: no notebooks in this language. Use one of: en, zh."


# ----------------------------------------------------------------------------------------------- no widgets


def drawn(count=2, long=False):
    print("drawn:", count, long)


def test_without_ipywidgets_the_function_is_called_once_and_a_line_says_how(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert widgets.interact(drawn, count=[1, 2]) is drawn
    assert widgets.interact(count=[1, 2])(drawn) is drawn
    words = "No widgets here. In a cell of your own, with other values: drawn(count=2, long=False)"
    assert capsys.readouterr().out.splitlines() == [words, "drawn: 2 False"] * 2


def test_what_the_function_returns_is_shown_below_the_controls(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr("ipywidgets.widgets.interaction.display", shown.append)
    widgets.interact(lambda count=2: "a picture", count=[1, 2])
    assert "a picture" in shown


def test_without_ipywidgets_the_chat_asks_one_question(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setenv("COURSE_LANGUAGE", "zh")
    shown = widgets.chat_box(lambda name, turns: iter(["", f"{name}: {turns[-1]['content']}"]), str)
    said = capsys.readouterr().out
    assert shown is None and 'widgets.ask(reply, "...")' in said
    assert "base: 你是谁？" in said and "adapter: 你是谁？" in said


def test_a_page_that_draws_no_widgets_gets_the_line(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    widgets.interact(drawn, count=[1, 2])
    box = widgets.chat_box(lambda *_: "", str)
    for widget, call in ((shown[0], "drawn(count=2, long=False)"), (box, 'widgets.ask(reply, "...")')):
        bundle = widget._repr_mimebundle_()
        assert bundle["text/plain"].startswith("No widgets here.") and bundle["text/plain"].endswith(call)
        assert "application/vnd.jupyter.widget-view+json" in bundle
