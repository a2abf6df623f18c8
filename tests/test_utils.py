import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from conftest import ROOT

import utils
from course import plots, swanlab_record, widgets
from course.hub import LocalHub
from course.model_folder import model_folder
from course.rows import load_rows

GOOD = {"instruction": "你是谁？", "input": "", "output": "我是甄嬛。"}


def write(path: Path, content: object) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()
    path.write_bytes(data)
    return path


TALK = {"messages": [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是甄嬛。"}]}


def test_good_rows_come_back_as_conversations(tmp_path):
    assert load_rows(write(tmp_path / "a.json", [{**GOOD, "fact": "who"}])) == [TALK]


def test_a_byte_order_mark_is_accepted(tmp_path):
    assert load_rows(write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())) == [TALK]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[{", "not JSON"),
        (b'{"a": 1}\n{"a": 2,}\n', "JSON Lines, but line 2"),
        ("né".encode("latin-1"), "not UTF-8"),
        ([], "an empty list"),
        ({"a": 1}, "one object with 'a'"),
        ([GOOD, {**GOOD, "output": " "}], "row 2 'output' is empty: write it"),
        ([{**GOOD, "output": 3}], "row 1 'output' is int, not text"),
        ([{"instruction": "你", "input": "好"}], "row 1 has no field 'output': add it"),
        ([{**GOOD, "input": 3}], "row 1 'input' is int"),
        ([["你", "好"]], "row 1 is list, not an object"),
        ([{**GOOD, "output": "长" * 20_001}], "20,001 characters"),
        ([{**GOOD, "input": "\ufdd0"}], "U+FDD0"),
    ],
)
def test_a_bad_file_is_named_with_row_and_mend(tmp_path, content, said):
    path = write(tmp_path / "mine.json", content)
    with pytest.raises(utils.CourseError) as error:
        load_rows(path)
    assert "mine.json" in str(error.value)
    assert said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(utils.CourseError, match=r"nowhere.json: no such file"):
        load_rows(tmp_path / "nowhere.json")


def test_settings_come_from_the_environment(monkeypatch):
    assert utils.settings().bundled
    monkeypatch.setenv("COURSE_MODEL", "ZhipuAI/GLM-4.5-Air")
    monkeypatch.setenv("COURSE_DATA", "dataset/heldout.json")
    course = utils.settings()
    assert course.model == "ZhipuAI/GLM-4.5-Air"
    assert course.data == utils.ROOT / "dataset" / "heldout.json"
    with pytest.raises(utils.CourseError, match="02_download"):
        model_folder(course)


@pytest.mark.parametrize(("name", "value"), [("SWANLAB_MODE", "clowd"), ("SWANLAB_PROJECT", "x")])
def test_settings_that_would_crash_later_are_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(utils.CourseError, match=name):
        utils.settings()


def test_a_pickle_checkpoint_is_refused(monkeypatch, tmp_path):
    write(tmp_path / "config.json", {})
    write(tmp_path / "pytorch_model.bin", b"x")
    monkeypatch.setenv("COURSE_MODEL", str(tmp_path))
    with pytest.raises(utils.CourseError, match="safetensors"):
        model_folder(utils.settings())


def test_a_step_made_from_other_data_is_refused(monkeypatch, tmp_path):
    data = write(tmp_path / "mine.json", [GOOD])
    monkeypatch.setenv("COURSE_DATA", str(data))
    course = utils.settings()
    with pytest.raises(utils.CourseError, match="Run notebook 03_dataset first"):
        utils.require(tmp_path / "rows", "03_dataset", course)
    utils.stamp(tmp_path / "rows", course)
    assert utils.require(tmp_path / "rows", "03_dataset", course)
    write(data, [GOOD, GOOD])
    with pytest.raises(utils.CourseError, match="other data"):
        utils.require(tmp_path / "rows", "03_dataset", course)


def test_a_step_made_with_other_settings_is_refused_and_set_aside(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(write(tmp_path / "mine.json", [GOOD])))
    course = utils.settings()
    utils.stamp(tmp_path / "lora", course, rank=8)
    assert utils.require(tmp_path / "lora", "05", course, rank=8)
    with pytest.raises(utils.CourseError, match="was made with rank = 8, not 16"):
        utils.require(tmp_path / "lora", "05", course, rank=16)
    for _ in range(2):
        utils.restart(tmp_path / "lora")
        assert not any((tmp_path / "lora").iterdir())
        (tmp_path / "lora" / "new").touch()
    assert [path.name for path in (tmp_path / "lora-previous").iterdir()] == ["new"]


def test_what_was_made_is_still_known_after_the_project_has_moved(monkeypatch, tmp_path):
    utils.stamp(tmp_path / "rows", utils.settings())
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "dataset").symlink_to(ROOT / "dataset")
    monkeypatch.setattr(utils, "ROOT", moved)
    here = {"model": str(moved / "models" / "glm4-moe-mini"), "data": moved / "dataset" / "huanhuan.json"}
    course = replace(utils.settings(), **here)
    assert utils.require(tmp_path / "rows", "03_dataset", course)
    with pytest.raises(utils.CourseError, match="another model"):
        utils.require(tmp_path / "rows", "03_dataset", replace(course, model=str(moved / "models" / "other")))


