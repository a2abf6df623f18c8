"""The pictures: safe and legible, in step with tokenizer, planner, notebooks and README; plots that draw Chinese."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib.font_manager
import pytest
import secret_scan
from conftest import ROOT

import utils
from course import plots
from finetune.config import AIR, lora_parameters, parameters, tensors

IMAGES = ROOT / "images"
FONT = IMAGES / "fonts" / "HuanhuanHei.otf"
DRAWN = sorted(IMAGES.glob("**/*.svg"))
NOTEBOOKS = sorted((ROOT / "notebooks" / "en").glob("*.ipynb"))
SVG = "{http://www.w3.org/2000/svg}"
TEXT_CONTRAST, EDGE_CONTRAST = 4.5, 3.0  # of WCAG 2.2, level AA


def root(name):
    return ElementTree.fromstring((IMAGES / name).read_text(encoding="utf-8"))


def classes(element):
    return (element.get("class") or "").split()


def texts(element, kind=""):
    """The lines of text under an element, in order; those of one class, if one is named."""
    return [text.text for text in element.iter(f"{SVG}text") if not kind or kind in classes(text)]


def groups(element, kind):
    return [group for group in element.iter(f"{SVG}g") if kind in classes(group)]


def cells(path, kind):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


# ------------------------------------------------------------------------------------------ every drawn one


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_svg_names_itself_and_reaches_for_nothing(path):
    source = path.read_text(encoding="utf-8")
    svg = ElementTree.fromstring(source)
    assert (svg.get("role"), svg.get("aria-labelledby")) == ("img", "title desc")
    shortest = (5, 30) if svg.get("lang") == "zh-CN" else (10, 60)  # a Chinese character says more
    assert all(
        len(svg.find(f"{SVG}{part}[@id='{part}']").text) > least
        for part, least in zip(("title", "desc"), shortest, strict=True)
    )
    used = {element.tag.removeprefix(SVG) for element in svg.iter()}
    assert used <= {"svg", "title", "desc", "style", "defs", "marker", "path", "rect", "g", "text"}
    assert not re.search(r"@import|@font-face|<!|<\?|href|\son\w+=|url\((?!#)", source)
    assert source.count("http") == 1  # the name of the format
    assert len(source) < 30_000


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_line_of_text_is_one_element(path):
    for text in ElementTree.fromstring(path.read_text(encoding="utf-8")).iter(f"{SVG}text"):
        assert len(text) == 0
        assert text.text.strip()
        assert "\n" not in text.text


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def colours(style):
    """Colour of each (selector, property) in a style sheet."""
    rules = re.findall(r"([.\w]+) \{([^{}]*)\}", style)
    return {
        (name, *pair): colour for name, body in rules for *pair, colour in re.findall(r"(fill|stroke): (#\w{6})", body)
    }


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_both_themes_can_be_read(path):
    light, dark = ElementTree.fromstring(path.read_text(encoding="utf-8")).find(f"{SVG}style").text.split("@media")
    assert dark.startswith(" (prefers-color-scheme: dark)")
    light, dark = colours(light), colours(dark)
    assert light.keys() == dark.keys()  # no colour of one theme is left standing in the other
    for theme in (light, dark):
        for ground in (".panel", ".box", ".trained"):
            for ink in ("text", ".soft"):
                assert contrast(theme[ink, "fill"], theme[ground, "fill"]) >= TEXT_CONTRAST, (ink, ground)
        for edge in (".box", ".trained", ".line"):
            assert contrast(theme[edge, "stroke"], theme[".panel", "fill"]) >= EDGE_CONTRAST, edge


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_is_trained_has_a_sign_beside_its_colour(path):
    svg = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert any("trained" in classes(box) for box in svg.iter(f"{SVG}rect"))
    assert {"●", "○"} <= set("".join(texts(svg)))
    assert "stroke-width: 2.5" in svg.find(f"{SVG}style").text


# --------------------------------------------------------------------------------------- each one's content


@pytest.fixture(scope="module")
def sample(tokenizer, cell):
    """The sample that notebook 04 looks at, made by its own cells."""
    made = {"utils": utils, "settings": utils.settings(), "tokenizer": tokenizer}
    made["user_token"] = tokenizer.convert_tokens_to_ids("<|user|>")
    exec(cell("04_chat_template", "SYSTEM_PROMPT = ").splitlines()[0], made)
    for part in ("def render", "def one_turn", "def prepared_turns", "def tokenize"):
        exec(cell("04_chat_template", part), made)
    exec(cell("04_chat_template", "sample_row = ").rsplit("\n", 1)[0], made)
    return made


def test_tokens_ids_and_labels_are_the_tokenizers(tokenizer, sample):
    svg, ids, labels = root("sample_to_labels.svg"), sample["sample"]["input_ids"], sample["sample"]["labels"]
    drawn = [[int(i) for i in line.split()] for line in texts(svg, "id")]
    drawn_labels = [[int(i) for i in line.split()] for line in texts(svg, "label")]
    assert [*itertools.chain(*drawn)] == ids
    assert [*itertools.chain(*drawn_labels)] == labels
    tokens = texts(svg, "token")
    boxes = [box for box in svg.iter(f"{SVG}rect") if box.get("height") == "28"]
    for token, box, own, label in zip(tokens, boxes, drawn, drawn_labels, strict=True):
        assert len(own) == len(label)
        trained = label != [-100] * len(own)
        sign, text = token.split(" ", 1)
        assert (sign, "trained" in classes(box)) == (("●", True) if trained else ("○", False)), token
        assert text.replace("⏎", "\n") == tokenizer.decode(own)


def test_row_and_text_are_those_of_the_template(tokenizer, sample):
    svg, row = root("sample_to_labels.svg"), sample["sample_row"]
    lines = [text.text for text in svg.iter(f"{SVG}text") if (text.get("id") or "").startswith("line")]
    assert "".join(lines).replace("⏎", "\n") == tokenizer.decode(sample["sample"]["input_ids"])
    assert {*(turn["content"] for turn in row["messages"]), sample["SYSTEM_PROMPT"]} <= set(texts(svg))
    trained = sum(label != -100 for label in sample["sample"]["labels"])
    every = len(sample["sample"]["labels"])
    counts = [str(every), str(every - trained), str(trained)]
    for told in (
        svg.find(f"{SVG}desc").text,
        alt_texts()["sample_to_labels.svg"],
        f"{every} tokens {' '.join(texts(svg))}",
    ):
        assert re.findall(r"(\d+) (?:tokens|of the)\b", told) == counts


def test_lora_numbers_are_the_planners():
    svg, air = root("lora_experts.svg"), AIR
    rows = {line[0]: line[1:] for line in map(texts, groups(svg, "row"))}
    trained = lora_parameters(air, 8)
    moe, dense = air.num_hidden_layers - air.first_k_dense_replace, air.first_k_dense_replace
    weights = {"attention": 4 * (moe + dense), "dense": 3 * dense, "shared experts": 3 * moe, "routed experts": 2 * moe}
    expected = {{"dense": "dense layer"}.get(name, name): [str(weights[name]), f"{n:,}"] for name, n in trained.items()}
    assert rows == {**expected, "all": [str(sum(weights.values())), f"{sum(trained.values()):,}"]}
    told = " ".join(texts(svg))
    share = trained["routed experts"] / sum(trained.values())
    everything = sum(parameters(air).values())
    assert f"{100 * share:.1f} % of it in the routed experts" in told
    assert f"{100 * sum(trained.values()) / everything:.1f} % of {everything:,} parameters" in told
    assert all(f"{n:,}" in svg.find(f"{SVG}desc").text for n in trained.values())
    assert f"Of {sum(trained.values()):,} trained numbers {100 * share:.1f} %" in alt_texts()["lora_experts.svg"]


def test_lora_shapes_are_the_models():
    of = {name.removesuffix(".weight"): shape for name, shape, _ in tensors(AIR)}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    experts, (wide, hidden) = AIR.n_routed_experts, of[f"{mlp}.experts.0.up_proj"]
    expected = [of[f"{attention}.{name}_proj"] for name in "qkvo"]
    expected += [of[f"{mlp}.shared_experts.{name}_proj"] for name in ("gate", "up", "down")]
    expected += [of[f"{mlp}.gate"], (experts, 2 * wide, hidden), (experts, hidden, wide)]
    drawn = [line for line in texts(root("lora_experts.svg")) if re.fullmatch(r"[\d,]+( × [\d,]+)+", line)]
    assert drawn == [" × ".join(f"{n:,}" for n in shape) for shape in expected]


FOLDER = re.compile(r'settings\.output / "(\w+)"(?!\.)')


def test_the_path_names_the_folders_that_the_notebooks_use():
    cards = {}
    for group in root("path.svg").iter(f"{SVG}g"):
        if titles := texts(group, "head"):
            told = " ".join(texts(group, "takes") + texts(group, "makes"))
            cards[titles[0].lstrip("●○ ")] = set(re.findall(r"(\w+)/(?!\w)", told))
    for path in NOTEBOOKS:
        title = next(name for name in cards if name[:2] == path.stem[:2])
        assert title[3:].lower().replace(" ", "_") == path.stem[3:]
        code = "\n".join("".join(cell["source"]) for cell in cells(path, "code"))
        assert set(FOLDER.findall(code)) == cards[title], title


# -------------------------------------------------------------------------------------- before and after


def readme_tables():
    """The README's two tables of the first section: answers by question, and figures by name."""
    rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in (ROOT / "README.md").read_text(encoding="utf-8").split("**New wordings**")[0].splitlines()
        if line.startswith("| ")
    ]
    answers = {row[0]: row[1:] for row in rows if row[0][:1] == "你"}
    return answers, {row[0]: row[1:] for row in rows if row[0] and row[0] not in {*answers, "question"}}


