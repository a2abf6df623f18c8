"""What a cell shows beside text and plots: a sample with its mask, progress bars, controls for a function, the chat.

Knows Jupyter's display and ipywidgets. Knows nothing of models: the chat asks a function of the notebook. Where there
are no widgets (no ipywidgets, or a page that draws none), a line says so and how to do without.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import utils
from course.language import gloss, glossed, say, translated

#: What the chat asks if nothing else is asked.
USUAL = "你是谁？"


def token_boxes(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, int, bool]]:
    """What is in each box of a mask: its text, its number of tokens, and whether they are trained.

    Tokens that only together make a character (its bytes) share a box.

    Raises:
        ValueError: `ids` and `labels` differ in length.
    """
    if len(ids) != len(labels):
        raise ValueError(f"{len(ids)} ids but {len(labels)} labels: a label belongs to each token")
    boxes, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if "\ufffd" not in text or end - start > 6 or end == len(ids):
            boxes.append((text.replace("\n", "⏎"), end - start, labels[end - 1] != -100))
            start = end
    return boxes


def mask_view(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> utils.Shown:
    """A sample token by token: trained ones on blue with ●, read ones on white with ○; the twin divides tokens by │."""
    boxes = token_boxes(tokenizer, ids, labels)
    style = "display:inline-block;margin:2px;padding:1px 4px;border:1px solid #888;color:#000;background:"
    parts = []
    for text, count, trained in boxes:
        sign, colour = ("●", "#bcdcff;border-bottom:4px solid #0b4f9c") if trained else ("○", "#fff")
        many = say("{count} tokens", count=count)
        many = f"<sub>{many}</sub>" if count > 1 else ""
        parts.append(f'<span style="{style}{colour}">{sign} {utils.in_html(text)}{many}</span>')
    count = sum(label != -100 for label in labels)
    key = say("● trained: {trained} tokens &nbsp; ○ read only: {read} tokens", trained=count, read=len(ids) - count)
    lines = []
    for position, (text, many, trained) in enumerate(boxes):
        if position == 0 or trained != boxes[position - 1][2]:
            lines.append(say("trained ● │") if trained else say("read    ○ │"))
        lines[-1] += text + (f"({many})" if many > 1 else "") + "│"
    summary = say("{count} of {all} tokens are trained", count=count, all=len(ids))
    return utils.Shown(f"<div>{key}</div><div>{''.join(parts)}</div>", "\n".join([*lines, summary]))


def _bar(done: int, count: int, what: str, begun: float) -> utils.Shown:
    """How far it is; the text is always the same, so that a stored output does not depend on the speed."""
    seconds = (time.monotonic() - begun) / max(done, 1) * (count - done)
    what = translated(what)
    if 0 < done < count:
        text = say(
            "{what}: {done} of {count}, about {seconds:.0f} s left", what=what, done=done, count=count, seconds=seconds
        )
    else:
        text = say("{what}: {done} of {count}", what=what, done=done, count=count)
    bar = f'<progress value="{done}" max="{count}" aria-label="{what}"></progress> {text}'
    return utils.Shown(f"<div>{bar}</div>", f"{what}: {count}")


def progress(items: Sequence[Any], what: str) -> Iterator[Any]:
    """The items one by one, under a bar with the time left."""
    from IPython.display import display

    begun = time.monotonic()
    shown = display(_bar(0, len(items), what, begun), display_id=True)
    for done, item in enumerate(items, 1):
        yield item
        shown.update(_bar(done, len(items), what, begun))


def watched(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does, under a bar that follows its lines of the form `step 3/12`."""
    from IPython.display import display

    def bar(done: int, count: int) -> utils.Shown:
        drawn = _bar(done, count, "steps", begun)
        return utils.Shown(drawn.html, drawn.text.partition(":")[0])  # how many steps is not known at the beginning

    begun, lines = time.monotonic(), []
    shown = display(bar(0, 1), display_id=True)
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            for line in process.stdout:
                lines.append(line)
                if step := re.match(r"step (\d+)/(\d+)", line):
                    shown.update(bar(int(step[1]), int(step[2])))
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, "".join(lines), errors.read())


def _in_words(kind: type, words: str) -> type:
    """The class of a widget, with words for a page that draws no widgets."""

    class InWords(kind):
        def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
            return super()._repr_mimebundle_(**kwargs) | {"text/plain": words}

    return InWords


def interact(function: Callable[..., Any] | None = None, /, **choices: Any) -> Any:
    """Controls that call a function anew with each choice, as `ipywidgets.interact`; also as a decorator.

    Without widgets it is called once, as it is without arguments, and a line says how to call it with others.
    """
    if function is None:
        return lambda decorated: interact(decorated, **choices)
    from IPython.display import display

    usual = ", ".join(f"{name}={one.default!r}" for name, one in inspect.signature(function).parameters.items())
    words = say(
        "No widgets here. In a cell of your own, with other values: {call}", call=f"{function.__name__}({usual})"
    )
    try:
        import ipywidgets
    except ImportError:
        print(words)
        if (shown := function()) is not None:
            display(shown)
        return function
    # As `ipywidgets.interact` does: what the function returns is shown.
    display(_in_words(ipywidgets.interactive, words)(function, {"auto_display": True}, **choices))
    return function


