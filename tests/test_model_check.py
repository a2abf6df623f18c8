"""A model's folder is checked before it is used: one message for each fault, with the file and the fix."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import ROOT

import utils
from course import download, model_folder
from course.hub import LocalHub

CASES = ROOT / "tests" / "support" / "cases"


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model; its weights are links, for nothing here reads them."""
    made = tmp_path / "model"
    made.mkdir()
    for path in utils.BUNDLED.iterdir():
        if path.suffix == ".safetensors":
            (made / path.name).symlink_to(path)
        else:
            shutil.copy(path, made)
    return made


def refused(folder, monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", str(folder))
    with pytest.raises(utils.CourseError) as said:
        model_folder.model_folder(utils.settings())
    return str(said.value)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def test_a_sound_folder_is_taken_at_once(folder, monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", str(folder))
    assert model_folder.model_folder(utils.settings()) == folder  # imports what it needs
    begun = time.monotonic()
    model_folder.model_folder(utils.settings())
    assert time.monotonic() - begun < 1


POINTERS = ["model-00002-of-00005.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", POINTERS)
def test_a_pointer_of_git_lfs_is_known(folder, monkeypatch, name):
    (folder / name).unlink()
    shutil.copy(CASES / "shard_lfs_pointer.safetensors", folder / name)
    said = refused(folder, monkeypatch)
    assert name in said
    assert "git lfs pull" in said


def test_many_pointers_are_counted_and_an_adapters_too(tmp_path):
    for number in range(5):
        shutil.copy(CASES / "shard_lfs_pointer.safetensors", tmp_path / f"model-{number}.safetensors")
    with pytest.raises(utils.CourseError, match=r"model-0.* and 2 more: pointers of Git LFS"):
        model_folder.whole(tmp_path)


def test_an_fp8_checkpoint_is_refused_with_the_one_to_take(folder, monkeypatch):
    shutil.copy(CASES / "fp8_config.json", folder / "config.json")
    said = refused(folder, monkeypatch)
    assert "compressed-tensors" in said
    assert "Take ZhipuAI/GLM-4.5-Air" in said


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "bitsandbytes"])
def test_other_quantised_checkpoints_are_refused(folder, monkeypatch, method):
    edit(folder / "config.json", quantization_config={"quant_method": method})
    said = refused(folder, monkeypatch)
    assert f"({method} in its config.json)" in said
    assert "Take ZhipuAI/GLM-4.5-Air" in said


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "\ufeff<html>"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_file_that_is_no_json_is_named(folder, monkeypatch, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    assert f"model/{name} cannot be read as JSON" in refused(folder, monkeypatch)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"]
)
def test_a_missing_file_is_named(folder, monkeypatch, name):
    (folder / name).unlink()
    said = refused(folder, monkeypatch)
    assert name in said
    assert "02_download" in said or "ZhipuAI/GLM-4.5-Air" in said


def test_a_template_inside_the_tokenizers_configuration_is_found(folder):
    template = (folder / "chat_template.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=template)
    assert model_folder.check(folder) == folder
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": template}])
    assert model_folder.check(folder) == folder


OTHERS = {
    "no think block in the history": ("<|assistant|>\\n<think>' ~ kept.strip() ~ '</think>'", "<|assistant|>'"),
    "an open think tag in the prompt": (
        "'\\n<think></think>' if thinking_off else ''",
        "'</think>' if thinking_off else '<think>'",
    ),
    "no /nothink": ("'/nothink' if thinking_off", "'' if thinking_off"),
    "an end token after the answer": (
        "'\\n' ~ text.strip() if text.strip() else ''",
        "'\\n' ~ text.strip() ~ '<|im_end|>'",
    ),
    "no beginning": ("'[gMASK]<sop>'", "''"),
    "broken": ("{%- endfor -%}", ""),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_template_of_another_release_is_refused(folder, monkeypatch, other):
    path = folder / "chat_template.jinja"
    old, new = OTHERS[other]
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    said = refused(folder, monkeypatch)
    assert "its chat template is not that of GLM-4.5-Air" in said
    assert "Take chat_template.jinja of ZhipuAI/GLM-4.5-Air" in said


@pytest.mark.parametrize(
    ("ids", "missing"), [([8156], "<|user|>, <|observation|>"), (8163, "<|endoftext|>"), (None, "<|user|>")]
)
def test_end_tokens_of_another_release_are_refused(folder, monkeypatch, ids, missing):
    edit(folder / "generation_config.json", eos_token_id=ids)
    said = refused(folder, monkeypatch)
    assert "generation_config.json does not end an answer at" in said
    assert missing in said


def test_end_tokens_are_looked_up_as_the_real_release_writes_them(folder):
    """Its tokenizer_config.json holds the special tokens; the bundled one leaves them to tokenizer.json."""
    tokens = {8156: "<|endoftext|>", 8163: "<|user|>", 8165: "<|observation|>"}
    edit(folder / "tokenizer_config.json", added_tokens_decoder={str(n): {"content": t} for n, t in tokens.items()})
    assert model_folder.check(folder) == folder


@pytest.mark.parametrize(
    "layout", ["models/owner--name/snapshots/master", "models/owner/name", "hub/models/owner/name"]
)
def test_a_model_in_modelscopes_cache_is_found(folder, monkeypatch, tmp_path, layout):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("COURSE_MODEL", "owner/name")
    place = tmp_path / "cache" / layout
    place.parent.mkdir(parents=True)
    folder.rename(place)
    assert model_folder.model_folder(utils.settings()) == place
    (place / "model-00002-of-00005.safetensors").unlink()  # a download that was broken off is not taken
    with pytest.raises(utils.CourseError, match="or set COURSE_MODEL to the folder that holds the model"):
        model_folder.model_folder(utils.settings())


def test_notebook_02_does_not_fetch_what_is_in_the_cache(folder, monkeypatch, tmp_path, cell, capsys):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COURSE_MODEL", "owner/name")
    place = tmp_path / "cache" / "models" / "owner--name" / "snapshots" / "master"
    place.parent.mkdir(parents=True)
    folder.rename(place)
    monkeypatch.setattr(download, "hub_answers", lambda *_: pytest.fail("the hub is asked"))
    names = {"settings": utils.settings(), "utils": utils, "Path": Path, "re": re}
    names |= {"cached_model": model_folder.cached_model, "download": download, "LocalHub": LocalHub}
    exec(cell("02_download", "is_id = not Path("), names)
    names["hub"].__exit__()
    said = capsys.readouterr().out
    assert "owner/name is on this machine already" in said
    assert "from a local server" in said
