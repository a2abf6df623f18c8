"""The real `snapshot_download`, in the cells of notebook 02, against a hub that fails.

Every fault has to end in a complete model whose hashes are right, or in one message that says what to do.
"""

import ast
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_hub import ALWAYS, LISTING, FaultyHub, entry, refused_port

import utils
from course import download
from course.hub import LocalHub
from course.model_folder import model_folder, whole

# A learner's client waits a minute for a silent hub and up to a minute between tries; here it waits a second.
# Read when the client is imported, so this comes before that; the number of tries stays what it is.
SECOND = ("DOWNLOAD_TIMEOUT", "DOWNLOAD_RETRY_MAX_DELAY_SECONDS", "REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS")
os.environ.update({f"MODELSCOPE_{name}": "1" for name in SECOND}, MODELSCOPE_LOG_LEVEL="50", TQDM_DISABLE="1")

MODEL_ID = "course/glm4-moe-mini"
FIRST, *_, LAST = shards = sorted(path.name for path in utils.BUNDLED.glob("*.safetensors"))
AREA = "download"
AGAIN = "Run this cell again: what has arrived is kept"
COMPLETE = "complete model, every hash equal"


@pytest.fixture
def course(tmp_path):
    return dataclasses.replace(utils.settings(), output=tmp_path / "output")


@pytest.fixture
def hub():
    with FaultyHub(utils.BUNDLED, MODEL_ID) as served:
        yield served


@pytest.fixture
def client_log():
    """What the client logs; its logger passes nothing on to pytest's."""
    records, logger = [], logging.getLogger("modelscope_hub.download")
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.fixture
def fetch(cell, course, client_log):
    """Run notebook 02's cells for small files and for all files; returns the model's folder.

    Whatever happens, the client's own errors are not shown beside the one message.
    """

    def run(endpoint, output=None):
        settings = dataclasses.replace(course, output=output or course.output)
        names = {"settings": settings, "model_id": MODEL_ID, "endpoint": endpoint, "Path": Path}
        names |= {"utils": utils, "download": download, "whole": whole}
        for text in ("allow_patterns=[", "folder = snapshot_download("):
            try:
                exec(cell("02_download", text), names)
            finally:
                assert [record.getMessage() for record in client_log if record.levelno > logging.WARNING] == []
        return names["folder"]

    return run


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def assert_complete(folder):
    """The folder holds the served model, no more and no less, and it can be read."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    assert hashes(folder) == hashes(utils.BUNDLED)
    assert AutoConfig.from_pretrained(folder).model_type == "glm4_moe"
    assert AutoTokenizer.from_pretrained(folder).encode("你好")
    for name in shards:
        with safe_open(folder / name, "pt") as weights:
            assert len(list(weights.keys())) > 0


def assert_clear(error, *said):
    """One message, without what only the client's makers can read, and with each of the texts."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 260, text
    assert not re.search(r"127\.0\.0\.1|request.id|\[E\d|[一-鿿]", text, re.IGNORECASE), text
    for one in said:
        assert one in text
    assert error.value._render_traceback_() == [f"CourseError: {text}"]


def kept(course):
    """What of the model lies in the cache under its own name; each must be right, whatever went wrong."""
    folder = course.output / "hub" / "models" / "course--glm4-moe-mini" / "snapshots" / "master"
    found = {path.name for path in folder.iterdir() if path.suffix != ".incomplete"}
    for name in found:
        assert (folder / name).read_bytes() == (utils.BUNDLED / name).read_bytes()
    return found


def everything():
    return {path.name for path in utils.BUNDLED.iterdir()}


def test_the_client_waits_a_second_and_tries_as_often_as_ever():
    from modelscope_hub import constants

    assert [getattr(constants, name) for name in SECOND if hasattr(constants, name)] == [1] * len(SECOND)
    assert constants.DOWNLOAD_RETRY_TIMES == 5


