"""[budget]: one sum across threads, retries and resumes; at a limit a run stops at once, and a
larger one goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import ServerError
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import match, questions, strong_that_reads, together, weak_that_varies
from scripted_weak import weak_by_seed
from toy_budget import configured

from cowest_dspy import Budget, Collaboration, Store, collect
from cowest_dspy.errors import BudgetError, ConfigError
from cowest_dspy.influence.metric import attempt
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.lms import build_lm
from cowest_dspy.lms.config import Api, Server
from cowest_dspy.store import schema, serialize
from cowest_dspy.store.budget import Bill, BudgetGuard, Clock
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.record import recorded
from cowest_dspy.testing import Fault, OpenAIServer, ScriptedEngine

STRONG = "scripted/strong"


def limits(**values: float) -> Budget:
    return Budget.model_validate(values)


def run(
    folder: Path,
    engine: ScriptedEngine,
    count: int = 6,
    *,
    threads: int = 4,
    budget: Budget | None = None,
) -> Any:
    with Store(folder, budget=budget, strong=STRONG) as store:
        program = together(weak_that_varies(["{n}", "x"]), engine)
        return list(
            collect(
                program,
                questions(count),
                match,
                Sampling(drafts=2),
                store=store,
                num_threads=threads,
                max_errors=1.0,
            )
        )


# The guard


@settings(max_examples=50)
@given(
    st.integers(0, 12),
    st.lists(st.sampled_from(["answer", "retry", "fail"]), max_size=30),
    st.integers(0, 5),
)
def test_attempts_are_never_more_than_the_limit(limit: int, script: list[str], before: int) -> None:
    guard = BudgetGuard(limits(strong_calls=limit), Clock(), Bill(strong_calls=before), STRONG)
    made = before
    for step in script:
        try:
            with guard.paying(STRONG) as call:
                made += 1
                if step == "retry":
                    call.retry()
                    made += 1
                if step == "fail":
                    raise ServerError("down")
        except ServerError:
            continue
        except BudgetError:
            assert made >= limit
            break
    assert made <= max(limit, before)
    assert guard.bill.strong_calls == made


def test_other_models_do_not_count_as_the_strong_one() -> None:
    guard = BudgetGuard(limits(strong_calls=1), Clock(), strong=STRONG)
    for _ in range(3):
        with guard.paying("scripted/weak") as call:
            call.retry()
    with guard.paying(STRONG):
        pass
    assert guard.bill.strong_calls == 1


def test_once_refused_nobody_is_let_in() -> None:
    guard = BudgetGuard(limits(strong_calls=0), Clock(), strong=STRONG)
    for model in (STRONG, "scripted/weak"):
        with pytest.raises(BudgetError), guard.paying(model):
            raise AssertionError("it was let in")


def test_a_price_that_is_not_known_stops_a_budget_in_dollars() -> None:
    guard = BudgetGuard(limits(usd=1.0), Clock(), Bill(usd=None))
    with pytest.raises(BudgetError, match="price of an answer is not known"), guard.paying("m"):
        pass


def test_the_clock_counts_the_time_in_which_somebody_works() -> None:
    now = [0.0]
    clock = Clock(lambda: now[0])
    now[0] = 5.0
    with clock:
        now[0] = 7.0
        with clock:
            now[0] = 8.0
        assert clock.seconds == 3.0
    now[0] = 100.0
    assert clock.seconds == 3.0


# In a collection


@pytest.mark.parametrize("threads", [1, 8])
def test_strong_calls_stop_a_collection_and_more_of_them_finish_it(
    tmp_path: Path, threads: int
) -> None:
    whole = run(tmp_path / "whole", strong_that_reads())
    asked: list[str] = []
    for limit in (0, 5, 11, 18):
        engine = strong_that_reads()
        budget = limits(strong_calls=limit)
        if limit < 18:
            with pytest.raises(
                BudgetError,
                match=rf"strong_calls = {limit} is reached.*raise that limit of the budget",
            ):
                run(tmp_path / "run", engine, threads=threads, budget=budget)
        else:
            assert run(tmp_path / "run", engine, threads=threads, budget=budget) == whole
        asked += [repr(request) for request in engine.asked]
        assert len(asked) == limit, "all of the budget is used, and none of it twice"
    assert len(set(asked)) == 18


def test_a_finished_run_is_read_under_any_budget(tmp_path: Path) -> None:
    whole = run(tmp_path, strong_that_reads())
    engine = strong_that_reads()
    assert (
        run(tmp_path, engine, budget=limits(strong_calls=0, tokens=0, usd=0, minutes=1000)) == whole
    )
    assert engine.asked == []


def test_failures_count_and_a_resume_remembers_them(tmp_path: Path) -> None:
    down = ScriptedEngine(lambda request: ServerError("down"), model=STRONG)
    run(tmp_path, down, 2)
    failed = len(down.asked)
    engine = strong_that_reads()
    with pytest.raises(BudgetError):
        run(tmp_path, engine, 2, budget=limits(strong_calls=failed + 2))
    assert len(engine.asked) == 2


def test_tokens_stop_before_the_next_call(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="tokens = 40 is reached"):
        run(tmp_path, strong_that_reads(), threads=1, budget=limits(tokens=40))
    with Store(tmp_path) as store:
        tokens = store.bill().tokens
    assert 40 <= tokens < 40 + 16 * 30


def test_dollars_stop_and_are_remembered(tmp_path: Path) -> None:
    def ask(number: int, store: Store) -> None:
        request = serialize.request_from_messages("m", [{"role": "user", "content": str(number)}])
        store.answer(request, lambda: serialize.make_response("m", "x", "stop", 1, 1, usd=0.25))

    for start in (0, 2):
        with Store(tmp_path, budget=limits(usd=0.25 * (start + 2))) as store:
            ask(start, store)
            ask(start + 1, store)
            with pytest.raises(BudgetError, match="usd = "):
                ask(start + 2, store)
    with Store(tmp_path) as store:
        assert store.bill().usd == 1.0


def test_minutes_are_those_of_all_processes_on_the_run(tmp_path: Path) -> None:
    def ask(store: Store, number: int) -> None:
        request = serialize.request_from_messages("m", [{"role": "user", "content": str(number)}])
        store.answer(request, lambda: serialize.make_response("m", "x", "stop", 1, 1, usd=0.0))

    for number in range(2):
        with Store(tmp_path, budget=limits(minutes=60)) as store, store.spending("collect"):
            ask(store, number)
            store._clock._before += 40 * 60
            if number:
                with pytest.raises(BudgetError, match="minutes = 60 is reached"):
                    ask(store, 2)
    with Store(tmp_path) as store:
        assert store.bill().seconds == pytest.approx(80 * 60, abs=5)


def test_the_error_passes_through_dspy_and_is_no_failure_of_a_model(tmp_path: Path) -> None:
    with Store(tmp_path, budget=limits(strong_calls=0), strong=STRONG) as store, keeping(store):
        program = Collaboration("question -> answer").bind(
            weak=weak_by_seed().lm(), strong=strong_that_reads().lm()
        )
        for ask in (
            lambda: recorded(strong_that_reads().lm())("hello"),
            lambda: program.ask_alone(question="One?"),
            lambda: attempt(lambda: program.ask_alone(question="One?")),
        ):
            with pytest.raises(BudgetError) as caught:
                ask()
            assert type(caught.value) is BudgetError


def test_evaluation_stops_at_once_too(tmp_path: Path) -> None:
    from cowest_dspy.influence.arms import alone_arm, ask_all

    engine = strong_that_reads()
    program = together(weak_by_seed(), engine)
    with (
        Store(tmp_path, budget=limits(strong_calls=3), strong=STRONG) as store,
        pytest.raises(BudgetError),
    ):
        ask_all(alone_arm(program), questions(50), match, store=store, num_threads=8)
    assert len(engine.asked) == 3


def test_a_metric_that_asks_a_model_is_under_the_budget(tmp_path: Path) -> None:
    judge = recorded(ScriptedEngine(lambda request: "yes", model="scripted/judge").lm())

    def judged(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        judge(f"Is {prediction.answer} right?")
        return 1.0

    program = together(weak_that_varies(["{n}", "x"]), strong_that_reads())
    with (
        Store(tmp_path, budget=limits(tokens=60), strong=STRONG) as store,
        pytest.raises(BudgetError, match="tokens"),
    ):
        list(
            collect(program, questions(20), judged, Sampling(drafts=2), store=store, num_threads=2)
        )


# Over HTTP, with retries


def hosted(server: OpenAIServer, kind: str, **options: Any) -> dspy.LM:
    model = f"openai/{server.model}" if kind == "api" else server.model
    make = Api if kind == "api" else Server
    table = {
        "kind": kind,
        "model": model,
        "api_base": server.api_base,
        "timeout": 30,
        "concurrency": 64,
        **options,
    }
    return build_lm(make.model_validate(table))


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COWEST_TEST_KEY", "none")
    return "COWEST_TEST_KEY"


@pytest.mark.parametrize("kind", ["api", "server"])
def test_retries_count_as_calls(tmp_path: Path, kind: str, key: str) -> None:
    faults = [Fault.status(503), Fault.status(503), None, Fault.status(503)]
    with OpenAIServer(lambda request: "4", faults=faults) as server:
        lm = recorded(hosted(server, kind, api_key_env=key, num_retries=4))
        with (
            Store(tmp_path, budget=limits(strong_calls=4), strong=lm.model) as store,
            keeping(store),
        ):
            assert lm("What is 2+2?") == ["4"]
            assert store.bill(lm.model).strong_calls == 3
            with pytest.raises(BudgetError, match="strong_calls = 4"):
                lm("What is 3+3?")
            assert store.bill(lm.model).strong_calls == 4
        assert len(server.received) == 4


@pytest.mark.parametrize("kind", ["api", "server"])
def test_32_threads_never_exceed_the_calls_of_a_budget(tmp_path: Path, kind: str, key: str) -> None:
    with OpenAIServer(lambda request: "4", fault_rate=0.3, seed=4) as server:
        lm = recorded(hosted(server, kind, api_key_env=key, num_retries=2))
        refused: list[BaseException] = []
        with Store(tmp_path, budget=limits(strong_calls=60), strong=lm.model) as store:

            def work(number: int) -> None:
                with keeping(store):
                    for turn in range(100):
                        try:
                            lm(f"Question {number} {turn}?")
                        except BudgetError as error:
                            refused.append(error)
                            return
                        except dspy.LMError:
                            continue

            in_threads(work)
            assert store.bill(lm.model).strong_calls == 60
        assert len(server.received) == 60, "all of it is used"
        assert len(refused) == 32


def in_threads(work: Any, count: int = 32) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_32_threads_exceed_tokens_by_no_more_than_what_was_under_way(
    tmp_path: Path, key: str
) -> None:
    with OpenAIServer(lambda request: "four words of answer") as server:
        lm = recorded(hosted(server, "api", api_key_env=key))
        with Store(tmp_path, budget=limits(tokens=400), strong=lm.model) as store:

            def work(number: int) -> None:
                with keeping(store):
                    for turn in range(20):
                        try:
                            lm(f"Question {number} {turn}?")
                        except BudgetError:
                            return

            in_threads(work)
            tokens = store.bill().tokens
            each = tokens / store.calls()
        assert each == 7 and len(server.received) * 7 == tokens
        assert 400 <= tokens < 400 + 32 * 7


def test_an_lm_of_ones_own_with_retries_of_dspy_is_counted_attempt_by_attempt(
    tmp_path: Path,
) -> None:
    answers = iter([ServerError("down"), ServerError("down"), "yes", ServerError("down"), "yes"])
    engine = ScriptedEngine(lambda request: next(answers), model=STRONG)
    lm = recorded(dspy.LM(STRONG, engine=engine, cache=False, num_retries=3))
    with Store(tmp_path, budget=limits(strong_calls=4), strong=STRONG) as store, keeping(store):
        assert lm("One?") == ["yes"]
        with pytest.raises(BudgetError):
            lm("Two?")
    assert len(engine.asked) == 4


# In a configuration


def test_the_command_stops_says_what_was_spent_and_goes_on_with_more(tmp_path: Path) -> None:
    from command_line import cowest

    arguments = [
        "collect",
        str(configured(tmp_path, "strong_calls = 5")),
        "--run",
        str(tmp_path / "run"),
    ]
    said = cowest(*arguments, fails=True)
    assert said.startswith(
        "BudgetError: The budget of strong_calls = 5 is reached. Spent: strong calls 5 of 5, tokens "
    )
    assert "the same command or call goes on from here" in said
    configured(tmp_path, "strong_calls = 12\nusd = 1.0")
    said = cowest(*arguments)
    assert (
        "influence +0.00" in said
        and "budget: strong calls 12 of 12, tokens " in said
        and "USD 0.0000 of 1" in said
    )


def test_what_an_interrupted_stage_has_spent_is_in_the_report(tmp_path: Path) -> None:
    from cowest_dspy import Experiment, load_config

    config = load_config([configured(tmp_path, "strong_calls = 5")])
    with Experiment(config, tmp_path / "run") as experiment:
        with pytest.raises(BudgetError):
            experiment.collect()
        kept = experiment.store.record("stage", "collect") or {}
        assert kept["calls"] == experiment.store.calls() >= 5


def test_a_report_says_what_all_processes_have_spent_and_what_a_kill_has_left(
    tmp_path: Path,
) -> None:
    """A kill comes before a stage is noted as done, and leaves the calls that were under way."""
    from cowest_dspy import Experiment, load_config

    config = load_config([configured(tmp_path, "strong_calls = 50")])
    with Experiment(config, tmp_path / "run") as experiment:
        experiment.collect()
        store, whole = experiment.store, experiment.report()
        store.forget("stage")
        store._db.execute(schema.BEGIN, (10**6, "k", "collect", STRONG, schema.UNDER_WAY, 0.0))
        store._db.commit()
        before = store.bill(STRONG).strong_calls
    with Experiment(config, tmp_path / "run") as experiment:
        report, store = experiment.report(), experiment.store
        assert [
            (one.name, one.calls, one.tokens_in, one.tokens_out, one.usd) for one in report.stages
        ] == [(one.name, one.calls, one.tokens_in, one.tokens_out, one.usd) for one in whole.stages]
        assert sum(one.calls or 0 for one in report.stages) == store.calls() > 0
        assert (
            report.stages[0].seconds == pytest.approx(whole.stages[0].seconds, abs=0.5)
            and report.stages[0].seconds > 0
        )
        assert (
            "1 call was under way when a process was killed; it counts as spent." in report.warnings
        )
        assert store.bill(STRONG).strong_calls == before + 1


def test_a_price_that_nobody_knows_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    from cowest_dspy import Experiment, load_config

    table = 'kind = "api"\nmodel = "openai/of-nobody"\napi_base = "http://127.0.0.1:9/v1"'
    with pytest.raises(
        ConfigError, match=r"price of \[strong\] openai/of-nobody is not known\. Add price = "
    ):
        Experiment(load_config([configured(tmp_path, "usd = 1.0", table)]), tmp_path / "run")
    for budget, more in (("usd = 1.0", "\nprice = { input = 1, output = 2 }"), ("tokens = 9", "")):
        Experiment(
            load_config([configured(tmp_path, budget, table + more)]), tmp_path / "run"
        ).close()


def test_another_budget_changes_nothing_that_was_collected(tmp_path: Path) -> None:
    from cowest_dspy import Experiment, load_config

    done = []
    for budget in ("tokens = 100000", ""):
        with Experiment(
            load_config([configured(tmp_path, budget)]), tmp_path / "run"
        ) as experiment:
            experiment.collect()
            done.append(experiment.store.record("done", "collect"))
    assert done[0] == done[1]
