"""The image and the hub, as far as a test can go without a container engine; `deploy/proof` does the rest."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import results
from traitlets.config import Config

import utils
from course import download

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"

FIRST = "/lab/tree/notebooks/en/01_environment.ipynb"


# ------------------------------------------------------------------------------------------------ start.sh


@pytest.fixture
def course(tmp_path):
    """A small course with two notebooks, whose `jupyter` only writes down how it was called."""
    root = tmp_path / "course"
    (root / "deploy").mkdir(parents=True)
    (root / "notebooks" / "en").mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("start.sh", "VERSION"):
        shutil.copy(DEPLOY / name, root / "deploy")
    for name in ("01_environment", "02_download"):
        (root / "notebooks" / "en" / f"{name}.ipynb").write_text(f"first {name}")
    (root / "utils.py").write_text("")
    (root / "images").mkdir()
    (root / "images" / "path.svg").write_text("<svg/>")
    for name in ("jupyter", "jupyterhub-singleuser"):
        fake = root / ".venv" / "bin" / name
        fake.write_text('#!/bin/sh\necho "$0 $*" >"$HOME/called"\nenv >"$HOME/environment"\n')
        fake.chmod(0o755)
    return root


def start(course: Path, **variables: str) -> tuple[int, str, str, dict[str, str]]:
    """Run start.sh: its status, what it said, how `jupyter` was called and with which environment."""
    home = course.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], **variables}
    done = subprocess.run([course / "deploy" / "start.sh"], env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.returncode, done.stdout + done.stderr, "", {}
    seen = dict(line.split("=", 1) for line in (home / "environment").read_text().splitlines() if "=" in line)
    return done.returncode, done.stdout + done.stderr, (home / "called").read_text(), seen


def test_the_first_start_makes_the_learners_folder(course):
    status, said, called, seen = start(course)
    work = course.parent / "home" / "course"
    assert (status, said) == (0, "")
    assert (work / "notebooks" / "en" / "01_environment.ipynb").read_text() == "first 01_environment"
    assert not (work / "notebooks" / "en" / "01_environment.ipynb").is_symlink()
    assert (work / "utils.py").resolve() == course / "utils.py", "a notebook finds utils two folders above"
    assert work.stat().st_mode & 0o077 == 0, "no other user reads it"
    assert "/jupyter lab " in called
    assert "--ip=127.0.0.1" in called and "--port=8888" in called
    assert f"--LabApp.default_url={FIRST}" in called and f"--ServerApp.root_dir={work}" in called
    assert seen["COURSE_OUTPUT"] == f"{work}/output"
    assert seen["PYTHONSTARTUP"] == f"{course}/course/startup.py"
    assert seen["JUPYTER_CONFIG_PATH"] == f"{course}/deploy/jupyter/en:{course}/deploy/jupyter"


def test_an_edited_notebook_is_never_overwritten(course):
    start(course)
    mine = course.parent / "home" / "course" / "notebooks" / "en"
    (mine / "01_environment.ipynb").write_text("my answers")
    _, said, _, _ = start(course)
    assert said == "" and (mine / "01_environment.ipynb").read_text() == "my answers"
    for name in ("01_environment", "02_download"):
        (course / "notebooks" / "en" / f"{name}.ipynb").write_text(f"second {name}")
    (course / "deploy" / "VERSION").write_text("2030-01-01\n")
    _, said, _, _ = start(course)
    assert (mine / "01_environment.ipynb").read_text() == "my answers"
    assert (mine / "01_environment.2030-01-01.ipynb").read_text() == "second 01_environment"
    assert "01_environment has a new version" in said
    assert (mine / "02_download.ipynb").read_text() == "second 02_download", "an untouched one is renewed"
    assert "02_download" not in said
    (mine / "01_environment.2030-01-01.ipynb").write_text("my second answers")
    _, said, _, _ = start(course)
    assert said == "", "a new version is said once"
    (course / "notebooks" / "en" / "01_environment.ipynb").write_text("third, under the same date")
    start(course)
    assert (mine / "01_environment.2030-01-01.ipynb").read_text() == "my second answers"
    assert (mine / "01_environment.2030-01-01+.ipynb").read_text() == "third, under the same date"


def test_a_learners_own_files_stay_and_a_deleted_notebook_comes_back(course):
    start(course)
    work = course.parent / "home" / "course"
    (work / "utils.py").unlink()
    (work / "utils.py").write_text("my own")
    (work / "notebooks" / "en" / "02_download.ipynb").unlink()
    start(course)
    assert (work / "utils.py").read_text() == "my own"
    assert (work / "notebooks" / "en" / "02_download.ipynb").read_text() == "first 02_download"


@pytest.mark.parametrize("given", ["", "workshop-2030"])
def test_there_is_always_a_token(course, given):
    _, _, called, seen = start(course, JUPYTER_TOKEN=given)
    assert seen.get("JUPYTER_TOKEN", "") == given
    assert given or "JUPYTER_TOKEN" not in seen, "an empty one would open the server"
    assert not re.search(r"--\S*(token|password|auth)\S*=", called)


@pytest.mark.parametrize("asked", ["xx", "../en", "en/..", "/"])
def test_an_unknown_language_opens_the_english_notebooks_and_says_so(course, asked):
    _, said, called, _ = start(course, COURSE_LANGUAGE=asked)
    assert f"COURSE_LANGUAGE={asked}" in said and FIRST in called


def test_the_language_asked_for_opens_when_it_is_there(course):
    shutil.copytree(course / "notebooks" / "en", course / "notebooks" / "zh")
    _, said, called, seen = start(course, COURSE_LANGUAGE="zh")
    assert said == "" and FIRST.replace("/en/", "/zh/") in called
    assert seen["JUPYTER_CONFIG_PATH"] == f"{course}/deploy/jupyter/zh:{course}/deploy/jupyter"
    assert not (course.parent / "home" / "course" / "notebooks" / "en").exists()


def test_it_listens_elsewhere_only_when_told(course):
    assert "--ip=0.0.0.0" in start(course, COURSE_IP="0.0.0.0")[2]


def test_a_folder_that_cannot_be_made_is_named(course):
    status, said, _, _ = start(course, COURSE_WORK="/dev/null/course")
    assert status == 1 and "/dev/null/course cannot be made. Set COURSE_WORK" in said


def test_under_the_hub_it_starts_the_hubs_server_in_a_closed_home(course):
    (course.parent / "home").mkdir(mode=0o755)
    _, _, called, seen = start(course, JUPYTERHUB_API_TOKEN="t")
    assert "/jupyterhub-singleuser " in called and "--KernelManager.transport=ipc" in called
    assert "cull_idle_timeout" in called
    assert seen["JUPYTERHUB_DEFAULT_URL"] == FIRST
    assert (course.parent / "home").stat().st_mode & 0o077 == 0


def status_of(address: str) -> int:
    try:
        return urllib.request.urlopen(address, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_real_server_answers_its_health_check_and_asks_for_the_token(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"HOME": str(tmp_path), "COURSE_PORT": str(port), "JUPYTER_TOKEN": ""}
    health = [sys.executable, DEPLOY / "health.py"]
    assert subprocess.run(health, env=environment, capture_output=True).returncode == 1, "nothing answers yet"
    (tmp_path / ".jupyter").mkdir()
    may_be_root = json.dumps({"ServerApp": {"allow_root": True}})  # a test may run as root, a learner does not
    (tmp_path / ".jupyter" / "jupyter_server_config.json").write_text(may_be_root)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([DEPLOY / "start.sh"], stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.time() + 120
        while subprocess.run(health, env=environment, capture_output=True).returncode:
            assert time.time() < end and server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        address = re.search(r"http://127\.0\.0\.1:\d+/lab/\S+\?token=\w{32,}", (tmp_path / "log").read_text())[0]
        assert FIRST in address and status_of(address) == 200
        contents = f"http://127.0.0.1:{port}/api/contents/notebooks/en"
        assert status_of(contents) == 403
        token = address.partition("token=")[2]
        assert status_of(f"{contents}?token={token}") == 200
        picture = f"http://127.0.0.1:{port}/files/images/sample_to_answer.svg"
        assert status_of(f"{picture}?token={token}") == 200, "pictures show, which they would not through a link"
    finally:
        server.terminate()
        server.wait(30)


# ------------------------------------------------------------------------------------- Dockerfile, install.sh


@pytest.fixture(scope="module")
def dockerfile() -> list[str]:
    """The instructions of the Dockerfile, each on one line."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_base_is_pinned_by_digest_and_a_mirror_can_be_named(dockerfile):
    assert [line for line in dockerfile if line.startswith("FROM ")] == ["FROM ${BASE}"]
    assert re.fullmatch(r"ARG BASE=[\w./:-]+@sha256:[0-9a-f]{64}", dockerfile[0]), dockerfile[0]


