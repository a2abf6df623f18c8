"""Starting on the machines that people have: proxies, root, folders with a space, systems without POSIX locks."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from faulty_hub import refused_port
from modelscope_hub.config import set_default_config

import utils

ROOT = Path(__file__).resolve().parents[1]
MODEL_ID = "owner/name"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


# --------------------------------------------------------------------------------------------------- proxies


class Proxy:
    """An HTTP proxy on 127.0.0.1 that answers every request with a status, or fetches it from another server."""

    def __init__(self, status: int = 403, behind: str = "") -> None:
        self.asked: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.asked.append(self.path)
                answer, body = status, b"refused"
                if behind:
                    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                    try:
                        with direct.open(behind + self.path.removeprefix("http://hub.example:80")) as reply:
                            answer, body = reply.status, reply.read()
                    except urllib.error.HTTPError as error:
                        answer, body = error.code, error.read()
                self.send_response(answer)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_CONNECT = do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def no_proxies(monkeypatch):
    for name in (*PROXY_VARIABLES, "no_proxy", "NO_PROXY", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    set_default_config(None)  # the client reads MODELSCOPE_ENDPOINT once in a process
    yield monkeypatch
    set_default_config(None)


def fetched(cell, course, model_id: str, endpoint: str | None) -> Path:
    """What the download cells of notebook 02 fetch."""
    names = {"course": course, "model_id": model_id, "endpoint": endpoint, "utils": utils, "Path": Path}
    exec(cell("02_download", "allow_patterns=["), names)
    exec(cell("02_download", "folder = snapshot_download("), names)
    return names["folder"]


@pytest.mark.parametrize("status", [0, 403, 407])
@pytest.mark.parametrize("names", [PROXY_VARIABLES[:3], PROXY_VARIABLES[3:], ["ALL_PROXY"]])
def test_requests_to_this_machine_go_around_every_proxy(no_proxies, cell, tmp_path, status, names):
    course = dataclasses.replace(utils.settings(), output=tmp_path / "output")
    with Proxy(status or 403) as proxy:
        url = proxy.url if status else f"http://127.0.0.1:{refused_port()}"
        for name in names:
            no_proxies.setenv(name, url)
        with utils.LocalHub(utils.BUNDLED, MODEL_ID) as hub:
            folder = fetched(cell, course, MODEL_ID, hub.endpoint)
        assert (folder / "config.json").read_bytes() == (utils.BUNDLED / "config.json").read_bytes()
        assert not proxy.asked


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": ".uni.example,localhost"}, ".uni.example,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_the_hosts_that_need_no_proxy_are_added_and_taken_away_again(no_proxies, before, inside):
    for name, value in before.items():
        no_proxies.setenv(name, value)
    with utils.around_proxies():
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == inside
    assert {name: os.environ[name] for name in ("no_proxy", "NO_PROXY") if name in os.environ} == before


def test_a_hub_that_only_a_proxy_reaches_is_found_and_fetched_from(no_proxies, cell, tmp_path):
    course = dataclasses.replace(utils.settings(), output=tmp_path / "output")
    with utils.LocalHub(utils.BUNDLED, MODEL_ID) as hub, Proxy(behind=hub.endpoint) as proxy:
        no_proxies.setenv("http_proxy", proxy.url)
        no_proxies.setenv("MODELSCOPE_ENDPOINT", "http://hub.example:80")
        assert utils.hub_answers(MODEL_ID)
        folder = fetched(cell, course, MODEL_ID, None)
    assert (folder / "config.json").read_bytes() == (utils.BUNDLED / "config.json").read_bytes()
    assert any("FilePath=config.json" in path for path in proxy.asked)


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("status", [0, 403, 407])
def test_an_error_names_the_proxy_and_its_variable_and_no_password(
    no_proxies, cell, tmp_path, capsys, variable, status
):
    course = dataclasses.replace(utils.settings(), output=tmp_path / "output")
    no_proxies.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "1")
    with Proxy(status or 403) as proxy:
        port = proxy.server.server_port if status else refused_port()
        no_proxies.setenv(variable, f"http://anna:geheim@127.0.0.1:{port}")
        assert not utils.hub_answers(MODEL_ID)
        with pytest.raises(utils.CourseError) as error:
            fetched(cell, course, MODEL_ID, "https://hub.example")
    for said in (capsys.readouterr().out, str(error.value)):
        assert f"through the proxy http://127.0.0.1:{port} ({variable})" in said
        assert "geheim" not in said and "anna" not in said


def test_a_hub_that_does_not_answer_is_said_without_a_proxy_where_there_is_none(no_proxies, capsys):
    no_proxies.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{refused_port()}")
    assert not utils.hub_answers(MODEL_ID)
    said = capsys.readouterr().out
    assert f"so {MODEL_ID} cannot be fetched now" in said and "proxy" not in said
