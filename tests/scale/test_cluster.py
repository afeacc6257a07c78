"""Collections in shards on a cluster of several nodes: traces, pairs, budget and limits are those
of one machine, whatever is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import psutil
import pytest
from live_task import answered, committed, until, written
from simulated import Simulated, simulated, workers

from cowest_dspy import Budget, Experiment, Sampling, Store, load_config
from cowest_dspy.errors import BudgetError, ClusterError, CollectionError
from cowest_dspy.lms import build_lm
from cowest_dspy.lms.config import Api
from cowest_dspy.optimizers.run import NoProgress
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.scale import Cluster, RayRules, check_cluster
from cowest_dspy.testing import Fault, OpenAIServer, ScriptedEngine

pytestmark = pytest.mark.slow

KEY = "sk-toy-0123456789abcdef"
SHARDS = "num_shards = 5\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Simulated]:
    """Its nodes have an API key in their environment, which this process has only while it starts
    them."""
    pytest.importorskip("ray")
    os.environ["TOY_KEY"] = KEY
    try:
        with simulated(nodes=2) as made:
            yield made
    finally:
        del os.environ["TOY_KEY"]


def collected(
    files: list[Path], run: Path, progress: NoProgress | None = None
) -> tuple[list[Any], bytes]:
    """All traces of a run, and its pairs as they are written."""
    with Experiment(load_config(files), run, progress=progress) as experiment:
        traces = [trace.to_dict() for trace in experiment.collect()]
        experiment.pairs()
    assert not (run / "shards").exists()
    return traces, (run / "pairs.jsonl").read_bytes()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], bytes]:
    """What one machine makes of the task of live_task.py."""
    folder = tmp_path_factory.mktemp("local")
    return collected([written(folder, latency=0.001)], folder / "run")


class Counting(NoProgress):
    """Notes how far a stage is, whenever that is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None]] = []

    def update(self, event: Any, snapshot: Any) -> None:
        self.seen += [(stage.done, stage.total) for stage in snapshot.now]
        if event == "stage_end":
            self.seen.append((snapshot.stages[-1].done, snapshot.stages[-1].total))


