"""The model card says what the run holds, and ModelScope's own client uploads it to a hub on this machine."""

import json
import os
import subprocess
import sys

import pytest
import torch
from modelscope import snapshot_download
from test_engine import fill

import utils
from course.hub import LocalHub
from finetune import __main__ as commands
from finetune import evaluate, lora, share
from finetune.model import load_model

NAME, TOKEN, SYSTEM = "me/huanhuan", "a-token-of-this-test", "现在你要扮演皇帝身边的女人--甄嬛"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random adapter as notebook 05 saves it; copy it."""
    folder = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        model = fill(lora.attach(load_model(utils.BUNDLED), lora.lora_config()))
    model.save_pretrained(folder, state_dict=lora.adapter_state(model))
    return folder


@pytest.fixture
def course(adapter, tmp_path, monkeypatch):
    """An output folder with that adapter, in a home of its own."""
    output = tmp_path / "output"
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(share.VARIABLE, raising=False)
    settings, run_folder = utils.settings(), output / "lora"
    utils.stamp(run_folder, settings)
    (run_folder / "prompt.json").write_text(json.dumps({"system": SYSTEM}), "utf-8")
    (run_folder / "adapter").mkdir()
    for path in adapter.iterdir():
        (run_folder / "adapter" / path.name).write_bytes(path.read_bytes())
    utils.name_base(run_folder / "adapter", settings)
    return settings


@pytest.fixture
def folder(course, tmp_path):
    share.write_folder(course, tmp_path / "repository", NAME, "cc-by-sa-4.0")
    return tmp_path / "repository"


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    with LocalHub(tmp_path / "hub", NAME, token=TOKEN) as running:
        yield running


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def front_matter(text):
    return dict(line.split(": ", 1) for line in text.split("---")[1].splitlines() if ": " in line)


def test_the_card_names_base_licence_prompt_and_size(course):
    text = share.card(share.Run.of(course), NAME, "cc-by-sa-4.0")
    front = front_matter(text)
    assert front["base_model"] == "models/glm4-moe-mini" and front["license"] == "cc-by-sa-4.0"
    assert SYSTEM in text and "1,298,432" in text and "rank 8, lora_alpha 32" in text
    assert str(utils.ROOT) not in text
    assert "python -m finetune evaluate" in text  # nothing was measured


def test_the_card_says_what_was_measured(course):
    figures = {"loss": 5.5, "stops": 1.0, "equal": 0.0}
    answers = [{"asked": [{"role": "user", "content": "你|好"}], "reference": "", "base": "好\n", "adapter": "本宫安"}]
    one = {"rows": 24, "base": figures, "adapter": figures | {"loss": 1.25, "stops": 0.5}, "answers": answers}
    (course.output / evaluate.FILE).write_text(json.dumps({"sets": {"new wordings": one}}), "utf-8")
    checkpoint = course.output / "lora" / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    log = [
        {"step": 0, "eval_new_answers_loss": 5.0},
        {"step": 2, "eval_new_answers_loss": 4.0},
        {"step": 2, "loss": 1.0},
    ]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}), "utf-8")
    (checkpoint.parent / "made_from.json").write_text(json.dumps({"rows": 3318, "epochs": 2, "batch": 16}), "utf-8")
    text = share.card(share.Run.of(course), NAME, "other")
    for line in (
        "| new wordings | 24 | 5.50 → 1.25 | 100% → 50% |",
        "| new answers | 5.000 | 4.000 |",
        "| rows | 3318 |",
        "| batch size | 16 |",
        "| 你\\|好 | 好  | 本宫安 |",
    ):
        assert line in text, text


def test_without_evaluate_the_figures_are_notebook_06s(course):
    utils.report(course, heldout={"situations": [[4.0, 1.0, 0.2, 0.0], [3.5, 0.9, 0.5, 0.0]]})
    text = share.card(share.Run.of(course), NAME, "other")
    assert "| situations | 4.00 → 3.50 | 100% → 90% |" in text
    assert "| set | loss, nats a token | stops by itself |" in text  # no column for counts that nobody noted


@pytest.mark.parametrize(
    ("variables", "licence"),
    [
        ({}, "cc-by-sa-4.0"),
        ({"COURSE_MODEL": "ZhipuAI/GLM-4.5-Air"}, "cc-by-4.0"),
        ({"COURSE_DATA": "x.json"}, "other"),
    ],
    ids=["bundled", "real model", "rows of one's own"],
)
def test_the_licence_follows_base_and_rows(monkeypatch, variables, licence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert share.licence_of(utils.settings()) == licence


@pytest.mark.parametrize("public", [False, True], ids=["private", "public"])
def test_what_is_downloaded_is_what_was_uploaded(folder, hub, tmp_path, capfd, public):
    assert share.upload(folder, NAME, TOKEN, public, "cc-by-sa-4.0", hub.endpoint).endswith(NAME)
    assert hub.created == {
        "Path": "me",
        "Name": "huanhuan",
        "Visibility": 5 if public else 1,
        "License": "cc-by-sa-4.0",
    }
    said = capfd.readouterr()
    assert not said.out and TOKEN not in said.err
    cache = tmp_path / "cache"
    fetched = snapshot_download(NAME, revision="master", cache_dir=str(cache), endpoint=hub.endpoint)
    assert files_of(tmp_path / "hub") == files_of(folder)
    assert {
        name: data for name, data in files_of(type(folder)(fetched)).items() if name in files_of(folder)
    } == files_of(folder)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not kept, "the token was written to a file"


def test_a_second_upload_changes_the_card(folder, hub, tmp_path):
    share.upload(folder, NAME, TOKEN, endpoint=hub.endpoint)
    (folder / "README.md").write_text("another card", "utf-8")
    share.upload(folder, NAME, TOKEN, endpoint=hub.endpoint)
    assert (tmp_path / "hub" / "README.md").read_text("utf-8") == "another card"


def test_a_token_that_is_refused_is_one_message_without_it(folder, hub, tmp_path, capfd):
    with pytest.raises(utils.CourseError, match="does not take the token") as stopped:
        share.upload(folder, NAME, "a-wrong-token", endpoint=hub.endpoint)
    assert "a-wrong-token" not in str(stopped.value) + "".join(capfd.readouterr())
    assert not hub.created and not list((tmp_path / "hub").iterdir())


def test_a_token_that_may_create_and_not_write_is_one_message(folder, hub, monkeypatch):
    take = LocalHub._take

    def no_commits(self, request):
        if "/commit/" in request.path:
            request.rfile.read(int(request.headers["Content-Length"]))
            return self._say(request, 403, "no right to write")
        return take(self, request)

    monkeypatch.setattr(LocalHub, "_take", no_commits)
    with pytest.raises(utils.CourseError, match="does not take the token"):
        share.upload(folder, NAME, TOKEN, endpoint=hub.endpoint)


def test_without_a_way_to_the_hub_it_is_said(folder):
    with pytest.raises(utils.CourseError, match="does not answer"):
        share.upload(folder, NAME, TOKEN, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["huanhuan", "me/", "me/huan huan", "../me/huanhuan"])
def test_a_name_that_is_no_repository_is_refused(folder, name):
    with pytest.raises(utils.CourseError, match="is no repository"):
        share.upload(folder, name, TOKEN)


def test_the_command_takes_the_token_of_the_variable(course, hub, tmp_path):
    environment = os.environ | {share.VARIABLE: TOKEN, "MODELSCOPE_ENDPOINT": hub.endpoint}
    command = [sys.executable, "-m", "finetune", "share", NAME]
    done = subprocess.run(command, cwd=utils.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"/models/{NAME}" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert "adapter_model.safetensors" in files_of(tmp_path / "hub")


def test_the_command_without_a_token_says_where_it_comes_from(course, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", open("/dev/null", encoding="utf-8"))  # noqa: SIM115, PTH123
    assert commands.main(["share", NAME]) == 1
    assert "Set MODELSCOPE_API_TOKEN, or run modelscope login once." in capsys.readouterr().err


def test_before_training_the_command_says_what_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path))
    monkeypatch.setenv(share.VARIABLE, TOKEN)
    assert commands.main(["share", NAME]) == 1
    assert "Run notebook 05_lora_training first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("route", "body"),
    [("/api/v1/models", b"{}"), (f"/api/v1/repos/models/{NAME}/commit/master", b'{"actions": []}')],
    ids=["create", "commit"],
)
def test_a_hub_without_a_token_takes_nothing(tmp_path, route, body):
    import requests

    with LocalHub(tmp_path, NAME) as hub:
        for headers in ({}, {"Authorization": "Bearer "}):
            assert requests.post(hub.endpoint + route, body, headers=headers, timeout=5).status_code == 401
    assert not list(tmp_path.iterdir())
