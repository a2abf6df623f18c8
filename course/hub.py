"""A hub on this machine, so that notebook 02 can show a download without internet, and notebook 09 an upload.

Knows the routes that ModelScope's client asks for. Knows nothing of models: it serves the files of one folder, and
takes files for it where it is given a token.
"""

from __future__ import annotations

import base64
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
            half-way, to see the client resume. token: who shows it may create the repository `model_id` and upload
            into it; without one nobody may. sent: bytes sent for each request, as (file, first byte, bytes).
            created: what was said of the repository when it was created.
    """

    folder: Path
    model_id: str
    drop_once: str = ""
    token: str = ""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    created: dict[str, Any] = field(default_factory=dict)
    _blobs: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> LocalHub:
        """Start serving on a free port, which requests of this process reach without a proxy."""
        hub = self
        self._direct = around_proxies()
        self._direct.__enter__()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            def do_POST(self) -> None:
                hub._take(self)

            def do_PUT(self) -> None:
                hub._take(self)

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

    def _take(self, request: BaseHTTPRequestHandler) -> None:
        """What an upload asks for: a repository, which large files are wanted, those files, and the commit."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = urllib.parse.urlsplit(request.path).path
        if not self.token or request.headers.get("Authorization") != f"Bearer {self.token}":
            return self._say(request, 401, "the token is not known here")
        if request.command == "PUT" and path.startswith("/blob/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/blob/"):
                return self._say(request, 400, "the file is not what was announced")
            self._blobs[path.removeprefix("/blob/")] = body
            return self._say(request, 200)
        asked = json.loads(body)
        if path == "/api/v1/models":
            if self.created:
                return self._say(request, 409, "the repository exists already")
            self.created = asked
            return self._say(request, 200, data=asked)
        repository = f"/api/v1/repos/models/{self.model_id}"
        if not self.created or not path.startswith(repository):
            return self._say(request, 404, "no such repository")
        if path == f"{repository}/info/lfs/objects/batch":
            wanted = [
                {"oid": one["oid"], "actions": {"upload": {"href": f"{self.endpoint}/blob/{one['oid']}"}}}
                for one in asked["objects"]
                if one["oid"] not in self._blobs
            ]
            return self._say(request, 200, data={"objects": wanted})
        if path == f"{repository}/commit/master":
            for action in asked["actions"]:
                content = (
                    self._blobs[action["sha256"]] if action["type"] == "lfs" else base64.b64decode(action["content"])
                )
                (self.folder / Path(action["path"]).name).write_bytes(content)  # only names: nothing leaves the folder
            return self._say(request, 200, data={})
        return self._say(request, 404, "no such route")

    def _say(self, request: BaseHTTPRequestHandler, status: int, message: str = "", data: Any = None) -> None:
        """An answer as the hub writes one."""
        body = {"Code": status, "Success": status == 200, "Message": message, "Data": data}
        self._send(request, status, json.dumps(body).encode(), {"Content-Type": "application/json"})

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
