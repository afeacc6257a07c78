"""[rounds] and [cycle] of a configuration, on the toy task: a real tiny weak model, and a strong
model with a rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import cowest
from toy_experiment import (  # noqa: F401 - a fixture
    CYCLE,
    OWN,
    cycle,
    rewrite,
    task,
)

from cowest_dspy import Experiment, Store, load_config
from cowest_dspy.errors import ConfigError
from cowest_dspy.pairs import PreferencePairs
from cowest_dspy.report import influence_by_round, read_report
from cowest_dspy.tuning import tune


def run(files: Sequence[Path], folder: Path) -> Experiment:
    with Experiment(load_config(files), folder) as experiment:
        experiment.cycle()
    return experiment


def table_of(tuner: str, rows: int, passes: int) -> str:
    """The table of a tuner, as the toy task has it of DPO."""
    return (
        f"[{tuner}]\nmax_steps = 2\nbf16 = false\nper_device_train_batch_size = {rows}\n"
        f"gradient_accumulation_steps = {passes}\n"
    )


@pytest.mark.slow
def test_rounds_of_a_configuration_are_in_the_report_and_done_once(
    task: list[Path], tmp_path: Path
) -> None:
    with task[0].open("a") as file:
        file.write("\n[rounds]\ncount = 2\nleast_gain = -1.0\nmore_failures = 1.0\n")
    run(task, tmp_path / "run")
    first = read_report(tmp_path / "run")
    assert [row.number for row in first.rounds] == [1, 2] or first.rounds[-1].reason
    assert set(influence_by_round(first.traces)) >= {1}
    assert first.pairs and first.pairs.kept >= first.rounds[0].pairs
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Rounds</h2>" in page and first.rounds[0].outcome in page
    with Experiment(load_config(task), tmp_path / "run") as experiment:
        calls = experiment.store.calls()
        again = experiment.cycle()
        assert experiment.store.calls() == calls
    assert again.rounds == first.rounds and again.arms == first.arms


@pytest.mark.slow
def test_kto_of_a_configuration_tunes_on_labelled_drafts_with_its_controls(
    task: list[Path], tmp_path: Path
) -> None:
    # KTO takes two rows or more in a forward pass.
    rewrite(task[0], table_of("dpo", 1, 2), table_of("kto", 2, 1))
    # Alone it knows some answers, so that a draft can hurt.
    knows = (
        'else ("yes" if "Background" not in text and any(f" {n}?" in text for n in (1, 3, 5)) '
        'else "no")'
    )
    rewrite(task[0].with_name("toy.py"), 'else "no"', knows)
    experiment = run(task, tmp_path / "run")
    assert (
        experiment.config.kto
        == {
            "max_steps": 2,
            "bf16": False,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
        }
        and experiment.config.dpo == {}
    )
    made = read_report(tmp_path / "run")
    assert {"collaboration", "shuffled", "sft_on_chosen"} <= {arm.name for arm in made.arms}
    labels = [
        json.loads(line)["label"]
        for line in (tmp_path / "run" / "drafts.jsonl").read_text().splitlines()
    ]
    assert set(labels) == {True, False} and made.rounds[0].pairs == len(labels)
    with Experiment(load_config(task), tmp_path / "run") as again:
        assert set(again.store.records("adapter")) >= {"kto", "shuffled", "sft_on_chosen"}


def test_what_is_wrong_in_kto_is_said_before_anything_is_asked(
    task: list[Path], tmp_path: Path
) -> None:
    with task[0].open("a") as file:
        file.write("\n[kto]\nbeta = 0.1\n")
    with pytest.raises(ConfigError, match=r"\[dpo\] and \[kto\] are both given: keep one"):
        load_config(task)
    rewrite(task[0], table_of("dpo", 1, 2), "")
    for bad, says in (
        ("betta = 0.1", 'betta: there is no such key. Did you mean "beta"'),
        ("lora_r = 8", "lora_r: there is no such key here: write r in lora"),
    ):
        text = task[0].read_text()
        rewrite(task[0], "[kto]\nbeta = 0.1", f"[kto]\n{bad}")
        with pytest.raises(ConfigError) as caught, Experiment(load_config(task), tmp_path / "run"):
            pass
        assert str(caught.value).startswith("[kto]:\n  ") and says in str(caught.value)
        task[0].write_text(text)
    assert not (tmp_path / "run").exists()


def test_a_cycle_of_steps_is_done_once_and_its_best_program_is_compared(
    cycle: list[Path], tmp_path: Path
) -> None:
    rewrite(
        cycle[0],
        "settings = { shots = 2 }",
        "settings = { shots = 2, longest = 200 }\nmax_tokens = 200",
    )
    run(cycle, tmp_path / "run")
    first = read_report(tmp_path / "run")
    assert [row.name for row in first.steps] == ["start", "shots", "weights", "own"]
    assert {"strong", "strong_prompted", "collaboration", "collaboration_sft"} <= {
        arm.name for arm in first.arms
    }
    with Experiment(load_config(cycle), tmp_path / "run") as experiment:
        calls = experiment.store.calls()
        again = experiment.cycle()
        assert experiment.store.calls() == calls
        assert experiment.ask(question="Test 1?").answer in ("yes", "no")
        state = (experiment.store.record("step", "1 shots") or {})["state"]
    assert state["refine"]["demos"] and not state["draft"]["demos"]
    assert again.steps == first.steps and again.arms == first.arms
    assert "Cycle, on the dev split" in cowest(
        "report", *map(str, cycle), "--run", str(tmp_path / "run")
    )


@pytest.mark.slow
def test_both_weights_steps_of_a_cycle_are_in_the_report_in_order(
    cycle: list[Path], tmp_path: Path
) -> None:
    rewrite(cycle[0], "sft -> shots -> weights -> own", "sft -> weights -> shots -> weights")
    run(cycle, tmp_path / "run")
    first = read_report(tmp_path / "run")
    assert [row.name for row in first.steps] == ["start", "weights", "shots", "weights"]
    assert [row.number for row in first.rounds] == [1, 2]
    assert [stage for stage in first.curves if stage.startswith("dpo")] == [
        "dpo",
        "dpo 2",
    ]
    assert set(influence_by_round(first.traces)) == {1, 2}
    files = [
        (tmp_path / "run" / name).read_text().splitlines()
        for name in ("pairs.jsonl", "pairs-2.jsonl")
    ]
    assert [row.pairs for row in first.rounds] == [len(lines) for lines in files]
    assert first.pairs and first.pairs.kept == sum(len(lines) for lines in files)
    assert {"collect", "collect 2", "dpo", "dpo 2", "dev", "dev 2"} <= {
        stage.name for stage in first.stages
    }
    with Experiment(load_config(cycle), tmp_path / "run") as experiment:
        calls = experiment.store.calls()
        again = experiment.cycle()
        assert experiment.store.calls() == calls
    assert (again.steps, again.rounds, again.curves, again.arms) == (
        first.steps,
        first.rounds,
        first.curves,
        first.arms,
    )


@pytest.mark.slow
def test_controls_of_a_cycle_are_trained_on_the_rows_of_its_weights_step(
    cycle: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, list[dict[str, object]]] = {}

    def watched(
        start: object,
        rows: list[dict[str, object]],
        settings: object,
        output: Path,
        **options: object,
    ) -> object:
        trained[output.name.rpartition("-")[0]] = rows
        return tune(start, rows, settings, output, **options)  # pyright: ignore

    monkeypatch.setattr("cowest_dspy.optimizers.run.tune", watched)

    def collected() -> tuple[dict[str, object] | None, dict[str, dict[str, object]], bytes]:
        with Store(tmp_path / "run") as store:
            return (
                store.record("done", "collect"),
                store.records("trace"),
                (tmp_path / "run" / "pairs.jsonl").read_bytes(),
            )

    run(cycle, tmp_path / "run")
    before = collected()
    rewrite(cycle[0], "controls = []", 'controls = ["shuffled"]')
    run(cycle, tmp_path / "run")
    assert collected() == before, (
        "the drafts of the report are those that the weights step has learned from"
    )
    sides = [
        [{str(row["chosen"]), str(row["rejected"])} for row in rows]
        for rows in (
            PreferencePairs.load(tmp_path / "run" / "pairs.jsonl").rows(),
            trained["dpo"],
            trained["shuffled"],
        )
    ]
    assert sides[0] == sides[1] == sides[2]
    with Store(tmp_path / "run") as store:
        assert "evaluate shuffled" in store.records("stage") and "shuffled" in store.records("arm")


@pytest.mark.slow
def test_a_step_whose_settings_have_changed_is_made_anew(cycle: list[Path], tmp_path: Path) -> None:
    def kept() -> tuple[dict[str, dict[str, object]], dict[str, str], int]:
        with Store(tmp_path / "run") as store:
            adapters = {name: record["model"] for name, record in store.records("adapter").items()}
            return store.records("step"), adapters, store.calls()

    run(cycle, tmp_path / "run")
    first, adapters, calls = kept()
    # A run of before settings were kept is read as it is.
    with Store(tmp_path / "run") as store:
        for key, record in first.items():
            store.keep(
                "step",
                key,
                {
                    name: value
                    for name, value in record.items()
                    if name not in ("settings", "rounds")
                },
            )
    run(cycle, tmp_path / "run")
    assert kept()[1:] == (adapters, calls)
    with Store(tmp_path / "run") as store:
        for key, record in first.items():
            store.keep("step", key, record)
    rewrite(cycle[0], "[dpo]\nmax_steps = 2", "[dpo]\nmax_steps = 3")
    run(cycle, tmp_path / "run")
    second, others, _ = kept()
    assert others["dpo"] != adapters["dpo"] and others["drafts"] == adapters["drafts"]
    assert (
        second["1 shots"] == first["1 shots"]
        and second["2 weights"]["settings"] != first["2 weights"]["settings"]
    )
    rewrite(cycle[0], "{ k = 1 }", "{ k = 2 }")
    run(cycle, tmp_path / "run")
    third, _, _ = kept()
    demos = [len(record["1 shots"]["state"]["refine"]["demos"]) for record in (second, third)]  # pyright: ignore
    assert demos == [1, 2]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("sft -> shots", "shots -> sft", "it can only be the first step"),
        ("-> own", "-> owm", r'names "owm", which is no step. Did you mean "own"'),
        (
            "LabeledFewShot",
            "LabelledFewShot",
            r'there is no "LabelledFewShot". Did you mean "LabeledFewShot"',
        ),
        ("{ k = 1 }", "{ kk = 1 }", r"LabeledFewShot has no kk"),
        ("toy.py:make", "toy.py:mkae", "mkae"),
        ('target = "refine"', 'target = "alone"', "cycle.steps.shots.target"),
    ],
)
def test_what_is_wrong_in_a_cycle_is_said_before_anything_is_asked(
    cycle: list[Path], tmp_path: Path, old: str, new: str, says: str
) -> None:
    rewrite(cycle[0], old, new)
    with (
        pytest.raises(Exception, match=says) as caught,
        Experiment(load_config(cycle), tmp_path / "run"),
    ):
        pass
    assert isinstance(caught.value, ConfigError) or "mkae" in says
    assert not (tmp_path / "run").exists()
