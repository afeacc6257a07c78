"""Cluster: tables of models -> LMs whose calls are answered on a Ray cluster.

with Cluster(RayRules(address="auto")) as cluster:
    strong = cluster.lm(Api(kind="api", model="openai/gpt-5-mini", api_key_env="OPENAI_API_KEY"),
    Shares(workers=4)) collect(program.bind(weak=weak, strong=strong), examples, metric,
    store=store, num_threads=4 * 8)
"""

from __future__ import annotations

import threading

import dspy

from cowest_dspy.lms.api import ApiEngine
from cowest_dspy.lms.build import build_lm
from cowest_dspy.lms.config import LMSettings
from cowest_dspy.scale import connection
from cowest_dspy.scale.config import RayRules, Shares, stays_here
from cowest_dspy.scale.engine import AsyncClusterEngine, ClusterEngine, api_on, folder_of
from cowest_dspy.scale.job import WorkerPlan
from cowest_dspy.scale.pool import Pool
from cowest_dspy.scale.shipping import Order


class Cluster:
    """The workers of a run's models. Nothing is started before the first call. Use as a context
    manager, or call :meth:`close`.

    Args:
        rules: which cluster.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, rules: RayRules) -> None:
        connection.check_installed()
        self.rules = rules
        self._pools: dict[tuple[Order, Shares], Pool] = {}
        self._lock = threading.Lock()

    def lm(self, settings: LMSettings, shares: Shares) -> dspy.LM:
        """As ``build_lm(settings)``, with the same model id; calls go to ``shares.workers``
        workers. Models that differ only in how they are asked (temperature and the like) share
        their workers. A server that runs already is asked by this process.

        Raises:
            ModelError, ConfigError, RecipeError: as :func:`cowest_dspy.lms.build_lm`.
        """
        lm = build_lm(settings)
        here = lm.engine
        if stays_here(settings):
            return lm
        pool = self._pool(settings, shares, here)
        if isinstance(here, ApiEngine):
            return api_on(pool, here).lm()
        engine = ClusterEngine(here, pool)
        return lm.copy(engine=engine, async_engine=AsyncClusterEngine(engine))

    @property
    def ready(self) -> int:
        """How many workers, of all models, are ready now. They are made at the first call, and
        calls go to those that there are."""
        with self._lock:
            return sum(pool.ready for pool in self._pools.values())

    def close(self) -> None:
        """Ends all workers, and the cluster if it was started here."""
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pool(self, settings: LMSettings, shares: Shares, here: object) -> Pool:
        order = Order.of(settings)
        with self._lock:
            if (order, shares) not in self._pools:
                plan = WorkerPlan(
                    name=settings.model,
                    order=order,
                    at_once=settings.concurrency,
                    cpus=shares.cpus_for(settings),
                    gpus=shares.gpus,
                    startup=self.rules.startup,
                    model=getattr(here, "model_id", None),
                )
                self._pools[order, shares] = Pool(
                    plan, shares.workers, self.rules.address, folder_of(here)
                )
            return self._pools[order, shares]
