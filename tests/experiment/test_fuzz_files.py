"""Every file that the library reads, damaged in a thousand ways: it is read, or there is an error
of ours; never another exception.

Each case is a seed, so that what fails here fails again. Files are changed as bytes (flipped, cut,
repeated), as text (deep nesting, huge numbers, halves of surrogate pairs in the place of a value)
and, where they are JSON, value by value.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import report_runs
from bundled import small_bundle
from rich.console import Console
from tiny import make_adapter

from cowest_dspy.cli.progress import Progress, describe_end, show_new, view
from cowest_dspy.cli.scaffold import new_domain
from cowest_dspy.errors import CowestError
from cowest_dspy.experiment.bundle import open_bundle, read_manifest
from cowest_dspy.experiment.config import fingerprint, load_config
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.experiment.data import read_split
from cowest_dspy.lms.local import lora
from cowest_dspy.lms.local.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_hash
from cowest_dspy.optimizers.router import Router
from cowest_dspy.pairs import PreferencePairs, UnpairedPreferences
from cowest_dspy.report import arm_table, read_report, verdict, write_report
from cowest_dspy.report.runs import describe_run
from cowest_dspy.store import serialize
from cowest_dspy.store.progress import read_snapshot
from cowest_dspy.store.repair import repair
from cowest_dspy.store.store import Store
from cowest_dspy.utils.hiding import names_hidden_in

ROOT = Path(__file__).parents[2]
DEEP = ["[" * depth + "]" * depth for depth in (3, 200, 20_000)]
LARGE = ["1e308", "-1e-320", "1e999", "9" * 400, "9" * 5000, "NaN", "inf"]
ODD = [
    "null",
    "true",
    "-1",
    "0",
    *LARGE,
    '""',
    '"x"',
    '"\\ud800"',
    '"\\u0000"',
    "[]",
    "{}",
    *DEEP,
    '{"a": {"b": 1}}',
    "1979-05-27",
]
TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null|\[\]')


@dataclass(frozen=True)
class Format:
    """A file: its name, how a whole one is made in a folder, and how the library reads it there."""

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


def _task(folder: Path) -> None:
    for file in ("medmcqa.toml", "backends/openai.toml"):
        with (folder / "task.toml").open("a") as whole:
            whole.write((ROOT / "programs" / file).read_text() + "\n")


def _read_task(folder: Path) -> None:
    config = load_config([folder / "task.toml"])
    fingerprint(config)
    shutil.copy(folder / "task.toml", folder / "config.toml")
    (folder / "again.toml").write_text(effective_toml(config), encoding="utf-8")
    assert fingerprint(load_config([folder / "again.toml"])) == fingerprint(config)


def _rows(folder: Path) -> None:
    rows = [
        {"question": f"{i}?", "options": ["a", "b"], "answer": "a", "n": i, "split": "train"}
        for i in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pairs(folder: Path) -> None:
    message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    scores = {
        "chosen_influence": 1.0,
        "rejected_influence": 0.0,
        "chosen_index": 0,
        "rejected_index": 1,
        "round": 1,
        "example_id": "a",
    }
    sides = {"chosen": message("assistant", "yes"), "rejected": message("assistant", "no")}
    rows = [{"prompt": message("user", f"{i}?"), **sides, **scores} for i in range(3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_pairs(folder: Path) -> None:
    pairs = PreferencePairs.load(folder / "pairs.jsonl")
    pairs.save(folder / "again.jsonl")
    assert PreferencePairs.load(folder / "again.jsonl").rows() == pairs.rows()
    _ = pairs.lengths, pairs._repr_html_(), pairs.examples


def _drafts(folder: Path) -> None:
    facts = {
        "draft_index": 0,
        "influence": 1.0,
        "score": None,
        "alone_score": 0.0,
        "weak_model": "w",
        "strong_model": "s",
        "round": 1,
    }
    texts = {
        "prompt": [{"role": "user", "content": "?"}],
        "completion": [{"role": "assistant", "content": "!"}],
    }
    rows = [
        {**texts, "label": bool(i), "example_id": f"e{i}", **facts, "run": ""} for i in range(2)
    ]
    (folder / "drafts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_drafts(folder: Path) -> None:
    drafts = UnpairedPreferences.load(folder / "drafts.jsonl")
    drafts.save(folder / "again.jsonl")
    assert UnpairedPreferences.load(folder / "again.jsonl").rows() == drafts.rows()
    _ = drafts._repr_html_()


def _report(folder: Path) -> None:
    write_report(report_runs.full_run(), folder)
    facts = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(
        json.dumps({key: value for key, value in facts.items() if key != "numbers"})
    )


def _read_report(folder: Path) -> None:
    report = read_report(folder)
    _ = verdict(report), arm_table(report), describe_run(folder)


def _run(folder: Path) -> None:
    """A store with calls and records, and its state."""
    request = serialize.request_from_messages("m", [{"role": "user", "content": "why?"}], seed=1)
    with (
        Store(folder) as store,
        store.spending("collect"),
        store.journal.stage("collect", "Collecting") as here,
    ):
        here.at(1, 2)
        store.journal.about(task="toy", command="cowest collect toy.toml")
        store.answer(request, lambda: serialize.make_response("m", "yes", "stop", 3, 1, usd=0.5))
        store.keep("trace", "1/a/0", {"draft": "x" * 200})
        store.keep(
            "stage",
            "collect",
            dict.fromkeys(
                ("seconds", "calls", "cached_calls", "tokens_in", "tokens_out", "usd"), 1
            ),
        )


def _read_progress(folder: Path) -> None:
    now = read_snapshot(folder)
    if now is not None:
        screen = Console(file=io.StringIO(), width=80)
        show_new(now, Progress(screen=screen), [], 0)
        screen.print(view(now), *describe_end(now))
    describe_run(folder)
    Store(folder).close()


def _read_store(folder: Path) -> None:
    describe_run(folder)
    try:
        with Store(folder) as store:
            _ = (
                store.bill(),
                store.records("stage"),
                list(store.each("trace")),
                store.count("trace"),
                store.calls(),
            )
    finally:
        shutil.copy(folder / "run.sqlite", folder / "kept")
        repair(folder)
        with Store(folder) as store:
            _ = store.records("stage"), list(store.each("trace"))


def _router(folder: Path) -> None:
    head = {"weights": [0.5, 1.0], "intercept": 0.0}
    facts = {
        "features": ["words", "is: yes"],
        "seed": 3,
        "about": {"n": 4},
    }
    router = Router.model_validate(
        {
            **facts,
            "heads": dict.fromkeys(("strong", "collaborate"), head),
            "costs": {"weak": 0, "strong": 0.5, "collaborate": 1},
        }
    )
    router.save(folder)


def _read_csv(folder: Path) -> None:
    for split in ("train", "test"):
        read_split(f"{folder}/loans.py:examples", split, ["question"])


FORMATS = [
    Format("task.toml", _task, _read_task),
    Format(
        "config.toml",
        lambda folder: (_task(folder), (folder / "task.toml").rename(folder / "config.toml")),
        names_hidden_in,
    ),
    Format(
        "rows.jsonl",
        _rows,
        lambda folder: read_split(str(folder / "rows.jsonl"), "train", ["question", "options"]),
    ),
    Format("loans.csv", lambda folder: new_domain("loans", folder), _read_csv),
    Format("pairs.jsonl", _pairs, _read_pairs),
    Format("drafts.jsonl", _drafts, _read_drafts),
    Format("report.json", _report, _read_report),
    Format("progress.json", _run, _read_progress),
    Format("run.sqlite", _run, _read_store),
    Format("router.json", _router, Router.load),
]


def _formats_of_weights(base: Path) -> dict[str, Format]:
    """An adapter's two files and a bundle's manifest, which are made with a model."""

    def read_adapter(folder: Path) -> None:
        assert adapter_hash(folder) == lora.identify(folder, base)

    def read_bundle(folder: Path) -> None:
        read_manifest(folder)
        bundle = open_bundle(folder)
        _ = bundle.manifest.recipe, [bundle.read(name) for name in bundle.manifest.files]

    forms = [
        Format(name, lambda folder: make_adapter(base, folder, seed=1), read_adapter)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    ]
    return {
        form.name: form
        for form in [
            *forms,
            Format("cowest.json", lambda folder: small_bundle(folder, base), read_bundle),
        ]
    }


WITH_WEIGHTS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "cowest.json")


# Damage


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """A file's bytes with one to three faults in them."""
    for _ in range(chance.randint(1, 3)):
        whole = chance.choice([_flipped, _cut, _repeated, _odd, _odd, _retyped, _retyped])(
            whole, chance
        )
    return whole


