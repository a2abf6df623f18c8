"""Cuts the Chinese font of the plots out of Noto Sans CJK SC: `python tools/font.py NotoSansCJK-Regular.ttc`.

The source is the file of that name in Debian's package fonts-noto-cjk. The cut holds every character that this project
writes (Noto has no emoji) and the 3,755 most common simplified ones, level 1 of GB 2312. Without hints and on a grid
of 250 units it takes 0.8 MB in place of 19. It bears a name of its own, since it is no longer Noto.
"""

import subprocess
import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont
from fontTools.ttLib.scaleUpem import scale_upem

ROOT = Path(__file__).resolve().parents[1]
NAME = "Huanhuan Hei"
TARGET = ROOT / "images" / "fonts" / "HuanhuanHei.otf"
TEXTS = (".py", ".md", ".ipynb", ".json", ".jsonl", ".txt", ".svg")
NOTO_SC = 2  # its place in the collection


def written() -> set[str]:
    """Every character in the project's own texts; the vocabulary and training text of the model are never plotted."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=True).stdout
    paths = [ROOT / name for name in listed.decode().split("\0") if name.endswith(TEXTS)]
    return set(
        "".join(path.read_text(encoding="utf-8") for path in paths if "models" not in path.relative_to(ROOT).parts)
    )


def common() -> set[str]:
    """Latin 1, the signs of GB 2312 and its first level."""
    rows = [*range(0xA1, 0xA2), *range(0xA3, 0xA4), *range(0xB0, 0xD8)]
    pairs = bytes(byte for row in rows for column in range(0xA1, 0xFF) for byte in (row, column))
    return {chr(code) for code in range(0x20, 0x100)} | set(pairs.decode("gb2312", errors="ignore")) | {"−"}


if __name__ == "__main__":
    font = TTFont(sys.argv[1], fontNumber=NOTO_SC)
    options = subset.Options(hinting=False, desubroutinize=True, layout_features=[])
    options.drop_tables += ["BASE", "GPOS", "GSUB", "VORG", "vhea", "vmtx"]
    cut = subset.Subsetter(options)
    cut.populate(text="".join(written() | common()))
    cut.subset(font)
    scale_upem(font, 250)
    names = {1: NAME, 3: f"{NAME} cut from {font['name'].getDebugName(6)}", 4: NAME, 6: TARGET.stem}
    font["name"].names = [one for one in font["name"].names if one.nameID in (0, 2, 5, 7, 13, 14)]
    for number, text in names.items():
        font["name"].setName(text, number, 3, 1, 0x409)
    top = font["CFF "].cff
    top.fontNames = [TARGET.stem]
    top[0].FullName = top[0].FamilyName = NAME
    font.save(TARGET)
    print(f"{TARGET.relative_to(ROOT)}: {len(font.getBestCmap())} characters, {TARGET.stat().st_size:,} bytes")
