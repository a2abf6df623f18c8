"""What other engines load: each form against peft and transformers, and what is refused."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_engine import fill, write_real
from transformers import AutoConfig

import utils
from course import llama
from finetune import __main__ as command
from finetune import checkpoint, export, gguf_file, lora
from finetune.chat import Persona
from finetune.model import load_model

QUESTIONS = [
    "你是谁？",
    "今日天气如何？",
    "娘娘用过早膳了吗？",
    "德国的首都是哪里？",
    "给我写一句诗。",
    "眉庄姐姐来了。",
]
#: Answers end at the first of these many tokens at the latest.
LONGEST = 24


pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What notebook 05 leaves, with a random adapter; read only."""
    output = tmp_path_factory.mktemp("output")
    model = fill(lora.attach(load_model(utils.BUNDLED), lora.lora_config()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_OUTPUT", str(output))
        settings, run_folder = utils.settings(), output / "lora"
        model.save_pretrained(run_folder / "adapter", state_dict=lora.adapter_state(model))
        (run_folder / "prompt.json").write_text(json.dumps({"system": "现在你要扮演皇帝身边的女人--甄嬛"}), "utf-8")
        utils.stamp(run_folder, settings)
    return output


@pytest.fixture
def course(output, monkeypatch):
    monkeypatch.setenv("COURSE_OUTPUT", str(output))
    return utils.settings()


@pytest.fixture
def trained(course):
    return export.Trained.of(course)


@pytest.fixture(scope="module")
def files(output, tmp_path_factory):
    """The forms for llama.cpp in float32; read only."""
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_OUTPUT", str(output))
        for form in ("gguf", "gguf-merged"):
            export.export(form, folder / form, utils.settings(), "f32", report=lambda _: None)
    return folder


def quiet(form, out, course, **how):
    return export.export(form, out, course, report=lambda _: None, **how)


# ---------------------------------------------------------------------------------------------------- the forms


def test_the_adapter_is_copied_as_it_is(course, trained, tmp_path):
    assert quiet("adapter", tmp_path / "out", course) == 2 * 61
    for path in trained.adapter.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out" / "prompt.json").read_text("utf-8"))["system"]


def test_split_by_expert_each_pair_gives_the_update_that_merging_adds(course, trained, tmp_path):
    count = quiet("split", tmp_path / "out", course)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    changes = checkpoint.updates(trained.adapter, trained.config)
    assert count == len(found) == 2 * len(changes)
    for name, change in changes.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (found[f"{key}.lora_{letter}.weight"] for letter in "AB")
        assert torch.allclose(lora.SCALE * b @ a, change(), atol=1e-6), name
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert settings["target_parameters"] is None and settings["lora_alpha"] == lora.SCALE * settings["r"]
    assert {key.rsplit(".", 3)[1] for key in found} == set(settings["target_modules"])


def test_an_expert_that_no_token_reached_is_split_with_zeros(course, trained, tmp_path, monkeypatch):
    """With 128 experts and a few thousand rows that happens, and is no fault."""
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path))
    shutil.copytree(trained.adapter.parent, tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter" / "adapter_model.safetensors"
    found = load_file(weights)
    name = next(name for name in found if ".layers.2." in name and ".mlp.experts.base_layer.lora_B" in name)
    found[name].view(found[name].shape[0], -1, trained.config.n_routed_experts)[..., 5] = 0
    save_file(found, weights, {"format": "pt"})
    quiet("split", tmp_path / "out", utils.settings())
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    zero = {name for name, tensor in made.items() if ".lora_B." in name and not tensor.any()}
    assert zero == {
        f"base_model.model.model.layers.2.mlp.experts.5.{part}.lora_B.weight" for part in ("gate_proj", "up_proj")
    }


def test_merged_is_the_checkpoint_that_merge_writes(course, trained, tmp_path):
    said = []
    changed = export.export("merged", tmp_path / "out", course, report=said.append)
    checkpoint.merge(trained.base, trained.adapter, tmp_path / "other", report=lambda _: None)
    for path in (tmp_path / "other").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert changed == len(checkpoint.updates(trained.adapter, trained.config))
    assert said[-1] == "The base has no MTP layer, so the checkpoint has none."


@pytest.mark.parametrize("form", ["adapter", "split"])
def test_at_part_strength_only_lora_alpha_differs(course, trained, tmp_path, form):
    quiet(form, tmp_path / "whole", course)
    quiet(form, tmp_path / "part", course, strength=0.5)
    whole, part = (
        json.loads((tmp_path / name / "adapter_config.json").read_text("utf-8")) for name in ("whole", "part")
    )
    assert part.pop("lora_alpha") == 0.5 * whole.pop("lora_alpha") and part == whole
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1] and not (tmp_path / "part" / "adapter_model.safetensors").is_symlink()


