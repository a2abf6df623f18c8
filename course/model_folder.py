"""The folder of a model: where it is, and whether it holds the model that the course is made for.

Reads the small files and the first bytes of the large ones, never the weights. One message says what does not fit, with
the file and the fix. Knows nothing of loading or training.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import utils
from course.language import say

LFS_POINTER = b"version https://git-lfs"
#: The tokens that end an answer, in this order in `eos_token_id`.
ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]
#: What GLM-4.5-Air's template makes of it, by `enable_thinking`; notebook 04 teaches these rules.
RENDERED = {
    None: "[gMASK]<sop><|system|>\nS<|user|>\nA<|assistant|>\n<think></think>\nB<|user|>\nC<|assistant|>",
    False: "[gMASK]<sop><|system|>\nS<|user|>\nA/nothink<|assistant|>\n<think></think>\nB<|user|>\nC/nothink"
    "<|assistant|>\n<think></think>",
}


def model_folder(settings: utils.Settings) -> Path:
    """The folder that holds the weights.

    Raises:
        CourseError: no model there, a model id that is neither fetched by notebook 02 nor in ModelScope's cache, or a
            model that `check` refuses.
    """
    folder = Path(settings.model)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", settings.model):
            raise utils.CourseError(
                say("COURSE_MODEL={model}: no folder there, and no model id (owner/name) either.", model=settings.model)
            )
        note = settings.output / "hub" / "fetched.json"
        fetched = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if settings.model in fetched:
            folder = settings.output / "hub" / fetched[settings.model]
        elif not (folder := cached_model(settings.model)):
            raise utils.CourseError(
                say(
                    "{model} is not on this machine yet. Run notebook 02_download with internet first, "
                    "or set COURSE_MODEL to the folder that holds the model.",
                    model=settings.model,
                )
            )
    if not (folder / "config.json").is_file():
        raise utils.CourseError(
            say(
                "{folder}: no config.json there, so no model. Check COURSE_MODEL or run 02_download.",
                folder=utils.shown(folder),
            )
        )
    return check(folder)


def trained_folder(settings: utils.Settings, chosen: str = "") -> Path:
    """The folder of a training: `adapter/`, and `prompt.json` with its system prompt.

    Args:
        chosen: such a folder, as `models/huanhuan-lora`; without it the learner's own, of notebook 05.

    Raises:
        CourseError: nothing trained yet, or no training in the folder.
    """
    if not chosen:
        return utils.require(settings.output / "lora", "05_lora_training", settings)
    folder = Path(chosen)
    if not folder.is_absolute() and not folder.exists():  # a place in the project, from wherever it is named
        folder = utils.ROOT / chosen
    if not ((folder / "adapter" / "adapter_config.json").is_file() and (folder / "prompt.json").is_file()):
        raise utils.CourseError(
            say(
                "{folder} holds no training: adapter/adapter_config.json and prompt.json belong there, as in "
                "output/lora and models/huanhuan-lora.",
                folder=utils.shown(folder),
            )
        )
    return folder


def cached_model(model_id: str) -> Path | None:
    """The folder of a whole model in ModelScope's own cache (`MODELSCOPE_CACHE`, else its default), if there is one."""
    from modelscope import snapshot_download
    from modelscope_hub.errors import HubError

    # Handed over at each call, for the client reads the variable only once.
    named = os.environ.get("MODELSCOPE_CACHE")
    cache = Path(named).expanduser() if named else None
    try:
        return whole(Path(snapshot_download(model_id, cache_dir=cache, local_files_only=True)))
    except (HubError, OSError, ValueError, utils.CourseError):  # not there, or not all of it
        return None


def whole(folder: Path) -> Path:
    """The folder of a model or an adapter, when all of its weights are there as safetensors.

    Raises:
        CourseError: pointers of Git LFS, no safetensors (a pickle may be there, which can run code when it is loaded
            and is not read), or fewer shards than the model's index names.
    """
    refuse_pointers(folder)
    if not any(folder.glob("*.safetensors")):
        raise utils.CourseError(
            say(
                "{folder}: no *.safetensors there. The course loads no other kind of weights.",
                folder=utils.shown(folder),
            )
        )
    index = folder / "model.safetensors.index.json"
    named = read_json(index).get("weight_map", {}).values() if index.is_file() else ()
    if missing := sorted(name for name in set(named) if not (folder / name).is_file()):
        raise utils.CourseError(
            say(
                "{folder}: its index names weights that are missing: {missing}. Run 02_download again; "
                "if that does not bring them, the hub lacks them.",
                folder=utils.shown(folder),
                missing=", ".join(missing),
            )
        )
    return folder


