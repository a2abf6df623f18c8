"""Starting on the machines that people have: proxies, root, folders with a space, systems without POSIX locks."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import secret_scan
from faulty_hub import refused_port
from modelscope_hub.config import set_default_config

import utils
from course import download
from course.hub import LocalHub
from course.model_folder import whole
from finetune import resume

ROOT = Path(__file__).resolve().parents[1]
MODEL_ID = "owner/name"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


# --------------------------------------------------------------------------------------------------- proxies


class Proxy:
    """An HTTP proxy on 127.0.0.1 that answers every request with a status, or fetches it from another server."""

    def __init__(self, status: int = 403, behind: str = "") -> None:
        self.asked: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.asked.append(self.path)
                answer, body = status, b"refused"
                if behind:
                    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                    try:
                        with direct.open(behind + self.path.removeprefix("http://hub.example:80")) as reply:
                            answer, body = reply.status, reply.read()
                    except urllib.error.HTTPError as error:
                        answer, body = error.code, error.read()
                self.send_response(answer)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_CONNECT = do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def no_proxies(monkeypatch):
    for name in (*PROXY_VARIABLES, "no_proxy", "NO_PROXY", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    set_default_config(None)  # the client reads MODELSCOPE_ENDPOINT once in a process
    yield monkeypatch
    set_default_config(None)


def fetched(cell, course, model_id: str, endpoint: str | None) -> Path:
    """What the download cells of notebook 02 fetch."""
    names = {"settings": course, "model_id": model_id, "endpoint": endpoint, "Path": Path}
    names |= {"utils": utils, "download": download, "whole": whole}
    exec(cell("02_download", "allow_patterns=["), names)
    exec(cell("02_download", "folder = snapshot_download("), names)
    return names["folder"]


@pytest.mark.parametrize("status", [0, 403, 407])
@pytest.mark.parametrize("names", [PROXY_VARIABLES[:3], PROXY_VARIABLES[3:], ["ALL_PROXY"]])
def test_requests_to_this_machine_go_around_every_proxy(no_proxies, cell, tmp_path, status, names):
    course = dataclasses.replace(utils.settings(), output=tmp_path / "output")
    with Proxy(status or 403) as proxy:
        url = proxy.url if status else f"http://127.0.0.1:{refused_port()}"
        for name in names:
            no_proxies.setenv(name, url)
        with LocalHub(utils.BUNDLED, MODEL_ID) as hub:
            folder = fetched(cell, course, MODEL_ID, hub.endpoint)
        assert (folder / "config.json").read_bytes() == (utils.BUNDLED / "config.json").read_bytes()
        assert not proxy.asked


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": ".uni.example,localhost"}, ".uni.example,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_the_hosts_that_need_no_proxy_are_added_and_taken_away_again(no_proxies, before, inside):
    for name, value in before.items():
        no_proxies.setenv(name, value)
    with download.around_proxies():
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == inside
    assert {name: os.environ[name] for name in ("no_proxy", "NO_PROXY") if name in os.environ} == before


def test_a_hub_that_only_a_proxy_reaches_is_found_and_fetched_from(no_proxies, cell, tmp_path):
    course = dataclasses.replace(utils.settings(), output=tmp_path / "output")
    with LocalHub(utils.BUNDLED, MODEL_ID) as hub, Proxy(behind=hub.endpoint) as proxy:
        no_proxies.setenv("http_proxy", proxy.url)
        no_proxies.setenv("MODELSCOPE_ENDPOINT", "http://hub.example:80")
        assert download.hub_answers(MODEL_ID)
        folder = fetched(cell, course, MODEL_ID, None)
    assert (folder / "config.json").read_bytes() == (utils.BUNDLED / "config.json").read_bytes()
    assert any("FilePath=config.json" in path for path in proxy.asked)


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("status", [0, 403, 407])
def test_an_error_names_the_proxy_and_no_password(no_proxies, cell, tmp_path, capsys, variable, status):
    course = dataclasses.replace(utils.settings(), output=tmp_path / "output")
    no_proxies.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "1")
    no_proxies.setattr(time, "sleep", lambda seconds: None)  # the client waits between its tries
    user, secret = "anna", "geheim"
    with Proxy(status or 403) as proxy:
        port = proxy.server.server_port if status else refused_port()
        no_proxies.setenv(variable, f"http://{user}:{secret}@127.0.0.1:{port}")
        assert not download.hub_answers(MODEL_ID)
        with pytest.raises(utils.CourseError) as error:
            fetched(cell, course, MODEL_ID, "https://hub.example")
    for said in (capsys.readouterr().out, str(error.value)):
        assert f"through the proxy http://127.0.0.1:{port} ({variable})" in said
        assert user not in said and secret not in said


def test_a_hub_that_does_not_answer_is_said_without_a_proxy_where_there_is_none(no_proxies, capsys):
    no_proxies.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{refused_port()}")
    assert not download.hub_answers(MODEL_ID)
    said = capsys.readouterr().out
    assert f"so {MODEL_ID} cannot be fetched now" in said and "proxy" not in said


# ------------------------------------------------------------------------------------- root and the project's folder


@pytest.fixture(scope="module")
def spaced(tmp_path_factory) -> Path:
    """The project in a folder with a space in its name, with a `.venv` that sees the packages of this Python."""
    folder = tmp_path_factory.mktemp("a course") / "of 甄嬛"
    skipped = shutil.ignore_patterns(".*", "output", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=skipped)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (packages,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    (packages / "these.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (folder / ".venv" / "ready").touch()
    return folder


def without_course(**more: str) -> dict[str, str]:
    """The environment without what `make` and the course set in it."""
    left_out = ("MAKE", "MFLAGS", "COURSE_", "JUPYTER", "PYTHONPATH", "PYTHONSTARTUP")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)} | more


def test_make_lab_starts_in_a_folder_with_a_space_as_this_user_and_without_a_home(spaced):
    command = ["make", "lab", "LAB_ARGS=--no-browser --port=0"]
    with (spaced / "log").open("w+") as log:
        server = subprocess.Popen(
            command,
            cwd=spaced,
            env=without_course(HOME="/dev/null/home"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + 120
            while not (notes := list(spaced.glob("output/home/**/jpserver-*.json"))) or not notes[0].read_text():
                assert time.monotonic() < until and server.poll() is None, (spaced / "log").read_text()
                time.sleep(0.2)
            note = json.loads(notes[0].read_text())
            port = int(note["url"].rstrip("/").rpartition(":")[2])
            with socket.socket() as line:  # it writes the note before it listens
                while line.connect_ex(("127.0.0.1", port)):
                    assert time.monotonic() < until
                    time.sleep(0.2)
            assert note["url"].startswith(("http://127.0.0.1:", "http://localhost:"))
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"{note['url']}api/contents")
            asked = f"{note['url']}api/contents/notebooks/en/01_environment.ipynb?content=0&token={note['token']}"
            assert urllib.request.urlopen(asked).status == 200
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=30)
    said = (spaced / "log").read_text()
    assert ("JupyterLab gets --allow-root" in said) == (os.geteuid() == 0)
    assert "HOME cannot be written" in said


@pytest.mark.parametrize(("user", "given"), [("0", True), ("1000", False)])
def test_only_root_gets_the_option_for_root(spaced, tmp_path, user, given):
    (fake := tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n")
    fake.chmod(0o755)
    environment = without_course(PATH=f"{tmp_path}:{os.environ['PATH']}")
    command = ["make", "-n", "lab", "VENV=.venv"]
    # The Makefile's PATH begins with .venv/bin, where no `id` is.
    said = subprocess.run(command, cwd=spaced, env=environment, capture_output=True, text=True, check=True).stdout
    assert ("-m jupyterlab" in said) and ("--allow-root" in said) == given
    assert "--ip=127.0.0.1" in said


def test_make_dashboard_finds_its_folder(spaced, tmp_path):
    (fake := tmp_path / "swanlab.py").write_text("import sys\nprint(sys.argv[1:])\n")
    environment = without_course(HOME=str(tmp_path), COURSE_OUTPUT="~/my out", PYTHONPATH=str(fake.parent))
    done = subprocess.run(
        ["make", "-s", "dashboard"], cwd=spaced, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == f"['watch', '{tmp_path}/my out/swanlab', '-p', '5092']"


# ------------------------------------------------------------------------------------------------------ paths


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    shutil.copytree(utils.BUNDLED, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MODEL", "DATA", "OUTPUT"):
        monkeypatch.setenv(f"COURSE_{name}", f"~/{name.lower()}")
    course = utils.settings()
    assert (course.data, course.output) == (tmp_path / "data", tmp_path / "output")
    assert course.model == str(tmp_path / "model")


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("number", range(1, 9))
def test_another_utils_on_the_path_does_not_win(tmp_path, language, number):
    (path,) = (ROOT / "notebooks" / language).glob(f"0{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for name in ("utils", "course", "finetune"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another module of this name')")
    code = first.split("settings = ")[0] + "print(utils.ROOT)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=path.parent,
        env=without_course(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(ROOT), done.stderr


def test_without_a_home_the_libraries_have_one_of_the_course(tmp_path):
    code = """
