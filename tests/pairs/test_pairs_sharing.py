"""Pairs for others: the card, the folder, the upload to a Hub (one on loopback), and the command
that does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
from command_line import cowest
from hub import TOKEN, Hub, running_hub
from pair_traces import many

from cowest_dspy import Experiment, load_config
from cowest_dspy.errors import ConfigError, PairsError
from cowest_dspy.pairs import PreferencePairs, preference_pairs
from cowest_dspy.pairs.hub import dataset_card, write_dataset
from cowest_dspy.report import read_report

TWO = [[(1.0, "good"), (0.0, "bad"), (None, "x")], [(0.5, "fine"), (-0.5, "poor")]]
SECRET = "sk-" + "abcdefghijklmnop1234"


def test_the_card_says_what_the_pairs_are_and_leaves_the_licence_open() -> None:
    card = dataset_card(preference_pairs(many(TWO), strategy="all", leak="answer"))
    for said in (
        "| pairs | 2 |", "| examples | 2 |", "| mean influence of chosen drafts | +0.750 |",
        "| mean influence of rejected drafts | -0.250 |", "| drafts that failed (timeout) | 1 |", ("| weak | " "`local/weak@aa` " "|"),
        "| strong | `openai/strong` |", "| strategy | all |", "| margin | 0.5 |", ("| leak | " "answer " "|"), ("| cowest_dspy " "|"),
        "| dspy |", "| lengths | chosen 1.0 words, rejected 1.0, difference +0.0", ("None is given " "here"),
    ):  # fmt: skip
        assert said in card
    head = card.split("---")[1]
    assert "license" not in head and "path: data/train.jsonl" in head


def test_the_card_of_imported_pairs_claims_nothing_that_was_not_measured() -> None:
    card = dataset_card(
        PreferencePairs.from_dataset([{"prompt": "a|b", "chosen": "c", "rejected": "d"}])
    )
    assert "| influence | not measured |" in card and "imported from elsewhere" in card
    assert "strategy" not in card and "CoWest (" not in card and "Dropped" not in card


def test_no_secret_stands_in_a_card_and_none_in_a_draft_is_shared(tmp_path: Path) -> None:
    pairs = preference_pairs(many([[(1.0, f"use {SECRET}"), (0.0, "bad")]]), run=SECRET)
    named = PreferencePairs(pairs.items, {f"because of {SECRET}": 1})
    assert SECRET not in dataset_card(named) and "because of ***" in dataset_card(named)
    with pytest.raises(
        PairsError, match=r"Row 1 \(example e0\) holds what looks like a secret"
    ) as caught:
        write_dataset(tmp_path, pairs)
    assert SECRET not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_folder_is_a_dataset_as_it_is(tmp_path: Path) -> None:
    from datasets import load_dataset

    pairs = preference_pairs(many(TWO), run="toy\u2028")
    folder = write_dataset(tmp_path / "made", pairs)
    read = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(read) == ["train"]
    assert PreferencePairs.from_dataset(read["train"]).items == pairs.items


PUSH = """
import json, sys
from cowest_dspy.errors import PairsError
from cowest_dspy.pairs import PreferencePairs
try:
    print(PreferencePairs.load(sys.argv[1]).push_to_hub(sys.argv[2], private=json.loads(sys.argv[3])))
except PairsError as error:
    sys.exit(f"PairsError: {error}")
"""


def run(hub: Hub, *command: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which may reach the Hub on loopback: huggingface_hub reads
    its settings at import."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, check=False
    )


def test_pairs_are_pushed_with_their_card_privately_unless_it_is_said(tmp_path: Path) -> None:
    pairs = preference_pairs(many(TWO))
    file = str(pairs.save(tmp_path / "pairs.jsonl"))
    with running_hub() as hub:
        done = run(hub, "-c", PUSH, file, "someone/pairs", "true")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.url}/datasets/someone/pairs"
        assert hub.datasets == {"someone/pairs": True} and hub.commits == 1
        assert sorted(hub.files) == ["README.md", "data/train.jsonl"]
        rows = [json.loads(line) for line in hub.files["data/train.jsonl"].decode().splitlines()]
        assert rows == pairs.rows() and b"| pairs | 2 |" in hub.files["README.md"]
        assert not any(TOKEN.encode() in body for body in hub.bodies)
        assert run(hub, "-c", PUSH, file, "someone/open", "false").returncode == 0
        assert hub.datasets == {"someone/pairs": True, "someone/open": False} and hub.commits == 2


def test_what_is_to_be_private_is_not_put_into_a_public_dataset(tmp_path: Path) -> None:
    file = str(preference_pairs(many(TWO)).save(tmp_path / "pairs.jsonl"))
    with running_hub() as hub:
        hub.datasets["someone/open"] = False
        done = run(hub, "-c", PUSH, file, "someone/open", "true")
        assert done.returncode == 1 and "exists and is public: nothing was uploaded" in done.stderr
        assert hub.commits == 0 and hub.files == {}


def test_a_hub_that_refuses_says_what_to_do_and_repeats_no_token(tmp_path: Path) -> None:
    file = str(preference_pairs(many(TWO)).save(tmp_path / "pairs.jsonl"))
    with running_hub() as hub:
        refused = run(
            hub, "-c", PUSH, file, "someone/pairs", "true", token="hf_" + "notthis1234567890"
        )
        misnamed = run(hub, "-c", PUSH, file, "some one/pa irs", "true")
    for done in (refused, misnamed, run(hub, "-c", PUSH, file, "someone/pairs", "true")):
        assert (
            done.stderr.startswith("PairsError: The Hub did not take some")
            and "hf auth login" in done.stderr
        )
        assert (
            "Traceback" not in done.stderr
            and "notthis" not in done.stderr
            and TOKEN not in done.stderr
        )


RECIPE = (
    toy.RECIPE
    + toy.ROWS
    + """