def test_without_a_fault(fetch, hub):
    folder = fetch(hub.endpoint)
    assert_complete(folder)
    for path in utils.BUNDLED.iterdir():
        assert hub.received(path.name) == path.stat().st_size


# ------------------------------------------------------------------------- faults that the client gets over


@pytest.mark.parametrize("times", [1, 5])
def test_a_broken_connection_is_resumed_and_nothing_comes_twice(fetch, hub, fault, times):
    hub.fail(FIRST, "drop", times)
    assert_complete(fetch(hub.endpoint))
    assert hub.requests.count(FIRST) == times + 1
    assert hub.received(FIRST) == (utils.BUNDLED / FIRST).stat().st_size
    fault.record(
        AREA,
        f"connection broken {times}× in one file",
        "half of what is left is sent, then the socket is shut",
        f"the client resumes with Range; {COMPLETE}; bytes served = the file's length",
    )


@pytest.mark.parametrize(
    ("kind", "name", "injected"),
    [
        ("500", LAST, "HTTP 500 for one shard, three times"),
        ("503", LISTING, "HTTP 503 for the listing, three times"),
    ],
)
def test_a_passing_server_error_is_waited_out(fetch, hub, fault, kind, name, injected):
    hub.fail(name, kind, 3)
    assert_complete(fetch(hub.endpoint))
    fault.record(AREA, f"passing server error {kind}", injected, f"the client tries again; {COMPLETE}")


def test_a_stall_is_broken_off_and_resumed(fetch, hub, fault):
    hub.fail(LAST, "stall")
    assert_complete(fetch(hub.endpoint))
    assert hub.received(LAST) == (utils.BUNDLED / LAST).stat().st_size
    fault.record(
        AREA,
        "hub falls silent once",
        "half of a shard is sent, then nothing; the client's idle limit is set to a second",
        f"the client gives up waiting and resumes; {COMPLETE}",
    )


@pytest.mark.parametrize(("kind", "words"), [("wrong", "one bit differs"), ("short", "ten bytes are missing")])
def test_wrong_content_once_is_fetched_anew(fetch, hub, fault, kind, words):
    hub.fail(LAST, kind)
    assert_complete(fetch(hub.endpoint))
    assert hub.requests.count(LAST) == 2
    fault.record(AREA, f"{words}, once", "one answer of the hub is altered", f"thrown away, fetched anew; {COMPLETE}")


# ----------------------------------------------------------------- faults that stay: one message, nothing lost


@pytest.mark.parametrize(
    ("kind", "said", "words", "tries"),
    [
        ("drop", "the connection broke off or stood still", "connection broken every time", 6),
        ("stall", "the connection broke off or stood still", "hub falls silent every time", 6),
        ("500", "the hub is in trouble or overrun (HTTP 500)", "server error 500 every time", 6),
        ("wrong", "what arrived is not what the hub lists", "one bit differs every time", 3),
        ("short", "what arrived is not what the hub lists", "ten bytes missing every time", 2),
        ("404", "the hub lists this file and does not have it", "a listed shard gives 404", 1),
    ],
)
def test_a_lasting_fault_is_said_and_the_next_run_fetches_the_rest_only(
    fetch, course, hub, fault, kind, said, words, tries
):
    hub.fail(LAST, kind, ALWAYS)
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert_clear(error, LAST, said, "again")
    assert hub.requests.count(LAST) == tries
    assert kept(course) == everything() - {LAST}
    with FaultyHub(utils.BUNDLED, MODEL_ID) as mended:
        assert_complete(fetch(mended.endpoint))
        assert mended.requests == [LAST]
        both = hub.received(LAST) + mended.received(LAST) if kind in ("drop", "stall") else mended.received(LAST)
        assert both == (utils.BUNDLED / LAST).stat().st_size
    fault.record(
        AREA,
        words,
        f"`{kind}` for one shard until the client gives up (tries: {tries})",
        "one message names the file and says what to do; no damaged file under its name; "
        "the next run asks for this file only",
    )