def _flipped(whole: bytes, chance: random.Random) -> bytes:
    made = bytearray(whole)
    for _ in range(chance.choice([1, 1, 8]) if made else 0):
        made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
    return bytes(made)


def _cut(whole: bytes, chance: random.Random) -> bytes:
    start, end = sorted(chance.randint(0, len(whole)) for _ in range(2))
    return whole[:start] if chance.random() < 0.5 else whole[:start] + whole[end:]


def _repeated(whole: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(whole))
    return whole[:start] + whole[start : start + chance.randint(1, 200)] * 2 + whole[start:]


def _odd(whole: bytes, chance: random.Random) -> bytes:
    """Another value in the place of some token."""
    tokens = list(TOKEN.finditer(whole))
    if not tokens:
        return whole
    one = chance.choice(tokens)
    return whole[: one.start()] + chance.choice(ODD).encode() + whole[one.end() :]


def _retyped(whole: bytes, chance: random.Random) -> bytes:
    """Of JSON, or a line of JSON Lines: another value in the place of some value, deep or not; or a
    key more, or less."""
    lines = whole.split(b"\n")
    place = chance.randrange(len(lines))
    try:
        value = json.loads(lines[place])
    except (ValueError, RecursionError):
        return _odd(whole, chance)
    table: Any = value
    while isinstance(table, dict | list) and table:
        key = (
            chance.choice(list(table)) if isinstance(table, dict) else chance.randrange(len(table))
        )
        if chance.random() < 0.3 or not isinstance(table[key], dict | list):
            if isinstance(table, dict) and chance.random() < 0.2:
                table[chance.choice([f"{key}x", "id", ""])] = table.pop(key)
            else:
                table[key] = chance.choice(
                    [
                        None,
                        True,
                        -1,
                        10**20,
                        1e300,
                        "",
                        "x",
                        "\ud800",
                        [],
                        {},
                        [None],
                        {"a": []},
                        [1] * 50,
                    ]
                )
            break
        table = table[key]
    lines[place] = json.dumps(value).encode()
    return b"\n".join(lines)