def test_the_answers_are_those_of_the_readme():
    expected, drawn = readme_tables()[0], {}
    for group in groups(root("before_after.svg"), "question"):
        asked, gloss, base, *mine = texts(group)
        base_words, own_words = mine[: mine.index("● with your adapter")], mine[mine.index("● with your adapter") + 1 :]
        assert base == "○ base"
        drawn[f"{asked} *{gloss}*"] = [f"{zh} *{' '.join(en)}*" for zh, *en in (base_words, own_words)]
    assert drawn == expected


def test_the_figures_are_those_of_the_readme_and_of_notebook_06():
    expected, svg = readme_tables()[1], root("before_after.svg")
    assert {texts(group)[0]: texts(group, "value") for group in groups(svg, "figure")} == expected
    run = "".join("".join(o.get("text", "")) for c in cells(NOTEBOOKS[5], "code") for o in c["outputs"])
    stored = re.findall(r"^(?:loss \(|stops by|in role, by|equals the).*?  +([\d.]+%?) +([\d.]+%?)$", run, re.MULTILINE)
    names = list(expected)
    for number, (base, adapter) in enumerate(stored[: 2 * len(names)]):  # the README has two of the five sets
        which, name = divmod(number, len(names))
        told = [value.replace(" ", "") for value in expected[names[name]][2 * which : 2 * which + 2]]
        assert told == [base, adapter], names[name]
    assert len(stored) == 5 * len(names)
    for told in (svg.find(f"{SVG}desc").text, alt_texts()["before_after.svg"]):
        pairs = [expected[names[i]][k : k + 2] for k in (0, 2) for i in (0, 2)]
        assert re.findall(r"from ([\d.]+(?: %)?) to ([\d.]+(?: %)?)", told) == [tuple(pair) for pair in pairs]


