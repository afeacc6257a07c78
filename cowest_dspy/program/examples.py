"""Rows and ``dspy.Example``: marked inputs, ids that come from content, and whether examples have
the inputs that a program needs, found out from its signatures before any model is asked.

``examples`` reads the rows of a configuration, whose inputs are named in it; ``prepare_examples``
takes what Python code gives to ``collect``, to ``Influence.report`` or to an optimiser.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, TypeGuard, cast

import dspy
from dspy.adapters.utils import annotation_allows_none
from pydantic_core import PydanticUndefined

from cowest_dspy.errors import DataError, nearest
from cowest_dspy.program.collaboration import Collaboration, Counterfactual, signature_of
from cowest_dspy.program.embedded import Embedded

Examples = Iterable[Any]
"""What ``prepare_examples`` takes: examples, dictionaries, a ``datasets.Dataset``."""
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def examples(
    rows: Iterable[Mapping[str, Any]], inputs: Sequence[str], *, where: str = "rows"
) -> list[dspy.Example]:
    """Rows as examples whose ``inputs`` are marked; a row without an ``id`` gets one from its
    content.

    ``examples([{"question": "2+2?", "answer": "4"}], ["question"])`` gives one example with a
    12-digit ``id``.

    Raises:
        DataError: no rows, a row without one of the inputs or that is no row, or two rows with one
            id.
    """
    made = [
        _example(row, inputs, f"{where}, row {number}") for number, row in enumerate(rows, start=1)
    ]
    if not made:
        raise DataError(
            f"{where}: there are no examples. At least one row with the fields {list(inputs)} is "
            "needed."
        )
    seen: set[str] = set()
    for example in made:
        if example.id in seen:
            raise DataError(
                f'{where}: two rows have the id "{example.id}". Ids must be unique: traces are '
                "kept by them."
            )
        seen.add(example.id)
    return made


def prepare_examples(given: Examples, program: Collaboration) -> Sequence[dspy.Example]:
    """Examples as a collection needs them: with marked inputs and with ids.

    Args:
        given: examples, dictionaries, or a ``datasets.Dataset``. Where inputs are not marked
            (``with_inputs``), they are those fields that the program's signatures take
            (:func:`accepted_inputs`).
        program: what the examples are for.

    An ``id`` that is given stays. One without gets 12 digits of the SHA-256 of its fields, the same
    in every process; of those with the same fields the second gets ``-2`` behind it, the third
    ``-3``, in their order. What has the same ``id`` and the same fields twice is one example.

    Returns:
        ``given`` itself where every example has both, which may then be a sequence that makes its
        examples when they are asked for; otherwise a list of copies.

    Raises:
        DataError: no examples, one that lacks an input of the program or of which no field is an
            input, or two different ones with one id.
    """
    if isinstance(given, Mapping | str):
        raise DataError(
            f"Examples are given as a {type(given).__name__}; a list of rows or a dataset is "
            'expected. Of several splits, give one: dataset["train"].'
        )
    if _is_prepared(given):
        made: Sequence[dspy.Example] = given
    else:
        names, known = accepted_inputs(program), dict[str, dspy.Example]()
        for number, one in enumerate(given, start=1):
            example = mark_inputs(one, names, f"examples, row {number}")
            copy = _with_id(example, f"examples, row {number}", known)
            if fields_of(known.setdefault(copy.id, copy)) != fields_of(copy):
                raise DataError(
                    f'Two different examples have the id "{copy.id}". Ids must be unique: traces '
                    "are kept by them."
                )
        made = list(known.values())
    if not len(made):
        raise DataError("There are no examples.")
    check_inputs(program, made)
    return made


def _is_prepared(given: Any) -> TypeGuard[Sequence[dspy.Example]]:
    """Whether these are examples with marked inputs and with ids, no two of them the same."""
    if not isinstance(given, Sequence):
        return False
    ids = set[str]()
    for one in given:
        if not isinstance(one, dspy.Example) or not _input_names(one):
            return False
        name = one.get("id")
        if not isinstance(name, str) or name in ids:
            return False
        ids.add(name)
        _content(one.toDict(), f"example {name}")
    return True


def mark_inputs(given: Any, names: Iterable[str], where: str) -> dspy.Example:
    """An example or a row as an example whose inputs are marked: as it says itself, otherwise those
    of its fields that are among ``names``.

    Raises:
        DataError: it is no row, or has no input; it begins with ``where``.
    """
    if not isinstance(given, dspy.Example):
        given = dspy.Example(**_check_row(given, where))
    marked = _input_names(given)
    if marked is None:
        marked = [name for name in names if given.get(name) is not None]
        given = given.with_inputs(*marked)
    if not marked:
        fields = ", ".join(name for name in given.toDict() if name != "id")
        expected = f": {', '.join(names)}" if names else ""
        raise DataError(
            f"{where}: none of its fields ({fields}) is an input of the program{expected}. Mark "
            "its inputs: dspy.Example(...).with_inputs(...)."
        )
    return given


def _with_id(example: dspy.Example, where: str, known: Collection[str]) -> dspy.Example:
    """A copy with an id: its own, otherwise one from its content that is not among ``known``."""
    row = fields_of(example)
    content = _content(row, where)
    if row.get("id") is not None:
        return example.copy(id=str(row["id"]))
    name = _content_id(content)
    numbered = (f"{name}-{number}" if number > 1 else name for number in count(1))
    return example.copy(id=next(one for one in numbered if one not in known))


def fields_of(example: dspy.Example) -> dict[str, Any]:
    """The fields of an example as plain data, without those that DSPy's datasets put there, of
    which one is drawn anew by every process."""
    return {name: value for name, value in example.toDict().items() if not name.startswith("dspy_")}


def inputs_key(inputs: Mapping[str, Any]) -> str:
    """Inputs as one text, equal for equal values but for case and spacing: what makes two examples
    the same one."""
    texts = (
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for _, value in sorted(inputs.items())
    )
    return " | ".join(" ".join(text.lower().split()) for text in texts)


def _example(given: Mapping[str, Any], inputs: Sequence[str], where: str) -> dspy.Example:
    row = _check_row(given, where)
    for name in inputs:
        if row.get(name) in (None, ""):
            raise DataError(
                f'{where}: the input "{name}" is missing.{nearest(name, row)} The row has '
                f"{sorted(row)}."
            )
    content = _content(row, where)
    row["id"] = _content_id(content) if row.get("id") is None else str(row["id"])
    return dspy.Example(**row).with_inputs(*inputs)


def _check_row(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DataError(
            f"{where}: a {type(given).__name__} is no row; a dictionary of its fields is expected."
        )
    row = dict(cast("Mapping[Any, Any]", given))
    for name in row:
        if not isinstance(name, str):
            raise DataError(
                f"{where}: a field is called {name!r}, which is no text. A CSV row with more "
                "cells than its header?"
            )
    return row


def _content_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _content(row: Mapping[str, Any], where: str) -> bytes:
    """A row as bytes, equal for equal rows: all of it can be put into a prompt, a store and a
    report."""
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, default=_as_text).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{where} holds {half}, half of a surrogate pair, which is no character: decode its "
            "text anew."
        ) from error
    except (RecursionError, ValueError, TypeError) as error:
        raise DataError(f"{where} holds what JSON cannot say: {error}.") from error


def _as_text(value: Any) -> str:
    """Text of a value that JSON has no form for; a set is sorted, since its order differs between
    processes."""
    return str(sorted(map(str, value)) if isinstance(value, set | frozenset) else value)


def needed_inputs(module: dspy.Module) -> set[str]:
    """The inputs without which ``module`` cannot do its work, as far as that is known without
    running it.

    Of a ``dspy.Predict``, and of DSPy's modules that pass their inputs on to one, those of its
    signature that have no default and may not be None; of any other module the parameters of its
    ``forward`` that have no default. What a ``forward(**inputs)`` of one's own makes of its inputs,
    for instance by a retriever or by a predictor before another, is not known: none.
    """
    if isinstance(module, Counterfactual):
        return needed_inputs(module.module)
    signature = _signature_asked(module)
    if signature is not None:
        return {name for name, field in signature.input_fields.items() if _required(field)}
    return {
        one.name for one in _parameters(module) if one.kind in _NAMED and one.default is one.empty
    }


def possible_inputs(module: dspy.Module) -> set[str]:
    """Inputs that a module with a ``forward(**inputs)`` of one's own may need of its examples, or
    make itself: those of its predictors that none of its predictors gives. None where a part of it
    asks no model, as a retriever: that may give anything."""
    parts = [
        part
        for _, part in module.named_sub_modules()
        if isinstance(part, dspy.Module) and part is not module
    ]
    open_ended = (
        any(one.kind is one.VAR_KEYWORD for one in _parameters(module))
        and _signature_asked(module) is None
    )
    if not open_ended or any(
        not part.predictors() for part in parts if not isinstance(part, dspy.Predict)
    ):
        return set()
    signatures = [signature_of(predictor) for predictor in module.predictors()]
    made = {name for signature in signatures for name in signature.output_fields}
    return {
        name
        for one in signatures
        for name, field in one.input_fields.items()
        if name not in made and _required(field)
    }


def accepted_inputs(program: Collaboration) -> list[str]:
    """The inputs that a program may be given, as far as its signatures and the parameters of its
    modules' ``forward`` name them; what it makes itself, such as the draft, is none."""
    if isinstance(program, Embedded):
        found = _accepted(program.module)
    else:
        refine = [name for name in _accepted(program.refine) if name != program.draft_field]
        found = [*_accepted(program.draft), *refine]
    return list(dict.fromkeys(found))


