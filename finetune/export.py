"""The trained persona in the forms that other engines load: `python -m finetune export FORM FOLDER`.

    adapter      the adapter as peft saved it: transformers, peft
    split        the adapter with a pair of factors for each expert, still peft's file format: vLLM, SGLang
    merged       the checkpoint with the adapter added: transformers, vLLM, SGLang, mlx
    gguf         base and adapter as two GGUF files: llama.cpp, which can switch the adapter while it runs
    gguf-merged  one GGUF file: llama.cpp and what is built on it

A form is written beside its final name and renamed when it is whole and has been read back.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

import utils
from course.language import say
from course.model_folder import model_folder, trained_folder
from finetune import checkpoint, gguf_file
from finetune.adapter_folder import adapter_settings, read_prompt
from finetune.config import mtp_layer_prefix
from finetune.lora import adapter_fits
from finetune.resume import FULL_DISK
from utils import CourseError, shown

FORMS = ("adapter", "split", "merged", "gguf", "gguf-merged")
CONFIG_FILE = "adapter_config.json"
BASE_FILE, ADAPTER_FILE, MERGED_FILE = "base.gguf", "adapter.gguf", "merged.gguf"
#: The layers that an adapter split by expert names; all of them exist as modules in vLLM and SGLang.
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: How numpy, which the library of GGUF writes with, says that a file came out short: only a full disk does that.
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
GIB = 2**30


@dataclass(frozen=True)
class Trained:
    """What is exported: the folders of the base and of the adapter, and the prompt of training."""

    base: Path
    adapter: Path
    prompt: str
    config: Any

    @classmethod
    def of(cls, course: utils.Settings, adapter: str = "") -> Trained:
        """What notebook 05 or the command `train` has left, or what the folder `adapter` holds (`trained_folder`).

        Raises:
            CourseError: nothing trained yet, an adapter of another base, or one that holds nothing.
        """
        run_folder = trained_folder(course, adapter)
        base = model_folder(course)
        prompt = json.dumps({"system": read_prompt(run_folder)}, ensure_ascii=False)
        made = cls(base, run_folder / "adapter", prompt, AutoConfig.from_pretrained(base))
        adapter_fits(made.adapter, made.config)
        require_trained(made.adapter)
        return made


def require_trained(adapter: Path, split: bool = False) -> int:
    """How many matrices the adapter holds, after seeing that none is missing and each has been trained.

    Args:
        split: by expert. Then a `lora_B` may be zero: that of an expert to which no token of training was sent.

    Raises:
        CourseError: a matrix without a rank, one whose partner is missing, a target of the adapter's configuration
            for which there is none, or a `lora_B` that is zero throughout.
    """
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        empty = [name for name in sorted(names) if not prod(file.get_slice(name).get_shape())]
        pairs = {name: name.replace(".lora_A.", ".lora_B.") for name in names if ".lora_A." in name}
        lost = sorted((set(pairs) | set(pairs.values())) - names) + sorted(names - set(pairs) - set(pairs.values()))
        if wrong := empty or lost:
            raise CourseError(
                say(
                    "{folder}: {tensor} has no rank or no partner. The adapter is damaged; train it again (notebook "
                    "05_lora_training). Nothing was written.",
                    folder=shown(adapter),
                    tensor=wrong[0],
                )
            )
        if empty := empty_targets(adapter, names):
            raise CourseError(
                say(
                    "{folder}: its adapter_config.json names {target}, and the adapter holds nothing for it. Train it "
                    "again (notebook 05_lora_training). Nothing was written.",
                    folder=shown(adapter),
                    target=", ".join(empty[:3]),
                )
            )
        zero = [name for name in sorted(pairs.values()) if not bool(file.get_tensor(name).any())]
    if zero and not split:
        raise CourseError(
            say(
                "{folder}: {count} of {all} matrices lora_B are zero ({tensor}), so the adapter changes nothing there. "
                "Train it (notebook 05_lora_training). Nothing was written.",
                folder=shown(adapter),
                count=len(zero),
                all=len(pairs),
                tensor=zero[0],
            )
        )
    return len(names)


def empty_targets(adapter: Path, names: Iterable[str]) -> list[str]:
    """Targets of the adapter's configuration for which none of the matrices `names` is there."""
    settings = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    lists = [settings.get(key) for key in ("target_modules", "target_parameters")]
    targets = sorted(target for one in lists if isinstance(one, list) for target in one)  # peft saves a set
    fused = [target for target in targets if ".experts." in target]
    found = [target for target in targets if any(f"{target.removesuffix('.weight')}.lora_A." in name for name in names)]
    # peft nests the wrappers of the fused tensors, so the names tell how many there are and not which.
    nested = {name.rpartition(".mlp.experts.")[2] for name in names if re.search(r"\.mlp\.experts\.(?!\d)", name)}
    whole = fused if len(nested) == 2 * len(fused) else []
    return [target for target in targets if target not in (*found, *whole)]


