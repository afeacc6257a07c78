"""A user's module with a Collaboration in it, whole, as the student of CoWest; and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from round_parts import ALWAYS, examples, optimizer, rules, student, taught  # noqa: F401 - fixtures
from scripted import strong_that_reads

from cowest_dspy import SFT, Collaboration, CoWest, Influence, Sampling, Store, collect
from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.program.embedded import Embedded
from cowest_dspy.testing import ScriptedEngine


class Helpdesk(dspy.Module):
    """Looks up what is meant, asks the collaboration, and says it in capitals."""

    def __init__(self, program: Collaboration, lookup: ScriptedEngine, times: int = 1) -> None:
        super().__init__()
        self.lookup = dspy.Predict("message -> question")
        self.lookup.set_lm(lookup.lm())
        self.collab, self.times = program, times

    def forward(self, message: str) -> Any:
        question = self.lookup(message=message).question
        answer = "none"
        for _ in range(self.times):
            answer = self.collab(question=question).answer
        return dspy.Prediction(verdict=answer.upper())


class Careful(Helpdesk):
    """Answers by itself where anything goes wrong."""

    def forward(self, message: str) -> Any:
        try:
            return super().forward(message)
        except Exception:
            return dspy.Prediction(verdict="SORRY")


class Wordy(Helpdesk):
    """Returns plain text."""

    def forward(self, message: str) -> Any:
        return super().forward(message).verdict


def lookup(question: str = "Question number {}?") -> ScriptedEngine:
    """The n-th message is the question of the number n."""

    def answer(request: dict[str, Any]) -> str:
        number = request["messages"][-1]["content"].split("Message ")[1].split("!")[0]
        return f"[[ ## question ## ]]\n{question.format(number)}\n\n[[ ## completed ## ]]"

    return ScriptedEngine(answer, model="scripted/lookup")


def weak_by_seed() -> ScriptedEngine:
    """Its drafts of odd seeds are the number that is asked for, the others nothing."""

    def answer(request: dict[str, Any]) -> str:
        number = request["messages"][-1]["content"].split("Question number ")[-1].split("?")[0]
        return number if request["config"].get("seed", 1) % 2 else "a note"

    return ScriptedEngine(answer, model="scripted/weak")


QUICK_SFT = SFT(
    max_steps=2,
    bf16=False,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    learning_rate=1e-3,
)


def messages(count: int) -> list[dspy.Example]:
    return [
        dspy.Example(id=f"m{n}", message=f"Message {n}!", verdict=str(n)).with_inputs("message")
        for n in range(count)
    ]


def same_verdict(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    return float(prediction.verdict == example.verdict)


def desk(kind: type[Helpdesk] = Helpdesk, weak: Any = None, **more: Any) -> Any:
    program = Collaboration("question -> answer").bind(
        weak=(weak or weak_by_seed()).lm(), strong=strong_that_reads().lm()
    )
    return kind(program, more.pop("lookup", None) or lookup(), **more)


def test_the_influence_of_a_draft_is_on_what_the_module_returns(tmp_path: Path) -> None:
    finds = lookup()
    strong, weak = strong_that_reads(), weak_by_seed()
    program = Collaboration("question -> answer").bind(weak=weak.lm(), strong=strong.lm())
    module = Helpdesk(program, finds)
    with Store(tmp_path) as store:
        traces = list(collect(module, messages(3), same_verdict, Sampling(4, seed=0), store=store))
    assert len(traces) == 3 * 4 and not any(trace.error for trace in traces)
    for trace in traces:
        assert trace.inputs == {"message": f"Message {trace.example_id[1:]}!"}
        helped = trace.draft == trace.example_id[1:]
        assert trace.influence == float(helped)
        assert trace.refined is not None and "verdict" in trace.refined
        assert trace.prompt[-1]["content"] == f"Question: Question number {trace.example_id[1:]}?"
        assert (trace.completion, trace.draft_score) == (trace.draft, None)
    assert {trace.influence for trace in traces} == {0.0, 1.0}
    different = {(trace.example_id, trace.draft) for trace in traces}
    assert len(strong.asked) == len(different) + 3, "alone once for each example"
    assert len(weak.asked) == 3 * 4
    assert len(finds.asked) == 3, "other steps are asked once for each example"


def test_a_module_is_asked_with_a_draft_and_with_the_strong_model_alone() -> None:
    program = Embedded(desk())
    assert program.ask_draft(message="Message 5!").draft == "5"
    assert program.ask_refine("5", message="Message 5!").toDict() == {"verdict": "5", "draft": "5"}
    assert program.ask_refine("x", message="Message 5!").verdict == "X"
    alone = program.ask_alone(message="Message 5!")
    assert alone.verdict == "NONE"
    assert program(message="Message 5!").verdict == "5"
    assert program.module(message="Message 5!").verdict == "5", "called by itself, as ever"


def test_influence_takes_a_module_and_says_what_the_draft_changed_in_the_end() -> None:
    module = desk()
    influence = Influence(same_verdict, module)
    example = messages(6)[5]
    found = influence.explain(example, module(**example.inputs()))
    assert found.score == 1.0 and '"NONE" (score 0.00) to "5" (score 1.00)' in found.feedback
    report = influence.report(messages(3))
    assert report.mean == 1.0
    assert dspy.Evaluate(devset=messages(2), metric=influence)(module).score == 100.0


def test_a_module_that_catches_errors_hides_no_failure_of_a_draft() -> None:
    def fails(request: dict[str, Any]) -> Any:
        return dspy.LMTimeoutError("no answer", model="scripted/weak")

    good = Embedded(desk(Careful))
    assert good.ask_draft(message="Message 5!").draft == "5"
    broken = Embedded(desk(Careful, weak=ScriptedEngine(fails, model="scripted/weak")))
    with pytest.raises(dspy.LMTimeoutError):
        broken.ask_draft(message="Message 5!")
    (trace,) = collect(broken, messages(1), same_verdict, Sampling(1), max_errors=1.0)
    assert trace.error is not None and trace.error.startswith("timeout")
    assert (trace.refined_score, trace.influence) == (None, None)
    silent = desk(Careful)
    down = ScriptedEngine(fails, model="scripted/strong").lm()
    silent.collab = silent.collab.bind(strong=down)
    assert silent(message="Message 5!").verdict == "SORRY"
    (trace,) = collect(silent, messages(1), same_verdict, Sampling(1), max_errors=1.0)
    assert trace.draft in ("0", "a note") and "timeout" in str(trace.error)
    assert (trace.refined_score, trace.alone_score) == (None, None)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: desk(times=2), "twice or more"),
        (lambda: desk(times=0), "not at all"),
        (lambda: desk(Wordy), r"returned a str: a dspy\.Prediction is scored"),
    ],
)
def test_a_module_that_cannot_be_measured_says_why(made: Any, words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        collect(Embedded(made()), messages(1), same_verdict, Sampling(1))


class Two(dspy.Module):
    """A module with two collaborations in it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Collaboration("question -> answer"), Collaboration("a -> b")


