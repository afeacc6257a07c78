"""LineAdapter: a signature as labelled lines, the plainest prompt that small models follow.

    system     the signature's instructions, nothing else
    user       Question: Which of the two runs hotter?
               Background: The Orvane press runs at 180 degrees.
    assistant  Working: ...
               Answer: ...

A signature with one output field is answered bare, without a label, so that a weak model's draft is its raw completion. Later
lines of a value are indented by two spaces: no value, whatever it holds, can begin a line with a label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import dspy
from dspy.adapters.utils import format_field_value, parse_value
from dspy.utils.exceptions import AdapterParseError


class LineAdapter(dspy.ChatAdapter):
    """Prompts of labelled lines for any ``dspy.Predict``; one call, and no second try in another format."""

    def __init__(self) -> None:
        super().__init__(use_json_adapter_fallback=False)

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
        lines = [_line(name, _shown(field, inputs[name])) for name, field in fields.items()]
        return "\n".join(part for part in [prefix, *lines, suffix] if part)

    def format_assistant_message_content(
        self, signature: type[dspy.Signature], outputs: dict[str, Any], missing_field_message: str | None = None
    ) -> str:
        """One labelled line per output; the bare value when there is only one."""
        values = {
            name: str(_shown(field, outputs.get(name, missing_field_message or "")))
            for name, field in signature.output_fields.items()
        }
        if len(values) == 1:
            return next(iter(values.values()))
        return "\n".join(_line(name, value) for name, value in values.items())

    def parse(self, signature: type[dspy.Signature], completion: str) -> dict[str, Any]:
        """The output fields of a completion.

        Labels are found at the beginning of a line, in any case; text before the first label belongs to the first field when
        that has no line of its own. Of a field that comes twice the first counts.

        Raises:
            AdapterParseError: a field is missing, empty, or not of its type. The raw completion is in ``lm_response``.
        """
        names = list(signature.output_fields)
        texts = {names[0]: completion.strip()} if len(names) == 1 else _split(names, completion)
        fields: dict[str, Any] = {}
        for name in names:
            text = texts.get(name, "")
            try:
                if not text:
                    raise ValueError(f'no line "{label(name)}: ..."')
                fields[name] = parse_value(text, signature.output_fields[name].annotation)
            except ValueError as error:
                raise AdapterParseError(
                    adapter_name="LineAdapter",
                    signature=cast(Any, signature),
                    lm_response=completion,
                    message=f"field {name}: {error}",
                ) from error
        return fields


def label(name: str) -> str:
    """``final_answer`` -> ``Final answer``."""
    return name.replace("_", " ").strip().capitalize()


def labelled_lines(values: Mapping[str, Any]) -> str:
    """Values as one text: the only one bare, several as labelled lines."""
    if len(values) == 1:
        return str(next(iter(values.values())))
    return "\n".join(f"{label(name)}: {value}" for name, value in values.items())


def _shown(field: Any, value: Any) -> Any:
    # A text is shown as it is; DSPy builds a pydantic adapter to find that out.
    return value if type(value) is str else format_field_value(field, value)


def _line(name: str, value: Any) -> str:
    return f"{label(name)}: " + "\n  ".join(str(value).splitlines())


def _split(names: list[str], completion: str) -> dict[str, str]:
    pattern = re.compile(rf"^({'|'.join(re.escape(label(name)) for name in names)})\s*:[ \t]*", re.IGNORECASE | re.MULTILINE)
    found = list(pattern.finditer(completion))
    by_label = {label(name).lower(): name for name in names}
    texts: dict[str, str] = {}
    for match, following in zip(found, [*found[1:], None], strict=False):
        text = completion[match.end() : following.start() if following else len(completion)].strip()
        texts.setdefault(by_label[match.group(1).lower()], text)
    before = completion[: found[0].start()].strip() if found else ""
    if before:
        texts.setdefault(names[0], before)
    return texts
