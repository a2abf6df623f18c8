"""Talking to the trained persona in a terminal: the base with the adapter, and the prompt of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from transformers import AutoTokenizer, LogitsProcessorList
from transformers.utils import logging

import utils
from course.language import say
from course.model_folder import model_folder, trained_folder
from finetune import lora
from finetune.adapter_folder import read_prompt
from finetune.config import is_small
from finetune.decode import Decoder, NoRepeatInAnswer
from finetune.model import load_model

#: How a small model answers in a chat (notebook 06, section 9); a large one greedily, at full strength.
BEAMS, STRENGTH = 4, 0.7


class Persona:
    """The model with its adapter, and the conversation so far.

    Args:
        load_in_4bit: hold the base in 4 bits. history: keep earlier turns in the prompt, as in the
            conversations of training. beams: 1 for greedy decoding, more for beam search,
            in which no pair of tokens comes twice in an answer. strength: multiplies the adapter's update.
        adapter: the folder of another training than notebook 05's (`trained_folder`).

    Raises:
        CourseError: no trained adapter yet, or one of another model.
    """

    def __init__(
        self,
        load_in_4bit: bool = False,
        history: bool = True,
        beams: int = 1,
        strength: float = 1.0,
        adapter: str = "",
    ) -> None:
        course = utils.settings()
        run_folder = trained_folder(course, adapter)
        logging.disable_progress_bar()
        folder = model_folder(course)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.system = read_prompt(run_folder)
        base = load_model(folder, load_in_4bit, attention="sdpa")
        self.model = lora.load_adapter(base, run_folder / "adapter").eval()
        self.model.config.use_cache = True
        self.history, self.beams, self.strength = history, beams, strength
        self.turns: list[dict[str, str]] = []
        self.decoder = Decoder(self.model)

    def prompt(self, question: str) -> list[int]:
        """Token ids of the prompt that asks the question, after the conversation so far."""
        return self.prompt_ids([*(self.turns if self.history else []), {"role": "user", "content": question}])

    def prompt_ids(self, turns: list[dict[str, Any]], prompted: bool = True) -> list[int]:
        """Token ids of the prompt for turns that end with the user's; without a system prompt, the persona's.

        Args:
            prompted: False takes the system prompt out, for a comparison with a model that has none.
        """
        if not prompted:
            turns = [turn for turn in turns if turn["role"] != "system"]
        elif turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        text = self.tokenizer.apply_chat_template(utils.as_text(self.tokenizer, turns), **how)
        return utils.encode(self.tokenizer, text)

    def texts(self, question: str, max_new_tokens: int = 256) -> Iterator[str]:
        """The answer as it grows, by greedy decoding; with beam search there is one text, the whole answer.

        Raises:
            CourseError: the conversation has become too long.
        """
        ids, said = self.prompt(question), ""
        # A merged model has no adapter to scale, and answers at full strength.
        scaled = nullcontext() if self.strength == 1 else rescale_adapter_scale(self.model, self.strength)
        with scaled:
            if self.beams == 1:
                for said in self.decoder.texts(self.tokenizer, ids, max_new_tokens):
                    yield said
            else:
                yield (said := self._searched(ids, max_new_tokens))
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]

    def _searched(self, ids: list[int], max_new_tokens: int) -> str:
        """The most likely answer that beam search finds, among those without a pair of tokens twice."""
        self.decoder.require_room(ids)
        prompt = torch.tensor([ids], device=self.model.device)
        how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": max_new_tokens, "do_sample": False}
        how["logits_processor"] = LogitsProcessorList([NoRepeatInAnswer(2, start=len(ids))])
        with torch.no_grad():
            out = self.model.generate(input_ids=prompt, num_beams=self.beams, **how)[0, len(ids) :]
        return self.tokenizer.decode(out, skip_special_tokens=True).strip()

    def answer(self, question: str, max_new_tokens: int = 256) -> str:
        """The whole answer."""
        *_, said = self.texts(question, max_new_tokens)
        return said


def chat(
    load_in_4bit: bool = False,
    history: bool = True,
    beams: int | None = None,
    strength: float | None = None,
    adapter: str = "",
) -> None:
    """Ask and answer until an empty line, or the end of the input.

    Args:
        beams, strength: as for `Persona`; None takes what suits the size of the model. adapter: as there.
    """
    persona = Persona(load_in_4bit, history, adapter=adapter)
    usual = (BEAMS, STRENGTH) if is_small(persona.model.config) else (1, 1.0)
    persona.beams = usual[0] if beams is None else beams
    persona.strength = usual[1] if strength is None else strength
    print(say("Ask a question; an empty line ends the conversation."))
    while question := _line():
        shown = ""
        if any("\udc80" <= letter <= "\udcff" for letter in question):
            print(say("This line is not UTF-8. Set the terminal to UTF-8, or type the question again."))
            continue
        try:
            for text in persona.texts(question):
                print(text.removeprefix(shown), end="", flush=True)
                shown = text
        except KeyboardInterrupt:  # stops this answer; the conversation goes on without it
            print()
            continue
        except utils.CourseError as error:  # too long: the next question begins a new conversation
            print(error, end="")
            persona.turns.clear()
        print()


def _line() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
