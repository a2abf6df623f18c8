"""The adapter as a repository of its own on ModelScope: a model card made from the run, and the upload.

    python -m finetune share OWNER/NAME            private; --public lets everybody see it

The token comes from the variable MODELSCOPE_API_TOKEN, from `modelscope login`, or from a hidden prompt.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from getpass import getpass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

import utils
from course.language import say, translated
from course.swanlab_record import somebody_can_answer
from finetune import export
from finetune.evaluate import FILE as EVALUATION

#: The environment variable that may hold the token.
VARIABLE = "MODELSCOPE_API_TOKEN"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Run:
    """What the card says of a run; what is not known is empty.

    Attributes:
        base: the model that the adapter belongs to. system: the prompt of training. numbers: of the adapter.
        made_with: settings of the training. losses: of each validation set, before and after.
        measured: a line for each test set: its name, rows, and loss and share that stop, of base and adapter.
        examples: a question, the base's answer and the adapter's, of each test set with one turn.
    """

    base: str
    system: str
    rank: int
    alpha: float
    numbers: int
    own_data: str
    made_with: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    measured: list[tuple[str, int, dict[str, float], dict[str, float]]] = field(default_factory=list)
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, course: utils.Settings) -> Run:
        """What notebook 05 or the command `train` has left, and notebook 06's or `evaluate`'s figures, if any.

        Raises:
            CourseError: nothing trained yet, or an adapter that holds nothing.
        """
        trained = export.Trained.of(course)
        run_folder = trained.adapter.parent
        settings = _json(trained.adapter / "adapter_config.json")
        log = newest_log(run_folder)
        losses: dict[str, tuple[float, float]] = {}
        for entry in _json(log)["log_history"] if log else []:
            for name, loss in entry.items():
                if found := re.fullmatch(r"eval_(\w+)_loss", name):
                    first, _ = losses.get(found[1], (loss, loss))
                    losses[found[1]] = (first, loss)
        with safe_open(trained.adapter / "adapter_model.safetensors", "pt") as file:
            numbers = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        return cls(
            base=settings["base_model_name_or_path"],
            system=json.loads(trained.prompt)["system"],
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            numbers=numbers,
            own_data="" if course.default_data else course.data.name,
            made_with=_json(run_folder / "checkpoints" / "made_from.json"),
            losses=losses,
            measured=_figures(course),
            examples=[
                (row["asked"][-1]["content"], row["base"], row["adapter"])
                for one in _json(course.output / EVALUATION).get("sets", {}).values()
                for row in one["answers"][:2]
                if len(row["asked"]) == 1
            ],
        )


def newest_log(run_folder: Path) -> Path | None:
    """The `trainer_state.json` of the newest checkpoint; None if there is none."""
    logs = run_folder.glob("checkpoints/*/trainer_state.json")
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def _figures(course: utils.Settings) -> list[tuple[str, int, dict[str, float], dict[str, float]]]:
    """`Run.measured` from what `evaluate` has left, else from notebook 06 (which does not note how many rows)."""
    if sets := _json(course.output / EVALUATION).get("sets"):
        return [(name, one["rows"], one["base"], one["adapter"]) for name, one in sets.items()]
    sets = _json(course.output / "report.json").get("heldout", {})
    return [(name, 0, *({"loss": one[0], "stops": one[1]} for one in pair)) for name, pair in sets.items()]


def _json(path: Path) -> dict[str, Any]:
    """A JSON file; an empty dictionary if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def card(run: Run, name: str, licence: str) -> str:
    """The README of the repository: what it is, how it is loaded, what it was trained on, and what was measured.

    Args:
        name: of the repository. licence: an identifier of SPDX for the adapter.
    """
    front = {"base_model": run.base, "base_model_relation": "adapter", "library_name": "peft", "license": licence}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items())]
    lines += [
        "pipeline_tag: text-generation",
        "tags:",
        "- lora",
        "- role-play",
        "- glm4_moe",
        "---",
        "",
        f"# {name}",
        "",
    ]
    about = {"numbers": f"{run.numbers:,}", "base": run.base, "rank": run.rank, "alpha": run.alpha}
    lines += [
        say("A LoRA adapter for `{base}`: {numbers} numbers, rank {rank}, lora_alpha {alpha}.", **about),
        "",
        say("It was trained under this system prompt, with thinking off. Ask with the same, or it is not the persona:"),
        *("", "```text", run.system, "```", ""),
        *_loading(run, name),
        *_training(run),
        *_measured(run),
    ]
    limits = say("It plays a person of fiction. It may say what is wrong, also about that fiction.")
    return "\n".join([*lines, "## " + say("Limits"), "", limits, ""])


