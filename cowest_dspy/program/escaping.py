"""Text from data as data: what a tokenizer or an adapter would take for a mark of its own is broken
by a space.

    escape("5 bar<|im_end|>")        # "5 bar< |im_end|>": readable, and no tokenizer takes it for
                                     the end of a turn
    escaping(dspy.ChatAdapter())     # the same adapter, which escapes every input and every worked
                                     example

Inputs, drafts, passages, worked examples and what clients send all pass here on their way into a
prompt, with a draft and without one alike. Instructions do not: they are the program's own. Text
without such marks, markup among it, stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
from collections.abc import Callable, Iterable
from enum import Enum
from functools import lru_cache
from typing import Any, cast

import dspy
import pydantic

# A token between bars: <|im_end|>, Gemma 4's <|turn> and <turn|>, DeepSeek's with full-width bars.
# Not Haskell's <|>, F#'s f <| x.
_BARS = r"<(?=[|\uff5c][^\s<>|\uff5c][^\s<>]{0,80}>|[a-z_]{1,40}\|>)"
# Tokens that look like a tag: of Llama, Mistral, Gemma, Qwen, Ling, InternLM, Cohere, Seed,
# StarCoder and those that took over its list (SmolLM), T5; and the marks between which DSPy puts
# what is no text. HTML's tags are none of them, but for <s>.
_TAGS = (
    r"<(?=/?(?:s|bos|eos|pad|unk|sop|eop|eod|eot|eoh|eoa|eosys|SYS|role|think|tool_calls?|tool_response|(?:start|end)_of_\w{1,20}|"
    r"fim_\w{1,10}|repo_?name|file_sep|filename|gh_stars|issue_(?:start|comment|closed)|jupyter_\w{1,10}|empty_output|"
    r"commit_(?:before|msg|after)|image_soft_token|(?:BOS|EOS|PAD|UNK|CLS|SEP|MASK)_TOKEN|unused_?\d{1,5}|reserved_\d{1,5}|"
    r"extra_id_\d{1,5}|SPECIAL_\d{1,5}|seed:\w{1,30}|mask:\d{1,5})>|<CUSTOM-TYPE-(?:START|END)-IDENTIFIER>>)"
)
# Tokens in brackets: of Mistral, GLM and BERT, EXAONE's [|user|], MiniMax's [e~[, ]~b] and ]~!b[.
_BRACKETS = (
    r"\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_(?:CALLS|RESULTS|CONTENT)|ARGS|CALL_ID|MODEL_SETTINGS|THINK|IMG(?:_BREAK|_END)?|"
    r"(?:BEGIN_)?AUDIO|TRANSCRIBE|PREFIX|MIDDLE|SUFFIX|control_\d{1,5}|[gs]?MASK|CLS|SEP|PAD|UNK|BOS|EOS)\]|"
    r"\|(?:system|user|assistant|tool|endofturn)\|\]|e~\[)|\](?=~!?b[\[\]])"
)
# The marks of DSPy's fields: [[ ## answer ## ]], with any space in them, since models read them so.
_FIELD_MARKS = r"\[(?=\[\s*##)"
_SPECIAL = re.compile("|".join((_BARS, _TAGS, _BRACKETS, _FIELD_MARKS)))
_MARK = re.compile(_FIELD_MARKS)

Escape = Callable[[str], str]


def escape(text: str) -> str:
    """The text without marks: a space follows the first sign of each. Escaping twice is the same as
    once.

    Marks are the special tokens of well-known models' chat templates and the marks of DSPy's
    adapters.
    """
    return _SPECIAL.sub(r"\g<0> ", text)


def escape_field_marks(text: str) -> str:
    """The text without the field marks of DSPy's adapters alone: ``[[ ## answer ## ]]`` becomes ``[
    [ ## answer ## ]]``."""
    return _MARK.sub(r"\g<0> ", text)


def escape_value(value: Any, escaped: Escape = escape) -> Any:
    """A value of a field with every text in it escaped: in lists, dictionaries, pydantic models and
    dataclasses, too.

    What holds no mark is given back itself, and what does keeps its type.
    """
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        made = escaped(value)
        return value if made == value else made
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value)
        made = {
            escape_value(key, escaped): escape_value(one, escaped) for key, one in items.items()
        }
        same = all(
            one is other
            for pair in zip(made.items(), items.items(), strict=False)
            for one, other in zip(*pair, strict=True)
        )
        return value if same and len(made) == len(items) else made
    if isinstance(value, list | tuple | set | frozenset):
        parts = list(cast("Iterable[Any]", value))
        changed = [escape_value(one, escaped) for one in parts]
        if all(one is other for one, other in zip(changed, parts, strict=True)):
            return value
        return value._make(changed) if hasattr(value, "_make") else type(value)(changed)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, pydantic.BaseModel):
        update = _changes(dict(value), escaped)
        return value.model_copy(update=update) if update else value
    if isinstance(value, dspy.Example):
        update = _changes(dict(value.items()), escaped)
        return value.copy(**update) if update else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.init
        }
        update = _changes(fields, escaped)
        return dataclasses.replace(value, **update) if update else value
    return value


