"""Cluster: collections in shards on Ray.

    with Cluster(RayRules(address="auto", num_shards=64)) as cluster, Store("runs/mine") as store:
        traces = cluster.collect(build, examples, Sampling(4), store=store, num_threads=16)

``build()`` gives the program, bound to its models, and the metric; every task calls it for itself.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from cowest_dspy.errors import ClusterError, ConfigError, CowestError, masked
from cowest_dspy.influence.collection import Tally
from cowest_dspy.influence.config import MAX_ERRORS
from cowest_dspy.influence.trace import KIND, Sampling, Traces
from cowest_dspy.program.examples import Examples, prepare_examples
from cowest_dspy.scale.config import RayRules
from cowest_dspy.scale.coordinator import Coordinator, RemoteCoordinator
from cowest_dspy.scale.shard import (
    Build,
    Shard,
    Work,
    collect_shard,
    merge_shard,
    merge_shards,
    prepare_known,
    recount,
    split,
)
from cowest_dspy.store.pool import OnProgress
from cowest_dspy.store.store import Store
from cowest_dspy.utils.extras import check_extra

TICK = 0.5
"""Seconds between two looks at the shards."""
MOST_LOST = 3
"""Processes that may end with one and the same shard, before the run is given up: it may be what
ends them."""
LOOPBACK, SECONDS = "127.0.0.1", 5.0
# Read by Ray when it is imported: its servers then listen on this machine alone.
ONLY_HERE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class Cluster:
    """This process's connection to Ray, made by the first collection. Use as a context manager, or
    call :meth:`close`. A connection that was there before is used, and stays.

    Args:
        rules: which cluster, and what a task takes of it.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, rules: RayRules) -> None:
        check_extra("ray", "[ray]")
        self.rules = rules
        self._thread: ThreadPoolExecutor | None = None
        self._folder: Path | None = None

    def connect(self) -> None:
        """Connects to the cluster, or starts one on this machine.

        Raises:
            ClusterError: there is none at the address, or it cannot be started.
        """
        if self._thread is not None:
            return
        address = self.rules.address
        if address is None:
            os.environ.setdefault(ONLY_HERE, "0")
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        elif address != "auto":
            _knock(address)
        import ray

        if ray.is_initialized():
            return
        # A thread of its own, which stays: Ray's servers end with the thread that started them, and
        # in the main thread Ray would take SIGTERM for itself.
        self._thread = ThreadPoolExecutor(1, "cowest-ray")
        try:
            self._thread.submit(self._init).result()
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            where = f"no Ray cluster at {address}" if address else "no Ray cluster to be had here"
            raise ClusterError(
                f"There is {where}: {str(error).strip().splitlines()[0][:300]} {_START}"
            ) from error

    def _init(self) -> None:
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.rules.address is not None:
            ray.init(address=self.rules.address, **options)
            return
        self._folder = Path(tempfile.mkdtemp(prefix="cowest-ray-"))
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            _temp_dir=str(self._folder),
            **options,
        )
        if ray.util.get_node_ip_address() != LOOPBACK:
            raise ClusterError(
                "Ray was imported before, and would listen on the network and not only on this "
                f"machine: set the environment variable {ONLY_HERE}=0, or call ray.init() yourself."
            )

    def close(self) -> None:
        """Leaves the cluster, and ends it if it was started here."""
        thread, self._thread = self._thread, None
        if thread is not None:
            import ray

            thread.submit(ray.shutdown).result()
            thread.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def collect(
        self,
        build: Build,
        examples: Examples,
        sampling: Sampling,
        *,
        store: Store,
        max_errors: float = MAX_ERRORS,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Traces:
        """Collect like :func:`cowest_dspy.collect`, in shards of the examples: the same traces, in
        the same order. Each shard has ``num_threads`` questions under way; a question that is the
        same in two shards is asked in both.

        Args:
            build: gives the program, bound to its models, and the metric. Pickled by Ray: a
                function of a module that all nodes have, or one without anything of this process.
            store: of the run, in a folder that all nodes see.
            options: as of ``collect``: num_threads, weak_threads, answers.

        Raises:
            ClusterError: no cluster, a node that does not see the run's folder, or a shard with
                which several processes ended.
            BudgetError, CollectionError, StoreError, ...: as ``collect``; what was answered is in
                the run's store.
        """
        program, _ = build()
        examples = prepare_examples(examples, program)
        self.connect()
        merge_shards(store)
        store.forget(KIND, start=f"{sampling.round}/")
        shards = split(examples, self.rules.num_shards, self._slots(), store.root.folder)
        guard, strong = store.guard, program.strong.model
        work = Work(
            build,
            sampling,
            strong,
            store.stage,
            prepare_known(store),
            guard is not None,
            options,
        )
        tasks = _Tasks(self.rules, work, _actor(store, strong), self._slots)
        saved: Counter[str] = Counter(weak_calls=0, strong_calls=0)
        try:
            for place, made in enumerate(tasks.run(shards, Tally(max_errors), on_progress)):
                merge_shard(store, shards[place].folder, kinds=(KIND,))
                saved.update(made)
        except BaseException:
            tasks.stop()
            with suppress(CowestError):  # What is left there, the next run takes over.
                merge_shards(store)
            raise
        finally:
            recount(store)
            store.keep("saved", str(sampling.round), dict(saved))
        merge_shards(store)
        return Traces.load(store, round=sampling.round, types=program.output_types)

    def _slots(self) -> int:
        """Tasks that the cluster has room for at once."""
        import ray

        has, rules = ray.cluster_resources(), self.rules
        wanted = {"CPU": rules.num_cpus, "GPU": rules.num_gpus}
        rooms = [int(has.get(name, 0.0) / many) for name, many in wanted.items() if many]
        return max(1, min(rooms, default=1))


class _Tasks:
    """The tasks of a collection: a few more than there is room for at once."""

    def __init__(self, rules: RayRules, work: Work, actor: Any, slots: Any) -> None:
        import ray

        self._slots, self._actor = slots, actor
        self._work = ray.put(work)
        self._task = ray.remote(_run_shard).options(
            num_cpus=rules.num_cpus,
            num_gpus=rules.num_gpus,
            max_retries=MOST_LOST - 1,
            scheduling_strategy="SPREAD",
        )
        self._open: dict[Any, Shard] = {}

    def run(self, shards: Sequence[Shard], tally: Tally, on_progress: OnProgress | None) -> Any:
        """What became of each shard, in their order, as they are done."""
        import ray

        total = sum(len(shard.examples) for shard in shards)
        waiting, done = list(reversed(shards)), dict[str, dict[str, int]]()
        for shard in shards:
            while shard.name not in done:
                while waiting and len(self._open) < 2 * self._slots():
                    one = waiting.pop()
                    one.folder.mkdir(parents=True, exist_ok=True)
                    self._open[self._task.remote(one, self._work, self._actor)] = one
                ready, _ = ray.wait(list(self._open), timeout=TICK)
                for ref in ready:
                    one = self._open.pop(ref)
                    done[one.name] = _result(ref, one)
                self._look(tally, total, on_progress)
            yield done.pop(shard.name)
        self._look(tally, total, on_progress, last=True)

    def _look(
        self, tally: Tally, total: int, on_progress: OnProgress | None, *, last: bool = False
    ) -> None:
        import ray

        reports = ray.get(self._actor.reports.remote())
        if on_progress:
            on_progress(sum(report.examples for report in reports), total)
        tally.plus(report.tally for report in reports).check(last=last)

    def stop(self) -> None:
        """Lets shards that have begun end what they have under way, and the others not begin."""
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):
            begun = ray.get(self._actor.stop.remote())
            for ref, shard in self._open.items():
                if shard.name not in begun:
                    ray.cancel(ref)
            ray.wait(list(self._open), num_returns=len(self._open)) if self._open else None


