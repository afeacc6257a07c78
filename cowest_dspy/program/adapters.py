"""LineAdapter: a signature as labelled lines, the plainest prompt that small models follow.

    system     the signature's instructions; and the lines of the answer, where there are several
               and no worked example shows them
    user       Question: Which of the two runs hotter?
               Background: The Orvane press runs at 180 degrees.
    assistant  Working: ...
               Answer: ...

A signature with one output field is answered bare, without a label, so that a weak model's draft is
its raw completion; where a model writes the label all the same ("**Answer:** yes"), it is no part
of the value. Later lines of a value are indented by two
spaces: no value, whatever it holds, can begin a line with a label.

Where an output is one of several choices (``answer: Literal["A", "B"]``), a backend that cannot
constrain its output says "Answer: b)" or "B. The second one" as often as "B". What is unambiguous
among that is read as the choice that it names (:func:`choice_in`), everything else is a parse
error: a failure that is counted, not an answer that is wrong.

Text from data is written into a prompt as data: what a tokenizer or an adapter would take for a
mark of its own is broken by a space (:func:`escape`). Inputs, drafts, passages, worked examples and
what clients send all pass through it, with a draft and without one alike. Instructions do not: they
are the program's own.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, Literal, cast, get_args, get_origin

import dspy
import pydantic
from dspy.adapters.utils import format_field_value, parse_value, translate_field_type
from dspy.utils.exceptions import AdapterParseError

from cowest_dspy.compat import prompt_messages
from cowest_dspy.program.streaming import marking_fields

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
        """Escape inputs and demos, then call the adapter."""
        # Not in format() alone: an adapter may fall back to another one, to which it gives what it
        # was given.
        return super().__call__(lm, lm_kwargs, signature, *self._as_data(signature, demos, inputs))  # pyright: ignore[reportAttributeAccessIssue]

    async def acall(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        """Escape inputs and demos, then call the adapter asynchronously."""
        data = self._as_data(signature, demos, inputs)
        return await super().acall(lm, lm_kwargs, signature, *data)  # pyright: ignore[reportAttributeAccessIssue]

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


class LineAdapter(EscapesData, dspy.ChatAdapter):
    """Prompts of labelled lines for any ``dspy.Predict``; one call, no second try in another
    format. Data is escaped.

    DSPy's ``StreamListener`` reads its answers where it is the adapter of a program, its default or
    ``Collaboration(..., adapter=...)``; not as ``dspy.configure(adapter=...)``, since a listener
    knows that one by its name.
    """

    def __init__(self) -> None:
        super().__init__(use_json_adapter_fallback=False)

    def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        """Ask, with the fields of a streamed answer marked for listeners."""
        names = tuple(signature.output_fields)
        with marking_fields(names, _labels(names)):
            return super().__call__(lm, lm_kwargs, signature, demos, inputs)

    async def acall(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        """Ask asynchronously, as :meth:`__call__` does."""
        names = tuple(signature.output_fields)
        with marking_fields(names, _labels(names)):
            return await super().acall(lm, lm_kwargs, signature, demos, inputs)

    def format(self, signature: Any, demos: Any, inputs: Any) -> Any:
        """The chat messages of a prompt. Where several outputs are wanted and no worked example
        shows their lines, the system message does."""
        if len(signature.output_fields) > 1 and not demos:
            signature = _with_lines(signature)
        return super().format(signature, demos=demos, inputs=inputs)

    def format_system_message(self, signature: type[dspy.Signature]) -> str:
        """The instructions as they are."""
        return signature.instructions.strip()

    def format_user_message_content(
        self,
        signature: type[dspy.Signature],
        inputs: dict[str, Any],
        prefix: str = "",
        suffix: str = "",
        main_request: bool = False,
    ) -> str:
        """One labelled line per input that is given."""
        fields = {name: field for name, field in signature.input_fields.items() if name in inputs}
        lines = [_line(name, _format_value(field, inputs[name])) for name, field in fields.items()]
        return "\n".join(part for part in [prefix, *lines, suffix] if part)

    def format_assistant_message_content(
        self,
        signature: type[dspy.Signature],
        outputs: dict[str, Any],
        missing_field_message: str | None = None,
    ) -> str:
        """One labelled line per output; the bare value when there is only one."""
        values = {
            name: str(_format_value(field, outputs.get(name, missing_field_message or "")))
            for name, field in signature.output_fields.items()
        }
        if len(values) == 1:
            return next(iter(values.values()))
        return "\n".join(_line(name, value) for name, value in values.items())

    def parse(self, signature: type[dspy.Signature], completion: str) -> dict[str, Any]:
        """The output fields of a completion.

        Labels are found at the beginning of a line, in any case and with Markdown's signs around
        them; text before the first label belongs to the first field when that has no line of its
        own. Of a field that comes twice the first counts. A field that is alone has its label at
        the beginning or nowhere. For a field that is a ``Literal`` of texts, the documented
        fallback where outputs are not constrained is :func:`choice_in`.

        Raises:
            AdapterParseError: a field is missing, empty, or not of its type. The raw completion is
                in ``lm_response``.
        """
        names = list(signature.output_fields)
        texts = (
            {names[0]: _unlabelled(names[0], completion)}
            if len(names) == 1
            else split_lines(names, completion)
        )
        fields: dict[str, Any] = {}
        for name in names:
            text = texts.get(name, "")
            try:
                if not text:
                    raise ValueError(f'no line "{label(name)}: ..."')
                fields[name] = _value(name, text, signature.output_fields[name].annotation)
            except ValueError as error:
                raise AdapterParseError(
                    adapter_name="LineAdapter",
                    signature=cast(Any, signature),
                    lm_response=completion,
                    message=f"field {name}: {error}",
                ) from error
        return fields


@lru_cache(maxsize=256)
def _with_lines(signature: type[dspy.Signature]) -> type[dspy.Signature]:
    """The signature with the lines of its answer in its instructions."""
    fields = signature.output_fields.items()
    lines = [f"{label(name)}: {translate_field_type(name, field)}" for name, field in fields]
    told = [signature.instructions.strip(), "Answer in these lines:", *lines]
    return signature.with_instructions("\n".join(told))


def training_row(
    signature: type[dspy.Signature], inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> dict[str, Any]:
    """A row for SFT: the prompt in which a predictor of ``signature`` asks, without demos, and
    ``outputs`` in the form that it reads; others than those of the signature are left aside."""
    adapter = LineAdapter()
    wanted = {name: escape_value(outputs[name]) for name in signature.output_fields}
    completion = adapter.format_assistant_message_content(signature, wanted)
    prompt = prompt_messages(adapter, signature, [], dict(inputs))
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}


def label(name: str) -> str:
    """``final_answer`` -> ``Final answer``."""
    return name.replace("_", " ").strip().capitalize()


_NEVER = re.compile(r"(?!)")
# What may stand around a choice. A sign or a point before a digit belongs to a number.
_OPENING = re.compile(r"""^(?:[\s"'\u201c\u201d\u2018\u2019`*_#(\[{:;!?>]|[-+.,](?!\d))+""")
_CLOSING = re.compile(r"""[\s"'\u201c\u201d\u2018\u2019`*_)\]}:;.,!?-]+$""")
_JOINTS = re.compile(r"[\s_]+|(?<=[^\W_])-+(?=[^\W_])")
_LEAD_IN = (
    r"(?:(?:the|my)\s+)?(?:(?:final|correct|best|right)\s+)?(?:answer|choice|option|label|{name})"
    r"(?:\s+is\b|[\s:=])[\s:=]*"
)
# After a choice of several signs: its end, not a compound or number that goes on. After one of a
# single letter or digit: nothing, or punctuation that sets it apart, so that none of "A genetic
# disease", "B-cell", "E.coli", "A's" and "2.5" begins with one.
_WORDS_END = r"""(?=$|[\s.,;:!?)\]}"'\u201d\u2019*`_-])(?![-'\u2019.,][^\W_])"""
_LETTER_ENDS = (
    r"""(?!['\u2019]\w)[\s"'\u201d\u2019*`_]*"""
    r"""(?:$|[)\]}:;!?]|[.,](?=(?-i:[^a-z0-9])|$)|[-\u2013\u2014](?=\s|$))"""
)


def choice_in(text: str, choices: Sequence[str], name: str = "answer") -> str:
    """The one of ``choices`` that a completion names, read leniently: ``choice_in("b) The second.",
    ["A", "B"])`` is ``"B"``.

    Case, surrounding punctuation and quotes, spaces for underscores or hyphens, a lead-in
    ("Answer:", "The correct option is", or the field's own ``name``) and what follows the choice do
    not count. The choice has to come first. One that is a single letter or digit has to stand alone
    or before punctuation: "A genetic disease" is no ``"A"``.

    Raises:
        ValueError: no choice comes first, or another one is named beside it ("A or B", "yes and
            no") or begins a later line.
    """
    exact = [choice for choice in choices if choice.strip() == text.strip()]
    if len(exact) == 1:
        return exact[0]
    wrapped = re.fullmatch(r"(?:Literal|str)\[(.*)\]", text.strip())
    lines = [line for line in (wrapped.group(1) if wrapped else text).splitlines() if _bare(line)]
    lead_in = re.compile(
        rf"^(?:{_LEAD_IN.format(name=re.escape(label(name)))}){{1,2}}", re.IGNORECASE
    )
    first, *later = [_choices_named(line, choices, lead_in) for line in lines or [""]]
    named = first.union(*later)
    if first and len(named) == 1:
        return named.pop()
    what = "more than one" if first else "none"
    raise ValueError(f"it names {what} of the choices {', '.join(choices)} at its beginning")


def _choices_named(line: str, choices: Sequence[str], lead_in: re.Pattern[str]) -> set[str]:
    """The choices that a line names: none if it does not begin with one, otherwise that one and
    others that stand beside it."""
    opened = _OPENING.sub("", line)
    for start in (opened, _OPENING.sub("", lead_in.sub("", opened))):
        whole = {choice for choice in choices if _bare(choice) and _bare(choice) == _bare(start)}
        if whole:
            return whole
        begun = {choice: match for choice in choices if (match := _begins(choice).match(start))}
        if begun:
            longest = max(len(_bare(choice)) for choice in begun)
            first = {choice for choice in begun if len(_bare(choice)) == longest}
            rest = start[max(begun[choice].end("choice") for choice in first) :]
            return first | {
                choice for choice in choices if choice not in first and _beside(choice).search(rest)
            }
    return set()


def _bare(text: str) -> str:
    """``"**Needs_Caution.**"`` as ``"needs caution"``."""
    return _JOINTS.sub(" ", _CLOSING.sub("", _OPENING.sub("", text))).casefold()


def _pattern(choice: str) -> str:
    words = r"[\s_-]+".join(re.escape(word) for word in _bare(choice).split(" "))
    return f"(?P<choice>{words})"


@lru_cache(maxsize=256)
def _begins(choice: str) -> re.Pattern[str]:
    if not _bare(choice):
        return _NEVER
    return re.compile(
        _pattern(choice) + (_LETTER_ENDS if len(_bare(choice)) == 1 else _WORDS_END), re.IGNORECASE
    )


@lru_cache(maxsize=256)
def _beside(choice: str) -> re.Pattern[str]:
    """Finds a choice that is named after another one. A single letter counts as the next thing
    said, before a bracket or colon, in a list, or after "or": "B. Vitamin D" and "D. Both A and B"
    name one, "A: this B: that" two."""
    if not _bare(choice):
        return _NEVER
    one = _pattern(choice)
    if len(_bare(choice)) > 1:
        return re.compile(rf"(?<![^\W_]){one}(?![^\W_])", re.IGNORECASE)
    alternative = rf"(?:^[\W_]*|[(,;/]\s*|\bor\s+)(?:(?:or|and)\s+)?[(\[]?{one}{_LETTER_ENDS}"
    return re.compile(
        rf"{alternative}|\s[(\[]?{one.replace('?P<choice>', '?:')}[):]", re.IGNORECASE
    )


def labelled_lines(values: Mapping[str, Any]) -> str:
    """Values as one text: the only one bare, several as labelled lines."""
    if len(values) == 1:
        return str(next(iter(values.values())))
    return "\n".join(f"{label(name)}: {value}" for name, value in values.items())


def _value(name: str, text: str, annotation: Any) -> Any:
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    if choices and all(isinstance(choice, str) for choice in choices):
        return choice_in(text, choices, name)
    try:
        return parse_value(text, annotation)
    except ValueError:
        bare = _CLOSING.sub("", _OPENING.sub("", text))
        if not choices and annotation not in (int, float, bool):
            raise
        return parse_value(bare, annotation)


def _format_value(field: Any, value: Any) -> Any:
    # A text is shown as it is; DSPy builds a pydantic adapter to find that out.
    return value if type(value) is str else format_field_value(field, value)


def _line(name: str, value: Any) -> str:
    return f"{label(name)}: " + "\n  ".join(str(value).splitlines())


@lru_cache(maxsize=256)
def _labels(names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the labels of fields at the beginning of a line, each as the group of its place, with
    what Markdown puts around them: "Answer:", "**Answer:**", "**Answer**:", "### Answer:", "-
    answer :", "**Answer: yes**" (the group ``open``)."""
    words = (re.sub(r"[\s_]+", r"[\\s_]+", label(name)) for name in names)
    either = "|".join(f"({word})" for word in words)
    return re.compile(
        rf"^(?:#{{1,6}}[ \t]+|[-*+][ \t]+)?(?P<open>\*\*|__|[*_`])?(?:{either})"
        r"(?:[ \t]*[:\uff1a](?P<closed>(?P=open))|(?P<closed2>(?P=open))?[ \t]*[:\uff1a])[ \t]*",
        re.IGNORECASE | re.MULTILINE,
    )


def _unlabelled(name: str, completion: str) -> str:
    """The value of a field that is alone: the completion, without its label where it begins with
    one."""
    text = completion.strip()
    found = _labels((name,)).match(text)
    return _after(found, text[found.end() :]) if found else text


def _after(found: re.Match[str], text: str) -> str:
    """The text after a label; where a sign of Markdown that opened before the label closes at the
    text's end, without it."""
    mark, text = found["open"], text.strip()
    closed = not mark or found["closed"] or found["closed2"]
    return text if closed or not text.endswith(mark) else text[: -len(mark)].strip()


def split_lines(names: list[str], completion: str) -> dict[str, str]:
    """The values of labelled lines by field, of those fields that are there."""
    found = list(_labels(tuple(names)).finditer(completion))
    texts: dict[str, str] = {}
    for match, following in zip(found, [*found[1:], None], strict=False):
        text = _after(
            match, completion[match.end() : following.start() if following else len(completion)]
        )
        name = next(name for place, name in enumerate(names) if match.group(place + 2) is not None)
        texts.setdefault(name, text)
    before = completion[: found[0].start()].strip() if found else ""
    if before:
        texts.setdefault(names[0], before)
    return texts
