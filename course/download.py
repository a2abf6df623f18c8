"""What lies between a hub and this machine: proxies, what is still to fetch, and a message for each fault.

Knows ModelScope's client and its errors. Knows nothing of what a fetched model must hold (`model_folder`).
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import re
import shutil
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import utils
from course.language import say

#: What a download leaves out, whatever a hub lists: paths that lead out of the cache, and files that can hold code.
NEVER_FETCHED = ["/*", "../*", "*/../*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.py"]
#: The names of this machine, to which no request may go through a proxy.
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def proxy_for(url: str) -> str:
    """The proxy that a request to the address takes, as `URL (variable)` without its user and password, or nothing."""
    from requests.utils import get_environ_proxies, select_proxy

    if not (proxy := select_proxy(url, get_environ_proxies(url))):
        return ""
    names = (f"{urllib.parse.urlsplit(url).scheme}_proxy", "all_proxy")
    source = [name for name, value in os.environ.items() if name.lower() in names and value == proxy]
    return f"{re.sub('^([a-z0-9]+://)?.*@', lambda kept: kept[1] or '', proxy)} ({(source or ['system settings'])[0]})"


def _through_proxy(url: str) -> str:
    """A sentence that names the proxy of an address, with a space before it; nothing where there is none."""
    if not (proxy := proxy_for(url)):
        return ""
    return " " + say("The request went through the proxy {proxy}; check it, or name the host in no_proxy.", proxy=proxy)


@contextmanager
def around_proxies() -> Iterator[None]:
    """Let requests to this machine go to it directly, whatever proxy the environment sets, until the block ends."""
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ.get(name) for name in names}
    hosts = [host for host in (before["no_proxy"] or before["NO_PROXY"] or "").split(",") if host.strip()]
    if [host.strip() for host in hosts] != ["*"]:  # a star, which must be the only entry, excepts every host already
        hosts += [host for host in THIS_MACHINE if host not in hosts]
    os.environ.update(dict.fromkeys(names, ",".join(hosts)))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def hub_answers(model_id: str, seconds: float = 5.0) -> bool:
    """Whether the hub answers in that time, asked as ModelScope's client asks it; a line says why it does not.

    The address is the client's own (`MODELSCOPE_ENDPOINT`, else ModelScope's hub), and so is the way to it: through
    the environment's proxies.
    """
    import requests
    from modelscope import HubApi

    endpoint = HubApi().endpoint
    trouble = [say("does not answer within {seconds:.0f} s", seconds=seconds)]

    def ask() -> None:
        try:
            with requests.get(endpoint, timeout=seconds, stream=True, allow_redirects=False) as answer:
                refused = answer.status_code in (403, 407) and proxy_for(endpoint)
                bad = answer.status_code >= 500 or refused
                trouble[0] = say("answers HTTP {status}", status=answer.status_code) if bad else ""
        except requests.exceptions.SSLError:
            trouble[0] = say("shows a certificate that is not trusted (REQUESTS_CA_BUNDLE names a file of yours)")
        except (requests.RequestException, ValueError) as error:
            trouble[0] = say("cannot be reached ({reason})", reason=type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(seconds)
    if trouble[0]:
        print(
            say(
                "{endpoint} {trouble}, so {model} cannot be fetched now. The bundled model shows the steps.",
                endpoint=endpoint,
                trouble=trouble[0],
                model=model_id,
            )
            + _through_proxy(endpoint)
        )
    return not trouble[0]


def still_to_fetch(listing: Iterable[Any], model_id: str, cache: Path) -> list[str]:
    """Which files of a hub's listing are not in the cache at their full length; checked before the first byte.

    The client moves a file to its place only after its hash was right, so a file of the right length needs no second
    reading.

    Args:
        listing: entries with `path`, `size` and `type`, as `HubApi.list_repo_files` returns them.

    Raises:
        CourseError: a path leads out of the cache (the client itself would write there), or the disk is too small.
    """
    folder = cache / "models" / model_id.replace("/", "--") / "snapshots" / "master"
    folder.mkdir(parents=True, exist_ok=True)
    missing, needed = [], 0
    for file in listing:
        target = folder / file.path
        if not target.resolve().is_relative_to(folder.resolve()):
            raise utils.CourseError(
                say(
                    "{model}: {path!r} leads out of {cache}, so nothing was fetched. "
                    "Check COURSE_MODEL, and that folder for links.",
                    model=model_id,
                    path=file.path,
                    cache=utils.shown(cache),
                )
            )
        ignored = any(fnmatch.fnmatch(file.path, pattern) for pattern in NEVER_FETCHED)
        if file.type == "tree" or ignored or (target.is_file() and target.stat().st_size == file.size):
            continue
        begun = target.with_name(target.name + ".incomplete")
        missing.append(file.path)
        needed += file.size - (begun.stat().st_size if begun.is_file() else 0)
    if needed > (free := shutil.disk_usage(folder).free):
        raise utils.CourseError(
            say(
                "{model}: {needed:,.0f} MiB are still to come and {free:,.0f} MiB of disk are free. "
                "Free some, or set COURSE_OUTPUT to a folder on a larger disk.",
                model=model_id,
                needed=needed / 2**20,
                free=free / 2**20,
            )
        )
    return missing


@contextmanager
def download_errors(model_id: str, endpoint: str | None = None) -> Iterator[None]:
    """Turn whatever stops a ModelScope download into one message with the cure, in the place of the client's own.

    Args:
        endpoint: the hub's address, to name the proxy on the way to it; None for the client's own.
    """
    from modelscope import HubApi

    client = logging.getLogger("modelscope_hub.download")

    def no_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR  # warnings show how it tries again; the error is said below

    client.addFilter(no_error)
    try:
        yield
    except utils.CourseError:
        raise
    except Exception as error:
        failed = list((getattr(error, "failed_files", None) or {"": error}).items())
        # One file's error represents all; a full disk before others, for it may be their cause.
        name, cause = max(failed, key=lambda one: getattr(one[1], "errno", None) == errno.ENOSPC)
        files = f": {name}" if name else ""
        if name and len(failed) > 1:
            files += say(" and {count} more", count=len(failed) - 1)
        local = getattr(cause, "errno", None) == errno.ENOSPC
        through = "" if local else _through_proxy(endpoint or HubApi().endpoint)
        raise utils.CourseError(f"{model_id}{files}: {_download_advice(name, cause)}{through}") from None
    finally:
        client.removeFilter(no_error)


def _download_advice(name: str, error: BaseException) -> str:
    """What happened to a file (or, without a name, to the listing), and what helps."""
    from modelscope_hub import errors as hub

    again = say("Run this cell again: what has arrived is kept, and only the rest is fetched.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return say(
            "the disk is full. Free some, or set COURSE_OUTPUT to a folder on a larger disk. {again}", again=again
        )
    if isinstance(error.__cause__, hub.HubError) and not isinstance(error, hub.HubError):
        error = error.__cause__  # the client wraps some in an error of `requests`
    if isinstance(error, hub.NotExistError):
        if name:
            return say("the hub lists this file and does not have it. Try again later, or another model.")
        return say("the hub knows no such model. Check COURSE_MODEL for a slip of the pen.")
    if isinstance(error, (hub.AuthenticationError, hub.PermissionDeniedError)):
        return say(
            "the hub asks who you are. Put your token in the variable MODELSCOPE_API_TOKEN, or choose an open model."
        )
    if isinstance(error, hub.FileIntegrityError):
        return say(
            "what arrived is not what the hub lists (length or SHA-256), so it was thrown away. Later: {again}",
            again=again,
        )
    if isinstance(error, (hub.ServerError, hub.RateLimitError)):
        return say(
            "the hub is in trouble or overrun (HTTP {status}). Wait a little. {again}",
            status=error.status_code,
            again=again,
        )
    if isinstance(error, (hub.NetworkError, ConnectionError, TimeoutError)):
        return say("the connection broke off or stood still, several times. Check the network. {again}", again=again)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}. {again}"


def say_update(seconds: float = 3.0) -> None:
    """Print a line when the address in `COURSE_UPDATES` names a newer version (a date) than `deploy/VERSION`.

    Without the variable no address is asked. No answer in that time, or one that is no date, is no news.
    """
    address, answer = os.environ.get("COURSE_UPDATES", ""), []
    if not address.startswith(("https://", "http://")):
        return

    def ask() -> None:
        with suppress(Exception), urllib.request.urlopen(address, timeout=seconds) as reply:
            answer.append(reply.read(64).decode().strip())

    asking = threading.Thread(target=ask, daemon=True)  # a name that is looked up heeds no timeout
    asking.start()
    asking.join(seconds)
    here = (utils.ROOT / "deploy" / "VERSION").read_text(encoding="utf-8").strip()
    if answer and re.fullmatch(r"\d{4}-\d\d-\d\d", answer[0]) and answer[0] > here:
        print(say("A newer version of the course is out: {new}. Yours is of {here}.", new=answer[0], here=here))