def test_traces_and_pairs_are_those_of_one_machine_and_a_run_goes_on_here(
    cluster: Simulated, local: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    files = [written(tmp_path, latency=0.01), cluster.toml(tmp_path, SHARDS)]
    shown = Counting()
    assert collected(files, tmp_path / "run", shown) == local
    assert shown.seen[-1] == (40, 40) and len(shown.seen) > 1
    asked = answered(tmp_path)
    assert len(asked) == len(set(asked)) and set(asked) == committed(tmp_path)
    with Store(tmp_path / "run") as store:
        assert store.cost("collect")["calls"] == len(asked) == store.calls()
    assert collected(files[:1], tmp_path / "run") == local, "on this machine"
    assert answered(tmp_path) == asked, "nothing is asked again"


def test_a_run_that_was_begun_here_goes_on_there(
    cluster: Simulated, local: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    files = [written(tmp_path, latency=0.001), tmp_path / "budget.toml"]
    files[1].write_text("[budget]\nstrong_calls = 30\n")
    with pytest.raises(BudgetError):
        collected(files, tmp_path / "run")
    assert len(committed(tmp_path)) > 30
    assert collected([files[0], cluster.toml(tmp_path, SHARDS)], tmp_path / "run") == local
    assert len(answered(tmp_path)) == len(set(answered(tmp_path))) == len(committed(tmp_path))


def in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    """A thread that is at work, and what it gives."""
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(work()))
    thread.start()
    return thread, made


def of_shards(run: Path) -> set[str]:
    """The keys of what shards have committed."""
    kept = set[str]()
    for store in run.glob("shards/*/run.sqlite"):
        with contextlib.suppress(Exception):
            kept |= committed(store.parents[1], store.parent.name)
    return kept


def test_a_node_that_is_killed_has_its_shards_run_elsewhere_and_nothing_kept_is_asked_again(
    cluster: Simulated, local: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    node = cluster.add()
    files = [written(tmp_path, latency=0.2), cluster.toml(tmp_path, "num_shards = 8\n")]
    thread, made = in_thread(lambda: collected(files, tmp_path / "run"))
    until(lambda: len(workers(node)) >= 1 and len(answered(tmp_path)) > 30)
    cluster.kill(node)
    kept, before = of_shards(tmp_path / "run"), len(answered(tmp_path))
    (tmp_path / "latency.txt").write_text("0.01")
    thread.join(timeout=240)
    assert made == [local]
    asked = answered(tmp_path)
    assert 30 < before < len(asked) and kept and not kept & set(asked[before:])
    assert set(asked) == committed(tmp_path)


def at_work(cluster: Simulated, folder: Path) -> list[psutil.Process]:
    """The processes that have the store of a shard of this run open."""
    every = [process for node in cluster.nodes for process in workers(node)]
    return [
        process
        for process in every
        if any(
            file.path.startswith(str(folder)) and file.path.endswith("run.sqlite")
            for file in process.open_files()
        )
    ]


def test_a_process_that_is_killed_costs_what_it_had_under_way_and_no_more(
    cluster: Simulated, local: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    until(cluster.settled)
    files = [written(tmp_path, latency=0.2), cluster.toml(tmp_path, "num_shards = 4\n")]
    thread, made = in_thread(lambda: collected(files, tmp_path / "run"))
    until(lambda: len(answered(tmp_path)) > 30 and bool(at_work(cluster, tmp_path)))
    (victim, *_) = at_work(cluster, tmp_path)
    os.kill(victim.pid, signal.SIGKILL)
    psutil.wait_procs([victim], timeout=10)
    kept, before = of_shards(tmp_path / "run"), len(answered(tmp_path))
    thread.join(timeout=240)
    assert made == [local] and kept and not kept & set(answered(tmp_path)[before:])
    with Store(tmp_path / "run") as store:
        bill = store.bill("scripted/strong")
        assert 0 < bill.killed <= 12, "what it had under way counts as spent"
    twice = len(answered(tmp_path)) - len(set(answered(tmp_path)))
    assert twice <= bill.killed, "asked again is only what was under way"


def test_the_budget_holds_over_all_shards_and_a_larger_one_goes_on(
    cluster: Simulated, local: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    files = [written(tmp_path, latency=0.01), cluster.toml(tmp_path, SHARDS)]
    limit = tmp_path / "budget.toml"
    limit.write_text("[budget]\nstrong_calls = 20\n")
    with pytest.raises(BudgetError, match=r"strong_calls = 20 is reached. Spent: strong calls 20"):
        collected([*files, limit], tmp_path / "run")
    with Store(tmp_path / "run") as store:
        strong = store.calls() - store.bill("scripted/weak").strong_calls
        assert 0 < store.bill("scripted/strong").strong_calls == strong <= 20
    limit.write_text("[budget]\nstrong_calls = 200\n")
    assert collected([*files, limit], tmp_path / "run") == local
    assert len(answered(tmp_path)) == len(set(answered(tmp_path)))


def test_too_many_failures_over_all_shards_end_it(cluster: Simulated, tmp_path: Path) -> None:
    task = written(tmp_path, latency=0.001)
    task.write_text(task.read_text().replace("max_errors = 1.0", "max_errors = 0.0"))
    with pytest.raises(CollectionError, match=r"drafts failed \(refine parse"):
        collected([task, cluster.toml(tmp_path, SHARDS)], tmp_path / "run")
    assert set(answered(tmp_path)) == committed(tmp_path), "what was answered is kept"


def number(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"].partition("Background: ")[2].split("\n")[0] or "none"


def limited(model: str, api_base: str) -> Any:
    """Makes a program on a server that allows ten requests a minute."""

    # Inside, so that it travels by value: a task has none of the modules of the tests.
    def build() -> tuple[Collaboration, Any]:
        settings = Api(
            kind="api",
            model=model,
            api_base=api_base,
            api_key_env="TOY_KEY",
            requests_per_minute=10,
        )  # pyright: ignore[reportCallIssue]
        weak = ScriptedEngine(lambda asked: str(asked["config"]["seed"] % 5), model="scripted/weak")
        match = lambda example, prediction, trace=None: float(prediction.answer == example.answer)  # noqa: E731
        program = Collaboration("question -> answer")
        return program.bind(weak=weak.lm(), strong=build_lm(settings)), match

    return build


def test_one_rate_limit_holds_for_all_shards_and_refused_calls_are_tried_again(
    cluster: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_KEY", KEY)
    rows = [
        dspy.Example(id=f"q{i}", question=f"{i}?", answer=str(i % 5)).with_inputs("question")
        for i in range(5)
    ]
    rules = RayRules(address=cluster.address, num_shards=4)  # pyright: ignore[reportCallIssue]
    with (
        OpenAIServer(
            number, key=KEY, faults=[None, Fault.status(429), None, Fault.garbled()]
        ) as server,
        Cluster(rules) as ray,
        Store(tmp_path / "run", budget=Budget(strong_calls=60)) as store,  # pyright: ignore[reportCallIssue]
    ):
        model = f"openai/{server.model}"
        build = limited(model, server.api_base)
        traces = ray.collect(build, rows, Sampling(2), store=store, num_threads=8)
        assert [trace.error for trace in traces if trace.error] == [] and len(traces) == 10
        came = sorted(one.at for one in server.received)
        assert 10 < len(came) <= 20 and came[10] - came[0] >= 60, "no minute holds more than ten"
        assert store.bill(model).strong_calls == len(came)
        assert KEY not in (tmp_path / "run/run.sqlite").read_bytes().decode("latin-1")


DEADLY = """
import os
import time
from pathlib import Path
from cowest_dspy.testing import ScriptedEngine

def make():
    log = Path(__file__).with_name("answered.log")

    def answer(request):
        if "train 3?" in request["messages"][-1]["content"]:
            # Not while an answer is on its way to the store: with its process it would be lost.
            size = -1
            while not log.is_file() or size != (size := log.stat().st_size):
                time.sleep(1)
            os._exit(7)
        return "fine"
    return ScriptedEngine(answer, model="scripted/weak")
"""


def test_a_shard_that_ends_its_processes_is_given_up_and_what_was_answered_is_kept(
    cluster: Simulated, tmp_path: Path
) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    weak = '[weak]\nkind = "engine"\nengine = "deadly.py:make"\nmodel = "scripted/weak"\n'
    files = [written(tmp_path, latency=0.01, more=weak), cluster.toml(tmp_path, "num_shards = 2\n")]
    with pytest.raises(ClusterError, match=r"3 processes ended with the same 20 examples.*train0"):
        collected(files, tmp_path / "run")
    assert set(answered(tmp_path)) <= committed(tmp_path)


def test_a_node_that_does_not_see_the_runs_folder_is_told(
    cluster: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [written(tmp_path, latency=0.01), cluster.toml(tmp_path, SHARDS)]
    rules = RayRules(address=cluster.address)  # pyright: ignore[reportCallIssue]
    level, text = check_cluster(rules, tmp_path / "run")
    assert level == "ok" and "3 nodes that can write" in text and list(tmp_path.glob(".*")) == []
    wide = RayRules(address=cluster.address, num_cpus=64)  # pyright: ignore[reportCallIssue]
    assert check_cluster(wide, tmp_path)[0] == "warning"
    real = Path.mkdir
    monkeypatch.setattr(
        Path,
        "mkdir",
        lambda self, *a, **k: None if self.parent.name == "shards" else real(self, *a, **k),
    )
    with pytest.raises(ClusterError, match=r"does not see .*run: .*that all nodes share"):
        collected(files, tmp_path / "run")
