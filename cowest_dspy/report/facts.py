"""The parts of a report: frozen, JSON-able facts of one run, and their strict round trip through
report.json.

Nothing here computes: numbers.py does, verdict.py puts it into words, view.py shows it. A failure
is never a score: an ``Answer`` has either a score or an error, never both.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cowest_dspy.errors import ReportError, describe_faults
from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.report import NoiseFloor, failure_kind
from cowest_dspy.influence.statistics import Agreement
from cowest_dspy.influence.trace import Trace
from cowest_dspy.optimizers.cycle import StepResult
from cowest_dspy.optimizers.rounds import Round
from cowest_dspy.pairs import Pair
from cowest_dspy.utils.hiding import hidden_names, hide_inputs, mark, without
from cowest_dspy.utils.notebook import html_of
from cowest_dspy.utils.safe_text import without_half_pairs

SCHEMA_VERSION = 3
STRICT = ConfigDict(extra="forbid")
"""The pydantic settings of a document: unknown keys are refused, in all of its parts."""
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to answer the held-out examples; ``title`` is for people, ``name`` for code. One
    answer per example."""

    name: str
    title: str
    answers: tuple[Answer, ...]
    note: str = ""

    def __post_init__(self) -> None:
        ids = [answer.example_id for answer in self.answers]
        if len(set(ids)) != len(ids):
            twice = next(example_id for example_id in ids if ids.count(example_id) > 1)
            raise ReportError(
                f'Arm "{self.name}" answers example "{twice}" twice: give one answer per example.'
            )

    def scores(self, *, strict: bool = False) -> dict[str, float | None]:
        """Score by example id; where the arm failed None, or 0 if ``strict``."""
        failed = 0.0 if strict else None
        return {
            answer.example_id: failed if answer.score is None else answer.score
            for answer in self.answers
        }

    @property
    def failures(self) -> dict[str, int]:
        """The number of failed answers by kind."""
        errors = (answer.error for answer in self.answers if answer.error is not None)
        return dict(Counter(map(failure_kind, errors)))


@dataclasses.dataclass(frozen=True)
class PairsSummary:
    """``kept`` pairs from ``examples`` different examples; ``dropped`` maps a reason to how many it
    dropped."""

    kept: int
    examples: int
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    rows: tuple[Pair, ...] = ()


LOGGED = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "kl": "log-ratio to the reference",
}
"""The numbers of a training that a report has, by TRL's names, each with its title; "eval_" before
a name is of held-out rows. ``kl``: mean log-ratio to the reference, in nats per token."""
Curve = tuple[dict[str, float], ...]
"""A training in order of steps: the "step", and the finite numbers that were logged at it."""


def training_curve(log_history: Iterable[Mapping[str, Any]]) -> Curve:
    """The curve in a TRL trainer's ``state.log_history``; rows with neither a loss nor a margin are
    left out.

    >>> training_curve([{"step": 1, "loss": 0.69, "epoch": 1.0}, {"step": 1, "eval_loss": 0.7}])
    ({'step': 1.0, 'loss': 0.69}, {'step': 1.0, 'eval_loss': 0.7})
    """
    names = ("step", *LOGGED, *(f"eval_{name}" for name in LOGGED))
    rows = [
        {name: value for name in names if (value := _finite(row.get(name))) is not None}
        for row in log_history
    ]
    shown = {"loss", "rewards/margins", "eval_loss"}
    return tuple(row for row in rows if "step" in row and row.keys() & shown)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The cost of one stage; ``title`` is for people, ``name`` for code. ``calls`` were made,
    ``cached_calls`` came from the store; None is "not measured".

    ``usd`` is US dollars for the calls made; None where the price of one of them is not known.
    """

    name: str
    seconds: float
    calls: int | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    cached_calls: int | None = None
    peak_memory_bytes: int | None = None
    usd: float | None = None
    note: str = ""
    title: str = ""

    @property
    def shown_name(self) -> str:
        """The name for people."""
        return self.title or self.name


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of drafts and answers as they were sent. ``requests`` has the places in
    ``messages``, where each message stands once, of what was asked under each key of
    ``Trace.requests``."""

    messages: tuple[dict[str, str], ...] = ()
    requests: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, repr=False)