def test_merged_at_part_strength_is_the_base_with_that_part_of_the_update(course, trained, tmp_path):
    quiet("merged", tmp_path / "whole", course)
    quiet("merged", tmp_path / "part", course, strength=0.5)
    folders = (trained.base, tmp_path / "whole", tmp_path / "part")
    base, whole, part = (
        {n: t for f in sorted(one.glob("*.safetensors")) for n, t in load_file(f).items()} for one in folders
    )
    changed = [name for name in base if not torch.equal(base[name], whole[name])]
    assert changed
    for name in changed:
        added, half = (tensors[name].float() - base[name].float() for tensors in (whole, part))
        assert torch.allclose(half, added / 2, atol=0.01 * base[name].abs().max().item()), name
    assert all(torch.equal(base[name], part[name]) for name in base if name not in changed)


def test_the_mtp_layer_stays_in_every_form_that_holds_the_model(trained, tmp_path):
    (tmp_path / "real").mkdir()
    write_real(tmp_path / "real")
    real = export.Trained(tmp_path / "real", trained.adapter, "", AutoConfig.from_pretrained(tmp_path / "real"))
    said = []
    (tmp_path / "merged").mkdir()
    export.WRITERS["merged"](real, tmp_path / "merged", "f16", said.append)
    assert said[-1] == "The MTP layer is in the checkpoint, unchanged."
    count = export.WRITERS["gguf-merged"](real, tmp_path, "f16", said.append)
    reader = gguf.GGUFReader(tmp_path / export.MERGED_FILE)
    names = {tensor.name for tensor in reader.tensors}
    assert len(names) == count and {"blk.7.nextn.eh_proj.weight", "blk.7.ffn_up_exps.weight"} <= names
    assert reader.get_field("glm4moe.block_count").contents() == 8
    assert reader.get_field("glm4moe.nextn_predict_layers").contents() == 1


@pytest.mark.parametrize(("kind", "most"), [("f32", 0), ("f16", 1e-3), ("bf16", 4e-3), ("q8_0", 8e-3)])
def test_tensors_read_back_are_the_checkpoints(trained, tmp_path, kind, most):
    target = tmp_path / "model.gguf"
    found = gguf_file.entries(trained.base, trained.config, kind)
    assert gguf_file.write_model(trained.base, trained.config, target, kind) == len(found)
    for entry, tensor in zip(found, gguf.GGUFReader(target).tensors, strict=True):
        assert (entry.name, entry.kind, entry.size) == (tensor.name, tensor.tensor_type, tensor.n_bytes)
        wanted = entry.read()
        back = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        assert np.linalg.norm(back - wanted) <= most * np.linalg.norm(wanted), entry.name


def test_disk_is_said_before_within_a_tenth(course, trained, tmp_path):
    for form in export.FORMS:
        for kind in ("f16", "q8_0") if "gguf" in form else ("f16",):
            out = tmp_path / f"{form}-{kind}"
            quiet(form, out, course, kind=kind)
            written = sum(path.stat().st_size for path in out.iterdir())
            room = export.needed(form, trained, kind)[0]
            assert written <= 1.02 * room and room <= 2 * written + 2**22, (form, kind, written, room)


# ---------------------------------------------------------------------------------------- answers of an engine