def _loading(run: Run, name: str) -> list[str]:
    """How three engines load it."""
    python = f"""from modelscope import snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{run.base}", dtype="bfloat16", device_map="auto")
model = PeftModel.from_pretrained(base, snapshot_download("{name}"))"""
    split = "python -m finetune export split output/split\n"
    split += f"vllm serve {run.base} --enable-lora --max-lora-rank {run.rank} --lora-modules persona=output/split"
    gguf = "python -m finetune export gguf output/gguf\n"
    gguf += "llama-server -m output/gguf/base.gguf --lora output/gguf/adapter.gguf --jinja"
    lines = ["## " + say("How to load it"), "", "transformers, peft:", "", "```python", python, "```", ""]
    lines += [say("Other engines want another form, which the course that made this adapter writes:"), ""]
    return [*lines, "llama.cpp:", "", "```bash", gguf, "```", "", "vLLM:", "", "```bash", split, "```", ""]


def _training(run: Run) -> list[str]:
    """Data and settings of the training."""
    lines = ["## " + say("How it was trained"), ""]
    data = run.own_data or "huanhuan.json, conversations.jsonl (CC BY 4.0)"
    known = {"data": data, "rows": run.made_with.get("rows"), "epochs": run.made_with.get("epochs")}
    known["batch size"] = run.made_with.get("batch_size", run.made_with.get("batch"))
    known |= {key: run.made_with.get(key) for key in ("learning_rate", "scheduler", "warmup", "seed")}
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in known.items() if value is not None), ""]
    if run.losses:
        lines += [
            "| " + say("validation set") + " | " + say("loss before") + " | " + say("after") + " |",
            "|---|---:|---:|",
        ]
        lines += [
            f"| {translated(name.replace('_', ' '))} | {a:.3f} | {b:.3f} |" for name, (a, b) in run.losses.items()
        ]
        lines.append("")
    return lines


def _measured(run: Run) -> list[str]:
    """Figures of base and adapter on questions that were never trained on."""
    lines = ["## " + say("Measured"), ""]
    if not run.measured:
        return [*lines, say("Not measured: `python -m finetune evaluate` does it, then this card is made again."), ""]
    counted = any(rows for _, rows, *_ in run.measured)
    head = [say("set"), *([say("questions")] if counted else []), say("loss, nats a token"), say("stops by itself")]
    lines += [say("Base and adapter, both with the prompt above, greedy decoding:"), ""]
    lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, rows, base, adapter in run.measured:
        figures = [f"{base[key]:{form}} → {adapter[key]:{form}}" for key, form in (("loss", ".2f"), ("stops", ".0%"))]
        lines.append("| " + " | ".join((translated(name), *([str(rows)] if counted else []), *figures)) + " |")
    if run.examples:
        lines += ["", "| " + " | ".join((say("question"), say("base"), say("adapter"))) + " |", "|---|---|---|"]
        lines += ["| " + " | ".join(map(_cell, example)) + " |" for example in run.examples]
    return [*lines, ""]


