"""The plots of the course, each with a text that says the same.

Knows matplotlib and the style of the course. Takes numbers and texts, and knows nothing of where they come from.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import utils
from course.language import marked, say, translated
from course.widgets import token_boxes

#: Okabe and Ito's, told apart by colour-blind eyes; a marker, a kind of line or a word says the same each time.
BLUE, RED, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
#: The names that the notebooks give to panels, curves and sets of questions, for the translation.
NAMES = (
    marked("by row"),
    marked("by group"),
    marked("this model"),
    marked("new wordings"),
    marked("new answers"),
    marked("prose, base"),
    marked("her answers, base"),
    marked("prose, adapter"),
    marked("her answers, adapter"),
    marked("no prompt"),
    marked("prompt only"),
    marked("weights"),
    marked("base"),
    marked("adapter"),
    marked("activations"),
    marked("layer update"),
    marked("rest"),
    marked("r=64, attention"),
)


@cache
def pyplot() -> Any:
    """Matplotlib's pyplot in the style of the course, once for each process.

    Chinese is drawn with the course's own font, what it lacks with matplotlib's, and the rest with the machine's.
    """
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    font_manager.fontManager.addfont(utils.ROOT / "images" / "fonts" / "HuanhuanHei.otf")
    there = font_manager.get_font_names()  # a family that is not there would be warned of
    machine = [name for name in ("Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC") if name in there]
    plt.rcParams.update(
        {
            "font.family": ["Huanhuan Hei", "DejaVu Sans", *machine],
            "axes.prop_cycle": plt.cycler(
                color=[BLUE, RED, GREEN, PURPLE, BLACK], linestyle=["-", "--", "-.", ":", (0, (1, 3))]
            ),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.3,
        }
    )
    return plt


def picture(figure: Any, alt: str) -> utils.Shown:
    """A matplotlib figure as an image with `alt` both as its alt text and as its caption; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight", facecolor="white")
    pyplot().close(figure)
    png = buffer.getvalue()
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
    return utils.Shown(f"<figure>{image}<figcaption>{utils.in_html(alt)}</figcaption></figure>", alt, png)


def axes(columns: int = 1, width: float = 7.0, height: float = 2.8) -> tuple[Any, list[Any]]:
    """A figure and its axes side by side, in the style of the course."""
    figure, grid = pyplot().subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, list(grid[0])


