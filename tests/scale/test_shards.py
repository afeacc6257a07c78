"""What a cluster needs no cluster to be tested for: shards, merging, the coordinator, tables."""

from __future__ import annotations

import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
import toy
from live_task import written

from cowest_dspy import Budget, Experiment, Sampling, Store, load_config
from cowest_dspy.errors import (
    BudgetError,
    ClusterError,
    CollectionError,
    ConfigError,
    ModelError,
    StoreError,
)
from cowest_dspy.experiment.config import Config, validate
from cowest_dspy.experiment.sharding import ShardParts
from cowest_dspy.influence.collection import Tally, collect
from cowest_dspy.influence.trace import Traces
from cowest_dspy.lms import build_lm
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.scale import Cluster, RayRules, check_cluster
from cowest_dspy.scale.coordinator import Coordinator, Report, SharedGuard, SharedLimits
from cowest_dspy.scale.shard import (
    FOLDER,
    Shard,
    Work,
    collect_shard,
    merge_shard,
    merge_shards,
    prepare_known,
    split,
)
from cowest_dspy.store import serialize
from cowest_dspy.store.budget import Bill
from cowest_dspy.store.call_context import Stopping, joining, stoppable
from cowest_dspy.store.rate_limit import Limits, share_limits
from cowest_dspy.testing import ScriptedEngine

ENGINE = ScriptedEngine(lambda request: request["messages"][-1]["content"].upper(), model="m")


def examples(count: int) -> list[dspy.Example]:
    return [
        dspy.Example(id=f"q{place}", question=f"{place}?", answer="1").with_inputs("question")
        for place in range(count)
    ]


def ask(store: Store, text: str, fails: bool = False) -> bool:
    """Asks one question; gives whether the answer was known."""
    request = serialize.request_from_messages("m", [{"role": "user", "content": text}])

    def answer() -> Any:
        if fails:
            raise OSError("down")
        return ENGINE.complete(request)

    return store.answer(request, answer)[1]


# Shards


@pytest.mark.parametrize(("count", "number", "at_once", "sizes"), [
    (10, 3, 8, [3, 3, 4]), (10, None, 4, [2, 3, 2, 3]), (2, None, 4, [1, 1]),
    (2500, None, 1, [833, 833, 834]), (3, 7, 1, [1, 1, 1]), (0, None, 4, []),
])  # fmt: skip
def test_shards_are_all_examples_in_order(
    count: int, number: int | None, at_once: int, sizes: list[int], tmp_path: Path
) -> None:
    whole = examples(count)
    shards = split(whole, number, at_once, tmp_path)
    assert [len(shard.examples) for shard in shards] == sizes
    assert [example.id for shard in shards for example in shard.examples] == [e.id for e in whole]
    again = split(examples(count), number, at_once, tmp_path)
    assert [shard.folder for shard in shards] == [shard.folder for shard in again]
    assert len({shard.name for shard in shards}) == len(shards)


# Stores


def test_a_store_takes_another_over_with_what_it_cost_and_twice_is_once(tmp_path: Path) -> None:
    with Store(tmp_path / "shard") as shard:
        shard.stage = "collect"
        for text in ("two", "three"):
            ask(shard, text)
        with pytest.raises(OSError):
            ask(shard, "four", fails=True)
        shard.keep_all("trace", {f"1/b/{place}": {"draft": str(place)} for place in range(12)})
        shard.keep("saved", "1", {"weak_calls": 1})
    with Store(tmp_path / "run") as store:
        store.keep("trace", "1/a/0", {"draft": "a"})
        for text in ("one", "two"):
            ask(store, text)
        for _ in range(2):
            store.merge(tmp_path / "shard", kinds=("trace",))
            assert store.calls() == 4 and store.bill("m").strong_calls == 5
            assert store.cost("collect")["calls"] == 2
            assert store.cost("collect")["note"] == "1 calls failed"
        keys = ["1/a/0", *(f"1/b/{place}" for place in range(12))]
        assert list(store.records("trace")) == keys and not store.records("saved")
        assert all(ask(store, text) for text in ("one", "two", "three"))
    part = Store(tmp_path / "run").within("arm")
    part.merge(tmp_path / "shard", kinds=("trace",))
    assert part.count("trace") == 12 and part.root.count("trace") == 13
    assert part.records("trace")["1/b/3"] == {"draft": "3"}, "its checksum fits"
    part.root.close()


