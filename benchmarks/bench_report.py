"""A report of 10,000 traces: how long it takes to write, how large the page is, how fast a browser
opens it and searches it.

python benchmarks/bench_report.py                      # the table of benchmarks/README.md
python benchmarks/bench_report.py --traces 100000      # more than a page holds: it samples, and
    says so
python benchmarks/bench_report.py --keep DIR           # leaves report.html and report.json there

The run is made up, from a seed: arms, rounds, pairs, curves, stages, and drafts of the size that
small models write. Wants Chromium and the package playwright for the last three rows.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

from cowest_dspy.influence import NoiseFloor, Trace
from cowest_dspy.influence.arms import Answer
from cowest_dspy.optimizers.rounds import Gain, Round
from cowest_dspy.pairs import Pair
from cowest_dspy.pairs.dataset import Message
from cowest_dspy.report import (
    Arm,
    PairsSummary,
    RunReport,
    Stage,
    write_report,
)
from cowest_dspy.report.facts import LOGGED, Curve

PLANT = """
valve pump boiler seal pressure pipe gauge filter drain motor shaft bearing flange tank feed line return check relief steam water
oil before after each shift weekly open close replace inspect holds at most bar degrees litres when the is of and in
"""
WORDS = PLANT.split()
CHROMIUM = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)


def made_run(traces: int, *, drafts: int = 4, held_out: int = 200, seed: int = 0) -> RunReport:
    """A run with ``traces`` drafts over two rounds, ``drafts`` of each example, and ``held_out``
    test questions in four arms."""
    draw = random.Random(seed)
    shares = {"strong": 0.31, "weak": 0.42, "collaboration_sft": 0.62, "collaboration": 0.74}
    titles = {
        "strong": "strong alone",
        "weak": "weak alone, fine-tuned to answer",
        "collaboration_sft": "collaboration, before preference tuning",
        "collaboration": "collaboration, after preference tuning",
    }
    questions = [text(draw, 40) for _ in range(held_out)]
    arms = tuple(_arm(draw, name, titles[name], questions, share) for name, share in shares.items())
    rows = tuple(
        _trace(draw, index // drafts, index % drafts, round=1 + (index >= traces // 2))
        for index in range(traces)
    )
    rows = tuple(_beside(row, rows[index - index % drafts]) for index, row in enumerate(rows))
    return RunReport(
        title="handbook: weak-strong collaboration",
        created="2025-06-01T12:00:00+00:00",
        seed=seed,
        reference="collaboration",
        rivals=("strong", "weak"),
        before="collaboration_sft",
        after="collaboration",
        arms=arms,
        noise=NoiseFloor(100, 4, 0.04, 0.04),
        pairs=_pairs(draw, rows),
        rounds=(
            Round(
                1,
                "small",
                "small@1",
                640,
                0,
                "accepted",
                "the interval of the gain lies above 0",
                Gain(120, 120, 0.4, 0.517, 0.117, 0.042, 0.192, 0.95, 20, 6, 0, 0),
            ),
            Round(
                2,
                "small@1",
                "small@2",
                702,
                128,
                "rolled back",
                "the interval of the gain includes 0",
                Gain(120, 120, 0.517, 0.525, 0.008, -0.05, 0.067, 0.95, 9, 8, 0, 0),
            ),
        ),
        curves={
            "sft": _curve(draw, 300, preferences=False),
            "dpo": _curve(draw, 160, preferences=True),
        },
        stages=(
            Stage("sft", 421.5, peak_memory_bytes=2_900_000_000, usd=0.0),
            Stage(
                "collect",
                1893.2,
                traces * 5 // 4,
                traces * 410,
                traces * 62,
                312,
                3_100_000_000,
                1.84,
            ),
            Stage("pairs", 3.1, 0, 0, 0, 0, None, 0.0),
            Stage("dpo", 702.9, peak_memory_bytes=4_300_000_000, usd=0.0),
            Stage("evaluate", 388.0, 4 * held_out, 330_000, 41_000, 0, 3_100_000_000, 0.21),
        ),
        traces=rows,
        config={
            "name": "handbook",
            "seed": seed,
            "weak": {"kind": "transformers", "max_tokens": 96},
            "dpo": {"beta": 0.1},
        },
        versions={"python": "3.11.9", "dspy": "3.4.1"},
        warnings=(
            f"{sum(row.error is not None for row in rows)} of {traces} drafts failed: they have "
            "no influence and are in no pair.",
        ),
    )


def text(draw: random.Random, words: int) -> str:
    """About so many words, as sentences."""
    found = " ".join(draw.choices(WORDS, k=max(4, round(draw.gauss(words, words / 5))))) + "."
    return found[0].upper() + found[1:]


def _arm(draw: random.Random, name: str, title: str, questions: list[str], share: float) -> Arm:
    answers = []
    for index, question in enumerate(questions):
        failed, right = draw.random() < 0.01, draw.random() < share
        number = str(draw.randint(10, 90))
        draft = text(draw, 25) if name.startswith("collaboration") else None
        score, error = (None, "timeout: 60 s") if failed else (float(right), None)
        answers.append(
            Answer(
                f"q{index}",
                {"question": question},
                number,
                None if failed else number,
                score,
                error,
                draft,
                {"working": text(draw, 12)},
            )
        )
    return Arm(
        name,
        title,
        tuple(answers),
        "the instructions of refining, less the draft" if name == "strong" else "",
    )


def _trace(draw: random.Random, example: int, index: int, *, round: int) -> Trace:
    draft, alone = text(draw, 45), float(draw.random() < 0.3)
    failed = draw.random() < 0.02
    correct = float(draw.random() < 0.45)
    helps = draw.random() < (0.75 if correct else 0.1)
    refined = None if failed else (1.0 if helps else alone if draw.random() < 0.85 else 0.0)
    return Trace(
        example_id=f"t{example}",
        draft_index=index,
        round=round,
        inputs={"question": text(draw, 60), "options": text(draw, 20)},
        gold={"answer": str(draw.randint(10, 90))},
        prompt=(),
        completion=draft,
        draft=draft,
        refined=None
        if failed
        else {"working": text(draw, 14), "answer": str(draw.randint(10, 90))},
        alone={"working": text(draw, 14), "answer": str(draw.randint(10, 90))},
        refined_score=refined,
        alone_score=alone,
        influence=None if refined is None else refined - alone,
        draft_score=correct,
        error="parse: no answer" if failed else None,
        weak_model="models/small-135M",
        strong_model="models/large-1.5B",
    )


def _beside(row: Trace, first: Trace) -> Trace:
    """The row as a draft of the same example as the first one: the same input, and the same answer
    without a draft."""
    alone = first.alone_score or 0.0
    influence = None if row.refined_score is None else row.refined_score - alone
    facts = {name: getattr(first, name) for name in ("inputs", "gold", "alone", "alone_score")}
    return Trace(**{**vars(row), **facts, "influence": influence})


def _pairs(draw: random.Random, rows: tuple[Trace, ...]) -> PairsSummary:
    pairs = []
    for row in rows[: len(rows) // 3 : 4]:
        words = row.draft.split()
        for _ in range(3):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        prompt = "\n".join(str(value) for value in row.inputs.values())
        asked, chosen, rejected = (
            (Message(role=role, content=text),)
            for role, text in (
                ("user", prompt),
                ("assistant", row.draft),
                ("assistant", " ".join(words)),
            )
        )
        pairs.append(
            Pair(
                asked,
                chosen,
                rejected,
                row.example_id,
                row.draft_index,
                row.draft_index + 1,
                1.0,
                draw.choice([0.0, -1.0]),
                row.weak_model,
                row.strong_model,
                row.round,
            )
        )
    dropped = {
        "drafts equal to another": 74,
        "examples: all drafts had the same influence": 310,
        "drafts that failed (parse)": 41,
    }
    return PairsSummary(len(pairs), len(pairs), dropped, tuple(pairs))


def _curve(draw: random.Random, steps: int, *, preferences: bool) -> Curve:
    points = []
    names = tuple(LOGGED) if preferences else ("loss",)
    for step in range(1, steps + 1):
        fall = 0.69 * 0.985**step
        margin = 2.1 * (1 - 0.985**step)
        noisy = [
            fall + draw.gauss(0, 0.02),
            margin + draw.gauss(0, 0.08),
            min(1.0, 0.5 + margin / 4),
            -margin / 20,
        ]
        points.append({"step": float(step), **dict(zip(names, noisy, strict=False))})
        if step % 20 == 0:
            held = [fall + 0.06, margin * 0.8, min(1.0, 0.5 + margin / 5), -margin / 25]
            evaluated = (f"eval_{name}" for name in names)
            points.append({"step": float(step), **dict(zip(evaluated, held, strict=False))})
    return tuple(points)


def opened(page_file: Path) -> dict[str, float]:
    """Seconds until the page can be read and used, until a word is found, and until a filter is
    applied, in Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=list(CHROMIUM)
        )
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(page_file.as_uri())
        page.wait_for_selector("#traces tbody tr")
        ready = time.perf_counter() - start
        start = time.perf_counter()
        page.fill(
            "#traces input[type=search]", "relief boiler"
        )  # the page has answered when this comes back
        searched = time.perf_counter() - start
        start = time.perf_counter()
        page.select_option("#traces select", "hurt")
        filtered = time.perf_counter() - start
        browser.close()
    return {"opened, ready to use": ready, "searched for two words": searched, "filtered": filtered}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument(
        "--keep", type=Path, help="where the files stay; without it they are deleted"
    )
    given = parser.parse_args()
    report = made_run(given.traces)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        start, used = time.perf_counter(), time.process_time()
        written = write_report(report, folder)
        print(
            f"{'written':<28}{time.perf_counter() - start:8.2f} s, "
            f"{time.process_time() - used:.2f} s of processor"
        )
        for path in (written.html, written.json):
            print(f"{path.name:<28}{path.stat().st_size / 1e6:8.2f} MB")
        if shutil.which("chromium") is None:
            print("no Chromium, so nothing was opened: apt install chromium")
            return
        for name, seconds in opened(written.html).items():
            print(f"{name:<28}{seconds:8.2f} s")


if __name__ == "__main__":
    main()