def program():
    return Collaboration("question -> answer", draft="knowledge")

def weak():
    return ScriptedEngine(lambda request: "it is good" if request["config"]["seed"] % 2 else "bad", model="scripted/weak")

def strong():
    def answer(request):
        return "yes" if "good" in request["messages"][-1]["content"] else "no"
    return ScriptedEngine(answer, model="scripted/strong")
"""
)
TASK = (
    toy.TASK
    + """
[collect]
drafts = 6
[pairs]
{rules}
"""
    + toy.engine("weak")
    + toy.engine("strong")
)


def task(folder: Path, rules: str = "") -> str:
    (folder / "toy.py").write_text(RECIPE)
    (folder / "toy.toml").write_text(TASK.format(rules=rules))
    return str(folder / "toy.toml")


def test_the_command_shows_everything_and_uploads_only_when_it_is_told_to(tmp_path: Path) -> None:
    files = [task(tmp_path, 'strategy = "all"\nper_example = 1'), "--run", str(tmp_path / "run")]
    cowest("collect", *files)
    command = ["-m", "cowest_dspy.cli.main", "pairs", *files]
    with running_hub() as hub:
        done = run(hub, *command)
        assert done.returncode == 0, done.stderr
        assert hub.asked == []
        pushed = run(hub, *command, "--push", "someone/toy")
        assert (
            pushed.returncode == 0 and hub.datasets == {"someone/toy": True} and hub.commits == 1
        ), pushed.stderr
        assert f"uploaded: {hub.url}/datasets/someone/toy" in pushed.stdout
        assert run(hub, *command, "--push", "someone/more", "--public").returncode == 0
        assert hub.datasets["someone/more"] is False
        wrong = run(hub, *command, "--public")
        assert wrong.returncode == 1 and "give the dataset's name too" in wrong.stderr
    pairs = PreferencePairs.load(tmp_path / "run/pairs.jsonl")
    assert f"{len(pairs)} pairs in {tmp_path / 'run/pairs.jsonl'}" in done.stdout
    for said in (
        "strategy all, margin 0.5, per_example 1, near 0.95",
        "drafts equal to another",
        "lengths: chosen 3.0 words",
    ):
        assert said in done.stdout
    assert "Warning: Chosen drafts are longer" in done.stdout
    labels = [
        json.loads(line)["label"]
        for line in (tmp_path / "run/drafts.jsonl").read_text().splitlines()
    ]
    assert (
        f"{sum(labels)} drafts that helped and {len(labels) - sum(labels)} that hurt" in done.stdout
    )
    assert {pair.run for pair in pairs} == {"toy, seed 0"}


def test_the_report_shows_what_was_dropped_also_when_nothing_was_kept(tmp_path: Path) -> None:
    with Experiment(
        load_config([task(tmp_path, "length_ratio = 1.5")]), tmp_path / "run"
    ) as experiment:
        assert len(experiment.pairs()) == 0
        report = experiment.report()
    assert report.pairs is not None and report.pairs.kept == 0
    assert report.pairs.dropped["examples: lengths that differ by more than length_ratio"] > 0
    with Experiment(load_config([task(tmp_path)]), tmp_path / "run") as experiment:
        experiment.pairs()
        report = experiment.report()
    assert report.pairs is not None and report.pairs.kept > 0
    assert any("Chosen drafts are longer" in warning for warning in report.warnings)


def test_a_run_may_take_pairs_from_elsewhere_and_then_asks_no_model(tmp_path: Path) -> None:
    (tmp_path / "others.jsonl").write_text(
        json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n"
    )
    with Experiment(
        load_config([task(tmp_path, 'source = "others.jsonl"')]), tmp_path / "run"
    ) as experiment:
        pairs = experiment.pairs()
        assert experiment.store.calls() == 0
        experiment.report()
    assert pairs.rows(lineage=False)[0]["chosen"] == [{"role": "assistant", "content": "c"}]
    kept: Any = read_report(tmp_path / "run").pairs
    assert (kept.kept, kept.rows[0].chosen_influence) == (1, None)
    assert (
        "influence"
        not in (tmp_path / "run/report.html").read_text().partition('<div class="helped">')[2][:60]
    )


@pytest.mark.parametrize(
    "rules",
    [
        'strategy = "best"',
        "near = 0",
        "length_ratio = 0.9",
        'source = "pairs.csv"',
        "per_example = 0",
    ],
)
def test_rules_that_cannot_be_are_refused_in_a_file(rules: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"pairs.{rules.split()[0]}"):
        load_config([task(tmp_path, rules)])
