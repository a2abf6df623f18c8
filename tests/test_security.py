"""No secret in any file, no code from weights, no open door: what the course must not do."""

import ast
import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import socket
import string
import subprocess
import sys
import time
import uuid
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import secret_scan
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager

import utils
from course import plots, widgets
from course.hub import LocalHub
from course.model_folder import model_folder, whole

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
MARKUP = '<img src=x onerror="alert(1)"><script>alert(2)</script></textarea>&amp;'


def random_text(length, alphabet=string.ascii_letters + string.digits, seed=1):
    return "".join(random.Random(seed).choices(alphabet, k=length))


# Made here and now, so that this file holds none that the scan would have to overlook.
PLANTED = {
    "SwanLab key in the environment": f'os.environ["SWANLAB_API_KEY"] = "{random_text(21)}"',
    "SwanLab key in a shell": f"export SWANLAB_API_KEY={random_text(21)}",
    "SwanLab key in a call": f"swanlab.login(api_key='{random_text(21)}')",
    "SwanLab key in a dict": json.dumps({"api_key": random_text(21)}),
    "Hugging Face token": f"logged in with hf_{random_text(34)}",
    "ModelScope token": f"using ms-{uuid.UUID(int=random.Random(1).getrandbits(128))} now",
    "generic secret": f"client_secret: {random_text(32)}",
    "GitHub token": f"ghp_{random_text(36)}",
    "AWS key": f"AKIA{random_text(16, string.ascii_uppercase + string.digits)}",
    "key of the form sk-": f"sk-{random_text(40)}",
    "private key": f"-----BEGIN {'RSA'} PRIVATE KEY-----",
    "private key of ssh": f"-----BEGIN {'OPENSSH'} PRIVATE KEY-----",
    "password in an address": f"https://me:{random_text(12)}@example.org/simple",
}


# -------------------------------------------------------------------------------------------------- secrets


def test_no_secret_in_any_file_or_output():
    paths = secret_scan.tracked(ROOT)
    assert {path.suffix for path in paths} >= {".py", ".ipynb", ".json", ".md"}
    outputs = [path for path in (ROOT / "output").rglob("*") if path.is_file() and ".venv" not in path.parts]
    assert secret_scan.scan(paths + outputs) == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tracked files (the small ones), tracked by a git of its own."""
    place = tmp_path_factory.mktemp("copy")
    for path in secret_scan.tracked(ROOT):
        if path.stat().st_size < 200_000:
            target = place / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    subprocess.run(["git", "init", "-q", str(place)], check=True)
    subprocess.run(["git", "-C", str(place), "add", "-A"], check=True)
    assert secret_scan.scan(secret_scan.tracked(place)) == []
    return place


def in_a_script(copy, secret):
    (copy / "utils.py").open("a", encoding="utf-8").write(f"\n# {secret}\n")


def in_a_new_file(copy, secret):
    (copy / "notes.txt").write_text(secret, encoding="utf-8")


def in_a_cell(copy, secret):
    change_notebook(copy, lambda cell: cell.update(source=cell.source + "\n" + secret))


def in_an_output(copy, secret):
    stream = nbformat.v4.new_output("stream", name="stdout", text=f"before\n{secret}\n")
    change_notebook(copy, lambda cell: cell.outputs.append(stream))


def change_notebook(copy, change):
    path = copy / "notebooks" / "en" / "01_environment.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(next(cell for cell in notebook.cells if cell.cell_type == "code"))
    nbformat.write(notebook, path)


@pytest.mark.parametrize(
    "place", [in_a_script, in_a_new_file, in_a_cell, in_an_output], ids=lambda place: place.__name__
)
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_secret_is_found_and_not_repeated(copy, fault, kind, place):
    place(copy, PLANTED[kind])
    try:
        found = secret_scan.scan(secret_scan.tracked(copy))
    finally:
        subprocess.run(["git", "-C", str(copy), "checkout", "-q", "."], check=True)
        (copy / "notes.txt").unlink(missing_ok=True)
    assert found
    assert PLANTED[kind] not in "".join(found)
    fault.record(
        "security",
        f"planted: {kind}",
        "in a script, a new file, a cell and a stored output, each in a copy of the repository",
        "the scan in `make test` names file, line and kind",
    )


def test_almost_every_random_key_is_seen():
    """The few that are not hold hardly a digit and hardly a capital, and could be names."""
    keys = [random_text(21, seed=number) for number in range(1000)]
    assert sum(any(secret_scan.secrets(f"api_key={key}")) for key in keys) > 990


def test_names_that_only_sound_like_secrets_are_let_through():
    text = """pad_token_id=151329, api_key = getpass("SwanLab API key (hidden): ")
    tokens_folder = utils.require(course.output / "tokens", "04_chat_template", course)
    tokenizer = AutoTokenizerFast2Slow.from_pretrained(x), hidden_token_state_1_of_22
    os.environ["SWANLAB_API_KEY"] = read_the_key_from_somewhere, https://example.org:8080/a@b"""
    assert list(secret_scan.secrets(text)) == []


