"""What is logged of a run, read from the run's store.

Parameters, tags and numbers of the run and of its parts; and the files that are uploaded. A run
that is half done gives half of them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cowest_dspy.errors import ReportError, masked
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.config_text import effective_toml, visible_settings
from cowest_dspy.experiment.summary import load_arm, load_rounds, package_versions
from cowest_dspy.influence.trace import Traces
from cowest_dspy.optimizers.cycle import StepResult
from cowest_dspy.optimizers.rounds import Round, step_name
from cowest_dspy.report import (
    RunReport,
    arm_table,
    influence_counts,
    training_curve,
    verdict,
    write_report,
)
from cowest_dspy.report.facts import redact
from cowest_dspy.report.page import read_document
from cowest_dspy.store.store import Store
from cowest_dspy.store.usage import total_usd
from cowest_dspy.utils.jsonable import flatten
from cowest_dspy.utils.jsonl import read_jsonl, write_jsonl
from cowest_dspy.utils.masking import mask_settings, mask_text

ROUND_STAGES = ("collect", "dpo", "kto", "dev")
"""Stages that each round has; "dpo" and "kto" are trainings too."""
LONGEST = 500
"""Characters of a parameter or a tag, at most."""
NO_NUMBERS = ("confidence", "examples", "note")
Numbers = dict[str, float]
ROWS = ("pairs*.jsonl", "drafts*.jsonl")
COMPARISON_FILES = ("csv", "tex", "md", "html")
"""Kinds of a comparison's files that hold no inputs and answers."""


@dataclass(frozen=True)
class Part:
    """A run in a tracker: the run as a whole (``name`` is "" then), or one of its rounds ("round
    2") or trainings ("drafts").

    ``metrics`` hold for all of it, ``rows`` by step: an optimiser step of a training, the number of
    a round or of a candidate of a cycle. ``training`` is the digest of the training that the part
    has done; another one is another run in the tracker. ``done``: nothing will be added.
    """

    name: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: Numbers = field(default_factory=dict)
    rows: dict[int, Numbers] = field(default_factory=dict)
    training: str | None = None
    done: bool = False


def read_parts(config: Config, store: Store, report: RunReport | None = None) -> list[Part]:
    """The run as it is now, the whole first; with a report, also what that says in words."""
    stages, adapters = store.records("stage"), store.records("adapter")
    rounds = {made.number: made for made in load_rounds(store)}
    trainings = [name for name in adapters if _round_of(name) is None]
    begun = [
        number
        for number in range(1, max(rounds, default=0) + 2)
        if number in rounds
        or store.record("done", step_name("collect", number)) is not None
        or any(step_name(name, number) in adapters for name in ("dpo", "kto"))
    ]
    elsewhere = {name for name in stages if name in trainings or _round_of(name) in begun}
    metrics = {
        **_arm_numbers(config, store),
        **_comparison_numbers(store),
        **_total_numbers(stages),
    }
    for name, cost in stages.items():
        metrics |= {} if name in elsewhere else numbers(f"cost/{_key(name)}/", cost)
    metrics |= numbers("noise/", (store.record("noise", "floor") or {}).get("floor") or {})
    rows = {number: numbers("rounds/", _round_numbers(made)) for number, made in rounds.items()}
    for step in map(StepResult.from_dict, store.records("cycle").values()):
        rows[step.number] = rows.get(step.number, {}) | numbers("cycle/", asdict(step))
    whole = Part("", _params(config), _tags(config, store, report), metrics, rows)
    return [
        whole,
        *(_training(config, name, adapters[name], stages.get(name, {})) for name in trainings),
        *(_round(config, store, number, rounds.get(number), stages) for number in begun),
    ]


def part_of(training: str) -> str:
    """The part that a training belongs to: its round, otherwise itself.

    >>> part_of("dpo 2"), part_of("drafts")
    ('round 2', 'drafts')
    """
    number = _round_of(training)
    return training if number is None else f"round {number}"


