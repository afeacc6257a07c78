"""The GeoQuery recipe on invented islands: folds by shape, what is taught, drafts with what running
them gave, through influence, pairs and the router."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from domain_rows import ISLANDS, islands, write_rows

from cowest_dspy import Collaboration, Experiment, load_config
from cowest_dspy.errors import ConfigError, DataError, ProgramError
from cowest_dspy.experiment.arms import answerer
from cowest_dspy.experiment.comparing import Compared
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.data import SPLITS, check_apart, configured_split, load_program
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling, Traces
from cowest_dspy.optimizers.router import DraftLikelihood, Routed, drafter_features
from cowest_dspy.optimizers.router_fitting import fit_router, observe, observe_traces
from cowest_dspy.pairs import preference_pairs
from cowest_dspy.program.examples import examples as as_examples
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.tuning.data import sft_rows
from cowest_dspy.utils import importing
from cowest_dspy.utils.sql import QueryResult, run_query

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "programs/geoquery.py"
ALL = ("archive", "train", "dev", "test")
match = importing.load(f"{ROOT}/metrics/sql_results.py:execution_match")


def named(name: str) -> Any:
    return importing.load(f"{RECIPE}:{name}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(islands(tmp_path_factory.mktemp("islands")))


def splits(rows: str, fold: int = 0) -> dict[str, list[dict[str, Any]]]:
    return {split: named("examples")(split, rows=rows, fold=fold) for split in ALL}


def shapes(made: list[dict[str, Any]]) -> set[str]:
    return {row["id"].split("-")[0] for row in made}


# Splits


@pytest.mark.parametrize("fold", range(5))
def test_no_shape_is_in_two_splits(rows: str, fold: int) -> None:
    made = splits(rows, fold)
    assert sum(len(part) for part in made.values()) == 120
    assert len(set.union(*map(shapes, made.values()))) == sum(
        len(shapes(one)) for one in made.values()
    )
    assert {name: len(part) for name, part in made.items() if name in ("dev", "train")} == {
        "dev": 12,
        "train": 24,
    }
    check_apart({name: as_examples(one, ["question"]) for name, one in made.items()}, ["question"])
    assert made == splits(rows, fold)


def test_over_all_folds_each_question_is_tested_once(rows: str) -> None:
    tested = [[row["id"] for row in splits(rows, fold)["test"]] for fold in range(5)]
    assert len({one for fold in tested for one in fold}) == 120
    assert [len(fold) for fold in tested] == [24] * 5


def test_rows_that_are_not_there_or_do_not_fit_are_errors_that_say_so(
    rows: str, tmp_path: Path
) -> None:
    for missing in ("", str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(DataError, match=r"geography\.sqlite is expected.*text2sql-data"):
            named("examples")("dev", rows=missing)
    with pytest.raises(DataError, match='no split "valid": use archive, train, dev, test'):
        named("examples")("valid", rows=rows)
    with pytest.raises(DataError, match="no fold 5: use 0 to 4"):
        named("examples")("test", rows=rows, fold=5)
    whole = {"id": "99-1", "question": "a", "sql": "SELECT 1"}
    for number, wrong in enumerate(({"id": "7"}, {"id": None}, {"question": ""}, {"sql": ""}, {})):
        folder = islands(tmp_path / str(number))
        write_rows(folder, dev=[whole, {**whole, **wrong}])
        said = (
            r"two rows are 99-1" if not wrong else r'\(dev\), row 2: a row has id \("SHAPE-NUMBER'
        )
        with pytest.raises(DataError, match=said):
            named("examples")("dev", rows=str(folder))


# What is taught


@pytest.mark.parametrize(
    ("draft", "field"), [("sql", "sql"), ("result", "sql"), ("notes", "notes")]
)
def test_the_drafter_is_taught_in_the_prompt_that_it_is_asked_in(
    rows: str, draft: str, field: str
) -> None:
    archive = splits(rows)["archive"]
    taught = named("draft_rows")(rows=rows, draft=draft)
    assert len(taught) == len(archive) and sft_rows(taught) == taught
    for row, example in zip(taught, archive, strict=True):
        written = row["completion"][0]["content"]
        engine = ScriptedEngine(lambda request, written=written: written)
        bound = named("program")(draft, rows).bind(weak=engine.lm())
        assert bound.ask_draft(question=example["question"])[field] == written
        (asked,) = engine.asked
        assert [(one["role"], one["content"]) for one in asked["messages"]] == [
            (one["role"], one["content"]) for one in row["prompt"]
        ]
        if field == "sql":
            assert written == example["sql"]


def test_notes_say_tables_columns_conditions_and_functions(rows: str) -> None:
    database = Path(rows) / "geography.sqlite"
    sql = "SELECT COUNT(ferry_name) FROM ferry WHERE knots < 12 AND island_name = 'bost island'"
    assert named("notes")(sql, database) == (
        "Tables: ferry. Columns: ferry_name, knots, island_name. Conditions: knots < 12, "
        "island_name = 'bost island'. Functions: COUNT."
    )
    assert named("notes")("SELECT MAX(people) FROM island", database) == (
        "Tables: island. Columns: people. Functions: MAX."
    )


@pytest.mark.parametrize("draft", ["sql", "result", "notes"])
def test_worked_examples_are_of_archive_with_right_and_wrong_drafts(rows: str, draft: str) -> None:
    made = named("shots")(draft, rows)
    assert len(made) == 8 and made == named("shots")(draft, rows)
    archive = {row["question"]: row for row in splits(rows)["archive"]}
    database = Path(rows) / "geography.sqlite"
    right = []
    for shot in made:
        gold = run_query(database, archive[shot.question]["sql"])
        assert shot.sql == archive[shot.question]["sql"]
        if draft != "notes":
            sql = shot.draft.partition("\nResult: ")[0].removeprefix("Sql: ")
            right.append(run_query(database, sql).matches(gold))
    assert draft == "notes" or (right.count(True), right.count(False)) == (5, 3)
    assert named("program")(draft, rows).alone.module.demos[0].keys() == ["question", "sql"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (QueryResult(error="no such\n column: x"), "error: no such column: x"),
        (QueryResult(), "no rows"),
        (QueryResult(((None,),)), "1 row: NULL"),
        (QueryResult(((3, "rye"), (4, None))), "2 rows: 3, rye; 4, NULL"),
        (QueryResult(((1,), (2,), (3,), (4,))), "4 rows: 1; 2; 3; ..."),
        (QueryResult((("a" * 90,),)), "1 row: " + "a" * 60),
    ],
)
def test_a_result_is_one_line(given: QueryResult, text: str) -> None:
    assert named("result_text")(given) == text


def test_the_strong_model_alone_has_schema_examples_both_or_neither(rows: str) -> None:
    bare, schema, shots = named("bare")(), named("with_schema")(rows), named("with_examples")(rows)
    both = named("program")("result", rows).alone.module
    for module, told, shown in (
        (bare, False, 0),
        (schema, True, 0),
        (shots, False, 8),
        (both, True, 8),
    ):
        assert ("ferry(ferry_name, knots, island_name)" in module.signature.instructions) == told
        assert len(module.demos) == shown and list(module.signature.fields) == ["question", "sql"]


def test_an_unknown_format_is_an_error_and_without_rows_nothing_runs() -> None:
    with pytest.raises(ProgramError, match='no draft format "direct": use sql, result, notes'):
        named("program")("direct")
    weak = ScriptedEngine(lambda request: "SELECT 1").lm()
    with pytest.raises(DataError, match="not downloaded"):
        named("program")().bind(weak=weak).ask_draft(question="a")


# Drafts that were run

MODELS = f"""
import random
import re
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.utils import importing