def _accepted(module: dspy.Module) -> list[str]:
    signature = _signature_asked(module)
    if signature is not None:
        return list(signature.input_fields)
    return [one.name for one in _parameters(module) if one.kind in _NAMED] + sorted(
        possible_inputs(module)
    )


def needed_by(
    program: Collaboration, modules: Mapping[str, dspy.Module] | None = None
) -> dict[str, tuple[str, ...]]:
    """Each input that an example must have, with the parts that need it: draft, refine, alone, and
    those of ``modules``."""
    parts: dict[str, dspy.Module] = (
        {"module": program.module}
        if isinstance(program, Embedded)
        else {"draft": program.draft, "refine": program.refine, "alone": program.alone}
    )
    parts |= modules or {}
    found: dict[str, list[str]] = {}
    for part, module in parts.items():
        for name in needed_inputs(module) - (
            {program.draft_field} if part in ("refine", "alone") else set()
        ):
            found.setdefault(name, []).append(part)
    return {name: tuple(parts) for name, parts in sorted(found.items())}


def check_inputs(
    program: Collaboration,
    examples: Iterable[dspy.Example],
    *,
    modules: Mapping[str, dspy.Module] | None = None,
    where: str = "",
    table: bool = False,
) -> None:
    """Sees that every example has the inputs that the program needs.

    Args:
        program: bound or not.
        modules: other modules that are asked with the same inputs, by name.
        where: which examples these are, for the message.
        table: their inputs are those of [data] in a TOML.

    Raises:
        DataError: an input is missing; with what the example has, and what to type.
    """
    needed = needed_by(program, modules)
    for example in examples:
        given = _input_names(example) or []
        missing = {name: parts for name, parts in needed.items() if name not in given}
        if missing:
            raise DataError(_describe_missing(example, missing, where, table=table))


