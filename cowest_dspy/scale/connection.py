"""This process's connection to Ray: to a cluster that runs, or to one that is started here and
stopped with us.

One process has one connection, however many runs use it; the last that leaves ends it. A connection
that was there before is somebody else's, and stays.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from cowest_dspy.errors import ClusterError, ConfigError

MISSING = (
    '[collect] engine = "ray" needs Ray, which is not installed: type pip install '
    '"cowest_dspy[ray]".'
)
STORE_BYTES = 200 * 2**20
"""Of the object store of a cluster that is started here: what lies in it are adapters. What does
not fit goes to the disk."""
SECONDS = 5.0
LOOPBACK = "127.0.0.1"


def installed() -> bool:
    """Whether Ray is there; it is not imported for that."""
    return importlib.util.find_spec("ray") is not None


def check_installed() -> None:
    """Raises ConfigError where Ray is not installed."""
    if not installed():
        raise ConfigError(MISSING)


@dataclass
class _Joined:
    """The connection, who uses it, and the thread that began it. Without a thread it is somebody
    else's."""

    address: str | None
    users: int = 1
    leaving: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    error: Exception | None = None
    loopback: bool = False


_lock = threading.Lock()
_now: _Joined | None = None


def join(address: str | None) -> None:
    """Connects this process, or counts one more user of its connection. None starts a cluster on
    this machine.

    Raises:
        ConfigError: Ray is not installed.
        ClusterError: nothing answers there, or this process is connected to another cluster.
    """
    global _now
    check_installed()
    import ray

    with _lock:
        if _now is not None:
            if _now.address != address:
                raise ClusterError(
                    f"This process works on the cluster {_now.address or 'of its own'} already, "
                    f"and cannot be on {address} too: "
                    "end the other run first, or use another process."
                )
            _now.users += 1
            return
        made = _Joined(address)
        if not ray.is_initialized():
            made.loopback = address is None or _only_on_loopback(address)
            _start(made)
        _now = made


def leave() -> None:
    """One user less; the last one ends the connection, and the cluster if it was started here."""
    global _now
    with _lock:
        if _now is None:
            return
        _now.users -= 1
        if _now.users == 0:
            _end(_now)
            _now = None


def resources() -> Mapping[str, float]:
    """What all nodes have, by name: CPU, GPU, memory in bytes, and so on."""
    import ray

    return ray.cluster_resources()


def _start(made: _Joined) -> None:
    """Connects in a thread that stays until the end. Ray's servers end with the thread that has
    started them, and in the main thread Ray would take SIGTERM for itself."""
    up = threading.Event()
    made.thread = threading.Thread(target=_hold, args=(made, up), name="cowest-ray", daemon=True)
    made.thread.start()
    up.wait()
    if made.error is not None:
        made.thread.join()
        where = (
            f"There is no Ray cluster at {made.address}"
            if made.address
            else "A Ray cluster could not be started here"
        )
        raise ClusterError(
            f"{where}: {str(made.error).strip().splitlines()[0][:300]} On the head node type ray "
            "start --head, on each other one "
            "ray start --address=HOST:PORT; or leave [ray] address out for a cluster on this "
            "machine alone."
        ) from made.error
    atexit.register(_end, made)


def _hold(made: _Joined, up: threading.Event) -> None:
    import ray

    folder = None if made.address else tempfile.mkdtemp(prefix="cowest-ray-")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        with _loopback() if made.loopback else nullcontext():
            if folder is None:
                ray.init(address=made.address, **quiet)
            else:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
                own: dict[str, Any] = {
                    "_node_ip_address": LOOPBACK,
                    "_temp_dir": folder,
                    "object_store_memory": STORE_BYTES,
                }
                ray.init(address="local", include_dashboard=False, **own, **quiet)
                if ray.util.get_node_ip_address() != LOOPBACK:
                    raise ClusterError(
                        "Ray would listen on the network, and not only on this machine: it was "
                        "ended again."
                    )
    except Exception as error:
        made.error = error
    up.set()
    if made.error is None:
        made.leaving.wait()
    ray.shutdown()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _end(made: _Joined) -> None:
    atexit.unregister(_end)
    made.leaving.set()
    if made.thread is not None:
        made.thread.join()


@contextmanager
def _loopback() -> Iterator[None]:
    """Ray makes this machine's address in the network of 127.0.0.1, and then listens on all of its
    addresses, for whoever comes: here it does not. Goes when ``ray.init`` takes 127.0.0.1 for what
    it is (2.60 does not)."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _only_on_loopback(address: str) -> bool:
    """Whether a cluster listens on this machine alone.

    Raises:
        ClusterError: nothing listens there. Ray itself would try for a minute, and then end this
            process.
    """
    import ray.util

    if address == "auto":
        return False
    host, _, port = address.rpartition(":")
    wanted = [host.strip("[]")]
    if wanted[0] in (LOOPBACK, "localhost"):
        wanted.insert(0, ray.util.get_node_ip_address())
    errors: list[Exception] = []
    for place, name in enumerate(wanted):
        try:
            socket.create_connection((name, int(port)), timeout=SECONDS).close()
        except (OSError, OverflowError) as error:
            errors.append(error)
        else:
            return place > 0
    raise ClusterError(
        f"There is no Ray cluster at {address} ({errors[-1]}). On the head node type ray start "
        f"--head --port={port}, or leave "
        "[ray] address out for a cluster on this machine alone."
    ) from errors[-1]
