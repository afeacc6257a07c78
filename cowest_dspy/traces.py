"""collect(): n drafts per example, each refined, each measured against the strong model alone.

The unit is one example: a pure function of the example and the settings, which gives its traces. A pool of threads maps it;
calls go through the run's store, so that N examples with n drafts cost N*(n+1) strong calls (fewer when drafts repeat), none of
them twice. We do our own rollouts: raw completions are kept, and a failure stays a failure.
"""

from __future__ import annotations

import contextvars
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import dspy

from cowest_dspy.errors import CollectionError
from cowest_dspy.influence import Attempt, InfluenceReport, Metric, attempt, score_of
from cowest_dspy.lms.limits import stoppable
from cowest_dspy.lms.recording import keeping
from cowest_dspy.program import Collaboration
from cowest_dspy.store import Store

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Trace:
    """One draft of one example, with everything that is needed to audit it.

    Scores are in [0, 1], influence in [-1, 1]; all None when there is an ``error`` ("kind: text"). ``tokens`` has weak_in,
    weak_out, strong_in, strong_out; the strong model's are those of refining this draft, without alone.
    """

    example_id: str
    draft_index: int
    round: int
    inputs: dict[str, Any]
    gold: dict[str, Any]
    prompt: tuple[dict[str, str], ...]
    completion: str
    draft: str
    refined: dict[str, Any] | None
    alone: dict[str, Any] | None
    refined_score: float | None
    alone_score: float | None
    influence: float | None
    draft_score: float | None
    weak_model: str
    strong_model: str
    tokens: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The trace as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trace:
        """The inverse of :meth:`to_dict`, also after a round trip through JSON."""
        return cls(**{**values, "prompt": tuple(values["prompt"])})


@dataclass(frozen=True)
class Sampling:
    """How drafts are sampled: ``drafts`` per example, at a temperature and top_p, from a seed."""

    drafts: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    round: int = 1

    def seed_of(self, example_id: str, draft_index: int) -> int:
        """The random seed of one draft: 31 bits, different for every (seed, round, example, draft)."""
        content = f"{self.seed}|{self.round}|{example_id}|{draft_index}"
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big") >> 1


def collect(
    program: Collaboration,
    examples: Sequence[dspy.Example],
    metric: Metric,
    sampling: Sampling | None = None,
    *,
    store: Store | None = None,
    threads: int = 8,
    max_failed: float = 1.0,
    on_progress: Progress | None = None,
) -> list[Trace]:
    """Samples drafts for every example and measures the influence of each; traces in the order of examples and drafts.

    Args:
        program: bound to its LMs (:meth:`Collaboration.bind`).
        metric: any DSPy metric with values in [0, 1].
        sampling: number of drafts, temperature, seed. Drafts of one request differ by their seed.
        store: where calls are kept and found again; without one nothing is kept.
        threads: examples under way at once.
        max_failed: the largest part of drafts that may fail, in [0, 1].
        on_progress: called with (examples done, examples in all).

    Raises:
        ProgramError: the program is not bound.
        CollectionError: more than ``max_failed`` of the drafts failed; calls and traces are kept.
    """
    settings = sampling or Sampling()
    _ = program.weak, program.strong
    traces: list[Trace] = []
    with (
        keeping(store),
        ThreadPoolExecutor(threads) as outer,
        ThreadPoolExecutor(min(threads * settings.drafts, 256)) as inner,
        stoppable(),
    ):
        work = in_order(outer, lambda example: trace_example(program, example, metric, settings, inner), examples)
        for done, made in enumerate(work, start=1):
            traces.extend(made)
            if store:
                store.keep_all("trace", {_key(trace): trace.to_dict() for trace in made})
            if on_progress:
                on_progress(done, len(examples))
    _stop_when_too_many_failed(traces, max_failed)
    return traces


def trace_example(program: Collaboration, example: dspy.Example, metric: Metric, sampling: Sampling, pool: Executor) -> list[Trace]:
    """The traces of one example. Equal drafts are refined once; alone is asked once."""
    inputs = dict(example.inputs().items())
    alone = _start(pool, lambda: attempt(lambda: program.answered_alone(**inputs)))
    drafting = [_start(pool, _drafting(program, example, sampling, index)) for index in range(sampling.drafts)]
    drafted = [future.result() for future in drafting]
    texts = {made.outputs["draft"]: None for made in drafted if made.outputs}
    refining = {text: _start(pool, _refining(program, inputs, text)) for text in texts}
    refined = {text: future.result() for text, future in refining.items()}
    return [_trace(program, example, metric, sampling, index, made, refined, alone.result()) for index, made in enumerate(drafted)]


