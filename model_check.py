"""Whether a folder holds the model that the course is made for, before it is used: one message for what does not fit.

Reads the small files and the first bytes of the large ones, never the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import utils
from language import say

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
        message = (
            "{folder}: {files}: pointers of Git LFS, not the files themselves. Run git lfs pull in that folder "
            "(git lfs install first), or fetch the model with 02_download."
        )
        raise utils.CourseError(say(message, folder=utils.shown(folder), files=shown))


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        CourseError: it cannot be read, is no JSON, or no object; the message names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = "{file} cannot be read as JSON ({reason}). Fetch this file again, with 02_download or git checkout."
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:80]
        raise utils.CourseError(say(message, file=utils.shown(path), reason=reason)) from None
    if not isinstance(found, dict):
        message = "{file} cannot be read as JSON ({reason}). Fetch this file again, with 02_download or git checkout."
        raise utils.CourseError(say(message, file=utils.shown(path), reason=type(found).__name__))
    return found


def refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    """Raise a CourseError where a checkpoint is stored in FP8, AWQ, GPTQ or the like."""
    how = config.get("quantization_config") or config.get("compression_config")
    if how:
        method = how.get("quant_method") or how.get("format") or "?" if isinstance(how, dict) else "?"
        message = (
            "{folder} is a quantised checkpoint ({method} in its config.json); LoRA is trained here on bf16 weights. "
            "Take ZhipuAI/GLM-4.5-Air: set COURSE_MODEL to that id, or to the folder that holds it."
        )
        raise utils.CourseError(say(message, folder=utils.shown(folder), method=method))


def template_of(folder: Path) -> str:
    """The chat template of a model's folder.

    Raises:
        CourseError: a file of the tokenizer, or the template, is missing.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            message = "{folder}: {file} is missing. Fetch it with 02_download, or copy it from ZhipuAI/GLM-4.5-Air."
            raise utils.CourseError(say(message, folder=utils.shown(folder), file=name))
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, each with its name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str):
        message = (
            "{folder}: no chat template, neither chat_template.jinja nor in tokenizer_config.json. "
            "Copy chat_template.jinja from ZhipuAI/GLM-4.5-Air; a base model has none."
        )
        raise utils.CourseError(say(message, folder=utils.shown(folder)))
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
            message = (
                "{folder}: its chat template is not that of GLM-4.5-Air: {found!r} where {expected!r} is right. "
                "Take chat_template.jinja of ZhipuAI/GLM-4.5-Air, the release of the weights."
            )
            parts = {"found": found[start : first + 24], "expected": expected[start : first + 24]}
            raise utils.CourseError(say(message, folder=utils.shown(folder), **parts))


def check_ends(folder: Path) -> None:
    """Raise a CourseError where the tokens that end an answer are unknown, or are those of another release."""
    path = folder / "generation_config.json"
    if not path.is_file():
        message = (
            "{folder}: generation_config.json is missing, so the tokens that end an answer are not known. "
            "Copy it from ZhipuAI/GLM-4.5-Air."
        )
        raise utils.CourseError(say(message, folder=utils.shown(folder)))
    ids = read_json(path).get("eos_token_id")
    ids = set(ids if isinstance(ids, list) else [ids])
    known = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if known:
        place = {one["content"]: int(number) for number, one in known.items()}
    else:
        place = {one["content"]: one["id"] for one in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    if missing := [token for token in ENDS if place.get(token) not in ids]:
        message = (
            "{folder}: generation_config.json does not end an answer at {tokens}, as GLM-4.5-Air does. "
            "Take generation_config.json and the tokenizer's files of one release, ZhipuAI/GLM-4.5-Air."
        )
        raise utils.CourseError(say(message, folder=utils.shown(folder), tokens=", ".join(missing)))


def check(folder: Path) -> Path:
    """The folder, when it holds a model of the course's kind with all that training and answering read.

    Raises:
        CourseError: what does not fit, with the file and the fix.
    """
    refuse_pointers(folder)
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "glm4_moe")
    if kind != "glm4_moe":
        message = "{folder} is a {kind} model. The course is made for glm4_moe: template, layers, names."
        raise utils.CourseError(say(message, folder=utils.shown(folder), kind=kind))
    refuse_quantised(folder, config)
    utils.whole(folder)
    check_template(folder)
    check_ends(folder)
    return folder