def ask(server, question, **more):
    """The greedy answer of llama.cpp's server."""
    system = "现在你要扮演皇帝身边的女人--甄嬛"
    turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    how = {"temperature": 0, "max_tokens": LONGEST, "cache_prompt": False}
    how |= {"chat_template_kwargs": {"enable_thinking": False}}
    answer = server.post("/v1/chat/completions", {"messages": turns, **how, **more})
    return answer["choices"][0]["message"]["content"].strip()


@pytest.fixture(scope="module")
def expected(output):
    """Greedy answers of transformers with the adapter, and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_OUTPUT", str(output))
        persona = Persona(history=False)
    with_adapter = [persona.answer(question, LONGEST) for question in QUESTIONS]
    with persona.model.disable_adapter():
        without = [persona.answer(question, LONGEST) for question in QUESTIONS]
    assert with_adapter != without
    return with_adapter, without


def test_llama_cpp_answers_as_transformers_and_switches_the_adapter(files, expected):
    with_adapter, without = expected
    with llama.Server(files / "gguf" / export.BASE_FILE, files / "gguf" / export.ADAPTER_FILE) as server:
        assert [ask(server, question) for question in QUESTIONS] == with_adapter
        server.post("/lora-adapters", [{"id": 0, "scale": 0.0}])
        assert [ask(server, question) for question in QUESTIONS] == without
        assert ask(server, QUESTIONS[0], lora=[{"id": 0, "scale": 1.0}]) == with_adapter[0]
        assert server.memory_mib() > 30
    assert server.process.poll() is not None


def test_the_merged_file_answers_as_the_adapter(files, expected):
    with llama.Server(files / "gguf-merged" / export.MERGED_FILE) as server:
        assert [ask(server, question) for question in QUESTIONS] == expected[0]


# ------------------------------------------------------------------------------------------------ what is refused


def damaged(output, tmp_path, monkeypatch, change):
    """Settings of a copy of the output whose adapter's tensors went through `change`."""
    shutil.copytree(output, tmp_path / "damaged")
    path = tmp_path / "damaged" / "lora" / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "damaged"))
    return utils.settings()


def without(found, part):
    """The tensors whose names do not hold this part."""
    return {name: tensor for name, tensor in found.items() if part not in name}


