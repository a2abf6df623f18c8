"""`python -m finetune` against notebook 05 on the same rows, on two processes, interrupted, and given bad input."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from datasets import load_from_disk
from peft import PeftModel
from safetensors.torch import load_file
from training_process import Run, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

import utils
from finetune import __main__ as commands
from finetune import chat, decode, lora, planner, resume, train
from finetune import machine as machines
from finetune.machine import Machine
from finetune.model import GroupedGlm4MoeForCausalLM
from finetune.packing import PackedRows, shared_prefix
from notebooks import lesson, run_here, run_notebook

STEPS = 10  # more than three epochs of 44 rows: two steps of 16 and one of 12 in each


def environment(output, data, **more):
    """The variables of a run on the processor, into a folder of its own."""
    course = {"COURSE_OUTPUT": str(output), "COURSE_DATA": str(data), "SWANLAB_MODE": "disabled"}
    return {**os.environ, **course, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run_train(output, data, *arguments, processes=1, before=""):
    """Run the command in processes that have torch imported, after the statements `before`; return what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, runs = output.with_name(f"{output.name}.log"), []
    for rank in range(processes):
        started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        started |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launched = {name: str(value) for name, value in started.items()} if processes > 1 else {}
        runs.append(Run(run_script, log, environment(output, data, **launched), list(arguments), before))
    assert [run.end(240) for run in runs] == [0] * processes, runs[0].said
    return runs[0].said


