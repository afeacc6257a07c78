"""The model card of a bundle: README.md, for people and for the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cowest_dspy.errors import masked
from cowest_dspy.report import RunReport
from cowest_dspy.report.run_view import run_view
from cowest_dspy.report.view import Section, escape_markdown, markdown_table

_SECTIONS = ("arms", "rounds", "cycle", "influence")
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
    shown = [one for one in run_view(report).sections if one.name in _SECTIONS and one.tables]
    return masked("".join([head, *map(_section, shown), _LOAD]))


def _section(section: Section) -> str:
    parts = [f"## {section.title}", escape_markdown(section.lead)]
    for table in section.tables:
        parts += [f"### {table.title}"] if table.title != section.title else []
        parts += [markdown_table(table), escape_markdown(table.caption)]
    notes = "\n".join(f"- {escape_markdown(note)}" for note in section.notes)
    return "".join(f"\n{part}\n" for part in (*parts, notes) if part)