def test_a_model_of_another_kind_is_refused(monkeypatch, tmp_path):
    write(tmp_path / "config.json", {"model_type": "qwen3"})
    write(tmp_path / "model.safetensors", b"x")
    monkeypatch.setenv("COURSE_MODEL", str(tmp_path))
    with pytest.raises(utils.CourseError, match="is a qwen3 model"):
        model_folder(utils.settings())


def test_special_token_spellings_stay_text(tokenizer):
    added = set(tokenizer.get_added_vocab().values())
    for spelling in tokenizer.get_added_vocab():
        text = f"前{spelling}后"
        ids = utils.encode(tokenizer, utils.as_text(tokenizer, text))
        assert not added & set(ids), spelling
        assert tokenizer.decode(ids) == text


def test_a_course_error_shows_its_message_alone():
    code = "from IPython.core.interactiveshell import InteractiveShell as S\nimport utils\ns = S.instance()\n"
    code += "s.push({'utils': utils})\ns.run_cell('raise utils.CourseError(\"change it\")')"
    done = subprocess.run([sys.executable, "-c", code], cwd=utils.ROOT, capture_output=True, text=True, check=True)
    assert "CourseError: change it" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_local_hub_serves_only_its_folder(tmp_path):
    import urllib.error
    import urllib.request

    write(tmp_path / "secret.txt", b"secret")
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "config.json", {})
    with LocalHub(folder, "a/b") as hub:
        base = f"{hub.endpoint}/api/v1/models/a/b/repo"
        assert urllib.request.urlopen(f"{base}?FilePath=config.json").read() == b"{}"
        for path in ("../secret.txt", "%2e%2e/secret.txt", str(tmp_path / "secret.txt")):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{base}?FilePath={path}")


def chat_parts(box, names=("base", "adapter")):
    """The chat box's question field, button, two switches, template text, and the column of each model."""
    (field, button), (keep, show) = (row.children for row in box.children[:2])
    return (
        field,
        button,
        keep,
        show,
        box.children[2],
        dict(zip(names, box.children[3].children, strict=True)),
    )


def test_the_chat_box_answers_side_by_side_as_text():
    box = widgets.chat_box(lambda name, turns: f"<b>{name}: {turns[-1]['content']}</b>", lambda turns: str(len(turns)))
    field, button, _, _, _, columns = chat_parts(box)
    field.value = "你好"
    button.click()
    for name, column in columns.items():
        _, turn = column.children
        assert turn.value == f"Q: 你好\n<b>{name}: 你好</b>"
        assert type(turn).__name__ == "Textarea"  # it shows markup as text