# ------------------------------------------------------------------------------------------------------- the forms


def export(
    form: str,
    out: Path,
    course: utils.Settings,
    kind: str = "f16",
    report: Callable[[str], None] = print,
    strength: float = 1.0,
    adapter: str = "",
) -> int:
    """Write one form of the persona into a new folder.

    Args:
        form: one of `FORMS`. kind: type of the numbers in GGUF files, a name of `gguf_file.TYPES`.
        strength: multiplies the adapter's update, as in a chat (`chat.STRENGTH`).
        adapter: the folder of another training than notebook 05's (`trained_folder`).

    Returns:
        How many tensors were written.

    Raises:
        CourseError: the folder holds something, too little disk, or whatever `Trained.of` finds wrong.
    """
    trained = Trained.of(course, adapter)
    disk, memory = needed(form, trained, kind)
    with new_folder(out, disk) as part, at_strength(trained.adapter, strength) as scaled:
        report(
            say("writing {disk:.2f} GiB, with about {memory:.1f} GiB of memory", disk=disk / GIB, memory=memory / GIB)
        )
        count = WRITERS[form](replace(trained, adapter=scaled), part, kind, report)
        (part / "prompt.json").write_text(trained.prompt, encoding="utf-8")
    return count


@contextmanager
def at_strength(adapter: Path, strength: float) -> Iterator[Path]:
    """The adapter's folder; for another strength than 1 a temporary one with another `lora_alpha`.

    The update is lora_alpha / r times B A, so this alone multiplies it, in every engine.
    """
    if strength == 1:
        yield adapter
        return
    settings = adapter_settings(adapter)
    settings["lora_alpha"] *= strength
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in files_of(adapter):
            if path.name != CONFIG_FILE:
                (folder / path.name).symlink_to(path.absolute())
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        yield folder


