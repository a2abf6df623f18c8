"""LoRA training without a browser: what notebook 05 does, on one processor, one GPU, several GPUs or several hosts.

    python train.py                                      one process; the bundled model on a CPU
    python train.py --bits 4                             GLM-4.5-Air on one 80 GB GPU
    torchrun --nproc-per-node 2 train.py                 two GPUs; each keeps half of the experts
    python train.py --plan                               what it would need, before anything is loaded
    python train.py --merge output/merged                the adapter into a checkpoint of the original's layout

Rows and prompt come from notebooks 03 and 04, model and folders from the same settings (`COURSE_MODEL`, ...). The
adapter goes where notebook 06 looks for it. `tests/test_train.py` trains the bundled model both ways and compares.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # packed rows differ in length
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import utils

if __name__ == "__main__":
    utils.prepare()  # before torch: it bounds how long waiting threads spin
from course import swanlab_record
from course.model_folder import model_folder

# isort: split
import torch
from datasets import load_from_disk
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import full_size
import planner
import runs
from course.language import say

for harmless in ("(rank|alpha)_pattern keys", "`is_gradient_checkpointing` is deprecated", "'pin_memory' argument"):
    warnings.filterwarnings("ignore", message=f".*{harmless}")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every default is what notebook 05 uses."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--plan", action="store_true", help="say what it needs and stop")
    parse.add_argument(
        "--merge", metavar="FOLDER", help="write the checkpoint with the trained adapter merged, and stop"
    )
    parse.add_argument("--bits", type=int, choices=(4, 16), default=16, help="4: weights in NF4, experts included")
    parse.add_argument("--rank", type=int, default=8)
    parse.add_argument("--attention-only", action="store_true", help="LoRA on attention alone, 3 %% of the parameters")
    parse.add_argument("--samples", type=int, default=16, help="samples of one step, over all GPUs and passes")
    parse.add_argument("--passes", type=int, default=1, help="passes that one step is split into, to save memory")
    parse.add_argument("--epochs", type=int, default=None, help="default: 3, or as many as make 60 steps")
    parse.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps, whatever the epochs")
    parse.add_argument("--learning-rate", type=float, default=None, help="default: 4e-3 small, 1e-4 large")
    parse.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None)
    parse.add_argument("--save-steps", type=int, default=50)
    parse.add_argument("--seed", type=int, default=42)
    return parse.parse_args(arguments)


def made_plan(chosen: argparse.Namespace, parts: dict[str, Any] | None = None) -> planner.Plan:
    """The planner's answer for this command line and machine.

    Args:
        chosen: the command line. parts: the data sets, of which `train` is trained on and the others are held out;
            without them it plans for the course's usual lengths.
    """
    course = utils.settings()
    on_disk = Path(course.model).is_dir() or course.model != "ZhipuAI/GLM-4.5-Air"
    config = AutoConfig.from_pretrained(model_folder(course)) if on_disk else planner.AIR
    sizes = None
    if parts:
        held_out = {name: part for name, part in parts.items() if name != "train"}
        sizes = planner.Sizes.of(parts["train"], held_out)
    count = len(sizes.tokens) if sizes else 3729
    small, started = config.hidden_size < 1024, planner.launched()
    plan = planner.plan(
        config,
        rank=chosen.rank,
        groups=("attention",) if chosen.attention_only else tuple(full_size.GROUPS),
        bits=chosen.bits,
        samples=chosen.samples,
        passes=chosen.passes,
        sizes=sizes,
        rows=count,
        epochs=chosen.epochs or max(3, -(-60 // -(-count // chosen.samples))),
        checkpointing=not small if chosen.checkpointing is None else chosen.checkpointing,
        machine=planner.this_machine(course.output),
        processes=started.processes,
        on_this_host=started.on_this_host,
    )
    return replace(plan, steps=chosen.max_steps) if chosen.max_steps > 0 else plan


def tokenised(course: utils.Settings) -> dict[str, Any]:
    """The data sets of notebook 04 by name.

    Raises:
        CourseError: they are missing, or made from other rows or for another model.
    """
    folder = utils.require(course.output / "tokens", "04_chat_template", course)
    return {path.name: load_from_disk(str(path)) for path in sorted(folder.iterdir()) if path.is_dir()}


class ShardedTrainer(Trainer):
    """`Trainer` for weights that transformers spread over the GPUs, with checkpoints that resume.

    transformers 5.23 refuses to save the optimiser of such a model, because it may be in shards. Here it is not: the
    adapter is whole on every GPU, and so are its moments. So they are saved and read as for one GPU.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = kwargs["args"]
        sharded = getattr(kwargs["model"], "is_distributed_loading_by_transformers", False)
        arguments.save_only_model = sharded
        super().__init__(*args, **kwargs)
        arguments.save_only_model = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Left to itself, peft gathers every weight of the base model, 199 GiB, and then throws it away.
        if self.args.should_save:
            super()._save(output_dir, state_dict=full_size.adapter_state(self.model))


