"""The model card of a bundle: README.md, for people and for the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cowest_dspy.errors import masked
from cowest_dspy.pairs.hub import table
from cowest_dspy.report import RunReport, arm_table, influence_by_round

_HEAD = """---
library_name: peft
base_model: {base}
tags: [cowest, dspy, weak-strong-collaboration, lora]
---

# {name}

The weak half of a weak-strong collaboration: a small model that drafts what a large one needs to
know, tuned with [CoWest](https://arxiv.org/abs/2504.15188) on how much its drafts changed the large
model's answers for the better.

- weak model: `{base}` (content hash `{base_hash}`), {tuning}
- strong model in all measurements: `{strong}`, which was not trained
- seed {seed}, {created}
"""
_LOAD = """
## How to load it

```python
from cowest_dspy import build_lm, load_bundle, load_config

# models.toml: [weak] and [strong], your own
config = load_config(["bundle/config.toml", "models.toml"])
program = load_bundle(
    "bundle", weak=build_lm(config.weak), strong=build_lm(config.strong), trust_recipe=True
)
```

`trust_recipe=True` executes the Python file in `recipe/` that builds the program: read it first, or
give `program=` yourself. `cowest verify bundle` checks every file against the manifest, offline.

## Limits

The numbers are of this task, these models, this seed and n questions: intervals are of the
questions, not of other seeds or tasks. A draft can also hurt, as the harm rate says. No licence is
named here: it depends on the base model's and on the examples'.
"""


def format_card(manifest: Mapping[str, Any], report: RunReport) -> str:
    """The text of README.md, from the manifest and the run's report; what looks like a secret is
    masked."""
    adapter = manifest["adapter"]
    tuning = f"with a LoRA adapter (content hash `{adapter}`)" if adapter else "not tuned"
    head = _HEAD.format(**manifest, tuning=tuning)
    return masked(head + _arms(report) + _influence(report) + _rounds(report) + _LOAD)


def _arms(report: RunReport) -> str:
    rows: list[Sequence[Any]] = []
    for line in arm_table(report):
        ends = line.interval
        span = f"{100 * ends.low:.0f} to {100 * ends.high:.0f} %" if ends else "-"
        share = "-" if line.accuracy is None else f"{100 * line.accuracy:.1f} %"
        rows.append((line.title, line.answered, line.failed, share, span))
    columns = ("arm", "n", "failed", "mean score", "95 % interval")
    return table("Measured on held-out questions", columns, rows)


def _influence(report: RunReport) -> str:
    rows: list[Sequence[Any]] = []
    for number, made in influence_by_round(report.traces).items():
        mean = "-" if made.mean is None else f"{made.mean:+.3f}"
        harm = "-" if made.harm_rate is None else f"{100 * made.harm_rate:.0f} %"
        rows.append((number, made.n, made.helped, made.same, made.hurt, made.failed, mean, harm))
    columns = ("round", "drafts", "helped", "same", "hurt", "failed", "mean influence", "harm rate")
    return table("Influence of the sampled drafts", columns, rows)


def _rounds(report: RunReport) -> str:
    rounds = [
        (one.number, one.pairs, one.gain, one.n, one.outcome, one.reason) for one in report.rounds
    ]
    steps = [
        (one.number, one.name, one.gain, one.n, "best so far" if one.best else "")
        for one in report.steps
    ]
    columns = ("round", "pairs", "gain on the dev split", "n", "outcome", "why")
    return table("Rounds", columns, rounds) + table(
        "Cycle", ("step", "optimiser", "gain over the start, dev split", "n", ""), steps
    )
