"""Notebooks without a browser: no reply is lost, no cell waits for ever, and who waits is said."""

import asyncio
import time

import headless
import nbformat
import pytest

import utils


def notebook(*sources):
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(source, id=f"0{n}-x") for n, source in enumerate(sources, 1)]
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def run(tmp_path, *sources, limit=60, **options):
    made = notebook(*sources)
    headless.execute(made, tmp_path / "09_try.ipynb", limit, **options)
    return made


async def seconds_until_the_reply(manager):
    """How long a reply is waited for when a widget's output is written while it comes."""
    await manager.start_kernel(extra_arguments=["--log-level=40"])
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(60)
        before = client.execute("0")
        while (await client.shell_channel.get_msg(timeout=10))["parent_header"]["msg_id"] != before:
            pass
        asked = client.execute("1")
        waiting = asyncio.ensure_future(client.shell_channel.get_msg(timeout=10))
        await asyncio.sleep(0)
        time.sleep(0.5)  # as handling a long output does: nothing else runs, and meanwhile the reply comes
        content = {"comm_id": "x", "data": {"method": "update", "state": {"outputs": []}}}
        client.shell_channel.send(client.session.msg("comm_msg", content=content))
        begun = time.monotonic()
        assert (await waiting)["parent_header"]["msg_id"] == asked
        return time.monotonic() - begun
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


def test_a_reply_is_found_though_a_write_took_its_signal():
    assert asyncio.run(seconds_until_the_reply(headless.Manager())) < 3 * headless.SLICE_SECONDS


LONG_OUTPUT = """
from ipywidgets import interact
from IPython.display import HTML

@interact(row=(0, 9))
def look(row=0):
    return HTML("<b>long</b>" * 20_000)
"""


def test_widgets_with_long_outputs_run_without_a_browser(tmp_path):
    made = run(tmp_path, *[LONG_OUTPUT] * 4)
    assert [cell.execution_count for cell in made.cells] == [1, 2, 3, 4]
    assert all("text/html" in str(made.metadata.widgets) for _ in made.cells)


def test_a_cell_over_its_limit_is_named(tmp_path):
    with pytest.raises(utils.CourseError, match=r"^09_try: cell 02-x \(import time\) did not end within 2 s"):
        run(tmp_path, "1", "import time\ntime.sleep(60)", limit=2)


def test_a_cell_that_takes_long_is_named_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(headless, "SAID_AFTER_SECONDS", 0.5)
    said = []
    run(tmp_path, "1", "# slow\nimport time\ntime.sleep(2.6)", "2", tell=said.append)
    assert [line.partition(";")[0] for line in said if "02-x" in line] == [
        "09_try: cell 02-x (# slow) has been running for 0 s",
        "09_try: cell 02-x (# slow) has been running for 1 s",
        "09_try: cell 02-x (# slow) has been running for 2 s",
    ]
    assert not [line for line in said if "03-x" in line]


@pytest.mark.parametrize(
    ("asked", "given", "bundled", "limit"),
    [(None, "", True, 2_400), (None, "", False, 86_400), (None, "30", False, 30), (7, "30", True, 7)],
)
def test_every_run_has_a_limit(monkeypatch, asked, given, bundled, limit):
    monkeypatch.setenv("COURSE_CELL_SECONDS", given)
    assert headless.cell_seconds(asked, bundled) == limit


@pytest.mark.parametrize("given", ["0", "an hour", "-5"])
def test_a_limit_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv("COURSE_CELL_SECONDS", given)
    with pytest.raises(utils.CourseError, match="whole number above 0"):
        headless.cell_seconds(None, bundled=True)
