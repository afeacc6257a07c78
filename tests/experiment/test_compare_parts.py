"""The parts of ``cowest compare``: a store's parts, what recipes are given, controls, titles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from compare_task import declared
from compare_task import task as task

from cowest_dspy import Experiment, load_config
from cowest_dspy.errors import PairsError, RecipeError
from cowest_dspy.experiment.arms import by_correctness, other_draft_arm, shuffled
from cowest_dspy.experiment.comparing import _folder_name, depends_on_seed, title_of
from cowest_dspy.experiment.config import Config, overridden
from cowest_dspy.experiment.tables import ArmRules
from cowest_dspy.optimizers.rounds import Round
from cowest_dspy.store.store import Store
from cowest_dspy.utils.importing import call


def test_which_arms_depend_on_the_seed(task: list[Path]) -> None:
    config = load_config(task)
    rules = {
        "alone": False, "strong": False, "rag": False, "oracle": False, "self_consistency": True, "collaboration": True,
    }  # fmt: skip
    more: dict[str, Any] = {"rag": {"corpus": "toy.py:passages"}}
    for kind, depends in rules.items():
        assert (
            depends_on_seed(ArmRules.model_validate({"kind": kind, **more.get(kind, {})}), config)
            is depends
        ), kind
    assert not depends_on_seed(
        ArmRules.model_validate({"kind": "collaboration", "weak": "base"}), config
    )
    assert depends_on_seed(
        ArmRules.model_validate({"kind": "alone"}), overridden(config, {"strong.temperature": 0.5})
    )


def titles(config: Config, store: Store) -> Callable[..., str]:
    """What arms of a run are called that has this in its store."""
    part: Any = SimpleNamespace(config=config, store=store)
    return lambda **keys: title_of(ArmRules.model_validate(keys), part)


def test_titles_say_what_an_arm_is(task: list[Path], tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        title = titles(load_config(task), store)
        assert title(kind="strong", style="chain_of_thought") == "strong alone, chain of thought"
        assert (
            title(kind="weak", weak="base", shots=4) == "weak alone, as it came, 4 worked examples"
        )
        assert (
            title(kind="collaboration", weak="tuned", draft="direct")
            == "collaboration, after preference tuning, draft = direct"
        )
        assert title(kind="control", control="other_draft").startswith("control: tuned, ")
        assert title(kind="alone", title="GPT") == "GPT"


def test_an_arm_whose_tuning_was_not_taken_is_called_untuned(
    task: list[Path], tmp_path: Path
) -> None:
    with Store(tmp_path / "run") as store:
        title = titles(load_config(task), store)
        store.keep("round", "1", asdict(Round(1, "base", "tuned", 62, 0, "rolled back", "no gain")))
        store.keep(
            "round", "2", asdict(Round(2, "base", None, 7, 0, "skipped", "7 pairs, 8 needed"))
        )
        why = "untuned: round 1 was rolled back, round 2 was skipped"
        assert (
            title(kind="collaboration", weak="tuned", draft="direct")
            == f"collaboration ({why}), draft = direct"
        )
        assert title(kind="weak", weak="tuned") == f"weak alone ({why})"
        assert title(kind="collaboration", weak="tuned", title="CoWest") == f"CoWest ({why})"
        assert (
            title(kind="control", control="other_draft")
            == f"control: {why}, with the draft of another example"
        )
        assert title(kind="collaboration", weak="sft") == "collaboration, after SFT"
        assert title(kind="alone", title="GPT") == "GPT"
        store.keep("round", "1", asdict(Round(1, "base", "tuned", 62, 0, "accepted", "a gain")))
        assert title(kind="collaboration", weak="tuned") == "collaboration, after preference tuning"


def test_a_round_of_a_run_from_before_outcomes_had_names_is_read() -> None:
    old = {"number": 2, "start": "a", "pairs": 0, "replayed": 0, "reason": "why", "gain": None}
    made = [
        Round.from_dict({**old, "model": model, "accepted": taken})
        for model, taken in (("b", True), ("b", False), (None, False))
    ]
    assert [one.outcome for one in made] == ["accepted", "rolled back", "skipped"]
    assert str(made[2]) == "round 2 skipped: why" and Round.from_dict(asdict(made[0])) == made[0]


def test_a_part_of_a_store_shares_calls_and_keeps_its_own_records(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        part = store.within("seed-1")
        store.keep("arm", "x", {"of": "whole"})
        part.keep("arm", "x", {"of": "part"})
        assert store.record("arm", "x") == {"of": "whole"} and part.record("arm", "x") == {
            "of": "part"
        }
        assert store.records("arm") == {"x": {"of": "whole"}}
        assert (
            dict(part.each("arm")) == part.records("arm") == {"x": {"of": "part"}}
            and part.count("arm") == 1
        )
        part.within("draft-direct").keep("arm", "x", {"of": "part of the part"})
        part.forget("arm")
        assert part.record("arm", "x") is None and store.count("arm") == 1
        assert part.within("draft-direct").count("arm") == 1
        assert part.folder == tmp_path / "run/variants/seed-1"
        part.close()
        assert store.record("arm", "x"), "closing a part closes nothing"


def test_a_function_is_given_what_the_configuration_says_and_offered_what_it_asks_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "recipe.py").write_text(
        "def f(seed=0):\n    return seed\ndef g(seed=0, strong=None):\n    return strong\nx = 3\n"
    )
    recipe = f"{tmp_path / 'recipe.py'}"
    assert call(f"{recipe}:f", given={"seed": 4, "draft": None}, offered={"strong": "lm"}) == 4
    assert call(f"{recipe}:g", given={"seed": 4}, offered={"strong": "lm"}) == "lm"
    with pytest.raises(RecipeError, match='takes no "draft"'):
        call(f"{recipe}:f", given={"draft": "direct"})
    with pytest.raises(RecipeError, match="a function is expected"):
        call(f"{recipe}:x")


def test_the_difference_worth_finding_makes_no_other_variant(task: list[Path]) -> None:
    config = load_config(declared(task, '[compare.arms.alone]\nkind = "alone"'))
    other = overridden(config, {"compare.smallest": 2.5})
    long = {"weak.model": "models/some-other-model-with-a-name"}
    assert _folder_name(long, config) == _folder_name(long, other)


def test_a_program_that_takes_no_format_says_so(task: list[Path], tmp_path: Path) -> None:
    recipe = task[0].parent / "toy.py"
    recipe.write_text(
        recipe.read_text().replace(
            'def program(draft="knowledge")', 'def program(of="x", draft_="knowledge")'
        )
    )
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
    assert [{row["chosen"], row["rejected"]} for row in mixed] == [
        {f"c{i}", f"r{i}"} for i in range(6)
    ]


def test_drafts_ranked_by_their_own_answers_need_answers() -> None:
    with pytest.raises(PairsError, match="chain_of_thought"):
        by_correctness([])


def test_the_draft_of_another_example_is_never_its_own(task: list[Path], tmp_path: Path) -> None:
    with Experiment(load_config(task), tmp_path / "run") as experiment:
        program = experiment.program.bind(weak=experiment.weak, strong=experiment.strong)
        examples = experiment.splits["test"]
        asked: list[str] = []
        program.ask_draft = lambda **inputs: (  # type: ignore[method-assign]
            asked.append(inputs["question"]) or dspy.Prediction(draft="a e i")
        )
        answering = other_draft_arm(program, examples, seed=0)
        answers = [answering(example).answer for example in examples]
    assert answers == ["yes"] * 6
    assert sorted(asked) == sorted(example.question for example in examples)
    assert all(
        question != example.question for question, example in zip(asked, examples, strict=True)
    )


@pytest.mark.slow
def test_parts_share_the_models_that_are_the_same(task: list[Path], tmp_path: Path) -> None:
    """Another gate changes nothing of the domain's training: before, each part of a sweep trained
    its own."""
    config = load_config(task)
    with Experiment(config, tmp_path / "run") as experiment:
        first = experiment.sft()
        part = experiment.variant("fewer", overridden(config, {"pairs.most": 2}))
        assert part.sft().model == first.model
        assert part.store.records("stage") == {}, "nothing is trained for it"
        other = experiment.variant("seed-1", overridden(config, {"seed": 1}))
        assert other.sft().model != first.model and other.store.records("stage")
    with Experiment(
        config, tmp_path / "run"
    ) as again:  # Found again, with its folder read from where it was trained.
        part = again.variant("fewer", overridden(config, {"pairs.most": 2}))
        assert part.sft().model == first.model
        assert len(list((tmp_path / "run").rglob("adapters/*/adapter_model.safetensors"))) == 2