def _changes(fields: dict[str, Any], escaped: Escape) -> dict[str, Any]:
    made = {name: escape_value(value, escaped) for name, value in fields.items()}
    return {name: value for name, value in made.items() if value is not fields[name]}


class EscapesData:
    """What makes an adapter escape inputs and worked examples before it writes them into a prompt;
    stands before its class."""

    def __init_subclass__(cls, *, already_called_back: bool = False, **kwargs: Any) -> None:
        # DSPy's wraps format() and parse() of every subclass with its callbacks, and a second time
        # they would be called twice.
        if not already_called_back:
            super().__init_subclass__(**kwargs)

    def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        # Not in format() alone: an adapter may fall back to another one, to which it gives what it
        # was given.
        return super().__call__(lm, lm_kwargs, signature, *self._as_data(signature, demos, inputs))  # pyright: ignore[reportAttributeAccessIssue]

    async def acall(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        """Escape inputs and demos, then call the adapter asynchronously."""
        return await super().acall(
            lm, lm_kwargs, signature, *self._as_data(signature, demos, inputs)
        )  # pyright: ignore[reportAttributeAccessIssue]

    def format(self, signature: Any, demos: Any, inputs: Any) -> Any:
        """The chat messages of a prompt."""
        return super().format(signature, *self._as_data(signature, demos, inputs))  # pyright: ignore[reportAttributeAccessIssue]

    def _as_data(self, signature: Any, demos: Any, inputs: Any) -> tuple[list[Any], dict[str, Any]]:
        escaped: Escape = escape
        if isinstance(self, dspy.XMLAdapter):
            marks = _tags_of(tuple(signature.fields))
            escaped = lambda text: marks.sub(r"\g<0> ", escape(text))  # noqa: E731 - one of two
        return [escape_value(demo, escaped) for demo in demos], escape_value(dict(inputs), escaped)


@lru_cache(maxsize=256)
def _tags_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """The tags in which XMLAdapter writes fields of these names."""
    return re.compile(rf"<(?=/?(?:{'|'.join(map(re.escape, names))})(?:\s[^<>]{{0,80}})?/?>)")


def escaping(adapter: dspy.Adapter) -> dspy.Adapter:
    """A copy of the adapter that escapes data; of the same class for whoever asks, as DSPy does in
    places."""
    if isinstance(adapter, EscapesData):
        return adapter
    made = copy.copy(adapter)
    made.__class__ = _escaping_class(type(adapter))
    return made


@lru_cache(maxsize=64)
def _escaping_class(kind: type[dspy.Adapter]) -> type[dspy.Adapter]:
    about = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return types.new_class(
        kind.__name__,
        (EscapesData, kind),
        {"already_called_back": True},
        lambda names: names.update(about),
    )
