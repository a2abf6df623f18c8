"""The planner against the checkpoint's names, notebook 05, and every run that was measured."""

import json
import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig

import utils
from benchmarks.benchmark import planned_for
from finetune import machine as machines
from finetune import parallel, planner
from finetune.config import AIR, active_parameters, lora_parameters, parameters, tensors
from finetune.machine import CARDS, GIB, Machine
from finetune.packing import SimilarLengths
from finetune.planner import AverageRows, RealRows, Recipe, kept_layers, kept_numbers, layer_numbers

H100 = Machine(1, 78.6, "H100", 100, 500)
H200_PAIR = Machine(2, 139, "H200", 200, 500)
RTX_4090 = Machine(1, 23.6, "NVIDIA GeForce RTX 4090", 60, 500)
LAPTOP = Machine(0, 0.0, "CPU", 20, 100)
ATTENTION = ("attention",)
BUNDLED = AutoConfig.from_pretrained(utils.BUNDLED)


def plan(config=AIR, machine=None, rows=planner.ROLE_PLAY, processes=1, on_this_host=None, advise=True, **recipe):
    """The plan of the recipe that the last arguments describe."""
    return planner.plan(config, Recipe(**recipe), rows, machine, processes, on_this_host, advise)


def test_parameters_are_those_of_the_checkpoint():
    assert sum(parameters(AIR).values()) == 106_852_245_504
    counted = {"routed": 0, "linear": 0, "rest": 0}
    for name, shape, _ in tensors(AIR):
        if ".layers.46." in name or "e_score_correction_bias" in name:
            continue  # the prediction layer, and a buffer
        size = 1
        for length in shape:
            size *= length
        linear = "proj.weight" in name
        counted["routed" if ".experts." in name else "linear" if linear else "rest"] += size
    assert counted == parameters(AIR)
    assert round(active_parameters(AIR) / 1e9) == 12  # as the model's authors say


def test_the_bundled_model_is_counted_too():
    stored = sum(path.stat().st_size for path in utils.BUNDLED.glob("*.safetensors"))
    assert 2 * sum(parameters(BUNDLED).values()) == pytest.approx(stored, rel=0.002)


@pytest.mark.parametrize("config", [AIR, BUNDLED], ids=["Air", "bundled"])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_adapter_is_counted_as_notebook_05_does(cell, config, rank):
    space = {}
    exec(cell("05_lora_training", "def adapter_parameters"), space)
    assert lora_parameters(config, rank) == space["adapter_parameters"](config, rank)
    alone = space["adapter_parameters"](config, rank, ATTENTION)["attention"]
    assert lora_parameters(config, rank, ATTENTION) == {"attention": alone}


# ------------------------------------------------------------------------------------------ measured runs


