"""Time LoRA training of GLM-4.5-Air at its full size on the GPUs of this machine: the textbook recipe and ours.

    python benchmarks/benchmark.py

One command: it looks which GPUs are there, writes a checkpoint of holes (no download, no disk), loads it the way
`train.py` does, fills it with random weights, and trains a few steps on rows of the lengths of a role-play data set.
Speed and memory do not depend on the values of the weights; answers would, and none is looked at.

Prints tokens/s, samples/s, peak memory and the share of what the matrix units could do, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import full_size
from checkpoint import AIR, write

LENGTHS = json.loads((Path(__file__).parent / "lengths.json").read_text(encoding="utf-8"))
FLOP_A_TOKEN = 48e9  # forward and backward through 12 B active parameters, none of their gradients: 4 x 12 B


def rows(count: int, config: Any, seed: int = 0) -> list[dict[str, list[int]]]:
    """Samples of random tokens, as long as role-play samples are; the prompt is masked."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        prompt, answer = draw.choice(LENGTHS)
        ids = [draw.randrange(config.vocab_size) for _ in range(prompt + answer)]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:]})
    return made


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Fill the weights as a fresh model's: normal with deviation 0.02, norms 1, biases 0."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        for tensor, parameter in list(module.named_parameters(recurse=False)):
            state = module.__dict__.get("packed", {}).get(tensor) or getattr(parameter, "quant_state", None)
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if state is not None:
                from bitsandbytes.functional import quantize_4bit

                full = torch.empty(state.shape, dtype=state.dtype, device=parameter.device).normal_(0, 0.02)
                packed, new = quantize_4bit(full, quant_type="nf4", compress_statistics=True)
                parameter.data.copy_(packed)
                if tensor in module.__dict__.get("packed", {}):
                    module.packed[tensor] = new
                else:
                    parameter.quant_state = module.quant_state = new
            elif "norm" in name:
                local.fill_(1)
            elif tensor == "bias" or "correction" in tensor:
                local.zero_()
            else:
                local.normal_(0, 0.02)


class Clock(TrainerCallback):
    """Seconds of each step, everything on the device finished."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start when all earlier work is done."""
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop when this step's work is done."""
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def matrix_rate() -> float:
    """FLOP/s of one GPU on a product of two 8192 x 8192 bf16 matrices of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - began)


def measure(
    model: torch.nn.Module, samples: int, passes: int, steps: int, packed: bool, checkpointing: bool, profile: str = ""
) -> dict[str, Any]:
    """Train some steps of `samples` samples in `passes` passes; the first two steps only warm up.

    Returns:
        Seconds a step (median), tokens and samples a second over all GPUs, GiB at most on each GPU.
    """
    world = full_size.ranks()
    data = rows(samples * (steps + 2), model.config)
    tokenizer = None
    if not packed:
        from tokenizers import Tokenizer, models

        one = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=one, pad_token="<pad>")
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=samples // passes // world,
        gradient_accumulation_steps=passes,
        max_steps=steps + 2,
        learning_rate=1e-4,
        activation_checkpointing=checkpointing,
        bf16=torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
    )
    if not checkpointing:
        model.get_base_model().gradient_checkpointing_disable()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    collator = full_size.PackedRows() if packed else DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[clock])
    if profile:
        from torch.profiler import ProfilerActivity

        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            trainer.train()
        table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=80)
        Path(profile).write_text(table, encoding="utf-8")
    else:
        trainer.train()
    seconds = statistics.median(clock.seconds[2:])
    tokens = sum(len(row["input_ids"]) for row in data) / (steps + 2)
    peak = [torch.cuda.max_memory_reserved(i) / 2**30 for i in range(torch.cuda.device_count())]
    used = [torch.cuda.max_memory_allocated(i) / 2**30 for i in range(torch.cuda.device_count())]
    return {
        "samples": samples,
        "passes": passes,
        "checkpointing": checkpointing,
        "step_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "samples_per_second": round(samples / seconds, 2),
        "peak_gib": [round(x, 1) for x in peak],
        "allocated_gib": [round(x, 1) for x in used],
        "loss": [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry],
    }


@torch.no_grad()
def generation(model: torch.nn.Module, count: int = 32) -> dict[str, float]:
    """Tokens a second for one question, greedy: with the adapter beside the weights, and without (as after merging)."""
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    base.config.use_cache = True
    ids = torch.randint(0, base.config.vocab_size, (1, 40), device="cuda")
    how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    speed = {}

    def timed() -> float:
        model.generate(input_ids=ids, **(how | {"max_new_tokens": 4, "min_new_tokens": 4}))
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(input_ids=ids, **how)
        torch.cuda.synchronize()
        return round(count / (time.perf_counter() - began), 2)

    model.eval()
    speed["adapter"] = timed()
    with model.disable_adapter():
        speed["merged"] = timed()
    base.config.use_cache = False
    return speed


def host_memory_gib() -> float:
    """GiB of this process's own memory: mapped files, which the kernel can drop at any time, do not count."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) / 2**20