def mask_picture(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> utils.Shown:
    """The mask of a sample as a picture, for a record that holds no HTML: trained tokens on blue with ●."""
    rows, used = [[]], 0
    for text, _, trained in token_boxes(tokenizer, ids, labels):
        columns = 3 + utils.columns(text)
        if used + columns > 72:
            rows, used = [*rows, []], 0
        rows[-1].append((used, f"{'●' if trained else '○'} {text}", trained))
        used += columns
    figure, (plot,) = axes(height=0.4 * len(rows) + 0.2)
    plot.set(xlim=(0, 72), ylim=(len(rows) - 0.5, -0.5))
    plot.set_axis_off()
    for line, row in enumerate(rows):
        for left, text, trained in row:
            box = {"facecolor": "#bcdcff" if trained else "white", "edgecolor": "#0b4f9c" if trained else "#888888"}
            plot.text(left, line, text.replace("$", r"\$"), fontsize=9, va="center", bbox={"boxstyle": "square", **box})
    count = sum(label != -100 for label in labels)
    return picture(
        figure,
        say(
            "Mask of a sample: ● {count} of {all} tokens are trained, ○ the others are read only.",
            count=count,
            all=len(ids),
        ),
    )


def length_picture(lengths: Sequence[int], limit: int) -> utils.Shown:
    """How long the samples are, in tokens."""
    figure, (plot,) = axes()
    plot.hist(lengths, bins=30, color=BLUE, edgecolor="white")
    title = say("Sample lengths (limit {limit})", limit=limit)
    plot.set(xlabel=say("tokens"), ylabel=say("samples"), title=title)
    middle = sorted(lengths)[len(lengths) // 2]
    alt = say(
        "Histogram: {count} samples of {least} to {most} tokens, median {middle}.",
        count=len(lengths),
        least=min(lengths),
        most=max(lengths),
        middle=middle,
    )
    return picture(figure, alt)


def nearest_picture(nearest: dict[str, Sequence[float]], limit: float) -> utils.Shown:
    """For each way to split, how similar (0 to 100) a held-out question is to the nearest training question."""
    figure, plots = axes(len(nearest))
    said = []
    for plot, (name, values) in zip(plots, nearest.items(), strict=True):
        plot.hist(values, bins=range(0, 105, 5), color=BLUE, edgecolor="white")
        plot.axvline(limit, color=RED, linestyle="--")
        plot.set(title=translated(name), xlabel=say("similarity"), ylabel=say("held-out questions"))
        near = sum(v >= limit for v in values)
        said.append(
            say(
                "{name}: {near} of {count} at {limit:.0f} or more",
                name=translated(name),
                near=near,
                count=len(values),
                limit=limit,
            )
        )
    return picture(
        figure,
        say("Similarity of held-out to nearest kept questions. {panels} (dashed line).", panels=say("; ").join(said)),
    )


def share_picture(groups: dict[str, dict[str, int]]) -> utils.Shown:
    """Bars of the trainable parameters of each group, one panel a model."""
    figure, plots = axes(len(groups))
    said = []
    for plot, (name, counts) in zip(plots, groups.items(), strict=True):
        total = sum(counts.values())
        bars = plot.barh(list(map(translated, counts)), [100 * count / total for count in counts.values()], color=BLUE)
        plot.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=3, fontsize=8)
        plot.set(title=translated(name), xlabel=say("% of the adapter"), xlim=(0, 150))
        plot.invert_yaxis()
        shares = say(", ").join(f"{translated(group)} {count / total:.1%}" for group, count in counts.items())
        said.append(say("{title}: {shares}", title=translated(name), shares=shares))
    return picture(figure, say("Trainable parameters by group. {panels}.", panels=say("; ").join(said)))


def moved_picture(sizes: dict[str, dict[int, float]]) -> utils.Shown:
    """The size of each `lora_B` (root mean square), by layer; one marker a module."""
    figure, (plot,) = axes(height=3.4)
    for (name, by_layer), marker in zip(sizes.items(), "os^vDP*X<>dhp", strict=False):
        plot.plot(list(by_layer), list(by_layer.values()), marker, label=name, alpha=0.8)
    title, size = say("Did every adapter move?"), say("root mean square of lora_B")
    plot.set(xlabel=say("layer"), ylabel=size, title=title, ylim=(0, None))
    plot.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    every = [value for by_layer in sizes.values() for value in by_layer.values()]
    still = sum(value == 0 for value in every)
    return picture(
        figure,
        say(
            "{count} matrices lora_B; {still} stand at zero; sizes from {least:.4f} to {most:.4f}.",
            count=len(every),
            still=still,
            least=min(every),
            most=max(every),
        ),
    )


def loss_picture(history: Sequence[dict[str, float]]) -> utils.Shown:
    """Training loss (line) and every held-out loss (dashed, each with a marker of its own) of a `Trainer`'s log."""
    curves: dict[str, dict[int, float]] = {marked("training"): {}}
    for row in history:
        for key, value in row.items():
            if key == "loss":
                curves["training"][row["step"]] = value
            elif held_out := re.fullmatch(r"eval_(?:(.+)_)?loss", key):
                name = (held_out[1] or marked("held-out")).replace("_", " ")
                curves.setdefault(name, {})[row["step"]] = value
    curves = {name: curve for name, curve in curves.items() if curve}
    figure, (plot,) = axes(height=3.2)
    looks = dict(zip((name for name in curves if name != "training"), ("o--", "s:", "^-."), strict=False))
    said = []
    for (name, curve), colour in zip(curves.items(), (BLUE, RED, GREEN, BLACK), strict=False):
        plot.plot(list(curve), list(curve.values()), looks.get(name, "-"), color=colour, label=translated(name))
        first, last = min(curve), max(curve)
        said.append(
            say(
                "{name} from {start:.2f} at step {first} to {end:.2f} at step {last}",
                name=translated(name),
                start=curve[first],
                first=first,
                end=curve[last],
                last=last,
            )
        )
    plot.set(xlabel=say("step"), ylabel=say("nats a token"), title=say("Loss while training"), ylim=(0, None))
    plot.grid()
    if curves:
        plot.legend()
    return picture(figure, say("Loss: {curves}.", curves=say("; ").join(said) or say("nothing yet")))


def bar_picture(losses: dict[str, dict[str, float]]) -> utils.Shown:
    """The loss on each set of questions, a bar for each model or prompt; one that was not measured has no bar."""
    figure, (plot,) = axes(height=3.2)
    names = list(dict.fromkeys(name for by_name in losses.values() for name in by_name))
    width = 0.8 / max(len(names), 1)
    for number, (name, colour, hatch) in enumerate(zip(names, (BLACK, BLUE, RED), ("//", "", "xx"), strict=False)):
        bars = {i + width * number: by_name[name] for i, by_name in enumerate(losses.values()) if name in by_name}
        how = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": translated(name)}
        plot.bar_label(plot.bar(list(bars), list(bars.values()), width, **how), fmt="%.2f", fontsize=7)
    places = [i + width * (len(names) - 1) / 2 for i in range(len(losses))]
    plot.set_xticks(places, list(map(translated, losses)))
    plot.set(ylabel=say("nats a token"), title=say("Loss on questions that were never trained on"))
    plot.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    said = []
    for title, by_name in losses.items():
        figures = say(", ").join(f"{translated(name)} {loss:.2f}" for name, loss in by_name.items())
        said.append(say("{title}: {shares}", title=translated(title), shares=figures))
    return picture(figure, say("Loss in nats a token. {sets}.", sets=say("; ").join(said)))


def routing_picture(shares: dict[str, Any], first_layer: int) -> utils.Shown:
    """Heat maps of the share of tokens (in %) that each layer sends to each expert; the figures stand in the cells.

    Args:
        shares: title to an array of shape (layers, experts) whose rows sum to 1.
        first_layer: the number of the first layer that has experts.
    """
    figure, plots = axes(len(shares), width=3.6 * len(shares), height=3.4)
    top = max(float(array.max()) for array in shares.values())
    said = []
    for plot, (title, array) in zip(plots, shares.items(), strict=True):
        image = plot.imshow(100 * array, cmap="Blues", vmin=0, vmax=100 * top, aspect="auto")
        plot.set(title=translated(title), xlabel=say("expert"), ylabel=say("layer"))
        some = range(0, len(array), -(-len(array) // 12))
        plot.set_yticks(some, [first_layer + i for i in some])
        plot.set_xticks(range(0, array.shape[1], -(-array.shape[1] // 16)))
        if array.size <= 200:  # with 128 experts the figures would cover the picture
            for i, row in enumerate(array):
                for j, value in enumerate(row):
                    ink = "white" if value > 0.72 * top else "black"
                    plot.text(j, i, f"{value:.0%}"[:-1], ha="center", va="center", fontsize=8, color=ink)
        elif plot is plots[-1]:
            figure.colorbar(image, label=say("% of a layer's tokens"))
        busiest = array.argmax() // array.shape[1], array.argmax() % array.shape[1]
        layer = first_layer + busiest[0]
        said.append(
            say(
                "{title}: most used is expert {expert} of layer {layer}, {share:.0%}",
                title=translated(title),
                expert=busiest[1],
                layer=layer,
                share=array.max(),
            )
        )
    return picture(figure, say("Share of tokens by layer and expert, in %. {panels}.", panels=say("; ").join(said)))


def token_loss_picture(tokens: Sequence[str], losses: dict[str, Sequence[float]]) -> utils.Shown:
    """The loss of every token of one answer, in nats: for each condition a bar over each token.

    Args:
        tokens: the answer's tokens as text.
        losses: condition to the loss of each token.
    """
    figure, (plot,) = axes(width=max(7.0, 0.5 * len(tokens)), height=3.2)
    width, said = 0.8 / len(losses), []
    for number, (name, nats) in enumerate(losses.items()):
        how = {"color": (BLACK, BLUE, RED)[number % 3], "hatch": ("//", "", "xx")[number % 3], "edgecolor": "white"}
        places = [i + width * number for i in range(len(tokens))]
        plot.bar(places, nats, width, label=translated(name), **how)
        worst = max(range(len(tokens)), key=nats.__getitem__)
        said.append(
            say(
                "{name}: mean {mean:.2f}, most at token {number}, {most:.2f}",
                name=translated(name),
                mean=sum(nats) / len(nats),
                number=worst + 1,
                most=nats[worst],
            )
        )
    plot.set_xticks([i + width * (len(losses) - 1) / 2 for i in range(len(tokens))], _labels(tokens))
    plot.set(ylabel=say("nats a token"), title=say("Loss of each token of one answer"))
    plot.legend()
    return picture(figure, say("Loss of each token of one answer, in nats. {curves}.", curves=say("; ").join(said)))


def _labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as labels of an axis: a line break is seen, and a dollar sign begins no formula."""
    return [token.replace("\n", "⏎").replace("$", r"\$") for token in tokens]


def token_experts_picture(tokens: Sequence[str], weights: dict[str, Any], layer: int) -> utils.Shown:
    """Which experts of one layer read each token, and with what weight: a column a token, a row an expert.

    Args:
        tokens: as text, in their order.
        weights: title to an array of shape (tokens, experts); 0 where the expert was not chosen.
        layer: the layer's number.
    """
    figure, plots = axes(len(weights), width=0.32 * len(tokens) * len(weights) + 1, height=3.8)
    said = []
    for plot, (title, array) in zip(plots, weights.items(), strict=True):
        image = plot.imshow(array.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        plot.set_xticks(range(len(tokens)), _labels(tokens), fontsize=8)
        plot.set_yticks(range(0, array.shape[1], -(-array.shape[1] // 16)))
        plot.set(title=translated(title), ylabel=say("expert"))
        if array.shape[1] <= 32:  # with 128 experts the figures would cover the picture
            for token, expert in zip(*array.nonzero(), strict=True):
                ink = "white" if array[token, expert] > 0.6 else "black"
                plot.text(
                    token, expert, f"{100 * array[token, expert]:.0f}", ha="center", va="center", fontsize=6, color=ink
                )
        used = sorted({int(expert) for expert in array.sum(axis=0).nonzero()[0]})
        busiest = int((array > 0).sum(axis=0).argmax())
        said.append(
            say(
                "{title}: {count} experts used, expert {expert} by {tokens} of {all} tokens",
                title=translated(title),
                count=len(used),
                expert=busiest,
                tokens=int((array[:, busiest] > 0).sum()),
                all=len(tokens),
            )
        )
    figure.colorbar(image, label=say("weight (in the cells: in %)"))
    return picture(
        figure, say("Experts of each token in layer {layer}. {panels}.", layer=layer, panels=say("; ").join(said))
    )


def memory_picture(plans: dict[str, dict[str, float]], there: dict[str, float]) -> utils.Shown:
    """Stacked bars of the memory of each plan in GiB, with a mark where the GPUs of the plan end.

    Args:
        plans: title to the parts of its memory, in GiB.
        there: title to the GiB of all its GPUs together.
    """
    names = ["\n".join(map(translated, title.split("\n"))) for title in plans]
    figure, (plot,) = axes(width=8.0, height=0.55 * len(plans) + 1.4)
    parts = list(dict.fromkeys(part for plan in plans.values() for part in plan))
    colours, hatches = (BLUE, RED, GREEN, PURPLE, BLACK), ("", "xx", "//", "..", "\\\\")
    left = dict.fromkeys(plans, 0.0)
    for number, part in enumerate(parts):
        sizes = [plan.get(part, 0.0) for plan in plans.values()]
        how = {"color": colours[number % 5], "hatch": hatches[number % 5], "edgecolor": "white"}
        plot.barh(names, sizes, left=list(left.values()), label=translated(part), height=0.6, **how)
        left = {title: left[title] + size for title, size in zip(plans, sizes, strict=True)}
    for place, title in enumerate(plans):
        plot.plot([there[title]] * 2, [place - 0.4, place + 0.4], color=BLACK, linestyle="-", linewidth=3)
        plot.text(there[title] + 4, place, say("{gib:.0f} GiB there", gib=there[title]), va="center", fontsize=8)
    plot.invert_yaxis()
    most = max(*left.values(), *there.values())
    plot.set(title=say("Memory of all GPUs together, in GiB"), xlim=(0, 1.25 * most))
    plot.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    said = []
    for name, (title, plan) in zip(names, plans.items(), strict=True):
        shares = say(", ").join(f"{translated(part)} {size:.1f}" for part, size in plan.items())
        said.append(say("{title}: {shares}; {gib:.0f} GiB there", title=name, shares=shares, gib=there[title]))
    return picture(figure, say("Memory in GiB. {plans}.", plans=say(". ").join(said)))


def batch_picture(curves: dict[tuple[int, float], Sequence[tuple[int, float]]]) -> utils.Shown:
    """The loss on new wordings against the samples seen, a curve for each batch size with its learning rate.

    Args:
        curves: (batch size, learning rate) to points of (samples seen, loss), the last one at the end of the training.
    """
    figure, (plot,) = axes(height=3.2)
    said = []
    for (size, rate), points in curves.items():
        label = say("batch size {size}, learning rate {rate:g}", size=size, rate=rate)
        plot.plot(*zip(*points, strict=True), marker="o", label=label)
        said.append(say("{end:.2f} at batch size {size}", end=points[-1][1], size=size))
    title = say("Loss on new wordings")
    plot.set(xlabel=say("samples seen"), ylabel=say("nats a token"), title=title, ylim=(0, None))
    plot.legend()
    ends = say("; ").join(said)
    return picture(figure, say("Loss on new wordings against samples seen, at the end {ends}.", ends=ends))