def test_a_lasting_error_of_the_listing_is_said(fetch, hub, fault):
    hub.fail(LISTING, "500", ALWAYS)
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert_clear(error, MODEL_ID, "the hub is in trouble or overrun (HTTP 500)", AGAIN)
    fault.record(AREA, "listing gives 500 every time", "HTTP 500 for the listing", "one message that says what to do")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("404", "knows no such model. Check COURSE_MODEL"),
        ("401", "MODELSCOPE_API_TOKEN"),
        ("403", "MODELSCOPE_API_TOKEN"),
    ],
)
def test_a_model_that_is_not_there_or_not_open_is_said(fetch, hub, fault, status, said):
    hub.fail(LISTING, status, ALWAYS)
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert_clear(error, MODEL_ID, said)
    assert hub.requests == []
    fault.record(AREA, f"listing gives {status}", f"HTTP {status} for the listing", "one message that says what to do")


def test_a_model_that_vanishes_after_the_first_look_is_said(fetch, hub):
    hub.fail(LISTING, "").fail(LISTING, "404", ALWAYS)
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert_clear(error, "knows no such model")


def test_no_hub_at_all_is_said(fetch, fault):
    with pytest.raises(utils.CourseError) as error:
        fetch(f"http://127.0.0.1:{refused_port()}")
    assert_clear(error, MODEL_ID, "the connection broke off", "Check the network", AGAIN)
    fault.record(AREA, "no hub there", "an endpoint whose port has no server", "one message that says what to do")


def test_a_complete_cache_needs_no_hub(cell, fetch, course, fault):
    with FaultyHub(utils.BUNDLED, MODEL_ID) as closing:
        folder = fetch(closing.endpoint)
    names = {"settings": course, "model_id": MODEL_ID, "cache": course.output / "hub", "folder": folder}
    names |= {"utils": utils, "Path": Path, **client()}
    exec(cell("02_download", "local_files_only=True)"), names)
    assert Path(names["again"]) == folder
    fault.record(AREA, "network gone after a complete download", "the hub is stopped", "the cache is used as it is")


def test_several_failing_files_are_one_message(fetch, hub, fault):
    for name in shards:
        hub.fail(name, "404", ALWAYS)
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert_clear(error, " and 4 more: the hub lists this file")
    fault.record(AREA, "every shard gives 404", "HTTP 404 for three files", "one message: the first, and how many more")


def client():
    from modelscope import HubApi, snapshot_download

    return {"HubApi": HubApi, "snapshot_download": snapshot_download}


def test_a_shard_that_the_listing_lacks_is_named(fetch, hub, fault):
    hub.relist = lambda files, _: [file for file in files if file["Path"] != LAST]
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert_clear(error, f"its index names weights that are missing: {LAST}")
    fault.record(
        AREA,
        "a shard is missing from the listing",
        "the listing leaves out a shard that the index names",
        "the client says nothing; the notebook names the shard",
    )


def test_later_notebooks_refuse_a_model_that_lost_a_shard(fetch, course, hub, fault):
    folder = fetch(hub.endpoint)
    moved = dataclasses.replace(course, model=str(folder))
    assert model_folder(moved) == folder
    (folder / LAST).unlink()
    with pytest.raises(utils.CourseError, match=f"missing: {LAST}"):
        model_folder(moved)
    assert_complete(fetch(hub.endpoint))
    assert hub.requests.count(LAST) == 2
    assert hub.requests.count(FIRST) == 1
    fault.record(
        AREA,
        "a shard is deleted after the download",
        "the file is removed from the cache",
        "notebooks 05 and 06 name it; running 02 again fetches this file only",
    )


def test_a_file_cut_short_in_the_cache_is_fetched_again(fetch, hub, fault):
    folder = fetch(hub.endpoint)
    with (folder / LAST).open("r+b") as shard:
        shard.truncate(1000)
    assert_complete(fetch(hub.endpoint))
    assert hub.requests.count(LAST) == 2
    assert hub.requests.count(FIRST) == 1
    fault.record(
        AREA,
        "a shard is cut short after the download",
        "the file in the cache is truncated",
        f"its length tells; the next run fetches this file only; {COMPLETE}",
    )


