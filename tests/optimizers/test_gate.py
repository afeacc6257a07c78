"""The gate: plain numbers that decide where a draft pays, fitted on what was observed, honest on
what was not."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowest_dspy import Collaboration, Sampling, Store, collect
from cowest_dspy.errors import GateError
from cowest_dspy.influence.metric import attempt
from cowest_dspy.optimizers.router import (
    ROUTES,
    Gate,
    Gated,
    Head,
    Observed,
    draft_features,
    fit_gate,
    gate_curve,
    observe,
    observed_in,
)
from cowest_dspy.optimizers.router.fitting import _fitted
from cowest_dspy.report.router_view import describe_curve, write_curve
from cowest_dspy.store.record import listening
from cowest_dspy.testing import ScriptedEngine

NUMBERS = st.floats(-4, 4)


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    size = draw(st.integers(1, 4))
    many = st.lists(NUMBERS, min_size=size, max_size=size).map(tuple)
    names = ["helped", "hurt", "refined", *(["right"] if draw(st.booleans()) else [])]
    heads = {
        name: Head(
            weights=draw(many),
            intercept=draw(NUMBERS),
            slope=draw(st.floats(0, 3)),
            shift=draw(NUMBERS),
        )
        for name in names
    }
    return Gate(
        features=tuple(f"f{number}" for number in range(size)),
        means=draw(many),
        scales=draw(st.lists(st.floats(0.1, 3), min_size=size, max_size=size).map(tuple)),
        heads=heads,
        costs={"weak": 0.0, "strong": draw(st.floats(0.1, 1)), "collaborate": 1.0},
        trade=draw(st.floats(0, 1)),
    )


def features_of(gate: Gate, draw: Callable[[Any], Any]) -> dict[str, float]:
    return {name: draw(NUMBERS) for name in gate.features}


@given(gates(), st.data())
def test_law_a_gate_decides_by_probabilities_and_the_file_decides_alike(
    gate: Gate, data: st.DataObject
) -> None:
    found = features_of(gate, data.draw)
    made = gate.decide(found)
    assert (
        made.route in ROUTES
        and 0 <= made.helped <= 1
        and 0 <= made.hurt <= 1
        and made.helped + made.hurt <= 1 + 1e-9
    )
    assert made.helped + made.same + made.hurt == pytest.approx(1)
    assert all(score is None or 0 <= score <= 1 for score in made.scores.values())
    assert made.route != "weak" or made.right is not None
    again = Gate.model_validate(json.loads(json.dumps(gate.model_dump(mode="json"))))
    assert again == gate and again.decide(found) == made


@given(gates(), st.data())
def test_law_a_dearer_trade_never_takes_a_dearer_route(gate: Gate, data: st.DataObject) -> None:
    found = features_of(gate, data.draw)
    low, high = sorted((data.draw(st.floats(0, 2)), data.draw(st.floats(0, 2))))
    first, second = gate.decide(found, trade=low), gate.decide(found, trade=high)
    assert gate.costs[second.route] <= gate.costs[first.route]
    free = gate.decide(found, trade=0.0)
    scores = [score for score in free.scores.values() if score is not None]
    assert free.scores[free.route] == max(scores)


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
            scores = {"weak": right, "strong": alone, "collaborate": refined}
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


def test_what_a_gate_predicts_is_calibrated_and_says_more_than_the_mean() -> None:
    gate = fit_gate(world(400, 0, drafts=2), choose_on=world(150, 1, first=1000))
    for name, share in (("refined", 0.97), ("right", 0.7)):
        found = gate.about["heads"][name]
        assert (
            found["brier"] < share * found["brier_of_rate"]
            and found["log_loss"] < found["log_loss_of_rate"]
        )
        assert found["calibration_error"] < 0.08
    fresh = world(3000, 7, first=5000)
    for sure in (True, False):
        rows = [one for one in fresh if (one.features["agreement"] > 0.6) == sure]
        said = [gate.decide(one.features, one.draft).right or 0 for one in rows]
        assert np.mean(said) == pytest.approx(
            np.mean([one.scores["weak"] or 0 for one in rows]), abs=0.06
        )
    assert gate.about["examples"] == 550 and gate.about["drafts"] == 950


def test_a_gate_saves_what_it_can_without_losing_more_than_it_may() -> None:
    gate = fit_gate(world(400, 0, drafts=2), choose_on=world(300, 1, first=1000))
    curve = gate_curve(gate, world(1000, 3, first=9000))
    made, always, twin = (
        curve.point("gate"),
        curve.point("always collaborate"),
        curve.point("random, in the gate's shares"),
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


def test_where_nothing_can_be_told_a_gate_promises_nothing() -> None:
    gate = fit_gate(world(300, 4, known=False), choose_on=world(200, 5, known=False, first=1000))
    assert (
        gate.about["heads"]["refined"]["brier"]
        > 0.97 * gate.about["heads"]["refined"]["brier_of_rate"]
    )
    curve = gate_curve(gate, world(1000, 6, known=False, first=9000))
    gap, interval = curve.against["random, in the gate's shares"]
    assert interval and interval.low <= 0 <= interval.high and abs(gap) < 0.05


def test_the_same_observations_give_the_same_numbers_in_any_order_of_drafts() -> None:
    rows = world(60, 8)
    assert fit_gate(rows) == fit_gate(list(rows))


def test_plain_numbers_say_what_scikit_learn_says() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(80, 3))
    targets = (values[:, 0] + generator.normal(size=80) > 0).astype(float)
    model = _fitted(values, targets, np.ones(80), 1.0)
    head = Head(weights=tuple(model.coef_[0]), intercept=float(model.intercept_[0]))
    mine = [head.probability(tuple(row)) for row in values]
    assert mine == pytest.approx(list(model.predict_proba(values)[:, 1]))


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
    gate = fit_gate(rows)
    assert "right" not in gate.heads and gate.effect == 0.5
    made = gate.decide({"draft_words": 2.0, "agreement": 0.9}, "a")
    assert made.right is None and made.route == "collaborate"
    refined = made.scores["collaborate"]
    assert refined is not None and refined == pytest.approx(0.7, abs=0.08)


def test_too_little_is_said(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"19 examples .* needs 20"):
        fit_gate(world(19, 0))
    with pytest.raises(GateError, match="cowest gate RUN"):
        Gate.load(tmp_path)
    (tmp_path / "gate.json").write_text("{")
    with pytest.raises(GateError, match=r"is not JSON: .*fits one anew"):
        Gate.load(tmp_path)
    gate = fit_gate(world(40, 0))
    assert Gate.load(gate.save(tmp_path)) == Gate.load(tmp_path) == gate
    values = json.loads((tmp_path / "gate.json").read_text())
    for change, said in (
        ({"schema_version": 9}, "schema_version 9"),
        ({"means": [1.0]}, "damaged"),
        ({"x": 1}, "damaged"),
    ):
        (tmp_path / "gate.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(GateError, match=said):
            Gate.load(tmp_path)


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


def constant(route: str) -> Gate:
    """A gate that takes one route always."""
    said = {
        "weak": {"helped": -3.0, "hurt": -3.0, "refined": -2.0, "right": 2.0},
        "strong": {"helped": -3.0, "hurt": 3.0, "refined": -1.0, "right": -2.0},
        "collaborate": {"helped": 1.0, "hurt": -3.0, "refined": 2.0, "right": -2.0},
    }[route]
    heads = {name: Head(weights=(0.0,), intercept=value) for name, value in said.items()}
    costs = {"weak": 0.0, "strong": 0.9, "collaborate": 1.0}
    return Gate(features=("draft_words",), means=(0.0,), scales=(1.0,), heads=heads, costs=costs)


@pytest.mark.parametrize(
    ("route", "answer", "calls"),
    [("weak", "yes", 0), ("strong", "no", 1), ("collaborate", "no", 1)],
)
def test_a_program_behind_a_gate_asks_only_whom_it_needs(
    route: str, answer: str, calls: int
) -> None:
    asked = Asked()
    made = Gated(asked.program(), constant(route))(question="May the Arbel run?")
    assert (made.route, made.answer, made.draft) == (route, answer, "yes")
    assert (asked.weak_calls, asked.strong_calls) == (1, calls)
    assert list(made.keys())[:2] == ["route", "answer"]


def test_where_no_draft_can_be_had_the_strong_model_answers_and_the_answer_is_no_failure() -> None:
    def fails(text: str) -> str:
        raise dspy.lm15.ServerError("down")

    asked = Asked(fails)
    made = attempt(lambda: Gated(asked.program(), constant("weak"))(question="May it run?"))
    assert (
        made.error is None
        and made.outputs
        and made.outputs["route"] == "strong"
        and made.outputs["answer"] == "no"
    )
    assert "draft" not in made.outputs


def test_where_the_gate_cannot_look_the_draft_is_refined() -> None:
    fails = [False]

    def draft(text: str) -> str:
        if fails[0]:
            raise dspy.lm15.ServerError("down")
        return "yes"

    program = Asked(draft).program()
    gate = constant("weak").model_copy(update={"samples": 2})
    outputs = program.draft_outputs(question="a")
    assert gate.route(program, outputs, {"question": "a"}) == "weak"
    fails[0] = True
    assert gate.route(program, outputs, {"question": "a"}) == "collaborate"


def test_a_further_draft_that_cannot_be_read_agrees_with_none(tmp_path: Path) -> None:
    weak = ScriptedEngine(
        lambda ask: "yes" if (ask["config"].get("seed") or 0) % 2 == 0 else "a frog",
        model="scripted/weak",
    ).lm()
    strong = ScriptedEngine(lambda ask: "yes", model="scripted/strong").lm()
    program = Collaboration("question -> answer: Literal['yes', 'no']", draft="direct").bind(
        weak=weak, strong=strong
    )
    gate = constant("weak").model_copy(update={"samples": 8})
    found = gate.sampled(program, {"question": "a"})
    assert set(found) == {"yes", ""}
    with listening() as calls:
        assert gate.route(program, program.draft_outputs(question="a"), {"question": "a"}) == "weak"
    assert len(calls) == 9 and sum(call.left_out for call in calls) == found.count("")
    (seen,) = observe(program, examples(1), match, samples=8)
    assert (
        seen.features["agreement"] == found.count("yes") / 8 or 0 < seen.features["agreement"] < 1
    )
    traces = collect(program, examples(1), match, Sampling(drafts=6), max_failed=1.0)
    others = {one.features["agreement"] for one in observed_in(traces, samples=5)}
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
    gate = constant("strong").model_copy(update={"samples": 3})
    first, second = (
        gate.sampled(program, {"question": "a"}),
        gate.sampled(program, {"question": "a"}),
    )
    assert first == second and len(first) == 3
    assert sorted(seeds[:3]) == sorted(seeds[3:]) and len(set(seeds)) == 3
    gate.sampled(program, {"question": "b"})
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
        found = observed_in(traces, samples=2)
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
    assert observed_in(traces, samples=3) == []


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
    curve = gate_curve(constant("weak"), held)
    made = curve.point("gate")
    assert made and made.routes == {"weak": 3, "strong": 1, "collaborate": 0}
    with pytest.raises(ValueError, match="one draft"):
        gate_curve(constant("weak"), [held[0], held[0]])


@settings(max_examples=10)
@given(st.integers(0, 2**20))
def test_the_page_has_every_way_and_asks_nothing(seed: int) -> None:
    import tempfile

    curve = gate_curve(fit_gate(world(40, seed)), world(30, seed + 1, first=500))
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