import utils
from course.hub import LocalHub
from pathlib import Path
settings = utils.start()
import matplotlib, IPython.paths, modelscope, datasets
from jupyter_core.paths import jupyter_runtime_dir
print(Path.home(), matplotlib.get_cachedir(), IPython.paths.get_ipython_dir(), jupyter_runtime_dir(), sep="\\n")
cache = settings.output / "hub"
with LocalHub(utils.BUNDLED, "a/b") as hub:
    print(modelscope.snapshot_download("a/b", cache_dir=str(cache), endpoint=hub.endpoint))
"""
    environment = without_course(HOME="/dev/null/home", COURSE_OUTPUT=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", "import sys" + code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    first, *places = done.stdout.splitlines()
    assert first.startswith(f"HOME=/dev/null/home cannot be written, so the libraries keep their files in {tmp_path}")
    assert len(places) == 5 and all(place.startswith(str(tmp_path)) for place in places), done.stdout + done.stderr


def test_where_neither_can_be_written_the_message_names_both_variables():
    environment = without_course(HOME="/dev/null/home", COURSE_OUTPUT="/dev/null/out")
    command = [sys.executable, "-c", "import utils; utils.start()"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "Set HOME and COURSE_OUTPUT" in said


def test_importing_utils_changes_nothing_and_start_prepares_the_process(tmp_path):
    code = """
