"""The adapter that was trained for longer: `models/huanhuan-lora`, and `--adapter` of the commands that take one."""

import json
import re

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

import utils
from course.model_folder import trained_folder
from finetune import chat
from finetune.__main__ import main
from finetune.export import require_trained
from finetune.lora import adapter_fits
from finetune.model import load_model

LONGER = ROOT / "models" / "huanhuan-lora"


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """An output folder in which nothing was trained."""
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "output"))
    return tmp_path


def test_it_is_whole_fits_the_bundled_model_and_names_no_folder_of_a_machine():
    settings = json.loads((LONGER / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert settings["base_model_name_or_path"] == "models/glm4-moe-mini" and settings["r"] == 64
    adapter_fits(LONGER / "adapter", load_model(utils.BUNDLED).config)
    assert require_trained(LONGER / "adapter") == 122
    file = LONGER / "adapter" / "adapter_model.safetensors"
    assert file.stat().st_size < 21 * 2**20
    with safe_open(file, "pt") as tensors:
        assert all(tensors.get_tensor(name).dtype == torch.bfloat16 for name in tensors.keys())  # noqa: SIM118


def test_its_prompt_is_that_of_the_rows():
    said = json.loads((LONGER / "prompt.json").read_text("utf-8"))["system"]
    assert said in (ROOT / "notebooks" / "en" / "04_chat_template.ipynb").read_text("utf-8")


def test_it_knows_her_story_also_in_a_second_turn(untrained):
    persona = chat.Persona(beams=chat.BEAMS, strength=chat.STRENGTH, adapter=str(LONGER))
    assert "甄嬛" in persona.answer("请问您是哪一位？")
    persona.turns.clear()
    assert "甄远道" in persona.answer("你父亲是谁？")
    assert re.search("大理寺|刑狱", persona.answer("他做什么官？"))  # the court of justice, criminal cases


def test_chat_export_and_merge_take_it_where_nothing_was_trained(untrained, monkeypatch, capsys):
    asked = iter(["你父亲是谁？", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    assert main(["chat", "--adapter", str(LONGER)]) == 0
    assert "甄远道" in capsys.readouterr().out
    assert main(["export", "adapter", str(untrained / "copy"), "--adapter", str(LONGER)]) == 0
    copied = untrained / "copy" / "adapter_model.safetensors"
    assert copied.read_bytes() == (LONGER / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (untrained / "copy" / "prompt.json").read_text("utf-8") == (LONGER / "prompt.json").read_text("utf-8")
    assert main(["merge", str(untrained / "merged"), "--adapter", str(LONGER)]) == 0
    assert (untrained / "merged" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("command", [["chat"], ["evaluate"], ["export", "adapter", "out"], ["merge", "out"]])
def test_a_folder_without_a_training_is_named(untrained, monkeypatch, capsys, command):
    monkeypatch.chdir(untrained)
    assert main([*command, "--adapter", str(utils.BUNDLED)]) == 1
    assert "holds no training" in capsys.readouterr().err


def test_evaluate_takes_it_and_leaves_the_learners_figures(untrained, monkeypatch, capsys):
    monkeypatch.setattr(utils, "require", lambda folder, *_: folder)  # as if notebook 03 had run
    output = untrained / "output"
    (output / "rows").mkdir(parents=True)
    (output / "evaluation.json").write_text("{}", "utf-8")
    assert main(["evaluate", "--rows", "2", "--adapter", str(LONGER)]) == 0
    assert "evaluation-huanhuan-lora.json" in capsys.readouterr().out
    found = json.loads((output / "evaluation-huanhuan-lora.json").read_text("utf-8"))
    assert found["trained"].endswith("huanhuan-lora")
    # Three turns end with a question that a reference answers: the longer training makes it likelier.
    turns = found["sets"]["second turns"]
    assert turns["adapter"]["loss"] < turns["base"]["loss"]
    assert (output / "evaluation.json").read_text("utf-8") == "{}"


def test_figures_of_another_adapter_with_the_same_folder_name_are_kept(untrained, monkeypatch, capsys):
    monkeypatch.setattr(utils, "require", lambda folder, *_: folder)
    output = untrained / "output"
    output.mkdir()
    file = output / "evaluation-huanhuan-lora.json"
    file.write_text(json.dumps({"weights_sha256": "another"}), "utf-8")
    assert main(["evaluate", "--rows", "1", "--adapter", str(LONGER)]) == 0
    assert "evaluation-huanhuan-lora-previous.json" in capsys.readouterr().out
    kept = json.loads((output / "evaluation-huanhuan-lora-previous.json").read_text("utf-8"))
    assert kept == {"weights_sha256": "another"}
    assert json.loads(file.read_text("utf-8"))["weights_sha256"] != "another"


def test_evaluate_sees_before_it_measures_that_nothing_can_be_written(untrained, monkeypatch, capsys):
    monkeypatch.setattr(utils, "require", lambda folder, *_: folder)
    (untrained / "output").write_text("a file", "utf-8")
    assert main(["evaluate", "--rows", "1", "--adapter", str(LONGER)]) == 1
    said = capsys.readouterr()
    assert "cannot be written" in said.err and "questions asked" not in said.out


def test_the_projects_adapter_is_found_from_any_folder(untrained, monkeypatch):
    monkeypatch.chdir(untrained)
    assert trained_folder(utils.settings(), "models/huanhuan-lora") == LONGER


def test_a_line_of_another_encoding_and_a_stopped_answer_do_not_end_the_chat(untrained, monkeypatch, capsys):
    asked = iter(["你是谁".encode("gbk").decode("utf-8", "surrogateescape"), "你是谁？", "你父亲是谁？", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    answers, calls = chat.Persona.texts, []

    def stopped_once(persona, question, *more):
        calls.append(question)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from answers(persona, question, *more)

    monkeypatch.setattr(chat.Persona, "texts", stopped_once)
    assert main(["chat", "--adapter", str(LONGER)]) == 0
    said = capsys.readouterr().out
    assert calls == ["你是谁？", "你父亲是谁？"]
    assert "not UTF-8" in said and "甄远道" in said


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-size", "0"],
        ["--batch-size", "-4"],
        ["--gradient-accumulation-steps", "0"],
        ["--lora-rank", "-1"],
        ["--epochs", "-2"],
        ["--save-steps", "0"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "0"],
    ],
)
def test_a_number_that_cannot_be_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        main(["plan", *flags])
    said = capsys.readouterr().err
    assert flags[0] in said and f"'{flags[1]}' is no" in said


def test_a_flag_of_another_command_is_not_recommended(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--adapter", "models/huanhuan-lora"])
    said = capsys.readouterr().err
    assert "This command has no --adapter" in said and "use --adapter" not in said
