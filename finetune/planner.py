"""What a run needs, computed before anything is loaded: memory, disk, hours, and what would fit instead.

A `Recipe` says what is trained and how; a `Plan` says what that needs on a machine. Memory is counted: every term is a
number of tensors of known shape. Time is counted work over rates: `LAUNCH`, `MATRIX_SHARE` and `COPY_SHARE` were fitted
to the runs in `benchmarks/measured.jsonl` (random weights, one and two GPUs). So it holds for those cards and is a
guess for others, and for more than two GPUs; the text of a plan says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from course.language import marked, say, translated
from finetune.config import AIR, ALL_GROUPS, active_parameters, lora_parameters, parameters
from finetune.lengths import ROLE_PLAY, AverageRows, RealRows, Rows
from finetune.machine import CARDS, GIB, Machine, this_machine
from finetune.parallel import expert_parallel_size
from finetune.quantize import NF4_BYTES
from utils import CourseError

__all__ = ["ROLE_PLAY", "AverageRows", "Plan", "RealRows", "Recipe", "Rows", "plan"]

FULL = 0.97  # of a device's memory that a plan may take
CAUTION = 1.2  # by so much more than counted the activations of a pass may be, where only some layers keep them
FEWEST = 0.25  # of the layers; where fewer fitted, 2 % were gained or 4 % lost
EVAL_BATCH_SIZES = (40, 20, 10, 5, 2, 1)  # rows that an evaluation may read at once; the first that fits is taken


@dataclass(frozen=True)
class Recipe:
    """What is trained and how.

    Attributes:
        batch_size: samples of one optimizer step, over all processes and all accumulation steps.
        gradient_accumulation_steps: forward and backward passes that one optimizer step is split into.
        gradient_checkpointing: keep each layer's input only, and compute the layer again in the backward pass.
        keep_what_fits: do so only for passes of more than `Plan.free_tokens` tokens, and in them only for the layers
            whose activations do not fit (`kept_layers`).
        baseline: as libraries do it unchanged: padded batches, all logits, peft's full-size update of the experts.
        recorded: replay the kernels of a pass as a CUDA graph (`finetune/recorded.py`).
    """

    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    lora_rank: int = 8
    groups: tuple[str, ...] = ALL_GROUPS
    load_in_4bit: bool = False
    gradient_checkpointing: bool = True
    keep_what_fits: bool = False
    epochs: int = 3
    max_steps: int = -1
    baseline: bool = False
    recorded: bool = False

    def steps(self, rows: int) -> int:
        """Optimizer steps over so many rows; the last step of an epoch is filled up."""
        return self.max_steps if self.max_steps > 0 else self.epochs * -(-rows // self.batch_size)


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a machine. Sizes in GiB; `gpu` holds the terms of the fullest device.

    `on_this_host` of the `processes` run on this machine. `eval_batch_size` is how many rows a pass of the evaluation
    reads at once on one device. A pass of at most `free_tokens` tokens keeps all activations although the recipe has
    checkpointing: they fit.
    """

    recipe: Recipe
    machine: Machine
    processes: int
    on_this_host: int
    trained: dict[str, int]
    gpu: dict[str, float]
    checkpoint_gib: float
    step_seconds: float
    steps: int
    eval_batch_size: int
    free_tokens: int = 0
    advice: str = ""

    @property
    def peak(self) -> float:
        """GiB on the fullest device."""
        return sum(self.gpu.values())

    @property
    def room(self) -> float:
        """GiB that one process can take: its GPU, or its part of the host's memory."""
        return self.machine.gib_each if self.machine.gpus else self.machine.host_gib / self.on_this_host

    @property
    def disk_too_small(self) -> bool:
        """Whether three checkpoints do not fit: two that are kept, and one that is being written."""
        return 3 * self.checkpoint_gib > self.machine.disk_gib

    @property
    def fits(self) -> bool:
        """Whether memory, GPUs and disk are enough."""
        enough = not self.machine.gpus or self.on_this_host <= self.machine.gpus
        return enough and self.peak <= FULL * self.room and not self.disk_too_small

    def text(self) -> str:
        """The plan in six lines."""
        where = say("each GPU") if self.machine.gpus else say("this machine")
        if not self.machine.gpus and self.on_this_host > 1:
            where = say("each process")
        terms = " + ".join(f"{translated(name)} {value:.1f}" for name, value in self.gpu.items() if value >= 0.05)
        first = say(
            "Plan for {machine}: {kind} weights, {processes} process(es), batch size {batch}, "
            "gradient accumulation {passes}, {how} gradient checkpointing",
            machine=self.machine.words(),
            kind=say("4-bit") if self.recipe.load_in_4bit else "bf16" if self.machine.gpus else "float32",
            processes=self.processes,
            batch=self.recipe.batch_size,
            passes=self.recipe.gradient_accumulation_steps,
            how=say("with") if self.recipe.gradient_checkpointing else say("without"),
        )
        if self.free_tokens:
            first += say(" above {tokens:,} tokens", tokens=self.free_tokens)
        return "\n".join(
            [
                first,
                say("  {count:,} trainable parameters", count=sum(self.trained.values())),
                say(
                    "  memory of {where}: {terms} = {peak:.1f} of {room:.1f} GiB",
                    where=where,
                    terms=terms,
                    peak=self.peak,
                    room=self.room,
                ),
                say(
                    "  disk: {gib:.2f} GiB a checkpoint, two kept and one being written; {free:.0f} GiB free",
                    gib=self.checkpoint_gib,
                    free=self.machine.disk_gib,
                ),
                say(
                    "  time: {steps} steps of about {seconds:.2f} s: {lasts}",
                    steps=self.steps,
                    seconds=self.step_seconds,
                    lasts=self._duration(),
                ),
                say("  fits") if self.fits else say("  does not fit. {advice}", advice=self.advice),
            ]
        )

    def _duration(self) -> str:
        """How long the run lasts, and whether that is a guess."""
        minutes = self.steps * self.step_seconds / 60
        lasts = say("{time:.1f} minutes", time=minutes)
        if minutes >= 90:
            lasts = say("{time:.1f} hours", time=minutes / 60)
        if self.machine.card not in CARDS:
            lasts += say(" (a guess: no such card was measured)")
        elif self.processes > 2:
            lasts += say(" (a guess: more than two GPUs were not measured)")
        return lasts

    def require_fit(self) -> None:
        """Raise a CourseError with figures and the nearest arrangement that fits, unless this one does."""
        if self.fits:
            return
        if self.machine.gpus and self.on_this_host > self.machine.gpus:
            raise CourseError(
                say(
                    "{processes} processes were started for {gpus} GPUs. Start one a GPU.",
                    processes=self.on_this_host,
                    gpus=self.machine.gpus,
                )
            )
        if self.disk_too_small:
            raise CourseError(
                say(
                    "Three checkpoints take {needed:.2f} GiB, {free:.2f} GiB are free. "
                    "Free some, or set COURSE_OUTPUT to another disk.",
                    needed=3 * self.checkpoint_gib,
                    free=self.machine.disk_gib,
                )
            )
        raise CourseError(
            say(
                "This needs {peak:.1f} GiB on each device, {room:.1f} GiB are free. {advice} Nothing was loaded.",
                peak=self.peak,
                room=self.room,
                advice=self.advice,
            )
        )


