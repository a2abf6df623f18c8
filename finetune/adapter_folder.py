"""The files of a trained adapter: read and checked before anything is loaded, merged or exported.

One message names the file and what is wrong with it: cut short, a pointer of Git LFS, edited by hand, or of a kind
that this course does not compute. Reads headers and settings, never the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from course.language import say
from course.model_folder import refuse_pointers
from utils import CourseError, shown

SETTINGS, WEIGHTS, PROMPT = "adapter_config.json", "adapter_model.safetensors", "prompt.json"
#: Settings of peft that change what an update is; merging and exporting know plain LoRA, lora_alpha / r times B A.
OTHER_KINDS = ("use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")


def damaged(file: Path, reason: object) -> CourseError:
    """The error of a file of an adapter that cannot be used."""
    return CourseError(
        say(
            "{file} cannot be used ({reason}). Restore it, or train the adapter again (notebook 05_lora_training).",
            file=shown(file),
            reason=reason,
        )
    )


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, or the error that names it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise damaged(file, " ".join(str(getattr(error, "strerror", None) or error).split())[:80]) from None
    if not isinstance(found, dict):
        raise damaged(file, say("no JSON object"))
    return found


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says, with a rank and an alpha that can be computed with.

    Raises:
        CourseError: it is missing or damaged, or of a kind of LoRA that merging and exporting do not know.
    """
    file = folder / SETTINGS
    settings = _object(file)
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or (key == "r" and value % 1):
            raise damaged(file, say("{key} is {value}", key=key, value=value))
    if other := [key for key in OTHER_KINDS if settings.get(key)]:
        raise damaged(file, say("{key} is set; this course computes plain LoRA", key=other[0]))
    return settings


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of each matrix of the adapter.

    Raises:
        CourseError: the file is missing, damaged or a pointer of Git LFS, or a matrix does not have the rank that
            `adapter_config.json` names.
    """
    refuse_pointers(folder)
    file = folder / WEIGHTS
    try:
        with safe_open(file, "pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise damaged(file, getattr(error, "strerror", None) or error) from None
    rank = adapter_settings(folder)["r"]
    for name, shape in shapes.items():
        if 0 in shape:  # a matrix without a rank, which `export.require_trained` names
            continue
        found = shape[0] if ".lora_A." in name else shape[-1]
        # The factors of all experts of a layer are stored as one matrix: as many rows or columns as experts times rank.
        whole = found % rank == 0 if ".mlp.experts." in name else found == rank
        if len(shape) != 2 or not whole:
            raise damaged(
                folder / SETTINGS, say("r is {rank}, {tensor} has {found}", rank=rank, tensor=name, found=found)
            )
    return shapes


def read_prompt(folder: Path) -> str:
    """The system prompt of a training, from `prompt.json` beside its adapter.

    Raises:
        CourseError: it is missing or damaged, or holds no text under `system`.
    """
    file = folder / PROMPT
    prompt = _object(file).get("system")
    if not isinstance(prompt, str):
        raise damaged(file, say("{key} is {value}", key="system", value=prompt))
    return prompt