FAKE = random_text(21)


SETUP = """import dataclasses, os, utils
from course import swanlab_record
swanlab_record.cloud_trouble = lambda: '' if os.environ.get('SWANLAB_API_KEY') else 'asks for SWANLAB_API_KEY'
settings = dataclasses.replace(utils.settings(), swanlab_mode='online')"""


def ask_cell(cell, tmp_path, environment, answer, setup=SETUP, last="print(len(os.environ['SWANLAB_API_KEY']))"):
    """Run notebook 05's cell in a real kernel; returns everything that the kernel sent, and what it asked for."""
    from jupyter_client.manager import start_new_kernel

    sent, asked = [], []
    manager, client = start_new_kernel(
        cwd=str(ROOT), env={**os.environ, "HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython"), **environment}
    )
    try:

        def reply(message):
            asked.append(message["content"])
            client.input(answer)

        for code in (setup, cell("05_lora_training", "SWANLAB_API_KEY"), last):
            client.execute_interactive(
                code, output_hook=lambda m: sent.append(m["content"]), stdin_hook=reply, timeout=60
            )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=False)
    return json.dumps(sent, default=str), asked


@pytest.mark.parametrize("way", ["variable", "prompt"])
def test_a_key_is_never_echoed_or_saved(cell, tmp_path, fault, way):
    environment = {"SWANLAB_API_KEY": FAKE} if way == "variable" else {}
    sent, asked = ask_cell(cell, tmp_path, environment, FAKE)
    assert "SwanLab mode: online" in sent
    assert f'"text": "{len(FAKE)}' in sent  # the key did arrive
    assert FAKE not in sent
    assert [one["password"] for one in asked] == ([True] if way == "prompt" else [])
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and FAKE.encode() in path.read_bytes()]
    fault.record(
        "security",
        f"a key by {way}",
        "notebook 05, section 11, in a real kernel with a made-up key",
        "the key is in no message of the kernel and in no file" + ("; the prompt is hidden" if way == "prompt" else ""),
    )


