"""llama.cpp's server as a process of its own on this machine, for notebook 09.

`Server` starts it, waits until the model is loaded, and stops it. The process ends by itself when the one that started
it ends, however that happens: it reads a pipe that closes then.

    python -m course.llama MODEL.gguf --port 8080 [--adapter ADAPTER.gguf]

starts the same server in a terminal; Ctrl+C ends it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from course.language import say
from utils import ROOT, CourseError, shown

HOST = "127.0.0.1"
#: The variable with a key that clients have to send, where other people work on the same machine.
KEY = "LLAMA_API_KEY"
#: One thread works on its own; several that wait for each other on busy cores are far slower.
QUIET = {"OMP_NUM_THREADS": "1"}
#: Talks to this machine, whatever proxy the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A running server; `with Server(...) as server:` stops it at the end.

    Args:
        model: a GGUF file; the `prompt.json` beside it becomes the system prompt of the chat page.
        adapter: a GGUF file of an adapter to load beside it. port: 0 for one that is free.
        threads: of the computation. seconds: how long the model may take to load.

    Attributes:
        url: of the server, without a slash at the end; the OpenAI-style routes begin at `url + "/v1"`.

    Raises:
        CourseError: a file that is missing, a port that is taken, or a server that ended while it loaded the model.
    """

    def __init__(
        self, model: Path, adapter: Path | None = None, port: int = 0, threads: int = 1, seconds: float = 120
    ) -> None:
        for path in filter(None, (model, adapter)):
            if not path.is_file():
                raise CourseError(
                    say("{path} is not there. Export it first: python -m finetune export gguf.", path=shown(path))
                )
        self.port = free_port(port)
        self.url = f"http://{HOST}:{self.port}"
        command = [sys.executable, "-m", "course.llama", str(model), "--port", str(self.port)]
        command += ["--threads", str(threads), "--until-closed"] + (["--adapter", str(adapter)] if adapter else [])
        handle, name = tempfile.mkstemp(prefix="llama-server-", suffix=".log")
        self.log, self._said = Path(name), ""
        with os.fdopen(handle, "w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, env=os.environ | QUIET
            )
        atexit.register(self.stop)
        try:
            self._wait(seconds)
        except BaseException:
            self.stop()
            raise

    def _wait(self, seconds: float) -> None:
        """Return once the model answers."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise CourseError(
                    say("The server ended while it loaded the model. Its last lines:") + "\n" + self.last_lines()
                )
            if self.healthy():
                return
            time.sleep(0.1)
        raise CourseError(
            say(
                "After {seconds:.0f} s the server does not answer yet; it was stopped. Its last lines:", seconds=seconds
            )
            + "\n"
            + self.last_lines()
        )

    def healthy(self) -> bool:
        """Whether the model is loaded and the server answers."""
        try:
            return self.get("/health").get("status") == "ok"
        except (OSError, ValueError):
            return False

    def get(self, route: str) -> Any:
        """What the server says on a route of its own, such as `/lora-adapters`."""
        return self._ask(urllib.request.Request(self.url + route))

    def post(self, route: str, value: Any) -> Any:
        """The same after sending it a value."""
        asked = urllib.request.Request(self.url + route, json.dumps(value).encode())
        asked.add_header("Content-Type", "application/json")
        return self._ask(asked)

    def _ask(self, asked: urllib.request.Request) -> Any:
        if key := os.environ.get(KEY):
            asked.add_header("Authorization", f"Bearer {key}")
        with DIRECT.open(asked, timeout=60) as answer:
            return json.load(answer)

    def memory_mib(self) -> float:
        """Memory of the server's process, in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def last_lines(self, count: int = 5) -> str:
        """The end of what the server has printed."""
        if self.log.is_file():
            self._said = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(self._said.splitlines()[-count:])

    def stop(self) -> None:
        """End the server, if it is not gone already."""
        atexit.unregister(self.stop)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdin.close()
        self.last_lines()
        self.log.unlink(missing_ok=True)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """In here, what an OpenAI client raises because the server is gone or still loading becomes one message.

        Raises:
            CourseError: in the place of the client's error.
        """
        try:
            yield
        except CourseError:
            raise
        except Exception as error:
            if self.process.poll() is not None:
                raise CourseError(
                    say("The server has ended. Run the cell that starts it again. Its last lines:")
                    + "\n"
                    + self.last_lines()
                ) from None
            if getattr(error, "status_code", None) == 503:
                raise CourseError(say("The model is still being loaded. Ask again in a moment.")) from None
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def free_port(port: int = 0) -> int:
    """The port, or for 0 one that is free now.

    Raises:
        CourseError: another program listens on it.
    """
    with socket.socket() as found:
        try:
            found.bind((HOST, port))
        except OSError:
            raise CourseError(
                say(
                    "Port {port} is taken by another program. Stop that one, or name another port; 0 finds one.",
                    port=port,
                )
            ) from None
        return found.getsockname()[1]


def serve(model: Path, adapter: Path | None, port: int, threads: int, context: int = 1024) -> Any:
    """llama.cpp's server in this process; keep what is returned, for the server ends with it.

    The cache is in float32 and flash attention is off: then the answers are those of transformers in float32. Other
    pages that the browser has open may not read from it. With a key in `LLAMA_API_KEY` it wants that key.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(model), {model.stem}
    params.hostnames, params.port, params.cors_origins = [HOST], port, f"http://{HOST}:{port}"
    params.n_ctx, params.n_parallel = context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.default_template_kwargs = {"enable_thinking": "false"}
    params.sampling.temp = 0  # the most likely token, unless a client asks for another temperature
    params.endpoint_slots = False  # else everybody could read what others ask
    params.ui_config_json = json.dumps(page_settings(model.parent / "prompt.json"))
    if key := os.environ.get(KEY):
        params.api_keys = [key]
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def page_settings(prompt: Path) -> dict[str, Any]:
    """What the chat page begins with: the prompt of training, greedy decoding, and none of the page's own tools."""
    system = json.loads(prompt.read_text(encoding="utf-8"))["system"] if prompt.is_file() else ""
    return {"systemMessage": system, "temperature": 0, "customJson": json.dumps({"tools": []})}


def main() -> None:
    """The command of the module's docstring."""
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("model", type=Path)
    parse.add_argument("--adapter", type=Path)
    parse.add_argument("--port", type=int, default=8080)
    parse.add_argument("--threads", type=int, default=1)
    parse.add_argument("--context", type=int, default=1024, help="tokens of a conversation, its answers included")
    parse.add_argument("--until-closed", action="store_true", help="end when the standard input closes")
    chosen = parse.parse_args()
    port = chosen.port if chosen.until_closed else free_port(chosen.port)
    try:
        server = serve(chosen.model, chosen.adapter, port, chosen.threads, chosen.context)
    except RuntimeError as error:  # llama.cpp has printed why
        sys.exit(str(error))
    if chosen.until_closed:
        sys.stdin.buffer.read()
        os._exit(0)  # llama.cpp's threads need not be waited for
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        del server


if __name__ == "__main__":
    main()
