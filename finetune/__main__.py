"""The command line of the engine.

    python -m finetune plan --load-in-4bit               what a run needs, before anything is loaded
    python -m finetune train                             one process; the bundled model on a CPU
    python -m finetune train --load-in-4bit              GLM-4.5-Air on one 80 GB GPU
    torchrun --nproc-per-node 2 -m finetune train        two GPUs; each keeps half of the experts
    python -m finetune chat                              talk to the trained persona
    python -m finetune chat --adapter models/huanhuan-lora    the one that was trained for longer
    python -m finetune evaluate                          base and adapter on questions that were never trained on
    python -m finetune report                            a page of results; evaluates first if that was not done
    python -m finetune merge output/merged               the adapter into a checkpoint of the original's layout
    python -m finetune export gguf output/gguf           the persona for other engines; the forms: finetune/export.py
    python -m finetune share NAME/huanhuan               the adapter as a repository on ModelScope, with a model card

Each command has its own flags: `python -m finetune train --help`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import utils
from course.language import say

#: What other tools, and earlier versions of this one, call a flag.
OTHER_NAMES = {
    "--samples": "--batch-size",
    "--per-device-train-batch-size": "--batch-size",
    "--passes": "--gradient-accumulation-steps",
    "--grad-accum": "--gradient-accumulation-steps",
    "--bits": "--load-in-4bit",
    "--4bit": "--load-in-4bit",
    "--rank": "--lora-rank",
    "--lora-r": "--lora-rank",
    "--r": "--lora-rank",
    "--checkpointing": "--gradient-checkpointing",
    "--lr": "--learning-rate",
    "--steps": "--max-steps",
    "--num-train-epochs": "--epochs",
    "--output": "--output-dir",
    "--model": "COURSE_MODEL",
    "--plan": "the command plan",
    "--merge": "the command merge",
    "--export": "the command export",
    "--outtype": "--type",
    "--quantize": "--type",
}


#: The parsers of the commands: a flag that a command does not know is reported by the one above it.
COMMANDS: list[argparse.ArgumentParser] = []


class Parser(argparse.ArgumentParser):
    """argparse that names the right flag for a wrong one."""

    def error(self, message: str) -> NoReturn:
        """Print one message and the flag that was probably meant; status 2."""
        flags = [flag for one in (self, *COMMANDS) for action in one._actions for flag in action.option_strings]
        wrong = message.rpartition("unrecognized arguments: ")[2].split() if "unrecognized" in message else []
        meant = []
        for flag in (one.partition("=")[0] for one in wrong if one.startswith("-")):
            same = flag.replace("_", "-")
            near = OTHER_NAMES.get(same) or next(iter(difflib.get_close_matches(same, flags)), "")
            if near == flag:  # a flag of another command
                meant.append(say("This command has no {flag}.", flag=flag))
                continue
            meant += [say("For {flag} use {near}.", flag=flag, near=near)] if near else []
        advice = " ".join(meant) or say("--help lists all flags.")
        self.exit(2, f"{self.prog}: {message}. {advice}\n")


def above_0(text: str) -> int:
    """A whole number above 0, as argparse takes it."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def strength(text: str) -> float:
    """How much of an adapter's update is used, as argparse takes it: 0 is the base, 1 the adapter as trained."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 2")
    return value


def rate(text: str) -> float:
    """A learning rate, as argparse takes it: a number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value


