"""mlflow.dspy.autolog on our programs and our optimiser, run as a script, since it patches DSPy for
good. Prints what it found.

python tests/autologged.py FOLDER MODEL
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import mlflow
from mlflow.dspy import autolog

from cowest_dspy import (
    DPO,
    SFT,
    Collaboration,
    CoWest,
    Influence,
    LineAdapter,
    Sampling,
    collect,
    tune,
)
from cowest_dspy.lms import LocalEngine
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.tuning import tunable

QUESTIONS = [
    dspy.Example(id=f"q{n}", question=f"Is {n} even?", answer="yes").with_inputs("question")
    for n in range(14)
]


def right(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    return float(prediction.answer == example.answer)


def patient(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """As ``right``, once the prediction's trace is stored: MLflow drops a value that comes before,
    since it writes traces later."""
    mlflow.flush_trace_async_logging()
    return right(example, prediction)


def draft(request: dict[str, Any]) -> str:
    return "It is even." if request["config"].get("seed", 0) % 2 == 0 else "It is a number."


def refine(request: dict[str, Any]) -> str:
    return "yes" if "It is even" in request["messages"][-1]["content"] else "no"


def many_vowels(request: dict[str, Any]) -> str:
    text = request["messages"][-1]["content"].partition("Background: ")[2]
    return "yes" if len(set("aeiou") & set(text)) >= 3 else "no"


def taught(folder: Path, model: Path) -> dspy.LM:
    """A tiny weak model that has learned to write a few letters, some with more vowels than
    others."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question: {number}?"}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for number in range(4)
        for text in ("a e i", "b c d", "o u a", "x")
    ]
    settings = SFT(max_steps=80, num_train_epochs=80, learning_rate=2e-2, bf16=False)
    return tune(tunable(LocalEngine(model).lm(max_tokens=12)), rows, settings, folder).lm


def traces() -> list[Any]:
    mlflow.flush_trace_async_logging()
    return [mlflow.get_trace(one.info.trace_id) for one in mlflow.search_traces(return_type="list")]


def spans(trace: Any) -> list[str]:
    return [span.name for span in trace.data.spans]


def asked(program: Collaboration) -> dict[str, Any]:
    """One question, and then several at once by a copy in threads: each has a whole trace of its
    own."""
    answer = program(question="Is 2 even?")
    (one,) = traces()
    models = {span.attributes["model"] for span in one.data.spans if "model" in span.attributes}
    root = next(span for span in one.data.spans if span.parent_id is None)
    copied = program.deepcopy()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: copied(question=one.question).answer, QUESTIONS))
    mlflow.flush_trace_async_logging()
    alike = [spans(trace) == spans(one) for trace in traces()]
    return {
        "answer": answer.answer, "draft": answer.draft, "root": root.name, "inputs": root.inputs, "outputs": root.outputs,
        "spans": spans(one), "models": sorted(models), "answers": answers, "traces": len(alike), "alike": all(alike),
        "status": sorted({str(trace.info.state) for trace in traces()}),
    }  # fmt: skip


def scored(program: Collaboration) -> dict[str, Any]:
    """DSPy's Evaluate with our metric, and our own collection: the same numbers as without
    autolog."""
    influence = Influence(patient, program)
    found = dspy.Evaluate(devset=QUESTIONS, metric=influence, num_threads=2)(program)
    feedback = [one.name for trace in traces() for one in trace.info.assessments]
    gathered = collect(program, QUESTIONS, right, Sampling(drafts=2, seed=0))
    return {
        "score": found.score,
        "feedback": sorted(set(feedback)),
        "influences": [one.influence for one in gathered],
    }


def compiled(folder: Path, weak: dspy.LM, *, detailed: bool) -> dict[str, Any]:
    """Our optimiser on a real weak model; with ``detailed``, autolog makes a run of it."""
    program = Collaboration("question -> answer", draft="knowledge", adapter=LineAdapter())
    program = program.bind(
        weak=weak, strong=ScriptedEngine(many_vowels, model="scripted/strong").lm()
    )
    optimizer = CoWest(
        right, DPO(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, bf16=False), drafts=6, log_dir=folder,
        rounds=RoundRules.model_validate({"least_gain": -1.0, "more_failures": 1.0}), pairs=PairRules.model_validate({"least": 2}),
        max_errors=1.0,
    )  # fmt: skip
    before = len(traces())
    made = optimizer.compile(program, trainset=QUESTIONS[:10], valset=QUESTIONS[10:])
    runs = mlflow.search_runs(output_format="list")
    files = sorted(
        file.path for run in runs for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)
    )
    text = json.dumps([run.data.to_dictionary() for run in runs])
    return {
        "rounds": len(made.rounds),
        "reason": made.rounds[0].reason,
        "tuned": made.rounds[0].model not in (None, made.rounds[0].start),
        "new traces": len(traces()) - before,
        "runs": len(runs),
        "files": files if detailed else [],
        "text": text,
    }


def main(folder: Path, model: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.create_experiment("autolog", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment("autolog")
    autolog()
    lms = {
        "weak": ScriptedEngine(draft, model="scripted/weak").lm(),
        "strong": ScriptedEngine(refine, model="scripted/strong").lm(),
    }
    program = Collaboration("question -> answer", draft="knowledge").bind(**lms)
    weak = taught(folder / "taught", model)
    told = {
        "asked": asked(program),
        "scored": scored(program),
        "compiled": compiled(folder / "first", weak, detailed=False),
    }
    autolog(log_compiles=True, log_evals=True, log_traces_from_compile=True)
    told["detailed"] = compiled(folder / "second", weak, detailed=True)
    (folder / "found.json").write_text(json.dumps(told, default=str), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