ONE = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda found: found | {ONE: torch.zeros_like(found[ONE])},
            r"1 of 61 matrices lora_B are zero \(.*2.self_attn.q",
        ),
        (lambda found: {name: tensor for name, tensor in found.items() if name != ONE}, "q_proj.lora_B.* no partner"),
        (lambda found: found | {ONE: torch.zeros(384, 0)}, "q_proj.lora_B.weight has no rank"),
        (
            lambda found: without(found, "shared_experts"),
            "names shared_experts.down_proj.weight, shared_experts.gate",
        ),
        (lambda found: without(found, ".mlp.experts."), "names mlp.experts.down_proj, mlp.experts.gate_up_proj, and"),
        (
            lambda found: without(found, ".mlp.experts.base_layer."),
            "names mlp.experts.down_proj, mlp.experts.gate_up_proj, and",
        ),
        (lambda found: without(found, ".v_proj."), "names v_proj, and the adapter holds"),
    ],
)
def test_an_adapter_that_holds_nothing_somewhere_is_refused(output, tmp_path, monkeypatch, change, said):
    course = damaged(output, tmp_path, monkeypatch, change)
    for form in export.FORMS:
        with pytest.raises(utils.CourseError, match=f"{said}.*Nothing was written"):
            quiet(form, tmp_path / "out", course)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_an_adapter_of_another_base_is_refused(output, tmp_path, monkeypatch):
    def narrower(found):
        return {name: tensor[:, :320] if "q_proj.lora_A" in name else tensor for name, tensor in found.items()}

    course = damaged(
        output, tmp_path, monkeypatch, lambda found: {n: t.contiguous() for n, t in narrower(found).items()}
    )
    with pytest.raises(utils.CourseError, match=r"was trained on another model \(hidden size 320"):
        quiet("gguf", tmp_path / "out", course)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_no_disk_is_filled(course, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(utils.CourseError, match=r"is not empty.* Nothing was written"):
        quiet("split", tmp_path / "out", course)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for form in export.FORMS:
        with pytest.raises(utils.CourseError, match=r"takes 0\.\d GiB of disk, 0\.0 GiB are free.*Nothing was written"):
            quiet(form, tmp_path / form, course)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_leaves_nothing_half_written(course, tmp_path, monkeypatch):
    usual, written = gguf.GGUFWriter.write_tensor_data, []

    def full(self, tensor, *more):
        written.append(tensor)
        if len(written) == 20:
            raise OSError(28, "No space left on device")
        usual(self, tensor, *more)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(utils.CourseError, match=r"out: No space left on device. What had been written there"):
        quiet("gguf", tmp_path / "out", course)
    assert len(written) == 20 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", export.FORMS)
def test_a_disk_that_is_full_is_one_message_in_every_form(course, tmp_path, monkeypatch, form):
    """On a real small disk: each library says it in words of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # what another program takes after the check
        with pytest.raises(utils.CourseError, match=r"out: No space left on device. What had been written there"):
            quiet(form, disk / "out", course)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_after_a_killed_export_the_next_one_starts_anew(course, tmp_path):
    half = tmp_path / ".out.unfinished-export"
    half.mkdir()
    (half / "base.gguf").write_bytes(b"half")
    quiet("split", tmp_path / "out", course)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "base.gguf").exists()


def test_a_folder_of_the_users_beside_the_target_stays(course, tmp_path):
    theirs = tmp_path / "out.part"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine", "utf-8")
    quiet("adapter", tmp_path / "out", course)
    assert (theirs / "thesis.txt").read_text("utf-8") == "mine"


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_a_target_that_is_no_folder_is_refused_before_anything_is_written(course, tmp_path, kind):
    target, said = tmp_path / "out", []
    if kind == "a file":
        target.write_text("mine", "utf-8")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(utils.CourseError, match="out is a file or a link"):
        export.export("merged", target, course, report=said.append)
    assert not said
    assert kind == "a link" or target.read_text("utf-8") == "mine"


def test_an_empty_folder_may_be_named_by_a_dot(course, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert quiet("adapter", Path(), course) == 2 * 61
    assert (tmp_path / "here" / "adapter_config.json").is_file()


def test_a_folder_beside_the_adapters_files_is_left_out(course, trained, tmp_path, output, monkeypatch):
    copied = damaged(output, tmp_path, monkeypatch, dict)
    (tmp_path / "damaged" / "lora" / "adapter" / ".ipynb_checkpoints").mkdir()
    assert quiet("adapter", tmp_path / "out", copied) == 2 * 61
    assert not (tmp_path / "out" / ".ipynb_checkpoints").exists()


WEIGHTS, SETTINGS, PROMPT = "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "prompt.json"


def with_settings(**changes):
    """A change of `adapter_config.json`; None takes a setting out."""

    def change(text):
        found = json.loads(text) | changes
        return json.dumps({key: value for key, value in found.items() if value is not None}).encode()

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (WEIGHTS, lambda text: text[:1000], "adapter_model.safetensors cannot be used"),
        (WEIGHTS, lambda text: b"", "adapter_model.safetensors cannot be used"),
        (WEIGHTS, lambda text: b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (WEIGHTS, None, r"adapter_model.safetensors (cannot be used .No such file|there)"),
        (SETTINGS, lambda text: text[:100], "adapter_config.json cannot be used"),
        (SETTINGS, lambda text: b"[]", "adapter_config.json cannot be used .no JSON object"),
        (SETTINGS, with_settings(r=None), "adapter_config.json cannot be used .r is None"),
        (SETTINGS, with_settings(r=16), "adapter_config.json cannot be used .r is 16, .* has 8"),
        (SETTINGS, with_settings(lora_alpha="32"), "adapter_config.json cannot be used .lora_alpha is 32"),
        (SETTINGS, with_settings(use_rslora=True), "use_rslora is set; this course computes plain LoRA"),
        (PROMPT, lambda text: b'{"system": ', "prompt.json cannot be used"),
        (PROMPT, lambda text: b'{"system": 5}', "prompt.json cannot be used .system is 5"),
        (PROMPT, lambda text: '{"system": "你"}'.encode("gbk"), "prompt.json cannot be used"),
    ],
)
def test_a_damaged_file_is_named_by_every_command(output, tmp_path, monkeypatch, capsys, name, change, said):
    damaged(output, tmp_path, monkeypatch, dict)
    path = tmp_path / "damaged" / "lora" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    target = str(tmp_path / "out")
    for arguments in (
        ["chat"],
        ["merge", target],
        *(["export", form, target] for form in ("adapter", "split", "gguf")),
    ):
        assert command.main(arguments) == 1, arguments
        assert re.search(said, capsys.readouterr().err.replace("\n", " ")), arguments
        assert not [found for found in tmp_path.iterdir() if "out" in found.name], arguments


def test_a_prompt_with_a_byte_order_mark_is_read(output, tmp_path, monkeypatch):
    damaged(output, tmp_path, monkeypatch, dict)
    prompt = tmp_path / "damaged" / "lora" / "prompt.json"
    prompt.write_bytes(b"\xef\xbb\xbf" + prompt.read_bytes())
    assert "甄嬛" in export.Trained.of(utils.settings()).prompt


def test_merge_refuses_what_export_refuses(output, tmp_path, monkeypatch, capsys):
    damaged(output, tmp_path, monkeypatch, lambda found: found | {ONE: torch.zeros_like(found[ONE])})
    assert command.main(["merge", str(tmp_path / "out")]) == 1
    assert "1 of 61 matrices lora_B are zero" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_form_and_says_so(course, tmp_path, capsys):
    assert command.main(["export", "gguf-merged", str(tmp_path / "out"), "--type", "q8_0"]) == 0
    assert "117 tensors; in" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()].count(export.MERGED_FILE) == 1
    assert command.main(["export", "gguf-merged", str(tmp_path / "out")]) == 1
    assert "is not empty" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize("text", ["-1", "3", "nan", "half"])
def test_a_strength_that_is_none_is_refused(tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        command.main(["export", "adapter", str(tmp_path / "out"), f"--strength={text}"])
    assert "is no number from 0 to 2" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_missing_file_and_a_taken_port_are_named(files, tmp_path):
    with pytest.raises(utils.CourseError, match=r"none.gguf is not there. Export it first"):
        llama.Server(tmp_path / "none.gguf")
    with socket.socket() as other:
        other.bind((llama.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(utils.CourseError, match=f"Port {port} is taken by another program"):
            llama.Server(files / "gguf" / export.BASE_FILE, port=port)


def test_a_file_that_is_no_model_ends_in_one_message(files, tmp_path):
    (tmp_path / "model.gguf").write_bytes((files / "gguf" / export.BASE_FILE).read_bytes()[:10_000_000])
    with pytest.raises(utils.CourseError, match=r"ended while it loaded the model. Its last lines:\n.*model"):
        llama.Server(tmp_path / "model.gguf")


def test_an_engine_that_is_killed_while_it_answers_is_explained(files):
    import openai

    with llama.Server(files / "gguf" / export.BASE_FILE) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        turn = [{"role": "user", "content": QUESTIONS[0]}]
        with pytest.raises(utils.CourseError, match=r"The server has ended. Run the cell"), server.explained():
            stream = client.chat.completions.create(model="base", messages=turn, max_tokens=800, stream=True)
            for number, _ in enumerate(stream):
                if number == 1:
                    server.process.kill()
                    server.process.wait()
            client.chat.completions.create(model="base", messages=turn)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_no_server_is_left_when_the_kernel_is_killed(files):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom course import llama\n"
        f"server = llama.Server(Path({str(files / 'gguf' / export.BASE_FILE)!r}))\n"
        "print(server.process.pid, flush=True)\nimport time; time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as kernel:
        pid = int(kernel.stdout.readline())
        kernel.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while (found := Path(f"/proc/{pid}/status")).is_file() and "zombie" not in found.read_text():
        assert time.monotonic() < until, "the server runs on"
        time.sleep(0.2)
