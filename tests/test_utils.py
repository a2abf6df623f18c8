import json
import subprocess
import sys
from pathlib import Path

import pytest

import utils

GOOD = {"instruction": "你是谁？", "input": "", "output": "我是甄嬛。"}


def write(path: Path, content: object) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()
    path.write_bytes(data)
    return path


def test_good_rows_come_back_with_their_three_fields(tmp_path):
    assert utils.load_rows(write(tmp_path / "a.json", [{**GOOD, "fact": "who"}])) == [GOOD]


def test_a_byte_order_mark_is_accepted(tmp_path):
    assert utils.load_rows(write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())) == [GOOD]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[{", "not JSON"),
        (b'{"a": 1}\n{"a": 2}\n', "JSON Lines"),
        ("你好".encode("gbk"), "not UTF-8"),
        ([], "an empty list"),
        (GOOD, "one dict"),
        ([GOOD, {**GOOD, "output": " "}], "row 2 'output' is empty: write it"),
        ([{**GOOD, "output": 3}], "row 1 'output' is int, not text"),
        ([{"instruction": "你", "output": "好"}], "row 1 has no field 'input': add it"),
        ([{**GOOD, "input": None}], "row 1 'input' is NoneType"),
        ([["你", "好"]], "row 1 is list, not an object"),
        ([{**GOOD, "output": "长" * 20_001}], "20,001 characters"),
        ([{**GOOD, "input": "\ufdd0"}], "U+FDD0"),
    ],
)
def test_a_bad_file_is_named_with_row_and_mend(tmp_path, content, said):
    path = write(tmp_path / "mine.json", content)
    with pytest.raises(utils.CourseError) as error:
        utils.load_rows(path)
    assert "mine.json" in str(error.value)
    assert said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(utils.CourseError, match=r"nowhere.json: no such file"):
        utils.load_rows(tmp_path / "nowhere.json")


def test_settings_come_from_the_environment(monkeypatch):
    assert utils.settings().bundled
    monkeypatch.setenv("COURSE_MODEL", "ZhipuAI/GLM-4.5-Air")
    monkeypatch.setenv("COURSE_DATA", "dataset/heldout.json")
    course = utils.settings()
    assert course.model == "ZhipuAI/GLM-4.5-Air"
    assert course.data == utils.ROOT / "dataset" / "heldout.json"
    with pytest.raises(utils.CourseError, match="02_download"):
        utils.model_folder(course)


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
        utils.model_folder(utils.settings())


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


def test_special_token_spellings_stay_text(tokenizer):
    added = set(tokenizer.get_added_vocab().values())
    for spelling in tokenizer.get_added_vocab():
        text = f"前{spelling}后"
        ids = utils.encode(tokenizer, utils.as_text(tokenizer, text))
        assert not added & set(ids), spelling
        assert tokenizer.decode(ids) == text


def test_a_course_error_shows_its_message_alone():
    code = "from IPython.core.interactiveshell import InteractiveShell as S\nimport utils\ns = S.instance()\n"
    code += "s.push({'utils': utils})\ns.run_cell('raise utils.CourseError(\"mend it\")')"
    done = subprocess.run([sys.executable, "-c", code], cwd=utils.ROOT, capture_output=True, text=True, check=True)
    assert "CourseError: mend it" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_local_hub_serves_only_its_folder(tmp_path):
    import urllib.error
    import urllib.request

    write(tmp_path / "secret.txt", b"secret")
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "config.json", {})
    with utils.LocalHub(folder, "a/b") as hub:
        base = f"{hub.endpoint}/api/v1/models/a/b/repo"
        assert urllib.request.urlopen(f"{base}?FilePath=config.json").read() == b"{}"
        for path in ("../secret.txt", "%2e%2e/secret.txt", str(tmp_path / "secret.txt")):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{base}?FilePath={path}")


def test_the_chat_box_answers_as_text():
    box = utils.chat_box(lambda question: {"adapter": f"<b>{question}</b>"})
    field, button = box.children[0].children
    field.value = "你好"
    button.click()
    shown = [child.value for child in box.children[1].children]
    assert shown == ["Q: 你好", "adapter: <b>你好</b>"]
    assert type(box.children[1].children[1]).__name__ == "Label"  # a Label shows markup as text


def test_the_chat_box_shows_an_error():
    box = utils.chat_box({}.__getitem__)
    box.children[0].children[1].click()
    assert "error: KeyError" in box.children[1].children[1].value
