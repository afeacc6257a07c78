"""The noise floor, harm, and Influence as optimisers use it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dspy
import pytest
from report_runs import draft
from scripted import judge_of, match, questions, strong_that_reads, together, weak_that_varies
from toy_budget import configured

from cowest_dspy import Experiment, Influence, InfluenceReport, load_config
from cowest_dspy.errors import ConfigError
from cowest_dspy.experiment.quote import count_calls, quote_by_counting, quote_by_probe
from cowest_dspy.influence import NoiseFloor, noise_floor
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.report import influence_counts, read_report
from cowest_dspy.store.store import Store
from cowest_dspy.testing import ScriptedEngine


def strong_that_samples() -> ScriptedEngine:
    """Alone it knows an even question at the first asking, and an odd one at any other."""

    def answer(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        if "Background: " in text:
            return text.partition("Background: ")[2]
        number = text.split()[-1].rstrip("?")
        return (
            number if (int(number) % 2 == 0) == (request["config"].get("seed") is None) else "none"
        )

    return ScriptedEngine(answer, model="scripted/strong")


def sampling_program(strong: ScriptedEngine) -> Any:
    weak = weak_that_varies(["{n}", "x"])
    program = together(weak, strong)
    return program.bind(strong=strong.lm(temperature=1.0))


# The floor


def test_alone_against_alone_is_the_floor_and_costs_one_call_per_example(tmp_path: Path) -> None:
    strong = strong_that_samples()
    program = sampling_program(strong)
    with Store(tmp_path / "run") as store:
        collect(program, questions(6), match, Sampling(drafts=2), store=store)
        before = len(strong.asked)
        floor = noise_floor(program, questions(6), match, Sampling(drafts=2), store=store)
    assert floor == NoiseFloor(6, 6, 1.0, 1.0) and len(strong.asked) - before == 6
    assert floor and floor.of_mean(6) == pytest.approx(1.96 / math.sqrt(6), rel=1e-3)
    assert floor.of_mean(6, answers=4) == pytest.approx(floor.of_mean(6) / 2)
    assert "6 of 6 changed" in str(floor)


def test_a_strong_model_that_does_not_sample_has_a_floor_of_0_and_is_not_asked() -> None:
    strong = strong_that_reads()
    floor = noise_floor(together(weak_that_varies(["a"]), strong), questions(4), match)
    assert floor and (floor.mean_change, floor.of_mean(4)) == (0.0, 0.0) and strong.asked == []


def test_several_answers_have_their_floor_in_them() -> None:
    traces = collect(
        sampling_program(strong_that_samples()), questions(4), match, Sampling(drafts=2), answers=3
    )
    floor = NoiseFloor.from_traces(traces)
    assert (
        floor and (floor.n, floor.changed) == (4, 4) and floor.mean_change == pytest.approx(2 / 3)
    )
    assert (
        NoiseFloor.from_traces(
            collect(together(weak_that_varies(["a"]), strong_that_reads()), questions(2), match)
        )
        is None
    )


def test_an_answer_that_fails_is_left_out_of_the_floor() -> None:
    def answer(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        return "cut off..." if "number 0" in text else "1"

    program = sampling_program(ScriptedEngine(answer, model="scripted/strong"))
    floor = noise_floor(program, questions(3), match)
    assert floor and floor.n == 2
    assert noise_floor(program, questions(1), match) is None


def test_an_influence_below_the_floor_is_not_more_than_noise() -> None:
    floor = NoiseFloor.of([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    weak, strong = [1.0, 0.0, 0.0, 0.0, 0.0], [1.0] * 40 + [0.0]
    assert InfluenceReport(tuple(weak), floor=floor).more_than_noise is False
    assert InfluenceReport(tuple(strong), floor=floor).more_than_noise is True
    assert InfluenceReport(tuple(strong)).more_than_noise is None
    assert "noise floor 0.50" in str(InfluenceReport(tuple(weak), floor=floor))


# Harm and quality


def test_harm_is_a_rate_with_an_interval_over_examples() -> None:
    values, examples = (-1.0, -1.0, 1.0, 0.0, None, 0.0), ("a", "a", "b", "b", "c", "d")
    report = InfluenceReport(values, examples)
    interval = report.harm_interval()
    assert (
        report.harm_rate == pytest.approx(2 / 5)
        and interval
        and interval.low <= 0.4 <= interval.high
    )
    rows = [
        draft(
            example,
            i,
            value,
            None if value is not None else "timeout: x",
            0.5 if value == 1 else None,
        )
        for i, (example, value) in enumerate(zip(examples, values, strict=True))
    ]
    counts = influence_counts(rows)
    assert (
        counts.harm_rate == pytest.approx(2 / 5)
        and counts.harm == interval
        and counts.draft_quality == 0.5
    )
    assert math.isnan(InfluenceReport(()).harm_rate) and influence_counts([]).harm_rate is None


# The metric in DSPy's hands


def test_influence_says_in_words_what_the_draft_changed() -> None:
    program = together(weak_that_varies(["{n}"]), strong_that_reads())
    influence = Influence(match, program)
    one = questions(2)[1]

    def words(answer: str) -> str:
        said = influence(one, dspy.Prediction(answer=answer, draft="d"), None, "draft", None)
        assert isinstance(said, dspy.Prediction)
        return said.feedback

    assert words("1").startswith(
        'The draft helped: it changed the strong model\'s answer from "none" (score 0.00) to "1" '
        "(score 1.00)."
    )
    assert words("none").startswith(
        'The draft changed nothing: with and without it the answer is "none"'
    )
    assert words("other").startswith("The draft changed the answer but not its score")
    assert influence(one, dspy.Prediction(answer="1")) == 1.0, (
        "without a predictor's name it is a number"
    )
    knows = Influence(
        match, together(weak_that_varies(["{n}"]), ScriptedEngine(lambda request: "1"))
    )
    said = knows.explain(one, dspy.Prediction(answer="9"))
    assert said.score == -1.0 and said.feedback.startswith("The draft hurt")


def test_the_metrics_own_feedback_follows() -> None:
    judge, _ = judge_of("Reason: it fits.\nCoherence: 5\nConsistency: 5")
    influence = Influence(judge, together(weak_that_varies(["{n}"]), strong_that_reads()))
    assert influence.explain(questions(1)[0], dspy.Prediction(answer="0")).feedback.endswith(
        "\nit fits."
    )


# In a run


def task(folder: Path, influence: str, strong: str | None = None) -> Path:
    file = configured(folder, "")
    recipe = folder / "toy.py"
    recipe.write_text(
        recipe.read_text()
        + """
