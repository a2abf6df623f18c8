"""Training from the command line: what notebook 05 does, on one processor, one GPU, several GPUs or several hosts.

Rows and prompt come from notebooks 03 and 04, model and folders from the same settings (`COURSE_MODEL`, ...). The
adapter goes where notebook 06 looks for it. `tests/test_train.py` trains the bundled model both ways and compares.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import utils
from course import swanlab_record
from course.language import say
from course.model_folder import model_folder
from finetune import lora, parallel, planner, resume
from finetune.config import AIR, is_small
from finetune.experts import keep_unpacked
from finetune.machine import this_machine
from finetune.model import load_model
from finetune.packing import PackedRows, SimilarLengths, pad_to, shared_prefix
from finetune.recorded import RecordedSteps, size_of

EXPERIMENT = {"project": "glm-4.5-air-lora", "experiment_name": "huanhuan"}
WARMUP = 0.05  # of the steps
SCHEDULER = "cosine"
NOT_OF_THE_SCHEDULE = (
    "gradient_checkpointing",
    "keep_what_fits",
    "recorded",
)  # a run may go on with other values of these


#: Up to so many samples a pass are recorded as a CUDA graph if that fits; with more there is less to gain.
RECORDED_BELOW = 32


@dataclass(frozen=True)
class Options:
    """What the command line leaves open until the model and the rows are known; None means: as notebook 05 has it."""

    recipe: planner.Recipe
    epochs: int | None = None
    gradient_checkpointing: bool | None = None
    recorded_steps: bool | None = None
    learning_rate: float | None = None
    save_steps: int = 50
    seed: int = 42


def completed(options: Options, config: Any, rows: int) -> planner.Recipe:
    """The recipe with what depends on model and rows: passes, at least 60 steps, checkpointing for a large model."""
    checkpointing = options.gradient_checkpointing
    passes = 2 if is_small(config) else 3
    return replace(
        options.recipe,
        epochs=options.epochs or max(passes, -(-60 // -(-rows // options.recipe.batch_size))),
        gradient_checkpointing=not is_small(config) if checkpointing is None else checkpointing,
        keep_what_fits=checkpointing is None and not is_small(config),
        recorded=bool(options.recorded_steps),
    )


def make_plan(options: Options, parts: dict[str, Any] | None = None) -> planner.Plan:
    """The plan for this machine.

    Args:
        parts: the data sets, of which `train` is trained on and the others are held out; without them it plans for the
            course's usual lengths.
    """
    course = utils.settings()
    on_disk = Path(course.model).is_dir() or course.model != "ZhipuAI/GLM-4.5-Air"
    config = AutoConfig.from_pretrained(model_folder(course)) if on_disk else AIR
    rows: planner.Rows = planner.ROLE_PLAY
    if parts:
        held_out = {name: part for name, part in parts.items() if name != "train"}
        rows = replace(planner.RealRows.of(parts["train"], held_out), shared=shared_prefix(parts["train"]))
    started, recipe, machine = parallel.launched(), completed(options, config, rows.count), this_machine(course.output)
    where = machine, started.processes, started.on_this_host
    made = planner.plan(config, recipe, rows, *where)
    few = recipe.batch_size <= RECORDED_BELOW * recipe.gradient_accumulation_steps
    if options.recorded_steps is None and few and made.fits and on_one_gpu(made) and not is_small(config):
        recorded = planner.plan(config, replace(recipe, recorded=True), rows, *where)
        made = recorded if recorded.fits else made
    return made


def tokenized(course: utils.Settings) -> dict[str, Any]:
    """The data sets of notebook 04 by name.

    Raises:
        CourseError: they are missing, or made from other rows or for another model.
    """
    folder = utils.require(course.output / "tokens", "04_chat_template", course)
    return {path.name: load_from_disk(str(path)) for path in sorted(folder.iterdir()) if path.is_dir()}


class ShardedTrainer(Trainer):
    """`Trainer` for weights that transformers spread over the GPUs, with checkpoints that resume.

    transformers 5.23 refuses to save the optimizer of such a model, because it may be in shards. Here it is not: the
    adapter is whole on every GPU, and so are its moments. So they are saved and read as for one GPU.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = kwargs["args"]
        self.sharded = getattr(kwargs["model"], "is_distributed_loading_by_transformers", False)
        arguments.save_only_model = self.sharded
        super().__init__(*args, **kwargs)
        arguments.save_only_model = False
        self.layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        #: With checkpointing: of how many layers a pass of so many tokens keeps the activations.
        self.kept_layers: Callable[[int], int] = lambda tokens: 0
        self.kept = 0 if arguments.activation_checkpointing else len(self.layers)
        keep_unpacked(self.model, bool(arguments.activation_checkpointing))
        self.recorded: RecordedSteps | None = None

    def record_steps(self) -> None:
        """Replay the kernels of a pass as a CUDA graph; for a model that is whole on one device."""
        self.recorded = RecordedSteps(self.model)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """`Trainer`'s, or the same from a graph."""
        if self.recorded is None or "cu_seq_lens_q" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        self.recorded.model = model  # with what `Trainer` has put around it: bf16
        return self.recorded(self._prepare_inputs(inputs), num_items_in_batch)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, None, None]:
        """`Trainer`'s; only the loss is asked for."""
        if self.recorded is None:
            return super().prediction_step(*args, **kwargs)
        with self.recorded.memory():
            loss = super().prediction_step(*args, **kwargs)[0]
        return (loss if loss is None else loss.clone()), None, None

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLengths:
        """Notebook 05's order of the rows: those of one step are of similar length."""
        arguments, lengths = self.args, [len(row["input_ids"]) for row in self.train_dataset]
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return SimilarLengths(lengths, step, arguments.seed)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on its device; where processes exchange tokens, as long as the longest of all processes."""
        batch = super()._prepare_inputs(inputs)
        if "cu_seq_lens_q" not in batch:
            return batch
        if self.sharded:
            ids = batch["input_ids"]
            batch = pad_to(batch, parallel.longest_of_all(ids.shape[1], ids.device))
        if self.model.training and self.args.activation_checkpointing:
            tokens = batch["input_ids"].shape[1]
            self.keep_last(self.kept_layers(tokens if self.recorded is None else size_of(tokens)))
        return batch

    def keep_last(self, kept: int) -> None:
        """Keep the activations of so many layers in the next pass; the others are computed again.

        The last layers keep theirs: the backward pass begins there, so the memory is free again before the first layer
        is computed again.
        """
        if kept == self.kept:
            return
        self.kept = kept
        for number, layer in enumerate(self.layers):
            again = number < len(self.layers) - kept
            layer.gradient_checkpointing = again
            keep_unpacked(layer, again)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Left to itself, peft gathers every weight of the base model, 199 GiB, and then throws it away.
        if self.args.should_save:
            super()._save(output_dir, state_dict=lora.adapter_state(self.model))


class Progress(TrainerCallback):
    """One line for each entry of the log, from the first process."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Losses and learning rate."""
        if state.is_world_process_zero:
            kept = {key: f"{value:.4g}" for key, value in logs.items() if "loss" in key or key == "learning_rate"}
            if kept:
                print(f"step {state.global_step}/{state.max_steps}  {kept}", flush=True)


