"""A run's facts, from what its store holds. Asks no model; a run that is half done gives half of
them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from cowest_dspy.errors import ReportError, masked
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.config_text import shown_settings
from cowest_dspy.experiment.summary import arm_from, versions
from cowest_dspy.experiment.tracking.facts import Facts, Part, Row, numbers
from cowest_dspy.influence.stored_traces import StoredTraces
from cowest_dspy.lms.prices import added
from cowest_dspy.optimizers.cycle import StepResult
from cowest_dspy.optimizers.rounds import Round, step_name
from cowest_dspy.report import Curve, RunReport, arm_table, influence_counts, verdict
from cowest_dspy.report.page import read_document
from cowest_dspy.store.store import Store
from cowest_dspy.utils.masking import mask_settings

OF_A_ROUND = ("collect", "dpo", "kto", "dev")
"""Stages that each round has; "dpo" and "kto" are trainings too."""
LONGEST = 500
"""Characters of a parameter or a tag, at most."""


class Reading:
    """Reads the facts of a run again and again, while it goes on; what a round's drafts did is
    counted once.

    Args:
        config: the run's configuration.
        store: its store.
    """

    def __init__(self, config: Config, store: Store) -> None:
        self._config, self._store = config, store
        self._influence: dict[tuple[int, str], dict[str, float]] = {}
        self.title = (
            config.tracking.name if config.tracking else None
        ) or f"{config.name}, seed {config.seed}"

    def facts(self, report: RunReport | None = None) -> Facts:
        """What the store holds now; with a report, also what it says in words."""
        store = self._store
        stages, adapters = store.records("stage"), store.records("adapter")
        rounds = {
            made.number: made
            for made in (Round.from_dict(record) for record in store.records("round").values())
        }
        begun = [
            number
            for number in range(1, max(rounds, default=0) + 2)
            if self._begun(number, rounds, adapters)
        ]
        trainings = {name: record for name, record in adapters.items() if _round_of(name) is None}
        parts = [
            _training(name, self._config, record, stages.get(name))
            for name, record in trainings.items()
        ]
        parts += [self._round(number, rounds.get(number), adapters, stages) for number in begun]
        whole = self._whole(stages, list(rounds.values()), [*trainings, *begun], report)
        return Facts(self.title, whole, tuple(parts))

    # The whole

    def _whole(
        self,
        stages: dict[str, dict[str, Any]],
        rounds: list[Round],
        own: list[Any],
        report: RunReport | None,
    ) -> Part:
        store = self._store
        elsewhere = {name for name in stages if name in own or _round_of(name) in own}
        metrics = {**self._arms(), **self._compared(), **_total(stages)}
        for name, cost in stages.items():
            if name not in elsewhere:
                metrics |= _cost(f"cost/{_key(name)}/", cost)
        floor = (store.record("noise", "floor") or {}).get("floor")
        metrics |= numbers("noise/", **floor) if floor else {}
        tags = {f"version.{name}": value for name, value in versions().items()}
        tags |= {
            "cowest.run": str(store.folder.absolute()),
            "model.strong": self._config.strong.model,
        }
        tags |= {"model.weak": self._config.weak.model}
        final = store.record("final", "weak")
        tags |= {"model.tuned": final["model"]} if final else {}
        if report is not None:
            tags["mlflow.note.content"] = tags["verdict"] = " ".join(verdict(report).sentences)
        rows = [
            Row(made.number, {f"rounds/{key}": value for key, value in _gain(made).items()})
            for made in rounds
        ]
        steps = [StepResult.from_dict(record) for record in store.records("cycle").values()]
        return Part("", _params(self._config), _texts(tags), metrics, (*rows, *map(_step, steps)))

    def _arms(self) -> dict[str, float]:
        """Of each evaluated arm, by its name, under the name of the split."""
        arms = tuple(arm_from(name, record) for name, record in self._store.records("arm").items())
        made: dict[str, float] = {}
        for line in arm_table(RunReport("", "", 0, "collaboration", arms=arms)):
            prefix = f"{self._config.evaluate.split}/{_key(line.name)}/"
            span, test = line.interval, line.test
            made |= numbers(
                prefix,
                score=line.accuracy,
                strict_score=line.strict_accuracy,
                n=line.answered,
                failed=line.failed,
            )
            made |= numbers(prefix, low=span.low, high=span.high) if span else {}
            made |= numbers(prefix, p=test.p) if test else {}
        return made

    def _compared(self) -> dict[str, float]:
        """What `cowest compare` found, when it has."""
        try:
            found = read_document(
                self._store.folder / "comparison", "comparison", "cowest compare"
            )["numbers"]
        except ReportError:
            return {}
        made: dict[str, float] = {}
        for arm in found["arms"]:
            prefix, span = f"compare/{_key(arm['name'])}/", arm["interval"] or {}
            counts = {"n": arm["answered"], "failed": arm["failed"], "holm": arm["holm"]}
            made |= numbers(
                prefix, score=arm["score"], low=span.get("low"), high=span.get("high"), **counts
            )
            made |= {f"{prefix}{key}": value for key, value in _cost("", arm["cost"]).items()}
        return made

    # Rounds

    def _begun(self, number: int, rounds: Mapping[int, Round], adapters: Mapping[str, Any]) -> bool:
        kept = number in rounds or any(
            step_name(name, number) in adapters for name in ("dpo", "kto")
        )
        return kept or self._store.record("done", step_name("collect", number)) is not None

    def _round(
        self, number: int, made: Round | None, adapters: dict[str, Any], stages: dict[str, Any]
    ) -> Part:
        metrics = self._helped(number)
        for stage in OF_A_ROUND:
            cost = stages.get(step_name(stage, number))
            metrics |= _cost(f"cost/{stage}/", cost) if cost else {}
        dropped = self._store.record("pairs", step_name("dropped", number))
        metrics |= {"pairs/dropped": float(sum(dropped.values()))} if dropped is not None else {}
        tags: dict[str, str] = {}
        if made:
            metrics |= _gain(made)
            tags = {
                "decision": made.outcome,
                "reason": made.reason,
                "model.start": made.start,
                "model.tuned": made.model or "none",
            }
            tags["mlflow.note.content"] = f"{made.outcome}: {made.reason}"
        names = [
            name
            for name in (step_name("dpo", number), step_name("kto", number))
            if name in adapters
        ]
        record = adapters[names[-1]] if names else None
        rows, training = (_curve(names[-1], record), record["identity"]) if record else ((), None)
        params = _settings(self._config, "kto" if self._config.kto is not None else "dpo")
        return Part(
            f"round {number}", params, _texts(tags), metrics, rows, training, made is not None
        )

    def _helped(self, number: int) -> dict[str, float]:
        """What the round's drafts did to the strong model's answers, once they are all
        collected."""
        done = self._store.record("done", step_name("collect", number))
        if done is None:
            return {}
        key = (number, done["identity"])
        if key not in self._influence:
            traces = StoredTraces(self._store, round=number)
            counts = influence_counts(traces)
            made = numbers(
                "influence/",
                helped=counts.helped,
                hurt=counts.hurt,
                same=counts.same,
                failed=counts.failed,
            )
            made |= numbers(
                "influence/", n=counts.n, mean=counts.mean, draft_quality=counts.draft_quality
            )
            span = counts.interval
            self._influence[key] = made | (
                numbers("influence/", low=span.low, high=span.high) if span else {}
            )
        return dict(self._influence[key])


def round_part(training: str) -> str:
    """The part that a training belongs to: its round, otherwise itself.

    >>> round_part("dpo 2"), round_part("drafts")
    ('round 2', 'drafts')
    """
    number = _round_of(training)
    return training if number is None else f"round {number}"


def _round_of(stage: str) -> int | None:
    """The number of the round that a stage is of."""
    name, _, number = stage.partition(" ")
    if name not in OF_A_ROUND or (number and not number.isdigit()):
        return None
    return int(number or 1)


def _training(
    name: str, config: Config, record: Mapping[str, Any], cost: Mapping[str, Any] | None
) -> Part:
    metrics, table = _cost("cost/", cost) if cost else {}, _TABLES.get(name)
    params = _settings(config, *table) if table else {}
    return Part(
        name,
        params,
        _texts({"model.tuned": record["model"]}),
        metrics,
        _curve(name, record),
        record["identity"],
        True,
    )


def _curve(name: str, record: Mapping[str, Any]) -> tuple[Row, ...]:
    return tuple(_rows(Curve.from_trl(name, record["history"])))


def _rows(curve: Curve) -> Iterator[Row]:
    """The names are not those that TRL logs under, so that both can stand in one run."""
    for point in curve.points:
        values = numbers(**{key: value for key, value in asdict(point).items() if key != "step"})
        yield Row(int(point.step), {_place(key): value for key, value in values.items()})


def _place(field: str) -> str:
    return (
        f"held_out/{field.removeprefix('eval_')}"
        if field.startswith("eval_")
        else f"training/{field}"
    )


def _gain(made: Round) -> dict[str, float]:
    found = numbers("pairs/", kept=made.pairs, replayed=made.replayed) | {
        "accepted": float(made.accepted)
    }
    if made.gain is None:
        return found
    gain = made.gain
    found |= numbers(
        "gain/",
        mean=gain.mean,
        low=gain.low,
        high=gain.high,
        n=gain.n,
        better=gain.better,
        worse=gain.worse,
    )
    found |= numbers("dev/", before=gain.before, after=gain.after)
    return found | numbers("dev/", failed_before=gain.failed_before, failed_after=gain.failed_after)


def _step(made: StepResult) -> Row:
    found = numbers("cycle/", score=made.score, n=made.n, failed=made.failed, best=int(made.best))
    gain = made.gain
    return Row(
        made.number,
        found
        | (numbers("cycle/gain_", mean=gain.mean, low=gain.low, high=gain.high) if gain else {}),
    )


COSTS = ("seconds", "calls", "cached_calls", "tokens_in", "tokens_out", "usd", "peak_memory_bytes")


def _cost(prefix: str, cost: Mapping[str, Any]) -> dict[str, float]:
    return numbers(prefix, **{name: cost.get(name) for name in COSTS})


def _total(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    sums = {
        name: sum(cost.get(name) or 0 for cost in stages.values())
        for name in ("seconds", "calls", "tokens_in", "tokens_out")
    }
    usd: float | None = 0.0
    for cost in stages.values():
        usd = added(usd, cost.get("usd"))
    return numbers("total/", **sums, usd=usd) if stages else {}


def _params(config: Config) -> dict[str, str]:
    settings = mask_settings(shown_settings(config))
    settings.pop("tracking", None)
    return _texts(dict(_flat(settings)))


_TABLES = {"drafts": ("sft", "settings"), "answers": ("sft", "answer_settings")}


def _settings(config: Config, *table: str) -> dict[str, str]:
    """The settings of a training, without the name of their table."""
    found = mask_settings(shown_settings(config))
    for name in table:
        found = found.get(name, {})
    return _texts(dict(_flat(found)))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            yield (
                f"{prefix}{key}",
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
            )


def _texts(values: Mapping[str, str]) -> dict[str, str]:
    """With keys that every tracker takes, nothing secret, and not too long."""
    return {_key(key): masked(value)[:LONGEST] for key, value in values.items() if value}


def _key(name: str) -> str:
    """A name of letters, digits and "_-./", which all trackers take."""
    return "".join(
        char if char.isascii() and (char.isalnum() or char in "_-./") else "_" for char in name
    )