def test_a_full_disk_is_named_before_what_it_brings_about():
    from modelscope_hub.errors import FileDownloadError, NetworkError

    failed = {"a": NetworkError("x"), "b": OSError(errno.ENOSPC, "No space left on device"), "c": NetworkError("y")}
    with pytest.raises(utils.CourseError, match="b and 2 more: the disk is full"), download.download_errors(MODEL_ID):
        raise FileDownloadError("3 of 9", failed_files=failed)


def test_what_nobody_foresaw_is_said_in_one_line():
    with pytest.raises(utils.CourseError) as error, download.download_errors(MODEL_ID):
        raise KeyError("Data\nmore")
    assert_clear(error, "KeyError", AGAIN)
    with pytest.raises(KeyboardInterrupt), download.download_errors(MODEL_ID):
        raise KeyboardInterrupt


def test_a_download_killed_in_the_middle_goes_on_where_it_stopped(fetch, course, hub, fault):
    """SIGKILL while half of the last shard is on the disk; the rest of it comes from the second run."""
    hub.fail(LAST, "stall", ALWAYS)
    code = f"""
import os
os.environ.update(MODELSCOPE_LOG_LEVEL="50", TQDM_DISABLE="1")
from modelscope import snapshot_download
snapshot_download({MODEL_ID!r}, revision="master", cache_dir={str(course.output / "hub")!r}, endpoint={hub.endpoint!r})
"""
    # The client's own patience of a minute: with a second's, it breaks off and asks again while the test looks.
    patient = {name: value for name, value in os.environ.items() if name != "MODELSCOPE_DOWNLOAD_TIMEOUT"}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=utils.ROOT, env=patient)
    size = (utils.BUNDLED / LAST).stat().st_size
    partial = course.output / f"hub/models/course--glm4-moe-mini/snapshots/master/{LAST}.incomplete"
    try:
        until = time.monotonic() + 60
        # The last kilobytes of what has arrived may still be in the client's buffer.
        while not (partial.is_file() and partial.stat().st_size > 0.45 * size):
            assert time.monotonic() < until
            assert child.poll() is None
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    arrived = partial.stat().st_size
    assert arrived <= size // 2
    with FaultyHub(utils.BUNDLED, MODEL_ID) as mended:
        assert_complete(fetch(mended.endpoint))
        assert mended.received(LAST) == size - arrived
    fault.record(
        AREA,
        "the kernel is killed in the middle of a shard",
        "SIGKILL while half of a shard is on the disk",
        f"the next run fetches the other half only; {COMPLETE}",
    )


# --------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes."""
    mounted = []

    def make(size):
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small tmpfs needs root")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def size_of(names):
    return sum((utils.BUNDLED / name).stat().st_size for name in names)


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(fetch, hub, small_disk, fault):
    place = small_disk(size_of(everything()) - 1_000_000)
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint, place / "output")
    assert_clear(error, MODEL_ID, "MiB are still to come", "MiB of disk are free", "COURSE_OUTPUT")
    assert hub.requests == []
    fault.record(AREA, "disk too small", "a tmpfs a megabyte too small", "said before the first byte, with what to do")


def test_disk_space_is_asked_only_for_what_is_missing(fetch, hub, small_disk):
    place = small_disk(size_of(everything()) + 2_000_000)
    hub.fail(LAST, "404", 1)
    with pytest.raises(utils.CourseError, match="does not have it"):
        fetch(hub.endpoint, place / "output")
    assert shutil.disk_usage(place).free < size_of(everything())
    assert_complete(fetch(hub.endpoint, place / "output"))


