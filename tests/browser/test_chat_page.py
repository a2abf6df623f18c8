"""The chat page of the server of notebook 09, in a browser: a question by keyboard, and the persona's answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PICTURES, ROOT
from playwright.sync_api import BrowserContext, expect

import utils
from course import llama
from finetune import export


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> llama.Server:
    """A server of the adapter that `make test` has left."""
    if not (ROOT / "output" / "test" / "lora" / "adapter").is_dir():
        pytest.skip("no adapter in output/test: run make test first")
    monkeypatch.setenv("COURSE_OUTPUT", str(ROOT / "output" / "test"))
    export.export("gguf", tmp_path / "gguf", utils.settings(), "f32", report=lambda _: None)
    with llama.Server(*(tmp_path / "gguf" / name for name in (export.BASE_FILE, export.ADAPTER_FILE))) as server:
        yield server


def test_the_page_answers_as_the_persona(server: llama.Server, context: Callable[[], BrowserContext]):
    page, asked = context().new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    for question, answer in (("你是谁？", "甄嬛"), ("你父亲是谁？", "大理寺少卿甄远道")):
        page.locator("textarea").first.fill(question)
        page.keyboard.press("Enter")
        expect(page.get_by_text(re.compile(answer)).last).to_be_visible(timeout=60_000)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / "chat_page.png")
    assert not [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
    page.context.close()
