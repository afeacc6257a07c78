"""Chat messages -> the tokens of a prompt, in the model's own form, and how many of them other prompts have too."""

from __future__ import annotations

from typing import Any

# A beginning of fewer tokens is not worth being kept apart.
SHORTEST_BEGINNING = 32

Messages = list[dict[str, str]]


class ChatTokens:
    """A tokenizer's chat template at work; the beginnings that it has met are remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def prompt(self, messages: Messages) -> tuple[int, ...]:
        """The tokens of ``messages`` and of the beginning of the answer."""
        return self._tokens(messages, True)

    def split(self, messages: Messages) -> tuple[tuple[int, ...], int]:
        """The prompt's tokens, and how many of them come from all messages but the last: instructions and worked examples, which
        are the same for every question. 0 when they are too few, or do not stand at the beginning."""
        tokens = self.prompt(messages)
        if len(messages) < 2:
            return tokens, 0
        head = self._tokens(messages[:-1], False)
        apart = SHORTEST_BEGINNING <= len(head) < len(tokens) and tokens[: len(head)] == head
        return tokens, len(head) if apart else 0

    def _tokens(self, messages: Messages, answering: bool) -> tuple[int, ...]:
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=answering, tokenize=False)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
