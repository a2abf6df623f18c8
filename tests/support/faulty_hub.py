"""A hub that fails on request: `LocalHub` with faults, for tests of what the real client makes of them."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from course.hub import LocalHub

#: In place of a file's name: the listing itself.
LISTING = "listing"
#: More often than any client tries.
ALWAYS = 1000


@dataclass
class FaultyHub(LocalHub):
    """Serves as `LocalHub` does, except for the faults that were asked for.

    Attributes:
        relist: what to do with the entries of the listing before they are sent; gets the number of the listing, from 1.
        outside: paths that no folder holds and the hub serves all the same, with their bytes.
        requests: every path of a file that was asked for, in order.
    """

    relist: Callable[[list[dict[str, Any]], int], list[dict[str, Any]]] = lambda files, _: files
    outside: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._faults: dict[str, list[str]] = {}
        self._listings = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def fail(self, name: str, kind: str, times: int = 1) -> FaultyHub:
        """Let the next requests for a file fail.

        Args:
            name: the file, or `LISTING`.
            kind: `drop` (half of the bytes, then the connection breaks), `stall` (half, then silence), `wrong` (one bit
                differs), `short` (ten bytes are missing and the header says so too), a status such as `500`,
                or nothing for a request that goes well.
        """
        self._faults.setdefault(name, []).extend([kind] * times)
        return self

    def received(self, name: str) -> int:
        """How many bytes of a file went over the line."""
        return sum(count for sent, _, count in self.sent if sent == name)

    def __exit__(self, *args: Any) -> None:
        self._stopped.set()
        super().__exit__(*args)

    def _next_fault(self, name: str) -> str:
        with self._lock:
            waiting = self._faults.get(name, [])
            return waiting.pop(0) if waiting else ""

    def _files(self) -> list[dict[str, Any]]:
        self._listings += 1
        return self.relist(super()._files(), self._listings)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(request.path)
        path = dict(urllib.parse.parse_qsl(url.query)).get("FilePath", "")
        if url.path.endswith("/repo/files") and (fault := self._next_fault(LISTING)):
            self._send(request, int(fault), b"{}", {})
        elif path in self.outside:
            self.requests.append(path)
            self._send(request, 200, self.outside[path], {})
        else:
            super()._answer(request)

    def _send_file(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        self.requests.append(path.name)
        fault = self._next_fault(path.name)
        if fault.isdigit():
            self._send(request, int(fault), b"{}", {})
        elif fault in ("drop", "stall"):
            data = path.read_bytes()
            asked = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
            first = int(asked[1]) if asked else 0
            half = data[first : first + (len(data) - first) // 2]
            headers = {"Content-Length": str(len(data) - first)}
            headers |= {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if asked else {}
            self.sent.append((path.name, first, len(half)))
            self._send(request, 206 if asked else 200, half, headers)
            if fault == "stall":
                self._stopped.wait(30)  # longer than the client waits in the tests
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
        elif fault:
            data = path.read_bytes()
            body = data[:-10] if fault == "short" else data[:-1] + bytes([data[-1] ^ 1])
            self.sent.append((path.name, 0, len(body)))
            self._send(request, 200, body, {})
        else:
            super()._send_file(request, path)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """An entry of a listing."""
    digest = hashlib.sha256(content).hexdigest()
    return {"Name": Path(path).name, "Path": path, "Type": "blob", "Size": len(content), "Sha256": digest}


def refused_port() -> int:
    """A port on 127.0.0.1 without a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