def test_disk_space_is_not_asked_again_for_a_file_that_is_half_here(fetch, hub, small_disk):
    place = small_disk(size_of(everything()) + 1_000_000)
    hub.fail(FIRST, "drop").fail(FIRST, "500", ALWAYS)
    with pytest.raises(utils.CourseError, match=f"{FIRST}: the hub is in trouble"):
        fetch(hub.endpoint, place / "output")
    assert shutil.disk_usage(place).free < size_of([FIRST])
    with FaultyHub(utils.BUNDLED, MODEL_ID) as mended:
        assert_complete(fetch(mended.endpoint, place / "output"))


def test_a_disk_that_fills_up_meanwhile_is_said_and_nothing_is_lost(fetch, hub, small_disk, fault):
    place = small_disk(size_of(everything()) + 2_000_000)
    other = place / "of-another-program"

    def fill(files, number):
        if number > 1:  # after the notebook's own look at the listing
            other.write_bytes(bytes(3_000_000))
        return files

    hub.relist = fill
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint, place / "output")
    assert_clear(error, "the disk is full. Free some", AGAIN)
    hub.relist = lambda files, _: files
    other.unlink()
    complete = [name for name in shards if any(place.rglob(name))]
    before = len(hub.requests)
    assert_complete(fetch(hub.endpoint, place / "output"))
    assert set(hub.requests[before:]).isdisjoint(complete)
    for name in shards:
        assert hub.received(name) < 2 * (utils.BUNDLED / name).stat().st_size
    fault.record(
        AREA,
        "disk full in the middle",
        "a small tmpfs; another program fills it after the check",
        f"one message that says what to do; with room again, complete files are not fetched again; {COMPLETE}",
    )


# --------------------------------------------------------------------------- what is complete is not read again


def test_a_complete_model_is_neither_fetched_nor_hashed_again(fetch, course, hub, monkeypatch, fault):
    fetch(hub.endpoint)
    before, hashed = len(hub.requests), []
    real = hashlib.sha256

    class Counting:
        def __init__(self, data=b"", **_):
            self.digest_of = real(data)

        def update(self, data):
            hashed.append(len(data))
            self.digest_of.update(data)

        def hexdigest(self):
            return self.digest_of.hexdigest()

    monkeypatch.setattr("modelscope_hub._download.hashlib.sha256", Counting)
    hub._files()  # the hub hashes what it lists with the same function; that is none of the client's reading
    hashed.clear()
    listing = LocalHub._files(hub)
    monkeypatch.setattr(LocalHub, "_files", lambda _: listing)
    hashed.clear()
    folder = fetch(hub.endpoint)
    small = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".json", ".jinja"))
    assert sum(hashed) == small
    assert len(hub.requests) == before
    # The same call without `local_files_only` reads everything, so the count above can tell.
    hashed.clear()
    client()["snapshot_download"](
        MODEL_ID, revision="master", cache_dir=str(course.output / "hub"), endpoint=hub.endpoint
    )
    assert sum(hashed) == size_of(everything())
    fault.record(
        AREA,
        "notebook 02 is run again",
        "the model is complete; bytes given to SHA-256 are counted",
        "no shard is asked for or hashed again, only the small files",
    )


# --------------------------------------------------------------------------------------- paths out of the cache


EVIL = {
    "a path with ../": lambda tmp: "../../../../../../escaped.json",
    "a path with x/../../": lambda tmp: "x/../../../../../../../escaped.json",
    "an absolute path": lambda tmp: str(tmp / "escaped.json"),
}


def evil_hub(hub, path, from_listing):
    content = b'{"written": "outside"}'
    hub.outside[path] = content
    hub.relist = lambda files, number: [*files, entry(path, content)] if number >= from_listing else files


