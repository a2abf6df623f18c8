"""A hub on this machine, so that notebook 02 can show a download without internet.

Knows the routes that ModelScope's client asks for. Knows nothing of models: it serves the files of one folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from course.download import around_proxies


@dataclass
class LocalHub:
    """A server on 127.0.0.1 that speaks the routes a ModelScope download asks for, and serves one folder.

    Attributes:
        folder: what it serves. model_id: under which id. drop_once: a file whose first transfer is broken off
            half-way, to see the client resume. sent: bytes sent for each request, as (file, first byte, bytes).
    """

    folder: Path
    model_id: str
    drop_once: str = ""
    sent: list[tuple[str, int, int]] = field(default_factory=list)

    def __enter__(self) -> LocalHub:
        """Start serving on a free port, which requests of this process reach without a proxy."""
        hub = self
        self._direct = around_proxies()
        self._direct.__enter__()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop serving."""
        self._direct.__exit__(None, None, None)
        self._server.shutdown()
        self._server.server_close()

    def _files(self) -> list[dict[str, Any]]:
        return [
            {
                "Name": path.name,
                "Path": path.name,
                "Type": "blob",
                "Size": path.stat().st_size,
                "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "Revision": "master",
                "IsLFS": path.suffix == ".safetensors",
            }
            for path in sorted(self.folder.iterdir())
            if path.is_file()
        ]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(request.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        base = f"/api/v1/models/{self.model_id}/repo"
        # A listed name is matched, never joined to a path, so no request leaves the folder.
        served = {path.name: path for path in self.folder.iterdir() if path.is_file()}
        if url.path == f"{base}/files":
            body = json.dumps({"Code": 200, "Success": True, "Data": {"Files": self._files()}}).encode()
            self._send(request, 200, body, {"Content-Type": "application/json"})
        elif url.path == base and query.get("FilePath") in served:
            self._send_file(request, served[query["FilePath"]])
        else:
            self._send(request, 404, b'{"Code": 404, "Success": false, "Message": "not found"}', {})

    def _send_file(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]), len(data) - 1) if asked and asked[2] else len(data) - 1
        part = data[first : last + 1]
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if asked else {}
        if path.name == self.drop_once:
            self.drop_once = ""
            half = part[: len(part) // 2]
            self.sent.append((path.name, first, len(half)))
            self._send(request, 206 if asked else 200, half, {**headers, "Content-Length": str(len(part))})
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        self.sent.append((path.name, first, len(part)))
        self._send(request, 206 if asked else 200, part, headers)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)