def test_the_bars_are_as_long_as_their_figures_say():
    for group in groups(root("before_after.svg"), "figure"):
        bars = [float(bar.get("width")) for bar in group.iter(f"{SVG}rect")]
        values = [value.split() for value in texts(group, "value")]
        assert bars == pytest.approx([float(number) * (2.2 if unit else 31) for number, *unit in values], abs=0.1)


# ----------------------------------------------------------------------------- where pictures are shown


def alt_texts():
    """Picture to alt text, from the table of images/README.md."""
    table = (IMAGES / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| \[([\w.]+)\]\(\1\) \|.*\| ([^|]+) \|$", table, re.MULTILINE))


def shown_pictures():
    """(Where, alt text, file) of every picture in a text or a notebook's prose; Markdown and HTML."""
    for path in secret_scan.tracked(ROOT):
        if path.suffix not in (".md", ".ipynb"):
            continue
        prose = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            prose = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
        found = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", prose)
        for tag in re.findall(r"<img\s[^>]*>", prose):
            found.append([(re.search(rf'{name}="([^"]*)"', tag) or ["", ""])[1] for name in ("alt", "src")])
        for alt, source in found:
            yield path, alt, (path.parent / source).resolve()


def test_every_picture_shown_is_there_and_has_its_alt_text():
    shown, alt = list(shown_pictures()), alt_texts()
    assert len(shown) >= 2
    for where, words, file in shown:
        assert file.is_file(), f"{where}: no {file}"
        shortest = 30 if re.search("[一-鿿]", words) else 60  # a Chinese character says more
        assert len(words) >= shortest, f"{where}: {file.name}"
        chinese = re.search(r"\bzh\b", where.relative_to(ROOT).as_posix()) is not None
        if file.suffix == ".svg":
            assert file.is_relative_to(IMAGES / "zh") == chinese, f"{where}: {file.name} of the other language"
        if file.suffix == ".svg" and not chinese:
            assert words == alt[file.name], f"{where}: {file.name} has another alt text than images/README.md"


def test_images_holds_what_its_readme_lists_and_nothing_large():
    files = [path for path in IMAGES.iterdir() if path.is_file() and path.name != "README.md"]
    assert {path.name for path in files} == alt_texts().keys()
    assert {path.suffix for path in files} <= {".svg", ".png"}
    assert max(path.stat().st_size for path in files) < 300_000


# ------------------------------------------------------------------------------------------ plots, Chinese

ANSWER = json.loads((ROOT / "dataset" / "huanhuan.json").read_text(encoding="utf-8"))[0]["output"]
DRAW = f"""
import warnings
import matplotlib
from matplotlib import font_manager
manager = font_manager.fontManager
manager.ttflist = [font for font in manager.ttflist if font.fname.startswith(matplotlib.get_data_path())]
from course import plots
warnings.simplefilter("error")
figure, (plot,) = plots.axes()
FAMILY
plot.set(title="训练损失 {ANSWER}", ylabel="新措辞 (nats)", xlim=(-1, 1))
assert plots.picture(figure, "x").png
"""


def draw(family=""):
    """Draws Chinese in a process that knows no fonts but matplotlib's own and the course's."""
    code = DRAW.replace("FAMILY", family)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_chinese_is_drawn_where_the_machine_has_no_chinese_font():
    done = draw()
    assert (done.returncode, done.stderr) == (0, "")
    without = draw("plot.title.set_family('DejaVu Sans')")  # so it is our font that has the characters
    assert without.returncode == 1
    assert "missing from font" in without.stderr


def test_the_font_holds_every_chinese_character_of_the_project():
    spec = importlib.util.spec_from_file_location("font", ROOT / "tools" / "font.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    there = {chr(code) for code in matplotlib.font_manager.get_font(FONT).get_charmap()}
    wanted = {c for c in build.written() | build.common() if "\u3000" <= c < "\u9fff" or "\uff00" < c < "\uff60"}
    assert len(wanted) > 3800
    assert wanted <= there, f"build the font again (images/README.md): {''.join(sorted(wanted - there))}"


def test_the_font_is_small_and_has_its_licence_and_a_name_of_its_own():
    assert FONT.stat().st_size < 800_000
    assert matplotlib.font_manager.get_font(FONT).family_name == "Huanhuan Hei"  # the licence reserves others
    licence = (FONT.parent / "OFL.txt").read_text(encoding="utf-8")
    assert all(
        words in licence for words in ("SIL OPEN FONT LICENSE Version 1.1", "Reserved Font Name 'Source'", "Adobe")
    )


def test_curves_differ_in_more_than_colour(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "picture", lambda figure, alt: drawn.append(figure))
    history = [{"step": s, "loss": 1.0, "eval_a_loss": 2.0, "eval_b_loss": 3.0, "eval_c_loss": 4.0} for s in (1, 2)]
    plots.loss_picture(history)
    plots.moved_picture({f"module {i}": {1: 0.1} for i in range(12)})
    plots.batch_picture({(size, 4e-3): [(0, 5.0), (16, 4.0)] for size in (8, 32, 128)})
    figure, (plot,) = plots.axes()
    plot.plot([[1, 2, 3, 4, 5]] * 2)  # a learner's own
    for one in (*drawn, figure):
        curves = one.axes[0].lines
        assert len({(str(c.get_linestyle()), c.get_marker(), str(c._dash_pattern)) for c in curves}) == len(curves)
        plots.pyplot().close(one)
