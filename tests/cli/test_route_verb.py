"""``cowest route RUN``: from a run's traces to a router in its folder, one more arm, a page; the
second time nothing is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from live_task import cowest
from served_process import running
from serving_parts import body, post
from toy import engine

from cowest_dspy import Experiment, load_config
from cowest_dspy.errors import RouterError
from cowest_dspy.optimizers.router import Router

RECIPE = """
import random

import dspy

from cowest_dspy import Collaboration
from cowest_dspy.testing import ScriptedEngine

NAMES = ("Arbel", "Morva", "Raven", "Osprey")


def rows(split, seed=0):
    start, count = {"train": (0, 30), "dev": (100, 20), "test": (200, 24)}[split]
    asked = [f"May the {NAMES[n % 4]} carry {n} boxes?" for n in range(start, start + count)]
    return [{"id": f"{split}{n}", "question": q, "answer": "yes" if n % 2 else "no"} for n, q in enumerate(asked, start)]


def program(draft="direct"):
    return Collaboration("question -> answer", draft=draft)


def match(example, prediction, trace=None):
    return float(prediction.answer == example.answer)


def _number(text):
    return int("".join(char for char in text.partition("carry ")[2].partition(" ")[0] if char.isdigit()))


def weak():
    def draft(request):
        text, seed = request["messages"][-1]["content"], request["config"].get("seed") or 0
        sure = "Arbel" in text or "Raven" in text
        right = "yes" if _number(text) % 2 else "no"
        wrong = "no" if right == "yes" else "yes"
        if sure:
            return right
        return random.Random(seed).choice([right, wrong, "perhaps"])

    return ScriptedEngine(draft, model="scripted/weak")


def strong():
    def answer(request):
        text = request["messages"][-1]["content"]
        said = text.partition("Background: ")[2].split("\\n")[0].strip()
        return said if said in ("yes", "no") else ("yes" if _number(text) % 3 else "no")

    return ScriptedEngine(answer, model="scripted/strong")
"""

TASK = """
name = "boxes"
draft = "direct"
program = "boxes.py:program"
metric = "boxes.py:match"
[data]
source = "boxes.py:rows"
inputs = ["question"]
[collect]
drafts = 4
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "boxes.py").write_text(RECIPE)
    (tmp_path / "boxes.toml").write_text(
        TASK + (engine("weak") + engine("strong")).replace("toy.py", "boxes.py")
    )
    return tmp_path


def test_the_verb_fits_a_router_that_the_run_and_its_report_have_from_then_on(folder: Path) -> None:
    assert "no config.toml" in _error(folder, "route", "nowhere")
    cowest(folder, "evaluate", "boxes.toml", "--run", "run", "--arm", "strong")
    assert "cowest collect" in _error(folder, "route", "run")
    cowest(folder, "collect", "boxes.toml", "--run", "run")
    said = cowest(folder, "route", "run")
    assert (
        "Score and cost (strong tokens) on 24 held-out examples" in said
        and "always collaborate" in said
    )
    router = Router.load(folder / "run")
    assert (
        router.samples == 3
        and "agreement" in router.features
        and "weak" in router.heads
        and "logprob" not in router.features
    )
    curve = json.loads((folder / "run/router_curve.json").read_text())
    points = {point["name"]: point for point in curve["points"]}
    # Drafts of two of the names are always right: they need no strong model.
    assert (
        points["router"]["cost"] < 0.8
        and points["router"]["score"] >= points["random, in the router's shares"]["score"]
    )
    report = json.loads((folder / "run/report.json").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert {"strong", "routed"} <= arms.keys() and len(arms["routed"]["answers"]) == 24
    routes = [answer["steps"]["route"] for answer in arms["routed"]["answers"]]
    assert routes.count("weak") == points["router"]["routes"]["weak"] > 0
    assert sum(answer["score"] for answer in arms["routed"]["answers"]) / 24 == pytest.approx(
        points["router"]["score"]
    )
    assert "by the router" in (folder / "run/report.html").read_text()

    with Experiment(load_config([folder / "run/config.toml"]), folder / "run") as experiment:
        before = experiment.store.calls()
        assert "routed" in experiment.arm_names()
    assert "held-out" in cowest(folder, "route", "run", "--within", "0.05", "--log", "plain")
    with Experiment(load_config([folder / "run/config.toml"]), folder / "run") as experiment:
        assert experiment.store.calls() == before, "nothing is asked twice"


@pytest.mark.slow
def test_what_is_served_goes_by_the_router_of_its_run(folder: Path) -> None:
    cowest(folder, "collect", "boxes.toml", "--run", "run")
    cowest(folder, "route", "run")
    for options, routed in ((), True), (("--no-router",), False):
        with running(folder, "boxes.toml", "--run", "run", "--port", "0", *options) as (
            process,
            address,
            said,
        ):
            routes = set()
            for number in range(2, 10):
                made = post(
                    address, {**body(f"May the Arbel carry {number} boxes?"), "model": "boxes"}
                )
                answer = "yes" if number % 2 else "no"
                assert made.json()["choices"][0]["message"]["content"] == answer
                routes.add(made.headers["x-cowest-route"])
            process.terminate()
            assert process.wait(timeout=60) == 0
        assert any("router.json says where" in line for line in said) == routed
        assert routes == ({"weak"} if routed else {"collaborate"})


@pytest.mark.slow
def test_samples_and_likelihood_as_asked_for(folder: Path) -> None:
    cowest(folder, "collect", "boxes.toml", "--run", "run")
    cowest(folder, "route", "run", "--samples", "0")
    router = Router.load(folder / "run")
    assert router.samples == 0 and "agreement" not in router.features
    assert "no log-probabilities" in _error(folder, "route", "run", "--likelihood")


def _error(folder: Path, *arguments: str) -> str:
    from live_task import started

    with started(folder, *arguments) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in error
    return error


def test_the_old_verb_and_file_name_the_new_ones(tmp_path: Path) -> None:
    assert "`cowest gate` is now `cowest route`" in _error(
        tmp_path, "gate", "run", "--samples", "0"
    )
    (tmp_path / "gate.json").write_text("{}")
    with pytest.raises(RouterError, match=r"gate\.json is .* older .* `cowest route RUN`"):
        Router.load(tmp_path)
