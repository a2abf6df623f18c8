"""A page of results, once after training: `python -m finetune report` writes `output/report/README.md`.

    python -m finetune report --load-in-4bit         GLM-4.5-Air on one 80 GB GPU

All figures come from the files of the run, of `evaluate` and of `tools/judging.py`; what no file holds is said as not
measured. The machine is the one that writes the page.
"""

from __future__ import annotations

import errno
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import torch

import utils
from course import plots
from course.language import gloss, marked, say, translated
from finetune import evaluate, export, share
from finetune.config import active_parameters, mtp_layer_prefix, parameters, tensors
from finetune.machine import GIB

FOLDER, JUDGED = "report", "judged.json"
EXAMPLES = 2  # answers of each set that are shown: the first ones, so that nobody chooses
#: What is compared, and the names that `evaluation.json` may give to it. Base and adapter have the system prompt.
CONDITIONS = {name: (key, name) for key, name in evaluate.CONDITIONS.items()}
#: The sets of `evaluation.json` and of `judged.json`, for the translation.
SETS = (marked("situations"), marked("wordings"), marked("second turns"), marked("third turns"))
#: What the judging takes, from the questions to the table.
JUDGING = """python tools/judging.py ask {folder}/answers.json
python tools/judging.py sheet {folder}/answers.json {folder}/sheet.jsonl
python tools/judging.py result {folder}/answers.json MARKS MARKS > {folder}/judged.json"""


@dataclass(frozen=True)
class Measured:
    """One set of `evaluation.json`.

    Attributes:
        figures: condition to its loss and shares. examples: turns, the reference, and condition to its answer. What
            was not measured is not there.
    """

    rows: int
    figures: dict[str, dict[str, float]]
    examples: list[tuple[list[dict[str, str]], str, dict[str, str]]]

    @classmethod
    def of(cls, one: dict[str, Any]) -> Measured:
        """From a set as `evaluate` writes it, today or before it asked without a prompt."""
        keys = {name: next((key for key in known if key in one), "") for name, known in CONDITIONS.items()}
        keys = {name: key for name, key in keys.items() if key}
        figures = {
            name: {figure: float(one[key][figure]) for figure in ("loss", "stops", "equal") if figure in one[key]}
            for name, key in keys.items()
        }
        examples = [
            (row["asked"], row["reference"], {name: row[key] for name, key in keys.items() if key in row})
            for row in one["answers"][:EXAMPLES]
        ]
        _ = [turn["role"] + turn["content"] for turns, *_ in examples for turn in turns]  # raises if one is no turn
        return cls(int(one["rows"]), figures, examples)


def read(path: Path, take: Callable[[Any], Any]) -> Any:
    """What `take` makes of a JSON file.

    Raises:
        CourseError: the file is no JSON, or does not hold what `take` looks for.
    """
    try:
        return take(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise utils.CourseError(
            say(
                "{file} is damaged or has another layout. Delete it, then run python -m finetune report again.",
                file=utils.shown(path),
            )
        ) from None


# ------------------------------------------------------------------------------------------------------- Markdown


def cell(text: str) -> str:
    """A text, such as an answer, in a Markdown table: it is shown as it is, and nothing in it works."""
    escaped = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(text.strip(), quote=False))
    return "<br>".join(escaped.splitlines())