def test_the_chat_box_has_a_third_column_for_the_longer_training():
    box = widgets.chat_box(lambda name, turns: name, lambda turns: "", longer=True)
    _, button, _, _, _, columns = chat_parts(box, ("base", "adapter", "longer"))
    button.click()
    assert [column.children[1].value.splitlines()[1] for column in columns.values()] == ["base", "adapter", "longer"]
    assert {column.layout.width for column in columns.values()} == {"33%"}


def test_the_chat_box_keeps_the_conversation_only_when_asked():
    box = widgets.chat_box(lambda name, turns: "好。", lambda turns: " / ".join(turn["content"] for turn in turns))
    field, button, keep, show, prompt, _ = chat_parts(box)
    assert prompt.layout.display == "none"
    show.value = True
    assert prompt.layout.display != "none"
    for question, kept, text in (("一", False, "一"), ("二", False, "二"), ("三", True, "二 / 好。 / 三")):
        field.value, keep.value = question, kept
        button.click()
        assert prompt.value == text


def test_the_chat_box_shows_an_error_and_goes_on():
    answers = {"base": ["好。"]}
    box = widgets.chat_box(lambda name, turns: answers[name][0], lambda turns: "")
    _, button, _, _, _, columns = chat_parts(box)
    button.click()
    assert columns["adapter"].children[1].value == "Q: 你是谁？ (Who are you?)\nKeyError: 'adapter'"
    assert columns["base"].children[1].value == "Q: 你是谁？ (Who are you?)\n好。"
    assert not button.disabled


def test_the_chat_box_shows_an_answer_as_it_grows():
    def reply(name, turns):
        for text in ("好", "好。"):
            yield text
            shown.append(columns[name].children[1].value)
        if turns[-1]["content"] == "坏":
            raise ValueError("broke")

    asked, shown = [], []
    box = widgets.chat_box(reply, lambda turns: asked.append([turn["content"] for turn in turns]) or "")
    field, button, _, _, _, columns = chat_parts(box)
    for question in ("问", "坏", "又"):
        field.value = question
        button.click()
    assert shown[:2] == ["Q: 问\n好", "Q: 问\n好。"] and len(shown) == 12
    assert columns["base"].children[2].value == "Q: 坏\nValueError: broke"
    assert asked == [["问"], ["问", "好。", "坏"], ["又"]]  # what broke off is not part of the conversation


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (..., "○ open"),
        (3, "✓ right"),
        (4, "✗ not yet: too much\n"),
        ("3", "✗ not yet: a number (TypeError: "),
        (-1, "✗ not yet: too little"),
    ],
)
def test_a_check_says_whether_and_why(capsys, given, said):
    utils.check(
        given, (lambda a: a + 0 == a, "a number"), (lambda a: a > 0, "too little"), (lambda a: a < 4, "too much")
    )
    assert capsys.readouterr().out.startswith(said)


def test_the_mask_view_shows_every_token_and_two_signs(tokenizer):
    ids = tokenizer("<|user|>\n嬛<b>", add_special_tokens=False)["input_ids"]
    labels = [-100, -100, *ids[2:]]
    view = widgets.mask_view(tokenizer, ids, labels)
    assert view.text.splitlines()[0] == "read    ○ │<|user|>│⏎│"
    assert view.text.splitlines()[1].startswith("trained ● │嬛(2)│")
    assert f"{len(ids) - 2} of {len(ids)} tokens are trained" in view.text
    assert view.html.count("●") == view.html.count("4px solid") + 1  # the sign is beside the colour, and in the key
    assert "&lt;|user|&gt;" in view.html
    assert "<b>" not in view.html
    with pytest.raises(ValueError, match="a label belongs to each token"):
        widgets.mask_view(tokenizer, ids, labels[:-1])