def test_the_image_runs_as_the_learner_that_install_sh_makes(dockerfile):
    (user,) = [line.split()[1] for line in dockerfile if line.startswith("USER ")]
    assert user != "0" and f"--uid {user} " in (DEPLOY / "install.sh").read_text()
    assert dockerfile.index(f"USER {user}") > max(i for i, line in enumerate(dockerfile) if line.startswith("RUN "))


def test_what_the_image_names_is_there(dockerfile):
    text = "\n".join(dockerfile)
    assert "HEALTHCHECK" in text and "ENV COURSE_IP=0.0.0.0" in text
    (folder,) = re.findall(r"^VOLUME (\S+)$", text, re.MULTILINE)
    assert f"COURSE_WORK={folder}\n" in text, "the learner's files lie in the volume, wherever HOME is"
    named = re.findall(r"/opt/course/(deploy/\S+?)\"", text)
    assert len(named) == 2 and all((ROOT / name).is_file() for name in named)
    assert os.access(DEPLOY / "start.sh", os.X_OK) and os.access(DEPLOY / "install.sh", os.X_OK)


def test_the_packages_layer_depends_on_the_pins_and_the_script_alone(dockerfile):
    runs = [line for line in dockerfile if line.startswith("RUN ")]
    assert runs[0].endswith("install.sh packages") and runs[1].endswith("install.sh course") and len(runs) == 2
    files = ["deploy/install.sh", "requirements.lock", "requirements.txt"]
    assert sorted(re.findall(r"type=bind,source=(\S+?),", runs[0])) == files
    assert not any(line.startswith(("COPY", "ADD")) for line in dockerfile)