def measured():
    """The runs that came to an end; not those of the textbook's batches on our experts, which are not planned."""
    lines = (ROOT / "benchmarks" / "measured.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["recipe"] in ("ours", "textbook") and "failed" not in row]
    assert rows
    return rows


def named(row):
    card = next((card for card in CARDS if card in row["gpu"]), row["gpu"])
    what = f"{row['bits']}bit-{row['layers']}layers-{row['samples']}/{row['passes']}"
    how = "checkpointing" if row["checkpointing"] else "kept"
    return f"{row['recipe']}-{card}x{row.get('gpus', 1)}-{what}-{how}"


def planned(row):
    """What the planner says of this run, with the tokens that it read."""
    return planned_for(row, AverageRows(mean_tokens=row["tokens_per_second"] * row["step_seconds"] / row["samples"]))


@pytest.mark.parametrize("row", measured(), ids=named)
def test_memory_is_near_what_was_measured(row):  # the time's rates were fitted to these rows
    made = planned(row)
    assert made.peak == pytest.approx(max(row["peak_gib"]), rel=0.10)
    assert made.fits  # it ran


def test_the_adapters_memory_is_16_bytes_a_number():
    # 10 % of 68 GiB would hide a missing adapter of 8.8 GiB.
    small, large = (plan(lora_rank=rank, load_in_4bit=True, machine=H100, advise=False) for rank in (8, 16))
    more = sum(large.trained.values()) - sum(small.trained.values())
    assert large.gpu["adapter and optimizer"] - small.gpu["adapter and optimizer"] == pytest.approx(16 * more / GIB)
    assert large.checkpoint_gib == pytest.approx(12 * sum(large.trained.values()) / GIB)
    assert small.gpu["adapter and optimizer"] == pytest.approx(16 * 594_261_504 / GIB)


def test_the_weights_memory_is_their_bytes():
    count = parameters(AIR)
    assert plan(machine=H100, advise=False).gpu["weights"] == pytest.approx(2 * 106_852_245_504 / GIB)
    packed = (count["routed"] + count["linear"]) * (0.5 + 1 / 64 + 1 / 4096) + 2 * count["rest"]
    assert plan(load_in_4bit=True, machine=H100, advise=False).gpu["weights"] == pytest.approx(packed / GIB)
    half = plan(machine=H200_PAIR, processes=2, advise=False)
    assert half.gpu["weights"] == pytest.approx(106_852_245_504 / GIB)
    # Two processes keep half of the experts each; three cannot share 128 evenly, so each gathers whole layers.
    layer = 2 * count["routed"] / 45 / GIB
    assert 2 * layer / 2 < half.gpu["gathered layers"] < 2 * layer
    third = plan(machine=replace(H200_PAIR, gpus=3), processes=3, batch_size=48, advise=False)
    assert third.gpu["gathered layers"] > 4 * layer
    alone, pair = (plan(load_in_4bit=True, machine=H100, processes=n, advise=False) for n in (1, 2))
    assert pair.gpu["weights"] == alone.gpu["weights"]  # in 4 bits each keeps all
    more = pair.gpu["adapter and optimizer"] - alone.gpu["adapter and optimizer"]
    assert more == pytest.approx(4 * 594_261_504 / GIB)
    assert plan(BUNDLED, machine=LAPTOP).gpu["weights"] == pytest.approx(4 * sum(parameters(BUNDLED).values()) / GIB)


def test_logits_count_where_they_outgrow_a_layers_own_tensors():
    how = {"machine": H100, "advise": False, "load_in_4bit": True, "batch_size": 1024}
    few, all_of_them = plan(**how, rows=AverageRows(label_share=0.1)), plan(**how, rows=AverageRows(label_share=1.0))
    assert all_of_them.gpu["activations"] > few.gpu["activations"] + 20
    assert plan(**how, baseline=True).gpu["activations"] == all_of_them.gpu["activations"]
    # A label's logits: 151,552 numbers in bf16, in float32, and their gradient in float32.
    labels = 1024 * 60.6
    assert all_of_them.gpu["activations"] > labels * 151552 * 10 / GIB - 9


def test_activations_grow_with_the_layers():
    half = deepcopy(AIR)
    half.num_hidden_layers = 23
    how = {
        "machine": H100,
        "advise": False,
        "load_in_4bit": True,
        "batch_size": 1024,
        "groups": ATTENTION,
        "lora_rank": 1,
    }
    whole, less = plan(**how), plan(half, **how)
    a_layer = 2 * 1024 * 60.6 * 4096 / GIB  # one hidden state a token, less the gradients that come instead
    assert whole.gpu["activations"] - less.gpu["activations"] == pytest.approx(23 * a_layer, rel=0.01)
    how = {"machine": LAPTOP, "advise": False, "gradient_checkpointing": False, "batch_size": 1024}
    small, large = (plan(lora_rank=rank, **how) for rank in (8, 16))
    # More factors mean more gradients, which come into being while activations go.
    grown = small.gpu["activations"] - large.gpu["activations"]
    assert grown == pytest.approx(4 * 594_261_504 / GIB)


# ------------------------------------------------------------------------------------------- good sense


@pytest.mark.parametrize("four", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_more_is_never_less(four, checkpointing):
    how = {"load_in_4bit": four, "gradient_checkpointing": checkpointing, "machine": H100, "advise": False}
    for changes in (
        [{"lora_rank": rank} for rank in (1, 2, 4, 8, 16, 64)],
        [{"batch_size": samples} for samples in (1, 4, 16, 64, 256, 1024)],
        [{"batch_size": 64, "gradient_accumulation_steps": passes} for passes in (64, 16, 4, 1)],
        [{"rows": AverageRows(mean_tokens=tokens)} for tokens in (10, 60.6, 500, 4000)],
    ):
        made = [plan(**how, **change) for change in changes]
        peaks = [one.peak for one in made]
        assert peaks == sorted(peaks)
        if "gradient_accumulation_steps" not in changes[0]:
            times = [one.step_seconds for one in made]
            assert times == sorted(times)
    ranks = [plan(**how, lora_rank=rank) for rank in (4, 8, 16)]
    assert ranks[0].peak < ranks[1].peak < ranks[2].peak
    assert ranks[0].checkpoint_gib < ranks[1].checkpoint_gib < ranks[2].checkpoint_gib
    assert plan(**how, batch_size=1024).peak > plan(**how, batch_size=16).peak
    assert plan(**how, batch_size=1024).step_seconds > plan(**how, batch_size=16).step_seconds
    attention = plan(**how, groups=ATTENTION)
    assert attention.peak < plan(**how).peak and sum(attention.trained.values()) == 15_826_944


def test_checkpointing_and_passes_save_memory_and_cost_time():
    how = {"batch_size": 64, "load_in_4bit": True, "machine": H100, "advise": False}
    with_it, without = plan(**how), plan(**how, gradient_checkpointing=False)
    assert with_it.peak < without.peak and with_it.step_seconds > without.step_seconds
    split = plan(**how, gradient_accumulation_steps=4)
    assert split.peak <= with_it.peak and split.step_seconds > with_it.step_seconds


def test_steps_and_hours():
    made = plan(load_in_4bit=True, machine=H100, epochs=3, batch_size=16)
    assert made.steps == 3 * 234
    assert f"{made.steps * made.step_seconds / 60:.1f} minutes" in made.text()
    assert "hours" in plan(load_in_4bit=True, machine=H100, epochs=60).text()


# ------------------------------------------------------------------------------------- what fits and what not


def test_one_h100_is_told_to_take_4_bits():
    made = plan(machine=H100)
    assert not made.fits
    assert "python -m finetune train --load-in-4bit --batch-size 16." in made.advice
    with pytest.raises(utils.CourseError) as error:
        made.require_fit()
    assert f"This needs {made.peak:.1f} GiB on each device, 78.6 GiB are free." in str(error.value)
    assert made.advice in str(error.value) and "Nothing was loaded" in str(error.value)
    advised = plan(load_in_4bit=True, batch_size=16, gradient_accumulation_steps=1, machine=H100)
    assert advised.fits and f"would fit in {advised.peak:.0f} GiB" in made.advice
    assert advised.require_fit() is None


def test_two_h200_are_told_to_share():
    made = plan(machine=H200_PAIR)
    assert not made.fits
    assert "torchrun --nproc-per-node 2 -m finetune train --batch-size 16." in made.advice
    assert plan(machine=H200_PAIR, processes=2).fits


def test_the_advice_keeps_the_rank():
    assert "--lora-rank 4" in plan(machine=H100, lora_rank=4).advice
    assert "--lora-rank" not in plan(machine=H100).advice


def test_the_advice_keeps_the_groups():
    made = plan(machine=H100, groups=ATTENTION)
    assert "--load-in-4bit" in made.advice
    assert "--attention-only" in made.advice


def test_passes_are_advised_where_they_help():
    made = plan(load_in_4bit=True, batch_size=512, machine=H100)
    assert not made.fits
    passes = int(made.advice.split("--gradient-accumulation-steps ")[1].rstrip("."))
    assert (
        1 < passes <= 16
        and plan(load_in_4bit=True, batch_size=512, gradient_accumulation_steps=passes, machine=H100).fits
    )
    assert not plan(load_in_4bit=True, batch_size=512, gradient_accumulation_steps=passes // 2, machine=H100).fits


@pytest.mark.parametrize("machine", [RTX_4090, LAPTOP], ids=["RTX 4090", "no GPU"])
def test_a_machine_that_is_too_small_is_told_what_to_rent(machine):
    made = plan(machine=machine)
    assert made.advice.startswith("1 GPU(s) of 80 GB with 4-bit weights would do (")
    assert "does not fit. 1 GPU(s) of 80 GB" in made.text()
    with pytest.raises(utils.CourseError, match=rf"{made.room:.1f} GiB are free\. 1 GPU\(s\) of 80 GB"):
        made.require_fit()
    assert plan(load_in_4bit=True, machine=H100).fits
    assert ("(a guess: no such card was measured)" in made.text()) == (machine is not H100)


@pytest.mark.parametrize(("gpus", "guess"), [(1, False), (2, False), (3, True), (4, True)])
def test_a_plan_for_more_gpus_than_were_measured_is_called_a_guess(gpus, guess):
    made = plan(machine=replace(H200_PAIR, gpus=gpus), processes=gpus, batch_size=16 * gpus)
    assert ("(a guess: more than two GPUs were not measured)" in made.text()) == guess
    assert max(row["gpus"] for row in measured()) == 2


def test_what_nothing_holds_says_so():
    assert "lower the rank" in plan(lora_rank=4096, machine=H100).advice


def test_a_large_rank_is_told_how_many_gpus():
    made = plan(lora_rank=32, load_in_4bit=True, machine=H100)
    assert not made.fits
    assert "GPU(s) of 80 GB with bf16 weights would do" in made.advice


def test_too_little_disk_is_refused_with_figures():
    made = plan(load_in_4bit=True, machine=replace(H100, disk_gib=10))
    assert not made.fits
    with pytest.raises(utils.CourseError, match=r"Three checkpoints take 19\.92 GiB, 10\.00 GiB are free\. Free some"):
        made.require_fit()


def test_too_little_disk_is_what_the_plan_says():
    said = plan(load_in_4bit=True, machine=replace(H100, disk_gib=10)).text().splitlines()[-1]
    assert "GPU(s)" not in said and "disk" in said.lower()


def test_more_processes_than_gpus_are_refused():
    made = plan(load_in_4bit=True, machine=H100, processes=2)
    assert not made.fits
    with pytest.raises(utils.CourseError, match="2 processes were started for 1 GPUs"):
        made.require_fit()
    assert plan(BUNDLED, machine=LAPTOP, processes=2).fits  # on a processor any number may share


def test_a_processor_trains_the_bundled_model(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    machine = machines.this_machine(tmp_path / "not" / "yet")
    assert machine.gpus == 0 and machine.host_gib > 0 and machine.disk_gib > 0
    made = plan(BUNDLED, gradient_checkpointing=False, machine=replace(machine, host_gib=4, disk_gib=10))
    assert made.fits and made.require_fit() is None
    assert 0.8 < made.peak < 1.6  # notebook 05 takes 1.4 GiB at most
    assert "no GPU, 4 GiB of memory free: float32 weights, 1 process(es)" in made.text()


# -------------------------------------------------------------------------------------------------- words


TEXT = """\
  594,261,504 trainable parameters
  memory of each GPU: weights 53.1 + adapter and optimizer 8.9 + activations 4.7 + rest 1.5 = 68.2 of 78.6 GiB
  disk: 6.64 GiB a checkpoint, two kept and one being written; 500 GiB free
  time: 702 steps of about 1.43 s: 16.7 minutes
  fits"""


def test_a_plan_in_words():
    first, rest = plan(load_in_4bit=True, machine=H100).text().split("\n", 1)
    assert first == (
        "Plan for 1 x H100 of 79 GiB: 4-bit weights, 1 process(es), batch size 16, gradient accumulation 1, "
        "with gradient checkpointing"
    )
    assert rest == TEXT


# ------------------------------------------------------------------------- several hosts, real rows, the environment


def test_processes_of_other_hosts_take_no_gpu_here():
    machine = Machine(8, 79, "H100", 500, 500)
    two_hosts = plan(batch_size=256, processes=16, on_this_host=8, machine=machine)
    assert two_hosts.fits and two_hosts.peak < plan(batch_size=256, processes=8, machine=machine).peak
    crowded = plan(batch_size=256, processes=16, on_this_host=16, machine=machine)
    with pytest.raises(utils.CourseError, match="16 processes were started for 8 GPUs"):
        crowded.require_fit()


def test_processes_on_a_processor_share_its_memory():
    one = plan(BUNDLED, gradient_checkpointing=False, machine=replace(LAPTOP, host_gib=2))
    eight = plan(BUNDLED, gradient_checkpointing=False, machine=replace(LAPTOP, host_gib=2), processes=8)
    assert one.fits and not eight.fits
    assert eight.room == pytest.approx(2 / 8)


def test_rows_that_are_mostly_answers_need_more_and_the_evaluation_is_planned():
    usual = RealRows([61] * 3000, [20] * 3000, [61] * 80, [20] * 80)
    answers = RealRows([1000] * 3000, [980] * 3000, [1000] * 80, [980] * 80)
    little, much = (plan(load_in_4bit=True, batch_size=16, machine=H100, rows=sizes) for sizes in (usual, answers))
    assert little.eval_batch_size == 40
    assert much.peak > little.peak + 5
    assert much.eval_batch_size < 40 or not much.fits
    recipe = Recipe(load_in_4bit=True)
    held_out = planner.memory(AIR, recipe, planner.Load(100, 30, 40_000, 39_200), 1, 1)
    without = planner.memory(AIR, recipe, planner.Load(100, 30), 1, 1)
    logits = 39_200 * AIR.vocab_size * 4 / GIB  # at least these, in float32
    assert held_out["activations"] - without["activations"] > logits - 10


def test_an_evaluation_that_would_not_fit_reads_fewer_rows_at_once():
    rows = RealRows([60] * 300, [20] * 300, [1000] * 80, [980] * 80)
    made = plan(load_in_4bit=True, batch_size=16, machine=H100, rows=rows)
    assert made.fits and made.eval_batch_size < 40


@pytest.mark.parametrize("seed", range(3))
def test_the_heaviest_batch_is_that_of_the_order_which_rows_are_trained_in(seed):
    draw = random.Random(seed)
    sizes = [round(draw.lognormvariate(4, 0.6)) for _ in range(1000)]
    rows, order = RealRows(sizes, sizes), SimilarLengths(sizes, 16, seed)
    steps = []
    for epoch in range(3):
        order.set_epoch(epoch)
        numbers = list(order)
        steps += [sum(sizes[i] for i in numbers[at : at + 16]) for at in range(0, len(numbers), 16)]
    assert 0.8 * rows.heaviest(16)[0] < max(steps) <= rows.heaviest(16)[0]
    assert sum(rows.passes(16)) / len(rows.passes(16)) == pytest.approx(sum(steps) / len(steps), rel=0.03)


@pytest.mark.parametrize(
    "rows", [RealRows([60] * 160, [20] * 160, shared=15), AverageRows(mean_tokens=60, label_share=1 / 3, shared=15)]
)
def test_shared_tokens_are_read_once_a_pass(rows):
    tokens, labels = rows.heaviest(16)
    assert tokens == rows.passes(16)[0] == 16 * 60 - 15 * 15 and labels == pytest.approx(16 * 20)
    assert rows.heaviest(1)[0] == rows.mean_tokens == 60  # a step of one row has nothing to share
    how = {"load_in_4bit": True, "batch_size": 128, "machine": H100}
    whole, shared = plan(**how, rows=replace(rows, shared=0)), plan(**how, rows=rows)
    assert shared.step_seconds < whole.step_seconds and shared.peak < whole.peak


def test_passes_whose_activations_fit_keep_them():
    rows = RealRows([20] * 800 + [200] * 800, [6] * 1600)
    how = {"load_in_4bit": True, "machine": H100, "rows": rows, "advise": False}
    always, where_needed, never = (
        plan(**how),
        plan(**how, keep_what_fits=True),
        plan(**how, gradient_checkpointing=False),
    )
    assert always.free_tokens == never.free_tokens == 0
    assert 320 < where_needed.free_tokens < 3200  # between the short passes and the long ones
    assert where_needed.peak == always.peak and where_needed.fits and not never.fits
    # Half of the passes keep all layers, the others some of them.
    assert never.step_seconds < where_needed.step_seconds < (always.step_seconds + never.step_seconds) / 2
    assert f"with gradient checkpointing above {where_needed.free_tokens:,} tokens" in where_needed.text()
    # A pass of that many tokens does fit, with little to spare.
    for share, fits in ((1, True), (1.4, False)):
        tokens = AverageRows(mean_tokens=share * where_needed.free_tokens / 16)
        assert plan(load_in_4bit=True, machine=H100, rows=tokens, gradient_checkpointing=False).fits is fits


def test_above_that_as_many_layers_as_fit_keep_theirs():
    free, numbers = 1300, (kept_numbers(AIR), layer_numbers(AIR))
    kept = {tokens: kept_layers(AIR, free, tokens) for tokens in (free, free + 1, 2000, 3000, 8000, 16000)}
    assert kept[free] == AIR.num_hidden_layers and kept[16000] == kept[8000] == 0
    assert AIR.num_hidden_layers / 4 <= kept[3000] < kept[2000]
    assert sorted(kept.values(), reverse=True) == list(kept.values())
    for tokens, layers in kept.items():  # bytes of all kept activations, counted in another way than in `kept_layers`
        held = layers * numbers[0] + (AIR.num_hidden_layers - layers) * AIR.hidden_size + numbers[1]
        most = free * (AIR.num_hidden_layers * numbers[0] + numbers[1])
        assert tokens == free or layers == 0 or tokens * held <= most / 1.19
        one_more = tokens * (held + numbers[0] - AIR.hidden_size)
        assert tokens <= free or layers == 0 or one_more > most / 1.21
    assert kept_layers(AIR, 0, 10) == 0
    rows = AverageRows(mean_tokens=61)
    how = {"load_in_4bit": True, "machine": H100, "rows": rows, "advise": False}
    seconds = [plan(batch_size=32, keep_what_fits=fits, **how).step_seconds for fits in (False, True)]
    assert 0.7 * seconds[0] < seconds[1] < 0.95 * seconds[0]


def test_a_run_on_two_hosts_that_does_not_fit_is_told_how_two_hosts_would_do():
    machine = Machine(8, 79, "H100", 500, 500)
    made = plan(batch_size=65536, processes=16, on_this_host=8, machine=machine)
    assert not made.fits
    assert (
        "torchrun --nnodes 2 --nproc-per-node 8 -m finetune train --batch-size 65536 --gradient-accumulation-steps"
        in made.advice
    )


def test_a_variable_left_behind_is_named(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(utils.CourseError, match=r"WORLD_SIZE=2 is set.*Unset WORLD_SIZE"):
        parallel.launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel.launched() == parallel.Launched()
    monkeypatch.setenv("LOCAL_RANK", "0")  # enough for torch to look for the other processes
    with pytest.raises(
        utils.CourseError, match=r"has set RANK, MASTER_ADDR, MASTER_PORT with it.*LOCAL_RANK, or start"
    ):
        parallel.launched()


def test_what_torchrun_sets_is_read(monkeypatch):
    set_by = {"WORLD_SIZE": 16, "RANK": 11, "LOCAL_WORLD_SIZE": 8, "LOCAL_RANK": 3}
    for name, value in {**set_by, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert parallel.launched() == parallel.Launched(16, 11, 8, 3)


def test_a_launched_process_asks_only_its_own_gpu(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: asked.append(i) or (79 * GIB, 80 * GIB))
    monkeypatch.setattr(machines, "launched", lambda: parallel.Launched(16, 11, 8, 3))
    assert machines.this_machine(tmp_path).gpus == 8
    assert asked == [3]
