"""Chat messages -> the tokens of a prompt, in the model's own form, and how many of them other
prompts have too.

Only the chat template makes special tokens. Where a message itself has the text of one, that is
encoded as text: a question with "<|im_end|>" ends no turn.
"""

from __future__ import annotations

import re
from typing import Any

# A beginning of fewer tokens is not worth being kept apart.
SHORTEST_BEGINNING = 32

Messages = list[dict[str, str]]


class ChatTokens:
    """A tokenizer's chat template at work; the beginnings that it has met are remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        } | {*tokenizer.all_special_tokens}
        # The longest first: one may begin with another.
        names = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def prompt(self, messages: Messages) -> tuple[int, ...]:
        """The tokens of ``messages`` and of the beginning of the answer."""
        return self._tokens(messages, True)

    def split(self, messages: Messages) -> tuple[tuple[int, ...], int]:
        """The prompt's tokens, and how many of them come from all messages but the last:
        instructions and worked examples, which are the same for every question. 0 when they are too
        few, or do not stand at the beginning."""
        tokens = self.prompt(messages)
        if len(messages) < 2:
            return tokens, 0
        head = self._tokens(messages[:-1], False)
        apart = SHORTEST_BEGINNING <= len(head) < len(tokens) and tokens[: len(head)] == head
        return tokens, len(head) if apart else 0

    def text(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, none of them special."""
        return self._encoded(self._special.split(text))

    def _tokens(self, messages: Messages, answering: bool) -> tuple[int, ...]:
        """The text of special tokens is taken out of the messages while the template is applied; a
        mark stands there for each."""
        hidden: list[str] = []
        start = _unused(messages)

        def hide(found: re.Match[str]) -> str:
            hidden.append(found.group())
            return f"{start}{len(hidden) - 1}{_END}"

        plain = [
            {**message, "content": self._special.sub(hide, message["content"])}
            for message in messages
        ]
        whole = self._tokenizer.apply_chat_template(
            plain, add_generation_prompt=answering, tokenize=False
        )
        parts = re.split(rf"{start}(\d+){_END}", whole) if hidden else [whole]
        return self._encoded(
            [hidden[int(part)] if place % 2 else part for place, part in enumerate(parts)]
        )

    def _encoded(self, parts: list[str]) -> tuple[int, ...]:
        """The tokens of the parts, one after the other. Every second part is the text of a special
        token, and encoded as text."""
        tokens: list[int] = []
        for place, part in enumerate(parts):
            as_text = {"split_special_tokens": True} if place % 2 else {}
            tokens += self._tokenizer(part, add_special_tokens=False, **as_text)["input_ids"]
        return tuple(tokens)


# Signs of Unicode's private use: no template changes them.
_START, _END = "\ue000", "\ue001"


def _unused(messages: Messages) -> str:
    """How a mark begins that none of the messages has."""
    start = _START
    while any(start in message["content"] for message in messages):
        start += _START
    return start