def _heads(longer: bool) -> dict[str, str]:
    """Who answers in a chat, and what is written above."""
    heads = {"base": say("base"), "adapter": say("adapter")}
    return heads | ({"longer": say("longer training")} if longer else {})


def ask(reply: Callable[[str, list[dict[str, str]]], str | Iterable[str]], question: str, longer: bool = False) -> None:
    """Print what base and adapter answer to one question: the chat without a chat box."""
    print(say("Q: {question}", question=glossed(question) if gloss(question) else question))
    for name, head in _heads(longer).items():
        said = reply(name, [{"role": "user", "content": question}])
        text = said if isinstance(said, str) else list(said)[-1]
        print(f"{head}: {glossed(text) if gloss(text) else text}")


def chat_box(
    reply: Callable[[str, list[dict[str, str]]], str | Iterable[str]],
    template: Callable[[list[dict[str, str]]], str],
    longer: bool = False,
) -> Any:
    """A chat with base and adapter side by side, and the text that the template makes of the conversation on demand.

    Args:
        reply: takes "base" or "adapter" and the turns so far (`role`, `content`), returns the answer, or the answer
            as it grows: texts of which each takes the place of the one before it.
        template: takes the turns, returns the prompt as the model reads it.
        longer: a third column, for which `reply` takes "longer": the adapter that was trained for longer.

    Questions and answers go into text areas only, which show markup as text and execute none of it. Without widgets a
    line says how to ask, and one question is asked.
    """
    words = say("No widgets here. Ask in a cell of your own: {call}", call='widgets.ask(reply, "...")')
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        print(words)
        return ask(reply, USUAL, longer)
    return _drawn_chat(reply, template, words, _heads(longer))


def _drawn_chat(reply: Callable[..., Any], template: Callable[..., str], words: str, heads: dict[str, str]) -> Any:
    """The widgets of the chat, words for a page that draws none, and who answers under which head."""
    import ipywidgets as widgets

    wide = widgets.Layout(width="auto")
    question = widgets.Text(placeholder=USUAL, description=say("Question"), layout=widgets.Layout(width="60%"))
    button = widgets.Button(description=say("Ask"), tooltip=say("Ask all models"))
    keep = widgets.Checkbox(description=say("keep the conversation"), indent=False, value=True)
    show = widgets.Checkbox(description=say("show the template's text"), indent=False, value=False)
    prompt = widgets.Textarea(
        rows=8, tooltip=say("what the adapter reads"), layout=widgets.Layout(width="auto", display="none")
    )
    share = f"{100 // len(heads)}%"
    columns = {
        name: widgets.VBox([widgets.Label(head)], layout=widgets.Layout(width=share)) for name, head in heads.items()
    }
    turns: dict[str, list[dict[str, str]]] = {name: [] for name in columns}

    def meant(text: str) -> str:
        return glossed(text) if gloss(text) else text  # most of what is typed here has no gloss

    def write(turn: Any, asked: str, said: str) -> None:
        text = say("Q: {question}", question=meant(asked)) + "\n" + meant(said)
        lines = 1 + sum(1 + utils.columns(line) // 50 for line in text.splitlines())  # a line of Chinese is taller
        turn.rows, turn.value = min(12, lines), text

    def answer(_: Any) -> None:
        asked = question.value.strip() or question.placeholder
        button.disabled = True
        for name, column in columns.items():
            turns[name] = [*(turns[name] if keep.value else []), {"role": "user", "content": asked}]
            if name == "adapter":
                prompt.value = template(turns[name])
            turn = widgets.Textarea(layout=wide, tooltip=say("answer of the {name}", name=heads[name]))
            write(turn, asked, "")
            column.children = (column.children[0], turn, *column.children[1:])
            text = ""
            try:
                said = reply(name, turns[name])
                for text in [said] if isinstance(said, str) else said:
                    write(turn, asked, text)
                turns[name].append({"role": "assistant", "content": text})
            except Exception as error:  # a widget's callback has no cell to show an error in
                write(turn, asked, f"{type(error).__name__}: {error}")
                turns[name] = []
        button.disabled = False
        question.value = ""

    def unfold(change: dict[str, Any]) -> None:
        prompt.layout.display = "" if change["new"] else "none"

    button.on_click(answer)
    question.on_msg(lambda _, message, __: answer(None) if message.get("event") == "submit" else None)  # the Enter key
    show.observe(unfold, "value")
    return _in_words(widgets.VBox, words)(
        [widgets.HBox([question, button]), widgets.HBox([keep, show]), prompt, widgets.HBox(list(columns.values()))]
    )


def training_table(trainer: Any) -> None:
    """Leave the column "Validation Loss" out of the table that a `Trainer` shows in a notebook.

    With several validation sets each has a column of its own, and that one says "No log" in every row. After the
    training an evaluation shows its bar only. Outside a notebook there is no table, and nothing changes.
    """
    from transformers.utils.notebook import NotebookProgressCallback

    class TrainingTable(NotebookProgressCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)
            tracker = self.training_tracker
            write = tracker.write_line
            tracker.inner_table[0].remove("Validation Loss")
            tracker.write_line = lambda values: write({k: v for k, v in values.items() if k != "Validation Loss"})

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            if self.training_tracker is not None:
                super().on_evaluate(*args, **kwargs)
            self.prediction_bar = None

    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(TrainingTable())
