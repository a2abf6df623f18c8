"""The project's public address: `deploy/ADDRESS` holds it, alone or not yet; what names it is written from there.

    python tools/address.py          write what depends on it into the notebooks and the READMEs
    python tools/address.py check    what does not agree with it, one line each; `tests/test_address.py` asks the same

Three things depend on it: the message in the first code cell of every notebook, which a learner sees who opened a
notebook by itself; the links that open a notebook on Colab, Kaggle and ModelScope, which `tools/headers.py` puts into
the headers; and the part of the READMEs between `BEGIN` and `END`. The links are there only for an address on GitHub,
from where alone all three services open a notebook. They are text, so nothing is fetched by showing them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from course.language import say_in  # noqa: E402

SETTING = ROOT / "deploy" / "ADDRESS"
BRANCH = "main"
ALLOWED = re.compile(r"https://[\w.-]+(?:/[\w.~-]+){2,}")
GITHUB = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?")
#: Each service to the address under which it opens a notebook that lies on GitHub.
SERVICES = {
    "Colab": "https://colab.research.google.com/github/{file}",
    "Kaggle": "https://www.kaggle.com/kernels/welcome?src=https://github.com/{file}",
    "ModelScope": "https://modelscope.cn/notebook/share/github/{file}",
}
BEGIN, END = "<!-- address: written by tools/address.py -->", "<!-- address: end -->"
#: The lines of a first code cell that find the project; `message` stands between them.
SEARCH = (
    'roots = [at for at in (".", *Path.cwd().parents, "course", *sys.path) '
    'if Path(at, "deploy/hosted.py").is_file()]\n'
    "if not roots:  # this notebook was opened by itself\n"
)
INSERT = "sys.path.insert(0, str(Path(roots[0]).resolve()))\nimport utils\n"
BLOCK = re.compile(re.escape(SEARCH) + r'    raise UsageError\("""(.*?)"""\)\n' + re.escape(INSERT), re.DOTALL)
RUN = "%run course/deploy/hosted.py"


def address(setting: Path = SETTING) -> str:
    """The address in the setting; empty, as long as there is none.

    Raises:
        ValueError: it is no address that git can clone from.
    """
    text = setting.read_text(encoding="utf-8").strip()
    if text and not ALLOWED.fullmatch(text):
        raise ValueError(f"{setting.name}: {text!r} is no address like https://HOST/OWNER/NAME")
    return text


def commands(at: str) -> str:
    """What a learner runs in a notebook that was opened by itself: fetch, if it is known from where, and install."""
    return f"!git clone --depth 1 {at} course\n{RUN} en" if at else f"{RUN} en"


def message(at: str) -> str:
    """What the first code cell says where it does not find the project; the same in both languages."""
    if at:
        head = "The project is not here. Run these lines, then this cell again. 先运行这两行（中文版用 zh）:"
    else:
        head = (
            "The project is not here. Get it where you got this notebook, put it here as the folder course,\n"
            "run this line, then this cell again. "
            "请从 notebook 的来源取得项目，放在这里，取名 course，再运行这一行（中文版用 zh）:"
        )
    return f"{head}\n{commands(at)}"


def block(at: str) -> str:
    """The lines of a first code cell that find the project or end with the message."""
    return f'{SEARCH}    raise UsageError("""{message(at)}""")\n{INSERT}'


def with_block(source: str, at: str) -> str:
    """The source of a first code cell with the message of this address.

    Raises:
        ValueError: the cell has no such lines, or has them twice.
    """
    made, count = BLOCK.subn(lambda _: block(at), source)
    if count != 1:
        raise ValueError(f"the lines that find the project are there {count} times, not once")
    return made


def links(at: str, file: str, language: str = "en") -> str:
    """Links that open a file of the repository on each service, on one line; empty for an address they cannot open."""
    if not (place := GITHUB.fullmatch(at)):
        return ""
    file = f"{place[1]}/{place[2]}/blob/{BRANCH}/{file}"
    opened = []
    for service, pattern in SERVICES.items():
        text = say_in(language, "Open on {service}", service=service)
        opened.append(f"[{text}]({pattern.format(file=file)})")
    return " · ".join(opened)


def part(at: str, language: str) -> str:
    """The part of a README that depends on the address."""
    lines = commands(at).replace(f"{RUN} en", f"{RUN} {language}")
    shown = f"```text\n{lines}\n```\n"
    if found := links(at, f"notebooks/{language}/01_environment.ipynb", language):
        shown += f"\n{found}\n"
    return f"{BEGIN}\n{shown}{END}\n"


def with_part(text: str, at: str, language: str) -> str:
    """A README with the part of this address.

    Raises:
        ValueError: it has no such part, or has it twice.
    """
    made, count = re.subn(f"{BEGIN}\n.*?{END}\n", lambda _: part(at, language), text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the part for the address is there {count} times, not once")
    return made


def files() -> Iterator[tuple[Path, str]]:
    """Every notebook and README that depends on the address, with its language."""
    for language in ("en", "zh"):
        yield from ((path, language) for path in sorted((ROOT / "notebooks" / language).glob("*.ipynb")))
    yield from ((ROOT / "README.md", "en"), (ROOT / "README.zh-CN.md", "zh"))


def rewritten(path: Path, language: str, at: str) -> str:
    """A file as it must be with this address; the headers of notebooks are the work of `tools/headers.py`.

    Raises:
        ValueError: it lacks the lines that are to be written.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return with_part(text, at, language)
    notebook = json.loads(text)
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell["source"] = with_block("".join(cell["source"]), at).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def problems() -> list[str]:
    """What does not agree with the setting, one line each."""
    at, found = address(), []
    for path, language in files():
        name = path.relative_to(ROOT).as_posix()
        try:
            if rewritten(path, language, at) != path.read_text(encoding="utf-8"):
                found.append(f"{name}: not what deploy/ADDRESS says; run `python tools/address.py`")
        except ValueError as error:
            found.append(f"{name}: {error}")
    return found


def write() -> None:
    """Write all that depends on the setting; a pair of READMEs that was marked as matching still is."""
    import headers  # which asks this module for the links
    import languages

    at = address()
    matched = not [line for line in languages.problems() if line.startswith("README.md:")]
    for path, language in files():
        text = rewritten(path, language, at)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
    headers.main()
    if matched:
        languages.mark(["README.md"])


def main(arguments: list[str]) -> int:
    """Run a command."""
    if arguments == ["check"]:
        print("\n".join(found := problems()) or "all agree with deploy/ADDRESS")
        return int(bool(found))
    if arguments:
        print(__doc__)
        return 2
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
