"""Models on a cluster of several nodes: traces, pairs, budget and limits are those of one machine,
whatever is killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from live_task import answered, committed, until, written
from simulated import Simulated, simulated, workers

from cowest_dspy import Budget, Experiment, Sampling, Store, load_config
from cowest_dspy.errors import BudgetError, ClusterError
from cowest_dspy.influence.collection import collect
from cowest_dspy.lms.config import Api, Engine
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.scale import Cluster
from cowest_dspy.scale.config import RayRules, Shares
from cowest_dspy.store.budget import Clock, Guard
from cowest_dspy.store.rate_limit import shared_limits
from cowest_dspy.testing import Fault, OpenAIServer

pytestmark = pytest.mark.slow

KEY = "sk-toy-0123456789abcdef"
SHARES = """
[ray.weak]
workers = 2
cpus = 0.5
[ray.strong]
workers = 2
cpus = 0.5
"""


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


def collected(files: list[Path], run: Path) -> tuple[list[Any], bytes]:
    """All traces of a run, and its pairs as they are written."""
    with Experiment(load_config(files), run) as experiment:
        traces = [trace.to_dict() for trace in experiment.collect()]
        experiment.pairs()
    return traces, (run / "pairs.jsonl").read_bytes()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], bytes]:
    """What one machine makes of the task of live_task.py."""
    folder = tmp_path_factory.mktemp("local")
    return collected([written(folder, latency=0.001)], folder / "run")


def test_traces_and_pairs_are_those_of_one_machine_and_a_run_goes_on_there(
    cluster: Simulated, local: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    files = [written(tmp_path, latency=0.01), cluster.toml(tmp_path, SHARES)]
    assert collected(files, tmp_path / "run") == local
    asked = answered(tmp_path)
    assert len(asked) == len(set(asked)) and set(asked) == committed(tmp_path)
    assert collected(files[:1], tmp_path / "run") == local, "on this machine"
    assert answered(tmp_path) == asked, "nothing is asked again"


def test_a_node_that_is_killed_has_its_calls_asked_elsewhere_and_none_that_is_kept(
    cluster: Simulated, local: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    node = cluster.add()
    files = [
        written(tmp_path, latency=0.1),
        cluster.toml(tmp_path, SHARES.replace("workers = 2", "workers = 3")),
    ]
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(collected(files, tmp_path / "run")))
    thread.start()
    until(lambda: len(workers(node)) >= 2 and len(answered(tmp_path)) > 30)
    kept = committed(tmp_path)
    before = len(answered(tmp_path))
    cluster.kill(node)
    (tmp_path / "latency.txt").write_text("0.01")
    thread.join(timeout=120)
    assert made == [local]
    asked = answered(tmp_path)
    assert 30 < before < len(asked) and kept and not kept & set(asked[before:]), (
        "what was kept is not asked again"
    )
    assert set(asked) == committed(tmp_path)


def test_the_budget_holds_with_four_workers_and_a_larger_one_goes_on(
    cluster: Simulated, local: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    shares = "[ray.weak]\ncpus = 0.5\n[ray.strong]\nworkers = 4\ncpus = 0.5\n"
    files = [written(tmp_path, latency=0.01), cluster.toml(tmp_path, shares)]
    limit = tmp_path / "budget.toml"
    limit.write_text("[budget]\nstrong_calls = 20\n")
    with pytest.raises(BudgetError, match="strong_calls = 20 is reached"):
        collected([*files, limit], tmp_path / "run")
    with Store(tmp_path / "run") as store:
        # A call that was let in and still waited for a worker is let go of by the stop, and counts
        # for nothing.
        assert (
            0
            < store.bill("scripted/strong").strong_calls
            == store.calls() - store.bill("scripted/weak").strong_calls
            <= 20
        )
    limit.write_text("[budget]\nstrong_calls = 200\n")
    assert collected([*files, limit], tmp_path / "run") == local
    assert len(answered(tmp_path)) == len(set(answered(tmp_path)))


def number(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"].partition("Background: ")[2].split("\n")[0] or "none"


def weak_lm() -> dspy.LM:
    from cowest_dspy.testing import ScriptedEngine

    return ScriptedEngine(
        lambda asked: str(asked["config"]["seed"] % 5), model="scripted/weak"
    ).lm()


def test_one_rate_limit_holds_for_all_workers_and_refused_calls_are_tried_again(
    cluster: Simulated, tmp_path: Path
) -> None:
    examples = [
        dspy.Example(id=f"q{i}", question=f"{i}?", answer=str(i % 5)).with_inputs("question")
        for i in range(8)
    ]
    with (
        OpenAIServer(
            number, key=KEY, faults=[None, Fault.status(429), None, Fault.garbled()]
        ) as server,
        Cluster(RayRules(address=cluster.address)) as ray,  # pyright: ignore[reportCallIssue]
        Store(tmp_path / "run", budget=Budget(strong_calls=40)) as store,  # pyright: ignore[reportCallIssue]
    ):
        model = f"openai/{server.model}"
        settings = Api(
            kind="api",
            model=model,
            api_base=server.api_base,
            api_key_env="TOY_KEY",
            requests_per_minute=6,
        )  # pyright: ignore[reportCallIssue]
        shared_limits(model, server.api_base, "TOY_KEY").window = 0.5
        program = Collaboration("question -> answer").bind(
            weak=weak_lm(), strong=ray.lm(settings, Shares(workers=4))
        )  # pyright: ignore[reportCallIssue]
        store.count_as_strong(model)
        match = lambda example, prediction, trace=None: float(prediction.answer == example.answer)  # noqa: E731
        traces = collect(program, examples, match, Sampling(2), store=store, threads=32)
        assert [trace.error for trace in traces if trace.error] == []
        came = sorted(one.at for one in server.received)
        assert server.most_at_once <= 6
        assert all(came[place + 6] - came[place] >= 0.5 for place in range(len(came) - 6)), (
            "no window holds more than six"
        )
        assert (
            store.bill(model).strong_calls
            == len(came)
            == store.calls() - store.bill("scripted/weak").strong_calls + 2
        )


BROKEN = """
import os