def test_one_collaboration_is_in_a_student(optimizer: Callable[..., CoWest]) -> None:
    train = messages(4)
    with pytest.raises(ProgramError, match=r"wanted.*a Predict was given, with none in it"):
        optimizer().compile(dspy.Predict("question -> answer"), trainset=train)
    with pytest.raises(ProgramError, match=r"2 in it \(self.one, self.other\)"):
        optimizer().compile(Two(), trainset=train)
    unbound = Helpdesk(Collaboration("question -> answer"), lookup())
    with pytest.raises(ProgramError, match="not bound"):
        optimizer().compile(unbound, trainset=train)
    with pytest.raises(DataError, match=r"\(module\) needs the input \"message\""):
        optimizer().compile(desk(), trainset=examples("train", 2))


def test_a_module_with_a_collaboration_in_it_is_compiled_whole(
    student: Collaboration,
    tmp_path: Path,
) -> None:
    finds = lookup("train {}?")
    module = Helpdesk(student, finds)
    cowest = CoWest(
        same_verdict,
        QUICK_SFT,
        6,
        rules(**ALWAYS),
        pairs=PairRules.model_validate({"least": 2}),
        log_dir=tmp_path / "run",
        max_errors=1.0,
    )
    train = [dspy.Example(**{**one.toDict(), "verdict": "YES"}) for one in messages(10)]
    train = [one.with_inputs("message") for one in train]
    made: Any = cowest.compile(module, trainset=train[:6], valset=train[6:])
    assert type(made).__name__ == "Helpdesk" and made._compiled and not module._compiled
    (one,) = made.rounds
    assert one.accepted and made.collab.weak.model == one.model
    assert module.collab.weak.model == student.weak.model != one.model
    assert made.collab.strong.model == student.strong.model
    assert made.lookup.lm.engine is finds, "other steps are on their own models"
    assert made(message="Message 3!").verdict in ("YES", "NO")
    with Store(tmp_path / "run") as store:
        assert {record["inputs"]["message"] for record in store.records("trace").values()} == {
            f"Message {n}!" for n in range(6)
        }
    asked = len(finds.asked)
    again: Any = cowest.compile(module, trainset=train[:6], valset=train[6:])
    assert again.rounds == made.rounds and len(finds.asked) == asked, "what is done is only read"


def test_a_teacher_drafts_and_the_student_is_fine_tuned_on_what_influence_chose(
    student: Collaboration,
    optimizer: Callable[..., CoWest],
) -> None:
    def by_seed(request: dict[str, Any]) -> str:
        return "a e i o u" if request["config"].get("seed", 0) % 2 else "b c d"

    engine = ScriptedEngine(by_seed, model="scripted/teacher")
    made: Any = optimizer(tuner=QUICK_SFT, **ALWAYS).compile(
        student,
        trainset=examples("train", 10),
        valset=examples("dev", 4),
        teacher=student.bind(weak=engine.lm()),
    )
    (one,) = made.rounds
    assert one.start == student.weak.model and made.weak.model == one.model != one.start
    with Store(made.log_dir) as store:
        records = list(store.records("trace").values())
    assert {record["weak_model"] for record in records} == {"scripted/teacher"}
    assert (made.log_dir / "pairs.jsonl").read_text().count('"a e i o u"') == one.pairs
    assert len(engine.asked) == 10 * 6, "the teacher drafts on the trainset only"


def test_a_teacher_that_nothing_can_be_learned_from_is_refused(
    student: Collaboration,
    optimizer: Callable[..., CoWest],
) -> None:
    train = examples("train", 4)
    with pytest.raises(ProgramError, match=r"teacher with tuner=SFT.*DPO learns from drafts of"):
        optimizer().compile(student, trainset=train, teacher=student)
    with pytest.raises(ProgramError, match="other instructions, fields or demos"):
        optimizer(tuner=QUICK_SFT).compile(
            student,
            trainset=train,
            teacher=Collaboration("question -> answer", draft="direct").bind(
                weak=weak_by_seed().lm(), strong=strong_that_reads().lm()
            ),
        )
    with pytest.raises(ProgramError, match="a Predict was given, with none in it"):
        optimizer(tuner=QUICK_SFT).compile(
            student, trainset=train, teacher=dspy.Predict("question -> background")
        )