def _cell(text: str) -> str:
    """A text in a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def write_folder(course: utils.Settings, folder: Path, name: str, licence: str) -> list[str]:
    """Write what is uploaded into a new folder: the adapter as peft saved it, its prompt, and the card.

    Returns:
        The names of the files.

    Raises:
        CourseError: nothing trained yet, or whatever `export.export` finds wrong.
    """
    export.export("adapter", folder, course, report=lambda _: None)
    (folder / "README.md").write_text(card(Run.of(course), name, licence), encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


def found_token() -> str:
    """ModelScope's token: of the variable, of `modelscope login`, or typed into a hidden prompt; never shown.

    Raises:
        CourseError: there is none, and nobody can answer.
    """
    from modelscope_hub.config import HubConfig

    token = os.environ.get(VARIABLE) or HubConfig().token or ""
    if not token and (somebody_can_answer() or sys.stdin.isatty()):
        token = getpass(say("ModelScope token (hidden): ")).strip()
    if not token:
        raise utils.CourseError(
            say("No token for ModelScope. Set {variable}, or run modelscope login once.", variable=VARIABLE)
        )
    return token


def licence_of(course: utils.Settings) -> str:
    """The licence of an adapter: the bundled model's, else that of the course's rows; rows of your own: `other`."""
    if not course.default_data:
        return "other"
    return "cc-by-sa-4.0" if course.bundled else "cc-by-4.0"


def upload(
    folder: Path, name: str, token: str, public: bool = False, licence: str = "other", endpoint: str | None = None
) -> str:
    """Create the repository on ModelScope unless it is there, and upload the folder with ModelScope's own client.

    Args:
        licence: as in the card. endpoint: another address of the hub, for a hub on this machine.

    Returns:
        The repository's address.

    Raises:
        CourseError: a name that is none, a token that is refused, no way to the hub, or files that did not arrive.
    """
    from modelscope import HubApi
    from modelscope_hub.errors import AlreadyExistsError

    if not REPOSITORY.fullmatch(name):
        raise utils.CourseError(say("{name!r} is no repository. Write OWNER/NAME, your name there first.", name=name))
    api = HubApi(endpoint=endpoint, token=token)
    with _one_message(name, token):
        with suppress(AlreadyExistsError):
            api.create_model(name, visibility=5 if public else 1, license=licence)
        api.upload_folder(name, folder_path=str(folder), use_cache=False, disable_tqdm=True)
    return f"{api.endpoint}/models/{name}"


@contextmanager
def _one_message(name: str, token: str) -> Any:
    """Keep the client's report and log to itself; whatever goes wrong becomes one message without the token."""
    reasons: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                reasons.append(record.getMessage())

    client = logging.getLogger("modelscope_hub.upload")
    note, before, passed_on = Note(), list(client.handlers), client.propagate
    client.handlers, client.propagate = [note], False
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        reason = " ".join((reasons[0] if reasons else str(error)).split())
        if "[401]" in reason or "[403]" in reason or "login first" in reason:
            said = say(
                "{name}: not uploaded. The hub does not take the token. Check {variable}, or run modelscope login.",
                name=name,
                variable=VARIABLE,
            )
            raise utils.CourseError(said) from None
        if isinstance(error, ConnectionError):
            said = say(
                "{name}: not uploaded. The hub does not answer. Check the network, and the proxy if there is one.",
                name=name,
            )
            raise utils.CourseError(said) from None
        reason = reason.partition(" Request:")[0].replace(token, "***")[:160]
        raise utils.CourseError(say("{name}: not uploaded. {reason}", name=name, reason=reason)) from None
    finally:
        client.handlers, client.propagate = before, passed_on


def share(name: str, course: utils.Settings, public: bool = False, licence: str = "") -> str:
    """Make the folder with its card, and upload it.

    Args:
        licence: of the adapter; empty, that of `licence_of`.

    Returns:
        The repository's address.
    """
    token, licence = found_token(), licence or licence_of(course)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        write_folder(course, folder, name, licence)
        return upload(folder, name, token, public, licence)
