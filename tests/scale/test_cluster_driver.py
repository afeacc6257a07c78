"""Commands on a cluster: a comparison, a process that is killed, one that is stopped, and what is
left of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from compare_task import compared, declared
from compare_task import task as task
from live_task import answered, committed, cowest, started, until, written
from simulated import Simulated, simulated, workers

from cowest_dspy import Experiment, Store, load_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Simulated]:
    pytest.importorskip("ray")
    with simulated(nodes=2) as made:
        yield made


def test_a_comparison_with_a_tuned_weak_model_is_that_of_one_machine(
    cluster: Simulated, task: list[Path], tmp_path: Path
) -> None:
    """The weak model is a real one, fine-tuned and preference-tuned here; in shards it drafts with
    its adapter."""
    arms = '[compare]\nagainst = "alone"\n' + "".join(
        f'[compare.arms.{name}]\nkind = "{kind}"\n{more}'
        for name, kind, more in [
            ("alone", "alone", ""),
            ("before", "collaboration", ""),
            ("after", "collaboration", 'weak = "tuned"\n'),
        ]
    )
    files = declared(task, arms)
    here, _ = compared(files, tmp_path / "here")
    there, _ = compared([*files, cluster.toml(tmp_path, "num_shards = 2\n")], tmp_path / "there")
    with Store(tmp_path / "here") as one, Store(tmp_path / "there") as other:
        assert one.calls() == other.calls()
    plain = [[(one.arm.name, one.arm.answers) for one in made.arms] for made in (here, there)]
    assert plain[0] == plain[1] and len(plain[0]) == 3
    with Experiment(load_config(files), tmp_path / "there") as experiment:
        assert [arm.answers for arm in experiment.evaluate(["strong", "collaboration"])] == [
            plain[0][0][1],
            plain[0][2][1],
        ]


def test_a_killed_process_goes_on_with_what_it_has_kept(cluster: Simulated, tmp_path: Path) -> None:
    written(tmp_path, latency=0.1)
    cluster.toml(tmp_path, "num_shards = 4\n")
    with started(tmp_path, "collect", "task.toml", "ray.toml", "--run", "run") as process:
        until(lambda: len(answered(tmp_path)) > 30, process)
        process.kill()
        process.communicate()
    until(lambda: not any(workers(node) for node in cluster.nodes))
    stores = [path.parent for path in tmp_path.glob("run/shards/*/run.sqlite")]
    kept = {key for store in stores for key in committed(store.parent, store.name)}
    before = len(answered(tmp_path))
    (tmp_path / "latency.txt").write_text("0.001")
    there = cowest(tmp_path, "collect", "task.toml", "ray.toml", "--run", "run")
    assert kept and not kept & set(answered(tmp_path)[before:]), "what was kept is not asked again"
    (tmp_path / "here").mkdir()
    written(tmp_path / "here", latency=0.001)
    here = cowest(tmp_path / "here", "collect", "task.toml", "--run", "run")
    assert there.splitlines()[-2:] == here.splitlines()[-2:] and "helped" in here


def test_ctrl_c_keeps_what_is_under_way_and_a_cluster_of_ones_own_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    written(tmp_path, latency=0.3)
    (tmp_path / "own.toml").write_text("[ray]\nnum_shards = 2\nnum_cpus = 0.5\n")
    with started(tmp_path, "collect", "task.toml", "own.toml", "--run", "run") as process:
        until(lambda: len(answered(tmp_path)) > 12, process, seconds=400)
        ours = psutil.Process(process.pid).children(recursive=True)
        listening = [one for child in ours for one in _listening(child)]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "Stopped by Ctrl-C" in said and "Traceback" not in said, (
        said
    )
    assert listening and {address.removeprefix("::ffff:") for address in listening} <= {
        "127.0.0.1",
        "::1",
    }
    assert committed(tmp_path) == set(answered(tmp_path)), "what was under way is kept"
    _, alive = psutil.wait_procs(ours, timeout=60)
    assert len(ours) > 3 and not alive
    (tmp_path / "latency.txt").write_text("0.001")
    cowest(tmp_path, "collect", "task.toml", "--run", "run")
    assert len(answered(tmp_path)) == len(set(answered(tmp_path))), (
        "it goes on here, and nothing is asked again"
    )


def _listening(process: psutil.Process) -> list[str]:
    """The addresses that a process listens on."""
    try:
        return [
            one.laddr.ip
            for one in process.net_connections(kind="tcp")
            if one.status == psutil.CONN_LISTEN
        ]
    except psutil.Error:
        return []