# ---------------------------------------------------------------------------------------------- memory and time

#: Seconds of a processor to launch the kernels of one layer, forward and backward, by (4-bit, checkpointing). Measured.
LAUNCH = {(False, True): 0.0215, (False, False): 0.0115, (True, True): 0.0310, (True, False): 0.0176}
LAUNCH_PARALLEL = {True: 0.0367, False: 0.0270}  # several GPUs that share the experts out, by checkpointing
LAUNCH_BASELINE = 0.0430  # with peft's full-size update of the experts
#: Of the measured rates of a card that a step reaches, in bf16 and in 4 bits; fitted.
MATRIX_SHARE, COPY_SHARE = {False: 0.35, True: 0.66}, {False: 0.53, True: 0.39}


@dataclass(frozen=True)
class Load:
    """What one device works on: tokens of one pass, and for how many of them logits are computed; held out the same."""

    tokens: float
    labels: float
    held_out_tokens: float = 0.0
    held_out_labels: float = 0.0


def memory(config: Any, recipe: Recipe, load: Load, gpus: int, processes: int) -> dict[str, float]:
    """GiB on one device, term by term; without a GPU everything is float32."""
    count, size, four = parameters(config), 2 if gpus else 4, recipe.load_in_4bit
    trained = float(sum(lora_parameters(config, recipe.lora_rank, recipe.groups).values()))
    hidden, layers, tokens = config.hidden_size, config.num_hidden_layers, load.tokens
    layer = size * config.n_routed_experts * 3 * hidden * config.moe_intermediate_size  # a layer's routed experts
    weights = size * sum(count.values())
    if four:
        weights = NF4_BYTES * (count["routed"] + count["linear"]) + size * count["rest"]
    gathered = exchanged = 0.0
    if processes > 1 and not four:
        apart = expert_parallel_size(config, processes)
        head, others = size * config.vocab_size * hidden, size * count["linear"] / layers
        # Two layers at a time; what comes from other GPUs is held twice, as it arrives and as it is used.
        gathered = head + 4 * others + (2 if apart == processes else 4) * layer / apart
        weights, exchanged = weights / processes, 4 * size * tokens * apart * hidden * (apart > 1)
    a_token = size * layer_numbers(config)
    kept = size * tokens * layers * hidden
    if not recipe.gradient_checkpointing:
        kept = size * tokens * layers * kept_numbers(config, recipe.baseline)
    whole_layer = layer if four or (recipe.baseline and "routed experts" in recipe.groups) else 0.0
    a_label = config.vocab_size * (size + 8)
    evaluation = max(a_token * load.held_out_tokens + whole_layer, a_label * load.held_out_labels)
    if recipe.baseline and gpus > 1:  # `device_map`: each GPU holds its run of layers
        weights, trained, kept = weights / gpus, trained / gpus, kept / gpus
    gradients = 4 * trained
    reduced = gradients if processes > 1 and four else 0  # the buffer in which the processes' gradients are summed
    # Checkpoints are used up while gradients come into being, so the larger of the two counts.
    working = max(a_token * tokens + exchanged + whole_layer, a_label * load.labels)
    graphs = min(kept, gradients) if recipe.recorded else 0.0  # the gradients that they write to are always there
    return {
        marked("weights"): weights / GIB,
        marked("gathered layers"): gathered / GIB,
        marked("adapter and optimizer"): (12 * trained + gradients + reduced) / GIB,
        marked("activations"): max(max(kept - gradients, 0) + working, evaluation) / GIB,
        marked("recorded steps"): graphs / GIB,
        marked("rest"): 1.5 if gpus else 0.8,
    }


