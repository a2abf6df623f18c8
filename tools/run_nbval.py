"""Checks notebooks against their stored outputs: `python tools/run_nbval.py FOLDER [--share] [--skip NAME] ...`.

First what needs no kernel: every code cell was executed in one clean run, and a cell whose output is not compared says
why. Then nbval, strict, in the order of the file names, with a fresh `output/test` for all that the notebooks write.
Last, what each notebook cost is compared with its header.

With `--share`, for the series in a second language, `output/test` stays: the training that an earlier call finished
there is resumed near its end. Cells that show this are not compared, and costs neither; the earlier call did both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import headers
import languages
import nbformat

ROOT = Path(__file__).resolve().parents[1]
SERIES = (languages.EN, languages.ZH)
CELL_SECONDS = 2_400  # 12 minutes of training on two busy cores; a slow machine takes longer
#: What these cells show tells that the training was resumed, so a shared run cannot compare them.
RESUMED = ("05-50b", "05-58")


def problems(path: Path) -> list[str]:
    """What is wrong with the stored form of a notebook, one line each."""
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    found = headers.problems(notebook, path.stem, path.parent.name) if path.parent in SERIES else []
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append("not one clean run: execution counts are not 1, 2, 3, ...; run `make store`")
    if not any(cell.outputs for cell in cells):
        found.append("no stored outputs, so nothing would be compared; run `make store`")
    for number, cell in enumerate(cells, 1):
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"code cell {number} holds a stored error")
        if "nbval-ignore-output" in cell.metadata.get("tags", []) and not cell.metadata.get("reason"):
            found.append(f"code cell {number} is not compared and its metadata gives no 'reason'")
    return [f"{path.name}: {line}" for line in found]


def share_training(output: Path, skip: tuple[str, ...] = ()) -> None:
    """Leave a finished run so that notebook 05 resumes it from its last checkpoint but one, and nothing downloaded.

    Where 05 is in `skip`, the run stays as it is, for the notebooks behind it.

    Resuming ends with the very numbers of a run without a break; `tests/faults/test_training.py` holds it to that.

    Raises:
        FileNotFoundError: no finished run there, or one with fewer than two checkpoints.
    """
    run = output / "lora"
    checkpoints = sorted(run.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if len(checkpoints) < 2 or not (run / "made_from.json").is_file():
        raise FileNotFoundError(f"{run}: no finished run to share; execute the English series first")
    if "05_lora_training" not in skip:
        (run / "made_from.json").unlink()
        shutil.rmtree(checkpoints[-1])
    shutil.rmtree(output / "hub", ignore_errors=True)  # notebook 02 shows what a first download sends


def main(folder: Path, cell_seconds: int, share: bool = False, skip: tuple[str, ...] = ()) -> int:
    """0 when all is as stored; of the notebooks in `skip` only what needs no kernel is looked at."""
    paths = sorted(folder.glob("*.ipynb"))
    found = [line for path in paths for line in problems(path)]
    if found or not paths:
        print("\n".join(found) or f"{folder}: no notebooks there")
        return 1
    paths = [path for path in paths if path.stem not in skip]
    output = "output/test"
    if share:
        share_training(ROOT / output, skip)
    else:
        shutil.rmtree(ROOT / output, ignore_errors=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("COURSE_", "SWANLAB_"))}
    environment |= {"COURSE_OUTPUT": output, "PYTHONPATH": str(ROOT / "tools"), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"NOT_COMPARED": " ".join(RESUMED)} if share else {}
    options = ["-p", "nbval_guard", "--nbval", f"--nbval-cell-timeout={cell_seconds}", "--durations=5", "-q"]
    options += [f"--nbval-sanitize-with={ROOT / 'tools' / 'nbval_sanitize.cfg'}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, paths)]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code == 0 and folder in SERIES and not share:
        measured = json.loads((ROOT / output / "measured.json").read_text(encoding="utf-8"))
        for path in paths:
            course = nbformat.read(path, as_version=4).metadata["course"]
            found += headers.differences(course, measured[path.stem], path.stem)
        print("\n".join(found) or "every notebook cost what its header says")
    return code or int(bool(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", action="store_true", help="resume the training that is in output/test")
    parser.add_argument("--cell-seconds", type=int, default=CELL_SECONDS)
    parser.add_argument("--skip", action="append", default=[], help="name of a notebook that is not executed")
    chosen = parser.parse_args()
    sys.exit(main(chosen.folder.resolve(), chosen.cell_seconds, chosen.share, tuple(chosen.skip)))
