"""The header of each notebook: what it costs, what it needs, when it was last verified; data first, table second.

The data is in the notebook's metadata under `course`; the cell tagged `header` shows it as a table, with the
notebook's contents and its neighbours below; the cell tagged `footer` leads on. `make store` writes them from a
measured run, and `make test` compares them with a run of its own.

`python tools/headers.py` writes them anew after a title has changed; `python tools/headers.py gpu FOLDER` also takes
the minutes on a GPU from the output folder of a `tools/run_series.py` on a machine with one.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import address  # noqa: E402

import utils  # noqa: E402
from course.language import LANGUAGES, say_in  # noqa: E402

#: Which notebook must have run before. The notebooks check it themselves; a test compares.
NEEDS = {
    "04_chat_template": "03_dataset",
    "05_lora_training": "04_chat_template",
    "06_inference": "05_lora_training",
    "08_full_size": "05_lora_training",
    "09_serving": "05_lora_training",
}
#: How far a run may lie from the header: a slower or busier machine is no fault, a forgotten header is. Two cores of
#: one kind of machine took 6 and 17 minutes for notebook 05 on two days.
TIME_FACTOR, TIME_SLACK_SECONDS = 5.0, 20.0
SIZE_FACTOR, SIZE_SLACK_MIB = 1.3, 60.0
#: What `with_places` puts before a title.
PLACE = re.compile(r'^<div id="[^"\n]*"></div>\n\n(?=## )', re.MULTILINE)
#: The header's minutes have one decimal. Training is never longer than its notebook; in 05 it is most of it.
ROUNDING_SECONDS, TRAINING_SHARE = 3.0, {"05_lora_training": 0.4}


def folder_mib(folder: Path) -> float:
    """The size of all files below a folder, in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def packages(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The pinned packages that the notebook's code imports, with their pins; not IPython, in which all of it runs."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    imported = set(re.findall(r"^\s*(?:import|from)\s+(\w+)", code, re.MULTILINE)) - {"IPython"}
    return {
        name: pin for name, pin in sorted(utils.pins().items()) if name.lower() in {one.lower() for one in imported}
    }


def record(folder: Path, name: str, seconds: float, memory_mib: float, disk_mib: float) -> None:
    """Add what one notebook cost to `measured.json` in the folder."""
    path = folder / "measured.json"
    costs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    costs[name] = {"seconds": round(seconds, 1), "memory_mib": round(memory_mib), "disk_mib": round(disk_mib, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(costs, indent=1), encoding="utf-8")


def table(data: dict[str, Any], language: str = "en") -> str:
    """The header as a Markdown table."""
    say = partial(say_in, language)
    gpu = say("not measured on a GPU")
    if "minutes_gpu" in data:
        gpu, _, stack = data["gpu"].removesuffix(")").partition(" (with ")
        gpu = say("{gpu} (with {stack})", gpu=gpu, stack=stack) if stack else gpu
        gpu = say("{minutes} minutes on one {gpu}", minutes=data["minutes_gpu"], gpu=gpu)
    needs = f"[{data['needs']}]({data['needs']}.ipynb)" if data["needs"] else say("nothing")
    versions = say(", ").join(f"{name} {pin}" for name, pin in sorted(data["packages"].items()))
    versions = versions or say("the standard library")
    rows = [
        (
            say("time, bundled model"),
            say("{minutes} minutes on two CPU cores; {gpu}", minutes=data["minutes_cpu"], gpu=gpu),
        )
    ]
    rows += [
        (
            say("memory, disk"),
            say("{memory:,} MiB at most; writes {disk:,} MiB", memory=data["memory_mib"], disk=data["disk_mib"]),
        ),
        (say("needs from earlier"), needs),
        (say("last verified"), say("{date} with {versions}", date=data["verified"], versions=versions)),
    ]
    lines = [f"| {what} | {value} |" for what, value in [(say("this notebook"), ""), *rows]]
    return "\n".join([lines[0].replace("|  |", "| |"), "|---|---|", *lines[1:]])


def anchor(title: str) -> str:
    """The end of a link to a section; JupyterLab and GitHub both make it from the title, spaces as hyphens.

    JupyterLab reads a link with JavaScript's `decodeURI`, which leaves the signs of `safe` as they are encoded.
    """
    return quote(title.replace("`", "").replace(" ", "-"), safe=",;:@&=+$/?")


def with_places(text: str) -> str:
    """The text with a place to jump to before each title that is encoded in a link; the old places go.

    A click on `#%E5...` has JupyterLab look for an element of that very name, and the title's own is not encoded.
    """

    def place(match: re.Match[str]) -> str:
        name = "" if match[1] is None else anchor(match[1])
        return f'<div id="{name}"></div>\n\n{match[0]}' if "%" in name else match[0]

    return re.sub(r"^```.*?^```|^## ([^\n]+)$", place, PLACE.sub("", text), flags=re.DOTALL | re.MULTILINE)


def contents(notebook: nbformat.NotebookNode) -> str:
    """Links to the sections."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    without_code = re.sub(r"^```.*?^```", "", prose, flags=re.DOTALL | re.MULTILINE)
    return " · ".join(f"[{title}](#{anchor(title)})" for title in re.findall(r"^## (.+)$", without_code, re.MULTILINE))


def neighbours(name: str, language: str = "en") -> str:
    """Links to the notebook before and the one after, and to the list of all."""
    names = sorted(path.stem for path in (ROOT / "notebooks" / "en").glob("*.ipynb"))
    place = names.index(name)
    links = [say_in(language, "[all notebooks](../../README.md)")]
    if place > 0:
        links.insert(0, f"← [{names[place - 1]}]({names[place - 1]}.ipynb)")
    if place + 1 < len(names):
        links.append(f"[{names[place + 1]}]({names[place + 1]}.ipynb) →")
    return " · ".join(links)


def head(notebook: nbformat.NotebookNode, name: str, language: str = "en") -> str:
    """The whole header: table, contents, neighbours, and links to services if the project has a public address."""
    parts = [table(notebook.metadata["course"], language), contents(notebook), neighbours(name, language)]
    parts.append(address.links(address.address(), f"notebooks/{language}/{name}.ipynb", language))
    return "\n\n".join(part for part in parts if part)


def write(
    notebook: nbformat.NotebookNode, name: str, cost: dict[str, float] | None = None, language: str = "en"
) -> None:
    """Put the header into the notebook: new figures from `cost`, the others as they stand; an old header goes."""
    data = dict(notebook.metadata.get("course", {}))
    if cost:
        data |= {
            "minutes_cpu": max(0.1, round(cost["seconds"] / 60, 1)),
            "memory_mib": 10 * round(cost["memory_mib"] / 10),
            "disk_mib": round(cost["disk_mib"]),
            "verified": datetime.now(UTC).date().isoformat(),
        }
    data |= {"needs": NEEDS.get(name, ""), "packages": packages(notebook)}
    notebook.metadata["course"] = data
    cells = [cell for cell in notebook.cells if not {"header", "footer"} & set(cell.metadata.get("tags", []))]
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = with_places(cell.source)
    notebook.cells = cells
    made = [
        nbformat.v4.new_markdown_cell(text, id=f"{name[:2]}-{tag}", metadata={"tags": [tag]})
        for tag, text in (("header", head(notebook, name, language)), ("footer", neighbours(name, language)))
    ]
    notebook.cells = [cells[0], made[0], *cells[1:], made[1]]


def training_seconds(notebook: nbformat.NotebookNode) -> list[float]:
    """How long training took, where a stored output says so: `200 s of training, ...`."""
    texts = [out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", [])]
    return [
        float(found) for text in texts for found in re.findall(r"^(\d+(?:\.\d+)?) s of training", text, re.MULTILINE)
    ]


def problems(notebook: nbformat.NotebookNode, name: str, language: str = "en") -> list[str]:
    """What is wrong with a notebook's header in itself, one line each."""
    data = notebook.metadata.get("course")
    shown = {
        tag: [cell.source for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
        for tag in ("header", "footer")
    }
    if not data or any(len(sources) != 1 for sources in shown.values()):
        return [f"{name}: no header or no footer; run `make store`"]
    found = []
    if shown["header"] != [head(notebook, name, language)] or shown["footer"] != [neighbours(name, language)]:
        cure = "run `python tools/headers.py` or `make store`"
        found.append(f"{name}: header or footer are not what metadata and titles say; {cure}")
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    without = [cell.id for cell in prose if with_places(cell.source) != cell.source]
    found += [f"{name}: cell {one} lacks its places to jump to; run `python tools/headers.py`" for one in without]
    if data["packages"] != packages(notebook):
        found.append(f"{name}: the header's versions are not the pins of what it imports; run `make store`")
    if data["needs"] != NEEDS.get(name, ""):
        found.append(f"{name}: the header says it needs {data['needs'] or 'nothing'}")
    said, trained = data["minutes_cpu"] * 60, training_seconds(notebook)
    least = TRAINING_SHARE.get(name, 0) * (said - ROUNDING_SECONDS)
    if trained and not least <= sum(trained) <= said + ROUNDING_SECONDS:
        message = f"{name}: the header says {said:.0f} s, the stored output {sum(trained):.0f} s of training"
        found.append(f"{message}, so they are of two runs; run `make store`")
    return found


def differences(data: dict[str, Any], cost: dict[str, float], name: str) -> list[str]:
    """Where a run lies too far from the header, one line each."""
    found = []
    said = data["minutes_cpu"] * 60
    if not (said - TIME_SLACK_SECONDS) / TIME_FACTOR <= cost["seconds"] <= said * TIME_FACTOR + TIME_SLACK_SECONDS:
        found.append(f"{name}: the header says {said:.0f} s, this run took {cost['seconds']:.0f} s")
    for key in ("memory_mib", "disk_mib"):
        low, high = data[key] / SIZE_FACTOR - SIZE_SLACK_MIB, data[key] * SIZE_FACTOR + SIZE_SLACK_MIB
        if cost[key] and not low <= cost[key] <= high:
            found.append(f"{name}: the header says {data[key]} for {key}, this run took {cost[key]}")
    return found


def main(folder: Path | None = None) -> None:
    """Write the headers anew; with a folder, the minutes of its run on a GPU too."""
    if folder:
        measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
        gpu = json.loads((folder / "report.json").read_text(encoding="utf-8"))["gpus"][0]
    for file in sorted(file for one in LANGUAGES for file in (ROOT / "notebooks" / one).glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        if folder:
            minutes = max(0.1, round(measured[file.stem]["seconds"] / 60, 1))
            notebook.metadata["course"] |= {"minutes_gpu": minutes, "gpu": gpu}
        write(notebook, file.stem, language=file.parent.name)
        nbformat.write(notebook, file)


if __name__ == "__main__":
    if sys.argv[1:] and (len(sys.argv) != 3 or sys.argv[1] != "gpu"):
        sys.exit(__doc__)
    main(Path(sys.argv[2]) if sys.argv[1:] else None)
