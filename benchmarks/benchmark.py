"""Time LoRA training of GLM-4.5-Air at its full size on the GPUs of this machine: the textbook recipe and ours.

    python benchmarks/benchmark.py

One command: it looks which GPUs are there, writes a checkpoint of holes (no download, no disk), loads it the way
`python -m finetune train` does, fills it with random weights, and trains a few steps on rows of the lengths of a
role-play data set.
Speed and memory do not depend on the values of the weights; answers would, and none is looked at.

Prints tokens/s, samples/s, peak memory and the share of what the matrix units could do, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils

utils.start()  # before torch is imported

# isort: split
import torch
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from course.memory import MemoryWatch, peak_memory_gib
from finetune import lora, planner
from finetune.checkpoint import write_holes
from finetune.config import AIR, ALL_GROUPS
from finetune.decode import Decoder
from finetune.machine import CARDS, Machine, this_machine
from finetune.model import load_model
from finetune.packing import PackedRows
from finetune.parallel import launched
from finetune.train import ShardedTrainer

LENGTHS = json.loads((Path(__file__).parent / "lengths.json").read_text(encoding="utf-8"))
#: So many tokens all rows begin with. Assumed: the shortest prompt of `LENGTHS` has 21, with its question.
SHARED = 12
FLOP_A_TOKEN = 48e9  # forward and backward through 12 B active parameters, none of their gradients: 4 x 12 B


def rows(count: int, config: Any, seed: int = 0) -> list[dict[str, list[int]]]:
    """Samples of random tokens, as long as role-play samples are, with one system prompt; the prompt is masked."""
    draw = random.Random(seed)
    system, made = [draw.randrange(config.vocab_size) for _ in range(SHARED)], []
    for _ in range(count):
        prompt, answer = draw.choice(LENGTHS)
        ids = system + [draw.randrange(config.vocab_size) for _ in range(prompt + answer - SHARED)]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:]})
    return made


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Fill the weights as a fresh model's: normal with deviation 0.02, norms 1, biases 0."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        for tensor, parameter in list(module.named_parameters(recurse=False)):
            packed = getattr(module, "packed", {})
            state = packed.get(tensor) or getattr(parameter, "quant_state", None)
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if state is not None:
                from bitsandbytes.functional import quantize_4bit

                full = torch.empty(state.shape, dtype=state.dtype, device=parameter.device).normal_(0, 0.02)
                values, new = quantize_4bit(full, quant_type="nf4", compress_statistics=True)
                parameter.data.copy_(values)
                if tensor in packed:
                    packed[tensor] = new
                else:
                    parameter.quant_state = module.quant_state = new
            elif "norm" in name:
                local.fill_(1)
            elif tensor == "bias" or "correction" in tensor:
                local.zero_()
            else:
                local.normal_(0, 0.02)


def synchronise() -> None:
    """Wait until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock(TrainerCallback):
    """Seconds of each step, everything on the device finished."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start when all earlier work is done."""
        synchronise()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop when this step's work is done."""
        synchronise()
        self.seconds.append(time.perf_counter() - self.began)


def matrix_rate() -> float:
    """FLOP/s of one GPU on a product of two large bf16 matrices of random numbers (a processor: small, float32)."""
    gpu = torch.cuda.is_available()
    size, kind = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    a, b = (torch.randn(size, size, device="cuda" if gpu else "cpu", dtype=kind) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronise()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronise()
    return 20 * 2 * size**3 / (time.perf_counter() - began)


def peaks() -> list[tuple[float, float]]:
    """GiB reserved and in use at most, for each GPU that this run uses; of the process where there is none."""
    if not torch.cuda.is_available():
        return [(peak_memory_gib(), peak_memory_gib())]
    mine = range(torch.cuda.device_count()) if launched().processes == 1 else [torch.cuda.current_device()]
    found = [(torch.cuda.max_memory_reserved(i) / 2**30, torch.cuda.max_memory_allocated(i) / 2**30) for i in mine]
    if launched().processes > 1:
        gathered: list[Any] = [None] * launched().processes
        torch.distributed.all_gather_object(gathered, found[0])
        found = gathered
    return [pair for pair in found if pair[0] > 0.1]


@dataclass(frozen=True)
class Job:
    """What one measurement trains.

    Attributes:
        samples: of one optimizer step. passes: that the step is split into.
        packed: all samples of a pass in one row, as ours; else padded.
        record: each size of a pass is recorded as a CUDA graph.
        free: tokens from `planner.free_tokens`: a longer pass keeps the activations of as many layers as fit; 0: none.
        shared: tokens that all samples begin with are computed once a pass.
    """

    samples: int
    passes: int
    packed: bool
    checkpointing: bool
    record: bool = False
    free: int = 0
    shared: bool = False

    def arguments(self, steps: int) -> TrainingArguments:
        """`Trainer`'s arguments; nothing is saved or shown."""
        gpu, world = torch.cuda.is_available(), launched().processes
        return TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=self.samples // self.passes // world,
            gradient_accumulation_steps=self.passes,
            max_steps=steps,
            learning_rate=1e-4,
            activation_checkpointing=self.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False},
            bf16=gpu,
            use_cpu=not gpu,
            ddp_backend="gloo" if world > 1 and not gpu else None,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            report_to="none",
        )

    def collator(self) -> Any:
        """What makes a pass of the samples."""
        if self.packed:
            return PackedRows(SHARED if self.shared else 0)
        from tokenizers import Tokenizer, models

        one = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
        return DataCollatorForSeq2Seq(PreTrainedTokenizerFast(tokenizer_object=one, pad_token="<pad>"), padding=True)


