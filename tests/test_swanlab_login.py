"""SwanLab's key and host: found where the library finds them, cleaned, and asked for only where somebody can answer."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import headless
import nbformat
import pytest
from conftest import ROOT
from faults.test_training import KEY, Cloud
from test_security import ask_cell

import utils
from course import swanlab_record


@pytest.fixture
def cloud():
    made = Cloud()
    yield made
    made.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of one's own, and no variable of SwanLab's."""
    for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWANLAB_API_KEY", "")  # so that what the code sets is taken back
    monkeypatch.setenv("SWANLAB_API_HOST", "")
    return tmp_path


def log_in(home, host):
    """What `swanlab login` does, by the program itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
    subprocess.run(
        [Path(sys.executable).with_name("swanlab"), "login", "--host", host, "--api-key", KEY],
        env={**environment, "HOME": str(home)},
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert KEY in (home / ".swanlab" / ".netrc").read_text()


def test_the_command_records_online_after_swanlab_login(home, cloud, capsys, tmp_path):
    from finetune import train

    log_in(home, cloud.host)
    course = dataclasses.replace(utils.settings(), swanlab_mode="online", output=tmp_path / "output")
    (callback,) = train.swanlab_callback(course, {})
    assert callback._init_kwargs["mode"] == "online"
    assert capsys.readouterr().out == ""


def test_what_login_leaves_is_enough_for_a_run_in_the_cloud(home, cloud, tmp_path):
    log_in(home, cloud.host)
    code = "import swanlab\nfrom course import swanlab_record\nassert not swanlab_record.cloud_trouble()\n"
    code += f"swanlab.init(project='t', experiment_name='x', mode='online', log_dir={str(tmp_path / 'log')!r})\n"
    code += "swanlab.log({'train/loss': 1.5}, step=3)\nswanlab.finish()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert cloud.points("train/loss") == {3: 1.5}
    assert KEY not in done.stdout + done.stderr


def test_the_notebook_does_not_ask_after_swanlab_login(home, cloud, cell, tmp_path):
    log_in(home, cloud.host)
    setup = "import dataclasses, utils\nfrom course import swanlab_record\n"
    setup += "settings = dataclasses.replace(utils.settings(), swanlab_mode='online')"
    sent, asked = ask_cell(cell, tmp_path, {}, "not asked", setup=setup, last="print('end')")
    assert "SwanLab mode: online" in sent
    assert not asked
    assert KEY not in sent


@pytest.mark.parametrize("spoilt", [f'"{KEY}"', f"'{KEY}'\r\n", f" {KEY}\n", f"“{KEY}”", f"\ufeff{KEY}"])
def test_quotes_and_line_ends_around_a_key_are_taken_off(home, cloud, monkeypatch, spoilt):
    monkeypatch.setenv("SWANLAB_API_KEY", spoilt)
    monkeypatch.setenv("SWANLAB_API_HOST", f'"{cloud.host}/"\n')
    assert swanlab_record.cloud_trouble() == ""
    assert os.environ["SWANLAB_API_KEY"] == KEY  # where the library reads it


def test_quotes_that_login_has_stored_are_taken_off(home, cloud):
    log_in(home, cloud.host)
    stored = home / ".swanlab" / ".netrc"
    stored.write_text(stored.read_text().replace(KEY, f"“{KEY}”"), encoding="utf-8")
    assert swanlab_record.swanlab_access() == (KEY, cloud.host)
    assert swanlab_record.cloud_trouble() == ""
    import swanlab

    assert (swanlab.Settings().api_key, swanlab.Settings().api_host) == (KEY, cloud.host)


def test_a_stored_key_goes_to_no_other_host(home, cloud, monkeypatch):
    log_in(home, cloud.host)
    other = Cloud()
    monkeypatch.setenv("SWANLAB_API_HOST", other.host)
    assert swanlab_record.swanlab_access() == ("", other.host)
    assert swanlab_record.cloud_trouble() == "asks for a valid SWANLAB_API_KEY"
    other.close()


def test_a_cloud_on_this_machine_is_not_asked_through_a_proxy(home, cloud, monkeypatch):
    for name in ("http_proxy", "https_proxy", "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    monkeypatch.setenv("SWANLAB_API_HOST", cloud.host)
    assert swanlab_record.cloud_trouble() == ""


def test_nobody_is_asked_without_a_front_end(home, cloud, cell, monkeypatch, tmp_path):
    """The variable is inherited by whatever is started from JupyterLab's terminal."""
    monkeypatch.setenv("JPY_SESSION_NAME", "05_lora_training.ipynb")
    monkeypatch.setenv("SWANLAB_API_HOST", cloud.host)
    setup = f"import os, sys\nos.chdir({str(ROOT)!r})\nsys.path.insert(0, os.getcwd())\nimport dataclasses, utils\n"
    setup += (
        "from course import swanlab_record\nsettings = dataclasses.replace(utils.settings(), swanlab_mode='online')"
    )
    sources = (setup, cell("05_lora_training", "SwanLab mode:"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    headless.execute(notebook, tmp_path / "x.ipynb", 60)
    assert [output.text.splitlines()[-1] for output in notebook.cells[1].outputs] == ["SwanLab mode: local"]


@pytest.mark.parametrize("error", [EOFError, NotImplementedError])
def test_a_front_end_that_refuses_the_question_is_nobody(monkeypatch, home, error):
    def refuse(_):
        raise error

    monkeypatch.setattr(swanlab_record, "somebody_can_answer", lambda: True)
    monkeypatch.setattr(swanlab_record, "getpass", refuse)
    assert not swanlab_record.ask_for_key()


def test_the_kernel_still_says_whether_it_may_ask():
    """`swanlab_record.somebody_can_answer` reads what ipykernel 7.4.0 keeps for itself; nothing public says it."""
    from ipykernel.kernelbase import Kernel
    from IPython.core.error import StdinNotImplementedError

    assert utils.pins()["ipykernel"] == "7.4.0"
    assert Kernel.class_traits()["_allow_stdin"].default_value is False
    assert issubclass(StdinNotImplementedError, NotImplementedError)


def test_the_private_names_of_swanlab_that_are_used_are_those_of_the_pinned_version():
    """`course/swanlab_record.py` reads SwanLab's own database and its key; after another pin, look at both again."""
    assert utils.pins()["swanlab"] == "0.10.3"
    assert {"api_key", "api_host"} <= set(dir(__import__("swanlab").Settings()))
