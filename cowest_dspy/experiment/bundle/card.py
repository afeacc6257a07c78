"""The model card of a bundle: README.md, for people and for the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cowest_dspy.errors import masked
from cowest_dspy.experiment.bundle.manifest import Manifest
from cowest_dspy.pairs.hub import table
from cowest_dspy.report import RunReport, arm_table, influence_by_round

_HEAD = """---
library_name: peft
base_model: {base}
tags: [cowest, dspy, weak-strong-collaboration, lora]
---

# {name}

The weak half of a weak-strong collaboration: a small model that drafts what a large one needs to know, tuned with
[CoWest](https://arxiv.org/abs/2504.15188) on how much its drafts changed the large model's answers for the better.

- weak model: `{base}` (content hash `{base_hash}`), {adapter}
- strong model in all measurements: `{strong}`, which was not trained
- seed {seed}, {created}
"""
_LOAD = """
## How to load it

```python
from cowest_dspy import build_lm, load_bundle, load_config

config = load_config(["bundle/config.toml", "models.toml"])  # models.toml: [weak] and [strong], your own
program = load_bundle("bundle", weak=build_lm(config.weak), strong=build_lm(config.strong), trust_recipe=True)
```

`trust_recipe=True` executes the Python file in `recipe/` that builds the program: read it first, or give `program=` yourself.
`cowest verify bundle` checks every file against the manifest, offline.
"""
_LIMITS = """
## Limits

The numbers are of this task, these models, this seed and n questions: intervals are of the questions, not of other seeds or tasks.
A draft can also hurt, as the harm rate says. No licence is named here: it depends on the base model's and on the examples'.
"""


def card(manifest: Manifest, report: RunReport) -> str:
    """The text of README.md; what looks like a secret is masked."""
    adapter = (
        f"with a LoRA adapter (content hash `{manifest.adapter}`)"
        if manifest.adapter
        else "not tuned"
    )
    parts = [
        _HEAD.format(**{**manifest.model_dump(), "adapter": adapter}),
        _arms(report),
        _influence(report),
        _rounds(report),
    ]
    return masked("".join([*parts, _LOAD, _LIMITS]))


def _arms(report: RunReport) -> str:
    rows: list[Sequence[Any]] = []
    for line in arm_table(report):
        span = (
            f"{100 * line.interval.low:.0f} to {100 * line.interval.high:.0f} %"
            if line.interval
            else "-"
        )
        share = "-" if line.score is None else f"{100 * line.score:.1f} %"
        rows.append((line.title, line.answered, line.failed, share, span))
    return table(
        "Measured on held-out questions",
        ("arm", "n", "failed", "mean score", "95 % interval"),
        rows,
    )


def _influence(report: RunReport) -> str:
    rows: list[Sequence[Any]] = []
    for number, counts in influence_by_round(report.traces).items():
        mean = "-" if counts.mean is None else f"{counts.mean:+.3f}"
        harm = "-" if counts.harm_rate is None else f"{100 * counts.harm_rate:.0f} %"
        rows.append(
            (number, counts.n, counts.helped, counts.same, counts.hurt, counts.failed, mean, harm)
        )
    columns = ("round", "drafts", "helped", "same", "hurt", "failed", "mean influence", "harm rate")
    return table("Influence of the sampled drafts", columns, rows)


def _rounds(report: RunReport) -> str:
    rows = [
        (
            row.number,
            row.pairs,
            row.gain.span if row.gain else "-",
            row.gain.n if row.gain else 0,
            row.outcome,
            row.reason,
        )
        for row in report.rounds
    ]
    steps = [
        (
            row.number,
            row.name,
            row.gain.span if row.gain else "-",
            row.n,
            "best so far" if row.best else "",
        )
        for row in report.steps
    ]
    made = table("Rounds", ("round", "pairs", "gain on the dev split", "n", "outcome", "why"), rows)
    return made + table(
        "Cycle", ("step", "optimiser", "gain over the start, dev split", "n", ""), steps
    )