ROWS = None
GOLD = None

def gold(question):
    global GOLD
    if GOLD is None:
        examples = importing.load("{RECIPE}:examples")
        rows = [row for split in {ALL} for row in examples(split, rows=ROWS)]
        GOLD = {{row["question"]: row["sql"] for row in rows}}
    return GOLD[question]

def asked(request):
    return re.search("^Question: (.*)$", request["messages"][-1]["content"], re.M).group(1)

def weak():
    "Writes the right SQL, or one that fails: by the seed where it samples, otherwise by the question."
    def draft(request):
        sql = gold(asked(request))
        config = request["config"]
        seed = config.get("seed") or len(asked(request))
        return sql if seed % 2 else sql.replace("FROM ", "FROM no_")
    return ScriptedEngine(draft, model="scripted/weak")

def strong():
    "Copies a draft, and knows half of the answers by itself."
    def answer(request):
        text = request["messages"][-1]["content"]
        found = re.search(r"^Draft: (?:Sql: )?(SELECT .*)$", text, re.M)
        if found:
            return found.group(1)
        return gold(asked(request)) if len(asked(request)) % 4 < 2 else "SELECT 1"
    return ScriptedEngine(answer, model="scripted/strong")
"""


def configured(folder: Path, rows: str, **more: Any) -> Config:
    """The project's task on rules."""
    (folder / "models.py").write_text(MODELS.replace("ROWS = None", f"ROWS = {rows!r}"))
    engine = '[{0}]\nkind = "engine"\nengine = "models.py:{0}"\nmodel = "scripted/{0}"\n'
    (folder / "backend.toml").write_text(
        engine.format("weak") + engine.format("strong") + "[sft]\n[dpo]\n"
    )
    files = [ROOT / "programs/geoquery.toml", folder / "backend.toml"]
    every_draft = {"program": f"{RECIPE}:program"}
    return load_config(files, overrides={"data.rows": rows, **every_draft, **more})


