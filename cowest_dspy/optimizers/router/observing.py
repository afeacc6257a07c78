"""What each way of answering scored and cost: taken from a run's traces, or asked of examples.

An :class:`Observed` is one draft with its features, the score of each route, and what each route
cost of the strong model. What failed has no score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import dspy

from cowest_dspy.influence.metric import Attempt, Metric, attempt, scored
from cowest_dspy.influence.trace import Trace
from cowest_dspy.optimizers.router.features import draft_features
from cowest_dspy.optimizers.router.likelihood import DraftLikelihood
from cowest_dspy.optimizers.router.model import Unseen, further_drafts
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.pool import Progress, all_in_order
from cowest_dspy.store.record import keeping
from cowest_dspy.store.store import Store
from cowest_dspy.store.usage import total_usd


@dataclass(frozen=True)
class Observed:
    """One draft of one example.

    ``features`` are empty where there is no draft. ``scores`` are in [0, 1]: of the draft as an
    answer ("weak"; None where it holds none), of the strong model alone, and of the refined answer;
    None where it failed. ``tokens`` of a route are those of the strong model, read and written;
    ``usd`` what it cost, None where a price is not known. Of traces, "strong" has neither: traces
    do not keep them.
    """

    example_id: str
    draft: str
    features: Mapping[str, float]
    scores: Mapping[str, float | None]
    tokens: Mapping[str, int] = field(default_factory=dict)
    usd: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether a gate can learn from it: there is a draft, and both answers of the strong model
        have a score."""
        return (
            bool(self.features)
            and self.scores["strong"] is not None
            and self.scores["collaborate"] is not None
        )


def observed_in(
    traces: Iterable[Trace], *, samples: int = 0, likelihood: DraftLikelihood | None = None
) -> list[Observed]:
    """What traces say, in their order; those without an influence are left out.

    Args:
        samples: so many of an example's other drafts are looked at for "agreement" and "likeness";
            examples with fewer are left out.
        likelihood: of the weak model that the gate will see drafts of.
    """
    groups: dict[tuple[int, str], list[Trace]] = defaultdict(list)
    for trace in traces:
        groups[trace.round, trace.example_id].append(trace)
    chosen: list[tuple[Trace, list[str]]] = []
    for group in groups.values():
        for trace in group:
            others = [other.draft for other in group if other.draft_index != trace.draft_index][
                :samples
            ]
            if trace.draft and trace.influence is not None and len(others) == samples:
                chosen.append((trace, others))
    logprobs: list[float] | list[None] = [None] * len(chosen)
    if likelihood is not None:
        logprobs = likelihood.of_all([(trace.inputs, trace.draft) for trace, _ in chosen])
    return [
        _of_trace(trace, others, logprob)
        for (trace, others), logprob in zip(chosen, logprobs, strict=True)
    ]


def observe(
    program: Collaboration,
    examples: Sequence[dspy.Example],
    metric: Metric,
    *,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    likelihood: DraftLikelihood | None = None,
    store: Store | None = None,
    threads: int = 8,
    on_progress: Progress | None = None,
) -> list[Observed]:
    """Every example answered in all three ways, in order: N examples cost 2 N strong answers, less
    what the store knows.

    The draft is the program's own, as it will be asked for; ``samples``, ``temperature`` and
    ``seed`` are of the further ones.
    """

    def one(example: dspy.Example) -> Observed:
        return _asked(program, example, metric, (samples, temperature, seed), likelihood)

    with keeping(store):
        return all_in_order(one, examples, threads=threads, on_progress=on_progress)


def _of_trace(trace: Trace, others: Sequence[str], logprob: float | None) -> Observed:
    return Observed(
        trace.example_id,
        trace.draft,
        draft_features(trace.inputs, trace.draft, others=others, logprob=logprob),
        {
            "weak": trace.draft_score,
            "strong": trace.alone_score,
            "collaborate": trace.refined_score,
        },
        {
            "weak": 0,
            "collaborate": trace.tokens.get("strong_in", 0) + trace.tokens.get("strong_out", 0),
        },
    )


def _asked(
    program: Collaboration,
    example: dspy.Example,
    metric: Metric,
    sampled: tuple[int, float, int],
    likelihood: DraftLikelihood | None,
) -> Observed:
    inputs = dict(example.inputs().items())
    drafted = attempt(lambda: program.draft_outputs(**inputs))
    alone = attempt(lambda: program.ask_alone(**inputs))
    outputs = drafted.outputs or {}
    draft = str(outputs.get("draft", ""))
    features: Mapping[str, float] = {}
    refined: Attempt | None = None
    if drafted.outputs is not None:
        refined = attempt(lambda: program.refined(draft, **inputs))
        count, temperature, seed = sampled
        with suppress(Unseen):  # Then nothing is known of the draft.
            others = further_drafts(program, inputs, count, temperature=temperature, seed=seed)
            features = draft_features(
                inputs,
                draft,
                others=others,
                logprob=likelihood(inputs, draft) if likelihood else None,
            )
    holds = program.holds_answer(outputs)
    return Observed(
        example.id,
        draft,
        features,
        {
            "weak": scored(metric, example, outputs).score if holds else None,
            "strong": _score(metric, example, alone),
            "collaborate": _score(metric, example, refined),
        },
        {"weak": 0, "strong": _tokens(alone), "collaborate": _tokens(refined)},
        {"weak": 0.0, "strong": _usd(alone), "collaborate": _usd(refined)},
    )


def _score(metric: Metric, example: dspy.Example, made: Attempt | None) -> float | None:
    return (
        None
        if made is None or made.outputs is None
        else scored(metric, example, _fields(made.outputs)).score
    )


def _fields(outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outputs.items() if name != "draft"}


def _tokens(made: Attempt | None) -> int:
    return sum(call.input_tokens + call.output_tokens for call in made.calls) if made else 0


def _usd(made: Attempt | None) -> float | None:
    return total_usd(call.usd for call in made.calls) if made else 0.0
