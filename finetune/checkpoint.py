"""Checkpoints of the model: is one whole, merging an adapter into it, and a checkpoint of holes to try loading with.

All of it works on files, shard by shard; no model is built.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, Glm4MoeConfig

from course.language import say
from finetune.adapter_folder import adapter_settings
from finetune.config import AIR, mtp_layer_prefix, tensors
from finetune.lora import adapter_fits
from utils import CourseError, shown

# ------------------------------------------------------------------------------------------------ is it whole?


def shard_header(path: Path) -> dict[str, Any]:
    """Name to type, shape and offsets of each tensor in a safetensors file.

    Raises:
        CourseError: the file is not as long as its header says, or the header itself is cut.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < 2**27 else {}
        except ValueError:
            header = {}
    header.pop("__metadata__", None)
    if not header or 8 + length + max(entry["data_offsets"][1] for entry in header.values()) != path.stat().st_size:
        raise damaged(path)
    return header


def damaged(path: Path) -> CourseError:
    """The error of a file that ends before its last tensor does, or whose header cannot be read."""
    return CourseError(say("{path} is cut short or damaged. Delete it and run 02_download again.", path=shown(path)))


def check_shards(folder: Path) -> dict[str, Any]:
    """The headers of all shards, after seeing that every shard and every tensor of the model is there.

    Raises:
        CourseError: shards that are missing or cut short, or tensors that no shard holds, by name.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CourseError(
            say(
                "{folder}: {count} of {all} shards are missing ({missing}). "
                "Run notebook 02_download again: it fetches only what is missing.",
                folder=shown(folder),
                count=len(missing),
                all=len(names),
                missing=some,
            )
        )
    headers = {tensor: entry for name in names for tensor, entry in shard_header(folder / name).items()}
    config = AutoConfig.from_pretrained(folder)
    unused = mtp_layer_prefix(config)
    lost = [name for name, _, _ in tensors(config) if name not in headers and not name.startswith(unused)]
    if lost:
        some = lost[0] + (", ..." if len(lost) > 1 else "")
        raise CourseError(
            say(
                "{folder}: {count} tensors are in no shard ({lost}). "
                "This is no whole checkpoint of such a model; nothing was loaded.",
                folder=shown(folder),
                count=len(lost),
                lost=some,
            )
        )
    return headers


# ----------------------------------------------------------------------------------------------------- merging


def updates(adapter: Path, config: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """For each tensor of the checkpoint that the adapter changes, by its name there, how to make its update.

    The names are the checkpoint's own: one tensor for each expert, `gate` and `up` apart.
    """
    settings = adapter_settings(adapter)
    scale, rank, experts = settings["lora_alpha"] / settings["r"], settings["r"], config.n_routed_experts
    inner = config.moe_intermediate_size
    file = safe_open(adapter / "adapter_model.safetensors", "pt")
    made: dict[str, Callable[[], torch.Tensor]] = {}

    def product(key: str) -> torch.Tensor:
        a, b = (file.get_tensor(f"{key}.lora_{part}.weight").float() for part in "AB")
        return scale * b @ a

    def of_expert(key: str, expert: int, start: int, end: int) -> torch.Tensor:
        a = file.get_slice(f"{key}.lora_A.weight")[expert * rank : (expert + 1) * rank].float()
        b = file.get_slice(f"{key}.lora_B.weight")[start:end].reshape(end - start, rank, experts)[:, :, expert].float()
        return scale * b @ a

    for name in file.keys():  # noqa: SIM118 (not a dictionary)
        if not name.endswith(".lora_A.weight"):
            continue
        key = name.removesuffix(".lora_A.weight")
        target = key.removeprefix("base_model.model.")
        if ".mlp.experts" not in target:
            made[f"{target}.weight"] = partial(product, key)
            continue
        layer = target[: target.index(".mlp.experts")]
        fused = file.get_slice(name).get_shape()[1] == config.hidden_size and target.endswith(".base_layer")
        parts = {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)}
        if not fused:
            parts = {"down_proj": (0, config.hidden_size)}
        for expert in range(experts):
            for part, (start, end) in parts.items():
                made[f"{layer}.mlp.experts.{expert}.{part}.weight"] = partial(of_expert, key, expert, start, end)
    return made


def fitting_updates(folder: Path, adapter: Path, config: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """`updates`, after seeing that the checkpoint in `folder` is whole and has every tensor that they change.

    Raises:
        CourseError: it is damaged, or the adapter is of another model.
    """
    headers, change = check_shards(folder), updates(adapter, config)
    if missed := sorted(set(change) - set(headers)):
        raise CourseError(
            say(
                "{count} tensors of the adapter are not in {folder}: {first}, ...",
                count=len(missed),
                folder=shown(folder),
                first=missed[0],
            )
        )
    return change


def merge(folder: Path, adapter: Path, out: Path, report: Callable[[str], None] = print) -> int:
    """The checkpoint with the adapter's update added, one shard in memory at a time.

    The result has the layout of the original, MTP layer included, so that whatever serves that one serves it.

    Returns:
        How many tensors were changed.

    Raises:
        CourseError: a folder that holds something already, too little disk, a damaged checkpoint, or an adapter that
            was trained on another model. A shard appears under its name only when it is whole.
    """
    config = AutoConfig.from_pretrained(folder)
    adapter_fits(adapter, config)
    change, changed = fitting_updates(folder, adapter, config), 0
    require_room(out, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    out.mkdir(parents=True, exist_ok=True)
    shards = sorted(folder.glob("*.safetensors"))
    for number, shard in enumerate(shards, 1):
        merged = {}
        with safe_open(shard, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(name)
                if name in change:
                    tensor = (tensor.float() + change[name]()).to(tensor.dtype)
                    changed += 1
                merged[name] = tensor
        save_file(merged, out / f"{shard.name}.part", metadata)
        (out / f"{shard.name}.part").rename(out / shard.name)
        report(f"shard {number} of {len(shards)}: {shard.name}")
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copy(path, out)
    return changed


def require_room(out: Path, total: int) -> None:
    """Raise a CourseError if the folder holds something already, or its disk has less than `total` bytes free."""
    if out.is_dir() and any(out.iterdir()):
        raise CourseError(
            say("{folder} is not empty. Name a new folder, or empty this one. Nothing was written.", folder=shown(out))
        )
    parent = next(path for path in (out, *out.parents) if path.is_dir())
    if (free := shutil.disk_usage(parent).free) < 1.01 * total:
        raise CourseError(
            say(
                "This takes {total:.1f} GiB of disk, {free:.1f} GiB are free at {folder}. Nothing was written.",
                total=total / 2**30,
                free=free / 2**30,
                folder=shown(parent),
            )
        )


# -------------------------------------------------------------------------------------- a checkpoint of holes


def write_holes(folder: Path, config: Glm4MoeConfig = AIR, shards: int = 47) -> int:
    """Write a checkpoint in the published layout that takes no disk: every shard is a hole with a true header.

    It reads as zeros, so it shows how loading behaves at full size (order, memory, time) where 206 GiB do not fit.

    Returns:
        The bytes that it reads as.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = {"BF16": 2, "F32": 4}
    entries = [(name, shape, kind, prod(shape) * size[kind]) for name, shape, kind in tensors(config)]
    total = sum(entry[3] for entry in entries)
    weight_map, headers, at, filled = {}, [{}], 0, 0
    for name, shape, kind, length in entries:
        if filled >= total / shards * len(headers):
            headers.append({})
            at = 0
        headers[-1][name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + length]}
        at, filled = at + length, filled + length
    for number, header in enumerate(headers, 1):
        file = f"model-{number:05d}-of-{len(headers):05d}.safetensors"
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            out.truncate(8 + len(head) + max(entry["data_offsets"][1] for entry in header.values()))
        weight_map |= dict.fromkeys(header, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = ["Glm4MoeForCausalLM"]
    config.save_pretrained(folder)
    return total