def numbers(prefix: str, values: Mapping[str, Any]) -> Numbers:
    """The finite numbers among ``values``, and among mappings in them, under ``prefix``.

    >>> numbers("gain/", {"mean": 0.5, "low": None, "dev": {"n": 3}, "name": "x"})
    {'gain/mean': 0.5, 'gain/dev/n': 3.0}
    """
    return {
        name: float(value)
        for name, value in flatten(values, "/", prefix)
        if isinstance(value, int | float)
        and math.isfinite(value)
        and name.rpartition("/")[2] not in NO_NUMBERS
    }


def _arm_numbers(config: Config, store: Store) -> Numbers:
    """The numbers of each evaluated arm, under the names of the split and the arm."""
    arms = tuple(load_arm(name, record) for name, record in store.records("arm").items())
    made: Numbers = {}
    for line in arm_table(RunReport("", "", 0, "collaboration", arms=arms)):
        found = {"score": line.score, "strict_score": line.strict_score, "n": line.answered}
        found |= {"failed": line.failed, "p": line.test.p if line.test else None}
        found |= _ends(line.interval)
        made |= numbers(f"{config.evaluate.split}/{_key(line.name)}/", found)
    return made


def _ends(interval: Any) -> dict[str, float]:
    return {"low": interval.low, "high": interval.high} if interval else {}


def _comparison_numbers(store: Store) -> Numbers:
    """The numbers of `cowest compare`, when it was run."""
    try:
        page = read_document(store.folder / "comparison", "comparison", "cowest compare")
    except ReportError:
        return {}
    made: Numbers = {}
    for arm in page["numbers"]["arms"]:
        found = {name: arm[name] for name in ("score", "failed", "holm")}
        found |= {"n": arm["answered"], **(arm["interval"] or {}), **arm["cost"]}
        made |= numbers(f"compare/{_key(arm['name'])}/", found)
    return made


def _total_numbers(stages: Mapping[str, Mapping[str, Any]]) -> Numbers:
    names = ("seconds", "calls", "tokens_in", "tokens_out") if stages else ()
    sums = {name: sum(cost.get(name) or 0 for cost in stages.values()) for name in names}
    usd = total_usd(cost.get("usd") for cost in stages.values())
    return numbers("total/", {**sums, "usd": usd if stages else None})


def _tags(config: Config, store: Store, report: RunReport | None) -> dict[str, str]:
    tags = {f"version.{name}": value for name, value in package_versions().items()}
    tags |= {"cowest.run": str(store.folder.absolute())}
    tags |= {"model.strong": config.strong.model, "model.weak": config.weak.model}
    tags["model.tuned"] = (store.record("final", "weak") or {}).get("model", "")
    if report is not None:
        tags["mlflow.note.content"] = tags["verdict"] = " ".join(verdict(report).sentences)
    return _texts(tags)


def _round(
    config: Config, store: Store, number: int, made: Round | None, stages: Mapping[str, Any]
) -> Part:
    metrics: Numbers = {}
    if store.record("done", step_name("collect", number)) is not None:
        traces = Traces.load(store, round=number)
        counts = influence_counts(traces)  # pyright: ignore[reportArgumentType]
        names = ("n", "helped", "hurt", "same", "failed", "mean", "draft_quality")
        metrics |= numbers("influence/", {name: getattr(counts, name) for name in names})
        metrics |= numbers("influence/", _ends(counts.interval))
    for stage in ROUND_STAGES:
        metrics |= numbers(f"cost/{stage}/", stages.get(step_name(stage, number), {}))
    dropped = store.record("pairs", step_name("dropped", number))
    metrics |= {"pairs/dropped": float(sum(dropped.values()))} if dropped is not None else {}
    tags: dict[str, str] = {}
    if made:
        metrics |= numbers("", _round_numbers(made))
        tags = {"decision": made.outcome, "reason": made.reason}
        tags |= {"model.start": made.start, "model.tuned": made.model or "none"}
        tags["mlflow.note.content"] = f"{made.outcome}: {made.reason}"
    tuner = "kto" if config.kto is not None else "dpo"
    name = step_name(tuner, number)
    record = store.record("adapter", name)
    return Part(
        f"round {number}",
        _params(config, tuner),
        _texts(tags),
        metrics,
        _curve(record) if record else {},
        record["identity"] if record else None,
        made is not None,
    )


