"""Talking to the trained persona in a terminal: the base with the adapter, and the prompt of training."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import utils
from course.language import say
from course.model_folder import model_folder
from finetune import lora
from finetune.model import load_model


class Persona:
    """The model with its adapter, and the conversation so far.

    Args:
        load_in_4bit: hold the base in 4 bits. history: keep earlier turns in the prompt, as in the
            conversations of training. beams: 1 for greedy decoding, more for beam search.

    Raises:
        CourseError: no trained adapter yet, or one of another model.
    """

    def __init__(self, load_in_4bit: bool = False, history: bool = True, beams: int = 1) -> None:
        course = utils.settings()
        run_folder = utils.require(course.output / "lora", "05_lora_training", course)
        logging.disable_progress_bar()
        folder = model_folder(course)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.system = json.loads((run_folder / "prompt.json").read_text(encoding="utf-8"))["system"]
        base = load_model(folder, load_in_4bit, attention="sdpa")
        self.model = lora.load_adapter(base, run_folder / "adapter").eval()
        self.model.config.use_cache = True
        self.history, self.beams, self.turns = history, beams, []

    def prompt(self, question: str) -> list[int]:
        """Token ids of the prompt that asks the question."""
        turns = [*(self.turns if self.history else []), {"role": "user", "content": question}]
        turns = [{"role": "system", "content": self.system}, *turns]
        safe = [turn | {"content": utils.as_text(self.tokenizer, turn["content"])} for turn in turns]
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return utils.encode(self.tokenizer, self.tokenizer.apply_chat_template(safe, **how))

    def answer(self, question: str, max_new_tokens: int = 256) -> str:
        """The most likely answer that greedy decoding or beam search finds."""
        ids = torch.tensor([self.prompt(question)], device=self.model.device)
        with torch.no_grad():
            how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens}
            how |= {"do_sample": False, "num_beams": self.beams}
            out = self.model.generate(input_ids=ids, **how)[0, ids.shape[1] :]
        said = self.tokenizer.decode(out, skip_special_tokens=True).strip()
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        return said


def chat(load_in_4bit: bool = False, history: bool = True, beams: int = 1) -> None:
    """Ask and answer until an empty line, or the end of the input."""
    persona = Persona(load_in_4bit, history, beams)
    print(say("Ask a question; an empty line ends the conversation."))
    while question := _line():
        print(persona.answer(question), flush=True)


def _line() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