def _run_shard(shard: Shard, work: Work, actor: Any) -> dict[str, int] | None:
    """The body of a task."""
    return collect_shard(shard, work, RemoteCoordinator(actor))


def _result(ref: Any, shard: Shard) -> dict[str, int]:
    """What a task has given. Raises its own error, without Ray's around it."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        made = ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, CowestError):
            raise error.cause from None
        raise ClusterError(f"A shard failed: {masked(repr(error.cause))[:500]}") from error
    except RayError as error:
        raise ClusterError(
            f"{MOST_LOST} processes ended with the same {len(shard.examples)} examples under way, "
            f"from {shard.examples[0].id} on: {masked(str(error))[:500]} What was answered is "
            "kept; the same command goes on from there."
        ) from error
    if made is None:
        raise ClusterError("A shard was stopped, and nobody here has stopped it.")
    return cast("dict[str, int]", made)


def _actor(store: Store, strong: str) -> Any:
    """The coordinator, on this node: it ends with this process, and not with another node."""
    import ray

    store.root.set_strong(strong)
    guard, bill = store.guard, store.bill(strong)
    if guard is not None:
        bill = replace(bill, seconds=bill.seconds + guard.clock.seconds)
    actor = ray.remote(Coordinator).options(
        num_cpus=0, **_on_node(ray.get_runtime_context().get_node_id())
    )
    return actor.remote(guard.budget if guard else None, bill, strong)


_START = (
    "On the head node type ray start --head, on each other one ray start --address=HOST:PORT; or "
    "leave address out for a cluster on this machine alone."
)


def _knock(address: str) -> None:
    """Raises ClusterError where nothing listens: Ray itself would try for a minute, and then end
    this process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"There is no Ray cluster at {address} ({error}). {_START}") from error