def job_of(asked: str, facts: dict[str, Any]) -> Job:
    """The job that `--samples` names, such as `64/2nr`; `facts` are what `planned_for` reads of a row."""
    numbers = asked.rstrip("fnrs")
    how, (samples, _, passes) = asked.removeprefix(numbers), numbers.partition("/")
    ours = facts["recipe"] == "ours"
    job = Job(int(samples), int(passes or 1), ours, "n" not in how, "r" in how, shared=ours and "s" in how)
    if "f" not in how:
        return job
    row = {"samples": job.samples, "passes": job.passes, "recorded": job.record, "checkpointing": True}
    row |= {"shared": SHARED} if job.shared else {}
    return replace(job, free=planned_for(facts | row | {"kept_layers": True}).free_tokens)


def train_and_profile(trainer: ShardedTrainer, profile: str) -> None:
    """Train; with a file's name the profiler's table goes there."""
    if not profile:
        trainer.train()
        return
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        trainer.train()
    table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=80)
    Path(profile).write_text(table, encoding="utf-8")


def measure(model: torch.nn.Module, job: Job, steps: int, profile: str = "") -> dict[str, Any]:
    """Train on the rows of some steps, twice: the first time only warms up.

    Recorded jobs three times: in the second each size is recorded, and what is timed is replayed.

    Returns:
        Seconds a step (mean), tokens and samples a second over all GPUs, GiB at most on each GPU.
    """
    data, clock = rows(job.samples * steps, model.config), Clock()
    if not job.checkpointing:
        model.get_base_model().gradient_checkpointing_disable()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    how = {"args": job.arguments(steps * (3 if job.record else 2)), "data_collator": job.collator()}
    trainer = ShardedTrainer(model=model, train_dataset=data, callbacks=[clock], **how)
    kept: list[int] = []

    def kept_layers(tokens: int) -> int:
        kept.append(planner.kept_layers(model.config, job.free, tokens))
        return kept[-1]

    if job.free:
        trainer.kept_layers = kept_layers
    if job.record:
        trainer.record_steps()
    train_and_profile(trainer, profile)
    seconds = statistics.mean(clock.seconds[-steps:])
    tokens = sum(len(row["input_ids"]) for row in data) / steps
    found = peaks()
    return (
        {
            "samples": job.samples,
            "passes": job.passes,
            "checkpointing": job.checkpointing,
            "step_seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(job.samples / seconds, 2),
            "peak_gib": [round(reserved, 1) for reserved, _ in found],
            "allocated_gib": [round(used, 1) for _, used in found],
            "loss": [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry],
        }
        | ({"kept_layers": [min(kept), max(kept)]} if kept else {})
        | ({"shared": SHARED} if job.shared else {})
    )