from cowest_dspy.influence import Criterion, Rubric
RUBRIC = Rubric("Grade.", (Criterion("truth", "Is it right?"),), best=3)

def judge():
    return ScriptedEngine(lambda request: "Reason: r" + chr(10) + "Truth: 2", model="scripted/judge")
"""
    )
    text = file.read_text().replace(
        'model = "scripted/strong"', 'model = "scripted/strong"\ntemperature = 1.0'
    )
    file.write_text(
        f'{text}\n[influence]\n{influence}\n[judge]\nkind = "engine"\nengine = '
        '"toy.py:judge"\nmodel = "scripted/judge"\n'
    )
    return file


def test_a_run_scores_by_weight_measures_its_floor_and_reports_agreement(tmp_path: Path) -> None:
    file = task(tmp_path, 'judge = 1.0\nrubric = "toy.py:RUBRIC"\nnoise = 3')
    config = load_config([file])
    with Experiment(config, tmp_path / "run") as experiment:
        traces = list(experiment.collect())
        floor = experiment.noise()
        calls = experiment.store.calls()
        assert (
            floor
            and floor.n == 3
            and experiment.noise() == floor
            and experiment.store.calls() == calls
        )
        report = experiment.report()
    assert all(trace.refined_parts.keys() == {"metric", "judge"} for trace in traces)
    assert report.noise and report.noise.n == 3
    assert [one.title for one in report.stages] == [
        "Collecting drafts and their influence",
        "Measuring the noise floor",
    ]
    assert {
        key for one in traces for key in one.requests.values()
    } == report.prompts.requests.keys()
    assert {name: one.n for name, one in report.agreement.items()} == {"judge": 4 * (2 + 1)}
    assert read_report(tmp_path / "run") == report
    page = (tmp_path / "run/report.html").read_text()
    assert "Noise floor: asked again" in page and "Agreement of judge and metric" in page


def test_a_run_whose_strong_model_samples_says_that_its_noise_is_not_known(tmp_path: Path) -> None:
    with Experiment(load_config([task(tmp_path, "metric = 1.0")]), tmp_path / "run") as experiment:
        experiment.collect()
        assert experiment.noise() is None
        report = experiment.report()
    assert any("was not measured: set [influence] noise" in warning for warning in report.warnings)


def test_the_judges_calls_are_in_the_quote(tmp_path: Path) -> None:
    config = load_config(
        [task(tmp_path, 'judge = 1.0\nrubric = "toy.py:RUBRIC"\nrepeats = 2\nnoise = 2')]
    )
    collecting, noise, *_ = count_calls(config, {"train": 4, "test": 4})
    assert (collecting.scored.most, noise.answers.most, noise.scored.most) == (4 * 3, 2, 2)
    judged = {one.stage: one.calls["judge"].most for one in quote_by_counting(config).stages}
    assert (judged["collect"], judged["noise"]) == (4 * 3 * 2, 2 * 2), "each is rated twice"
    with (
        pytest.raises(ConfigError, match="does not sample"),
        Experiment(config, tmp_path / "run") as experiment,
    ):
        quote_by_probe(experiment)
    file = task(tmp_path, 'judge = 1.0\nrubric = "toy.py:RUBRIC"')
    with Experiment(load_config([file]), tmp_path / "run2") as experiment:
        assert quote_by_probe(experiment).stages[0].calls["judge"].expected == 12


@pytest.mark.parametrize(
    ("influence", "says"),
    [
        ("metric = 0.0", "nothing would score an answer"),
        ("repeats = 2", "repeats is of the judge"),
        ("jugde = 1.0", 'Did you mean "judge"?'),
        ("judge = -1.0", "greater than or equal to 0"),
    ],
)
def test_what_is_wrong_in_influence_is_said(tmp_path: Path, influence: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        load_config([task(tmp_path, influence)])


def test_a_rubric_that_is_none_is_said(tmp_path: Path) -> None:
    config = load_config([task(tmp_path, 'judge = 1.0\nrubric = "toy.py:match"')])
    with (
        Experiment(config, tmp_path / "run") as experiment,
        pytest.raises(ConfigError, match=r"a cowest_dspy\.influence\.Rubric is expected"),
    ):
        experiment.collect()
