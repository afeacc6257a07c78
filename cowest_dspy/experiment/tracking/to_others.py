"""To trackio and W&B, by the calls that they have in common: init, log, log_artifact, finish. Used
by the sender's process only.

Neither can be asked what it has been told (W&B offline cannot at all), so the ledger says it. The
runs of one run of ours have its title as their group.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cowest_dspy.experiment.tracking import ledger as ledgers
from cowest_dspy.experiment.tracking.facts import Facts, Part, Row


def send(job: Mapping[str, Any]) -> dict[str, Any]:
    """Logs what the job says; gives the ledger as it is then, and where the run can be seen.

    Raises:
        Exception: whatever the tracker raises.
    """
    made = _Trackio(job) if job["tracker"] == "trackio" else _Wandb(job)
    facts = Facts.from_json(job["facts"])
    for part in (facts.whole, *ledgers.with_beginning(facts.parts, job["begins"])):
        known, _ = ledgers.entry(made.ledger, part, begins=part.name == job["begins"])
        rows = [row for row in part.rows if ledgers.digest_of(row) not in known["rows"]]
        values = {
            key: value for key, value in part.metrics.items() if known["values"].get(key) != value
        }
        files = [] if part.name else job["files"]
        changed = ledgers.changed_files(made.ledger, Path(job["folder"]), files) if files else {}
        # A report that was only written again, at another time, is no news.
        if not (
            rows or values or known["run"] is None or set(changed) - {"report.html", "report.json"}
        ):
            continue
        with_config = {**part.params, **part.tags}
        run = made.open(facts.title, part, known, with_config)
        for row in rows:
            made.row(run, row)
        if values:
            made.values(run, values)
        if changed:
            run.log_artifact(job["folder"], name=f"cowest-{made.short}", type="cowest-run")
            made.ledger["files"] |= changed
        run.finish()
        known["rows"] += [ledgers.digest_of(row) for row in rows]
        known["values"] |= values
    return {"ledger": made.ledger, "where": made.where(), "folder": made.folder()}


class _Trackio:
    """trackio: its runs go by names, so that ours end in a part of the run's key."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._api: Any = importlib.import_module("trackio")
        self._project, self.ledger = job["project"], job["ledger"]
        self.short = self.ledger["key"][:6]

    def open(self, title: str, part: Part, known: dict[str, Any], config: dict[str, str]) -> Any:
        again = known["run"] is not None
        known["run"] = known["run"] or ledgers.unique(
            ledgers.title_of(title, part, known), self.ledger
        )
        return self._api.init(
            project=self._project,
            name=known["run"],
            group=ledgers.unique(title, self.ledger),
            config=config,
            resume="allow" if again else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def row(self, run: Any, row: Row) -> None:
        run.log(row.values, step=row.step)

    def values(self, run: Any, values: dict[str, float]) -> None:
        run.log(values)

    def where(self) -> str:
        return f'trackio show --project "{self._project}"'

    def folder(self) -> str:
        return str(importlib.import_module("trackio.utils").TRACKIO_DIR)


class _Wandb:
    """W&B. What it looks up by itself about the machine, its commands and its code is left out:
    nobody has masked it."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._api: Any = importlib.import_module("wandb")
        self._project, self.ledger, self._url = job["project"], job["ledger"], ""
        self.short = self.ledger["key"][:6]

    def open(self, title: str, part: Part, known: dict[str, Any], config: dict[str, str]) -> Any:
        identity = f"{self.ledger['key']} {part.name} {known['times']}"
        known["run"] = known["run"] or hashlib.sha256(identity.encode()).hexdigest()[:16]
        quiet = self._api.Settings(
            console="off",
            silent=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=30,
        )
        run = self._api.init(
            project=self._project,
            name=ledgers.title_of(title, part, known),
            id=known["run"],
            group=ledgers.unique(title, self.ledger),
            config=config,
            resume="allow",
            settings=quiet,
        )
        run.config.update(config, allow_val_change=True)
        for key in ("training/*", "held_out/*", "rounds/*", "cycle/*"):
            run.define_metric(key, step_metric="step")
        self._url = self._url or run.url or ""
        return run

    def row(self, run: Any, row: Row) -> None:
        run.log({**row.values, "step": row.step})

    def values(self, run: Any, values: dict[str, float]) -> None:
        run.summary.update(values)

    def where(self) -> str:
        return self._url or f"wandb sync {self.folder()}/wandb/offline-run-*"

    def folder(self) -> str:
        return os.environ.get("WANDB_DIR", ".")
