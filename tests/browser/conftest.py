"""The course as a learner sees it: `make lab` on a fresh copy, and a headless Chromium that looks at it.

Nothing of the checkout is changed. Pictures for people to look at are left in `output/browser`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
import run_nbval
import secret_scan
from playwright.sync_api import BrowserContext, Page, Playwright, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "output" / "browser"
KERNEL_IDLE = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
RUN_ALL = """() => {
    window.ran = null
    jupyterapp.commands.execute('notebook:run-all-cells').then(ok => window.ran = [ok], no => window.ran = [`${no}`])
}"""
#: In the place of what only a person's own JupyterLab has: no window is opened, and the page can be asked.
TESTED = {
    "ServerApp": {"open_browser": False, "port": 0, "allow_root": True},
    "LabApp": {"expose_app_in_browser": True},
}


@dataclass
class Lab:
    """A running JupyterLab: `url` ends with a slash, `root` is the copy of the course that it serves."""

    url: str
    token: str
    root: Path


@dataclass
class Sheet:
    """A notebook open in a page of its own, with what the page complained of and whom it asked.

    Attributes:
        language: that of the series it belongs to.
        stored: the notebook as it was before it ran.
        troubles: errors of the console, uncaught exceptions and dialogs.
        asked: the addresses of all requests.
    """

    name: str
    lab: Lab
    page: Page
    language: str = "en"
    stored: nbformat.NotebookNode = field(init=False)
    troubles: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        """As JupyterLab names it."""
        return f"notebooks/{self.language}/{self.name}.ipynb"

    def open(self) -> None:
        """Open the notebook and wait for its kernel."""
        self.stored = nbformat.read(self.lab.root / self.path, as_version=4)
        self.page.on("console", lambda said: self.troubles.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", self._refuse)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("websocket", lambda socket: self.asked.append(socket.url))
        self.page.goto(f"{self.lab.url}lab/tree/{quote(self.path)}?reset&token={self.lab.token}")
        self.page.wait_for_function(KERNEL_IDLE, timeout=180_000)

    def _refuse(self, dialog: object) -> None:
        self.troubles.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def run_all(self, minutes: float = 1) -> None:
        """Run All, as its command in the menu does, and wait for the end."""
        self.page.evaluate(RUN_ALL)
        self.page.wait_for_function("window.ran", timeout=minutes * 60_000)
        self.page.wait_for_function(KERNEL_IDLE)

    def cells(self) -> list[dict]:
        """The notebook's cells as JupyterLab holds them now, as they would be saved."""
        return self.page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON().cells")

    def back(self) -> None:
        """From what a link has opened back to this notebook."""
        self.page.evaluate("async path => { await jupyterapp.commands.execute('docmanager:open', {path}) }", self.path)
        self.page.wait_for_function(f"jupyterapp.shell.currentWidget.context?.path === '{self.path}'")

    def theme(self, name: str) -> None:
        """Change JupyterLab's theme to `Light` or `Dark`."""
        self.page.evaluate(
            "name => jupyterapp.commands.execute('apputils:change-theme', {theme: name})", f"JupyterLab {name}"
        )
        self.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{str(name == 'Light').lower()}'")

    def photograph(self, label: str, part: int = 4000) -> None:
        """Leave pictures of the whole notebook in `output/browser`, in parts of so many pixels."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        height = self.page.locator(".jp-Notebook .jp-WindowedPanel-outer").evaluate("e => e.scrollHeight")
        self.page.set_viewport_size({"width": 1280, "height": min(height + 150, part)})
        for number, top in enumerate(range(0, height, part - 150), 1):
            self.page.locator(".jp-Notebook .jp-WindowedPanel-outer").evaluate("(e, top) => e.scrollTop = top", top)
            self.page.wait_for_timeout(300)
            self.page.screenshot(path=PICTURES / f"{self.name}-{self.language}-{label}-{number}.png")
        self.page.set_viewport_size({"width": 1280, "height": 900})

    def close(self) -> None:
        """Stop every kernel and close the page."""
        self.page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
        self.page.context.close()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """`make lab`, run in a copy of what git keeps, with no settings but its own."""
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        root, home = Path(folder) / "course", Path(folder) / "home"
        for path in secret_scan.tracked(ROOT):
            target = root / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        (root / ".venv").symlink_to(ROOT / ".venv")
        with suppress(FileNotFoundError):  # else the training that `make test` has left is used; by 05, resumed
            shutil.copytree(ROOT / "output" / "test", root / "output")
            if os.environ.get("BROWSER_LONG"):
                run_nbval.share_training(root / "output")
        settings = home / ".jupyter" / "jupyter_server_config.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(TESTED))
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("JUPYTER", "MAKE", "MFLAGS"))}
        environment = {**kept, "HOME": str(home), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
        with (home / "log").open("w") as log:
            server = subprocess.Popen(
                ["make", "lab"], cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            until = time.monotonic() + 120
            while not (notes := list((home / "runtime").glob("jpserver-*.json"))) or not notes[0].read_text():
                assert server.poll() is None and time.monotonic() < until, (home / "log").read_text()
                time.sleep(0.2)
            note = json.loads(notes[0].read_text())
            yield Lab(note["url"], note["token"], root)
        finally:
            with suppress(ProcessLookupError):  # it ended by itself, which the assertion above has said
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=60)


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="session")
def context(playwright: Playwright) -> Iterator[Callable[[], BrowserContext]]:
    """Makes a new profile of one Chromium: no cookies, no storage, no cache of an earlier one."""
    browser = playwright.chromium.launch(executable_path=shutil.which(os.environ.get("CHROMIUM", "chromium")))
    yield lambda: browser.new_context(viewport={"width": 1280, "height": 900})
    browser.close()