def bound(config: Config) -> Collaboration:
    engines = {
        role: importing.call(getattr(config, role).engine).lm() for role in ("weak", "strong")
    }
    return load_program(config).bind(**engines)


def test_the_task_gives_its_fold_to_the_recipe(rows: str, tmp_path: Path) -> None:
    config = configured(tmp_path, rows, **{"data.arguments.fold": 3})
    tested = configured_split(config.data, "test")
    assert {one.id for one in tested} == {row["id"] for row in splits(rows, 3)["test"]}
    made = {split: configured_split(config.data, split) for split in SPLITS}
    check_apart(made, config.data.inputs)
    assert load_program(config).refine.demos == named("shots")("result", rows, fold=3)


@pytest.mark.parametrize("draft", ["sql", "result", "notes"])
def test_pairs_are_of_what_the_model_wrote_and_not_of_what_running_it_gave(
    rows: str, draft: str, tmp_path: Path
) -> None:
    config = configured(tmp_path, rows, draft=draft)
    train = configured_split(config.data, "train")
    traces = collect(bound(config), train, match, Sampling(drafts=4))
    pairs = preference_pairs(traces)
    assert len(traces) == 96 and not [one.error for one in traces if one.error] and len(pairs)
    for trace in traces:
        assert trace.completion.startswith("SELECT") and "\n" not in trace.completion
        if draft == "result":
            result = "error: no such table" if "no_" in trace.completion else ""
            assert trace.draft.startswith(f"Sql: {trace.completion}\nResult: {result}")
        else:
            assert trace.draft == trace.completion
        assert (trace.draft_score is None) == (draft == "notes")
        if draft != "notes":
            assert trace.draft_score == trace.refined_score == float("no_" not in trace.completion)
    for pair in pairs:
        chosen, rejected = pair.chosen[0]["content"], pair.rejected[0]["content"]
        assert rejected == chosen.replace("FROM ", "FROM no_") != chosen


def test_a_router_learns_from_what_running_a_draft_gave(rows: str, tmp_path: Path) -> None:
    config = configured(tmp_path, rows)
    program = bound(config)
    traces = collect(program, configured_split(config.data, "train"), match, Sampling(drafts=4))
    learned = observe_traces(traces, program=program)
    assert {one.features["fails"] for one in learned} == {0.0, 1.0}
    assert "fails" not in observe_traces(traces)[0].features
    held = configured_split(config.data, "dev")
    router = fit_router(learned, choose_on=observe(program, held, match))
    routed = Routed(program, router)
    for example in held:
        made = routed(**example.inputs())
        assert made.route == ("strong" if "error" in made.draft else "weak")
        assert made.route == "strong" or match(example, made) == 1.0


def test_what_running_gave_is_told_in_numbers(rows: str) -> None:
    program = named("program")("result", rows)
    for result, fails, nothing in (
        ("error: no such table: a", 1, 0),
        ("no rows", 0, 1),
        ("1 row: NULL", 0, 1),
        ("1 row: 0", 0, 1),
        ("1 row: 7", 0, 0),
    ):
        found = drafter_features(program, f"Sql: SELECT 1\nResult: {result}")
        assert found == {"fails": fails, "gives_nothing": nothing}
    assert drafter_features(named("program")("sql", rows), "SELECT 1") == {}
    assert drafter_features(None, "SELECT 1") == {}


class Scoring(ScriptedEngine):
    """Gives every text one likelihood, and keeps what it was given."""

    def score(self, rows: Any, *, model: str) -> Any:
        self.scored = [text for _, text in rows]
        return [SimpleNamespace(per_token=-0.5) for _ in rows]


@pytest.mark.parametrize("draft", ["sql", "result"])
def test_the_likelihood_of_a_draft_is_that_of_what_the_model_wrote(rows: str, draft: str) -> None:
    engine = Scoring(lambda request: f"SELECT people FROM island WHERE bread = '{ISLANDS[0]}'")
    program = named("program")(draft, rows).bind(weak=engine.lm())
    made = program.ask_draft(question="a").draft
    assert DraftLikelihood(program)({"question": "a"}, made) == -0.5
    assert engine.scored == [f"SELECT people FROM island WHERE bread = '{ISLANDS[0]}'"]


