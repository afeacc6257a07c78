"""The quote: what a run will cost, from a few examples that it does not ask again; and whether
[budget] is enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_budget import configured
from typer.testing import CliRunner

from cowest_dspy import Experiment, load_config
from cowest_dspy.cli import main
from cowest_dspy.errors import BudgetError, CollectionError
from cowest_dspy.experiment.quote import Quote, Range, quote_by_counting, quote_by_probe
from cowest_dspy.testing import OpenAIServer


def quoted(folder: Path, budget: str = "", examples: int = 3, **options: str) -> Quote:
    with Experiment(
        load_config([configured(folder, budget, **options)]), folder / "run"
    ) as experiment:
        return quote_by_probe(experiment, examples)


def stage(quote: Quote, name: str) -> Any:
    return next(stage for stage in quote.stages if stage.stage == name)


def hosted(server: OpenAIServer, more: str = "") -> str:
    return (
        f'kind = "api"\nmodel = "openai/{server.model}"\napi_base = '
        f'"{server.api_base}"\napi_key_env = "COWEST_TEST_KEY"\n{more}'
    )


def test_without_asking_calls_are_counted_and_nothing_is_written(tmp_path: Path) -> None:
    quote = quote_by_counting(load_config([configured(tmp_path, "strong_calls = 31")]))
    # 4 train examples of 2 drafts: 2 or 3 answers each. 4 dev examples before and after tuning; 4
    # test examples in three arms.
    assert stage(quote, "collect").calls["strong"] == Range(8, 12, 12)
    assert quote.total.calls["strong"] == Range(28, 32, 32) and quote.total.calls["weak"] == Range(
        24, 24, 24
    )
    assert quote.total.tokens is None and quote.exceeded == ("strong_calls: about 32 of 31",)
    assert not (tmp_path / "run").exists()


def test_a_probe_is_what_the_run_then_costs_and_is_not_asked_again(tmp_path: Path) -> None:
    quote = quoted(tmp_path, "strong_calls = 100\nusd = 1")
    assert (quote.probe and quote.probe.usage.calls) == 3 * (2 + 3)
    with Experiment(load_config([configured(tmp_path, "")]), tmp_path / "run") as experiment:
        experiment.collect()
        assert experiment.store.calls() == 4 * (2 + 3)
        bill, spent = experiment.store.bill(), experiment.store.record("stage", "collect") or {}
    assert spent["calls"] == 2 + 3, "only the example that was not probed"
    collect = stage(quote, "collect")
    assert collect.calls["weak"] == Range(8, 8, 8) and collect.calls["strong"] == Range(8, 12, 12)
    assert collect.tokens and collect.tokens.expected == pytest.approx(bill.tokens, rel=0.01)
    assert quote.exceeded == () and "[budget] fits." in quote.text()


def test_a_quote_says_what_difference_the_test_questions_can_show(tmp_path: Path) -> None:
    file = configured(tmp_path, "")
    recipe = tmp_path / "toy.py"
    recipe.write_text(recipe.read_text().replace("range(4)", "range(120)"))
    few = quote_by_counting(load_config([file], overrides={"data.test": 4}))
    assert few.questions == 4
    assert few.text()[-2] == "4 test questions are too few to show any difference."
    said = quote_by_counting(load_config([file])).text()[-2]
    assert said == (
        "120 test questions show a difference of 11.3 points or more (80 % power, if one arm alone "
        "is right on 20 % of them); 5 points need about 630."
    )
    file.write_text(
        file.read_text() + '[compare]\nsmallest = 12\n[compare.arms.alone]\nkind = "alone"\n'
    )
    assert quote_by_counting(load_config([file])).describe_power().endswith("20 % of them).")


def test_a_second_quote_costs_nothing_and_says_the_same(tmp_path: Path) -> None:
    first, second = (quoted(tmp_path) for _ in range(2))
    assert second.probe and (second.probe.usage.calls, second.probe.usage.cached) == (0, 15)
    assert first.total.tokens == second.total.tokens and first.total.calls == second.total.calls
    assert "15 were in the run's store already" in second.text()[0]


def test_equal_drafts_are_expected_to_save_calls(tmp_path: Path) -> None:
    file = configured(tmp_path, "strong_calls = 30")
    recipe = tmp_path / "toy.py"
    recipe.write_text(
        recipe.read_text().replace("f\"draft {request['config'].get('seed')}\"", '"one draft"')
    )
    with Experiment(load_config([file]), tmp_path / "run") as experiment:
        quote = quote_by_probe(experiment)
    assert stage(quote, "collect").calls["strong"] == Range(8, 8, 12)
    assert quote.exceeded == () and quote.doubtful == ("strong_calls: at most 32 of 30",)


def test_money_and_time_of_a_hosted_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", "none")
    with OpenAIServer(lambda request: "yes") as server:
        table = hosted(
            server, "price = { input = 1000.0, output = 10000.0 }\nrequests_per_minute = 6000"
        )
        quote = quoted(tmp_path, "usd = 0.3", strong=table, examples=1)
        assert len(server.received) == 3
    total = quote.total
    assert total.usd and total.tokens and total.minutes
    assert total.usd.expected > 32 * 0.02, "each answer has two tokens at least, and 32 are wanted"
    assert total.minutes.expected >= 32 / 6000
    assert len(quote.exceeded) == 1 and quote.exceeded[0].startswith("usd: about ")


def test_a_price_that_is_not_known_is_not_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", "none")
    with OpenAIServer(lambda request: "yes") as server:
        quote = quoted(tmp_path, strong=hosted(server), examples=1)
    assert quote.total.usd is None and quote.table()[-1][-2] == "?"
    assert "price not known" in quote.text()[0]


def test_what_nothing_is_known_of_is_not_said_to_fit(tmp_path: Path) -> None:
    config = load_config([configured(tmp_path, "usd = 2.0\ntokens = 1000\nstrong_calls = 1000")])
    said = quote_by_counting(config).text()[-1]
    assert said == (
        "Whether [budget] fits is not known for tokens and usd: leave out --no-ask to ask a "
        "few questions for it."
    )


def test_a_metric_that_asks_a_model_is_in_it(tmp_path: Path) -> None:
    file = configured(tmp_path, "")
    recipe = tmp_path / "toy.py"
    recipe.write_text(
        recipe.read_text()
        + """