from dspy.lm15 import RateLimitError
from cowest_dspy.testing import ScriptedEngine

def make():
    def answer(request):
        text = request["messages"][-1]["content"]
        if "die" in text:
            os._exit(7)
        return RateLimitError("slow down", status=429, retry_after=2.0) if "busy" in text else "fine"
    return ScriptedEngine(answer, model="scripted/broken")

def licensed():
    if "TOY_LICENCE" not in os.environ:
        raise ValueError("there is no licence on this node")
    return make()
"""


def test_failures_are_those_of_one_machine_and_a_call_that_ends_its_workers_is_given_up(
    cluster: Simulated, tmp_path: Path
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    settings = Engine(kind="engine", engine=f"{file}:make", model="scripted/broken")  # pyright: ignore[reportCallIssue]
    from cowest_dspy.lms import build_lm
    from cowest_dspy.store.record import failure, recorded

    def said(lm: dspy.LM, text: str) -> str:
        try:
            return str(recorded(lm)(text)[0])
        except Exception as error:
            return f"{type(error).__name__} {failure(error)} {getattr(error, 'retry_after', None)}"

    with Cluster(RayRules(address=cluster.address)) as ray:  # pyright: ignore[reportCallIssue]
        there = ray.lm(settings, Shares(workers=1, cpus=0.5))  # pyright: ignore[reportCallIssue]
        for text in ("hello", "busy"):
            assert said(there, text) == said(build_lm(settings), text)
        guard = Guard(Budget(strong_calls=9), Clock(), strong="scripted/broken")  # pyright: ignore[reportCallIssue]
        with guard.paying("scripted/broken"):
            assert "error: [scripted/broken] 3 workers ended while this was under way" in said(
                there, "die"
            )
        assert guard.bill.strong_calls == 3, "each time is paid for, as far as anyone knows"
        assert said(there, "hello") == "fine", "another worker has taken its place"


def test_a_worker_that_cannot_be_made_ends_the_run_and_says_why(
    cluster: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_LICENCE", "here only")
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    settings = Engine(kind="engine", engine=f"{file}:licensed", model="scripted/broken")  # pyright: ignore[reportCallIssue]
    until(
        cluster.settled
    )  # Until then a node that was killed counts, and a worker may be tried there.
    for startup, share, why in [
        (120, 1, "A worker of scripted/broken could not be made: there is no licence on this node"),
        (2, 64, r"was ready after 2 seconds.*Each wants 64 CPU and 0 GPU.*has 8 CPU"),
    ]:
        rules = RayRules(address=cluster.address, startup=startup)  # pyright: ignore[reportCallIssue]
        with Cluster(rules) as ray, pytest.raises(ClusterError, match=why):
            ray.lm(settings, Shares(workers=1, cpus=share))("hello")  # pyright: ignore[reportCallIssue]
