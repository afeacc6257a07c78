"""A Ray cluster of several simulated nodes on this machine, for tests; nothing of it is left
afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

# Read by Ray when it is imported, and by the processes that it starts: on loopback only, and not
# behind everything else that runs on this machine.
os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_worker_niceness="0")
CPUS = 2
"""Of each node but the head, which has none: tasks are on nodes that can be killed."""
MEMORY = 80 * 2**20


class Simulated:
    """A cluster; ``address`` is what [ray] address takes."""

    def __init__(self, nodes: int) -> None:
        from ray.cluster_utils import Cluster

        self._own: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": MEMORY}
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # A socket's path must be short.
        head = {
            **self._own,
            "num_cpus": 0,
            "include_dashboard": False,
            "temp_dir": f"{self._folder}/ray",
        }
        with self._as_rays_own():
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(nodes)]

    @property
    def address(self) -> str:
        """The head node's."""
        return str(self._cluster.address)

    def add(self) -> Any:
        """One more node."""
        return self._cluster.add_node(num_cpus=CPUS, **self._own)

    def kill(self, node: Any) -> None:
        """Kills every process of a node at once."""
        with contextlib.suppress(ValueError):
            self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def settled(self) -> bool:
        """Whether Ray has noticed which nodes are gone."""
        alive = [node for node in self._cluster.global_state.node_table() if node["Alive"]]
        return len(alive) == 1 + len(self._cluster.worker_nodes)

    def close(self) -> None:
        """Ends all of it."""
        with self._as_rays_own():
            self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def _as_rays_own(self) -> Iterator[None]:
        """Ray writes a cluster's address where ``ray.init()`` looks for one. In ``/tmp/ray`` it
        would be taken for a cluster of the user's own, and on a machine where Ray has never run
        that folder is not there, which ends ``Cluster`` (2.60)."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", self._folder)
            yield

    def toml(self, folder: Path, more: str = "") -> Path:
        """A file that spreads a task's collection over this cluster."""
        file = folder / "ray.toml"
        file.write_text(f'[ray]\naddress = "{self.address}"\n{more}', encoding="utf-8")
        return file


@contextlib.contextmanager
def simulated(nodes: int) -> Iterator[Simulated]:
    """A cluster while the context lasts. Fails when a process of it is left."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    made = Simulated(nodes)
    try:
        yield made
    finally:
        made.close()
    left = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid not in before
    ]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive, f"left behind: {alive}"


def workers(node: Any) -> list[psutil.Process]:
    """The processes on a node that collect shards."""
    raylet = next(iter(node.all_processes["raylet"])).process.pid
    found: list[psutil.Process] = []
    for process in psutil.Process(raylet).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "_run_shard" in " ".join(process.cmdline()):
                found.append(process)
    return found