def kept_numbers(config: Any, baseline: bool = False) -> float:
    """How many numbers a layer keeps of a token for its backward pass, when it is not computed again.

    Of the experts ours keep the first product only (`products.ExpertProducts`).
    """
    hidden, inner, k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    experts = k * (3 * hidden + 4 * inner) if baseline else k * 2 * inner
    return experts + 3 * config.num_attention_heads * config.head_dim + 5 * hidden


def free_tokens(config: Any, recipe: Recipe, room: float, needed: dict[str, float]) -> int:
    """Of how many tokens a pass may be for its activations to fit without checkpointing, beside all else.

    Args:
        room: GiB that one device has. needed: `memory` of the recipe with checkpointing.
    """
    if recipe.baseline or not (recipe.gradient_checkpointing and recipe.keep_what_fits):
        return 0
    size = 2
    a_token = size * config.num_hidden_layers * kept_numbers(config)
    # What the heaviest pass, with checkpointing, takes beside the weights is there for these activations.
    spare = (FULL * room - sum(needed.values()) + needed["activations"]) * GIB
    layer = size * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    working = layer_numbers(config) * size
    fit = int((spare - (layer if recipe.load_in_4bit else 0)) / (a_token + working))
    return fit if fit >= 128 else 0  # fewer tokens than that has hardly a batch