class Progress(TrainerCallback):
    """One line for each entry of the log, from the first process."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Losses and learning rate alone."""
        if state.is_world_process_zero:
            kept = {key: f"{value:.4g}" for key, value in logs.items() if "loss" in key or key == "learning_rate"}
            if kept:
                print(f"step {state.global_step}/{state.max_steps}  {kept}", flush=True)


def swanlab_callback(course: utils.Settings, settings: dict[str, Any]) -> list[Any]:
    """SwanLab's callback, in the first process alone; a cloud that does not answer or refuses the key: locally."""
    if course.swanlab_mode == "disabled" or full_size.own_rank():
        return []
    mode = swanlab_record.recording_mode(course)
    from swanlab.integration.transformers import SwanLabCallback

    folder = str(swanlab_record.log_folder(course.output / "swanlab"))
    callback = SwanLabCallback(project="glm-4.5-air-lora", experiment_name="huanhuan", mode=mode, log_dir=folder)
    callback.update_config(settings)
    return [callback]


def train(chosen: argparse.Namespace) -> Trainer:
    """Plan, load, attach, train, save: sections 2 to 14 of notebook 05.

    Returns:
        The trainer, its log history in `state.log_history`.

    Raises:
        utils.CourseError: it does not fit, something of an earlier notebook is missing, or the samples of a step
            cannot be shared out evenly.
    """
    course, rank = utils.settings(), full_size.own_rank()
    folder, run_folder = model_folder(course), course.output / "lora"
    share = full_size.ranks() * chosen.passes
    if chosen.samples % share:
        message = (
            "--samples {samples} cannot be shared out over {processes} process(es) and {passes} pass(es). "
            "Use a multiple of {share}."
        )
        how = {"processes": full_size.ranks(), "passes": chosen.passes, "share": share}
        raise utils.CourseError(say(message, samples=chosen.samples, **how))
    parts = tokenised(course)
    plan = made_plan(chosen, parts)
    rows, prompt = parts.pop("train"), (course.output / "tokens" / "prompt.json").read_text(encoding="utf-8")
    if rank == 0:
        print(plan.text(), flush=True)
    plan.require_fit()
    groups, epochs, checkpointing = tuple(plan.trained), plan.epochs, plan.checkpointing

    set_seed(chosen.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # notebook 05, section 3: NaN gradients
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = full_size.load_model(folder, bits=chosen.bits)
    small = model.config.hidden_size < 1024
    set_seed(chosen.seed)
    lora = full_size.lora_config(chosen.rank, groups)
    model = full_size.attach(model, lora)
    if rank == 0:
        counts = {group: f"{n:,}" for group, n in full_size.attached(model).items() if n}
        print(say("trainable parameters: {counts}", counts=counts))

    arguments = TrainingArguments(
        output_dir=str(run_folder / "checkpoints"),
        per_device_train_batch_size=chosen.samples // share,
        gradient_accumulation_steps=chosen.passes,
        per_device_eval_batch_size=plan.held_out_rows,
        num_train_epochs=epochs,
        max_steps=chosen.max_steps,
        learning_rate=chosen.learning_rate or (4e-3 if small else 1e-4),
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if full_size.ranks() > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,  # every step reaches every factor, and no buffer changes
        ddp_broadcast_buffers=False,
        activation_checkpointing=checkpointing,
        logging_steps=10,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=50,
        eval_on_start=True,
        prediction_loss_only=True,
        save_steps=chosen.save_steps,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=chosen.seed,
        report_to="none",
    )
    # Each process has planned for its own free memory; the batches of an evaluation must be the same in all.
    arguments.per_device_eval_batch_size = min(runs.in_every_process(plan.held_out_rows))
    made_with = {"rows": len(rows), "rank": chosen.rank, "learning_rate": arguments.learning_rate, "epochs": epochs}
    made_with |= {"seed": chosen.seed, "groups": list(groups), "bits": chosen.bits, "samples": chosen.samples}
    # What else decides the schedule and which rows a step reads: a run goes on only with the same.
    made_with |= {"max_steps": chosen.max_steps, "passes": chosen.passes, "processes": full_size.ranks()}
    made_with |= {"warmup": arguments.warmup_steps, "scheduler": arguments.lr_scheduler_type.value}
    made_with |= {"alpha": lora.lora_alpha}
    if rank == 0:
        runs.claim(run_folder)
    checkpoint = runs.found_by_first(lambda: start_or_resume(run_folder, course, made_with))
    trainer = ShardedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=parts,
        data_collator=full_size.PackedRows(),
        processing_class=tokenizer,
        callbacks=[Progress(), *swanlab_callback(course, {"model": utils.shown(folder), "lora_r": chosen.rank})],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.time()
    with runs.stoppable(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.time() - started
    trainer.evaluate()
    if rank == 0:
        with runs.stoppable(trainer, together=False):
            model.save_pretrained(run_folder / "adapter", state_dict=full_size.adapter_state(model))
            utils.name_base(run_folder / "adapter", course)
            tokenizer.save_pretrained(run_folder / "adapter")
            (run_folder / "prompt.json").write_text(prompt, encoding="utf-8")
            utils.stamp(run_folder, course)
            runs.release(run_folder)
        message = "{seconds:.0f} s of training; adapter in {folder}"
        print(say(message, seconds=seconds, folder=utils.shown(run_folder / "adapter")))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while the first process still writes
    return trainer


def start_or_resume(run_folder: Path, course: utils.Settings, made_with: dict[str, Any]) -> str | None:
    """The checkpoint of an unfinished run with these very settings, or None after setting an older run aside."""
    checkpoints = run_folder / "checkpoints"
    try:
        utils.require(checkpoints, "05_lora_training", course, **made_with)
        unfinished = not (run_folder / "made_from.json").is_file()
    except utils.CourseError:
        unfinished = False
    checkpoint = runs.newest_checkpoint(checkpoints) if unfinished else None
    if not unfinished:
        utils.restart(run_folder)
    utils.stamp(checkpoints, course, **made_with)
    print("resuming from", utils.shown(checkpoint) if checkpoint else "nothing: a new run")  # notebook 08 reads it
    return checkpoint


def main() -> int:
    """Run the command line; a foreseeable mistake ends in one message and status 1."""
    chosen = options()
    try:
        if chosen.plan:
            course = utils.settings()
            there = (course.output / "tokens" / "made_from.json").is_file()
            parts = tokenised(course) if there else None
            if not there:
                print(say("No tokens of notebook 04 yet: planned for 3,729 rows of 61 tokens, a third of them labels."))
            print(made_plan(chosen, parts).text())
        elif chosen.merge:
            course = utils.settings()
            adapter = utils.require(course.output / "lora", "05_lora_training", course) / "adapter"
            count = full_size.merge(model_folder(course), adapter, Path(chosen.merge))
            message = "{count:,} tensors changed; the checkpoint is in {folder}"
            print(say(message, count=count, folder=utils.shown(chosen.merge)))
        else:
            train(chosen)
    except utils.CourseError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
