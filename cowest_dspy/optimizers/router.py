"""Router: whether a draft is taken as the answer, left aside, or refined.

Each route has a head, a logistic function of features of the input and its draft that predicts the
score of the route's answer. A route is worth its predicted score less its cost times ``trade``; the
route that is worth most is taken. Heads are plain numbers: fitting them needs scikit-learn
(``router_fitting``), using them needs nothing.

    router = fit_router(observe_traces(traces))
    Routed(program, router)(question="...").route    # "weak", "strong" or "collaborate"
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import dspy
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cowest_dspy.compat import prompt_messages
from cowest_dspy.errors import ConfigError, ProgramError, RouterError, describe_faults
from cowest_dspy.influence.judge import ScoringEngine
from cowest_dspy.influence.metric import attempt
from cowest_dspy.influence.trace import seed_from
from cowest_dspy.program.adapters import labelled_lines, split_lines
from cowest_dspy.program.collaboration import Collaboration, prompt_adapter, signature_of
from cowest_dspy.store.call_context import note, sampling
from cowest_dspy.store.pool import map_in_threads
from cowest_dspy.store.record import EXPECTED_FAILURES, UNUSABLE, unrecorded
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.reading import read_json

Route = Literal["weak", "strong", "collaborate"]
"""Who answers: the draft, the strong model alone, or the strong model with the draft."""
ROUTES: tuple[Route, ...] = ("weak", "strong", "collaborate")
"""All routes, the cheapest of the strong model first."""
SCHEMA_VERSION = 3
ROUTER_FILE, OLD_FILE = "router.json", "gate.json"

_WORD, _NUMBER = re.compile(r"\w+"), re.compile(r"\d+(?:\.\d+)?")
_LONGEST_LABEL = 60
_IS = "is: "


def draft_features(
    inputs: Mapping[str, Any],
    draft: str,
    *,
    others: Sequence[str] = (),
    logprob: float | None = None,
) -> dict[str, float]:
    """Describe one draft in numbers: lengths as log(1 + count), shares in [0, 1].

    Args:
        inputs: the fields that the program was given.
        others: further samples of the draft for the same input; "agreement" is the share of them
            with the same text, "likeness" the mean overlap of their words with the draft's. Without
            any, both are left out.
        logprob: the mean natural log-probability of the draft's tokens under the weak model; None
            leaves "logprob" out.
    """
    question = " ".join(str(value) for value in inputs.values())
    words, known = _words(draft), _words(question)
    numbers = set(_NUMBER.findall(draft))
    features = {
        "input_words": math.log1p(len(_WORD.findall(question))),
        "draft_words": math.log1p(len(_WORD.findall(draft))),
        "draft_numbers": math.log1p(len(numbers)),
        "new_numbers": math.log1p(len(numbers - set(_NUMBER.findall(question)))),
        "overlap": len(words & known) / len(words) if words else 0.0,
        "whole_sentence": float(draft.rstrip().endswith((".", "!", "?"))),
    }
    if others:
        same = [draft_label(one) == draft_label(draft) for one in others]
        features["agreement"] = sum(same) / len(others)
        features["likeness"] = sum(_jaccard(words, _words(one)) for one in others) / len(others)
    if logprob is not None:
        features["logprob"] = logprob
    return features


def drafter_features(program: Collaboration | None, draft: str) -> dict[str, float]:
    """What the program's drafter itself says of a draft in finite numbers, for instance what a tool
    gave: where it is a module with a method ``draft_features(draft)``, as a dictionary."""
    describe = getattr(program.draft, "draft_features", None) if program is not None else None
    return {} if describe is None else {name: float(one) for name, one in describe(draft).items()}


def draft_label(draft: str) -> str:
    """Normalise a draft as one of a few frequent texts: lower case, no spaces or full stops at its
    ends, 60 characters at most."""
    return " ".join(draft.lower().split()).strip(" .")[:_LONGEST_LABEL]


def feature_value(name: str, features: Mapping[str, float], draft: str) -> float:
    """Look up a feature; "is: TEXT" is 1 for a draft of that text."""
    if name.startswith(_IS):
        return float(draft_label(draft) == name[len(_IS) :])
    return features[name]


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


class Head(BaseModel):
    """A logistic function of features: the predicted score of a route, in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    weights: tuple[float, ...]
    intercept: float

    def predict(self, values: Sequence[float]) -> float:
        """Compute the score from values in the order of the weights."""
        linear = self.intercept + math.fsum(
            weight * value for weight, value in zip(self.weights, values, strict=True)
        )
        # Without overflow on either side.
        return 0.5 * (1.0 + math.tanh(0.5 * linear))


