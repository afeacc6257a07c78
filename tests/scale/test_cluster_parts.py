"""What a cluster needs no cluster to be tested for: tables, what travels, a worker's body, and
errors that say what to type."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import toy
from dspy.lm15 import ContextLengthError, RateLimitError
from dspy.utils.exceptions import LMRateLimitError, LMTimeoutError
from live_task import written

from cowest_dspy import Experiment, load_config
from cowest_dspy.errors import ClusterError, ConfigError, ModelError
from cowest_dspy.experiment.config import Config, validate
from cowest_dspy.lms.config import Api, Engine, InProcess, Server
from cowest_dspy.scale import connection, look_at_cluster
from cowest_dspy.scale.config import RayRules, Shares
from cowest_dspy.scale.shipping import Failed, Order
from cowest_dspy.scale.worker import Call, Worker
from cowest_dspy.store import serialize

API = validate(
    Api, {"kind": "api", "model": "openai/x", "concurrency": 8, "requests_per_minute": 5}, "test"
)


class Own(Exception):
    """A class that no other process has."""


@pytest.mark.parametrize(
    "error",
    [
        RateLimitError(
            "slow", status=429, retry_after=2.0, rate_limit_headers={"x-remaining": ["0"]}
        ),
        ContextLengthError("too long"),
        LMRateLimitError("slow", model="m", status=429, retry_after=1.5),
        LMTimeoutError("no answer", model="m"),
        ModelError("no such weights"),
        ValueError("boo"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_after_its_way(error: Exception) -> None:
    error.__cause__ = LMTimeoutError("deeper")
    back = pickle.loads(pickle.dumps(Failed.of(error))).error()
    assert type(back) is type(error) and str(back) == str(error)
    assert {name: value for name, value in vars(back).items() if name != "__notes__"} == vars(error)
    assert str(back.__cause__) == "deeper"


def test_an_error_that_others_do_not_have_keeps_its_text() -> None:
    back = Failed.of(Own("only here")).error()
    assert type(back) is RuntimeError and str(back) == "only here"
    assert str(Failed.of(ValueError("with", threading.Lock())).error()).startswith("('with', ")


def test_models_that_differ_in_how_they_are_asked_have_the_same_workers_and_no_limit_or_key_travels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOY_KEY", "sk-toy-0123456789abcdef")
    one = API.model_copy(update={"api_key_env": "TOY_KEY"})
    other = one.model_copy(update={"temperature": 1.0, "max_tokens": 7, "tokens_per_minute": 9})
    assert Order.of(one) == Order.of(other) != Order.of(one.model_copy(update={"timeout": 1.0}))
    assert "sk-toy" not in repr(Order.of(one)) and Order.of(one).table().requests_per_minute is None


def test_the_file_of_an_engine_travels_and_the_one_on_the_node_is_taken_only_when_it_is_the_same(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("make = 1\n")
    order = Order.of(Engine(kind="engine", engine=f"{file}:make"))  # pyright: ignore[reportCallIssue]
    assert order.table().engine == f"{file}:make"
    file.write_text("make = 2\n")
    elsewhere = Path(order.table().engine.rpartition(":")[0])
    assert (
        elsewhere != file
        and elsewhere.read_text() == "make = 1\n"
        and order.table().engine.endswith("mine.py:make")
    )


@pytest.mark.slow
def test_a_worker_answers_what_it_is_given_each_call_by_itself(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(
        "import threading\nfrom cowest_dspy.testing import ScriptedEngine\nBOTH = "
        "threading.Barrier(2)\n"
        "def make():\n    def answer(request):\n        BOTH.wait(20)\n        return "
        "request['messages'][-1]['content']\n"
        "    return ScriptedEngine(answer)\n"
    )
    settings = Engine(kind="engine", engine=f"{tmp_path}/toy.py:make")  # pyright: ignore[reportCallIssue]
    worker = Worker(Order.of(settings), at_once=2)
    assert not isinstance(worker.ready(), Failed) if connection.installed() else True
    asked = [
        serialize.request_from_messages("m", [{"role": "user", "content": text}])
        for text in ("one", "two")
    ]
    worker.give(
        [Call(number, "complete", (request,), "m") for number, request in enumerate(asked)], []
    )
    done: list[Any] = []
    while len(done) < 2:
        done.extend(worker.take())
    assert {one.number: serialize.response_text(one.answer) for one in done} == {
        0: "one",
        1: "two",
    }, "both were under way together"
    worker.give(
        [Call(2, "complete", (asked[0],), "m+a1")], ["m+a1"], {"adapter_config.json": b"{}"}
    )
    (refused,) = worker.take()
    assert refused.failed is not None and "load_adapter" in str(refused.failed.error())
    worker.close()


def config(tmp_path: Path, more: str) -> Config:
    written(tmp_path)
    (tmp_path / "more.toml").write_text(more)
    return load_config([tmp_path / "task.toml", tmp_path / "more.toml"])


def test_the_table_alone_chooses_ray_and_engine_has_the_last_word(tmp_path: Path) -> None:
    assert config(tmp_path, "").cluster is None and config(tmp_path, "").at_once("strong") == 4
    wide = config(tmp_path, "[ray.strong]\nworkers = 3\n")
    assert (
        wide.cluster is not None
        and wide.at_once("strong") == wide.at_once("judge") == 12
        and wide.at_once("weak") == 8
    )
    assert (
        config(tmp_path, '[collect]\nengine = "local"\n[ray.strong]\nworkers = 3\n').at_once(
            "strong"
        )
        == 4
    )
    assert config(tmp_path, '[collect]\nengine = "ray"\n').cluster == RayRules()  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match=r'ray.address: give "HOST:PORT"'):
        config(tmp_path, '[ray]\naddress = "ray://there:10001"\n')


@pytest.mark.slow
def test_where_models_answer_is_no_part_of_what_a_run_means(tmp_path: Path) -> None:
    meanings = set[str]()
    for number, more in enumerate(
        (
            "",
            "[ray.strong]\nworkers = 3\n",
            '[collect]\ndrafts = 3\nmax_failed = 1.0\nengine = "ray"\n',
        )
    ):
        with Experiment(
            config(tmp_path, toy.engine("weak").replace("toy.py", "task.py") + more),
            tmp_path / f"run{number}",
        ) as experiment:
            meanings.add(experiment.meaning)
    assert len(meanings) == 1


def test_a_worker_that_calls_an_api_takes_little_and_a_server_that_runs_is_asked_from_here() -> (
    None
):
    shares = Shares(workers=4)  # pyright: ignore[reportCallIssue]
    assert shares.cpus_for(API) == 0.1
    assert shares.cpus_for(InProcess(kind="in_process", model="m")) == 1.0  # pyright: ignore[reportCallIssue]
    running = Server(kind="server", model="m", api_base="http://127.0.0.1:1/v1")  # pyright: ignore[reportCallIssue]
    found = look_at_cluster(RayRules(weak=shares, strong=shares), {"weak": running, "strong": API})  # pyright: ignore[reportCallIssue]
    assert "0.4 CPU and 0 GPU for all workers" in found.text or found.level == "error"


def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    pytest.importorskip("ray")
    with pytest.raises(
        ClusterError, match=r"There is no Ray cluster at 127.0.0.1:1 .*ray start --head --port=1"
    ):
        connection.join("127.0.0.1:1")
    found = look_at_cluster(RayRules(address="127.0.0.1:1"), {"strong": API})  # pyright: ignore[reportCallIssue]
    assert found.level == "error" and "There is no Ray cluster" in found.text


def test_without_ray_the_error_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "cowest_dspy\[ray\]"'):
        Experiment(
            config(
                tmp_path,
                toy.engine("weak").replace("toy.py", "task.py") + "[ray.strong]\nworkers = 2\n",
            ),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
    assert look_at_cluster(RayRules(), {}).level == "error"  # pyright: ignore[reportCallIssue]