def check(form: Format, folder: Path, seeds: range) -> None:
    """Damages the file once for each seed, and reads it."""
    (folder / "whole").mkdir()
    form.make(folder / "whole")
    whole = (folder / "whole" / form.name).read_bytes()
    form.read(folder / "whole")
    wrong: list[str] = []
    for seed in seeds:
        work = folder / f"{form.name}-{seed}"
        shutil.copytree(folder / "whole", work)
        (work / form.name).write_bytes(damaged(whole, random.Random(f"{form.name} {seed}")))
        try:
            form.read(work)
        except CowestError:
            pass
        except Exception as error:  # whatever it is: that is the question
            last = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(
                f"{seed}: {type(error).__name__}: {str(error)[:200]} "
                f"({last.filename}:{last.lineno}), {work / form.name}"
            )
            continue
        shutil.rmtree(work)
    assert wrong == []


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_damaged_file_is_read_or_refused(form: Format, tmp_path: Path) -> None:
    check(
        form,
        tmp_path,
        range(20 if form.name in ("run.sqlite", "progress.json", "loans.csv") else 100),
    )


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_damaged_adapter_or_bundle_is_read_or_refused(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    check(_formats_of_weights(tiny_model)[name], tmp_path, range(100))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_damaged_adapter_or_bundle_is_read_or_refused_a_thousand_times(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    check(_formats_of_weights(tiny_model)[name], tmp_path, range(100, 1000))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_damaged_file_is_read_or_refused_a_thousand_times(form: Format, tmp_path: Path) -> None:
    check(
        form,
        tmp_path,
        range(100, 600 if form.name in ("run.sqlite", "progress.json", "loans.csv") else 5000),
    )
