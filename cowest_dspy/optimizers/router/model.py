"""Router: a few logistic functions of a draft's features as plain numbers, what they decide, and
their file.

A router predicts of a draft whether it will help, hurt or change nothing, what the refined answer
will score, and what the draft by itself would. A route's worth is its expected score, less its cost
times ``trade``; the router takes the route that is worth most.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cowest_dspy.errors import RouterError, faults
from cowest_dspy.optimizers.router.features import category, draft_features
from cowest_dspy.store.record import EXPECTED_FAILURES, UNUSABLE, note, sampling
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.reading import read_json

if TYPE_CHECKING:
    import dspy

    from cowest_dspy.program.collaboration import Collaboration

Route = Literal["weak", "strong", "collaborate"]
"""Who answers: the draft, the strong model alone, or the strong model with the draft."""
ROUTES: tuple[Route, ...] = ("weak", "strong", "collaborate")
"""All routes, the cheapest of the strong model first."""
SCHEMA_VERSION = 1
ROUTER_FILE = "router.json"
OLD_FILE = "gate.json"


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Head(_Plain):
    """One logistic function: a probability from standardised features. ``slope`` and ``shift``
    calibrate it (Platt 1999)."""

    weights: tuple[float, ...]
    intercept: float
    slope: float = 1.0
    shift: float = 0.0

    def probability(self, values: tuple[float, ...]) -> float:
        """In [0, 1]."""
        linear = self.intercept + math.fsum(
            weight * value for weight, value in zip(self.weights, values, strict=True)
        )
        return sigmoid(self.slope * linear + self.shift)


class Decision(_Plain):
    """What the router says of one draft: probabilities, the expected score of each route, and the
    route that it takes.

    ``right`` and ``scores["weak"]`` are None where a draft holds no answer, and then no draft is
    taken for one.
    """

    route: Route
    helped: float
    hurt: float
    right: float | None
    scores: dict[str, float | None]

    @property
    def same(self) -> float:
        """The probability that the draft changes no score."""
        return max(0.0, 1.0 - self.helped - self.hurt)


class Router(_Plain):
    """When to take the draft as the answer, when to ask the strong model alone, and when to have it
    refine the draft.

    Attributes:
        features: names, in the order of ``means``, ``scales`` and the weights of heads; "is: TEXT"
            is 1 for a draft of that text.
        heads: "helped", "hurt", "refined", and "right" where drafts hold answers.
        effect: the mean size of a change of score, where there is one, in (0, 1]; 1 where answers
            are right or wrong.
        costs: what a route costs of the strong model's tokens, as a share of "collaborate".
        trade: how much expected score a whole collaboration's cost must bring, at least; 0 asks for
            the best answer at any cost.
        samples: further drafts that are sampled of each input, for "agreement" and "likeness".
        temperature: of these samples.
        seed: of these samples.
        about: what it was fitted on, and how well; for people.
    """

    schema_version: int = SCHEMA_VERSION
    features: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    heads: dict[str, Head]
    effect: float = Field(default=1.0, gt=0, le=1)
    costs: dict[str, float]
    trade: float = Field(default=0.0, ge=0)
    samples: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    seed: int = 0
    about: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Router:
        size = len(self.features)
        if not (
            len(self.means) == len(self.scales) == size
            and all(len(head.weights) == size for head in self.heads.values())
        ):
            raise ValueError(
                f"there are {size} features, and not as many means, scales and weights"
            )
        if missing := {"helped", "hurt", "refined"} - self.heads.keys():
            raise ValueError(f"there is no head {', '.join(sorted(missing))}")
        if any(scale <= 0 for scale in self.scales):
            raise ValueError("a scale is not above 0")
        return self

    def decide(
        self, found: Mapping[str, float], draft: str = "", *, trade: float | None = None
    ) -> Decision:
        """The decision for a draft with these features (:func:`draft_features`); ``trade`` in place
        of the router's own.

        Raises:
            KeyError: a feature is missing that the router was fitted with.
        """
        values = self.standardised(found, draft)
        return self.weighed(
            {name: head.probability(values) for name, head in self.heads.items()}, trade=trade
        )

    def weighed(self, of: Mapping[str, float], *, trade: float | None = None) -> Decision:
        """The decision from the probabilities of the heads."""
        helped, hurt = of["helped"], of["hurt"]
        if helped + hurt > 1:
            helped, hurt = helped / (helped + hurt), hurt / (helped + hurt)
        right = of.get("right")
        alone = min(1.0, max(0.0, of["refined"] - self.effect * (helped - hurt)))
        scores: dict[str, float | None] = {
            "weak": right,
            "strong": alone,
            "collaborate": of["refined"],
        }
        price = self.trade if trade is None else trade
        worth: dict[Route, float] = {
            route: score - price * self.costs[route]
            for route in ROUTES
            if (score := scores[route]) is not None
        }
        # Of routes that are worth the same the cheapest.
        route = max(worth, key=lambda one: (worth[one], -self.costs[one], -ROUTES.index(one)))
        return Decision(route=route, helped=helped, hurt=hurt, right=right, scores=scores)

    def standardised(self, found: Mapping[str, float], draft: str) -> tuple[float, ...]:
        """The features in the router's order, less their means, by their scales."""
        values = [
            float(category(draft) == name[4:]) if name.startswith("is: ") else found[name]
            for name in self.features
        ]
        return tuple(
            (value - mean) / scale
            for value, mean, scale in zip(values, self.means, self.scales, strict=True)
        )

    def route(
        self, program: Collaboration, outputs: dspy.Prediction, inputs: Mapping[str, Any]
    ) -> Route:
        """The route for one input whose draft is there (``program.draft_outputs``). Samples further
        drafts where it needs them; where that fails, nothing is known of the draft, and it is
        refined."""
        try:
            return self.decided(program, outputs, inputs).route
        except (Unseen, *EXPECTED_FAILURES):
            return "collaborate"

    def decided(
        self,
        program: Collaboration,
        outputs: Mapping[str, Any] | dspy.Prediction,
        inputs: Mapping[str, Any],
    ) -> Decision:
        """As :meth:`route`, with the probabilities."""
        draft = str(outputs["draft"])
        logprob = self.scorer(program)(inputs, draft) if "logprob" in self.features else None
        others = self.sampled(program, inputs)
        return self.decide(draft_features(inputs, draft, others=others, logprob=logprob), draft)

    def sampled(self, program: Collaboration, inputs: Mapping[str, Any]) -> list[str]:
        """The further drafts of an input; the same inputs have the same seeds, whatever came
        before."""
        return further_drafts(
            program, inputs, self.samples, temperature=self.temperature, seed=self.seed
        )

    def scorer(self, program: Collaboration) -> Callable[[Mapping[str, Any], str], float]:
        """How likely the program's weak model finds a draft."""
        from cowest_dspy.optimizers.router.likelihood import DraftLikelihood

        return DraftLikelihood(program)

    def save(self, path: str | Path) -> Path:
        """Writes the router as JSON: numbers and names, nothing that is executed. A folder gets a
        ``router.json``."""
        target = Path(path) / ROUTER_FILE if Path(path).is_dir() else Path(path)
        write_whole(
            {target: json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"}
        )
        return target

    @classmethod
    def load(cls, path: str | Path) -> Router:
        """The router in a file, or in the ``router.json`` of a run or a bundle.

        Raises:
            RouterError: there is none, or it is damaged or of a newer version.
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
                f"reads {SCHEMA_VERSION}."
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RouterError(f"{source} is damaged: {faults(error, 'router')}.") from None


class Unseen(Exception):
    """A further draft could not be had, since a call failed: how far drafts agree is not known."""


def further_drafts(
    program: Collaboration, inputs: Mapping[str, Any], count: int, *, temperature: float, seed: int
) -> list[str]:
    """So many more drafts of an input, sampled at once; the seeds depend on the inputs alone. One
    that was made and cannot be used (not parsed, cut off, refused) is empty, and agrees with none.

    Raises:
        Unseen: a call failed.
    """
    from cowest_dspy.influence.metric import attempt
    from cowest_dspy.store.pool import all_in_order

    def one(number: int) -> str:
        with sampling(temperature=temperature, seed=seed_of(inputs, number, seed)):
            made = attempt(lambda: program.draft_outputs(**inputs))
        note(replace(call, left_out=made.outputs is None) for call in made.calls)
        if made.error and made.error.partition(":")[0] not in UNUSABLE:
            raise Unseen(made.error)
        return str(made.outputs["draft"]) if made.outputs else ""

    return all_in_order(one, range(count), threads=count) if count else []


def seed_of(inputs: Mapping[str, Any], number: int, seed: int) -> int:
    """A random seed of 31 bits for a sample of these inputs."""
    text = json.dumps(
        [seed, number, {name: str(value) for name, value in sorted(inputs.items())}],
        ensure_ascii=False,
    )
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4], "big") >> 1


def sigmoid(value: float) -> float:
    """The logistic function, without overflow."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    small = math.exp(max(value, -700.0))
    return small / (1.0 + small)
