"""The router: plain numbers that decide where a draft pays, fitted on what was observed, honest on
what was not."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowest_dspy import Collaboration, Sampling, Store, collect
from cowest_dspy.errors import RouterError
from cowest_dspy.influence.metric import attempt
from cowest_dspy.optimizers.router import ROUTES, Head, Route, Routed, Router, draft_features
from cowest_dspy.optimizers.router_curve import router_curve
from cowest_dspy.optimizers.router_fitting import (
    Observed,
    _calibrated,
    _fit_head,
    _Rows,
    fit_router,
    observe,
    observe_traces,
)
from cowest_dspy.report.router_view import describe_curve, write_curve
from cowest_dspy.store.call_context import listening
from cowest_dspy.testing import ScriptedEngine

NUMBERS = st.floats(-4, 4)


@st.composite
def routers(draw: st.DrawFn) -> Router:
    size = draw(st.integers(1, 4))
    many = st.lists(NUMBERS, min_size=size, max_size=size).map(tuple)
    names: list[Route] = ["strong", "collaborate"]
    if draw(st.booleans()):
        names.append("weak")
    heads: dict[Route, Head] = {
        name: Head(weights=draw(many), intercept=draw(NUMBERS)) for name in names
    }
    return Router(
        features=tuple(f"f{number}" for number in range(size)),
        heads=heads,
        costs={"weak": 0.0, "strong": draw(st.floats(0.1, 1)), "collaborate": 1.0},
        trade=draw(st.floats(0, 1)),
    )


def features_of(router: Router, draw: Callable[[Any], Any]) -> dict[str, float]:
    return {name: draw(NUMBERS) for name in router.features}


@given(routers(), st.data())
def test_law_a_router_predicts_scores_and_the_file_routes_alike(
    router: Router, data: st.DataObject
) -> None:
    found = features_of(router, data.draw)
    scores = router.predict(found)
    assert all(0 <= score <= 1 for score in scores.values())
    assert router.choose(scores) in ROUTES and router.choose(scores) in router.heads
    again = Router.model_validate(json.loads(json.dumps(router.model_dump(mode="json"))))
    assert again == router and again.predict(found) == scores
    idle = router.model_copy(update={"pays": False})
    assert idle.choose(scores) == "collaborate"
    assert idle.choose(scores, 0.0) == router.choose(scores, 0.0)


@given(routers(), st.data())
def test_law_a_dearer_trade_never_takes_a_dearer_route(router: Router, data: st.DataObject) -> None:
    scores = router.predict(features_of(router, data.draw))
    low, high = sorted((data.draw(st.floats(0, 2)), data.draw(st.floats(0, 2))))
    first, second = router.choose(scores, low), router.choose(scores, high)
    assert router.costs[second] <= router.costs[first]
    assert scores[router.choose(scores, 0.0)] == max(scores.values())


@given(st.text(), st.text(), st.lists(st.text(), max_size=3), st.none() | st.floats(-20, 0))
def test_law_any_text_has_finite_features(
    question: str, draft: str, others: list[str], logprob: float | None
) -> None:
    found = draft_features({"question": question}, draft, others=others, logprob=logprob)
    assert all(math.isfinite(value) for value in found.values())
    assert 0 <= found["overlap"] <= 1 and found["draft_words"] >= 0
    assert ("agreement" in found) == bool(others) and ("logprob" in found) == (logprob is not None)
    same = draft_features({"question": question}, draft, others=[draft, draft])
    assert same["agreement"] == same["likeness"] == 1


# Fitting


def world(
    count: int, seed: int, *, known: bool = True, drafts: int = 1, first: int = 0
) -> list[Observed]:
    """Sure drafts are right in 9 of 10 and copied; others are right in 2 of 10 and refined to be in
    6. Alone is right in half."""
    draw = random.Random(seed)
    made = []
    for number in range(first, first + count):
        alone = float(draw.random() < 0.5)
        for _ in range(drafts):
            sure = draw.random() < 0.6
            right = float(draw.random() < ((0.9 if sure else 0.2) if known else 0.6))
            features = {
                "draft_words": draw.gauss(2, 0.3),
                "agreement": (0.9 if sure else 0.3) + draw.gauss(0, 0.05),
            }
            refined = right if sure or not known else float(draw.random() < 0.6)
            scores: dict[Route, float | None] = {
                "weak": right,
                "strong": alone,
                "collaborate": refined,
            }
            made.append(
                Observed(
                    f"e{number}",
                    draw.choice("abc"),
                    features,
                    scores,
                    {"weak": 0, "strong": 80, "collaborate": 100},
                )
            )
    return made


def test_what_a_router_predicts_is_calibrated_and_says_more_than_the_mean() -> None:
    router = fit_router(world(400, 0, drafts=2), choose_on=world(150, 1, first=1000))
    for name, share in (("collaborate", 0.97), ("weak", 0.7)):
        found = router.about["heads"][name]
        assert found["brier"] < share * found["brier_of_rate"]
        assert found["calibration_error"] < 0.08
    fresh = world(3000, 7, first=5000)
    for sure in (True, False):
        rows = [one for one in fresh if (one.features["agreement"] > 0.6) == sure]
        said = [router.predict(one.features, one.draft)["weak"] for one in rows]
        assert np.mean(said) == pytest.approx(
            np.mean([one.scores["weak"] or 0 for one in rows]), abs=0.06
        )
    assert router.about["examples"] == 550 and router.about["drafts"] == 950


def test_a_router_saves_what_it_can_without_losing_more_than_it_may() -> None:
    router = fit_router(world(400, 0, drafts=2), choose_on=world(300, 1, first=1000))
    curve = router_curve(router, world(1000, 3, first=9000))
    made, always, twin = (
        curve.point("router"),
        curve.point("always collaborate"),
        curve.point("random, in the router's shares"),
    )
    assert made and always and twin
    # A draft that is copied is worth as much by itself; one that is not sure is worth refining.
    assert (
        0.3 < made.cost < 0.5
        and made.score > always.score - 0.03
        and made.score > twin.score + 0.05
    )
    assert made.cost == pytest.approx(twin.cost)
    best = curve.point("best there was")
    assert best and best.score >= made.score
    gap, interval = curve.against["always collaborate"]
    assert (
        gap == pytest.approx(made.score - always.score)
        and interval
        and interval.low < gap < interval.high
    )
    assert {round(one.cost, 9) for one in curve.over} >= {0.0} and curve.unit == "strong tokens"
    assert "% less of the strong model's cost, n 1000." in describe_curve(curve)


def test_where_nothing_can_be_told_a_router_promises_nothing() -> None:
    unknown = world(200, 5, known=False, first=1000)
    router = fit_router(world(300, 4, known=False), choose_on=unknown)
    fit = router.about["heads"]["collaborate"]
    assert fit.get("brier", 1.0) > 0.97 * fit.get("brier_of_rate", 1.0)
    curve = router_curve(router, world(1000, 6, known=False, first=9000))
    gap, interval = curve.against["random, in the router's shares"]
    assert interval and interval.low <= 0 <= interval.high and abs(gap) < 0.05


def test_a_router_that_does_not_pay_is_not_used() -> None:
    rows = [
        replace(one, scores={"weak": 0.0, "strong": 0.0, "collaborate": float(number % 4 > 0)})
        for number, one in enumerate(world(60, 11))
    ]
    router = fit_router(rows, samples=2)
    assert not router.pays and router.about["chosen_on"]["cost"] == 1.0
    made = router_curve(router, rows).point("router")
    assert made and made.routes == {"weak": 0, "strong": 0, "collaborate": 60}
    asked = Asked()
    program = asked.program()
    assert Routed(program, router)(question="May it run?").route == "collaborate"
    assert (asked.weak_calls, asked.strong_calls) == (1, 1), "no further draft is sampled"


def test_the_same_observations_give_the_same_numbers_in_any_order_of_drafts() -> None:
    rows = world(60, 8)
    assert fit_router(rows) == fit_router(list(rows))


def test_plain_numbers_say_what_scikit_learn_says() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(80, 3))
    targets = (values[:, 0] + generator.normal(size=80) > 0).astype(float)
    rows = _Rows(values, np.ones(80), [str(number) for number in range(80)])
    model, head = _calibrated(rows, targets, np.arange(80)), _fit_head(rows, targets).head
    mine = [head.predict(tuple(row)) for row in values]
    assert mine == pytest.approx(list(model.predict_proba(values)[:, 1]))
    assert max(mine) - min(mine) > 0.3


def test_graded_scores_and_drafts_that_hold_no_answer() -> None:
    rows = [
        Observed(
            one.example_id,
            one.draft,
            one.features,
            {"weak": None, "strong": 0.25, "collaborate": 0.25 + 0.5 * (one.scores["weak"] or 0)},
        )
        for one in world(100, 9)
    ]
    router = fit_router(rows)
    assert "weak" not in router.heads
    found = router.predict({"draft_words": 2.0, "agreement": 0.9}, "a")
    assert router.choose(found) == "collaborate"
    assert found["collaborate"] == pytest.approx(0.7, abs=0.08)
    assert found["strong"] == pytest.approx(0.25, abs=0.02)


def test_too_little_is_said(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match=r"19 examples .* needs 20"):
        fit_router(world(19, 0))
    with pytest.raises(RouterError, match="cowest route RUN"):
        Router.load(tmp_path)
    (tmp_path / "router.json").write_text("{")
    with pytest.raises(RouterError, match=r"is not JSON: .*fits one anew"):
        Router.load(tmp_path)
    router = fit_router(world(40, 0))
    assert Router.load(router.save(tmp_path)) == Router.load(tmp_path) == router
    values = json.loads((tmp_path / "router.json").read_text())
    for change, said in (
        ({"schema_version": 9}, "schema_version 9"),
        ({"means": [1.0]}, "damaged"),
        ({"x": 1}, "damaged"),
    ):
        (tmp_path / "router.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(RouterError, match=said):
            Router.load(tmp_path)


# In a program

KNOWN = {"Arbel": 31, "Morva": 18}


class Asked:
    """A weak and a strong rule that count what they are asked."""

    def __init__(self, drafts: Callable[[str], str] = lambda text: "yes") -> None:
        self.weak_calls = self.strong_calls = 0
        self.drafts = drafts

    def program(self) -> Collaboration:
        def weak(request: Any) -> str:
            self.weak_calls += 1
            return self.drafts(request["messages"][-1]["content"])

        def strong(request: Any) -> str:
            self.strong_calls += 1
            return "no"

        bound = Collaboration("question -> answer", draft="direct")
        return bound.bind(
            weak=ScriptedEngine(weak, model="scripted/weak").lm(),
            strong=ScriptedEngine(strong, model="scripted/strong").lm(),
        )


def constant(route: str) -> Router:
    """A router that takes one route always."""
    heads: dict[Route, Head] = {
        one: Head(weights=(0.0,), intercept=2.0 if one == route else -2.0) for one in ROUTES
    }
    costs: dict[Route, float] = {"weak": 0.0, "strong": 0.9, "collaborate": 1.0}
    return Router(features=("draft_words",), heads=heads, costs=costs)


@pytest.mark.parametrize(
    ("route", "answer", "calls"),
    [("weak", "yes", 0), ("strong", "no", 1), ("collaborate", "no", 1)],
)
def test_a_program_behind_a_router_asks_only_whom_it_needs(
    route: str, answer: str, calls: int
) -> None:
    asked = Asked()
    made = Routed(asked.program(), constant(route))(question="May the Arbel run?")
    assert (made.route, made.answer, made.draft) == (route, answer, "yes")
    assert (asked.weak_calls, asked.strong_calls) == (1, calls)
    assert list(made.keys())[:2] == ["route", "answer"]


def test_where_no_draft_can_be_had_the_strong_model_answers_and_the_answer_is_no_failure() -> None:
    def fails(text: str) -> str:
        raise dspy.lm15.ServerError("down")

    asked = Asked(fails)
    made = attempt(lambda: Routed(asked.program(), constant("weak"))(question="May it run?"))
    assert (
        made.error is None
        and made.outputs
        and made.outputs["route"] == "strong"
        and made.outputs["answer"] == "no"
    )
    assert "draft" not in made.outputs


def test_where_the_router_cannot_look_the_draft_is_refined() -> None:
    fails = [False]

    def draft(text: str) -> str:
        if fails[0]:
            raise dspy.lm15.ServerError("down")
        return "yes"

    program = Asked(draft).program()
    router = constant("weak").model_copy(update={"samples": 2})
    outputs = program.ask_draft(question="a")
    assert router.route(program, outputs, {"question": "a"}) == "weak"
    fails[0] = True
    assert router.route(program, outputs, {"question": "a"}) == "collaborate"


def test_a_further_draft_that_cannot_be_read_agrees_with_none(tmp_path: Path) -> None:
    weak = ScriptedEngine(
        lambda ask: "yes" if (ask["config"].get("seed") or 0) % 2 == 0 else "a frog",
        model="scripted/weak",
    ).lm()
    strong = ScriptedEngine(lambda ask: "yes", model="scripted/strong").lm()
    program = Collaboration("question -> answer: Literal['yes', 'no']", draft="direct").bind(
        weak=weak, strong=strong
    )
    router = constant("weak").model_copy(update={"samples": 8})
    found = router.sample_drafts(program, {"question": "a"})
    assert set(found) == {"yes", ""}
    with listening() as calls:
        assert router.route(program, program.ask_draft(question="a"), {"question": "a"}) == "weak"
    assert len(calls) == 9 and sum(call.left_out for call in calls) == found.count("")
    (seen,) = observe(program, examples(1), match, samples=8)
    assert (
        seen.features["agreement"] == found.count("yes") / 8 or 0 < seen.features["agreement"] < 1
    )
    traces = collect(program, examples(1), match, Sampling(drafts=6), max_errors=1.0)
    others = {one.features["agreement"] for one in observe_traces(traces, samples=5)}
    usable = sum(trace.error is None for trace in traces)
    assert 0 < usable < 6 and others == {(usable - 1) / 5}


def test_further_samples_are_the_same_for_the_same_input() -> None:
    seeds: list[Any] = []

    def draft(request: Any) -> str:
        seeds.append(request["config"].get("seed"))
        return "yes" if (request["config"].get("seed") or 0) % 2 else "no"

    strong = ScriptedEngine(lambda request: "no", model="scripted/strong").lm()
    weak = ScriptedEngine(draft, model="scripted/weak").lm()
    program = Collaboration("question -> answer", draft="direct").bind(weak=weak, strong=strong)
    router = constant("strong").model_copy(update={"samples": 3})
    first, second = (
        router.sample_drafts(program, {"question": "a"}),
        router.sample_drafts(program, {"question": "a"}),
    )
    assert first == second and len(first) == 3
    assert sorted(seeds[:3]) == sorted(seeds[3:]) and len(set(seeds)) == 3
    router.sample_drafts(program, {"question": "b"})
    assert set(seeds[6:]).isdisjoint(seeds[:3])


def match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return float(prediction.answer == example.answer)


def examples(count: int, start: int = 0) -> list[dspy.Example]:
    rows = [
        (f"May number {number} run?", "yes" if number % 3 else "no")
        for number in range(start, start + count)
    ]
    return [
        dspy.Example(id=str(place), question=q, answer=a).with_inputs("question")
        for place, (q, a) in enumerate(rows, start)
    ]


def test_what_was_observed_is_what_was_asked_and_the_store_is_not_asked_again(
    tmp_path: Path,
) -> None:
    asked = Asked(lambda text: "yes")
    program = asked.program()
    with Store(tmp_path / "run") as store:
        traces = collect(program, examples(12), match, Sampling(drafts=3), store=store)
        found = observe_traces(traces, samples=2)
        assert len(found) == 36 and {one.features["agreement"] for one in found} == {1.0}
        assert [one.scores["weak"] for one in found[:6]] == [0.0] * 3 + [1.0] * 3
        before = asked.strong_calls
        held = observe(program, examples(12), match, samples=2, store=store)
        assert asked.strong_calls == before, (
            "the same questions alone, and the same draft, are known"
        )
        assert [one.scores for one in held[:2]] == [
            {"weak": 0.0, "strong": 1.0, "collaborate": 1.0},
            {"weak": 1.0, "strong": 0.0, "collaborate": 0.0},
        ]
        assert all(
            one.tokens["weak"] == 0 < one.tokens["strong"] < one.tokens["collaborate"]
            for one in held
        )
    assert observe_traces(traces, samples=3) == []


def test_a_failed_draft_is_left_to_the_strong_model_and_costs_only_that() -> None:
    def draft(text: str) -> str:
        if "number 1 " in text:
            raise dspy.lm15.ServerError("down")
        return "yes"

    held = observe(Asked(draft).program(), examples(4), match)
    assert (
        held[1].scores == {"weak": None, "strong": 0.0, "collaborate": None}
        and not held[1].features
    )
    curve = router_curve(constant("weak"), held)
    made = curve.point("router")
    assert made and made.routes == {"weak": 3, "strong": 1, "collaborate": 0}
    with pytest.raises(ValueError, match="one draft"):
        router_curve(constant("weak"), [held[0], held[0]])


@settings(max_examples=10)
@given(st.integers(0, 2**20))
def test_the_page_has_every_way_and_asks_nothing(seed: int) -> None:
    import tempfile

    curve = router_curve(fit_router(world(40, seed)), world(30, seed + 1, first=500))
    with tempfile.TemporaryDirectory() as folder:
        written = write_curve(curve, folder, "<script>alert(1)</script>")
        page, document = written.html.read_text(), json.loads(written.json.read_text())
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )
    assert (
        document["points"][0]["score"] == pytest.approx(curve.points[0].score)
        and document["n"] == 30
    )
    for point in curve.points:
        assert point.name in page.replace("&#39;", "'")