import logging, os
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
def state():
    return dict(os.environ), logging.getLogger("bitsandbytes").level, shell.custom_exceptions
before = state()
import utils
print(state() == before)
print(utils.start() == utils.start() == utils.settings())
environment, level, exceptions = state()
print(environment["GOMP_SPINCOUNT"], environment["HOME"] != before[0]["HOME"], level, exceptions)
"""
    environment = without_course(HOME="/dev/null/home", IPYTHONDIR=str(tmp_path), COURSE_OUTPUT=str(tmp_path))
    environment.pop("GOMP_SPINCOUNT", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    first, *said = done.stdout.splitlines()
    assert first == "True"
    assert said[-2:] == ["True", "1000 True 40 (<class 'NameError'>,)"]
    assert sum("HOME=/dev/null/home cannot be written" in line for line in said) == 1


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter as peft saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(utils.BUNDLED)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (str(utils.BUNDLED), "models/glm4-moe-mini"),
        ("ZhipuAI/GLM-4.5-Air", "ZhipuAI/GLM-4.5-Air"),
        ("/data/anna/secret/my-model", "my-model"),
    ],
)
def test_a_saved_adapter_holds_no_path_of_this_machine_and_loads(adapter, tmp_path, model, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    assert str(utils.BUNDLED) in (folder / "adapter_config.json").read_text()
    utils.name_base(folder, dataclasses.replace(utils.settings(), model=model))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == name
    assert f"base_model: {name}" in (folder / "README.md").read_text()
    for path in folder.iterdir():
        assert str(ROOT).encode() not in path.read_bytes(), path.name
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(utils.BUNDLED), folder)
    assert loaded.peft_config["default"].base_model_name_or_path == name


def test_both_ways_of_training_name_the_base_so(cell):
    assert "utils.name_base(adapter, settings)" in cell("05_lora_training", "model.save_pretrained(adapter)")


# ---------------------------------------------------------------------------------------------------- systems


def test_the_modules_start_where_there_is_no_fcntl_and_no_resource(tmp_path):
    """As on Windows, where both are missing."""
    code = """