@contextmanager
def new_folder(out: Path, disk: int) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` at the end and is deleted if anything goes wrong.

    Raises:
        CourseError: `out` is there already, or less than `disk` bytes are free.
    """
    out = out.absolute() if out.name else out.resolve()  # "." has no name that a folder beside it could get
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CourseError(say("{folder} is a file or a link. Name a new folder.", folder=shown(out)))
    checkpoint.require_room(out, disk)
    part = out.with_name(f".{out.name}.unfinished-export")  # hidden: no folder of the user's has this name
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a killed export left
        part.mkdir(parents=True)
        yield part
        if out.is_dir():
            out.rmdir()  # empty, as `require_room` has seen
        part.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if FULL_DISK.search(str(error)) or SHORT_WRITE.search(str(error)):
            reason = os.strerror(errno.ENOSPC)
        raise CourseError(
            say("{folder}: {error}. What had been written there is deleted.", folder=shown(out), error=reason)
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def files_of(adapter: Path) -> list[Path]:
    """The files of an adapter's folder; a folder in it, as JupyterLab makes for its checkpoints, is no part of it."""
    return [path for path in sorted(adapter.iterdir()) if path.is_file()]


def needed(form: str, trained: Trained, kind: str) -> tuple[int, int]:
    """Bytes of disk and of memory that a form takes; memory without Python and its libraries (about 0.5 GiB)."""
    config = trained.config
    adapter = sum(path.stat().st_size for path in files_of(trained.adapter))
    shards = [path.stat().st_size for path in trained.base.glob("*.safetensors")]
    expert = config.hidden_size * config.moe_intermediate_size
    if form in ("adapter", "split"):  # the split one repeats the A of `gate_up`: for `gate` and for `up`
        return (adapter, 0) if form == "adapter" else (2 * adapter, 3 * adapter)
    if form == "merged":
        return sum(shards), 2 * max(shards) + 12 * expert
    block, length = gguf_file.gguf.GGML_QUANT_SIZES[gguf_file.TYPES[kind][1]]
    model = int(sum(shards) / 2 * length / block * 1.02)
    fused = 8 * config.n_routed_experts * expert  # one fused tensor in float32, and its rounded copy
    return (model if form == "gguf-merged" else model + 2 * adapter), max(
        fused, 8 * config.vocab_size * config.hidden_size
    )


def _adapter(trained: Trained, out: Path, kind: str, report: Callable[[str], None]) -> int:
    for path in files_of(trained.adapter):
        shutil.copy2(path, out)
    return require_trained(out)


def _split(trained: Trained, out: Path, kind: str, report: Callable[[str], None]) -> int:
    made: dict[str, torch.Tensor] = {}
    for name, a, b in gguf_file.fused_factors(trained.adapter, trained.config):
        head, is_routed, part = name.partition(".mlp.experts.")
        pairs = {f"{head}.mlp.experts.{i}.{part}": (a[i], b[i]) for i in range(len(a))} if is_routed else {name: (a, b)}
        for target, factors in pairs.items():
            for letter, tensor in zip("AB", factors, strict=True):
                made[f"base_model.model.{target}.lora_{letter}.weight"] = tensor.clone(
                    memory_format=torch.contiguous_format
                )
    save_file(made, out / "adapter_model.safetensors", {"format": "pt"})
    settings = json.loads((trained.adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    modules = [module for module in MODULES if any(f".{module}.lora_A." in name for name in made)]
    settings |= {"target_modules": modules, "target_parameters": None}
    (out / CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    for path in files_of(trained.adapter):
        if path.name not in ("adapter_model.safetensors", CONFIG_FILE):
            shutil.copy2(path, out)
    return require_trained(out, split=True)


def _merged(trained: Trained, out: Path, kind: str, report: Callable[[str], None]) -> int:
    changed = checkpoint.merge(trained.base, trained.adapter, out, report)
    if any(name.startswith(mtp_layer_prefix(trained.config)) for name in checkpoint.check_shards(out)):
        report(say("The MTP layer is in the checkpoint, unchanged."))
    else:
        report(say("The base has no MTP layer, so the checkpoint has none."))
    return changed


def _gguf(trained: Trained, out: Path, kind: str, report: Callable[[str], None]) -> int:
    count = gguf_file.write_model(trained.base, trained.config, out / BASE_FILE, kind)
    report(say("{count} tensors in {file}", count=count, file=BASE_FILE))
    pairs = gguf_file.write_adapter(trained.adapter, trained.config, out / ADAPTER_FILE)
    report(say("{count} tensors in {file}", count=pairs, file=ADAPTER_FILE))
    model, adapter = (gguf_file.names_in(out / name) for name in (BASE_FILE, ADAPTER_FILE))
    _require(count == len(model) and pairs == len(adapter), out)
    _require({name.rpartition(".lora_")[0] for name in adapter} <= set(model), out)
    return count + pairs


def _gguf_merged(trained: Trained, out: Path, kind: str, report: Callable[[str], None]) -> int:
    changes = checkpoint.fitting_updates(trained.base, trained.adapter, trained.config)
    count = gguf_file.write_model(trained.base, trained.config, out / MERGED_FILE, kind, changes)
    report(say("{count} tensors in {file}", count=count, file=MERGED_FILE))
    _require(count == len(gguf_file.names_in(out / MERGED_FILE)), out)
    return count


def _require(whole: bool, folder: Path) -> None:
    """Raise a CourseError unless the files read back are what was written."""
    if not whole:
        raise CourseError(say("{folder}: the files read back are not what was written.", folder=shown(folder)))


WRITERS = {"adapter": _adapter, "split": _split, "merged": _merged, "gguf": _gguf, "gguf-merged": _gguf_merged}