def kept_layers(config: Any, free: int, tokens: float) -> int:
    """Of how many layers a pass of `tokens` tokens keeps the activations; the others keep their input only.

    Args:
        free: tokens for which all layers fit, from `free_tokens`; 0: no layer keeps them.
    """
    layers, size = config.num_hidden_layers, 2
    if tokens <= free:
        return layers
    a_layer, an_input, working = kept_numbers(config), config.hidden_size, layer_numbers(config)
    spare = size * free * (layers * a_layer + working)
    taken = CAUTION * size * tokens * (layers * an_input + working)
    fit = int((spare - taken) / (CAUTION * size * tokens * (a_layer - an_input)))
    return fit if fit >= FEWEST * layers else 0


def layer_numbers(config: Any) -> float:
    """How many numbers of a token a layer holds while it is differentiated: routed rows, heads, hidden states."""
    hidden, inner, k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    return k * (5 * hidden + 6 * inner) + 5 * config.num_attention_heads * config.head_dim + 8 * hidden


def step_seconds(config: Any, recipe: Recipe, tokens: float, machine: Machine, processes: int, free: int = 0) -> float:
    """Seconds of one optimizer step; `tokens` is what one pass reads on one device, `free` as `Plan.free_tokens`."""
    again = 0.0  # the share of the layers that are computed again
    if recipe.gradient_checkpointing:
        again = 1 - kept_layers(config, free, tokens) / config.num_hidden_layers
    active, count, card = active_parameters(config), parameters(config), machine.rates()
    reads, four = 2 + again, recipe.load_in_4bit
    compute = 2 * reads * active * tokens / (card.tflops * 1e12 * MATRIX_SHARE[four])
    shared = processes > 1 and not four
    apart = expert_parallel_size(config, processes) if shared else 1
    moved = 2.0 * reads * (count["routed"] / apart + count["linear"])
    if four:
        moved += (reads - 1) * (2 + NF4_BYTES) * (count["routed"] + count["linear"])
    gather = 0.0
    if shared:
        replicas = processes // apart  # so many processes hold the same experts, and gather them
        gathered = count["linear"] + count["rest"] + (count["routed"] / apart if replicas > 1 else 0)
        gather = 2 * 2 * gathered * (processes - 1) / processes / (card.link * 1e12)
        moved += 2 * 2 * 2 * count["routed"] / apart  # FSDP2 copies a layer before each use, forward and backward
    work = compute + moved / (card.copies * 1e12 * COPY_SHARE[four])
    if apart > 1:  # all-gather and reduce-scatter of tokens: forward, again if checkpointed, and backward
        rows = 2 * reads * tokens * (apart - 1) * (config.num_hidden_layers - config.first_k_dense_replace)
        work += 2 * rows * config.hidden_size / (card.link * 1e12)
    a_layer = again * LAUNCH[four, True] + (1 - again) * LAUNCH[four, False]
    if shared:
        a_layer = again * LAUNCH_PARALLEL[True] + (1 - again) * LAUNCH_PARALLEL[False]
    if recipe.baseline:
        a_layer = LAUNCH_BASELINE
    launch = a_layer * config.num_hidden_layers * bool(machine.gpus)  # a processor launches nothing
    if recipe.recorded:
        launch = 0.0  # one call replays them all
    return recipe.gradient_accumulation_steps * max(work, launch, gather)