def influence_report(traces: Sequence[Trace]) -> InfluenceReport:
    """The influences of traces: helped, hurt, same, failed."""
    return InfluenceReport(tuple(trace.influence for trace in traces), tuple(trace.example_id for trace in traces))


def in_order(pool: Executor, function: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[Made]:
    """``function`` of every item, computed in the pool under the caller's context, given in the items' order."""
    futures = [_start(pool, lambda item=item: function(item)) for item in items]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _start(pool: Executor, work: Callable[[], Made]) -> Any:
    return pool.submit(contextvars.copy_context().run, work)


def _drafting(program: Collaboration, example: dspy.Example, sampling: Sampling, index: int) -> Callable[[], Attempt]:
    def run() -> Attempt:
        drafter = program.deepcopy()
        seed = sampling.seed_of(example.id, index)
        options: dict[str, Any] = {"temperature": sampling.temperature, "seed": seed}
        if sampling.top_p < 1:
            options["top_p"] = sampling.top_p
        drafter.draft.set_lm(program.weak.copy(**options))
        return attempt(lambda: dspy.Prediction(draft=drafter.drafted(**example.inputs())))

    return run


def _refining(program: Collaboration, inputs: dict[str, Any], text: str) -> Callable[[], Attempt]:
    return lambda: attempt(lambda: program.refined(text, **inputs))


def _trace(
    program: Collaboration,
    example: dspy.Example,
    metric: Metric,
    sampling: Sampling,
    index: int,
    drafted: Attempt,
    refined_by_text: dict[str, Attempt],
    alone: Attempt,
) -> Trace:
    text = drafted.outputs["draft"] if drafted.outputs else ""
    refined = refined_by_text.get(text) if drafted.outputs else None
    error = drafted.error or (refined.error if refined else None) or (f"alone {alone.error}" if alone.error else None)
    refined_score = score_of(metric, example, refined.outputs) if refined and refined.outputs else None
    alone_score = score_of(metric, example, alone.outputs) if alone.outputs else None
    whole = error is None and refined_score is not None and alone_score is not None
    calls = drafted.calls[-1:]
    return Trace(
        example_id=example.id,
        draft_index=index,
        round=sampling.round,
        inputs=dict(example.inputs().items()),
        gold={key: value for key, value in example.labels().items() if key != "id"},
        prompt=calls[0].messages if calls else (),
        completion=calls[0].text if calls else "",
        draft=text,
        refined=refined.outputs if refined else None,
        alone=alone.outputs,
        refined_score=refined_score,
        alone_score=alone_score,
        influence=refined_score - alone_score if whole and refined_score is not None and alone_score is not None else None,
        draft_score=None,
        weak_model=program.weak.model,
        strong_model=program.strong.model,
        tokens=_tokens(drafted, refined),
        error=error,
    )


def _tokens(drafted: Attempt, refined: Attempt | None) -> dict[str, int]:
    strong = refined.calls if refined else ()
    return {
        "weak_in": sum(call.input_tokens for call in drafted.calls),
        "weak_out": sum(call.output_tokens for call in drafted.calls),
        "strong_in": sum(call.input_tokens for call in strong),
        "strong_out": sum(call.output_tokens for call in strong),
    }


def _key(trace: Trace) -> str:
    return f"{trace.round}/{trace.example_id}/{trace.draft_index}"


def _stop_when_too_many_failed(traces: Sequence[Trace], most: float) -> None:
    failed = [trace for trace in traces if trace.error]
    if len(failed) <= most * len(traces):
        return
    kinds: dict[str, int] = {}
    for trace in failed:
        kind = (trace.error or "").partition(":")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    raise CollectionError(
        f"{len(failed)} of {len(traces)} drafts failed ({kinds}), more than [collect] max_failed = {most}. The first: "
        f"{failed[0].error}. Everything that was answered is kept; mend the cause and run again, or raise max_failed."
    )