@torch.no_grad()
def generation(model: torch.nn.Module, count: int = 64) -> dict[str, Any]:
    """Tokens a second for one question, greedy: with the adapter beside the weights, and without (as after merging).

    Each by transformers' `generate`, and by `finetune.decode`, which the command `chat` uses.

    Returns:
        Tokens a second by way and adapter, how many tokens both ways have in common at the beginning (with random
        weights two are often equally good, and rounding decides), and GiB of the GPU at most.
    """
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    base.config.use_cache = True
    base.generation_config.eos_token_id = []  # random weights end no answer
    model.eval()
    ids = torch.randint(0, base.config.vocab_size, (1, 40), device=model.device)
    decoder = Decoder(model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def generated(most: int) -> list[int]:
        how = {"max_new_tokens": most, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :].tolist()

    def decoded(most: int) -> list[int]:
        return list(decoder.tokens(ids[0].tolist(), most))

    found: dict[str, Any] = {}
    for adapter in ("adapter", "merged"):
        with nullcontext() if adapter == "adapter" else model.disable_adapter():
            said = {}
            for name, way in (("generate", generated), ("decode", decoded)):
                way(4)  # warms up; records the graph
                synchronise()
                began = time.perf_counter()
                said[name] = way(count)
                synchronise()
                found[f"{name}, {adapter}"] = round(count / (time.perf_counter() - began), 2)
            pairs = zip(said["generate"], said["decode"], strict=True)
            found[f"equal, {adapter}"] = next((i for i, (a, b) in enumerate(pairs) if a != b), count)
    base.config.use_cache = False
    return found | {"peak_gib": [round(reserved, 1) for reserved, _ in peaks()]}


def configuration(options: argparse.Namespace) -> Any:
    """GLM-4.5-Air with as many layers as asked for; `--tiny`: the bundled model's."""
    config = AutoConfig.from_pretrained(utils.BUNDLED) if options.tiny else deepcopy(AIR)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    return config


def worker(options: argparse.Namespace) -> None:
    """Load the model once and time one recipe at one or more numbers of samples; rank 0 appends to the file."""
    config = configuration(options)
    textbook, rank, gpu = options.worker == "textbook", launched().rank, torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with tempfile.TemporaryDirectory() as folder, MemoryWatch() as watch:
        total = write_holes(Path(folder), config, shards=max(1, config.num_hidden_layers * 47 // 46))
        began = time.perf_counter()
        attention = "sdpa" if textbook else "packed"
        model = load_model(Path(folder), options.bits == 4, attention, grouped=not textbook)
        seconds = time.perf_counter() - began
    loading = {
        "seconds": round(seconds, 1),
        "read_gib": round(total / 2**30, 1),
        "host_gib": round(watch.most, 1),
        "weights_gib": round(torch.cuda.memory_allocated() / 2**30, 1) if gpu else None,
    }
    randomise(model)
    groups = ALL_GROUPS if options.groups == "all" else ("attention",)
    model = lora.attach(model, lora.lora_config(options.rank, groups))
    rate = matrix_rate()
    devices = launched().processes if not textbook else max(1, torch.cuda.device_count())
    jobs = [(textbook, job) for job in options.samples.split(",")]
    if options.bits == 4 and not textbook:
        jobs.append((True, "16/4"))  # peft cannot adapt 4-bit experts: the textbook's batches, on our experts
    facts = {"bits": options.bits, "layers": config.num_hidden_layers, "groups": options.groups, "rank": options.rank}
    facts |= {"gpu": torch.cuda.get_device_name(0) if gpu else "CPU", "gpus": devices, "loading": loading}
    facts |= {"torch": torch.__version__, "matrix_tflops": round(rate / 1e12, 1)}

    def note(result: dict[str, Any]) -> None:
        if rank == 0:
            print(json.dumps(result), flush=True)
            with Path(options.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")

    for padded, asked in jobs if options.samples != "none" else ():
        recipe = "textbook" if textbook else "textbook batches" if padded else "ours"
        job = job_of(asked, facts | {"recipe": recipe})
        result: dict[str, Any] = {"recipe": recipe} | facts | ({"recorded": True} if job.record else {})
        model.get_base_model().set_attn_implementation("sdpa" if padded else "packed")
        try:
            result |= measure(model, job, options.steps, options.profile)
            if config.num_hidden_layers == AIR.num_hidden_layers:
                result["share_of_limit"] = round(result["tokens_per_second"] * FLOP_A_TOKEN / devices / rate, 3)
        except torch.OutOfMemoryError as error:
            if launched().processes > 1:
                raise  # the other processes wait for this one
            result |= {"samples": job.samples, "failed": str(error).splitlines()[0][:120]}
        note(result)
        model.zero_grad(set_to_none=True)
        gc.collect()  # what shared the gradients among the processes holds a copy of them
        torch.cuda.empty_cache()
    if options.generate and launched().processes == 1:
        note({"recipe": "generate"} | facts | generation(model))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def table(path: Path) -> str:
    """The rows of a result file as a Markdown table, with what the planner says beside what was measured."""
    head = ("GPUs", "layers", "recipe", "weights", "samples a step", "step, s", "tokens/s", "samples/s")
    head += ("share of the limit", "GiB at most", "planned s", "planned GiB")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "step_seconds" not in row:
            continue
        planned = planned_for(row) if row["gpu"] != "CPU" else None
        passes = f" in {row['passes']} passes" if row["passes"] > 1 else ""
        kept = "" if row["checkpointing"] else ", all activations kept"
        if "kept_layers" in row:
            kept = f", those of {row['kept_layers'][0]} to {row['kept_layers'][1]} layers kept"
        kept += ", recorded" if row.get("recorded") else ""
        kept += f", {row['shared']} tokens shared" if row.get("shared") else ""
        share = f"{row['share_of_limit']:.1%}" if "share_of_limit" in row else ""
        cells = (f"{row['gpus']} x {row['gpu']}", row["layers"], row["recipe"], "4-bit" if row["bits"] == 4 else "bf16")
        cells += (f"{row['samples']}{passes}{kept}", f"{row['step_seconds']:.2f}", f"{row['tokens_per_second']:,.0f}")
        cells += (f"{row['samples_per_second']:.1f}", share, f"{max(row['peak_gib']):.1f}")
        cells += (f"{planned.step_seconds:.2f}", f"{planned.peak:.1f}") if planned else ("", "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def planned_for(row: dict[str, Any], rows: planner.Rows = planner.ROLE_PLAY) -> planner.Plan:
    """The planner's answer for a measured row."""
    config = deepcopy(AIR)
    config.num_hidden_layers = row["layers"]
    card = next((name for name in CARDS if name in row["gpu"]), "")
    recipe = planner.Recipe(
        batch_size=row["samples"],
        gradient_accumulation_steps=row["passes"],
        lora_rank=row.get("rank", 8),
        groups=ALL_GROUPS if row.get("groups", "all") == "all" else ("attention",),
        load_in_4bit=row["bits"] == 4,
        gradient_checkpointing=row["checkpointing"],
        keep_what_fits="kept_layers" in row,
        baseline=row["recipe"] == "textbook",
        recorded=row.get("recorded", False),
    )
    gpus = row.get("gpus", 1)
    machine = Machine(gpus, CARDS[card].gib if card else 0.0, card, 128, 1000)
    if row.get("shared"):
        rows = replace(rows, shared=row["shared"])
    return planner.plan(config, recipe, rows, machine, 1 if recipe.baseline else gpus, advise=False)


def main() -> int:
    """Choose what this machine can hold, and start one process a GPU for each recipe."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--layers", type=int, default=0, help="fewer than the model's 46, to try it on a small GPU")
    parse.add_argument("--tiny", action="store_true", help="the bundled model's sizes, for a machine without a GPU")
    parse.add_argument("--bits", type=int, choices=(4, 16), help="default: 16 where it fits, else 4")
    parse.add_argument("--groups", choices=("all", "attention"), default="all")
    parse.add_argument("--rank", type=int, default=8)
    parse.add_argument(
        "--samples",
        help="samples a step, or samples/passes; n behind it: no checkpointing, f: keep what fits, r: recorded, "
        "s: the tokens of the system prompt once a pass; none",
    )
    parse.add_argument("--steps", type=int, default=4)
    parse.add_argument("--processes", type=int, default=torch.cuda.device_count() or 1, help="default: one a GPU")
    parse.add_argument("--profile", default="", help="write the profiler's table to this file")
    parse.add_argument("--generate", action="store_true", help="time answering too (one process)")
    parse.add_argument("--worker", choices=("ours", "textbook"), help=argparse.SUPPRESS)
    parse.add_argument("--out", default="output/benchmark.jsonl", help="rows are added to this file")
    parse.add_argument("--table", metavar="FILE", help="print such a file as a table and stop")
    options = parse.parse_args()
    if options.table:
        print(table(Path(options.table)))
        return 0
    if options.worker:
        worker(options)
        return 0
    machine = this_machine(Path.cwd())
    if not machine.gpus and not options.tiny:
        print(planner.plan(machine=machine).text())
        print("There is no GPU here. --tiny tries the script with the bundled model's sizes.")
        return 1
    config = configuration(options)
    recipe = planner.Recipe(batch_size=16 * options.processes)
    fits = planner.plan(config, recipe, machine=machine, processes=options.processes).fits
    options.bits = options.bits or (16 if fits else 4)
    count = options.processes
    options.samples = options.samples or f"16{'n' if options.bits == 16 else ''},{64 * count},{128 * count}"
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    shared = ["--bits", str(options.bits), "--layers", str(options.layers), "--groups", options.groups]
    shared += ["--rank", str(options.rank), "--steps", str(options.steps), "--out", options.out]
    shared += [flag for flag in ("--tiny", "--generate") if getattr(options, flag[2:])]
    shared += ["--profile", options.profile] if options.profile else []
    spread = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    runs = [[sys.executable, *spread, __file__, "--worker", "ours", "--samples", options.samples, *shared]]
    if options.bits == 16:
        runs.append([sys.executable, __file__, "--worker", "textbook", "--samples", "16/4", *shared])
    for command in runs:
        if status := subprocess.run(command, check=False).returncode:
            print(f"This run ended with status {status}; what was measured before it is in {options.out}.")
            return status
    print(table(Path(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
