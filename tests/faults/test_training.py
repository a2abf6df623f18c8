"""Faults in the middle of training: notebook 05's own cells, and the command, in processes that are killed.

Whatever happens, running the same again has to end with the very numbers of a run that nothing disturbed.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from training_process import ROOT, Run, cells, run_cells, run_script

import utils
from course import swanlab_record
from course.model_folder import whole
from finetune import resume
from notebooks import run_here

AREA = "training"
EQUAL = "final loss and adapter equal the uninterrupted run's, bit by bit"
SCRIPT = "--batch-size 4 --epochs 2 --save-steps 3".split()
KEPT = re.compile(r"checkpoint-(\d+) holds the adapter and all that is needed to go on: run this again\.")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Rows and tokens of notebooks 03 and 04, made once; a run of its own copies them."""
    place = tmp_path_factory.mktemp("prepared")
    rows = json.loads((ROOT / "dataset" / "huanhuan.json").read_text(encoding="utf-8"))[:40]
    (place / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_DATA", str(place / "rows.json"))
        patch.setenv("COURSE_OUTPUT", str(place / "out"))
        patch.setenv("SWANLAB_MODE", "disabled")
        run_here("03_dataset")
        run_here("04_chat_template")
    return place


class Course:
    """A copy of what was prepared, and the processes that train in it."""

    def __init__(self, prepared, place, **environment):
        self.out, self.log = place / "out", place.with_name(f"{place.name}.log")
        shutil.copytree(prepared / "out", self.out)
        self.environment = {"COURSE_DATA": str(prepared / "rows.json"), "COURSE_OUTPUT": str(self.out)}
        self.environment |= {"SWANLAB_MODE": "disabled", **environment}

    def notebook(self, before_training=""):
        return Run(run_cells, self.log, self.environment, cells(before_training))

    def script(self, *more, before=""):
        return Run(run_script, self.log, self.environment, [*SCRIPT, *more], before)

    @property
    def checkpoints(self):
        return self.out / "lora" / "checkpoints"

    def checkpoints_by_age(self):
        """The two that are kept, the older one first."""
        return sorted(self.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    def result(self):
        """What training ended with: the adapter's bytes, every loss by step, and the optimiser's state."""
        last = self.checkpoints_by_age()[-1]
        state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
        losses = {(row["step"], key): row[key] for row in state["log_history"] for key in row if key.endswith("loss")}
        adapter = (self.out / "lora" / "adapter" / "adapter_model.safetensors").read_bytes()
        return {
            "last": last.name,
            "losses": losses,
            "adapter": adapter,
            "moments": (last / "optimizer.pt").read_bytes(),
        }


@pytest.fixture
def course(prepared, tmp_path):
    return Course(prepared, tmp_path / "course")


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    course = Course(prepared, tmp_path_factory.mktemp("undisturbed") / "course")
    run = course.notebook()
    assert run.end() == 0, run.said
    return course


def step(run):
    found = re.findall(r"@step (\d+)", run.said)
    return int(found[-1]) if found else -1


def assert_equal(course, undisturbed):
    """Adapter and optimiser byte by byte, and every loss; resuming evaluates once more, which adds points."""
    found, wanted = course.result(), undisturbed.result()
    assert found["last"] == wanted["last"]
    assert {key: found["losses"].get(key) for key in wanted["losses"]} == wanted["losses"]
    assert found["adapter"] == wanted["adapter"]
    assert found["moments"] == wanted["moments"]


def test_two_runs_that_nothing_disturbs_are_equal(undisturbed, course):
    run = course.notebook()
    assert run.end() == 0, run.said
    assert_equal(course, undisturbed)


def assert_clear(run, *said):
    """One message of the course, no stack trace, whatever else the run has printed."""
    messages = [line for line in run.said.splitlines() if line.startswith(("CourseError: ", "finetune: "))]
    assert len(messages) == 1, run.said
    assert "Traceback" not in run.said
    for one in said:
        assert re.search(one, messages[0]), messages[0]
    return messages[0]


@pytest.mark.parametrize("second", ["notebook", "script"])
def test_two_that_train_into_one_folder(course, undisturbed, second, fault):
    first = course.notebook()
    assert first.wait_for(lambda: step(first) >= 2), first.said
    other = getattr(course, second)()
    assert other.end() == 1, other.said
    assert "Another kernel trains into .../out/lora. Shut that kernel down" in other.said
    assert first.end() == 0, first.said
    assert_equal(course, undisturbed)
    fault.record(
        AREA,
        "two trainings with one output folder",
        f"notebook 05 trains, then a second {'kernel' if second == 'notebook' else 'command'} begins",
        "the second stops with one message; the first ends as if alone",
    )


def test_a_killed_training_keeps_no_claim(course):
    run = course.notebook()
    assert run.wait_for(lambda: step(run) >= 1), run.said
    with pytest.raises(utils.CourseError, match="Another kernel trains into"):
        resume.claim(course.out / "lora")
    run.kill()
    resume.claim(course.out / "lora")
    resume.claim(course.out / "lora")  # a cell that is run twice
    resume.release(course.out / "lora")
    resume.release(course.out / "lora")


# ---------------------------------------------------------------------------------------- killed processes


def killed_ten_times(start, last_step, seed):
    """Kill it ten times at random moments of training, each run resuming the one before; returns where each resumed."""
    chance, resumed = random.Random(seed), []
    targets = sorted(chance.sample(range(last_step), 10))
    for target in targets:
        run = start()
        assert run.wait_for(lambda run=run, target=target: step(run) >= target), run.said
        time.sleep(chance.random() * 0.5)  # anywhere in a step: forward, backward, saving, evaluating
        run.kill()
        assert run.process.exitcode == -signal.SIGKILL
        resumed.append(re.search(r"resuming from (?:\S+checkpoint-(\d+)|nothing)", run.said)[1])
    return resumed


def test_ten_kills_in_one_training(course, undisturbed, fault):
    last_step = int(undisturbed.result()["last"].split("-")[1])
    resumed = killed_ten_times(course.notebook, last_step, seed=20)
    assert len(set(resumed)) >= 4, resumed  # the kills did spread over the training
    run = course.notebook()
    assert run.end() == 0, run.said
    assert "resuming from" in run.said
    assert_equal(course, undisturbed)
    fault.record(
        AREA,
        "the kernel is killed ten times in one training",
        "SIGKILL at ten random moments (seeded) of notebook 05's training cell, each run resuming the one before",
        f"the cell resumes each time; {EQUAL}",
    )


#: Planted before training: the file (or the deletion) whose path ends so is left half done, and said.
HALF_DONE = """
import io, pathlib, shutil, time
import peft.peft_model, torch
from transformers.trainer_callback import TrainerState

def half_done(name, where):
    real = getattr(where, name)
    def patched(*args, **kwargs):
        path = next((str(a) for a in args if str(a).endswith(HALF)), None)
        real(*args, **kwargs)
        if path:
            data = pathlib.Path(path).read_bytes()
            pathlib.Path(path).write_bytes(data[: len(data) // 2])
            print("@half", flush=True)
            time.sleep(60)
    setattr(where, name, patched)

half_done("save", torch)
half_done("safe_save_file", peft.peft_model)
half_done("save_to_json", TrainerState)
real_rmtree = shutil.rmtree
def rmtree(path, *args, **kwargs):
    if str(path).endswith(HALF):
        for file in sorted(pathlib.Path(path).iterdir())[::2]:
            file.unlink()
        print("@half", flush=True)
        time.sleep(60)
    real_rmtree(path, *args, **kwargs)
shutil.rmtree = rmtree
"""


def test_kills_while_a_checkpoint_is_written(course, undisturbed, fault):
    moments = {
        "checkpoint-3/adapter_model.safetensors": "resuming from nothing",
        "checkpoint-6/optimizer.pt": "resuming from nothing",
        "checkpoint-9/trainer_state.json": "resuming from .*checkpoint-3\n",
        "checkpoints/checkpoint-3": "resuming from .*checkpoint-6\n",  # the oldest is on its way out
        "lora/adapter/adapter_model.safetensors": "resuming from .*checkpoint-9\n",  # all is trained; section 14 saves
    }
    for name, resumed in moments.items():
        run = course.notebook(before_training=f"HALF = {name!r}\n{HALF_DONE}")
        assert run.wait_for(lambda run=run: "@half" in run.said), run.said
        run.kill()
        assert re.search(resumed, run.said), (name, run.said)
        last = name
    assert last.startswith("lora/adapter")
    course.environment["SWANLAB_MODE"] = "local"  # nothing is left to be recorded, and the notebook knows it
    run = course.notebook()
    assert run.end() == 0, run.said
    assert re.search("resuming from .*checkpoint-18\n", run.said)
    assert_equal(course, undisturbed)
    fault.record(
        AREA,
        "the kernel is killed while it saves",
        "SIGKILL with half of the adapter, the optimiser, the state written, half of an old checkpoint deleted, and "
        "half of the final adapter written",
        f"the torn checkpoint is named and deleted, the cell resumes from the one before; {EQUAL}",
    )


@pytest.mark.parametrize("how", ["gone", "half", "empty"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_torn_checkpoint_is_never_resumed_from(undisturbed, tmp_path, capsys, name, how):
    whole, torn = undisturbed.checkpoints_by_age()
    for path in (whole, torn):
        shutil.copytree(path, tmp_path / path.name)
    file = tmp_path / torn.name / name
    data = file.read_bytes()
    file.unlink()
    if how != "gone":
        file.write_bytes(data[: len(data) // 2] if how == "half" else b"")
    if (name, how) == ("adapter_model.safetensors", "gone"):  # nothing tells this from a checkpoint of pickles
        with pytest.raises(utils.CourseError, match=f"{torn.name}: no \\*.safetensors there"):
            resume.newest_checkpoint(tmp_path)
        return
    assert resume.newest_checkpoint(tmp_path) == str(tmp_path / whole.name)
    assert capsys.readouterr().out == f"{torn.name} was not written to its end; it is deleted\n"
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_a_pickle_in_a_checkpoint_is_not_loaded(course, undisturbed, fault):
    shutil.copytree(undisturbed.out / "lora", course.out / "lora")
    (course.out / "lora" / "made_from.json").unlink()
    _, newest = course.checkpoints_by_age()
    (newest / "adapter_model.safetensors").rename(newest / "adapter_model.bin")
    run = course.notebook()
    assert run.end() == 1
    assert_clear(run, rf"{newest.name}: no \*\.safetensors there\. The course loads no other kind of weights\.")
    fault.record(
        "security",
        "a checkpoint with adapter_model.bin",
        "a pickle in the place of the adapter, in the checkpoint that training would resume from",
        "refused by name before anything is loaded",
    )


def test_a_kill_between_setting_aside_and_beginning_costs_no_finished_run(tmp_path):
    folder = tmp_path / "lora"
    utils.restart(folder)
    (folder / "adapter").write_text("good")
    utils.restart(folder)  # killed right here: nothing is written yet
    utils.restart(folder)
    assert (tmp_path / "lora-previous" / "adapter").read_text() == "good"


# ------------------------------------------------------------------------------------------------ full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a few bytes; fills it up to what is to stay free."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


FILL = """
import shutil
def fill(place, left):
    with open(place + "/of-another-program", "wb") as file:
        file.write(bytes(shutil.disk_usage(place).free - left))
"""


@pytest.mark.parametrize("part", ["adapter", "optimiser"])
def test_a_disk_that_fills_up_while_training(prepared, small_disk, undisturbed, fault, part):
    course = Course(prepared, small_disk / "course")
    left = {"adapter": 18, "optimiser": 25}[part] * 2**20  # room for one checkpoint of 15 MiB and a part of the next
    run = course.notebook(before_training=f"{FILL}fill({str(small_disk)!r}, {left})\n")
    assert run.end() == 1
    said = assert_clear(run, "The disk is full: free some of it. Stopped at step 6 of 18", KEPT)
    assert KEPT.search(said)[1] == "3"
    assert "checkpoint-6 was not written to its end; it is deleted" in run.said
    (small_disk / "of-another-program").unlink()
    run = course.notebook()
    assert run.end() == 0, run.said
    assert "checkpoint-3" in re.search("resuming from (.*)", run.said)[1]
    assert_equal(course, undisturbed)
    fault.record(
        AREA,
        f"disk full while the {part} of a checkpoint is written",
        "a small tmpfs; another program fills it after the check",
        "one message that says what to do; the last whole checkpoint is kept; "
        f"with room again the cell resumes; {EQUAL}",
    )


def test_a_disk_without_room_for_the_checkpoints_is_said_before_training(prepared, small_disk, fault):
    course = Course(prepared, small_disk / "course")
    (small_disk / "of-another-program").write_bytes(bytes(shutil.disk_usage(small_disk).free - 36 * 2**20))
    run = course.notebook()
    assert run.end() == 1
    assert_clear(
        run,
        r"Three checkpoints take 0\.04 GiB, 0\.0[34] GiB are free\. Free some, or set COURSE_OUTPUT to another disk\.",
    )
    assert step(run) == -1
    fault.record(
        AREA,
        "disk too small for the checkpoints",
        "a tmpfs with room for two of three",
        "said before training, with what to do",
    )


# ------------------------------------------------------------------------------------------------ interrupts


def assert_usable(checkpoint):
    """The checkpoint's adapter loads, and it has learned something."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(utils.BUNDLED, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, whole(checkpoint))
    assert all(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def test_the_kernels_interrupt_leaves_an_adapter_and_the_cell_goes_on(course, undisturbed, fault):
    """In a real kernel, as the button does it; then the training cell alone once more in the same kernel."""
    from jupyter_client.manager import start_new_kernel

    sent = []
    manager, client = start_new_kernel(
        cwd=str(ROOT / "notebooks" / "en"), env={**os.environ, **course.environment}, extra_arguments=["--log-level=40"]
    )

    def execute(source, interrupt_at=None):
        def hear(message):
            content = message["content"]
            sent.append(content.get("text") or "\n".join(content.get("traceback", [])))
            if interrupt_at is not None and f"@step {interrupt_at}" in sent[-1]:
                manager.interrupt_kernel()

        return client.execute_interactive(source, output_hook=hear, timeout=300)["content"]

    try:
        sources = cells()
        (number,) = [i for i, source in enumerate(sources) if "trainer.train(" in source]
        for source in sources[:number]:
            assert execute(source)["status"] == "ok", sent
        stopped = execute(sources[number], interrupt_at=7)
        assert stopped["ename"] == "CourseError"
        assert "Traceback" not in "".join(sent)
        assert stopped["evalue"].startswith("Stopped at step 8 of 18. ")
        assert KEPT.search(stopped["evalue"])[1] == "8"
        assert_usable(course.checkpoints / "checkpoint-8")
        for source in sources[number:]:
            assert execute(source)["status"] == "ok", sent
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert_same_adapter(course, undisturbed)
    fault.record(
        AREA,
        "the kernel is interrupted",
        "the interrupt of Jupyter while a step is computed, in a real kernel",
        "the step is finished and a checkpoint written, whose adapter loads; one message, no stack trace; the cell run "
        "again in the same kernel goes on; the final adapter equals the uninterrupted run's, bit by bit",
    )


def assert_same_adapter(course, undisturbed):
    """The adapter alone: a loss that is logged at step 9 covers fewer steps after a stop at step 8."""
    found, wanted = course.result(), undisturbed.result()
    assert (found["last"], found["adapter"], found["moments"]) == (wanted["last"], wanted["adapter"], wanted["moments"])


def test_a_second_interrupt_ends_it_at_once(course, fault):
    run = course.notebook(before_training=SLOW)
    assert run.wait_for(lambda: "@slow" in run.said), run.said
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert run.process.is_alive()
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end(20) == 1
    said = assert_clear(run, "Stopped at step 4 of 18", KEPT)
    assert KEPT.search(said)[1] == "3"
    fault.record(
        AREA,
        "the kernel is interrupted twice",
        "a second interrupt while the step of the first still computes",
        "it ends at once with one message; the last checkpoint is kept",
        lost="the steps since that checkpoint, which are computed again",
    )


SLOW = """
class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            print("@slow", flush=True)
            for _ in range(600):
                time.sleep(0.1)
trainer.add_callback(Slow())
"""


# ------------------------------------------------------------------------------------------------- the command

STEPS = """
from transformers.trainer_callback import DefaultFlowCallback
def told(self, args, state, *_, **__):
    print(f"@step {state.global_step}\\n", end="", flush=True)
DefaultFlowCallback.on_step_begin = told
"""


def test_train_py_killed_ten_times_and_interrupted(prepared, tmp_path, fault):
    undisturbed, course = (Course(prepared, tmp_path / name) for name in ("one", "two"))
    run = undisturbed.script()
    assert run.end() == 0, run.said
    resumed = killed_ten_times(lambda: course.script(before=STEPS), last_step=16, seed=21)
    assert len(set(resumed)) >= 4, resumed
    run = course.script(before=STEPS)
    assert run.wait_for(lambda: step(run) >= 16), run.said
    run.kill(signal.SIGINT)
    assert run.process.exitcode == 1, run.said
    number = KEPT.search(assert_clear(run, r"Stopped at step \d+ of 18\. ", KEPT))[1]
    assert_usable(course.checkpoints / f"checkpoint-{number}")
    run = course.script()
    assert run.end() == 0, run.said
    assert f"checkpoint-{number}" in re.search("resuming from (.*)", run.said)[1]
    assert_same_adapter(course, undisturbed)
    fault.record(
        AREA,
        "the command is killed ten times in one training, then interrupted",
        "SIGKILL at ten random moments (seeded), then Ctrl-C",
        "it resumes each time; Ctrl-C ends in one message, after a checkpoint whose adapter loads; the final adapter "
        "equals the uninterrupted run's, bit by bit",
    )


# -------------------------------------------------------------------------------------------------- SwanLab

KEY = "a-made-up-key"


class Cloud:
    """SwanLab's cloud as far as a run needs it, on 127.0.0.1; `how` says what it does instead of answering well."""

    def __init__(self, how="well"):
        self.how, self.asked, self.over = how, [], threading.Event()
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                cloud.asked.append((self.path, body))
                if cloud.how == "silent":
                    cloud.over.wait()
                    self.close_connection = True
                    return
                if self.path.endswith("/experiment") and cloud.how == "dies":
                    cloud.how = "silent"  # from the next request on
                status, found = cloud.found(self.path, self.command, self.headers.get("authorization"))
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        for verb in ("GET", "POST", "PUT", "PATCH"):
            setattr(Handler, f"do_{verb}", Handler.answer)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.host = f"http://127.0.0.1:{self.server.server_port}"

    def found(self, path, command, key):
        if self.how == "500":
            return 500, {"code": "500", "message": "internal"}
        if path.endswith("/login/api_key"):
            if key != KEY:
                return 401, {"code": "401", "message": "unauthorized"}
            return 200, {"sid": "s", "expiredAt": "2099-01-01T00:00:00.000Z", "userInfo": {"username": "u"}}
        if path.endswith("/experiment"):
            return 201, {"cuid": "e", "slug": "e", "name": "n", "createdAt": "2026-01-01T00:00:00.000Z"}
        if command == "GET":
            count = {"experiments": 0, "contributors": 0, "collaborators": 0, "clones": 0}
            who = {"cuid": "c", "name": "p", "path": "/u/p", "visibility": "PRIVATE"}
            return 200, {**who, "group": {"username": "u"}, "_count": count}
        return 200, {}

    def points(self, name):
        """What has been uploaded under a name, as step to value."""
        sent = [json.loads(body)["metrics"] for path, body in self.asked if path.endswith("/house/metrics")]
        return {one["index"]: one["data"] for metrics in sent for one in metrics if one.get("key") == name}

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def swanlab_cloud(how):
    """The cloud's address and key, for the environment."""
    if how in ("refused", "unknown"):
        host = "http://127.0.0.1:9" if how == "refused" else "http://cloud.invalid"
        yield {"SWANLAB_API_HOST": host, "SWANLAB_API_KEY": KEY}
        return
    cloud = Cloud(how)
    key = {"wrong key": {"SWANLAB_API_KEY": "another"}, "no key": {}}.get(how, {"SWANLAB_API_KEY": KEY})
    yield {"SWANLAB_API_HOST": cloud.host, **key}
    cloud.close()


@pytest.mark.parametrize(
    ("how", "injected", "said"),
    [
        ("silent", "a cloud on 127.0.0.1 that accepts and never answers", "does not answer"),
        ("refused", "a port without a server", "does not answer"),
        ("unknown", "a name that resolves to nothing", "does not answer"),
        ("500", "a cloud on 127.0.0.1 that answers HTTP 500", "is in trouble (HTTP 500)"),
        ("wrong key", "a cloud on 127.0.0.1 that answers 401", "asks for a valid SWANLAB_API_KEY"),
        ("no key", "a cloud on 127.0.0.1, no SWANLAB_API_KEY, no front end to ask", "asks for a valid SWANLAB_API_KEY"),
    ],
)
def test_swanlab_that_cannot_record_is_noticed_in_five_seconds(
    cell, monkeypatch, capsys, tmp_path, fault, how, injected, said
):
    from swanlab.integration.transformers import SwanLabCallback  # noqa: F401  importing is not waiting

    from finetune import train

    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    course = dataclasses.replace(utils.settings(), swanlab_mode="online", output=tmp_path)
    with swanlab_cloud(how) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        begun = time.monotonic()
        names = {"settings": course, "swanlab_record": swanlab_record}
        exec(cell("05_lora_training", "SwanLab mode:"), names)
        assert time.monotonic() - begun < 5
        begun = time.monotonic()
        (callback,) = train.swanlab_callback(course, {})
        assert time.monotonic() - begun < 5
    assert names["mode"] == callback._init_kwargs["mode"] == "local"
    line = f"The SwanLab cloud {said}; recording locally, to be uploaded later.\n"
    assert capsys.readouterr().out == f"{line}SwanLab mode: local\n{line}"
    fault.record(
        AREA,
        f"SwanLab: {how}",
        injected,
        "noticed in less than five seconds, in notebook 05 and the command; the run is recorded locally",
    )


def test_a_cloud_that_answers_well_is_used(cell, monkeypatch, capsys):
    course = dataclasses.replace(utils.settings(), swanlab_mode="cloud")
    with swanlab_cloud("well") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        exec(cell("05_lora_training", "SwanLab mode:"), {"settings": course, "swanlab_record": swanlab_record})
    assert capsys.readouterr().out == "SwanLab mode: online\n"


def test_what_a_silent_cloud_missed_is_uploaded_later(prepared, tmp_path, undisturbed, fault):
    with swanlab_cloud("silent") as environment:
        course = Course(prepared, tmp_path / "course", **environment, SWANLAB_MODE="online", HOME=str(tmp_path))
        run = course.notebook()
        assert run.end() == 0, run.said
    assert "The SwanLab cloud does not answer; recording locally" in run.said
    assert_equal(course, undisturbed)
    assert swanlab_record.recorded(course.out / "swanlab", "train/loss") == pytest.approx(training_losses(undisturbed))
    assert uploaded_later(course, tmp_path) == pytest.approx(training_losses(undisturbed))
    fault.record(
        AREA,
        "SwanLab: silent during a whole training",
        "a cloud on 127.0.0.1 that accepts and never answers; later one that answers",
        f"{EQUAL}; every loss is in the local record, and `swanlab sync` uploads it later",
    )


def test_a_cloud_that_falls_silent_during_training(prepared, tmp_path, undisturbed, fault):
    with swanlab_cloud("dies") as environment:
        course = Course(prepared, tmp_path / "course", **environment, SWANLAB_MODE="online", HOME=str(tmp_path))
        run = course.notebook()
        assert run.wait_for(lambda: step(run) == 17), run.said
        assert run.end(60) == 0, run.said
    assert "SwanLab mode: online" in run.said
    assert "The SwanLab cloud does not answer; the record is kept, to be uploaded later." in run.said
    assert_equal(course, undisturbed)
    assert uploaded_later(course, tmp_path) == pytest.approx(training_losses(undisturbed))
    fault.record(
        AREA,
        "SwanLab: silent from the middle of training on",
        "a cloud on 127.0.0.1 that answers until the run has begun and then never; later one that answers",
        f"said at the end and not waited for; {EQUAL}; `swanlab sync` uploads every loss later",
    )


def training_losses(course):
    return {number: loss for (number, key), loss in course.result()["losses"].items() if key == "loss"}


def uploaded_later(course, home):
    """What `swanlab sync` brings of the record to a cloud that answers."""
    (record,) = (course.out / "swanlab").glob("run-*")
    cloud = Cloud()
    subprocess.run(
        [Path(sys.executable).with_name("swanlab"), "sync", str(record)],
        env={**os.environ, "SWANLAB_API_HOST": cloud.host, "SWANLAB_API_KEY": KEY, "HOME": str(home)},
        check=True,
        timeout=120,
        capture_output=True,
    )
    cloud.close()
    return cloud.points("train/loss")


def test_a_log_folder_that_cannot_be_written(prepared, tmp_path, fault):
    course = Course(prepared, tmp_path / "course", SWANLAB_MODE="local")
    folder = course.out / "swanlab"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = course.notebook()
        assert run.end() == 0, run.said
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    told = re.search(r"swanlab cannot be written \(Read-only file system\); SwanLab records in (.*)", run.said)
    other = Path(told[1])
    assert len(swanlab_record.recorded(other, "train/loss")) == 6
    shutil.rmtree(other)
    fault.record(
        AREA,
        "SwanLab: the log folder cannot be written",
        "output/swanlab is a tmpfs mounted read-only",
        "said; training goes on, and the record is kept in a temporary folder that is named",
    )


# -------------------------------------------------------------------------------------- several processes, one folder

TORN = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from finetune import resume

folder, order = Path(sys.argv[1]), sys.argv[2] == "in order"
dist.init_process_group("gloo")
if dist.get_rank() == 0 and order:
    time.sleep(2)  # the first process still writes
    (folder / "checkpoint-1" / "written").touch()
seen = []
resume.written_to_its_end = lambda path: seen.append(path) or (path / "written").exists()
resume.whole = lambda path: path
kept = resume.kept_checkpoint(folder, order)
print(f"{dist.get_rank()} {kept} {len(seen)}\\n", end="", flush=True)  # one write: the other process prints too
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["in order", "at once"])
def test_only_the_first_process_looks_for_checkpoints_and_none_is_deleted_while_it_writes(tmp_path, how):
    (tmp_path / "checkpoint-1").mkdir()
    script = tmp_path / "torn.py"
    script.write_text(TORN, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path), how], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line[:1] in "01"}
    found = str(tmp_path / "checkpoint-1") if how == "in order" else "None"
    assert answers["0"] == [found, "1"]
    assert answers["1"] == [found if how == "in order" else "None", "0"]
    assert (tmp_path / "checkpoint-1").is_dir()