def swanlab_callback(course: utils.Settings, settings: dict[str, Any]) -> list[Any]:
    """SwanLab's callback, in the first process only; without a cloud that answers and takes the key, locally."""
    if course.swanlab_mode == "disabled" or parallel.launched().rank:
        return []
    mode = swanlab_record.recording_mode(course)
    from swanlab.integration.transformers import SwanLabCallback

    folder = str(swanlab_record.log_folder(course.output / "swanlab"))
    callback = SwanLabCallback(**EXPERIMENT, mode=mode, log_dir=folder)
    callback.update_config(settings)
    return [callback]


def training_arguments(options: Options, plan: planner.Plan, output: Path, small: bool) -> TrainingArguments:
    """`Trainer`'s arguments for a plan; `small` models take a larger learning rate."""
    recipe, gpu = plan.recipe, torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=recipe.batch_size // (plan.processes * recipe.gradient_accumulation_steps),
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        per_device_eval_batch_size=plan.eval_batch_size,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        learning_rate=options.learning_rate or (4e-3 if small else 1e-4),
        lr_scheduler_type=SCHEDULER,
        warmup_steps=WARMUP,
        bf16=gpu,
        use_cpu=not gpu,
        ddp_backend="gloo" if plan.processes > 1 and not gpu else None,
        ddp_find_unused_parameters=False,  # every step reaches every factor, and no buffer changes
        ddp_broadcast_buffers=False,
        activation_checkpointing=recipe.gradient_checkpointing,
        # Nothing is drawn at random in a layer, and a recorded step could not save the generator's state.
        activation_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False},
        logging_steps=10,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=max(50, plan.steps // 9),  # a long run has more held-out rows too
        eval_on_start=True,
        prediction_loss_only=True,
        save_steps=options.save_steps,
        save_total_limit=2,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=options.seed,
        report_to="none",
    )


def made_with(plan: planner.Plan, arguments: TrainingArguments, rows: int, alpha: float) -> dict[str, Any]:
    """What decides the schedule and which rows a step reads: an unfinished run goes on only with the same."""
    recipe = {name: value for name, value in asdict(plan.recipe).items() if name not in NOT_OF_THE_SCHEDULE}
    recipe["groups"] = list(recipe["groups"])
    schedule = {"learning_rate": arguments.learning_rate, "warmup": arguments.warmup_steps, "seed": arguments.seed}
    schedule |= {"scheduler": arguments.lr_scheduler_type.value, "alpha": alpha}
    return recipe | schedule | {"rows": rows, "processes": plan.processes}


