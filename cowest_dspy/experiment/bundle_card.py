"""The model card of a bundle: README.md, for people and for the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cowest_dspy.errors import masked
from cowest_dspy.experiment.config import Config
from cowest_dspy.influence.statistics import Interval
from cowest_dspy.lms.local import weights
from cowest_dspy.report import RunReport
from cowest_dspy.report.numbers import arm_table, influence_counts
from cowest_dspy.report.run_view import run_view
from cowest_dspy.report.view import Section, escape_markdown, markdown_table
from cowest_dspy.utils.table import split_reference

_SECTIONS = ("arms", "rounds", "cycle", "influence")
_LICENCE = ("license", "license_name", "license_link")
_HEAD = """
# {name}

The weak half of a weak-strong collaboration: a small model that drafts what a large one needs to
know, tuned with [CoWest](https://arxiv.org/abs/2504.15188) on how much its drafts changed the large
model's answers for the better.

- weak model: `{base}` (content hash `{base_hash}`), {tuning}
- strong model in all measurements: `{strong}`, which was not trained
- seed {seed}, {created}
"""
_ADAPTER = """
## The adapter alone

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
weak = PeftModel.from_pretrained(base, "bundle")
tokenizer = AutoTokenizer.from_pretrained("{base}")
```

For vLLM it is a LoRA module: `vllm serve {base} --enable-lora --lora-modules drafter=bundle`.
`bundle` is this folder, or its name on the Hub. {whose}
"""
_ON_HUB = (
    "`AutoPeftModelForCausalLM` finds the base by itself; it has to have the content hash above."
)
_ELSEWHERE = (
    "The base was read from a folder that is called `{base}`, and has no id on the Hub that is "
    "known here: give the folder in which you have it."
)
_LOAD = """
## The whole collaboration

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
questions, not of other seeds or tasks. A draft can also hurt, as the harm rate says. The licence
depends on the base model's, which is the one that is named above where none was given, and on the
examples'.
"""


def format_card(
    manifest: Mapping[str, Any],
    report: RunReport,
    config: Config,
    base: Path,
    licence: str | None = None,
) -> str:
    """The text of README.md; what looks like a secret is masked.

    Args:
        manifest: that of the bundle.
        report: of the run, whose numbers are in the text and in the metadata's model-index.
        config: of the run.
        base: the folder of the base model.
        licence: an identifier of the Hub's, such as "apache-2.0"; by default the base's, where its
            own card names one.
    """
    adapter, name = manifest["adapter"], manifest["base"]
    tuning = f"with a LoRA adapter (content hash `{adapter}`)" if adapter else "not tuned"
    head = _HEAD.format(**manifest, tuning=tuning)
    shown = [one for one in run_view(report).sections if one.name in _SECTIONS and one.tables]
    whose = _ON_HUB if weights.hub_id(base) else _ELSEWHERE.format(base=name)
    alone = _ADAPTER.format(base=name, whose=whose) if adapter else ""
    metadata = _metadata(manifest, report, config, base, licence)
    text = "".join([head, *map(_section, shown), alone, _LOAD])
    return masked(f"---\n{metadata}\n---\n{text}")


def _metadata(
    manifest: Mapping[str, Any],
    report: RunReport,
    config: Config,
    base: Path,
    licence: str | None,
) -> str:
    """The card's YAML, in the Hub's own names."""
    from huggingface_hub import ModelCardData

    datasets = [
        source.split(":")[1]
        for source in (config.data.source, config.data.rows)
        if source and source.startswith("hub:")
    ]
    terms: dict[str, Any] = {"license": licence} if licence else _licence_of(base)
    data = ModelCardData(
        **terms,
        base_model=manifest["base"],
        base_model_relation="adapter" if manifest["adapter"] else None,
        datasets=datasets or None,
        library_name="peft" if manifest["adapter"] else None,
        pipeline_tag="text-generation",
        tags=[
            "cowest",
            "dspy",
            "weak-strong-collaboration",
            *(["lora"] * bool(manifest["adapter"])),
        ],
        model_name=manifest["name"],
        eval_results=_results(report, config, datasets) or None,
    )
    return data.to_yaml()


def _licence_of(base: Path) -> dict[str, Any]:
    """What the card of the base says of its licence; "unknown" where it has none."""
    from huggingface_hub import ModelCard

    try:
        said = ModelCard.load(base / "README.md", ignore_metadata_errors=True).data.to_dict()
    except Exception:  # There is no such file, or whatever a reader of YAML says of its head.
        said = {}
    found = {key: said[key] for key in _LICENCE if isinstance(said.get(key), str)}
    return found if "license" in found else {"license": "unknown"}


def _results(report: RunReport, config: Config, datasets: list[str]) -> list[Any]:
    """What was measured, as the entries of a card's model-index: the score of every arm, and the
    mean influence of a draft."""
    from huggingface_hub import EvalResult

    def result(kind: str, name: str, split: str, value: float, **about: Any) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else config.name,
            dataset_name=config.name,
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
            metric_args=about,
        )

    metric = split_reference(config.metric)[2] or config.metric
    made = [
        result(metric, arm.title, config.evaluate.split, arm.score, **_span(arm.n, arm.interval))
        for arm in arm_table(report)
        if arm.score is not None
    ]
    influence = influence_counts(report.traces)
    if influence.mean is not None:
        about = _span(influence.n - influence.failed, influence.interval)
        name = "mean influence of a draft: score(refined) - score(alone)"
        made.append(result("influence", name, "train", influence.mean, **about))
    return made


def _span(n: int, interval: Interval | None) -> dict[str, Any]:
    ends = {"interval_95": [round(interval.low, 4), round(interval.high, 4)]} if interval else {}
    return {"n": n, **ends}


def _section(section: Section) -> str:
    parts = [f"## {section.title}", escape_markdown(section.lead)]
    for table in section.tables:
        parts += [f"### {table.title}"] if table.title != section.title else []
        parts += [markdown_table(table), escape_markdown(table.caption)]
    notes = "\n".join(f"- {escape_markdown(note)}" for note in section.notes)
    return "".join(f"\n{part}\n" for part in (*parts, notes) if part)
