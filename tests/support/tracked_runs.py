"""Runs for the tests of tracking: a store as a finished run leaves it, without a model; and a task
that asks scripted ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import toy

from cowest_dspy import Store, load_config
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.influence.arms import Answer
from cowest_dspy.optimizers.rounds import Round, gain
from cowest_dspy.optimizers.run import NoProgress
from cowest_dspy.report import Arm
from cowest_dspy.store.journal import Event
from cowest_dspy.store.progress import Snapshot

KEY = "sk-" + "proj-Ab1Cd2Ef3Gh4Ij5Kl6"
"""What looks like an API's key, and is none."""
SECRET_PLACE = "https://someone:hunter2secret@models.example/v1"

RECIPE = (
    toy.RECIPE
    + '''
def rows(split, seed=0):
    count = {"train": 4, "dev": 2, "test": 3}[split]
    return [{"id": f"{split}{i}", "question": f"{split} {i} ladder?", "answer": "yes"} for i in range(count)]

def program():
    return Collaboration("question -> answer", draft="knowledge")

def weak():
    """Every other draft helps."""
    return ScriptedEngine(lambda ask: "It is so." if ask["config"].get("seed", 0) % 2 else "Who knows.", model="scripted/weak")

def strong():
    return ScriptedEngine(
        lambda ask: "yes" if "It is so" in ask["messages"][-1]["content"] else "no", model="scripted/strong")
'''
)


@dataclass
class Said(NoProgress):
    """Keeps the messages that it is told."""

    lines: list[str] = field(default_factory=list)

    def update(self, event: Event, snapshot: Snapshot) -> None:
        if event == "message":
            self.lines.append(snapshot.said[-1])

    def say(self, text: str) -> None:
        self.lines.append(text)


def files(folder: Path, tracking: str = "", more: str = "") -> list[Path]:
    """The task on scripted models, with a table [tracking] of these lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.py").write_text(RECIPE)
    table = f"[tracking]\n{tracking}\n" if tracking else ""
    tables = f"[collect]\ndrafts = 2\n{table}{more}\n" + toy.engine("weak") + toy.engine("strong")
    (folder / "toy.toml").write_text(toy.TASK + tables)
    return [folder / "toy.toml"]


def config(folder: Path, tracking: str = 'to = ["mlflow"]', more: str = "") -> Config:
    return load_config(files(folder, tracking, more))


def history(base: float, steps: int = 5) -> list[dict[str, float]]:
    """What a training logs."""
    return [
        {
            "step": step,
            "loss": base / step,
            "rewards/margins": 0.1 * step,
            "rewards/accuracies": 1.0,
        }
        for step in range(1, steps + 1)
    ]


def finished(
    run: Path, settings: Config, *, adapter: str = "a1a1a1a1a1a1", rounds: int = 2
) -> None:
    """Leaves in ``run`` what a run of so many rounds leaves there: records of its store, its pairs
    and its configuration."""
    with Store(run) as store:
        cost = {
            "seconds": 2.5,
            "calls": 12,
            "tokens_in": 340,
            "tokens_out": 56,
            "usd": 0.25,
            "cached_calls": 3,
        }
        cost |= {"peak_memory_bytes": 1000, "note": ""}
        names = [
            "drafts",
            "collect",
            "dpo",
            "dev",
            "collect 2",
            "dpo 2",
            "dev 2",
            "evaluate strong",
        ]
        for name in names[: 4 * rounds] + names[-1:]:
            store.keep("stage", name, cost)
        kept = {"folder": "adapters/x", "model": "local/tiny@0123+sft"}
        store.keep("adapter", "drafts", {"identity": "sft", "history": history(6.0, 4), **kept})
        before = {f"d{n}": 0.0 for n in range(8)}
        for number in range(1, rounds + 1):
            name = "dpo" if number == 1 else f"dpo {number}"
            found = gain(
                before, {key: float(int(key[1]) < (6 if number == 1 else 0)) for key in before}
            )
            model = f"local/tiny@0123+{adapter}{number}"
            outcome = "accepted" if number == 1 else "rolled back"
            made = Round(
                number, "local/tiny@0123+sft", model, 9 - number, 0, outcome, f"gain {found}", found
            )
            store.keep(
                "adapter",
                name,
                {
                    "identity": f"{adapter}{number}",
                    "history": history(number),
                    **kept,
                    "model": model,
                },
            )
            store.keep("round", str(number), asdict(made))
            store.keep(
                "pairs",
                name.replace("dpo", "dropped"),
                {"the same influence": 4, "no influence": number},
            )
        store.keep("final", "weak", {"adapter": "dpo", "model": f"local/tiny@0123+{adapter}1"})
        for name, marks in (("strong", (1.0, 0.0, None)), ("collaboration", (1.0, 1.0, 1.0))):
            answers = [
                Answer(
                    f"t{n}",
                    {"question": f"test {n} ladder?"},
                    "yes",
                    "yes",
                    mark,
                    "timeout" if mark is None else None,
                )
                for n, mark in enumerate(marks)
            ]
            store.keep("arm", name, {**asdict(Arm(name, name, tuple(answers))), "identity": "i"})
    row = {
        "prompt": f"A ladder? My key is {KEY}",
        "chosen": "It is so.",
        "rejected": "Who knows.",
        "example_id": "q0",
    }
    (run / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (run / "config.toml").write_text(effective_toml(settings), encoding="utf-8")