def with_gloss(text: str) -> str:
    """The same with its English below it, in an English page and where the course knows it."""
    return cell(text) + (f"<br>*{cell(meant)}*" if (meant := gloss(text)) else "")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int = 0) -> list[str]:
    """A Markdown table whose last `numbers` columns are aligned right; None is said as not measured."""
    line = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    said = [[say("not measured") if one is None else str(one) for one in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (list(head), line, *said)] + [""]


# ------------------------------------------------------------------------------------------------------- sections


def machine() -> list[str]:
    """GPUs, memory and packages of the machine that writes the page."""
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = Counter(f"{card.name}, {card.total_memory / GIB:.1f} GiB" for card in cards)
    here = utils.machine()
    rows = [("GPU", "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or say("none"))]
    rows += [(say("cores"), f"{here['cores']:.0f}"), (say("memory"), f"{here['memory_gib']:.1f} GiB")]
    rows += [("torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ""))]
    rows += [(name, metadata.version(name)) for name in ("transformers", "peft")]
    about = say("This machine wrote the page. The files of a run do not name the machine that trained or evaluated.")
    return ["## " + say("Machine"), "", about, "", *table(("", ""), rows)]


def model(run: share.Run, config: Any, facts: dict[str, Any]) -> list[str]:
    """Parameter counts of base and adapter, counted from `config.json` and from the adapter's file."""
    mtp = mtp_layer_prefix(config)
    total = sum(prod(shape) for name, shape, _ in tensors(config) if not name.startswith(mtp))
    weights = {True: "4 bits (NF4)", False: say("not quantized")}
    rows = [
        (say("model"), f"`{run.base}`"),
        (say("parameters, without the MTP layer"), f"{total:,}"),
        (say("of these in routed experts"), f"{parameters(config)['routed']:,}"),
        (say("parameters of the layers that one token is multiplied with"), f"{active_parameters(config):,.0f}"),
        (say("parameters of the LoRA adapter"), f"{run.numbers:,} ({run.numbers / total:.2%})"),
        (say("weights of the base during the evaluation"), weights.get(facts.get("load_in_4bit"))),
    ]
    return ["## " + say("Model"), "", *table(("", ""), rows)]


def data(run: share.Run, course: utils.Settings) -> list[str]:
    """The data file and how many rows were trained on and held out."""
    held_out: dict[str, int | None] = {}
    for name in ("new_wordings", "new_answers"):
        path = course.output / "rows" / f"{name}.json"
        held_out[name] = read(path, len) if path.is_file() else None
    source = run.own_data or "huanhuan.json, conversations.jsonl"
    rows = [(say("data"), f"`{source}`"), (say("training rows"), run.made_with.get("rows"))]
    rows += [(say("validation rows: {name}", name=translated(n.replace("_", " "))), c) for n, c in held_out.items()]
    return ["## " + say("Data"), "", *table(("", ""), rows)]


def training(run: share.Run, state: dict[str, Any], picture: utils.Shown | None) -> list[str]:
    """All settings, the picture of the losses, and each validation loss at the first and the last evaluation."""
    history = state.get("log_history", [])
    settings = run.made_with or {"rank": run.rank, "alpha": run.alpha}
    rows = [(f"`{key}`", ", ".join(value) if isinstance(value, list) else value) for key, value in settings.items()]
    steps = say("{done} of {all}", done=state["global_step"], all=state["max_steps"]) if state else None
    seconds = next((f"{row['train_runtime']:.0f} s" for row in history if "train_runtime" in row), None)
    rows += [(say("optimizer steps"), steps), (say("time of the training"), seconds)]
    lines = ["## " + say("Training"), "", *table((say("setting"), ""), rows)]
    if not picture:
        return [*lines, say("Losses during the training: not measured, since no checkpoint with a log is there."), ""]
    losses: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for key, value in row.items():
            if found := re.fullmatch(r"(?:eval_(\w+)_)?loss", key):
                losses.setdefault((found[1] or marked("training")).replace("_", " "), []).append((row["step"], value))
    head = [say("loss, nats a token"), say("first"), say("step"), say("last"), say("step"), say("lowest"), say("step")]
    rows = []
    for name, curve in losses.items():
        three = (curve[0], curve[-1], min(curve, key=lambda point: point[1]))
        rows.append((translated(name), *(part for step, loss in three for part in (f"{loss:.3f}", step))))
    return [*lines, f"![{picture.text}](losses.png)", "", *table(head, rows, 6)]


def measured(run: share.Run, sets: dict[str, Measured], picture: utils.Shown | None) -> list[str]:
    """Losses and shares of no prompt, prompt only and LoRA on each set."""
    about = say(
        "No prompt is the base without a system prompt. Prompt only is the base with the system prompt of the "
        "training. LoRA is the base with the adapter and the same system prompt. All answer by greedy decoding with "
        "thinking off."
    )
    lines = ["## " + say("Measured on questions that were never trained on"), "", about, ""]
    lines += [say("The system prompt:"), "", f"> {cell(run.system)}", ""]
    head = [say("set"), say("condition"), say("questions"), say("loss, nats a token")]
    rows = []
    for name, one in sets.items():
        for condition in CONDITIONS:
            found = one.figures.get(condition, {})
            loss = f"{found['loss']:.3f}" if "loss" in found else None
            shares = (f"{found[key]:.1%}" if key in found else None for key in ("stops", "equal"))
            rows.append((translated(name), translated(condition), one.rows, loss, *shares))
    lines += [f"![{picture.text}](measured.png)", ""] if picture else []
    return [*lines, *table([*head, say("stops by itself"), say("equals the reference")], rows, 4)]


def answers(sets: dict[str, Measured]) -> list[str]:
    """The first questions of each set with the answers side by side."""
    about = say("The first {count} questions of each set with the whole answers.", count=EXAMPLES)
    lines = ["## " + say("Answers side by side"), "", about, ""]
    head = (say("question"), say("reference"), *map(translated, CONDITIONS))
    for name, one in sets.items():
        rows = []
        for turns, reference, said in one.examples:
            asked = [(turn["role"], with_gloss(turn["content"])) for turn in turns]
            speaker = {"user": say("question: "), "assistant": say("answer: ")}
            texts = [(speaker.get(role, f"{role}: ") if len(asked) > 1 else "") + text for role, text in asked]
            given = (with_gloss(said[condition]) if condition in said else None for condition in CONDITIONS)
            rows.append(("<br>".join(texts), with_gloss(reference), *given))
        lines += [f"### {translated(name)}", "", *table(head, rows)]
    return lines


def not_judged(output: Path) -> list[str]:
    """That nobody has judged the answers, and how that is done."""
    folder = utils.shown(output) if output.is_relative_to(utils.ROOT) else "$COURSE_OUTPUT"
    about = say("Not measured: nobody has judged the answers of this adapter. These commands and two readers do it:")
    return ["## " + say("Judged answers"), "", about, "", "```bash", JUDGING.format(folder=folder), "```", ""]


def judged(found: dict[str, Any]) -> list[str]:
    """What readers said of the answers, from what `tools/judging.py result` prints."""
    names = {key: name for name, keys in CONDITIONS.items() for key in keys}
    readers = sorted({key for row in found["shares"] for key in row if key.startswith("reader_")})
    head = [say("set"), say("author"), say("answers"), *(say("reader {n}", n=one[7:]) for one in readers), say("both")]
    rows = []
    for row in found["shares"]:
        author, comma, more = row["author"].partition(",")
        shares = [f"{row[key]:.0%}" if key in row else None for key in (*readers, "both")]
        name = translated(row["set"].replace("_", " "))
        rows.append((name, translated(names.get(author, author)) + comma + more, row["answers"], *shares))
    about = say("The share of answers that a reader called good. The readers did not see who gave an answer.")
    agreed = {"agreement": found["agreement"], "kappa": found["kappa"]}
    kappa = say("The readers agree on {agreement:.0%} of the answers; Cohen's kappa is {kappa:.2f}.", **agreed)
    return ["## " + say("Judged answers"), "", about, kappa, "", *table(head, rows, 2 + len(readers))]


# ----------------------------------------------------------------------------------------------------- the command


def report(load_in_4bit: bool = False, most: int | None = None) -> Path:
    """Evaluate if that was not done since the training, then write the page and its pictures.

    Args:
        load_in_4bit, most: as `evaluate.evaluate`, used only when it has to run.

    Returns:
        The page. An older one is kept in `report-previous`.

    Raises:
        CourseError: nothing trained yet, a damaged file, or a folder that cannot be written.
    """
    course = utils.settings()
    config, run_folder = export.Trained.of(course).config, course.output / "lora"
    trained = (run_folder / "adapter" / "adapter_model.safetensors").stat().st_mtime
    evaluation, judgement = course.output / evaluate.FILE, course.output / JUDGED
    if not evaluation.is_file() or evaluation.stat().st_mtime < trained:
        try:
            evaluate.evaluate(load_in_4bit, most)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise utils.not_written(course.output, error) from None
    facts = read(evaluation, dict)
    sets = read(evaluation, lambda facts: {name: Measured.of(one) for name, one in facts["sets"].items()})
    log = share.newest_log(run_folder)
    state = read(log, lambda state: state | {"log_history": list(state["log_history"])}) if log else {}
    readable = judgement.is_file() and judgement.stat().st_mtime >= trained  # else they judged an older adapter
    verdict = read(judgement, judged) if readable else not_judged(course.output)
    run = share.Run.of(course)
    with utils.remake(course.output / FOLDER, course) as new:
        losses = plots.loss_picture(state["log_history"]) if state else None
        by_set = {name: {one: found["loss"] for one, found in each.figures.items()} for name, each in sets.items()}
        figures = plots.bar_picture(by_set) if by_set else None
        for name, picture in (("losses.png", losses), ("measured.png", figures)):
            if picture:
                (new / name).write_bytes(picture.png)
        parts = [*machine(), *model(run, config, facts), *data(run, course), *training(run, state, losses)]
        parts += [*measured(run, sets, figures), *answers(sets), *verdict]
        used = [run_folder / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        used += [run_folder / "checkpoints" / "made_from.json", log, evaluation, judgement if readable else None]
        files = [f"- `{utils.shown(path)}`" for path in used if path and path.is_file()]
        title = "# " + say("Results of a run: {model}", model=run.base)
        about = say("Written by `python -m finetune report`. A figure that is in no file of the run is not measured.")
        parts += ["## " + say("Files that the numbers come from"), "", *files, ""]
        (new / "README.md").write_text("\n".join([title, "", about, "", *parts]), encoding="utf-8")
    page = course.output / FOLDER / "README.md"
    print(say("page of results in {file}", file=utils.shown(page)))
    return page
