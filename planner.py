"""What a LoRA run of a GLM-4.5 model needs, computed before anything is loaded: memory, disk, hours, and what fits.

Memory is counted: every term is a number of tensors of known shape. Time is counted work over rates: `LAUNCH`,
`MATRIX_SHARE` and `COPY_SHARE` were fitted to the runs in `benchmarks/measured.jsonl` (random weights, one and two
GPUs). So it holds for those cards and is a guess for others, and for more than two GPUs; the text of a plan says so.
`tests/test_planner.py` compares it with every measured row of ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Glm4MoeConfig

from course.language import say
from utils import CourseError

GIB = 2**30
GROUPS = ("attention", "dense", "shared experts", "routed experts")

AIR = Glm4MoeConfig(
    vocab_size=151552, hidden_size=4096, num_hidden_layers=46, max_position_embeddings=131072,
    num_attention_heads=96, num_key_value_heads=8, head_dim=128, attention_bias=True, use_qk_norm=False,
    intermediate_size=10944, first_k_dense_replace=1, moe_intermediate_size=1408,
    n_routed_experts=128, num_experts_per_tok=8, n_shared_experts=1, n_group=1, topk_group=1,
    pad_token_id=151329, eos_token_id=[151329, 151336, 151338], tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Attributes:
        gib: memory that torch can use. tflops: bf16 matrix products. copies: TB/s of memory.
        link: TB/s that one GPU receives from its neighbours; assumed, and of little weight in the measured runs.
    """

    gib: float
    tflops: float
    copies: float
    link: float


#: The cards that were measured; `OTHER_GPU` and `CPU` stand for all others.
CARDS = {"H100": Card(79.2, 792, 3.0, 0.35), "H200": Card(139.8, 782, 4.3, 0.35)}
OTHER_GPU = Card(79.2, 250, 1.7, 0.25)
CPU = Card(0, 0.1, 0.02, 0.005)


@dataclass(frozen=True)
class Machine:
    """What there is: GPUs (0 for a processor alone), GiB of each, what kind, free host memory and disk in GiB."""

    gpus: int
    gib_each: float
    card: str
    host_gib: float
    disk_gib: float

    def words(self) -> str:
        """The machine in a few words."""
        if not self.gpus:
            return say("no GPU, {gib:.0f} GiB of memory free", gib=self.host_gib)
        return say("{gpus} x {card} of {gib:.0f} GiB", gpus=self.gpus, card=self.card, gib=self.gib_each)


@dataclass(frozen=True)
class Launched:
    """How this process was started: `processes` on all hosts, its `rank` among them, and the same for its own host."""

    processes: int = 1
    rank: int = 0
    on_this_host: int = 1
    rank_on_this_host: int = 0


def launched() -> Launched:
    """What `torchrun` or `accelerate launch` has left in the environment; one process without them.

    Raises:
        CourseError: some of a launcher's variables without the others, as a shell or a job scheduler may leave them.
    """
    numbers, address = ("WORLD_SIZE", "RANK", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ.get(name, "") for name in (*numbers, *address)}
    if found["WORLD_SIZE"] in ("", "1") and found["LOCAL_RANK"] in ("", "-1"):  # torch needs one of the two to start
        return Launched()
    missing = [name for name in numbers if not found[name].isdecimal()] + [n for n in address if not found[n]]
    if missing:
        left = [name for name in numbers if found[name]]
        message = (
            "{name}={value} is set, but no launcher has set {missing} with it. Unset {left}, or start with torchrun."
        )
        words = {"missing": ", ".join(missing), "left": ", ".join(left)}
        raise CourseError(say(message, name=left[0], value=found[left[0]], **words))
    processes, rank, own = (int(found[name]) for name in numbers)
    # `accelerate launch` on one host leaves out how many there are on it.
    return Launched(processes, rank, int(os.environ.get("LOCAL_WORLD_SIZE") or processes), own)