def require_even_shares(recipe: planner.Recipe, processes: int) -> None:
    """Raise a CourseError unless the samples of a step can be divided over processes and accumulation steps."""
    share = processes * recipe.gradient_accumulation_steps
    if recipe.batch_size % share:
        how = {"processes": processes, "passes": recipe.gradient_accumulation_steps, "share": share}
        raise utils.CourseError(
            say(
                "--batch-size {batch} cannot be divided over {processes} process(es) "
                "and {passes} accumulation step(s). "
                "Use a multiple of {share}.",
                batch=recipe.batch_size,
                **how,
            )
        )


def on_one_gpu(plan: planner.Plan) -> bool:
    """Whether one process has the whole model on one GPU."""
    whole = plan.machine.gpus == 1 or (plan.machine.gpus > 1 and plan.recipe.load_in_4bit)
    return whole and plan.processes == 1


def require_one_gpu(plan: planner.Plan) -> None:
    """Raise a CourseError if steps are to be recorded and the model will not be whole on one GPU."""
    if plan.recipe.recorded and not on_one_gpu(plan):
        raise utils.CourseError(
            say("--recorded-steps wants one process and the whole model on one GPU. Leave it out here.")
        )


def loaded(options: Options, plan: planner.Plan, folder: Path) -> Any:
    """The model of a folder, without progress bars."""
    set_seed(options.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # notebook 05, section 2: NaN gradients
    logging.disable_progress_bar()
    return load_model(folder, plan.recipe.load_in_4bit)


def made_trainer(
    model: Any, arguments: TrainingArguments, rows: Any, held_out: dict[str, Any], plan: planner.Plan
) -> ShardedTrainer:
    """The trainer of a plan, with SwanLab's record; it keeps the activations that fit in every process."""
    course = utils.settings()
    folder = model_folder(course)
    settings = {"model": utils.shown(folder), "lora_r": plan.recipe.lora_rank}
    trainer = ShardedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=PackedRows(shared_prefix(rows)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Progress(), *swanlab_callback(course, settings)],
    )
    free = min(resume.in_every_process(plan.free_tokens))
    trainer.kept_layers = partial(planner.kept_layers, model.config, free)
    trainer.remove_callback(PrinterCallback)
    if plan.recipe.recorded:
        trainer.record_steps()
    return trainer


def train(options: Options) -> Trainer:
    """Plan, load, attach, train, save: sections 2 to 14 of notebook 05.

    Returns:
        The trainer, its log history in `state.log_history`.

    Raises:
        utils.CourseError: it does not fit, something of an earlier notebook is missing, or the samples of a step
            cannot be divided evenly.
    """
    course, started = utils.settings(), parallel.launched()
    folder, run_folder = model_folder(course), course.output / "lora"
    require_even_shares(options.recipe, started.processes)
    parts = tokenized(course)
    plan = make_plan(options, parts)
    rows, prompt = parts.pop("train"), (course.output / "tokens" / "prompt.json").read_text(encoding="utf-8")
    if started.rank == 0:
        print(plan.text(), flush=True)
    require_one_gpu(plan)
    plan.require_fit()

    model = loaded(options, plan, folder)
    arguments = training_arguments(options, plan, run_folder / "checkpoints", is_small(model.config))
    set_seed(options.seed)
    adapter = lora.lora_config(plan.recipe.lora_rank, plan.recipe.groups)
    model = lora.attach(model, adapter)
    if started.rank == 0:
        counts = {group: f"{n:,}" for group, n in lora.trainable_by_group(model).items() if n}
        print(say("trainable parameters: {counts}", counts=counts))
        resume.claim(run_folder)
    # Each process has planned for its own free memory; the batches of an evaluation must be the same in all.
    arguments.per_device_eval_batch_size = min(resume.in_every_process(plan.eval_batch_size))
    facts = made_with(plan, arguments, len(rows), adapter.lora_alpha)
    checkpoint = resume.found_by_first(lambda: resume.start_or_resume(run_folder, course, facts))
    trainer = made_trainer(model, arguments, rows, parts, plan)
    begun = time.time()
    with resume.stoppable(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.time() - begun
    trainer.evaluate()
    if started.rank == 0:
        save(trainer, course, prompt)
        print(
            say(
                "{seconds:.0f} s of training; adapter in {folder}",
                seconds=seconds,
                folder=utils.shown(run_folder / "adapter"),
            )
        )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # no process leaves while the first one still writes
    return trainer


def save(trainer: Trainer, course: utils.Settings, prompt: str) -> None:
    """Save adapter, tokenizer and prompt where notebook 06 looks for them, and mark the run as finished."""
    run_folder = course.output / "lora"
    with resume.stoppable(trainer, together=False):
        trainer.model.save_pretrained(run_folder / "adapter", state_dict=lora.adapter_state(trainer.model))
        utils.name_base(run_folder / "adapter", course)
        trainer.processing_class.save_pretrained(run_folder / "adapter")
        (run_folder / "prompt.json").write_text(prompt, encoding="utf-8")
        utils.stamp(run_folder, course)
        resume.release(run_folder)