def check_cluster(rules: RayRules, folder: Path) -> tuple[Literal["ok", "warning", "error"], str]:
    """Whether a collection can run there: Ray is installed, the cluster answers, has room for a
    task, and every node can write where ``folder`` is to be. A level, and what to do."""
    try:
        with Cluster(rules) as cluster:
            if rules.address is None:
                return "ok", "Ray is there; a cluster is started on this machine for each command"
            cluster.connect()
            return _examine(rules, folder)
    except (ClusterError, ConfigError) as error:
        return "error", str(error)


def _examine(rules: RayRules, folder: Path) -> tuple[Literal["ok", "warning"], str]:
    import ray
    from ray.exceptions import RayError

    place = folder.resolve()
    while not place.is_dir():
        place = place.parent
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with tempfile.TemporaryDirectory(prefix=".cowest-", dir=place) as probe:
        for node in nodes:
            task = ray.remote(_write).options(num_cpus=0, **_on_node(node["NodeID"]))
            try:
                ray.get(task.remote(probe), timeout=60)
            except RayError as error:
                raise ClusterError(
                    f"The node {node['NodeManagerAddress']} cannot write into {place}: the run's "
                    "folder must be on storage that all nodes share, under the same path "
                    f"({str(error).strip().splitlines()[-1]})"
                ) from error
    has = ray.cluster_resources()
    text = (
        f"{rules.address} answers: {len(nodes)} nodes that can write into {place}, "
        f"{has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU"
    )
    if rules.num_cpus > has.get("CPU", 0) or rules.num_gpus > has.get("GPU", 0):
        return "warning", (
            f"{text}; a task wants {rules.num_cpus:g} CPU and {rules.num_gpus:g} GPU, and waits "
            "until there are: lower num_cpus or num_gpus"
        )
    return "ok", text


def _write(folder: str) -> None:
    """On a node: writes a file into a folder that is there."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")


def _on_node(node: str) -> dict[str, Any]:
    """Options of a task or actor that runs on that node and on no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