from cowest_dspy.store.record import recorded
JUDGE = recorded(ScriptedEngine(lambda request: "good enough", model="scripted/judge").lm())

def judged(example, prediction, trace=None):
    return float(JUDGE(f"{example.question} {prediction.answer}?") == ["good enough"])
"""
    )
    file.write_text(file.read_text().replace("toy.py:match", "toy.py:judged"))
    with Experiment(load_config([file]), tmp_path / "run") as experiment:
        quote = quote_by_probe(experiment)
    # Both drafts have the same answer, so one question to the judge in three is new; the others are
    # counted all the same.
    assert stage(quote, "collect").calls["judge"].expected == 12


def test_a_model_that_does_not_answer_is_an_error_that_says_so(tmp_path: Path) -> None:
    file = configured(tmp_path, "")
    recipe = tmp_path / "toy.py"
    recipe.write_text(
        "from dspy.lm15 import AuthError\n"
        + recipe.read_text().replace('"yes", model', 'AuthError("down"), model')
    )
    with (
        Experiment(load_config([file]), tmp_path / "run") as experiment,
        pytest.raises(
            CollectionError, match=r"strong model gave no answer.*auth: .*down.*`cowest doctor`"
        ),
    ):
        quote_by_probe(experiment)


def test_a_budget_that_is_too_small_for_a_probe_stops_it(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="strong_calls = 2 is reached"):
        quoted(tmp_path, "strong_calls = 2")


def test_what_a_run_has_collected_is_still_there_after_a_quote(tmp_path: Path) -> None:
    config = load_config([configured(tmp_path, "")])
    with Experiment(config, tmp_path / "run") as experiment:
        before = [trace.to_dict() for trace in experiment.collect()]
        quote_by_probe(experiment)
        assert [trace.to_dict() for trace in experiment.collect()] == before


# Prompt optimisers


CYCLE = """
[cycle]
strategy = "prompts -> weights -> own -> weights"
[cycle.steps.prompts]
optimizer = "GEPA"
target = "draft"
settings = { max_metric_calls = 30, reflection_minibatch_size = 2 }
[cycle.steps.own]
optimizer = "toy.py:make"
"""


def with_a_cycle(folder: Path, budget: str = "") -> Path:
    file = configured(folder, budget)
    file.write_text(file.read_text() + CYCLE)
    recipe = folder / "toy.py"
    recipe.write_text(
        recipe.read_text()
        + "\ndef make(tools):\n    import dspy\n    return dspy.LabeledFewShot(k=1)\n"
    )
    return file


def test_steps_of_a_cycle_are_reckoned_and_what_nobody_knows_is_no_number(tmp_path: Path) -> None:
    quote = quote_by_counting(load_config([with_a_cycle(tmp_path, "strong_calls = 200")]))
    names = [stage.stage for stage in quote.stages]
    assert names[:7] == [
        "step 1 prompts",
        "collect",
        "dev",
        "step 3 own",
        "collect 2",
        "dev 2",
        "valset",
    ]
    # 30 runs, and one more try: two minibatches of 2, or a merged program's 5 examples, and the 4
    # of dev.
    prompts = stage(quote, "step 1 prompts").calls
    assert prompts["weak"] == Range(0, 30, 39)
    # Besides, 8 answers alone; and one prompt for each 4 runs after the first 4, or for each 2
    # where no prompt was better.
    assert prompts["strong"] == Range(0, 30 + 8 + 7, 39 + 8 + 13)
    assert stage(quote, "valset").calls["strong"] == Range(20, 20, 20), "the start and four steps"
    assert stage(quote, "dev 2").calls["weak"] == Range(0, 8, 8), (
        "the second step's program is another one"
    )
    assert quote.table()[4] == ["step 3 own", *["?"] * 6]
    known = [one for one in quote.stages if one.stage != "step 3 own"]
    assert quote.total.calls["strong"].most == sum(one.calls["strong"].most for one in known)
    said = "\n".join(quote.text())
    assert "Steps of [cycle] are reckoned from their optimisers' settings" in said
    assert "step 3 own: nobody knows how often toy.py:make asks. It is in no sum" in said
    assert "step" not in "\n".join(
        quote_by_counting(load_config([configured(tmp_path, "")])).text()
    )


def test_a_probe_prices_the_steps_and_is_above_what_the_cycle_then_asks(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    file = with_a_cycle(tmp_path / "own")
    # Prompts alone: scripted models cannot be tuned.
    file.write_text(
        file.read_text()
        .replace("prompts -> weights -> own -> weights", "prompts")
        .replace('target = "draft"', "")
    )
    with Experiment(load_config([file]), tmp_path / "run") as experiment:
        quote = quote_by_probe(experiment)
        before = experiment.store.calls()
        _ = experiment.final
        asked = experiment.store.calls() - before
    assert [stage.stage for stage in quote.stages][:2] == ["step 1 prompts", "valset"]
    counted = [stage(quote, name) for name in ("step 1 prompts", "valset")]
    assert all(
        one.tokens and one.tokens.expected > 0 and one.minutes is not None for one in counted
    )
    most = sum(calls.most for one in counted for calls in one.calls.values())
    assert 0 < asked <= most


# The command


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(
        main.app, ["quote", str(folder / "toy.toml"), "--run", str(folder / "run"), *arguments]
    )
    return done.exit_code, done.output


def test_the_exit_code_says_whether_the_budget_is_enough(tmp_path: Path) -> None:
    configured(tmp_path, "strong_calls = 40")
    code, said = run(tmp_path)
    lines = said.splitlines()
    assert code == 0 and "[budget] fits." in said
    assert lines[-5].split()[:2] == ["in", "all"] or any(
        line.startswith("in all") for line in lines
    )
    configured(tmp_path, "strong_calls = 20")
    code, said = run(tmp_path, "--examples", "1")
    assert code == 1 and "[budget] is exceeded: strong_calls: about 32 of 20." in said
    configured(tmp_path, "")
    code, said = run(tmp_path, "--no-ask")
    assert code == 0 and "There is no [budget]." in said


def test_the_table_is_aligned(tmp_path: Path) -> None:
    configured(tmp_path, "")
    lines = run(tmp_path)[1].splitlines()
    table = lines[
        : next(place for place, line in enumerate(lines) if line.startswith("in all")) + 1
    ]
    assert len({len(line) for line in table[-7:]}) == 1
    assert json.dumps(table[-7].split()) == json.dumps(
        ["stage", "weak", "strong", "judge", "tokens", "USD", "minutes"]
    )