def _input_names(example: dspy.Example) -> list[str] | None:
    """The names of an example's inputs; None where they are not marked."""
    try:
        return list(example.inputs().keys())
    except ValueError:
        return None


def _parameters(module: dspy.Module) -> list[inspect.Parameter]:
    return (
        list(inspect.signature(module.forward).parameters.values())
        if hasattr(module, "forward")
        else []
    )


def _signature_asked(module: dspy.Module) -> type[dspy.Signature] | None:
    """The signature whose inputs are those of the module: its own, or that of DSPy's ways to ask
    one."""
    if isinstance(module, dspy.Predict):
        return signature_of(module)
    if type(module) is dspy.ChainOfThought:
        return signature_of(cast("dspy.Predict", module.predict))
    signature = getattr(module, "signature", None)
    whole = isinstance(signature, type) and issubclass(signature, dspy.Signature)
    return signature if whole and type(module).__module__.startswith("dspy.") else None


def _required(field: Any) -> bool:
    return field.default is PydanticUndefined and not annotation_allows_none(field.annotation)


def _describe_missing(
    example: dspy.Example, missing: Mapping[str, Iterable[str]], where: str, *, table: bool
) -> str:
    fields = [name for name in example.toDict() if name != "id"]
    given = _input_names(example) or []
    parts = ", ".join(dict.fromkeys(part for parts in missing.values() for part in parts))
    what = f"The program ({parts}) needs the input {' and '.join(_quoted(missing))}"
    if table:
        has = (
            f"[data] names inputs = [{', '.join(_quoted(given))}]. The "
            f"rows{f' of {where}' if where else ''} have the fields"
        )
    else:
        has = (
            f"example {example.get('id', '?')} has the inputs [{', '.join(_quoted(given))}], "
            "and the fields"
        )
    text = f"{what}; {has} {', '.join(fields)}."
    absent = [name for name in missing if example.get(name) is None]
    if absent:
        return (
            f"{text}{nearest(absent[0], fields)} Give every row the field "
            f"{' and '.join(_quoted(absent))}, or rename the input."
        )
    wanted = ", ".join(_quoted([*given, *missing]))
    return (
        f"{text} Write "
        f"{f'inputs = [{wanted}] in [data]' if table else f'example.with_inputs({wanted})'}."
    )


def _quoted(names: Iterable[str]) -> list[str]:
    return [f'"{name}"' for name in names]