def test_install_sh_takes_its_pins_from_the_files_alone():
    text = (DEPLOY / "install.sh").read_text()
    locked = [text.index(f'locked "$SOURCE/{name}"') for name in ("requirements.lock", "deploy/requirements-hub.lock")]
    assert "--no-deps --require-hashes" in text and locked[0] < text.index('-r "$SOURCE/requirements.txt"')
    assert "==" not in text.replace("pip", "")
    lines = [line.split("#")[0].strip() for line in (DEPLOY / "requirements-hub.txt").read_text().splitlines()]
    pins = [line for line in lines if line]
    assert pins and all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in pins)
    assert not {line.split("==")[0] for line in pins} & set(utils.pins()), "one package, one pin"


def test_no_index_and_no_machine_is_named():
    moved = [ROOT / "workshop" / "results.py", ROOT / "tools" / "lock.sh", ROOT / "tools" / "requirements-lint.txt"]
    for path in [*DEPLOY.rglob("*"), *moved]:
        if path.is_file() and path.suffix != ".pyc":
            hosts = set(re.findall(r"https?://([\w.$\\-]+)", path.read_text(encoding="utf-8")))
            assert hosts <= {"127.0.0.1", r"127\.0\.0\.1", "192.0.2.1"}, (
                f"{path.name}: {hosts}"
            )  # the second is kept for examples


def test_the_version_is_a_date():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d\n", (DEPLOY / "VERSION").read_text())