def test_the_arms_that_need_no_training_are_compared_and_the_router_is_fitted_for_its_own(
    rows: str, tmp_path: Path
) -> None:
    config = configured(tmp_path, rows)
    only = ["alone", "alone_bare", "alone_schema", "alone_examples", "weak", "collaboration_sft"]
    with Experiment(config, tmp_path / "run") as experiment:
        made = Compared(experiment).run([*only, "routed"])
        before = experiment.store.calls()
        again = Compared(experiment).run(["routed"])
        assert experiment.store.calls() == before and again.arms[0].arm == made.arms[-1].arm
    assert not made.warnings
    arms = {one.arm.name: one.arm.answers for one in made.arms}
    scores = {name: sum(one.score or 0.0 for one in answers) for name, answers in arms.items()}
    assert {len(answers) for answers in arms.values()} == {24}
    assert scores["alone"] == scores["alone_bare"] == scores["alone_examples"] < 24
    assert scores["routed"] > max(scores["alone"], scores["collaboration_sft"], scores["weak"])
    assert {one.steps["route"] for one in arms["routed"]} == {"weak", "strong"}
    assert all((one.answer or "").startswith("SELECT") for one in arms["weak"])


def test_a_router_that_is_a_rule_needs_no_traces(rows: str, tmp_path: Path) -> None:
    with Experiment(configured(tmp_path, rows), tmp_path / "run") as experiment:
        made, program = Compared(experiment).run(["alone", "weak", "rule"]), experiment.program
        assert (
            not len(Traces.load(experiment.store)) and not (tmp_path / "run/router.json").exists()
        )
    alone, weak, rule = (one.arm.answers for one in made.arms)
    for one, drafted, by_rule in zip(alone, weak, rule, strict=True):
        bad = any(drafter_features(program, by_rule.draft or "").values())
        assert by_rule.steps["route"] == ("strong" if bad else "weak")
        assert by_rule.answer == (one if bad else drafted).answer
    assert {one.steps["route"] for one in rule} == {"weak", "strong"}


def test_the_strong_model_plans_before_it_writes_sql_with_a_draft_and_alone(rows: str) -> None:
    seen: list[Any] = []

    def answers(request: Any) -> str:
        seen.append(request["messages"])
        return "Plan: Tables: island.\nSql: SELECT 1"

    weak = ScriptedEngine(lambda request: "SELECT 2").lm()
    made = named("planned")("result", rows).bind(weak=weak, strong=ScriptedEngine(answers).lm())
    for answer in (made(question="a"), made.ask_alone(question="a")):
        assert (answer.plan, answer.sql) == ("Tables: island.", "SELECT 1")
    for messages in seen:
        assert "then one SELECT" in messages[0]["content"]
        shown = [one["content"] for one in messages if one["role"] == "assistant"]
        assert len(shown) == 8 and all(
            text.startswith("Plan: Tables: ") and "\nSql: SELECT" in text for text in shown
        )
    assert ["Draft: " in messages[-1]["content"] for messages in seen] == [True, False]
    routed = Routed(made, named("keep_what_gives")())
    with pytest.raises(ProgramError, match="the draft has no plan, sql"):
        routed(question="a")


@pytest.mark.parametrize("first", ["SELECT 3", "SELECT nothing", "SELECT NULL", "SELECT 0"])
def test_the_strong_model_reads_a_draft_only_where_its_own_sql_gives_nothing(
    rows: str, first: str
) -> None:
    seen: list[Any] = []

    def answers(request: Any) -> str:
        seen.append(request["messages"])
        return "SELECT 2" if "Draft: " in request["messages"][-1]["content"] else first

    weak = ScriptedEngine(lambda request: "SELECT 2").lm()
    strong = ScriptedEngine(answers).lm()
    made = named("checked")("result", rows).bind(weak=weak, strong=strong)
    assert made(question="a").sql == ("SELECT 3" if first == "SELECT 3" else "SELECT 2")
    alone = seen[0]
    assert made.ask_alone(question="a").sql == first, "without a draft there is none to read"
    assert seen[-1] == alone, "alone is asked in the same prompt, twice where it gives nothing"
    named("program")("result", rows).bind(weak=weak, strong=strong).ask_alone(question="a")
    assert seen[-1] == alone, "and that is the strong model alone of the other program"
    own = named("repaired")(rows)
    own.set_lm(strong)
    with dspy.context(adapter=made.adapter):
        assert own(question="a").sql == ("SELECT 3" if first == "SELECT 3" else "SELECT 2")
    assert ("Draft: " in seen[-1][-1]["content"]) == (first != "SELECT 3")
    assert first == "SELECT 3" or f"Draft: Sql: {first}\n  Result: " in seen[-1][-1]["content"]


def test_a_function_that_gives_no_router_is_named(rows: str, tmp_path: Path) -> None:
    config = configured(tmp_path, rows)
    assert config.compare is not None
    rules = config.compare.arms["rule"].model_copy(update={"router": f"{RECIPE}:bare"})
    with (
        Experiment(config, tmp_path / "run") as experiment,
        pytest.raises(ConfigError, match=r"bare gave Predict: .*\.Router is expected"),
    ):
        answerer(experiment, rules)