@pytest.mark.parametrize("kind", EVIL)
def test_a_listed_path_cannot_leave_the_cache(fetch, course, hub, tmp_path, fault, kind):
    path = EVIL[kind](tmp_path)
    # What the client makes of it by itself; else the rest would prove nothing.
    evil_hub(hub, path, 1)
    client()["snapshot_download"](
        MODEL_ID, revision="master", cache_dir=str(course.output / "hub"), endpoint=hub.endpoint
    )
    (escaped,) = tmp_path.rglob("escaped.json")
    assert not escaped.is_relative_to(course.output)
    escaped.unlink()
    shutil.rmtree(course.output)
    hub.requests.clear()
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert "leads out of" in str(error.value)
    assert hub.requests == []
    # A hub that lists the path only after it was looked at.
    hub._listings = 0
    evil_hub(hub, path, 2)
    assert_complete(fetch(hub.endpoint))
    assert path not in hub.requests
    assert not list(tmp_path.rglob("escaped.json"))
    fault.record(
        AREA,
        f"the listing holds {kind}",
        "an entry whose path leads out of the cache, at once or only in the second listing",
        "refused before the first byte, or left out (`ignore_patterns`); nothing is written outside "
        "(only the client writes it there)",
    )


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_link_in_the_cache_is_not_followed_out_of_it(fetch, course, hub, tmp_path, fault, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    place = course.output / "hub" / "models" / "course--glm4-moe-mini" / "snapshots" / "master"
    place.mkdir(parents=True)
    if kind == "folder":
        (place / "sub").symlink_to(outside)
        evil_hub(hub, "sub/config.json", 1)
    else:
        (outside / "config.json").write_text("mine")
        (place / "config.json").symlink_to(outside / "config.json")
    with pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert "leads out of" in str(error.value)
    assert "links" in str(error.value)
    assert hub.requests == []
    assert [path.read_text() for path in outside.iterdir()] == (["mine"] if kind == "file" else [])
    fault.record(
        AREA,
        f"a link to a {kind} outside lies in the cache",
        "a symbolic link where the listing has a file",
        "refused before the first byte; nothing is written outside",
    )


def test_pickles_and_code_are_not_fetched(fetch, hub, fault):
    dangerous = (
        "pytorch_model.bin",
        "optimizer.pt",
        "rng_state.pth",
        "model.pkl",
        "a.ckpt",
        "modeling.py",
        "sub/b.bin",
    )
    hub.outside.update(dict.fromkeys(dangerous, b"x"))
    hub.relist = lambda files, _: files + [entry(path, b"x") for path in dangerous]
    assert_complete(fetch(hub.endpoint))
    assert set(hub.requests) == everything()
    assert_complete(fetch(hub.endpoint))
    fault.record(
        "security",
        "the hub offers pickles and code",
        "the listing holds *.bin, *.pt, *.pth, *.pkl, *.ckpt and *.py",
        "none is asked for; the model is complete without them",
    )


def test_only_a_pickle_on_the_hub_is_refused(fetch, tmp_path, fault):
    served = tmp_path / "served"
    served.mkdir()
    shutil.copy(utils.BUNDLED / "config.json", served)
    (served / "pytorch_model.bin").write_bytes(b"x")
    with FaultyHub(served, MODEL_ID) as hub, pytest.raises(utils.CourseError) as error:
        fetch(hub.endpoint)
    assert_clear(error, "no *.safetensors there. The course loads no other kind of weights.")
    fault.record("security", "the hub has a pickle only", "pytorch_model.bin, no safetensors", "refused, not fetched")


def test_the_notebook_shows_the_line_that_is_taught(cell):
    for text in ("allow_patterns=[", "folder = snapshot_download("):
        source = cell("02_download", text)
        assert "snapshot_download(" in source
        assert "download.download_errors(model_id, endpoint)" in source
        ast.parse(source)


def test_the_note_names_the_folder(cell, fetch, course, hub):
    folder, cache = fetch(hub.endpoint), course.output / "hub"
    exec(cell("02_download", "note.write_text"), {"cache": cache, "folder": folder, "model_id": MODEL_ID, "json": json})
    assert model_folder(dataclasses.replace(course, model=MODEL_ID)) == folder
