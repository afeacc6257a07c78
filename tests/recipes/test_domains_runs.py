"""The domain tasks as their TOMLs declare them, on invented rows: from configuration to scores, and
to a model that was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from domain_rows import counterfactual, medical, write_rows

from cowest_dspy import Collaboration, Experiment, load_config
from cowest_dspy.errors import DataError
from cowest_dspy.experiment.comparing import Compared
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.data import SPLITS, check_apart, configured_split
from cowest_dspy.utils import importing

ROOT = Path(__file__).parents[2]
INVENTED = {"medmcqa": medical, "ifqa": counterfactual}
DRAFTS = ("direct", "knowledge", "chain_of_thought")

# The strong one reads the invented explanations and passages, and knows nothing else.
MODELS = """
import re
from cowest_dspy.testing import ScriptedEngine

def weak():
    return ScriptedEngine(lambda request: "Reasoning: nothing is known.\\nAnswer: A. never", model="scripted/weak")

def strong():
    def answer(request):
        asked = request["messages"][-1]["content"]
        year = re.search(r"over the [a-zA-Z]+ in (\\d+)", asked)
        made = re.search(r"gives (\\w+) to", asked)
        options = {text: letter for letter, text in re.findall(r"([A-D])\\. (\\w+)", asked)}
        return year.group(1) if year else options[made.group(1)] if made else "A"
    return ScriptedEngine(answer, model="scripted/strong")
"""


@pytest.fixture(params=INVENTED)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


def configured(
    task: str, folder: Path, weak: str | None = None, draft: str = "knowledge", more: str = ""
) -> Config:
    """The task of the project with its rows from a folder, on rules, or on a weak model of this
    process."""
    makes: Any = INVENTED[task]
    write_rows(folder / "rows", train=makes(40, "train"), dev=makes(20, "dev"))
    given = (ROOT / f"programs/{task}.toml").read_text(encoding="utf-8")
    changed = given.replace('draft = "knowledge"', f'draft = "{draft}"').replace(
        "[data]\n", '[data]\nrows = "./rows"\n'
    )
    assert (
        changed.count("rows = ") == given.count("rows = ") + 1 and f'draft = "{draft}"' in changed
    )
    changed = changed.replace(f'"{task}.py:', f'"{ROOT}/programs/{task}.py:').replace(
        '"../metrics', f'"{ROOT}/metrics'
    )
    (folder / f"{task}.toml").write_text(changed, encoding="utf-8")
    (folder / "models.py").write_text(MODELS, encoding="utf-8")
    engine = '[{0}]\nkind = "engine"\nengine = "models.py:{0}"\nmodel = "scripted/{0}"\n'
    local = f'[weak]\nkind = "in_process"\nmodel = "{weak}"\nmax_tokens = 16\n'
    (folder / "backend.toml").write_text(
        (local if weak else engine.format("weak")) + engine.format("strong") + more,
        encoding="utf-8",
    )
    return load_config([folder / f"{task}.toml", folder / "backend.toml"])


def test_the_splits_of_the_task_share_no_input(task: str, tmp_path: Path) -> None:
    config = configured(task, tmp_path)
    check_apart(
        {split: configured_split(config.data, split) for split in SPLITS}, config.data.inputs
    )


@pytest.mark.parametrize("draft", DRAFTS)
def test_whoever_reads_what_is_known_answers_right(task: str, draft: str, tmp_path: Path) -> None:
    config = configured(task, tmp_path, draft=draft, more="[sft]\n[dpo]\n")
    with Experiment(config, tmp_path / "run") as experiment:
        arms = {
            arm.name: [answer.score or 0.0 for answer in arm.answers]
            for arm in experiment.evaluate(["strong", "oracle", "weak"])
        }
        traces = experiment.collect()
    assert arms["oracle"] == [1.0] * 10 and sum(arms["strong"]) < 10 and sum(arms["weak"]) < 10
    assert len(traces) == 40 and not [trace for trace in traces if trace.error]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "draft"), [("medmcqa", "chain_of_thought"), ("ifqa", "knowledge")]
)
def test_the_weak_model_learns_to_draft_and_to_answer(
    task: str, draft: str, tmp_path: Path, tiny_model: Path
) -> None:
    """A real, tiny model is fine-tuned for a step on the rows of the recipe."""
    sft = f"""
[sft]
drafts = "{ROOT}/programs/{task}.py:draft_rows"
answers = "{ROOT}/programs/{task}.py:answer_rows"
settings = {{ max_steps = 1, bf16 = false }}
answer_settings = {{ max_steps = 1, bf16 = false }}
"""
    with Experiment(
        configured(task, tmp_path, str(tiny_model), draft, sft), tmp_path / "run"
    ) as experiment:
        [weak] = experiment.evaluate(["weak"])
        assert set(experiment.store.records("adapter")) == {"drafts", "answers"}
    assert len(weak.answers) == 10


def test_the_formats_differ_in_what_the_weak_model_is_asked_for(task: str) -> None:
    outputs = {
        draft: list(
            importing.call(
                f"{ROOT}/programs/{task}.py:program", given={"draft": draft}
            ).draft.signature.output_fields
        )
        for draft in DRAFTS
    }
    assert outputs == {
        "direct": ["answer"],
        "knowledge": ["background"],
        "chain_of_thought": ["reasoning", "answer"],
    }
    assert isinstance(importing.call(f"{ROOT}/programs/{task}.py:program"), Collaboration)


def test_the_declared_arms_are_compared_and_only_what_has_the_passage_knows(
    task: str, tmp_path: Path
) -> None:
    """On rules there is nothing to tune, so these are the arms that need no trained weak model."""
    config = configured(task, tmp_path, more="[sft]\n[dpo]\n")
    with Experiment(config, tmp_path / "run") as experiment:
        made = Compared(experiment).run(["alone", "rag", "oracle"])
    rates = {
        one.arm.name: sum(answer.score or 0.0 for answer in one.arm.answers) / 10
        for one in made.arms
    }
    assert rates["oracle"] == 1.0
    # The passages of IfQA are those of all questions; the explanations of MedMCQA are those of
    # other questions.
    assert rates["rag"] > 0.8 if task == "ifqa" else rates["rag"] < 0.8
    also = {"medmcqa": "macro_f1", "ifqa": "token_f1"}[task]
    assert [one.extra[also] for one in made.arms if one.arm.name == "oracle"] == [1.0]


def test_without_rows_the_error_says_where_they_come_from(task: str) -> None:
    """Nothing is asked of the network here: the published place of IfQA's rows is a closed port."""
    source = f"{ROOT}/programs/{task}.py:examples"
    given = {"rows": "http://127.0.0.1:9/closed"} if task == "ifqa" else {}
    with pytest.raises(DataError, match="cannot be had"):
        importing.call(source, "dev", given=given)