def _round_numbers(made: Round) -> dict[str, Any]:
    gain = asdict(made.gain) if made.gain else {}
    dev = ("before", "after", "failed_before", "failed_after")
    return {
        "pairs": {"kept": made.pairs, "replayed": made.replayed},
        "accepted": made.accepted,
        "gain": {name: value for name, value in gain.items() if name not in dev},
        "dev": {name: gain.get(name) for name in dev},
    }


def _training(
    config: Config, name: str, record: Mapping[str, Any], cost: Mapping[str, Any]
) -> Part:
    table = {"drafts": ("sft", "settings"), "answers": ("sft", "answer_settings")}.get(name)
    return Part(
        name,
        _params(config, *table) if table else {},
        _texts({"model.tuned": record["model"]}),
        numbers("cost/", cost),
        _curve(record),
        record["identity"],
        True,
    )


def _curve(record: Mapping[str, Any]) -> dict[int, Numbers]:
    """TRL's numbers by step. They begin otherwise than what TRL logs by itself, so that both can
    stand in one run."""
    made: dict[int, Numbers] = {}
    for row in training_curve(record["history"]):
        found = made.setdefault(int(row.pop("step")), {})
        for name, value in row.items():
            held_out = name.startswith("eval_")
            found[f"{'held_out' if held_out else 'training'}/{name.removeprefix('eval_')}"] = value
    return made


def _params(config: Config, *table: str) -> dict[str, str]:
    """The configuration, or one table of it without the table's name; secrets are masked."""
    settings = mask_settings(visible_settings(config))
    settings.pop("tracking", None)
    for name in table:
        settings = settings.get(name, {})
    return _texts(
        {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in flatten(settings)
            if value not in (None, {})
        }
    )


def _round_of(stage: str) -> int | None:
    """The number of the round that a stage is of."""
    name, _, number = stage.partition(" ")
    if name not in ROUND_STAGES or (number and not number.isdigit()):
        return None
    return int(number or 1)


def _texts(values: Mapping[str, str]) -> dict[str, str]:
    """Texts with keys that every tracker takes, nothing secret, and not too long."""
    return {_key(key): masked(value)[:LONGEST] for key, value in values.items() if value}


def _key(name: str) -> str:
    """A name of letters, digits and "_-./", which all trackers take."""
    kept = (char if char.isascii() and (char.isalnum() or char in "_-./") else "_" for char in name)
    return "".join(kept)


def gather(config: Config, run: Path, report: RunReport, target: Path) -> list[str]:
    """Write what is uploaded of the run in ``run`` into the empty folder ``target``, with secrets
    masked; gives the files' names in it, in order.

    An input that [report] hide names is not uploaded: report.html and report.json have its length,
    and what cannot be shown without it (pairs, drafts, the comparison's answers, the bundle) is
    left out.
    """
    write_report(report, target)
    if config.report.hide:
        with_marks = write_report(redact(report), target / "marks").json
        with_marks.replace(target / "report.json")
        shutil.rmtree(target / "marks")
    (target / "config.toml").write_text(effective_toml(config), encoding="utf-8")
    compared = [run / "comparison" / f"comparison.{kind}" for kind in COMPARISON_FILES]
    if not config.report.hide:
        compared.append(run / "comparison" / "comparison.json")
        for pattern in ROWS:
            for file in run.glob(pattern):
                write_jsonl(target / file.name, map(mask_text, read_jsonl(file)))
        if (run / "bundle" / "cowest.json").is_file():
            shutil.copytree(run / "bundle", target / "bundle")
    for file in compared:
        if file.is_file():
            (target / "comparison").mkdir(exist_ok=True)
            shutil.copyfile(file, target / "comparison" / file.name)
    return sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