def run_launcher(output, data, *arguments):
    """Run the command under torchrun on two processes, as a user does; return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "finetune", "train", *arguments],
        env=environment(output, data),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 rows of the course's file."""
    rows = json.loads((ROOT / "dataset" / "huanhuan.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(rows[:48], ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    """A function that makes an output folder with the tokens that notebooks 03 and 04 made once."""
    made = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(made, data).items():
            patch.setenv(name, value)
        run_here("03_dataset")
        run_here("04_chat_template")
    assert len(load_from_disk(str(made / "tokens" / "train"))) == 44

    def copy(name, rows=44):
        output = tmp_path_factory.mktemp(name)
        for folder in ("rows", "tokens"):
            shutil.copytree(made / folder, output / folder)
        if rows < 44:
            shutil.rmtree(output / "tokens" / "train")
            chosen = load_from_disk(str(made / "tokens" / "train")).select(range(rows))
            chosen.save_to_disk(output / "tokens" / "train")
        return output

    return copy


def adapter_of(output):
    return load_file(output / "lora" / "adapter" / "adapter_model.safetensors")


def history(output):
    """The log of the last checkpoint."""
    states = (output / "lora" / "checkpoints").glob("checkpoint-*/trainer_state.json")
    last = max(states, key=lambda path: int(path.parent.name.split("-")[1]))
    return json.loads(last.read_text(encoding="utf-8"))["log_history"]


def losses(output):
    return {row["step"]: row["loss"] for row in history(output) if "loss" in row}


def far(found, expected):
    """The size of the difference of two adapters, as a share of the size of the second."""
    assert found.keys() == expected.keys()
    difference = sum((found[name] - tensor).pow(2).sum() for name, tensor in expected.items())
    return (difference / sum(tensor.pow(2).sum() for tensor in expected.values())).sqrt().item()


# ------------------------------------------------------------------------------- the notebook and the script


EVERY_STEP = """
from finetune import train
usual = train.TrainingArguments
train.TrainingArguments = lambda **given: usual(**(given | {"logging_steps": 1}))
"""


@pytest.fixture(scope="module")
def both_ways(prepared, data):
    """Notebook 05 and the command, every step logged."""
    notebook, script = prepared("notebook"), prepared("script")
    every_step = {"05-40": "arguments.logging_steps = 1", "05-41d": "dropout = 0.0"}  # the command has none
    run_notebook("05_lora_training", True, every_step, **environment(notebook, data, COURSE_MAX_STEPS=str(STEPS)))
    run_train(script, data, "--max-steps", str(STEPS), before=EVERY_STEP)
    return notebook, script


def test_script_and_notebook_train_the_same(both_ways):
    notebook, script = both_ways
    expected, found = losses(notebook), losses(script)
    assert list(expected) == list(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-3)  # measured: 1e-6
    assert expected[STEPS] < 0.7 * expected[1]
    for name in ("new_wordings", "new_answers"):
        held_out = [
            [row[f"eval_{name}_loss"] for row in history(out) if f"eval_{name}_loss" in row] for out in both_ways
        ]
        assert len(held_out[0]) == 2 and held_out[1] == pytest.approx(held_out[0], rel=1e-3)
        assert held_out[0][1] < 0.9 * held_out[0][0]
    rates = [{row["step"]: row["learning_rate"] for row in history(out) if "loss" in row} for out in both_ways]
    assert rates[0] == rates[1]
    # Measured: 5e-6. AdamW divides by the gradient's size, so rounding grows with every step; a step on other rows, or
    # with another learning rate, is a thousand times as far.
    assert far(adapter_of(script), adapter_of(notebook)) < 1e-3


def test_script_and_notebook_leave_the_same_files(both_ways):
    for folder in ("lora", "lora/adapter"):
        names = [{path.name for path in (output / folder).iterdir()} for output in both_ways]
        assert names[0] == names[1]
    settings = [json.loads((o / "lora" / "adapter" / "adapter_config.json").read_text()) for o in both_ways]
    for one in settings:
        one |= {name: sorted(one[name]) for name in ("target_modules", "target_parameters")}  # sets, in any order
    assert settings[0] == settings[1]
    notes = [json.loads((output / "lora" / "made_from.json").read_text()) for output in both_ways]
    assert notes[0] == notes[1]


# --------------------------------------------------------------------------------------------- two processes

SHORT = ("--max-steps", "4", "--save-steps", "2")
# Only whole steps: accelerate fills the last step of an epoch up with rows of the first, so that both processes get
# as many, and two processes then train a little more than one. With 44 rows (12 in the last step) the adapters were
# 5 % apart after six steps.
FULL = 32


@pytest.fixture(scope="module")
def one_process(prepared, data):
    output = prepared("one", FULL)
    run_train(output, data, *SHORT)
    return output


@pytest.fixture(scope="module")
def two_processes(prepared, data):
    output = prepared("two", FULL)
    return output, run_launcher(output, data, *SHORT)


def test_two_processes_train_what_one_does(one_process, two_processes):
    output, printed = two_processes
    assert "2 process(es), batch size 16" in printed
    assert printed.count("trainable parameters: {") == 1 and "resuming from nothing" in printed
    difference = far(adapter_of(output), adapter_of(one_process))
    assert difference < 1e-3  # measured 2.5e-5
    assert all(tensor.any() for name, tensor in adapter_of(output).items() if "lora_B" in name)


def test_four_processes_train_what_one_does(one_process, prepared, data):
    output = prepared("four", FULL)
    run_train(output, data, *SHORT, processes=4)
    assert far(adapter_of(output), adapter_of(one_process)) < 1e-3


def test_an_interrupted_run_of_two_processes_ends_where_it_would_have(two_processes, data, tmp_path):
    finished, _ = two_processes
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    assert sorted(p.name for p in (output / "lora" / "checkpoints").glob("c*")) == ["checkpoint-2", "checkpoint-4"]
    shutil.rmtree(output / "lora" / "checkpoints" / "checkpoint-4")
    shutil.rmtree(output / "lora" / "adapter")
    (output / "lora" / "made_from.json").unlink()
    printed = run_train(output, data, *SHORT, processes=2)
    assert "resuming from" in printed and "checkpoint-2" in printed
    found, expected = adapter_of(output), adapter_of(finished)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    halfway = load_file(output / "lora" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    assert far(halfway, expected) > 1e-2  # so steps 3 and 4 were made
    assert history(output)[-1]["step"] == 4


# ------------------------------------------------------------------------------------- the command line


def on_machine(monkeypatch, machine):
    """Let the command and notebook 05 plan for this machine."""
    monkeypatch.setattr(train, "this_machine", lambda _: machine)
    monkeypatch.setattr(machines, "this_machine", lambda _: machine)


@pytest.fixture
def command(monkeypatch, capsys, data, tmp_path):
    """Run the command line in this process: status, what it printed, what it complained of."""

    def run(*arguments, output=tmp_path, rows=data):
        course = {"COURSE_OUTPUT": str(output), "COURSE_DATA": str(rows), "SWANLAB_MODE": "disabled"}
        for name, value in course.items():
            monkeypatch.setenv(name, value)
        status = commands.main(list(arguments))
        return (status, *capsys.readouterr())

    return run


def test_the_plan_needs_no_tokens(command, tmp_path):
    status, printed, complaint = command("plan")
    assert status == 0 and not complaint
    assert "1,298,432 trainable parameters" in printed
    assert "batch size 16, gradient accumulation 1, without gradient checkpointing" in printed
    assert printed.splitlines()[-1].strip() == "fits"
    assert not list(tmp_path.iterdir())


def test_the_plan_of_the_large_model_needs_no_weights(command, monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", "ZhipuAI/GLM-4.5-Air")
    status, printed, _ = command("plan", "--load-in-4bit")
    assert status == 0
    assert "594,261,504 trainable parameters" in printed and "with gradient checkpointing" in printed


def test_without_tokens_it_says_which_notebook_to_run(command, tmp_path):
    status, printed, complaint = command("train")
    assert status == 1 and not printed
    assert complaint.startswith("finetune: ") and "Run notebook 04_chat_template first" in complaint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other", ["--max-steps 4", "--epochs 4", "--gradient-accumulation-steps 2", "--learning-rate 1e-3", "--seed 7"]
)
def test_what_decides_the_schedule_decides_whether_a_run_goes_on(command, prepared, monkeypatch, other):
    """A run that was interrupted under other settings would go on with another learning rate or other rows."""
    output, asked = prepared("schedule " + other.split()[0]), []

    def remember(run_folder, course, made_with):
        asked.append(made_with)
        raise utils.CourseError("far enough")

    monkeypatch.setattr(resume, "start_or_resume", remember)
    for arguments in ("--max-steps 6".split(), "--max-steps 6".split(), other.split()):
        assert command("train", *arguments, output=output)[0] == 1
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("changed", ["warmup_steps", "lr_scheduler_type", "alpha"])
def test_what_stands_in_the_code_decides_it_too(command, prepared, monkeypatch, changed):
    output, asked, usual, usual_lora = prepared("code"), [], train.TrainingArguments, lora.lora_config

    def remember(run_folder, course, made_with):
        asked.append(made_with)
        raise utils.CourseError("far enough")

    monkeypatch.setattr(resume, "start_or_resume", remember)
    assert command("train", output=output)[0] == 1
    if changed == "alpha":
        other = lambda *given: usual_lora(*given).__class__(**(usual_lora(*given).to_dict() | {"lora_alpha": 8}))  # noqa: E731
        monkeypatch.setattr(lora, "lora_config", other)
    else:
        value = {"warmup_steps": 0.2, "lr_scheduler_type": "linear"}[changed]
        monkeypatch.setattr(train, "TrainingArguments", lambda **given: usual(**(given | {changed: value})))
    assert command("train", output=output)[0] == 1
    assert asked[0] != asked[1]


OWN_ROOM = """
import os
from dataclasses import replace
from finetune import planner, train
usual = planner.plan
rows = 40 if os.environ["RANK"] == "0" else 5
planner.plan = lambda *given, **named: replace(usual(*given, **named), eval_batch_size=rows)
class Told(train.ShardedTrainer):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        print(f"@rows {self.args.per_device_eval_batch_size}\\n", end="", flush=True)
train.ShardedTrainer = Told
"""


def test_all_processes_evaluate_as_many_rows_at_once_as_the_fullest_can(prepared, data):
    printed = run_train(prepared("room", FULL), data, "--max-steps", "1", processes=2, before=OWN_ROOM)
    assert printed.count("@rows 5") == 2


def test_a_variable_left_by_a_launcher_ends_in_one_message(command, prepared, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, complaint = command("train", output=prepared("left"))
    assert status == 1 and "Unset WORLD_SIZE" in complaint and complaint.count("\n") == 1


def test_the_plan_is_of_the_real_rows(command, prepared):
    _, printed, _ = command("plan", "--batch-size", "16", output=prepared("planned"))
    assert "time: 60 steps" in printed  # 44 rows: three steps an epoch, and at least 60


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """Output folder and data file of rows that are longer than the limit, with their tokens of notebook 04."""
    place = tmp_path_factory.mktemp("long")
    rows = shutil.copy(ROOT / "tests" / "support" / "cases" / "long_rows_40.json", place)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(place / "out", rows).items():
            patch.setenv(name, value)
        run_here("03_dataset")
        run_here("04_chat_template")
    return place / "out", rows


def test_long_rows_are_planned_at_their_real_length(command, data, prepared, long_rows, monkeypatch):
    on_machine(monkeypatch, Machine(0, 0.0, "CPU", 64, 100))
    figures = []
    for output, rows in ((prepared("usual"), data), long_rows):
        printed = command("plan", output=output, rows=rows)[1]
        found = re.search(r"= ([\d.]+) of .*?(\d+) steps of about ([\d.]+) s", printed, re.DOTALL)
        figures.append(list(map(float, found.groups())))
    (gib, steps, seconds), (more_gib, more_steps, more_seconds) = figures
    assert more_gib > gib + 1 and more_seconds > 5 * seconds
    assert steps == more_steps == 60


@pytest.mark.parametrize("room", [64, 2])
def test_notebook_05_says_before_it_loads_whether_long_rows_fit(long_rows, monkeypatch, capsys, room):
    output, rows = long_rows
    for name, value in environment(output, rows).items():
        monkeypatch.setenv(name, value)
    on_machine(monkeypatch, Machine(0, 0.0, "CPU", room, 100))
    space = {}
    with pytest.raises(utils.CourseError) if room == 2 else nullcontext() as stopped:
        for cell in lesson("05_lora_training").cells:
            if cell.id in ("05-01", "05-16b", "05-16d"):
                exec(cell.source, space)
    assert "steps of about" in capsys.readouterr().out and "model" not in space
    assert room == 64 or "are free" in str(stopped.value)


def test_notebook_05_takes_4_bits_where_only_they_fit(command, prepared, data, monkeypatch, capsys):
    output = prepared("packed")
    for name, value in environment(output, data).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COURSE_MAX_STEPS", "3")
    space = {"display": lambda *_, **__: SimpleNamespace(update=lambda _: None)}  # a kernel has it
    for cell in lesson("05_lora_training").cells:
        if cell.id == "05-16d":  # a GPU that holds the packed weights, and is too small for the others
            space["machine"] = Machine(1, 80.0, "H100", 64, 100)
            exec(cell.source, space)
            assert not space["four_bit"]
            most, packed = (space["own_plan"](four_bit).peak for four_bit in (False, True))
            space["machine"] = Machine(1, (most + packed) / 2 / planner.FULL, "H100", 64, 100)
        exec(cell.source, space)
    assert space["four_bit"] and isinstance(space["model"].get_base_model(), GroupedGlm4MoeForCausalLM)
    routed = [
        name for name, one in space["model"].named_parameters() if one.dtype == torch.uint8 and "experts." in name
    ]
    assert routed
    for losses in space["history"].values():
        assert all(map(math.isfinite, losses)) and losses[-1] != losses[0]

    asked = iter(["你是谁？", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    capsys.readouterr()
    status, printed, complaint = command("chat", "--load-in-4bit", output=output)
    assert status == 0 and not complaint and printed.splitlines()[1]


def test_what_all_rows_begin_with_is_computed_once_a_pass(command, prepared, monkeypatch):
    output, given = prepared("shared"), []
    monkeypatch.setattr(train, "PackedRows", lambda shared=0: given.append(shared) or PackedRows(shared))
    assert command("train", "--max-steps", "1", output=output)[0] == 0
    rows = load_from_disk(str(output / "tokens" / "train"))
    assert given[0] == shared_prefix(rows) > 10


def test_samples_that_cannot_be_shared_out_are_refused(command, prepared):
    output = prepared("uneven")
    status, _, complaint = command("train", "--batch-size", "10", "--gradient-accumulation-steps", "4", output=output)
    assert status == 1
    assert (
        "--batch-size 10 cannot be divided over 1 process(es) and 4 accumulation step(s). Use a multiple of 4."
        in complaint
    )
    assert sorted(path.name for path in output.iterdir()) == ["rows", "tokens"]


def test_a_plan_that_does_not_fit_loads_nothing(command, prepared, monkeypatch):
    monkeypatch.setattr(train, "load_model", lambda *_, **__: pytest.fail("loaded"))
    output = prepared("large")
    status, printed, complaint = command("train", "--lora-rank", "1000000", output=output)
    assert status == 1
    assert "does not fit" in printed and ("are free" in complaint)
    assert sorted(path.name for path in output.iterdir()) == ["rows", "tokens"]


def test_the_merged_checkpoint_is_the_model_with_its_adapter(command, one_process, tmp_path):
    merged = tmp_path / "merged"
    status, printed, complaint = command("merge", str(merged), output=one_process)
    assert status == 0 and not complaint
    assert "tensors changed; the checkpoint is in" in printed
    ids = AutoTokenizer.from_pretrained(merged)("你是谁？", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(utils.BUNDLED, dtype=torch.float32)
        before = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, one_process / "lora" / "adapter")(input_ids=ids).logits
    # The checkpoint is bf16, so what was added is rounded to 8 bits.
    assert (found - adapted).norm() < 0.1 * (before - adapted).norm()


def test_merging_before_training_says_what_to_run(command, tmp_path):
    status, _, complaint = command("merge", str(tmp_path / "merged"))
    assert status == 1 and "Run notebook 05_lora_training first" in complaint
    assert not (tmp_path / "merged").exists()


# -------------------------------------------------------------------------------------------- wrong flags, chat


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--samples", "--batch-size"),
        ("--bits", "--load-in-4bit"),
        ("--rank", "--lora-rank"),
        ("--gradient-acumulation-steps", "--gradient-accumulation-steps"),
        ("--load_in_4bit", "--load-in-4bit"),
    ],
)
def test_a_wrong_flag_is_told_the_right_one(command, capsys, flag, meant):
    with pytest.raises(SystemExit) as stopped:
        command("train", flag)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"For {flag} use {meant}." in said and said.count("\n") == 1


def test_the_output_folder_can_be_given(command, prepared, tmp_path):
    output = prepared("given")
    status, printed, _ = command("plan", "--output-dir", str(output), output=tmp_path)
    assert status == 0 and "time: 60 steps" in printed  # the rows of that folder


def test_the_persona_answers_in_a_terminal(command, one_process, monkeypatch):
    asked = iter(["你是谁？", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    status, printed, complaint = command("chat", output=one_process)
    assert status == 0 and not complaint
    assert len(printed.splitlines()) == 2 and printed.splitlines()[1]


def test_the_answer_is_printed_while_it_grows(command, one_process, monkeypatch):
    asked, printed = iter(["你是谁？", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    monkeypatch.setattr(chat, "print", lambda *parts, **how: printed.append("".join(map(str, parts))), raising=False)
    assert command("chat", "--beams", "1", "--strength", "1", output=one_process)[0] == 0
    monkeypatch.setenv("COURSE_OUTPUT", str(one_process))
    assert len(printed) > 4 and "".join(printed[1:]) == chat.Persona().answer("你是谁？")


@pytest.fixture
def persona(one_process, data, monkeypatch):
    """The bundled model with the adapter of a run."""
    for name, value in {"COURSE_OUTPUT": one_process, "COURSE_DATA": data}.items():
        monkeypatch.setenv(name, str(value))
    return chat.Persona(history=False)


def test_at_strength_0_the_base_answers_and_afterwards_the_adapter_is_whole_again(persona):
    whole = persona.answer("你是谁？")
    with persona.model.disable_adapter():
        base = persona.answer("你是谁？")
    persona.strength = 0.0
    assert persona.answer("你是谁？") == base != whole
    persona.strength = 1.0
    assert persona.answer("你是谁？") == whole


def test_beam_search_is_that_of_transformers_without_a_pair_of_tokens_twice(persona, monkeypatch):
    persona.beams, given, generate = 3, {}, persona.model.generate

    def noted(**how):
        given.update(how)
        return generate(**how)

    monkeypatch.setattr(persona.model, "generate", noted)
    assert persona.answer("小主，下雪了，满院子都白了。", 24)
    (rule,) = given["logits_processor"]
    assert given["num_beams"] == 3 and rule.ngram_size == 2 and rule.start == given["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("flags", "wanted"), [([], (4, 0.7)), (["--beams", "2"], (2, 0.7)), (["--strength", "0.5"], (4, 0.5))]
)
def test_in_a_chat_a_small_model_answers_as_notebook_06_recommends(command, one_process, monkeypatch, flags, wanted):
    asked, used = iter(["你是谁？", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    monkeypatch.setattr(
        chat.Persona, "texts", lambda self, _: used.append((self.beams, self.strength)) or iter(["好。"])
    )
    assert command("chat", *flags, output=one_process)[0] == 0 and used == [wanted]


@pytest.mark.parametrize("beams", ["1", "2"])
def test_a_conversation_that_has_become_too_long_begins_anew(command, one_process, monkeypatch, beams):
    asked, begin = iter(["你是谁？", "你累吗？", ""]), decode.Decoder.__init__
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    monkeypatch.setattr(decode.Decoder, "__init__", lambda self, model: begin(self, model, length=30))
    status, printed, complaint = command("chat", "--beams", beams, output=one_process)
    first, second = printed.splitlines()[1:]
    assert status == 0 and not complaint
    assert first and "there is room for 30" in second


@pytest.mark.parametrize("arguments", [["chat"], ["evaluate"]], ids=" ".join)
def test_before_training_it_is_said_what_to_run(command, arguments):
    status, _, complaint = command(*arguments)
    assert status == 1 and "Run notebook 05_lora_training first" in complaint


# ---------------------------------------------------------------------------------------------------- evaluate


def test_base_and_adapter_are_measured_on_every_set(command, one_process, data):
    status, printed, complaint = command("evaluate", "--rows", "3", output=one_process)
    assert status == 0 and not complaint
    found = json.loads((one_process / "evaluation.json").read_text(encoding="utf-8"))
    assert set(found["sets"]) == {path.stem.replace("_", " ") for path in (one_process / "rows").glob("new_*.json")}
    for name, one in found["sets"].items():
        assert one["rows"] == len(one["answers"]) <= 3 and f"{one['adapter']['loss']:.2f}" in printed
        row = one["answers"][0]
        asked = ("no_prompt", "base", "adapter") if name == "new wordings" else ("base", "adapter")
        assert set(one) == {"rows", "answers", *asked}
        for model in asked:
            assert one[model]["equal"] == sum(a[model] == a["reference"] for a in one["answers"]) / one["rows"], name
        # The textbook way: the whole conversation through peft, the mask by the length of the prompt.
        base = AutoModelForCausalLM.from_pretrained(utils.BUNDLED, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, one_process / "lora" / "adapter").eval()
        system = json.loads((one_process / "lora" / "prompt.json").read_text(encoding="utf-8"))["system"]
        tokenizer, sums = AutoTokenizer.from_pretrained(utils.BUNDLED), [0.0, 0]
        for row in one["answers"]:
            turns = [{"role": "system", "content": system}, *row["asked"]]
            how = {"tokenize": False, "enable_thinking": False}
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **how)
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            ids = tokenizer(f"{prompt}\n{row['reference']}<|user|>", add_special_tokens=False, return_tensors="pt")
            labels = ids["input_ids"].clone()
            labels[:, :start] = -100
            with torch.no_grad():
                sums[0] += model(**ids, labels=labels).loss.item() * (labels.shape[1] - start)
            sums[1] += labels.shape[1] - start
        assert one["adapter"]["loss"] == pytest.approx(sums[0] / sums[1], rel=1e-4)
        assert one["base"]["loss"] != pytest.approx(one["adapter"]["loss"], rel=1e-3)
        if "no_prompt" in asked:
            assert one["no_prompt"]["loss"] != pytest.approx(one["base"]["loss"], rel=1e-3)


@pytest.mark.parametrize("rows", ["0", "-1", "some"])
def test_a_number_of_rows_that_is_none_is_refused(command, capsys, rows):
    with pytest.raises(SystemExit) as stopped:
        command("evaluate", "--rows", rows)
    assert stopped.value.code == 2 and "is no whole number above 0" in capsys.readouterr().err