def test_a_local_record_holds_no_key(tmp_path):
    code = "import swanlab\n"
    code += f"swanlab.init(project='t', experiment_name='x', mode='local', log_dir={str(tmp_path / 'swanlab')!r})\n"
    code += "swanlab.log({'loss': 1.0}, step=0)\nswanlab.finish()"
    environment = {**os.environ, "SWANLAB_API_KEY": FAKE, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, check=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert FAKE.encode() not in done.stdout + done.stderr + b"".join(path.read_bytes() for path in files)


# --------------------------------------------------------------------------------------- code from elsewhere


#: Tests plant what the scan looks for; those that a browser runs plant none.
TESTS = [ROOT / "tests" / name for name in ("", "faults", "support")]


def code_of_the_course():
    """Path and source of every script and every code cell."""
    for path in secret_scan.tracked(ROOT):
        if path.suffix == ".py" and path.parent not in TESTS:
            yield path.name, path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb":
            cells = nbformat.read(path, as_version=4).cells
            python = TransformerManager().transform_cell  # lines for the shell become calls
            yield path.name, "\n\n".join(python(cell.source) for cell in cells if cell.cell_type == "code")


DANGEROUS = {"trust_remote_code", "allow_pickle", "weights_only"}
LOADERS = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def dangers(source):
    """Names in a source that load code, or would let others do so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in DANGEROUS:
            yield node.arg
        if isinstance(node, ast.Constant) and node.value in DANGEROUS:
            yield node.value
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            yield from (name for name in names if name.split(".")[0] in LOADERS)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.jit.load"):
            yield ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
            yield ast.unparse(node.func)


def test_no_code_is_taken_from_a_model():
    sources = list(code_of_the_course())
    assert len(sources) > len(NOTEBOOKS) > 6
    assert [(name, danger) for name, source in sources for danger in dangers(source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_code_from_a_model_would_be_found(source):
    assert list(dangers(source))


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "consolidated.00.pth"])
def test_a_pickled_model_is_refused_and_not_run(tmp_path, fault, name):
    mark, folder = tmp_path / "mark", tmp_path / "model"
    folder.mkdir()
    shutil.copy(utils.BUNDLED / "config.json", folder)
    (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(utils.CourseError, match=r"no \*\.safetensors there"):
        model_folder(dataclasses.replace(utils.settings(), model=str(folder)))
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())
    assert mark.exists()  # it would have run
    fault.record(
        "security",
        f"a model as {name}",
        "a pickle that runs code, no safetensors beside it",
        "refused by name before anything is loaded; the code does not run",
    )


def test_a_pickled_adapter_is_refused_and_not_run(cell, tmp_path, fault):
    mark = tmp_path / "mark"
    adapter = tmp_path / "lora" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    names = {
        "settings": utils.settings(),
        "run_folder": tmp_path / "lora",
        "model_folder": model_folder,
        "whole": whole,
    }
    with pytest.raises(utils.CourseError, match=r"adapter: no \*\.safetensors there"):
        exec(cell("06_inference", "adapter = whole("), names)
    assert not mark.exists()
    fault.record(
        "security",
        "an adapter as adapter_model.bin",
        "a pickle that runs code, in the place of the adapter; notebook 06's own cell",
        "refused by name before anything is loaded; the code does not run",
    )


# ------------------------------------------------------------------------------------------------ open doors


def open_doors(command):
    """What in a command line opens Jupyter to others."""
    found = [] if re.search(r"--ip[= ](127\.0\.0\.1|localhost)\b", command) else ["not bound to 127.0.0.1"]
    wide = r"token|password|allow[_-]origin|allow[_-]remote|disable_check_xsrf|--ip[= ](0\.0\.0\.0|\*|'')|allow-root"
    return found + [match[0] for match in re.finditer(wide, command, re.IGNORECASE)]


def test_jupyter_is_bound_to_this_machine_and_asks_for_its_token(fault):
    commands = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in commands.splitlines() if "-m jupyterlab" in line]
    if os.geteuid() == 0:  # the option is for root only, and says nothing of who may come in
        command = command.replace(" --allow-root", "")
    assert open_doors(command) == []
    assert not [path for path in secret_scan.tracked(ROOT) if re.match(r"jupyter_\w*config", path.name)]
    for opened in (" --ip=0.0.0.0", " --IdentityProvider.token=''", " --ServerApp.allow_origin='*'"):
        assert open_doors(command + opened)
    assert open_doors(command.replace("--ip=127.0.0.1", ""))
    fault.record("security", "JupyterLab", "the command of `make lab`", "bound to 127.0.0.1, its token kept")


def test_a_real_jupyter_started_so_asks_for_its_token(tmp_path):
    import urllib.error
    import urllib.request

    commands = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in commands.splitlines() if "-m jupyterlab" in line]
    words = command[command.index("-m jupyterlab") :].split()[2:]  # behind the variables before it
    arguments = [word for word in words if not word.endswith(".ipynb")] + ["--no-browser", "--port=0"]
    environment = {**os.environ, "HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *arguments],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while not (notes := list((tmp_path / "runtime").glob("jpserver-*.json"))) or not notes[0].read_text():
            assert time.monotonic() < until
            time.sleep(0.2)
        note = json.loads(notes[0].read_text())
        port = int(note["url"].rstrip("/").rpartition(":")[2])
        with socket.socket() as line:  # it writes the note before it listens
            while line.connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < until
                time.sleep(0.2)
        assert note["url"].startswith(("http://127.0.0.1:", "http://localhost:"))
        assert len(note["token"]) >= 32
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{note['url']}api/contents")
        assert urllib.request.urlopen(f"{note['url']}api/contents?token={note['token']}").status == 200
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_the_dashboard_and_the_local_hub_listen_on_this_machine_only(hub_address):
    commands = subprocess.run(["make", "-n", "dashboard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in commands.splitlines() if "swanlab watch" in line]
    assert not re.search(r"(--host|-h)\b", command)
    swanlab = Path(sys.executable).with_name("swanlab")
    told = subprocess.run([swanlab, "watch", "--help"], capture_output=True, text=True, check=True).stdout
    assert "host of swanlab web, default by 127.0.0.1" in " ".join(told.split())
    assert hub_address == "127.0.0.1"


@pytest.fixture
def hub_address():
    with LocalHub(utils.BUNDLED, "a/b") as hub:
        return hub._server.server_address[0]


# --------------------------------------------------------------------------------------- markup in an answer


class Tags(HTMLParser):
    """Collects the tags and attributes of a piece of HTML."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def tags(html):
    parser = Tags()
    parser.feed(html)
    return parser


class OneToken:
    """A tokenizer for which the markup is one token, so that no box divides it."""

    def decode(self, ids):
        return MARKUP * len(ids)


def test_the_mask_view_and_a_picture_show_markup_and_do_not_run_it(fault):
    view = widgets.mask_view(OneToken(), [1, 2], [-100, 2])
    assert tags(view.html).tags == {"div", "span"}
    assert tags(view.html).attributes == {"style"}
    drawn = plots.picture(plots.axes()[0], MARKUP)
    assert tags(drawn.html).tags == {"figure", "img", "figcaption"}
    assert tags(drawn.html).attributes == {"alt", "src"}
    assert {"img", "script"} <= tags(MARKUP).tags  # what would be there, were it not escaped
    fault.record(
        "security",
        "markup in a sample",
        "an img with onerror and a script, as tokens and as a caption",
        "shown as text",
    )


def test_the_chat_box_shows_markup_and_does_not_run_it(fault):
    import ipywidgets

    box = widgets.chat_box(lambda *_: MARKUP, lambda turns: turns[-1]["content"])
    question, ask = box.children[0].children
    question.value = MARKUP
    ask.click()
    parts, holding = [box], []
    for widget in parts:
        parts.extend(getattr(widget, "children", ()))
        for name in ("value", "description", "tooltip", "placeholder"):
            if MARKUP in str(getattr(widget, name, "")):
                holding.append((type(widget), name))
    # Textarea sets text, not markup; HTML, HTMLMath and every `description` with its html switch do.
    assert holding == [(ipywidgets.Textarea, "value")] * 3  # the template's text, and a turn of each model
    assert not any(getattr(widget, "description_allow_html", False) for widget in parts)
    assert not any(isinstance(widget, (ipywidgets.HTML, ipywidgets.HTMLMath)) for widget in parts)
    fault.record(
        "security", "markup in an answer", "an img with onerror and a script as answer and question", "shown as text"
    )


def test_no_cell_makes_html_of_its_own():
    for name, source in code_of_the_course():
        if name.endswith(".ipynb"):
            calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
            assert not [call for call in calls if re.search(r"\b(HTML|HTMLMath|Markdown|Javascript)$", call)], name


def test_no_stored_output_holds_a_script():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                assert not {"application/javascript", "text/markdown"} & set(data), path.name
                found = tags(data.get("text/html", ""))
                assert "script" not in found.tags, path.name
                assert not [name for name in found.attributes if name.startswith("on")], path.name