def test_what_a_killed_shard_had_under_way_counts_as_spent(tmp_path: Path) -> None:
    Store(tmp_path / "shard").close()
    with sqlite3.connect(tmp_path / "shard/run.sqlite") as db:
        db.execute("INSERT INTO failures VALUES ('k', 'collect', 'm', 'under way', 1.0, 2)")
    with Store(tmp_path / "run") as store:
        store.merge(tmp_path / "shard")
        assert (store.bill("m").strong_calls, store.bill("m").killed) == (2, 1)


def test_a_damaged_shard_is_an_error_and_nothing_of_it_is_taken(tmp_path: Path) -> None:
    with Store(tmp_path / "shard") as shard:
        ask(shard, "one")
    with sqlite3.connect(tmp_path / "shard/run.sqlite") as db:
        db.execute("UPDATE calls SET response = replace(response, 'ONE', 'TWO')")
    with Store(tmp_path / "run") as store:
        with pytest.raises(StoreError, match=r"shard.* is damaged"):
            store.merge(tmp_path / "shard")
        assert store.calls() == 0


def test_a_shard_knows_what_the_run_has_and_pays_only_for_the_rest(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        assert prepare_known(store) is None
        ask(store, "one")
        known = prepare_known(store)
        assert known is not None
        with Store(tmp_path / "shard", known=known) as shard:
            assert ask(shard, "one") and not ask(shard, "two") and ask(shard, "two")
            assert (shard.calls(), shard.usage.cached) == (1, 2)


def test_whoever_opens_a_run_has_what_its_shards_have_left(tmp_path: Path) -> None:
    with Store(tmp_path / "run", budget=Budget(tokens=100)) as store:  # pyright: ignore[reportCallIssue]
        store.set_strong("m")
        for name in ("a", "b"):
            with Store(tmp_path / "run" / FOLDER / name) as shard:
                ask(shard, name)
        (tmp_path / "run" / FOLDER / "not begun").mkdir()
        merge_shards(store)
        assert store.calls() == 2 and not (tmp_path / "run" / FOLDER).exists()
        assert store.guard is not None and store.guard.bill.strong_calls == 2
        assert store.guard.bill.tokens == store.bill("m").tokens > 0


# What a task does


def slow_task(asked: list[str]) -> Any:
    """Makes a program on models that take a moment, and note what they are asked."""

    def answer(request: dict[str, Any]) -> str:
        time.sleep(0.02)
        asked.append(request["messages"][-1]["content"])
        return str((request["config"].get("seed") or 0) % 3)

    def build() -> tuple[Collaboration, Any]:
        weak, strong = (
            ScriptedEngine(answer, model=f"scripted/{role}") for role in ("weak", "strong")
        )
        match = lambda example, prediction, trace=None: float(prediction.answer == example.answer)  # noqa: E731
        return Collaboration("question -> answer").bind(weak=weak.lm(), strong=strong.lm()), match

    return build


def task_of(tmp_path: Path, asked: list[str], **options: Any) -> tuple[Shard, Work]:
    (shard,) = split(examples(12), 1, 1, tmp_path / "run")
    shard.folder.mkdir(parents=True, exist_ok=True)
    given = {"strong": "scripted/strong", "stage": "collect", "known": None, "limited": False}
    return shard, Work(
        slow_task(asked), Sampling(2), **given, options={"num_threads": 2}, **options
    )


@pytest.fixture
def limits_of_their_own() -> Iterator[None]:
    """A task makes its process's rate limits: here they are as before afterwards."""
    yield
    share_limits(lambda endpoint: Limits())


@pytest.mark.usefixtures("limits_of_their_own")
def test_a_task_that_is_stopped_keeps_what_it_was_answered_and_asks_the_rest_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cowest_dspy.scale.shard.BEAT", 0.01)  # The task is done in half a second.
    asked: list[str] = []
    shard, work = task_of(tmp_path, asked)
    made = Coordinator(None, Bill(), "scripted/strong")

    def stop() -> None:
        while len(asked) < 5:
            time.sleep(0.001)
        made.stop()

    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    assert collect_shard(shard, work, made) is None
    stopping.join()
    before = len(asked)
    with Store(tmp_path / "run") as store:
        assert 0 < before < 60 and collect_shard(shard, work, made) is None
        assert len(asked) == before, "once stopped, no task begins"
        again = Coordinator(None, Bill(), "scripted/strong")
        assert collect_shard(shard, work, again) is not None
        assert again.reports()[0].examples == 12
        assert again.reports()[0].tally.done == 24
        merge_shard(store, shard.folder, kinds=("trace",))
        assert len(asked) == store.calls() and store.count("trace") == 24
        program, metric = slow_task([])()
        here = collect(program, examples(12), metric, Sampling(2))
        assert Traces.load(store, round=1, types=program.output_types) == here
        assert store.cost("collect")["calls"] == len(asked)


@pytest.mark.usefixtures("limits_of_their_own")
def test_a_task_keeps_to_the_budget_of_all_and_needs_the_runs_folder(tmp_path: Path) -> None:
    asked: list[str] = []
    shard, work = task_of(tmp_path, asked)
    budget = Budget(strong_calls=5)  # pyright: ignore[reportCallIssue]
    made = Coordinator(budget, Bill(strong_calls=2), "scripted/strong")
    with pytest.raises(BudgetError, match="strong_calls = 5 is reached"):
        collect_shard(shard, replace(work, limited=True), made)
    with Store(shard.folder) as store:
        assert store.bill("scripted/strong").strong_calls == 3
    shutil.rmtree(shard.folder)
    with pytest.raises(ClusterError, match=r"does not see .*run: .*storage that all nodes share"):
        collect_shard(shard, work, made)


# The coordinator


def guards(budget: Budget, number: int = 2) -> tuple[Coordinator, list[SharedGuard]]:
    made = Coordinator(budget, Bill(strong_calls=1), "strong")
    return made, [SharedGuard(made, "strong", limited=True) for _ in range(number)]


def test_a_budget_is_one_for_all_shards_and_counts_what_is_under_way() -> None:
    made, (one, other) = guards(Budget(strong_calls=4))  # pyright: ignore[reportCallIssue]
    with one.paying("strong") as call, other.paying("strong"), other.paying("weak"):
        call.retry()
        with pytest.raises(
            BudgetError, match=r"strong_calls = 4 is reached.*Spent: strong calls 4"
        ):
            other.admit(True)
    assert made.admit(False) is not None, "nobody is let in any more"


def test_tokens_of_all_shards_are_one_sum_and_an_attempt_that_was_not_made_is_given_back() -> None:
    _, (one, other) = guards(Budget(tokens=100, strong_calls=2))  # pyright: ignore[reportCallIssue]
    with one.paying("strong") as call:
        call.withdraw()
    with other.paying("strong"):
        other.book("strong", 60, 0.0)
    one.book("weak", 40, 0.0)
    with pytest.raises(BudgetError, match="tokens = 100 is reached"), other.paying("weak"):
        pass


def test_without_a_budget_nothing_is_asked_and_a_shard_that_is_stopped_begins_no_call() -> None:
    guard, stopping = SharedGuard(object(), "strong", limited=False), Stopping()  # pyright: ignore[reportArgumentType]
    with joining(stopping), stoppable():
        with guard.paying("strong"):
            guard.book("strong", 1, None)
        stopping.stop()
        with pytest.raises(KeyboardInterrupt), guard.paying("strong"):
            pass


def test_a_rate_limit_is_one_for_all_shards() -> None:
    made = Coordinator(None, Bill(), "strong")
    one, other = (SharedLimits(made, name, ("model",)) for name in ("a", "b"))
    one.requests = other.requests = 2
    first, second = one.enter(5), other.enter(5)
    entered = threading.Event()

    def third() -> None:
        one.leave(one.enter(5))
        entered.set()

    thread = threading.Thread(target=third)
    thread.start()
    assert not entered.wait(0.3), "two are under way"
    made._limits["model",].window = 0.1
    other.leave(second, 3)
    assert entered.wait(5), "one has left the window"
    one.leave(first)
    thread.join()


def test_a_shard_that_begins_again_ends_what_its_killed_process_had_under_way() -> None:
    made = Coordinator(None, Bill(), "strong")
    assert made.begin("a") and made.begin("b")
    endpoint = ("model", None, None)
    number = made.enter("a", endpoint, 1, None, 0)
    assert isinstance(number, int) and isinstance(made.enter("b", endpoint, 1, None, 0), float)
    made._limits[endpoint].window = 0.0
    assert made.begin("a")
    assert isinstance(made.enter("b", endpoint, 1, None, 0), int)
    made.leave(number, 3)  # From the process that was given up: too late to count.


def test_a_call_that_waits_for_its_turn_is_stopped_and_a_server_holds_all_shards_back() -> None:
    made = Coordinator(None, Bill(), "strong")
    one, other = (SharedLimits(made, name, ("model",)) for name in ("a", "b"))
    one.requests = other.requests = 5
    one.hold(60.0)
    stopping, raised = Stopping(), list[BaseException]()

    def wait() -> None:
        with joining(stopping), stoppable():
            try:
                other.enter()
            except KeyboardInterrupt as error:
                raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "it is held back"
    stopping.stop()
    thread.join(5)
    assert len(raised) == 1


def test_failures_of_all_shards_are_judged_together() -> None:
    made = Coordinator(None, Bill(), "strong")
    fails = Tally(1.0, 10, "timeout: slow")
    fails.kinds["timeout"] = 8
    for name, tally in {"a": fails, "b": Tally(1.0, 14)}.items():
        assert made.begin(name) and made.report(name, Report(2, tally))
    whole = Tally(0.3).plus(report.tally for report in made.reports())
    with pytest.raises(CollectionError, match=r"8 of 24 drafts failed \(timeout 8\).*slow"):
        whole.check(last=False)
    assert made.begin("a"), "it runs again, and is counted anew"
    Tally(0.3).plus(report.tally for report in made.reports()).check(last=True)
    assert made.stop() == {"a", "b"} and not made.begin("c")
    assert not made.report("b", Report(2, fails))


# The table


def config(tmp_path: Path, more: str) -> Config:
    written(tmp_path)
    (tmp_path / "more.toml").write_text(more)
    return load_config([tmp_path / "task.toml", tmp_path / "more.toml"])


@pytest.mark.parametrize(("more", "why"), [
    ("[ray.strong]\nworkers = 3\n", "there is no strong any more.*num_shards.*concurrency"),
    ("[ray]\nstartup = 3\n", "there is no startup any more"),
    ('[collect]\nengine = "ray"\n', r"collect.engine: there is no such key. Write a \[ray\] table"),
    ('[ray]\naddress = "ray://there:10001"\n', r'ray.address: give "HOST:PORT"'),
    ('[ray]\nnum_shards = 2\n[weak]\nkind = "server"\nmodel = "m"\ncommand = ["serve"]\n',
     r"\[weak\] command: with \[ray\] every task would start a server.*api_base"),
])  # fmt: skip
def test_what_cannot_be_says_what_there_is_instead(more: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        config(tmp_path, more)


def test_where_a_collection_runs_is_no_part_of_what_a_run_means(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    meanings = set[str]()
    for number, more in enumerate(("", "[ray]\nnum_shards = 3\n")):
        weak = toy.engine("weak").replace("toy.py", "task.py")
        with Experiment(config(tmp_path, weak + more), tmp_path / f"run{number}") as experiment:
            meanings.add(experiment.meaning)
    assert len(meanings) == 1


def test_a_task_makes_the_program_with_its_prompts_and_refuses_other_models(tmp_path: Path) -> None:
    weak = toy.engine("weak").replace("toy.py", "task.py")
    made = config(tmp_path, weak)
    with Experiment(made, tmp_path / "run") as experiment:
        program = experiment.program.bind(weak=experiment.weak, strong=experiment.strong)
        refine: Any = program.refine
        refine.signature = refine.signature.with_instructions("Better prompts.")
        parts, metric = ShardParts.of(made, program), experiment.evaluator
        there, evaluator = parts()
        assert there.dump_state() == program.dump_state() and evaluator is metric
        rows = experiment.splits["train"][:3]
        both = [collect(one, rows, metric, Sampling(2)) for one in (program, there)]
        assert list(both[0]) == list(both[1]) and "Better" in str(there.dump_state())
    other = ShardParts(parts.config, parts.prompts, None, ("scripted/other", "scripted/strong"))
    with pytest.raises(ModelError, match="weights on this node are others"):
        other()
    assert build_lm(made.weak).model == "scripted/weak"


def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    rules = validate(RayRules, {"address": "127.0.0.1:1"}, "test")
    with pytest.raises(ClusterError, match=r"no Ray cluster at 127.0.0.1:1 .*ray start --head"):
        Cluster(rules).connect()
    level, text = check_cluster(rules, tmp_path)
    assert level == "error" and "no Ray cluster" in text


def test_without_ray_the_error_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    weak = toy.engine("weak").replace("toy.py", "task.py")
    with pytest.raises(ConfigError, match=r"pip install 'cowest_dspy\[ray\]'"):
        Experiment(config(tmp_path, weak + "[ray]\nnum_shards = 2\n"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert check_cluster(RayRules(), tmp_path)[0] == "error"  # pyright: ignore[reportCallIssue]