def this_machine(folder: Path) -> Machine:
    """The GPUs, host memory and disk of this machine; the disk is that of `folder`.

    A process that a launcher started asks its own GPU alone: asking for free memory opens a context on a GPU, which
    takes about half a GiB there.
    """
    import psutil
    import torch

    gpus, started = torch.cuda.device_count(), launched()
    asked = [started.rank_on_this_host % max(gpus, 1)] if started.processes > 1 else list(range(gpus))
    name = torch.cuda.get_device_name(asked[0]) if gpus else "CPU"
    gib = min((torch.cuda.mem_get_info(i)[0] / GIB for i in asked), default=0.0) if gpus else 0.0
    while not folder.exists():
        folder = folder.parent
    return Machine(
        gpus=gpus,
        gib_each=gib,
        card=next((card for card in CARDS if card in name), name),
        host_gib=psutil.virtual_memory().available / GIB,
        disk_gib=shutil.disk_usage(folder).free / GIB,
    )


# ---------------------------------------------------------------------------------------------- counting


def adapter_parameters(config: Any, rank: int, groups: tuple[str, ...] = GROUPS) -> dict[str, int]:
    """Numbers that LoRA adds to each group: rank x (inputs + outputs) of every weight; derived in notebook 05."""
    hidden, expert = config.hidden_size, config.moe_intermediate_size
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    per_rank = {
        "attention": config.num_hidden_layers * (2 * (hidden + heads) + 2 * (hidden + keys)),
        "dense": config.first_k_dense_replace * 3 * (hidden + config.intermediate_size),
        "shared experts": moe_layers * 3 * (hidden + expert * config.n_shared_experts),
        "routed experts": moe_layers * config.n_routed_experts * ((hidden + 2 * expert) + (expert + hidden)),
    }
    return {group: rank * per_rank[group] for group in GROUPS if group in groups}


def parameters(config: Any) -> dict[str, int]:
    """Numbers in the model by kind: `routed`, `linear` (attention, shared and dense MLPs) and `rest`."""
    hidden, expert = config.hidden_size, config.moe_intermediate_size
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layers, dense = config.num_hidden_layers, config.first_k_dense_replace
    linear = layers * (2 * hidden * heads + 2 * hidden * keys) + dense * 3 * hidden * config.intermediate_size
    linear += (layers - dense) * 3 * hidden * expert * config.n_shared_experts
    head = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    bias = layers * (heads + 2 * keys) if config.attention_bias else 0
    router = (layers - dense) * config.n_routed_experts * hidden
    return {
        "routed": (layers - dense) * config.n_routed_experts * 3 * hidden * expert,
        "linear": linear,
        "rest": head + bias + router + (2 * layers + 1) * hidden,
    }


def active_parameters(config: Any) -> float:
    """Numbers that one token is multiplied with, embeddings left out."""
    count = parameters(config)
    return count["linear"] + count["routed"] * config.num_experts_per_tok / config.n_routed_experts


def experts_apart(config: Any, processes: int) -> int:
    """Over how many of the processes a layer's routed experts can be shared out evenly, whole experts each."""
    return gcd(processes, config.n_routed_experts)


def tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every tensor in the published checkpoint, layer by layer."""
    hidden, wide = config.hidden_size, config.moe_intermediate_size
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def mlp(prefix: str, inner: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{prefix}.gate_proj.weight", (inner, hidden), "BF16"
        yield f"{prefix}.up_proj.weight", (inner, hidden), "BF16"
        yield f"{prefix}.down_proj.weight", (hidden, inner), "BF16"

    yield "model.embed_tokens.weight", (config.vocab_size, hidden), "BF16"
    for layer in range(config.num_hidden_layers + 1):  # the last one predicts a second token
        at = f"model.layers.{layer}"
        for name, out in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
            yield f"{at}.self_attn.{name}.weight", (out, hidden), "BF16"
            if config.attention_bias:
                yield f"{at}.self_attn.{name}.bias", (out,), "BF16"
        if config.use_qk_norm:
            yield f"{at}.self_attn.q_norm.weight", (config.head_dim,), "BF16"
            yield f"{at}.self_attn.k_norm.weight", (config.head_dim,), "BF16"
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads), "BF16"
        yield f"{at}.input_layernorm.weight", (hidden,), "BF16"
        yield f"{at}.post_attention_layernorm.weight", (hidden,), "BF16"
        if layer < config.first_k_dense_replace:
            yield from mlp(f"{at}.mlp", config.intermediate_size)
        else:
            yield f"{at}.mlp.gate.weight", (config.n_routed_experts, hidden), "BF16"
            yield f"{at}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,), "F32"
            yield from mlp(f"{at}.mlp.shared_experts", wide * config.n_shared_experts)
            for expert in range(config.n_routed_experts):
                yield from mlp(f"{at}.mlp.experts.{expert}", wide)
        if layer == config.num_hidden_layers:
            yield f"{at}.eh_proj.weight", (hidden, 2 * hidden), "BF16"
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{at}.{norm}.weight", (hidden,), "BF16"
            yield f"{at}.embed_tokens.weight", (config.vocab_size, hidden), "BF16"
            yield f"{at}.shared_head.head.weight", (config.vocab_size, hidden), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden), "BF16"


FULL = 0.97  # of a device's memory that a plan may take
HELD_OUT_ROWS = (40, 20, 10, 5, 2, 1)  # rows that an evaluation may read at once, the first that fit
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, a scale in 8 bits for 64 numbers, its scale in 32 for 256 of those


@dataclass(frozen=True)
class Sizes:
    """How long the samples of a run are: tokens and labels of each training row and of each held-out row.

    Tokens are what a pass reads; labels are those that count in the loss, for which logits are computed.
    """

    tokens: Sequence[int]
    labels: Sequence[int]
    held_out_tokens: Sequence[int] = ()
    held_out_labels: Sequence[int] = ()

    @classmethod
    def of(cls, train: Any, held_out: dict[str, Any]) -> Sizes:
        """The sizes of data sets with the columns `input_ids` and `labels`, as notebook 04 saves them."""

        def count(rows: Any) -> tuple[list[int], list[int]]:
            return list(map(len, rows["input_ids"])), [sum(i != -100 for i in labels) for labels in rows["labels"]]

        parts = list(map(count, held_out.values()))
        held = [[size for part in parts for size in part[kind]] for kind in (0, 1)]
        return cls(*count(train), *held)


def heaviest(sizes: Sequence[int], rows: float) -> float:
    """How much a batch of so many rows drawn at random holds at most; one batch in a million may exceed it.

    This is Chernoff's bound, which holds for rows of any lengths: a few very long ones among many short ones too.
    """
    count, longest = max(1, round(rows)), max(sizes)
    below = np.asarray(sizes) / longest - 1  # how far each row is from the longest, as a share of it
    bounds = [
        count + (count * np.log(np.exp(slope * below).mean()) + np.log(1e6)) / slope
        for slope in np.geomspace(0.01, 1e4)
    ]
    return min(largest(sizes, count), longest * float(min(bounds)))


def largest(sizes: Sequence[int], count: int) -> float:
    """How much the largest rows hold together; with too few rows the longest is counted again."""
    return float(sum(sorted(sizes, reverse=True)[:count]) + max(0, count - len(sizes)) * max(sizes))


@dataclass(frozen=True)
class Plan:
    """What one arrangement needs. Sizes in GiB; `gpu` holds the terms of the fullest device.

    `on_this_host` of the `processes` run on this machine. `held_out_rows` is how many rows a pass of the evaluation
    reads at once on one device.
    """

    machine: Machine
    bits: int
    processes: int
    on_this_host: int
    samples: int
    passes: int
    checkpointing: bool
    trained: dict[str, int]
    gpu: dict[str, float]
    checkpoint_gib: float
    step_seconds: float
    epochs: int
    steps: int
    held_out_rows: int
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
    def fits(self) -> bool:
        """Whether memory, GPUs and the disk for three checkpoints are there."""
        enough = not self.machine.gpus or self.on_this_host <= self.machine.gpus
        return enough and self.peak <= FULL * self.room and 3 * self.checkpoint_gib <= self.machine.disk_gib

    def text(self) -> str:
        """The plan in six lines."""
        where = say("each GPU") if self.machine.gpus else say("this machine")
        if not self.machine.gpus and self.on_this_host > 1:
            where = say("each process")
        terms = " + ".join(f"{say(name)} {value:.1f}" for name, value in self.gpu.items() if value >= 0.05)
        kind = say("4-bit") if self.bits == 4 else "bf16" if self.machine.gpus else "float32"
        minutes = self.steps * self.step_seconds / 60
        lasts = say("{time:.1f} minutes", time=minutes)
        if minutes >= 90:
            lasts = say("{time:.1f} hours", time=minutes / 60)
        if self.machine.card not in CARDS:
            lasts += say(" (a guess: no such card was measured)")
        elif self.processes > 2:
            lasts += say(" (a guess: more than two GPUs were not measured)")
        return "\n".join(
            [
                say(
                    "Plan for {machine}: {kind} weights, {processes} process(es), {samples} samples a step in "
                    "{passes} pass(es), {how} activation checkpointing",
                    machine=self.machine.words(),
                    kind=kind,
                    processes=self.processes,
                    samples=self.samples,
                    passes=self.passes,
                    how=say("with") if self.checkpointing else say("without"),
                ),
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
                    lasts=lasts,
                ),
                say("  fits") if self.fits else say("  does not fit. {advice}", advice=self.advice),
            ]
        )

    def require_fit(self) -> None:
        """Raise a CourseError with figures and the nearest arrangement that fits, unless this one does."""
        if self.fits:
            return
        if self.machine.gpus and self.on_this_host > self.machine.gpus:
            message = "{processes} processes were started for {gpus} GPUs. Start one a GPU."
            raise CourseError(say(message, processes=self.on_this_host, gpus=self.machine.gpus))
        if 3 * self.checkpoint_gib > self.machine.disk_gib:
            message = (
                "Three checkpoints take {needed:.2f} GiB, {free:.2f} GiB are free. "
                "Free some, or set COURSE_OUTPUT to another disk."
            )
            raise CourseError(say(message, needed=3 * self.checkpoint_gib, free=self.machine.disk_gib))
        message = "This needs {peak:.1f} GiB on each device, {room:.1f} GiB are free. {advice} Nothing was loaded."
        raise CourseError(say(message, peak=self.peak, room=self.room, advice=self.advice))


# ---------------------------------------------------------------------------------------- memory and time

#: Seconds of a processor to launch the kernels of one layer, forward and backward: (bits, checkpointing). Measured.
LAUNCH = {(16, True): 0.0215, (16, False): 0.0115, (4, True): 0.0310, (4, False): 0.0200}
LAUNCH_SHARED = {True: 0.0367, False: 0.0270}  # several GPUs that share the experts out, by checkpointing
LAUNCH_TEXTBOOK = 0.0430  # with peft's full-size update of the experts
MATRIX_SHARE, COPY_SHARE = 0.35, 0.53  # of the measured rates of a card that a step reaches; fitted


def memory(
    config: Any,
    trained: float,
    bits: int,
    tokens: float,
    labels: float,
    checkpointing: bool,
    gpus: int,
    processes: int,
    recipe: str = "ours",
    routed: bool = True,
    held_out: tuple[float, float] = (0.0, 0.0),
) -> dict[str, float]:
    """GiB on one device.

    Args:
        tokens: that one pass reads on one device. labels: for how many of them logits are computed.
        held_out: the same two numbers for a pass of the evaluation, which keeps nothing for a backward pass.
        gpus: 0 for a processor, which computes in float32. recipe: `ours`, or `textbook` (peft's full-size update).
    """
    count, size = parameters(config), 2 if gpus else 4
    hidden, inner, k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    heads = config.num_attention_heads * config.head_dim
    layer = size * config.n_routed_experts * 3 * hidden * inner  # the routed experts of one layer
    if bits == 4:
        weights = NF4_BYTES * (count["routed"] + count["linear"]) + size * count["rest"]
    else:
        weights = size * sum(count.values())
    gathered, exchanged = 0.0, 0.0
    if processes > 1 and bits == 16:
        apart = experts_apart(config, processes)
        head, others = size * config.vocab_size * hidden, size * count["linear"] / config.num_hidden_layers
        # Two layers at a time; what comes from other GPUs lies there twice, as it arrives and as it is used.
        gathered = head + 4 * others + (2 if apart == processes else 4) * layer / apart
        weights, exchanged = weights / processes, 4 * size * tokens * apart * hidden * (apart > 1)
    # A layer's own tensors for each token: what the routed rows, the heads and the hidden states keep while it is
    # computed again and differentiated.
    a_token = size * (k * (5 * hidden + 6 * inner) + 5 * heads + 8 * hidden)
    at_work = a_token * tokens
    if checkpointing:
        kept = size * tokens * config.num_hidden_layers * hidden
    else:
        kept = size * tokens * config.num_hidden_layers * (k * (3 * hidden + 4 * inner) + 3 * heads + 4 * hidden)
        kept += 2 * size * trained  # the factors in the type of the product
    unpacked = layer if bits == 4 or (recipe == "textbook" and routed) else 0.0
    a_label = config.vocab_size * (size + 8)
    logits = labels * a_label
    evaluation = max(a_token * held_out[0] + unpacked, a_label * held_out[1])
    if recipe == "textbook" and gpus > 1:  # `device_map`: each GPU holds its run of layers
        weights, trained, kept = weights / gpus, trained / gpus, kept / gpus
    gradients = 4 * trained
    summed = gradients if processes > 1 and bits == 4 else 0  # where the processes' gradients meet
    return {
        "weights": weights / GIB,
        "gathered layers": gathered / GIB,
        "adapter and optimiser": (12 * trained + gradients + summed) / GIB,
        # Checkpoints are used up while gradients come into being, so the larger of the two counts.
        "activations": max(max(kept - gradients, 0) + max(at_work + exchanged + unpacked, logits), evaluation) / GIB,
        "rest": 1.5 if gpus else 0.8,
    }


def seconds(
    config: Any,
    bits: int,
    tokens: float,
    checkpointing: bool,
    card: Card,
    gpus: int,
    processes: int,
    passes: int,
    recipe: str = "ours",
) -> float:
    """Seconds of one step; `tokens` is what one pass reads on one device."""
    active, count = active_parameters(config), parameters(config)
    reads = 3 if checkpointing else 2
    compute = 2 * reads * active * tokens / (card.tflops * 1e12 * MATRIX_SHARE)
    shared = processes > 1 and bits == 16
    apart = experts_apart(config, processes) if shared else 1
    moved = 2.0 * reads * (count["routed"] / apart + count["linear"])
    if bits == 4:
        moved += (reads - 1) * (2 + NF4_BYTES) * (count["routed"] + count["linear"])
    gather = 0.0
    if shared:
        alike = processes // apart  # so many share a share of the experts, and gather it
        gathered = count["linear"] + count["rest"] + (count["routed"] / apart if alike > 1 else 0)
        gather = 2 * 2 * gathered * (processes - 1) / processes / (card.link * 1e12)
        moved += 2 * 2 * 2 * count["routed"] / apart  # FSDP2 copies a layer before each use, forward and backward
    work = compute + moved / (card.copies * 1e12 * COPY_SHARE)
    if apart > 1:  # tokens out and sums back: forward, again if checkpointed, and backward
        rows = 2 * reads * tokens * (apart - 1) * (config.num_hidden_layers - config.first_k_dense_replace)
        work += 2 * rows * config.hidden_size / (card.link * 1e12)
    a_layer = LAUNCH_SHARED[checkpointing] if shared else LAUNCH[bits, checkpointing]
    a_layer = LAUNCH_TEXTBOOK if recipe == "textbook" else a_layer
    launch = a_layer * config.num_hidden_layers * bool(gpus)  # a processor launches nothing
    return passes * max(work, launch, gather)


def plan(
    config: Any = AIR,
    rank: int = 8,
    groups: tuple[str, ...] = GROUPS,
    bits: int = 16,
    samples: int = 16,
    passes: int = 1,
    tokens_a_sample: float = 60.6,
    label_share: float = 0.33,
    rows: int = 3729,
    epochs: int = 3,
    checkpointing: bool = True,
    machine: Machine | None = None,
    processes: int = 1,
    recipe: str = "ours",
    advise: bool = True,
    sizes: Sizes | None = None,
    on_this_host: int | None = None,
) -> Plan:
    """The whole plan of one arrangement; the defaults are the role-play set of `benchmarks/lengths.json`.

    Args:
        recipe: `ours`, or `textbook`: padded batches, all logits, peft's full-size update of the experts.
        processes: how many `torchrun` starts; with 16 bits each keeps a share of all weights, with 4 bits all of them.
        advise: look for the nearest arrangement that fits when this one does not.
        sizes: of the real rows, in the place of `tokens_a_sample`, `label_share` and `rows`. Time is planned for the
            mean batch, memory for the heaviest and for the evaluation.
        on_this_host: how many of the processes run on this machine; all of them if not given.
    """
    machine = machine or this_machine(Path.cwd())
    trained = adapter_parameters(config, rank, groups)
    total = sum(trained.values())
    rows_a_pass = samples / passes / processes
    if sizes:
        rows, tokens_a_sample = len(sizes.tokens), sum(sizes.tokens) / len(sizes.tokens)
    tokens = rows_a_pass * tokens_a_sample
    most_tokens, labels = tokens, tokens * label_share
    if sizes:
        most_tokens, labels = heaviest(sizes.tokens, rows_a_pass), heaviest(sizes.labels, rows_a_pass)
        if recipe == "textbook":  # padded to the longest of the batch
            most_tokens = max(1, round(rows_a_pass)) * max(sizes.tokens)
    if recipe == "textbook":
        labels = most_tokens
    routed = "routed experts" in groups

    def needed(held_out_rows: int) -> dict[str, float]:
        held_out = (0.0, 0.0)
        if sizes and sizes.held_out_tokens:
            # Held-out rows are read in the order of their file, in which the longest may be neighbours.
            held_out = tuple(largest(kind, held_out_rows) for kind in (sizes.held_out_tokens, sizes.held_out_labels))
            if recipe == "textbook":
                held_out = (held_out_rows * max(sizes.held_out_tokens),) * 2
        how = (checkpointing, machine.gpus, processes, recipe, routed, held_out)
        return memory(config, total, bits, most_tokens, labels, *how)

    here = on_this_host or processes
    room = machine.gib_each if machine.gpus else machine.host_gib / here
    held_out_rows = next((n for n in HELD_OUT_ROWS if sum(needed(n).values()) <= FULL * room), HELD_OUT_ROWS[-1])
    gpu = needed(held_out_rows)
    card = CARDS.get(machine.card, OTHER_GPU if machine.gpus else CPU)
    step = seconds(config, bits, tokens, checkpointing, card, machine.gpus, processes, passes, recipe)
    made = Plan(
        machine=machine,
        bits=bits,
        processes=processes,
        on_this_host=here,
        held_out_rows=held_out_rows,
        samples=samples,
        passes=passes,
        checkpointing=checkpointing,
        trained=trained,
        gpu=gpu,
        checkpoint_gib=12 * total / GIB,
        step_seconds=step,
        epochs=epochs,
        steps=epochs * -(-rows // samples),
    )
    if made.fits or not advise:
        return made
    asked = {"config": config, "rank": rank, "groups": groups, "samples": samples, "rows": rows, "epochs": epochs}
    asked |= {"tokens_a_sample": tokens_a_sample, "label_share": label_share, "advise": False, "sizes": sizes}
    return replace(made, advice=nearest(made, asked))


def nearest(made: Plan, asked: dict[str, Any]) -> str:
    """What would fit: on this machine if anything does, else how many GPUs of 80 GB."""
    machine = made.machine
    if made.peak <= FULL * made.room and 3 * made.checkpoint_gib > machine.disk_gib:
        message = "The disk is too small: free {gib:.2f} GiB more, or use another."
        return say(message, gib=3 * made.checkpoint_gib - machine.disk_gib)
    if machine.gpus:
        as_started = (made.bits, made.processes, made.on_this_host)
        for bits, processes, here in (as_started, (16, machine.gpus, machine.gpus), (4, 1, 1)):
            for passes in (1, 2, 4, 8, 16):
                if asked["samples"] % (passes * processes):
                    continue
                how = {"bits": bits, "passes": passes, "processes": processes, "on_this_host": here}
                found = plan(**asked, **how, machine=machine)
                if found.fits:
                    start = f"torchrun --nproc-per-node {here}" if processes > 1 else "python"
                    if processes > here:
                        start = f"torchrun --nnodes {processes // here} --nproc-per-node {here}"
                    command = f"{start} train.py --bits {bits} --samples {asked['samples']} --passes {passes}"
                    command += " --attention-only" if asked["groups"] == ("attention",) else ""
                    command += f" --rank {asked['rank']}" if asked["rank"] != 8 else ""
                    return say("This would fit in {gib:.0f} GiB: {command}.", gib=found.peak, command=command)
    disk = max(machine.disk_gib, 3 * made.checkpoint_gib)
    for bits, gpus in ((4, 1), (16, 4), (16, 8), (16, 16)):
        rented = Machine(gpus, CARDS["H100"].gib, "H100", machine.host_gib, disk)
        samples = -(-asked["samples"] // gpus) * gpus
        processes = gpus if bits == 16 else 1
        found = plan(**(asked | {"samples": samples}), bits=bits, machine=rented, processes=processes)
        if found.fits:
            message = "{gpus} GPU(s) of 80 GB with --bits {bits} would do ({gib:.0f} GiB each)."
            return say(message, gpus=gpus, bits=bits, gib=found.peak)
    return say("Nothing up to 16 GPUs of 80 GB would do: lower the rank.")