def plan(
    config: Any = AIR,
    recipe: Recipe | None = None,
    rows: Rows = ROLE_PLAY,
    machine: Machine | None = None,
    processes: int = 1,
    on_this_host: int | None = None,
    advise: bool = True,
) -> Plan:
    """The plan of a recipe.

    Args:
        rows: time is planned for the mean batch, memory for the heaviest one and for the evaluation.
        machine: this one if not given.
        processes: how many `torchrun` starts; in bf16 each keeps a share of all weights, in 4 bits all of them.
        on_this_host: how many of the processes run on this machine; all of them if not given.
        advise: look for the nearest arrangement that fits when this one does not.
    """
    recipe, machine = recipe or Recipe(), machine or this_machine(Path.cwd())
    trained = lora_parameters(config, recipe.lora_rank, recipe.groups)
    a_pass = recipe.batch_size / recipe.gradient_accumulation_steps / processes  # rows of one pass on one device
    tokens, labels = rows.heaviest(a_pass)
    if recipe.baseline:  # padded to the longest of the batch, with logits for every position
        tokens = labels = max(1, round(a_pass)) * rows.longest[0] if rows.longest[1] else tokens

    def needed(eval_batch_size: int) -> dict[str, float]:
        held_out = rows.held_out(eval_batch_size)
        if recipe.baseline and rows.longest[1]:
            held_out = (eval_batch_size * rows.longest[1],) * 2
        return memory(config, recipe, Load(tokens, labels, *held_out), machine.gpus, processes)

    here = on_this_host or processes
    room = machine.gib_each if machine.gpus else machine.host_gib / here
    fitting = (size for size in EVAL_BATCH_SIZES if sum(needed(size).values()) <= FULL * room)
    eval_batch_size = next(fitting, EVAL_BATCH_SIZES[-1])
    gpu = needed(eval_batch_size)
    free = free_tokens(config, recipe, room, gpu) if machine.gpus else 0
    passes = [step_seconds(config, recipe, read, machine, processes, free) for read in rows.passes(a_pass)]
    made = Plan(
        recipe=recipe,
        machine=machine,
        processes=processes,
        on_this_host=here,
        trained=trained,
        gpu=gpu,
        checkpoint_gib=12 * sum(trained.values()) / GIB,
        step_seconds=sum(passes) / len(passes),
        steps=recipe.steps(rows.count),
        eval_batch_size=eval_batch_size,
        free_tokens=free,
    )
    if made.fits or not advise:
        return made
    return replace(made, advice=nearest(made, config, rows))


def nearest(made: Plan, config: Any, rows: Rows) -> str:
    """What would fit: on this machine if anything does, else how many GPUs of 80 GB."""
    machine, recipe = made.machine, made.recipe
    if made.peak <= FULL * made.room and made.disk_too_small:
        return say(
            "The disk is too small: free {gib:.2f} GiB more, or use another.",
            gib=3 * made.checkpoint_gib - machine.disk_gib,
        )
    if machine.gpus:
        as_started = (recipe.load_in_4bit, made.processes, made.on_this_host)
        for four, processes, here in (as_started, (False, machine.gpus, machine.gpus), (True, 1, 1)):
            for passes in (1, 2, 4, 8, 16):
                if recipe.batch_size % (passes * processes):
                    continue
                other = replace(recipe, load_in_4bit=four, gradient_accumulation_steps=passes)
                found = plan(config, other, rows, machine, processes, here, advise=False)
                if found.fits:
                    return say(
                        "This would fit in {gib:.0f} GiB: {command}.",
                        gib=found.peak,
                        command=command(other, processes, here),
                    )
    disk = max(machine.disk_gib, 3 * made.checkpoint_gib)
    for four, gpus in ((True, 1), (False, 4), (False, 8), (False, 16)):
        rented = Machine(gpus, CARDS["H100"].gib, "H100", machine.host_gib, disk)
        other = replace(recipe, load_in_4bit=four, batch_size=-(-recipe.batch_size // gpus) * gpus)
        found = plan(config, other, rows, rented, 1 if four else gpus, advise=False)
        if found.fits:
            weights = say("4-bit") if four else "bf16"
            return say(
                "{gpus} GPU(s) of 80 GB with {weights} weights would do ({gib:.0f} GiB each).",
                gpus=gpus,
                weights=weights,
                gib=found.peak,
            )
    return say("Nothing up to 16 GPUs of 80 GB would do: lower the rank.")


def command(recipe: Recipe, processes: int = 1, on_this_host: int = 1) -> str:
    """The command line that trains a recipe."""
    start = f"torchrun --nproc-per-node {on_this_host} -m" if processes > 1 else "python -m"
    if processes > on_this_host:
        start = f"torchrun --nnodes {processes // on_this_host} --nproc-per-node {on_this_host} -m"
    flags = (
        " --load-in-4bit" * recipe.load_in_4bit
        + " --recorded-steps" * recipe.recorded
        + f" --batch-size {recipe.batch_size}"
    )
    if recipe.gradient_accumulation_steps > 1:
        flags += f" --gradient-accumulation-steps {recipe.gradient_accumulation_steps}"
    flags += " --attention-only" if recipe.groups == ("attention",) else ""
    flags += f" --lora-rank {recipe.lora_rank}" if recipe.lora_rank != 8 else ""
    return f"{start} finetune train{flags}"
