"""Which inputs a program needs of its examples, found out from its signatures before any model is
asked.

    check_inputs(program, examples)         # DataError: the program (draft, refine) needs the input
        "results" ...

Without this DSPy warns in its log, and asks with prompts that lack the input.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import dspy
from dspy.adapters.utils import annotation_allows_none
from pydantic_core import PydanticUndefined

from cowest_dspy.errors import DataError, nearest
from cowest_dspy.program.collaboration import Collaboration, Counterfactual, signature_of


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
    signature = _passed_on_to(module)
    if signature is not None:
        return {name for name, field in signature.input_fields.items() if _required(field)}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        one.name for one in _parameters(module) if one.kind in named and one.default is one.empty
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
        and _passed_on_to(module) is None
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


def needed_by(
    program: Collaboration, modules: Mapping[str, dspy.Module] | None = None
) -> dict[str, tuple[str, ...]]:
    """Each input that an example must have, with the parts that need it: draft, refine, alone, and
    those of ``modules``."""
    parts = {
        "draft": program.draft,
        "refine": program.refine,
        "alone": program.alone,
        **(modules or {}),
    }
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
        given = _marked(example)
        missing = {name: parts for name, parts in needed.items() if name not in given}
        if missing:
            raise DataError(_lacking(example, missing, where, table=table))


def _marked(example: dspy.Example) -> list[str]:
    """The names of an example's inputs; none where they are not marked."""
    try:
        return list(example.inputs().keys())
    except ValueError:
        return []


def _parameters(module: dspy.Module) -> list[inspect.Parameter]:
    return (
        list(inspect.signature(module.forward).parameters.values())
        if hasattr(module, "forward")
        else []
    )


def _passed_on_to(module: dspy.Module) -> type[dspy.Signature] | None:
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


def _lacking(
    example: dspy.Example, missing: Mapping[str, Iterable[str]], where: str, *, table: bool
) -> str:
    fields, given = [name for name in example.toDict() if name != "id"], _marked(example)
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
    absent = [name for name in missing if name not in fields]
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