import psutil, sys, warnings
warnings.simplefilter("ignore")
sys.modules["fcntl"] = sys.modules["resource"] = None
import utils
from course.memory import peak_memory_gib
from finetune import resume
settings = utils.settings()
utils.report(settings, a=1)
utils.report(settings, b=2)
resume.claim(settings.output / "lora")
resume.release(settings.output / "lora")
print(peak_memory_gib() > 0.01, (settings.output / "report.json").read_text())
del sys.modules["fcntl"], sys.modules["resource"]
import datasets, peft, transformers.trainer  # these look for Linux in other ways, so they are given both
sys.modules["fcntl"] = sys.modules["resource"] = None
import finetune.__main__, finetune.train, finetune.chat
import course.download, course.hub, course.model_folder, course.plots, course.rows, course.startup
import course.swanlab_record, course.widgets
"""
    environment = without_course(COURSE_OUTPUT=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "{", '"a":', "1,", '"b":', "2", "}"]


def test_a_mac_trains_on_its_processor(tmp_path, cell):
    """Where `Trainer` would take Apple's GPU by itself, which is brought about here by what it asks."""
    code = """
import sys, torch, utils
from pathlib import Path
from types import SimpleNamespace
torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True  # before it is asked for the first time
from transformers import TrainingArguments
(run_folder := Path(sys.argv[1])).joinpath("prompt.json").write_text("{}")
tokens_folder, settings, estimate = run_folder, utils.settings(), SimpleNamespace(eval_batch_size=8)
batch_size, epochs, small, on_gpu = 16, 2, True, False
exec(sys.argv[2])
print(TrainingArguments(sys.argv[1]).device, arguments.device)
"""
    command = [sys.executable, "-c", code, tmp_path, cell("05_lora_training", "arguments = TrainingArguments(")]
    done = subprocess.run(command, cwd=ROOT, env=without_course(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mps", "cpu"]


@pytest.mark.parametrize(("encoding", "expected"), [("gbk", "甄嬛 ?"), ("cp1252", "?? ?"), ("utf-8", "甄嬛 💾")])
def test_a_character_that_the_terminal_cannot_show_ends_no_program(encoding, expected):
    """On Windows what goes through a pipe has the encoding of the system; SwanLab prints such characters."""
    code = "import utils; utils.prepare(); print('甄嬛 💾')"
    environment = without_course(PYTHONIOENCODING=encoding)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode(encoding).strip() == expected


def test_every_file_can_be_stored_on_windows():
    """Whose names have no such characters, are equal in upper and lower case, and end after 260 characters."""
    names = [path.relative_to(ROOT) for path in secret_scan.tracked(ROOT)]
    taken = re.compile(r'(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[<>:"|?*\\].*|.*[. ]')
    assert not [name for name in names if any(taken.fullmatch(part) for part in name.parts)]
    assert len({str(name).lower() for name in names}) == len(names) > 100
    assert max(len(str(name)) for name in names) < 120, "the folder that it lies in has a name, too"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_does_not_stop_the_course(monkeypatch, tmp_path, capsys, number):
    import fcntl

    def no_flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    course = dataclasses.replace(utils.settings(), output=tmp_path)
    utils.report(course, a=1)
    resume.claim(tmp_path / "lora")
    resume.release(tmp_path / "lora")
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1}
    assert capsys.readouterr().out.count("this file system knows no locks") == 2


def test_any_other_error_of_a_lock_is_not_hidden(monkeypatch, tmp_path):
    import fcntl

    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="broken"):
        resume.claim(tmp_path / "lora")


def test_a_claim_ends_with_a_process_that_is_killed(tmp_path):
    code = f"""
import time
from pathlib import Path
from finetune import resume
resume.claim(Path({str(tmp_path / "lora")!r}))
print(1, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(utils.CourseError, match="Another kernel trains into"):
            resume.claim(tmp_path / "lora")
        other.kill()
    resume.claim(tmp_path / "lora")
    resume.release(tmp_path / "lora")