class Router(BaseModel):
    """The fitted heads and costs of all routes, and the decision between them.

    Attributes:
        features: names, in the order of the weights of heads; "is: TEXT" is 1 for a draft of that
            text.
        heads: "strong", "collaborate", and "weak" where drafts hold answers.
        costs: what a route costs of the strong model's tokens, as a share of "collaborate".
        trade: the score that a whole collaboration's cost must bring at least; 0 takes the best
            answer at any cost.
        pays: whether routing was worth more than always collaborating on the examples that it was
            chosen on; where not, every draft is refined.
        samples: further drafts that are sampled of each input, for "agreement" and "likeness".
        temperature: of these samples.
        seed: of these samples.
        about: what it was fitted on, and how well; for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    schema_version: int = SCHEMA_VERSION
    features: tuple[str, ...]
    heads: dict[Route, Head]
    costs: dict[Route, float]
    trade: float = Field(default=0.0, ge=0)
    pays: bool = True
    samples: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    seed: int = 0
    about: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_sizes(self) -> Router:
        size = len(self.features)
        if {len(head.weights) for head in self.heads.values()} - {size}:
            raise ValueError(f"there are {size} features, and not as many weights")
        if missing := {"strong", "collaborate"} - self.heads.keys():
            raise ValueError(f"there is no head {', '.join(sorted(missing))}")
        if missing := set(ROUTES) - self.costs.keys():
            raise ValueError(f"there is no cost of {', '.join(sorted(missing))}")
        return self

    def predict(self, features: Mapping[str, float], draft: str = "") -> dict[Route, float]:
        """Predict the score of each route that has a head, for a draft with these features
        (:func:`draft_features`).

        Raises:
            KeyError: a feature is missing that the router was fitted with.
        """
        values = [feature_value(name, features, draft) for name in self.features]
        return {route: head.predict(values) for route, head in self.heads.items()}

    def choose(self, scores: Mapping[Route, float], trade: float | None = None) -> Route:
        """Choose a route by predicted scores, the cheapest of those that are worth the same.
        ``trade`` in place of the router's own is applied whether the router pays or not."""
        if trade is None and not self.pays:
            return "collaborate"
        price = self.trade if trade is None else trade
        return max(
            (route for route in ROUTES if route in scores),
            key=lambda route: (scores[route] - price * self.costs[route], -self.costs[route]),
        )

    def route(
        self, program: Collaboration, outputs: dspy.Prediction, inputs: Mapping[str, Any]
    ) -> Route:
        """Choose the route for one input whose draft is there (``program.ask_draft``). Samples
        further drafts where it needs them; where that fails, the draft is refined."""
        if not self.pays:
            return "collaborate"
        draft = str(outputs["draft"])
        try:
            others = self.sample_drafts(program, inputs)
            scorer = DraftLikelihood(program) if "logprob" in self.features else None
            logprob = scorer(inputs, draft) if scorer else None
        except (SamplingFailed, *EXPECTED_FAILURES):
            return "collaborate"
        features = draft_features(inputs, draft, others=others, logprob=logprob)
        features |= drafter_features(program, draft)
        return self.choose(self.predict(features, draft))

    def sample_drafts(self, program: Collaboration, inputs: Mapping[str, Any]) -> list[str]:
        """Sample the further drafts of an input (:func:`sample_drafts`)."""
        return sample_drafts(
            program, inputs, self.samples, temperature=self.temperature, seed=self.seed
        )

    def save(self, path: str | Path) -> Path:
        """Write the router as JSON: numbers and names, nothing that is executed. A folder gets a
        ``router.json``."""
        target = Path(path) / ROUTER_FILE if Path(path).is_dir() else Path(path)
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        write_whole({target: text + "\n"})
        return target

    @classmethod
    def load(cls, path: str | Path) -> Router:
        """Read the router in a file, or in the ``router.json`` of a run or a bundle.

        Raises:
            RouterError: there is none, or it is damaged or of another version.
        """
        source = Path(path) / ROUTER_FILE if os.path.isdir(path) else Path(path)
        old = source.with_name(OLD_FILE)
        if not os.path.exists(source) and os.path.exists(old):
            raise RouterError(
                f"{old} is a router of an older cowest_dspy, which this one does not read: "
                "`cowest route RUN` fits one anew."
            )
        if not os.path.exists(source):
            raise RouterError(f"There is no router at {source}: `cowest route RUN` fits one.")
        values: Any = read_json(source, RouterError, "`cowest route RUN` fits one anew.")
        if isinstance(values, dict) and values.get("schema_version", 0) != SCHEMA_VERSION:
            raise RouterError(
                f"{source} has schema_version {values.get('schema_version')}, this cowest_dspy "
                f"reads {SCHEMA_VERSION}: `cowest route RUN` fits one anew."
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RouterError(f"{source} is damaged: {describe_faults(error, 'router')}.") from None


def check_route(route: Any, program: Collaboration, outputs: Mapping[str, Any]) -> Route:
    """Return a route that a router chose for a draft with these outputs.

    Raises:
        ProgramError: there is no such route; or it is "weak", and the draft lacks a field of the
            answer.
    """
    if route not in ROUTES:
        raise ProgramError(
            f'The router chose "{route}": it must choose one of {", ".join(ROUTES)}.'
        )
    if route == "weak" and not program.holds_answer(outputs):
        raise ProgramError(
            f'The router chose "weak", and the draft has no {", ".join(program.answer_fields)}: '
            'drafts of the format "direct" have.'
        )
    return route


class Routed(dspy.Module):
    """A collaboration that answers by a router's choice: with the draft, with the strong model
    alone, or with the refined draft.

    The prediction has ``route`` ("weak", "strong" or "collaborate"), the answer's fields, and
    ``draft``. Where no draft can be had (a failure, or one that was cut off), the strong model
    answers alone.

    Args:
        program: a bound collaboration.
        router: fitted for it, or loaded (:meth:`Router.load`).
    """

    def __init__(self, program: Collaboration, router: Router) -> None:
        super().__init__()
        self.program, self.router = program, router

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Draft, choose a route, answer."""
        drafted = attempt(lambda: self.program.ask_draft(**inputs))
        # A draft that failed is no failure of the answer that comes without it.
        note(replace(call, left_out=drafted.outputs is None) for call in drafted.calls)
        if drafted.outputs is None:
            return _routed("strong", self.program.ask_alone(**inputs), None)
        outputs = dspy.Prediction(**drafted.outputs)
        draft, chosen = str(outputs["draft"]), self.router.route(self.program, outputs, inputs)
        route = check_route(chosen, self.program, drafted.outputs)
        if route == "weak":
            answer = dspy.Prediction(**{name: outputs[name] for name in self.program.answer_fields})
        elif route == "strong":
            answer = self.program.ask_alone(**inputs)
        else:
            answer = self.program.ask_refine(draft, **inputs)
        return _routed(route, answer, draft)


def _routed(route: Route, answer: dspy.Prediction, draft: str | None) -> dspy.Prediction:
    fields = {name: value for name, value in answer.items() if name not in ("draft", "logprobs")}
    return dspy.Prediction(
        **{"route": route, **fields, **({"draft": draft} if draft is not None else {})}
    )


class SamplingFailed(Exception):
    """A further draft could not be had, since a call failed."""


def sample_drafts(
    program: Collaboration, inputs: Mapping[str, Any], count: int, *, temperature: float, seed: int
) -> list[str]:
    """Sample so many more drafts of an input at once; the seeds depend on the inputs alone. A draft
    that was made and cannot be used (not parsed, cut off, refused) is empty, and agrees with none.

    Raises:
        SamplingFailed: a call failed.
    """
    values = {name: str(value) for name, value in sorted(inputs.items())}

    def one(number: int) -> str:
        text = json.dumps([seed, number, values], ensure_ascii=False)
        with sampling(temperature=temperature, seed=seed_from(text)):
            made = attempt(lambda: program.ask_draft(**inputs))
        note(replace(call, left_out=made.outputs is None) for call in made.calls)
        if made.error and made.error.partition(":")[0] not in UNUSABLE:
            raise SamplingFailed(made.error)
        return str(made.outputs["draft"]) if made.outputs else ""

    return map_in_threads(one, range(count), num_threads=count) if count else []


class DraftLikelihood:
    """The mean natural log-probability of a draft's tokens (and of ending there), at most 0, under
    the program's weak model.

    What a drafter with a tool adds to what the model wrote is not counted.

    Args:
        program: bound; its drafter is one predictor, its weak model in process.

    Raises:
        ProgramError: the drafter has several predictors or none.
        ConfigError: the weak model's backend gives no log-probabilities of given texts.
    """

    def __init__(self, program: Collaboration) -> None:
        predictors = program.draft.predictors()
        if len(predictors) != 1:
            raise ProgramError(
                "The likelihood of a draft needs a drafter of one predictor, this has "
                f"{len(predictors)}."
            )
        weak = unrecorded(program.weak)
        engine = weak.engine
        if not isinstance(engine, ScoringEngine):
            raise ConfigError(
                f"{weak.model} gives no log-probabilities of a given text, which this router "
                'needs: use a weak model of kind "in_process", or fit a router without them.'
            )
        self._engine, self._model, self._program = engine, weak.model, program

    def __call__(self, inputs: Mapping[str, Any], draft: str) -> float:
        """Compute that of one draft."""
        return self.of_all([(inputs, draft)])[0]

    def of_all(self, drafts: Sequence[tuple[Mapping[str, Any], str]]) -> list[float]:
        """Compute those of several inputs with their drafts together, in their order; 0 for an
        empty draft."""
        rows = [(self._prompt(inputs), self._written(draft)) for inputs, draft in drafts if draft]
        scores = iter(self._engine.score(rows, model=self._model) if rows else ())
        return [next(scores).per_token if draft else 0.0 for _, draft in drafts]

    def _written(self, draft: str) -> str:
        """The part of a draft that the model wrote."""
        (predictor,) = self._program.draft.predictors()
        own = signature_of(predictor).output_fields
        names = getattr(self._program.draft, "output_names", own)
        if set(names) <= set(own):
            return draft
        parts = split_lines(list(names), draft)
        return labelled_lines({name: parts[name] for name in own if name in parts}) or draft

    def _prompt(self, inputs: Mapping[str, Any]) -> list[dict[str, str]]:
        (predictor,) = self._program.draft.predictors()
        adapter = prompt_adapter(self._program.adapter)
        demos = list(predictor.demos)
        return prompt_messages(adapter, signature_of(predictor), demos, dict(inputs))


def scores_drafts(program: Collaboration) -> bool:
    """Tell whether the likelihood of this program's drafts can be had."""
    try:
        DraftLikelihood(program)
    except (ConfigError, ProgramError):
        return False
    return True