class Watch:
    """The most of `host_memory_gib` while a block runs."""

    def __enter__(self) -> Watch:
        import threading

        self.most, self.done = 0.0, threading.Event()

        def look() -> None:
            while not self.done.wait(0.2):
                self.most = max(self.most, host_memory_gib())

        self.thread = threading.Thread(target=look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.done.set()
        self.thread.join()


def worker(options: argparse.Namespace) -> None:
    """Load the model once and time one recipe at one or more numbers of samples; rank 0 appends to the file."""
    config = deepcopy(AIR)
    config.num_hidden_layers = options.layers
    textbook = options.worker == "textbook"
    rank = int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    folder = Path(tempfile.mkdtemp())
    total = write(folder, config, shards=max(1, options.layers * 47 // 46))
    began = time.perf_counter()
    with Watch() as watch:
        model = full_size.load_model(
            folder,
            bits=options.bits,
            attention="sdpa" if textbook else "packed",
            experts="grouped_mm" if textbook and options.bits == 16 else "grouped_lora",
        )
    loading = {
        "seconds": round(time.perf_counter() - began, 1),
        "read_gib": round(total / 2**30, 1),
        "host_gib": round(watch.most, 1),
        "weights_gib": round(torch.cuda.memory_allocated() / 2**30, 1),
    }
    randomise(model)
    groups = tuple(full_size.GROUPS) if options.groups == "all" else ("attention",)
    grouped = options.bits == 4 or not textbook
    model = full_size.attach(model, full_size.lora_config(options.rank, groups), grouped=grouped)
    if rank == 0:
        print(json.dumps({"loading": loading, "adapter": full_size.attached(model)}), flush=True)
    rate = matrix_rate()
    limit = full_size.ranks() * rate / FLOP_A_TOKEN if not textbook else torch.cuda.device_count() * rate / FLOP_A_TOKEN
    jobs = [(textbook, job) for job in options.samples.split(",")]
    if options.bits == 4 and not textbook:
        jobs.append((True, "16/4"))  # peft cannot adapt 4-bit experts: the textbook's batches, on our experts
    for padded, job in jobs:
        checkpointing = not job.endswith("n")
        samples, _, passes = job.removesuffix("n").partition("/")
        recipe = "textbook" if textbook else "textbook batches" if padded else "ours"
        result = {"recipe": recipe, "bits": options.bits, "layers": options.layers, "groups": options.groups}
        model.get_base_model().set_attn_implementation("sdpa" if padded else "packed")
        try:
            result |= measure(
                model, int(samples), int(passes or 1), options.steps, not padded, checkpointing, options.profile
            )
            if options.layers == AIR.num_hidden_layers:
                result["share_of_limit"] = round(result["tokens_per_second"] / limit, 3)
        except torch.OutOfMemoryError as error:
            result |= {"samples": int(samples), "failed": str(error).splitlines()[0][:120]}
        result |= {"gpu": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count(), "loading": loading}
        result |= {"torch": torch.__version__, "matrix_tflops": round(rate / 1e12)}
        if rank == 0:
            print(json.dumps(result), flush=True)
            with Path(options.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    if options.generate and rank == 0:
        result = {"recipe": "generate", "bits": options.bits, "layers": options.layers} | generation(model)
        print(json.dumps(result), flush=True)
        with Path(options.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def main() -> None:
    """Choose what this machine can hold, and start one process a GPU for each recipe."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--layers", type=int, default=AIR.num_hidden_layers, help="fewer, to try it on a small GPU")
    parse.add_argument("--bits", type=int, choices=(4, 16), default=16)
    parse.add_argument("--groups", choices=("all", "attention"), default="all")
    parse.add_argument("--rank", type=int, default=8)
    parse.add_argument("--samples", default="16,64,128", help="samples a step, or samples/passes; n: no checkpointing")
    parse.add_argument("--steps", type=int, default=4)
    parse.add_argument("--profile", default="", help="write the profiler's table to this file")
    parse.add_argument("--generate", action="store_true", help="time answering too")
    parse.add_argument("--worker", choices=("ours", "textbook"), help=argparse.SUPPRESS)
    parse.add_argument("--out", default="output/benchmark.jsonl")
    options = parse.parse_args()
    if options.worker:
        worker(options)


if __name__ == "__main__":
    main()
