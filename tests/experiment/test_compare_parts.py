"""The parts of ``cowest compare``: a store's parts, what recipes are given, controls, titles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare_task import task as task

from cowest_dspy import Experiment, load_config
from cowest_dspy.config import overridden
from cowest_dspy.errors import PairsError, RecipeError
from cowest_dspy.experiment.compared_arms import depends_on_seed, title_of
from cowest_dspy.experiment.controls import by_correctness, other_draft_arm, shuffled
from cowest_dspy.recipes import call
from cowest_dspy.store import Store
from cowest_dspy.tables import ArmRules


def test_which_arms_depend_on_the_seed(task: list[Path]) -> None:
    config = load_config(task)
    rules = {
        "alone": False, "strong": False, "rag": False, "oracle": False, "self_consistency": True, "collaboration": True,
    }  # fmt: skip
    more: dict[str, Any] = {"rag": {"corpus": "toy.py:passages"}}
    for kind, depends in rules.items():
        assert depends_on_seed(ArmRules.model_validate({"kind": kind, **more.get(kind, {})}), config) is depends, kind
    assert not depends_on_seed(ArmRules.model_validate({"kind": "collaboration", "weak": "base"}), config)
    assert depends_on_seed(ArmRules.model_validate({"kind": "alone"}), overridden(config, {"strong.temperature": 0.5}))


def test_titles_say_what_an_arm_is() -> None:
    def title(**keys: Any) -> str:
        return title_of(ArmRules.model_validate(keys))

    assert title(kind="strong", style="chain_of_thought") == "strong alone, chain of thought"
    assert title(kind="weak", weak="base", shots=4) == "weak alone, as it came, 4 worked examples"
    assert title(kind="collaboration", weak="tuned", draft="direct") == "collaboration, after preference tuning, draft = direct"
    assert title(kind="control", control="other_draft").startswith("control: ")
    assert title(kind="alone", title="GPT") == "GPT"


def test_a_part_of_a_store_shares_calls_and_keeps_its_own_records(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        part = store.within("seed-1")
        store.keep("arm", "x", {"of": "whole"})
        part.keep("arm", "x", {"of": "part"})
        assert store.record("arm", "x") == {"of": "whole"} and part.record("arm", "x") == {"of": "part"}
        assert store.records("arm") == {"x": {"of": "whole"}}
        assert dict(part.each("arm")) == part.records("arm") == {"x": {"of": "part"}} and part.count("arm") == 1
        part.within("draft-direct").keep("arm", "x", {"of": "part of the part"})
        part.forget("arm")
        assert part.record("arm", "x") is None and store.count("arm") == 1
        assert part.within("draft-direct").count("arm") == 1
        assert part.folder == tmp_path / "run/variants/seed-1"
        part.close()
        assert store.record("arm", "x"), "closing a part closes nothing"


def test_a_function_is_given_what_the_configuration_says_and_offered_what_it_asks_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text("def f(seed=0):\n    return seed\ndef g(seed=0, strong=None):\n    return strong\nx = 3\n")
    recipe = f"{tmp_path / 'recipe.py'}"
    assert call(f"{recipe}:f", given={"seed": 4, "draft": None}, offered={"strong": "lm"}) == 4
    assert call(f"{recipe}:g", given={"seed": 4}, offered={"strong": "lm"}) == "lm"
    with pytest.raises(RecipeError, match='takes no "draft"'):
        call(f"{recipe}:f", given={"draft": "direct"})
    with pytest.raises(RecipeError, match="a function is expected"):
        call(f"{recipe}:x")


def test_a_program_that_takes_no_format_says_so(task: list[Path], tmp_path: Path) -> None:
    recipe = task[0].parent / "toy.py"
    recipe.write_text(recipe.read_text().replace('def program(draft="knowledge")', 'def program(of="x", draft_="knowledge")'))
    (tmp_path / "more.toml").write_text('draft = "direct"\n')
    with (
        Experiment(load_config([*task, tmp_path / "more.toml"]), tmp_path / "run") as experiment,
        pytest.raises(RecipeError, match='takes no "draft"'),
    ):
        _ = experiment.program


def test_shuffled_labels_keep_the_texts() -> None:
    rows = [{"prompt": str(i), "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(6)]
    mixed = shuffled(rows, seed=1)
    assert sum(row["chosen"].startswith("r") for row in mixed) == 3
    assert [{row["chosen"], row["rejected"]} for row in mixed] == [{f"c{i}", f"r{i}"} for i in range(6)]


def test_drafts_ranked_by_their_own_answers_need_answers() -> None:
    with pytest.raises(PairsError, match="chain_of_thought"):
        by_correctness([], {})


def test_the_draft_of_another_example_is_never_its_own(task: list[Path], tmp_path: Path) -> None:
    with Experiment(load_config(task), tmp_path / "run") as experiment:
        program = experiment.program.bind(weak=experiment.weak, strong=experiment.strong)
        examples = experiment.splits["test"]
        asked: list[str] = []
        program.drafted = lambda **inputs: asked.append(inputs["question"]) or "a e i"  # type: ignore[method-assign]
        answering = other_draft_arm(program, examples, seed=0)
        answers = [answering(example).answer for example in examples]
    assert answers == ["yes"] * 6
    assert sorted(asked) == sorted(example.question for example in examples)
    assert all(question != example.question for question, example in zip(asked, examples, strict=True))


@pytest.mark.slow
def test_parts_share_the_models_that_are_the_same(task: list[Path], tmp_path: Path) -> None:
    """Another gate changes nothing of the domain's training: before, each part of a sweep trained its own."""
    config = load_config(task)
    with Experiment(config, tmp_path / "run") as experiment:
        first = experiment.sft()
        part = experiment.variant("fewer", overridden(config, {"pairs.most": 2}))
        assert part.sft().model == first.model
        assert part.store.records("stage") == {}, "nothing is trained for it"
        other = experiment.variant("seed-1", overridden(config, {"seed": 1}))
        assert other.sft().model != first.model and other.store.records("stage")
    with Experiment(config, tmp_path / "run") as again:  # Found again, with its folder read from where it was trained.
        part = again.variant("fewer", overridden(config, {"pairs.most": 2}))
        assert part.sft().model == first.model
        assert len(list((tmp_path / "run").rglob("adapters/*/adapter_model.safetensors"))) == 2
