"""What a training run needs to outlive a killed process, an interrupt and a full disk, and to go on afterwards.

For notebook 05 and the command: who may write the folder of a run, which checkpoint is whole, and a clean stop.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

import utils
from course.language import say
from course.model_folder import whole

#: How safetensors and Python say that the disk or its quota is full, and how torch says that a file came out short.
FULL_DISK = re.compile(
    r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed|\bunexpected pos \d+ vs"
)


#: The lock of each claimed folder; None where the file system knows no locks.
_claimed: dict[Path, Any] = {}


def claim(run_folder: Path) -> None:
    """Take the run's folder for this process, until `release` or the process's end, however it ends.

    Raises:
        CourseError: another kernel or command trains into it.
    """
    if run_folder in _claimed:
        return
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = utils.locked(run_folder.parent / f".{run_folder.name}.lock", seconds=0)
    except Timeout:
        raise utils.CourseError(
            say(
                "Another kernel trains into {folder}. Shut that kernel down (Running Terminals and Kernels), "
                "or set COURSE_OUTPUT to a folder of your own.",
                folder=utils.shown(run_folder),
            )
        ) from None
    _claimed[run_folder] = lock


def release(run_folder: Path) -> None:
    """Give a claimed folder free; nothing happens where it was not claimed."""
    if lock := _claimed.pop(run_folder, None):
        lock.release()


def written_to_its_end(checkpoint: Path) -> bool:
    """Whether a checkpoint holds all that resuming reads, each file at its full length."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # `Trainer` writes it last
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, "np"):  # compares the header with the file's length
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # What torch saves is a zip, whose directory comes last. Without an optimiser, `Trainer` starts a new one silently.
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    return len(states) > 2 and all(zipfile.is_zipfile(state) for state in states)


def newest_checkpoint(folder: Path, delete: bool = True) -> str | None:
    """The newest checkpoint that was written to its end; those that were not are deleted, and said.

    Only one process may ask, and only while none writes: `found_by_first` and `kept_checkpoint` see to that.
    `Trainer` writes a checkpoint under its final name, file by file; its own search for the newest takes a torn one.

    Raises:
        CourseError: a checkpoint without safetensors.
    """
    from transformers.trainer_utils import sort_checkpoints

    newest = None
    for path in map(Path, sort_checkpoints(str(folder))):
        if written_to_its_end(path):
            newest = str(whole(path))
        elif delete:
            print(say("{name} was not written to its end; it is deleted", name=path.name))
            shutil.rmtree(path)
    return newest


def found_by_first(search: Callable[[], Any]) -> Any:
    """What `search` returns in the first process, in all of them; it begins once every process has come here.

    So nothing is looked at, or deleted, while another process still writes.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return search()
    dist.barrier()
    found = [search() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def kept_checkpoint(folder: Path, in_order: bool) -> str | None:
    """The newest whole checkpoint after training has stopped.

    Args:
        folder: that of the checkpoints.
        in_order: whether all processes stopped after the same step. Otherwise one of them may still write, so nothing
            is deleted and no other process is waited for.
    """
    import torch.distributed as dist

    if in_order or not dist.is_initialized():
        return found_by_first(lambda: newest_checkpoint(folder))
    return newest_checkpoint(folder, delete=False) if dist.get_rank() == 0 else None


def in_every_process(value: Any) -> list[Any]:
    """What each process has there; all of them must ask."""
    import torch.distributed as dist

    everywhere = [value]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, value)
    return everywhere


@contextmanager
def stoppable(trainer: Any, together: bool = True) -> Iterator[None]:
    """Let an interrupt (Ctrl-C) end training after the step it is at, with a checkpoint; a second one ends it at once.

    Args:
        trainer: its checkpoints are looked for.
        together: whether every process is here, as while training, and not only the first, as while saving.

    Raises:
        CourseError: it was interrupted, or the disk is full; with what is kept and how to go on.
    """
    import torch
    from transformers import TrainerCallback

    asked: list[int] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            asked_anywhere = torch.tensor(len(asked), device=args.device)
            if torch.distributed.is_initialized():  # all processes must stop after the same step
                torch.distributed.all_reduce(asked_anywhere, torch.distributed.ReduceOp.MAX)
            if asked_anywhere:
                asked.append(signal.SIGINT)
                control.should_save = control.should_training_stop = True

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    stop, before, why, in_order = Stop(), signal.signal(signal.SIGINT, note), say("Stopped"), together
    trainer.add_callback(stop)
    try:
        yield
    except KeyboardInterrupt:
        in_order = False
        asked.append(signal.SIGINT)
    except Exception as error:
        if not FULL_DISK.search(str(error)):
            raise
        why, in_order = say("The disk is full: free some of it. Stopped"), False
        asked.append(0)
    finally:
        signal.signal(signal.SIGINT, before)
        trainer.remove_callback(stop)
    if any(in_every_process(bool(asked))) if in_order else asked:
        state, kept = trainer.state, kept_checkpoint(Path(trainer.args.output_dir), in_order)
        how_on = say("There is no checkpoint yet: begin anew.")
        if kept:
            how_on = say(
                "{checkpoint} holds the adapter and all that is needed to go on: run this again.",
                checkpoint=utils.shown(kept),
            )
        raise utils.CourseError(
            say(
                "{why} at step {step} of {steps}. {how_on}",
                why=why,
                step=state.global_step,
                steps=state.max_steps,
                how_on=how_on,
            )
        )


def require_room(checkpoints: Path, trained: int, kept: int) -> None:
    """Stop before training if the disk cannot hold the checkpoints that are kept and the one being written.

    Args:
        checkpoints: their folder.
        trained: trained parameters; each takes 12 bytes, its value and two moments of AdamW in float32.
        kept: `save_total_limit`.

    Raises:
        CourseError: the disk has less room.
    """
    to_come = kept + 1 - len(list(checkpoints.glob("checkpoint-*")))
    needed, free = to_come * (12 * trained + 2**20) / 2**30, shutil.disk_usage(checkpoints).free / 2**30
    if needed > free:
        raise utils.CourseError(
            say(
                "{folder}: {needed:.2f} GiB for checkpoints, {free:.2f} GiB free. "
                "Free some, or set COURSE_OUTPUT to another disk.",
                folder=utils.shown(checkpoints),
                needed=needed,
                free=free,
            )
        )


def start_or_resume(run_folder: Path, course: utils.Settings, made_with: dict[str, Any]) -> str | None:
    """The checkpoint of an unfinished run with these very settings, or None after setting an older run aside.

    Args:
        run_folder: that of the run; its checkpoints are in `checkpoints`.
        course: rows and model, which have to be the same.
        made_with: whatever decides the schedule and which rows a step reads.
    """
    checkpoints = run_folder / "checkpoints"
    try:
        utils.require(checkpoints, "05_lora_training", course, **made_with)
        unfinished = not (run_folder / "made_from.json").is_file()
    except utils.CourseError:
        unfinished = False
    checkpoint = newest_checkpoint(checkpoints) if unfinished else None
    if not unfinished:
        utils.restart(run_folder)
    utils.stamp(checkpoints, course, **made_with)
    print("resuming from", utils.shown(checkpoint) if checkpoint else "nothing: a new run")  # notebook 08 reads it
    return checkpoint