@pytest.mark.parametrize(
    ("tool", "files"),
    [("hadolint", ["deploy/Dockerfile"]), ("shellcheck", ["deploy/*.sh", "deploy/proof/*.sh", "tools/*.sh"])],
)
def test_the_linters_find_nothing(tool, files):
    if not (program := shutil.which(tool)):
        pytest.skip(f"{tool} is not installed")
    found = {pattern: list(ROOT.glob(pattern)) for pattern in files}
    assert all(found.values()), found
    paths = [path for pattern in files for path in found[pattern]]
    done = subprocess.run([program, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --------------------------------------------------------------------------------------------------- the hub


def hub_config(monkeypatch, **variables: str) -> Config:
    """What `jupyterhub_config.py` asks for under these variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    config = Config()
    path = DEPLOY / "jupyterhub_config.py"
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), {"get_config": lambda: config, "__file__": str(path)})
    return config


def test_the_hub_lets_in_members_of_one_group_with_a_password_and_makes_nobody_administrator(monkeypatch):
    config = hub_config(monkeypatch)
    assert config.JupyterHub.authenticator_class == "pam"
    assert config.PAMAuthenticator.allowed_groups == {"learners"}
    assert "Authenticator" not in config and set(config.PAMAuthenticator) == {"allowed_groups"}
    assert config.JupyterHub.bind_url == "http://127.0.0.1:8000"


def test_the_hub_sends_no_password_in_the_clear(monkeypatch):
    with pytest.raises(SystemExit, match="passwords in the clear"):
        hub_config(monkeypatch, COURSE_HUB_URL="http://0.0.0.0:8000")


@pytest.mark.parametrize("missing", ["COURSE_CERT", "COURSE_KEY"])
@pytest.mark.parametrize("kind", ["unset", "empty", "no file", "a folder"])
def test_https_without_certificate_and_key_does_not_start(monkeypatch, tmp_path, missing, kind):
    (tmp_path / "pem").write_text("pem")
    files = dict.fromkeys(("COURSE_CERT", "COURSE_KEY"), str(tmp_path / "pem"))
    files[missing] = {"unset": "", "empty": "", "no file": str(tmp_path / "gone"), "a folder": str(tmp_path)}[kind]
    if kind == "unset":
        del files[missing]
        monkeypatch.delenv(missing, raising=False)
    with pytest.raises(SystemExit, match=rf"{missing}.*https needs COURSE_CERT and COURSE_KEY"):
        hub_config(monkeypatch, COURSE_HUB_URL="https://0.0.0.0:443", **files)


def test_https_takes_the_certificate_and_the_key_that_are_there(monkeypatch, tmp_path):
    for name in ("c", "k"):
        (tmp_path / name).write_text("pem")
    given = {"COURSE_CERT": str(tmp_path / "c"), "COURSE_KEY": str(tmp_path / "k")}
    config = hub_config(monkeypatch, COURSE_HUB_URL="https://0.0.0.0:443", **given)
    assert config.JupyterHub.bind_url == "https://0.0.0.0:443"
    assert (config.JupyterHub.ssl_cert, config.JupyterHub.ssl_key) == (given["COURSE_CERT"], given["COURSE_KEY"])


@pytest.mark.parametrize(("cores", "learners", "threads"), [(2, "8", "1"), (16, "5", "3"), (16, "1", "16")])
def test_the_hub_shares_out_the_threads(monkeypatch, cores, learners, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    config = hub_config(monkeypatch, COURSE_LEARNERS=learners, COURSE_LANGUAGE="zh")
    assert config.Spawner.environment["OMP_NUM_THREADS"] == threads
    assert config.Spawner.environment["COURSE_LANGUAGE"] == "zh"
    assert config.JupyterHub.active_server_limit == int(learners)


def test_the_hub_limits_memory_where_systemd_runs_and_says_where_not(monkeypatch, capsys):
    there = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) == "/run/systemd/system" or there(path))
    config = hub_config(monkeypatch, COURSE_MEMORY="5G")
    assert config.JupyterHub.spawner_class == "systemd" and config.SystemdSpawner.mem_limit == "5G"
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) != "/run/systemd/system" and there(path))
    monkeypatch.delenv("COURSE_MEMORY")
    config = hub_config(monkeypatch)
    assert config.JupyterHub.spawner_class.endswith(".LocalProcessSpawner")
    assert "memory is not limited" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- results


def saved(folder: Path, name: str, *outputs: list[dict] | None) -> Path:
    """A saved notebook with one check cell for each given output (`None`: never run)."""
    tagged = {"cell_type": "code", "metadata": {"tags": ["check"]}, "source": []}
    cells = [{**tagged, "outputs": one or []} for one in outputs]
    other = {"cell_type": "code", "metadata": {}, "source": [], "outputs": [text("✓ right\n")]}
    path = folder / "notebooks" / "en" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": [other, *cells], "nbformat": 4}), encoding="utf-8")
    return path


def text(words: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": words.splitlines(keepends=True)}


def test_it_reads_what_check_prints(tmp_path, capsys):
    said = []
    for given in (1, 2, ...):
        utils.check(given, (lambda a: a == 1, "one"))
        said.append([text(capsys.readouterr().out)])
    error = [{"output_type": "error", "ename": "NameError", "evalue": "answer", "traceback": []}]
    path = saved(tmp_path, "01_environment", *said, error, None)
    assert results.result(path) == results.Result(right=1, wrong=2, open=2)


def test_the_stored_notebooks_are_all_open():
    for path in (ROOT / "notebooks").glob("*/*.ipynb"):
        found = results.result(path)
        assert found.open >= 2 and not found.right and not found.wrong and not found.trouble, (path.name, found)


def test_a_last_word_counts():
    assert results.said({"outputs": [text("(made for the default file)\n✓ right\n")]}) == "✓"
    assert results.said({"outputs": [{"output_type": "stream", "text": "✗ not yet: a\n"}]}) == "✗"


def test_a_broken_file_is_told_from_an_empty_one(tmp_path):
    path = saved(tmp_path, "01_environment", [text("✓ right\n")])
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"cells": [null]}',
        b'{"cells": ' + b"[" * 100_000,
    ):
        path.write_bytes(damaged)
        assert results.result(path).trouble == "broken", damaged
    other = path.with_name(os.fsdecode(b"02_\xff.ipynb"))
    other.write_bytes(b"[" * 100_000)
    found = results.learner(tmp_path)
    assert found["01_environment"].trouble == found["02_?"].trouble == "broken"
    "".join(found).encode("utf-8")  # so the table can be printed
    other.unlink()
    path.write_bytes(whole)
    (link := path.with_name("02_download.ipynb")).symlink_to(path)
    assert results.result(link).trouble == "no notebook", "a learner's link may lead anywhere"


def test_the_table_and_its_file(tmp_path, capsys, monkeypatch):
    right, wrong = [text("✓ right\n")], [text("✗ not yet: more\n")]
    saved(tmp_path / "anna" / "course", "01_environment", right, wrong)
    saved(tmp_path / "anna" / "course", "01_environment.2030-01-01", right, right)
    saved(tmp_path / "ben" / "course", "01_environment", None, None)
    saved(tmp_path / "ben" / "course", "03_dataset", right).write_text("{")
    folders = [str(tmp_path / name / "course") for name in ("anna", "ben")]
    monkeypatch.setattr(sys, "argv", ["results.py", *folders, "--csv", str(tmp_path / "r.csv")])
    assert results.main() == 1, "one could not be read"
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[0] == ["learner", "01_environment", "03_dataset"]
    assert said[2] == ["anna", "2✓", "0✗", "0○", "-"], "of two copies the better one counts"
    assert said[3] == ["ben", "0✓", "0✗", "2○", "broken"]
    with (tmp_path / "r.csv").open(encoding="utf-8-sig", newline="") as file:
        assert list(csv.DictReader(file))[2] == {
            "learner": "ben", "notebook": "03_dataset", "right": "0", "wrong": "0", "open": "0", "trouble": "broken"
        }  # fmt: skip


def test_a_folder_without_notebooks_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path)])
    assert results.main() == 1 and f"No notebooks/ in {tmp_path}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the update


@pytest.fixture
def announced():
    """A server that names a version: set `.says`; `.asked` counts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            time.sleep(self.server.slow)
            self.send_response(200)
            self.end_headers()
            with suppress(BrokenPipeError):  # the one who asked has gone
                self.wfile.write(self.server.says)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.says, server.asked, server.slow = b"2999-01-01\n", 0, 0.0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_an_update_is_said_only_if_told_to(announced, monkeypatch, capsys):
    download.say_update()
    assert (announced.asked, capsys.readouterr().out) == (0, "")
    monkeypatch.setenv("COURSE_UPDATES", f"http://127.0.0.1:{announced.server_port}/VERSION")
    download.say_update()
    here = (DEPLOY / "VERSION").read_text().strip()
    assert capsys.readouterr().out == f"A newer version of the course is out: 2999-01-01. Yours is of {here}.\n"
    for says in (here.encode(), b"2000-01-01", b"9", b"<html>", b"\xff", b"2999-01-01 or so"):
        announced.says = says
        download.say_update()
        assert capsys.readouterr().out == "", says
    assert announced.asked == 7


def test_no_answer_is_no_news(announced, monkeypatch, capsys, tmp_path):
    announced.slow = 2.0
    (tmp_path / "VERSION").write_text("2999-01-01")
    slow = f"http://127.0.0.1:{announced.server_port}/VERSION"
    for address in (slow, "http://127.0.0.1:1/VERSION", (tmp_path / "VERSION").as_uri(), "2999-01-01"):
        monkeypatch.setenv("COURSE_UPDATES", address)
        begun = time.time()
        download.say_update(seconds=0.2)
        assert time.time() - begun < 1.5
    assert capsys.readouterr().out == ""


def test_a_name_that_is_looked_up_for_long_does_not_hold_the_cell(monkeypatch, capsys):
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: time.sleep(3))
    monkeypatch.setenv("COURSE_UPDATES", "https://updates.invalid/VERSION")
    begun = time.time()
    download.say_update(seconds=0.2)
    assert time.time() - begun < 1.5 and capsys.readouterr().out == ""


def test_notebook_01_asks(cell):
    assert "download.say_update()" in cell("01_environment", "utils.wrong_packages()")