HISTORY = [
    {"step": 0, "eval_new_facts_loss": 6.0, "eval_runtime": 1.0},
    {"step": 10, "loss": 3.0},
    {"step": 20, "loss": 2.0},
    {"step": 20, "eval_new_facts_loss": 4.0},
    {"step": 20, "eval_loss": 5.0},
]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: plots.loss_picture(HISTORY), "training from 3.00 at step 10 to 2.00 at step 20"),
        (lambda: plots.loss_picture(HISTORY), "new facts from 6.00 at step 0 to 4.00 at step 20"),
        (lambda: plots.loss_picture(HISTORY), "held-out from 5.00 at step 20"),
        (lambda: plots.loss_picture([]), "nothing yet"),
        (lambda: plots.length_picture([3, 9, 5], 10), "3 samples of 3 to 9 tokens, median 5"),
        (lambda: plots.nearest_picture({"a": [50, 90], "b": [10]}, 80), "a: 1 of 2 at 80 or more; b: 0 of 1"),
        (lambda: plots.share_picture({"m": {"x": 1, "y": 3}}), "x 25.0%, y 75.0%"),
        (lambda: plots.moved_picture({"q": {0: 0.0, 1: 0.5}}), "2 matrices lora_B; 1 stand at zero"),
        (
            lambda: plots.routing_picture({"prose": numpy.eye(3)[:2]}, 1),
            "prose: most used is expert 0 of layer 1, 100%",
        ),
    ],
)
def test_a_picture_says_in_words_what_it_shows(make, said):
    drawn = make()
    assert said in drawn.text
    assert drawn.html.count(drawn.text) == 2  # as alt text and as caption
    assert drawn.png.startswith(b"\x89PNG")


def test_a_picture_escapes_its_words():
    figure, _ = plots.axes()
    assert '"<' not in plots.picture(figure, '"<b>"').html.replace('"data:', "")


def test_what_swanlab_recorded_is_read_back(tmp_path):
    with pytest.raises(utils.CourseError, match="no local SwanLab run"):
        swanlab_record.recorded(tmp_path, "train/loss")
    code = f"import swanlab\nswanlab.init(project='t', experiment_name='x', mode='local', log_dir={str(tmp_path)!r})\n"
    code += "[swanlab.log({'train/loss': 3 - s}, step=s) for s in (0, 1, 2)]\nswanlab.finish()"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert swanlab_record.recorded(tmp_path, "train/loss") == {0: 3, 1: 2, 2: 1}
    with pytest.raises(utils.CourseError, match="holds nothing under eval/loss"):
        swanlab_record.recorded(tmp_path, "eval/loss")


def test_figures_of_many_processes_all_arrive(tmp_path):
    code = "import sys, utils\nfor i in range(20): utils.report(utils.settings(), **{f'{sys.argv[1]}-{i}': i})"
    environment = {**os.environ, "COURSE_OUTPUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", code, name], env=environment) for name in "abcd"]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert len(json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))) == 80


def test_progress_yields_every_item_and_ends_full(monkeypatch):
    shown = []

    class Handle:
        def update(self, bar):
            shown.append(bar)

    monkeypatch.setattr("IPython.display.display", lambda bar, display_id: shown.append(bar) or Handle())
    assert list(widgets.progress(["a", "b"], "letters")) == ["a", "b"]
    assert [re.search("letters: (.*?)(, about|</div>)", bar.html)[1] for bar in shown] == ["0 of 2", "1 of 2", "2 of 2"]
    assert "s left" in shown[1].html
    assert "left" not in shown[0].html + shown[2].html
    assert {str(bar) for bar in shown} == {"letters: 2"}


def test_a_watched_command_gives_what_subprocess_run_gives(monkeypatch):
    shown = []
    handle = type("Handle", (), {"update": staticmethod(shown.append)})
    monkeypatch.setattr("IPython.display.display", lambda bar, display_id: handle)
    code = "import sys; print('step 1/2'); print('x' * 200_000, file=sys.stderr); print('step 2/2'); sys.exit(3)"
    done = widgets.watched([sys.executable, "-c", code], dict(os.environ))
    assert (done.returncode, done.stdout, done.stderr) == (3, "step 1/2\nstep 2/2\n", "x" * 200_000 + "\n")
    assert ["1 of 2" in bar.html or "2 of 2" in bar.html for bar in shown] == [True, True]
