"""The page of results holds the numbers of the run's files, says what was not measured, and is replaced whole."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import utils
from course import plots
from finetune import __main__ as commands
from finetune import evaluate, report

SYSTEM = "现在你要扮演皇帝身边的女人--甄嬛"
MADE_WITH = {"rows": 1234, "epochs": 7, "batch_size": 32, "groups": ["attention", "dense"], "learning_rate": 0.0021}
DRAW = plots.picture
LOG = [
    {"step": 0, "eval_new_answers_loss": 5.125, "eval_new_wordings_loss": 5.25},
    {"step": 10, "loss": 4.5},
    {"step": 20, "loss": 3.5},
    {"step": 20, "eval_new_answers_loss": 4.0625, "eval_new_wordings_loss": 3.0},
    {"step": 30, "eval_new_answers_loss": 4.75, "eval_new_wordings_loss": 2.375},
]
BASE, ADAPTER, NO_PROMPT = ({"loss": loss, "stops": 0.875, "equal": 0.125} for loss in (5.5, 1.25, 6.75))
JUDGED = {
    "shares": [{"author": "adapter, 4 beams", "set": "second_turns", "answers": 40, "reader_1": 0.55, "both": 0.525}],
    "agreement": 0.875,
    "kappa": 0.625,
}


def answer(number, text="本宫安"):
    asked = [{"role": "user", "content": f"问{number}"}]
    return {"asked": asked, "reference": f"答{number}", "base": f"基{number}", "adapter": f"{text}{number}"}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def undrawn(figure, alt):
    """A picture with the same text, in no time."""
    plots.pyplot().close(figure)
    return utils.Shown("", alt, b"not drawn")


@pytest.fixture
def course(tmp_path, monkeypatch):
    """An output folder after training, with an adapter made up of one layer, a log, and an evaluation."""
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setattr(plots, "picture", undrawn)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("it was evaluated already"))
    settings = utils.settings()
    run, config = settings.output / "lora", AutoConfig.from_pretrained(utils.BUNDLED)
    utils.stamp(run, settings)
    write(run / "prompt.json", {"system": SYSTEM})
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_{}.weight"
    keys = config.num_key_value_heads * config.head_dim
    shapes = {"A": (4, config.hidden_size), "B": (keys, 4)}
    (run / "adapter").mkdir()
    tensors = {name.format(letter): torch.ones(shape) for letter, shape in shapes.items()}
    save_file(tensors, run / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    adapter = {"base_model_name_or_path": str(utils.BUNDLED), "r": 4, "lora_alpha": 16, "target_modules": ["k_proj"]}
    write(run / "adapter" / "adapter_config.json", {"peft_type": "LORA", "task_type": "CAUSAL_LM"} | adapter)
    utils.name_base(run / "adapter", settings)
    write(run / "checkpoints" / "made_from.json", MADE_WITH)
    state = {"log_history": LOG, "global_step": 30, "max_steps": 30}
    write(run / "checkpoints" / "checkpoint-30" / "trainer_state.json", state)
    one = {"rows": 24, "base": BASE, "adapter": ADAPTER, "answers": [answer(1), answer(2), answer(3)]}
    evaluation = {"model": "x", "load_in_4bit": True, "sets": {"new wordings": one, "situations": one}}
    write(settings.output / evaluate.FILE, evaluation)
    return settings


def changed(course, change, name=evaluate.FILE):
    """Change a JSON file of the run."""
    path = course.output / name
    facts = json.loads(path.read_text("utf-8"))
    change(facts)
    write(path, facts)


def page():
    assert commands.main(["report"]) == 0
    return (utils.settings().output / "report" / "README.md").read_text("utf-8")


def lines_in(text, *lines):
    for line in lines:
        assert line in text.splitlines(), f"{line}\n\n{text}"


def test_settings_losses_and_figures_are_those_of_the_files(course):
    with torch.device("meta"):
        total = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(utils.BUNDLED)).num_parameters()
    total += 6 * 16  # the routers' corrections: buffers of the model, tensors of the checkpoint
    write(course.output / "rows" / "new_wordings.json", [{}] * 5)
    lines_in(
        page(),
        "# Results of a run: models/glm4-moe-mini",
        f"| torch | {torch.__version__} |",
        f"| parameters, without the MTP layer | {total:,} |",
        f"| parameters of the LoRA adapter | 2,048 ({2048 / total:.2%}) |",
        "| weights of the base during the evaluation | 4 bits (NF4) |",
        "| data | `huanhuan.json, conversations.jsonl` |",
        "| training rows | 1234 |",
        "| validation rows: new wordings | 5 |",
        "| validation rows: new answers | not measured |",
        "| `groups` | attention, dense |",
        "| `learning_rate` | 0.0021 |",
        "| optimizer steps | 30 of 30 |",
        "| time of the training | not measured |",
        "| new answers | 5.125 | 0 | 4.750 | 30 | 4.062 | 20 |",
        "| new wordings | 5.250 | 0 | 2.375 | 30 | 2.375 | 30 |",
        "| training | 4.500 | 10 | 3.500 | 20 | 3.500 | 20 |",
        f"> {SYSTEM}",
        "| new wordings | no prompt | 24 | not measured | not measured | not measured |",
        "| new wordings | prompt only | 24 | 5.500 | 87.5% | 12.5% |",
        "| situations | LoRA | 24 | 1.250 | 87.5% | 12.5% |",
        "- `.../output/evaluation.json`",
    )


def test_the_pictures_lie_beside_the_page_and_say_the_same(course, monkeypatch):
    monkeypatch.setattr(plots, "picture", DRAW)
    text = page()
    pictures = dict(re.findall(r"!\[(.*)\]\((.*)\)", text))
    assert sorted(pictures.values()) == ["losses.png", "measured.png"]
    for name in pictures.values():
        assert (course.output / "report" / name).read_bytes().startswith(b"\x89PNG")
    alt = " ".join(pictures)
    assert "new answers from 5.12 at step 0 to 4.75 at step 30" in alt
    assert "situations: prompt only 5.50, LoRA 1.25" in alt


def test_two_answers_of_each_set_are_side_by_side(course):
    text = page()
    for number in (1, 2):
        assert text.count(f"| 问{number} | 答{number} | not measured | 基{number} | 本宫安{number} |") == 2
    assert "问3" not in text


@pytest.mark.parametrize("key", ["no_prompt", "no prompt"])
def test_the_third_condition_is_shown_where_it_was_measured(course, key):
    def add(facts):
        facts["sets"]["situations"][key] = NO_PROMPT
        for row in facts["sets"]["situations"]["answers"]:
            row[key] = "我是助手"

    changed(course, add)
    text = page()
    lines_in(
        text,
        "| situations | no prompt | 24 | 6.750 | 87.5% | 12.5% |",
        "| new wordings | no prompt | 24 | not measured | not measured | not measured |",
        "| 问1 | 答1 | 我是助手 | 基1 | 本宫安1 |",
    )
    assert "situations: no prompt 6.75, prompt only 5.50, LoRA 1.25" in text


def test_nothing_in_an_answer_works(course):
    row = answer(1, "a|b <img src=x> [c](http://d) `e` $f$\n") | {"asked": [{"role": "user", "content": "问"}] * 3}
    changed(course, lambda facts: facts["sets"]["situations"].update(answers=[row]))
    text = page()
    assert r"| a\|b &lt;img src=x&gt; \[c\](http://d) \`e\` \$f\$<br>1 |" in text
    assert "| question: 问<br>question: 问<br>question: 问 | 答1 |" in text


def test_answers_that_nobody_judged_are_said_to_be_so(course):
    assert "nobody has judged" in page()
    write(course.output / report.JUDGED, JUDGED)
    text = page()
    lines_in(text, "| second turns | LoRA, 4 beams | 40 | 55% | 52% |", "- `.../output/judged.json`")
    assert "agree on 88% of the answers; Cohen's kappa is 0.62." in text and "nobody" not in text
    os.utime(course.output / report.JUDGED, (0, 0))  # so it is of an earlier adapter
    assert "nobody has judged" in page()


def test_a_run_without_a_log_is_said_to_be_so(course):
    for path in (course.output / "lora" / "checkpoints").rglob("*.json"):
        path.unlink()
    text = page()
    lines_in(text, "| training rows | not measured |", "| optimizer steps | not measured |", "| `rank` | 4 |")
    assert "Losses during the training: not measured" in text and "losses.png" not in text


@pytest.mark.parametrize("state", ["missing", "older than the adapter"])
def test_it_evaluates_where_that_was_not_done(course, monkeypatch, state):
    path, calls = course.output / evaluate.FILE, []
    facts = json.loads(path.read_text("utf-8"))
    monkeypatch.setattr(evaluate, "evaluate", lambda *options: (calls.append(options), write(path, facts)))
    path.unlink() if state == "missing" else os.utime(path, (0, 0))
    assert commands.main(["report", "--rows", "3", "--load-in-4bit"]) == 0
    page()
    assert calls == [(True, 3)]


def test_an_older_page_is_kept_whole(course):
    page()
    left = course.output / "report" / "left.txt"
    left.write_text("of the first page", "utf-8")
    changed(course, lambda facts: facts["sets"].pop("situations"))
    assert "situations" not in page()
    assert not left.exists()
    previous = course.output / "report-previous"
    assert (previous / "left.txt").exists() and "situations" in (previous / "README.md").read_text("utf-8")
    assert not list(course.output.glob(".report-*"))


def test_the_page_follows_the_language(course, monkeypatch):
    monkeypatch.setenv("COURSE_LANGUAGE", "zh")
    text = page()
    lines_in(text, "## 人工评判", "| 情景 | 无提示词 | 24 | 未测量 | 未测量 | 未测量 |")
    assert "not measured" not in text


# --------------------------------------------------------------------------------------------------------- errors


def complaint(capsys):
    assert commands.main(["report"]) == 1
    return capsys.readouterr().err


def test_before_training_it_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path))
    assert "Run notebook 05_lora_training first" in complaint(capsys)


@pytest.mark.parametrize("text", ["", '{"sets": {"new', "[]", "{}", '{"sets": {"new wordings": {"rows": 3}}}'])
def test_a_damaged_evaluation_is_named_with_its_cure(course, capsys, text):
    page()
    (course.output / evaluate.FILE).write_text(text, "utf-8")
    said = complaint(capsys)
    assert "output/evaluation.json is damaged" in said and "Delete it, then run python -m finetune report" in said
    assert (course.output / "report" / "README.md").is_file()


@pytest.mark.parametrize("name", [report.JUDGED, "lora/checkpoints/checkpoint-30/trainer_state.json"])
def test_so_is_any_other_damaged_file(course, capsys, name):
    (course.output / name).write_text('{"shares": [{}]}', "utf-8")
    assert f"{Path(name).name} is damaged" in complaint(capsys)


@pytest.mark.parametrize("while_it", ["evaluates", "writes a picture", "writes the page"])
def test_a_full_disk_is_one_message_and_the_older_page_stays(course, monkeypatch, capsys, while_it):
    before = page()

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if while_it == "evaluates":
        (course.output / evaluate.FILE).unlink()
        monkeypatch.setattr(evaluate, "evaluate", full)
    else:
        monkeypatch.setattr(Path, "write_bytes" if while_it == "writes a picture" else "write_text", full)
    said = complaint(capsys)
    assert "cannot be written (No space left on device). Free some disk" in said
    assert (course.output / "report" / "README.md").read_text("utf-8") == before
    assert not list(course.output.glob(".report-*"))