class RunReport:
    """One run, finished or not: parts that are not there yet are empty.

    ``reference`` names the arm that all others are tested against, ``rivals`` the arms that it has
    to beat, ``before`` and ``after`` the arms on either side of tuning. A name may stand here
    before its arm has been evaluated. ``created`` is an ISO 8601 time. ``curves`` are of
    trainings, by the name of their stage; ``agreement`` has each evaluator that scored the metric's
    answers too.

    A trace has no prompt, a pair the last message of its own. ``prompts`` has those of the traces,
    of the first ones where they are many.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    title: str
    created: str
    seed: int
    reference: str
    rivals: tuple[str, ...] = ()
    before: str | None = None
    after: str | None = None
    arms: tuple[Arm, ...] = ()
    noise: NoiseFloor | None = None
    agreement: dict[str, Agreement] = dataclasses.field(default_factory=dict)
    pairs: PairsSummary | None = None
    rounds: tuple[Round, ...] = ()
    steps: tuple[StepResult, ...] = ()
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    traces: tuple[Trace, ...] = ()
    prompts: Prompts = Prompts()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ReportError(f"Arms must have different names, got {names}.")

    def arm(self, name: str | None) -> Arm | None:
        """The arm of that name, or None when it has not been evaluated (yet)."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def main_arm(self) -> str:
        """The arm that the others are tested against: ``reference``; while it has not been
        evaluated, ``before`` where that has."""
        return next(
            (name for name in (self.reference, self.before) if name and self.arm(name)),
            self.reference,
        )

    def __repr__(self) -> str:
        return (
            f"RunReport({self.title!r}, seed {self.seed}, {len(self.arms)} arms, "
            f"{len(self.traces)} drafts)"
        )

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        return html_of(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with ``schema_version``; see :func:`dump`."""
        return dump(_ADAPTER, self, SCHEMA_VERSION)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunReport:
        """The report in a parsed report.json; see :func:`load`."""
        again = 'Write it again from its run folder with "cowest report RUN".'
        return load(_ADAPTER, document, SCHEMA_VERSION, again)


def dump(adapter: TypeAdapter[T], facts: T, version: int) -> dict[str, Any]:
    """Facts as plain JSON values with ``schema_version``. Not-a-number becomes None; what JSON
    cannot express, its str."""
    values = valid_json(adapter.dump_python(facts, mode="json", fallback=str))
    return {"schema_version": version, **values}


def load(adapter: TypeAdapter[T], document: Mapping[str, Any], version: int, again: str) -> T:
    """The facts in a parsed document; its "numbers" are ignored, since they follow from the rest.

    Args:
        again: a sentence that says how to write the document again.

    Raises:
        ReportError: another schema version, an unknown or missing key, a value of the wrong type.
    """
    found = document.get("schema_version")
    if found != version:
        raise ReportError(
            f"The document has schema_version {found!r}, this cowest_dspy reads {version}. {again}"
        )
    facts = {key: document[key] for key in document if key not in ("schema_version", "numbers")}
    try:
        return adapter.validate_python(facts)
    except ValidationError as error:
        raise ReportError(
            f"The document does not fit schema_version {version}: "
            f"{describe_faults(error, 'document')}. {again}"
        ) from error


def valid_json(value: Any) -> Any:
    """JSON values without NaN, infinity and halves of surrogate pairs."""
    if isinstance(value, dict):
        return {valid_json(key): valid_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [valid_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return without_half_pairs(value) if isinstance(value, str) else value


def redact(report: RunReport) -> RunReport:
    """The report without the inputs that its configuration hides ([report] hide): a mark stands in
    the place of each, also where another text of the same example repeats it; and without
    prompts."""
    names = hidden_names(report.config)
    if not names:
        return report
    texts: dict[str, dict[str, None]] = {}
    for row in (*(answer for arm in report.arms for answer in arm.answers), *report.traces):
        texts.setdefault(row.example_id, {}).update(
            dict.fromkeys(str(row.inputs[name]) for name in names if name in row.inputs)
        )

    def redacted(row: Any) -> Any:
        values = {
            field.name: without(getattr(row, field.name), texts.get(row.example_id, ()))
            for field in dataclasses.fields(row)
            if field.name != "example_id"
        }
        if "prompt" in values:  # inputs in some format: only the whole is known
            values["prompt"] = tuple(
                {**message, "content": mark(message["content"])} for message in row.prompt
            )
        if "inputs" in values:
            values["inputs"] = hide_inputs(row.inputs, names)
        return dataclasses.replace(row, **values)

    pairs = report.pairs and dataclasses.replace(
        report.pairs, rows=tuple(map(redacted, report.pairs.rows))
    )
    arms = tuple(
        dataclasses.replace(arm, answers=tuple(map(redacted, arm.answers))) for arm in report.arms
    )
    return dataclasses.replace(
        report,
        arms=arms,
        traces=tuple(map(redacted, report.traces)),
        pairs=pairs,
        prompts=Prompts(),
    )


def _finite(value: Any) -> float | None:
    """TRL logs numbers, in some versions as text; what is not a finite number is None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


_ADAPTER = TypeAdapter(RunReport)