def parser() -> Parser:
    """The commands and their flags; every default is what notebook 05 uses."""
    top = Parser("python -m finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output-dir", metavar="FOLDER", help="instead of COURSE_OUTPUT")
    common.add_argument("--load-in-4bit", action="store_true", help="weights in NF4, experts included")
    for name, text in (("plan", "say what a run needs and stop"), ("train", "train, or go on with an unfinished run")):
        one = commands.add_parser(name, help=text, parents=[common], **how)
        one.add_argument(
            "--batch-size", type=above_0, default=16, help="samples of one optimizer step, over all processes"
        )
        one.add_argument(
            "--gradient-accumulation-steps", type=above_0, default=1, help="passes that a step is split into"
        )
        one.add_argument("--lora-rank", type=above_0, default=8, help="lora_alpha is 4 times this")
        one.add_argument("--attention-only", action="store_true", help="LoRA on attention, 3 %% of the parameters")
        one.add_argument("--epochs", type=above_0, help="2 for a small model, 3 for a large one; more to make 60 steps")
        one.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps, whatever the epochs")
        one.add_argument("--learning-rate", type=rate, help="4e-3 for a small model, 1e-4 for a large one")
        flag = {"action": argparse.BooleanOptionalAction}
        one.add_argument("--gradient-checkpointing", **flag, help="for a large model, in batches that need it")
        one.add_argument("--recorded-steps", **flag, help="a CUDA graph a step, for up to 32 samples on one GPU")
        one.add_argument("--save-steps", type=above_0, default=50)
        one.add_argument("--seed", type=int, default=42)
    another = argparse.ArgumentParser(add_help=False)
    another.add_argument(
        "--adapter", default="", metavar="FOLDER", help="of another training, as models/huanhuan-lora; else your own"
    )
    one = commands.add_parser("chat", help="talk to the trained persona", parents=[common, another], **how)
    one.add_argument("--history", action=argparse.BooleanOptionalAction, default=True, help="keep earlier turns")
    one.add_argument(
        "--beams", type=above_0, help="1: greedy; more: beam search. 4 for a small model, 1 for a large one"
    )
    one.add_argument("--strength", type=strength, help="multiplies the adapter's update. 0.7 for a small model, else 1")
    evaluated, reported = "base and adapter on questions never trained on", "write a page of results"
    for name, text, parents in (("evaluate", evaluated, [common, another]), ("report", reported, [common])):
        one = commands.add_parser(name, help=text, parents=parents, **how)
        one.add_argument("--rows", type=above_0, help="of each set; 96 for a small model, 32 for a large one")
    merged = "write the checkpoint with the adapter merged"
    one = commands.add_parser("merge", help=merged, parents=[common, another], **how)
    one.add_argument("folder", help="a new folder for the merged checkpoint")
    one = commands.add_parser("export", help="write the persona for other engines", parents=[common, another], **how)
    one.add_argument(
        "form", choices=("adapter", "split", "merged", "gguf", "gguf-merged"), help="notebook 09 has a table"
    )
    one.add_argument("folder", help="a new folder")
    one.add_argument("--type", choices=("f32", "f16", "bf16", "q8_0"), default="f16", help="numbers in a GGUF file")
    one.add_argument("--strength", type=strength, default=1.0, help="multiplies the adapter's update, as in chat")
    one = commands.add_parser("share", help="upload the adapter with a model card to ModelScope", **how)
    one.add_argument("name", help="the repository: your name there, a slash, the adapter's name")
    one.add_argument("--public", action="store_true", help="everybody may see it; else only you")
    one.add_argument("--license", default="", help="an SPDX identifier; else that of the course's rows")
    one.add_argument("--output-dir", metavar="FOLDER", help="instead of COURSE_OUTPUT")
    COMMANDS[:] = commands.choices.values()
    return top


def options_of(chosen: argparse.Namespace) -> object:
    """The command line as `train.Options`."""
    from finetune.config import ALL_GROUPS
    from finetune.planner import Recipe
    from finetune.train import Options

    recipe = Recipe(
        batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.gradient_accumulation_steps,
        lora_rank=chosen.lora_rank,
        groups=("attention",) if chosen.attention_only else ALL_GROUPS,
        load_in_4bit=chosen.load_in_4bit,
        max_steps=chosen.max_steps,
    )
    names = ("epochs", "gradient_checkpointing", "recorded_steps", "learning_rate")
    given = {name: getattr(chosen, name) for name in names}
    return Options(recipe, **given, save_steps=chosen.save_steps, seed=chosen.seed)


def run(chosen: argparse.Namespace) -> None:
    """Run the chosen command."""
    from finetune import chat, train

    if chosen.command == "train":
        train.train(options_of(chosen))
    elif chosen.command == "chat":
        chat.chat(chosen.load_in_4bit, chosen.history, chosen.beams, chosen.strength, chosen.adapter)
    elif chosen.command == "evaluate":
        from finetune import evaluate

        evaluate.evaluate(chosen.load_in_4bit, chosen.rows, chosen.adapter)
    elif chosen.command == "report":
        from finetune import report

        report.report(chosen.load_in_4bit, chosen.rows)
    elif chosen.command == "plan":
        course = utils.settings()
        there = (course.output / "tokens" / "made_from.json").is_file()
        if not there:
            print(say("No tokens of notebook 04 yet: planned for 3,729 rows of 61 tokens, a third of them labels."))
        print(train.make_plan(options_of(chosen), train.tokenized(course) if there else None).text())
    elif chosen.command == "export":
        from finetune import export

        how = {"strength": chosen.strength, "adapter": chosen.adapter}
        count = export.export(chosen.form, Path(chosen.folder), utils.settings(), chosen.type, **how)
        print(say("{count:,} tensors; in {folder}", count=count, folder=utils.shown(chosen.folder)))
    elif chosen.command == "share":
        from finetune import share

        print(share.share(chosen.name, utils.settings(), chosen.public, chosen.license))
    else:
        from finetune import export

        count = export.export("merged", Path(chosen.folder), utils.settings(), adapter=chosen.adapter)
        print(
            say(
                "{count:,} tensors changed; the checkpoint is in {folder}",
                count=count,
                folder=utils.shown(chosen.folder),
            )
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; a foreseeable mistake ends in one message and status 1."""
    chosen = parser().parse_args(arguments)
    if chosen.output_dir:
        os.environ["COURSE_OUTPUT"] = str(Path(chosen.output_dir).absolute())
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # packed rows differ in length
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for harmless in ("(rank|alpha)_pattern keys", "`is_gradient_checkpointing` is deprecated", "'pin_memory' argument"):
        warnings.filterwarnings("ignore", message=f".*{harmless}")
    try:
        utils.start()  # before torch is imported
        run(chosen)
    except utils.CourseError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(say("finetune: stopped"), file=sys.stderr)
        return 130
    finally:
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