def pointers(folder: Path) -> list[str]:
    """The files of a folder that are pointers of Git LFS, as a clone without Git LFS leaves them."""
    found = []
    for path in sorted(folder.glob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found += [path.name] if file.read(len(LFS_POINTER)) == LFS_POINTER else []
    return found


def refuse_pointers(folder: Path) -> None:
    """Raise a CourseError where a folder holds pointers of Git LFS in the place of files."""
    if names := pointers(folder):
        shown = ", ".join(names[:3]) + (say(" and {count} more", count=len(names) - 3) if len(names) > 3 else "")
        raise utils.CourseError(
            say(
                "{folder}: {files}: pointers of Git LFS, not the files themselves. Run git lfs pull in that folder "
                "(git lfs install first), or fetch the model with 02_download.",
                folder=utils.shown(folder),
                files=shown,
            )
        )


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        CourseError: it cannot be read, is no JSON, or no object; the message names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:80]
        raise utils.CourseError(
            say(
                "{file} cannot be read as JSON ({reason}). Fetch this file again, with 02_download or git checkout.",
                file=utils.shown(path),
                reason=reason,
            )
        ) from None
    if not isinstance(found, dict):
        raise utils.CourseError(
            say(
                "{file} cannot be read as JSON ({reason}). Fetch this file again, with 02_download or git checkout.",
                file=utils.shown(path),
                reason=type(found).__name__,
            )
        )
    return found


def refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    """Raise a CourseError where a checkpoint is stored in FP8, AWQ, GPTQ or the like."""
    how = config.get("quantization_config") or config.get("compression_config")
    if how:
        method = how.get("quant_method") or how.get("format") or "?" if isinstance(how, dict) else "?"
        raise utils.CourseError(
            say(
                "{folder} is a quantised checkpoint ({method} in its config.json); "
                "LoRA is trained here on bf16 weights. "
                "Take ZhipuAI/GLM-4.5-Air: set COURSE_MODEL to that id, or to the folder that holds it.",
                folder=utils.shown(folder),
                method=method,
            )
        )


def template_of(folder: Path) -> str:
    """The chat template of a model's folder.

    Raises:
        CourseError: a file of the tokenizer, or the template, is missing.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise utils.CourseError(
                say(
                    "{folder}: {file} is missing. Fetch it with 02_download, or copy it from ZhipuAI/GLM-4.5-Air.",
                    folder=utils.shown(folder),
                    file=name,
                )
            )
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, each with its name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str):
        raise utils.CourseError(
            say(
                "{folder}: no chat template, neither chat_template.jinja nor in tokenizer_config.json. "
                "Copy chat_template.jinja from ZhipuAI/GLM-4.5-Air; a base model has none.",
                folder=utils.shown(folder),
            )
        )
    return template


def check_template(folder: Path) -> None:
    """Raise a CourseError where the chat template does not follow the rules that notebook 04 teaches."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = template_of(folder)
    for thinking, expected in RENDERED.items():
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            texts, _ = render_jinja_template(
                [CONVERSATION], chat_template=template, add_generation_prompt=True, **options
            )
            found = texts[0]
        except Exception as error:  # a template is a program, which may fail in any way
            found = f"{type(error).__name__}: {error}"
        if found != expected:
            first = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if len(set(pair)) > 1), 0)
            start = max(min(first, len(found)) - 12, 0)
            parts = {"found": found[start : first + 24], "expected": expected[start : first + 24]}
            raise utils.CourseError(
                say(
                    "{folder}: its chat template is not that of GLM-4.5-Air: {found!r} where {expected!r} is right. "
                    "Take chat_template.jinja of ZhipuAI/GLM-4.5-Air, the release of the weights.",
                    folder=utils.shown(folder),
                    **parts,
                )
            )


def check_ends(folder: Path) -> None:
    """Raise a CourseError where the tokens that end an answer are unknown, or are those of another release."""
    path = folder / "generation_config.json"
    if not path.is_file():
        raise utils.CourseError(
            say(
                "{folder}: generation_config.json is missing, so the tokens that end an answer are not known. "
                "Copy it from ZhipuAI/GLM-4.5-Air.",
                folder=utils.shown(folder),
            )
        )
    ids = read_json(path).get("eos_token_id")
    ids = set(ids if isinstance(ids, list) else [ids])
    known = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if known:
        place = {one["content"]: int(number) for number, one in known.items()}
    else:
        place = {one["content"]: one["id"] for one in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    if missing := [token for token in ENDS if place.get(token) not in ids]:
        raise utils.CourseError(
            say(
                "{folder}: generation_config.json does not end an answer at {tokens}, as GLM-4.5-Air does. "
                "Take generation_config.json and the tokenizer's files of one release, ZhipuAI/GLM-4.5-Air.",
                folder=utils.shown(folder),
                tokens=", ".join(missing),
            )
        )


def check(folder: Path) -> Path:
    """The folder, when it holds a model of the course's kind with all that training and answering read.

    Raises:
        CourseError: what does not fit, with the file and the fix.
    """
    refuse_pointers(folder)
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "glm4_moe")
    if kind != "glm4_moe":
        raise utils.CourseError(
            say(
                "{folder} is a {kind} model. The course is made for glm4_moe: template, layers, names.",
                folder=utils.shown(folder),
                kind=kind,
            )
        )
    refuse_quantised(folder, config)
    whole(folder)
    check_template(folder)
    check_ends(folder)
    return folder
