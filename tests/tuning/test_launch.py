"""Training by two processes on this CPU (gloo), started by ``accelerate launch``: equal to one
process, and gone afterwards; configuration files of Accelerate's: followed, or told what is wrong
with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerated import OF_PASSES, compared, launched, left, marked, nothing_is_left, task, trainers  # noqa: F401 - fixtures
from command_line import cowest
from round_parts import examples, match, student, taught  # noqa: F401 - fixtures
from sharded import FSDP, settings
from tuning_rows import LORA, assert_close, kinds, labelled_rows, quick, read

from cowest_dspy import CoWest, Cycle, Store
from cowest_dspy.errors import ModelError, TuningError
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.tuning import (
    DPO,
    KTO,
    SFT,
    Processes,
    check_processes,
    launch,
    plan_processes,
    provider,
    train_kto,
)
from cowest_dspy.tuning.launch import _failure, _report, launch_command
from cowest_dspy.utils.processes import free_port

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_two_processes_equal_one(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    train, make, data = kinds(7)[kind]
    # Seven rows and batches of four: a pass ends inside a batch. Two forward passes of one row
    # each, in each process.
    settings = make(
        **quick(
            num_train_epochs=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            warmup_steps=0.25,
        ),
        lora=LORA,
    )
    one = train(settings, data, base=str(tiny_model), output=tmp_path / "one", seed=5)
    told: list[tuple[int, int]] = []
    two = launch(
        settings,
        data,
        2,
        base=str(tiny_model),
        output=tmp_path / "two",
        seed=5,
        on_step=lambda step, total, _: told.append((step, total)),
    )
    assert_close(one.path, two.path, 1e-5)
    assert len(one.history) == 4 and [record.keys() for record in one.history] == [
        record.keys() for record in two.history
    ]
    for alone, together in zip(one.history, two.history, strict=True):
        assert compared(together) == pytest.approx(compared(alone), rel=1e-4, abs=1e-5)
    assert told == [(step, 4) for step in range(5)]
    assert (two.tokens, two.trained_rows, two.base_id, two.settings) == (
        one.tokens,
        one.trained_rows,
        one.base_id,
        one.settings,
    )
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one", "two"], (
        "the job's folder is gone"
    )


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_and_takes_the_others_with_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    def on_step(step: int, total: int, _: dict[str, float]) -> None:
        if step == 2:
            next(process for process in trainers() if process.environ().get("RANK") == "1").kill()

    with pytest.raises(
        TuningError,
        match=r"(?s)Training by 2 processes ended with exit code.*memory may have run out",
    ):
        launched(tiny_model, tmp_path / "out", on_step=on_step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_the_user_can_mend_is_told_as_by_one_process(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TuningError, match=r"^8 of 8 rows are longer than max_length, 5 tokens: row 0 has"
    ):
        launched(tiny_model, tmp_path / "out", settings={"max_length": 5})
    with pytest.raises(ModelError, match="adapter"):
        launched(tiny_model, tmp_path / "out", adapter=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_training_is_over_at_once(
    error: type[BaseException], tiny_model: Path, tmp_path: Path
) -> None:
    def on_step(step: int, total: int, _: dict[str, float]) -> None:
        if step == 1:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        launched(tiny_model, tmp_path / "out", on_step=on_step)
    assert list(tmp_path.iterdir()) == []


DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import accelerated

def on_step(step, total, logs):
    if step == 1:
        os.kill(os.getpid(), signal.SIGKILL)

accelerated.launched(Path(sys.argv[2]), Path(sys.argv[3]), on_step=on_step)
"""


@pytest.mark.slow
def test_nothing_outlives_a_killed_driver(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", DRIVER, str(SUPPORT), str(tiny_model), str(tmp_path / "out")]
    assert (
        subprocess.run(
            arguments, check=False, env={**os.environ, "PYTHONPATH": str(SUPPORT.parents[1])}
        ).returncode
        == -9
    )
    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []


@pytest.mark.slow
def test_kto_held_out_rows_and_checkpoints_work_with_two_processes(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = KTO(
        **quick(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            held_out=0.25,
            save_steps=1,
            load_best_model_at_end=False,
        ),
        lora=LORA,
    )
    given: dict[str, Any] = {"base": str(tiny_model), "output": tmp_path / "two", "seed": 5}

    def stop(step: int, total: int, _: dict[str, float]) -> None:
        if step == 5:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        launch(settings, labelled_rows(8), 2, on_step=stop, **given)
    began: list[int] = []
    two = launch(
        settings, labelled_rows(8), 2, on_step=lambda step, *_: began.append(step), **given
    )
    assert 0 < began[0] <= 5, "it has resumed"
    one = train_kto(settings, labelled_rows(8), **{**given, "output": tmp_path / "one"})
    # The KL term is of the rows of a forward pass, which are the same.
    assert_close(one.path, two.path, 1e-4)
    assert sum("eval_loss" in record for record in two.history) >= 3
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one", "two"]


@pytest.mark.parametrize(
    ("settings", "processes", "says"),
    [
        (SFT(), 3, "gradient_accumulation_steps = 4 cannot be shared out to 3 processes"),
        (DPO(gradient_accumulation_steps=1), 2, "cannot be shared out to 2 processes"),
        (SFT(), 0, "0 processes cannot train"),
        (SFT(bf16=False), Processes(2, mixed_precision="bf16"), "mixed_precision: bf16, and"),
        (SFT(bf16=True), Processes(2, mixed_precision="fp16"), "mixed_precision: fp16, and"),
    ],
)
def test_a_step_that_cannot_be_shared_out_says_what_to_set(
    settings: Any, processes: Any, says: str
) -> None:
    with pytest.raises(TuningError, match=says):
        check_processes(settings, processes)


def test_a_step_that_can_be_shared_out_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for processes in (1, 2, 4, "2", Processes(2, mixed_precision="bf16")):
        check_processes(SFT(), processes)


def test_fewer_gpus_than_processes_are_an_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        TuningError, match="2 processes cannot train here: each needs a GPU, and this machine has 1"
    ):
        launched(tiny_model, tmp_path / "out")


def test_progress_is_told_once_and_only_of_whole_lines(tmp_path: Path) -> None:
    told: list[Any] = []
    file = tmp_path / "progress.jsonl"
    done = _report(file, 0, lambda *step: told.append(step))
    for text in ('[0, 2, {}]\n[1, 2, {"lo', 'ss": 0.5}]\n', ""):
        with file.open("a") as lines:
            lines.write(text)
        done = _report(file, done, lambda *step: told.append(step))
    assert told == [(0, 2, {}), (1, 2, {"loss": 0.5})]


@pytest.mark.parametrize(
    ("files", "kind", "says"),
    [
        (
            {
                "error-0.json": ("ValueError", "connection lost"),
                "error-1.json": ("ModelError", "no such base"),
            },
            ModelError,
            "^no such base$",
        ),
        (
            {"error-1.json": ("ValueError", "line\n" * 50 + "odd shape")},
            TuningError,
            r"(?s)exit code 7.*line.*odd shape",
        ),
        ({}, TuningError, r"(?s)exit code 7.*\n  no port; key \*\*\*$"),
    ],
)
def test_a_failure_is_told_by_its_cause(
    files: dict[str, Any], kind: type[Exception], says: str, tmp_path: Path
) -> None:
    (tmp_path / "log.txt").write_text("starting\nno port; key sk-abcdefghijklmnop1234")
    for name, (error, text) in files.items():
        (tmp_path / name).write_text(json.dumps({"type": error, "text": text}))
    with pytest.raises(kind, match=says):
        raise _failure(tmp_path, 2, 7)


@pytest.mark.slow
def test_the_option_reaches_the_training(task: list[str]) -> None:
    said = cowest("cycle", *task, "--accelerate", "3", fails=True)
    assert said.startswith(
        "TuningError: gradient_accumulation_steps = 4 cannot be shared out to 3 processes"
    )


def test_the_optimiser_sees_at_once_whether_its_tuner_can_be_shared_out() -> None:
    with pytest.raises(TuningError, match="cannot be shared out to 3 processes"):
        CoWest(match, DPO(), processes=3)
    assert CoWest(match, KTO(), processes=2).processes == 2


@pytest.mark.slow
def test_the_optimiser_trains_with_two_processes_also_in_a_cycle(
    student: Any, tmp_path: Path
) -> None:
    tuner = DPO(
        max_steps=2,
        bf16=False,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
    )

    def trained(processes: int) -> tuple[Path, list[dict[str, float]]]:
        run = tmp_path / str(processes)
        rules = RoundRules.model_validate({"least_gain": -1.0})
        gate = PairRules.model_validate({"least": 2})
        optimizer = CoWest(match, tuner, 6, rules, pairs=gate, max_failed=1.0, processes=processes)
        cycle = Cycle(match, "weights", {"weights": optimizer}, run=run)
        cycle.compile(student, trainset=examples("train", 10), valset=examples("dev", 3))
        with Store(run) as store:
            record = store.record("adapter", "dpo") or {}
        return run / record["folder"], record["history"]

    launched: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            provider,
            "launch",
            lambda *given, **named: (
                launched.append(named["processes"].count) or launch(*given, **named)
            ),
        )
        (one, alone), (two, together) = trained(1), trained(2)
    assert launched == [2]
    assert_close(one, two, 1e-5)
    assert [compared(record) for record in together] == [
        pytest.approx(compared(record), rel=1e-4, abs=1e-5) for record in alone
    ]


@pytest.mark.slow
def test_a_run_tunes_with_two_processes_and_is_read_by_one(task: list[str], tmp_path: Path) -> None:
    cowest("collect", *task)
    said = cowest("tune", *task, "--accelerate", "2")
    assert "tuned: local/" in said
    with Store(tmp_path / "run") as store:
        made = {name: len(record["history"]) for name, record in store.records("adapter").items()}
    assert sorted(made.values()) == [2, 80], (
        "fine-tuning and preference tuning, each with its steps"
    )
    before = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run/adapters").rglob("*.safetensors")
    }
    assert cowest("tune", *task).splitlines()[-1] == said.splitlines()[-1]
    assert before == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run/adapters").rglob("*.safetensors")
    }


# Configuration files

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "programs/accelerate").glob("*.yaml"))
CPU = ROOT / "programs/accelerate/cpu.yaml"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight GPUs, as far as it is only counted."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_accelerate_itself_reads_each_file_and_every_word_of_it(file: Path) -> None:
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    read = load_config_from_file(str(file))
    assert isinstance(read, ClusterConfig)
    written = yaml.safe_load(file.read_text())
    assert {name: read.to_dict()[name] for name in written} == written
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(written.get("fsdp_config", {})) <= known


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", (2, True, False)),
        ("fsdp", (4, False, True)),
        ("one_gpu", (1, False, False)),
        ("several_gpus", (4, False, False)),
    ],
)
def test_what_each_file_asks_for_and_hands_on(
    name: str, expected: tuple[int, bool, bool], gpus: None, tmp_path: Path
) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    planned = plan_processes(ROOT / f"programs/accelerate/{name}.yaml")
    assert (planned.count, planned.cpu) == expected[:2]
    launch_command(tmp_path, planned)
    handed_on: Any = load_config_from_file(str(tmp_path / "accelerate.json"))
    assert (handed_on.num_processes, handed_on.use_cpu) == expected[:2]
    assert handed_on.distributed_type == ("FSDP" if expected[2] else "MULTI_GPU")
    assert bool(handed_on.fsdp_config) == expected[2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is not there: --accelerate takes a number of processes, or a configuration file"),
        ("distributed_type: [", "is no configuration of Accelerate's: ParserError"),
        ("four", "is no configuration of Accelerate's: AttributeError"),
        ("num_processes: 2", "A `distributed_type` must be specified"),
        ("distributed_type: MULTI_GPU\nproceses: 2", r"unknown keys \(\['proceses'\]\)"),
        ("distributed_type: XLA", "distributed_type: XLA is not supported; NO"),
        ("distributed_type: FSDP\nnum_processes: 2", "FSDP and an fsdp_config belong together"),
        (
            "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 1}",
            "set fsdp_version: 2",
        ),
        (
            "distributed_type: FSDP\nnum_processes: 1\nfsdp_config: {fsdp_version: 2}",
            "num_processes: 1 is too few",
        ),
        (
            "distributed_type: MULTI_CPU\nnum_processes: 4\nnum_machines: 2",
            "num_machines must be 1",
        ),
        (
            "distributed_type: MULTI_GPU\nnum_processes: 9",
            "asks for 9 processes with a GPU each, and this machine has 8",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_why_and_what_to_write(
    text: str | None, says: str, tmp_path: Path, gpus: None
) -> None:
    file = tmp_path / "own.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TuningError, match=says):
        plan_processes(file)


@pytest.mark.slow
def test_the_file_for_a_cpu_trains_as_one_process_does(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cowest_dspy.lms import LocalEngine
    from cowest_dspy.tuning import tunable, tune

    given: list[Any] = []
    monkeypatch.setattr(
        provider, "launch", lambda *a, **b: given.append(b["processes"]) or launch(*a, **b)
    )
    weak = tunable(LocalEngine(str(tiny_model)).lm())
    how = SFT(
        **quick(num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=4),
        lora=LORA,
    )
    one = tune(weak, kinds(7)["sft"][2], "sft", how, tmp_path / "one", seed=5)
    two = tune(weak, kinds(7)["sft"][2], "sft", how, tmp_path / "two", seed=5, processes=CPU)
    assert [(made.count, made.cpu) for made in given] == [(2, True)]
    assert_close(one.result.path, two.result.path, 1e-5)
    pairs = zip(one.result.history, two.result.history, strict=True)
    for alone, together in pairs:
        assert compared(together) == pytest.approx(compared(alone), rel=1e-4, abs=1e-5)
    assert two.model.endswith(adapter_hash(two.result.path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_weights_that_are_shared_out_give_the_same_whole_adapter(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """From an adapter on, so that DPO's reference is another one beside it."""
    train, make, data = kinds(7)[kind]
    start = train(
        settings(make), data, base=str(tiny_model), output=tmp_path / "start", seed=1
    ).path
    one = train(
        settings(make), data, base=str(tiny_model), adapter=start, output=tmp_path / "one", seed=5
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    script = [
        str(ROOT / "tests/support/sharded.py"),
        str(tiny_model),
        str(start),
        str(tmp_path / "two"),
        kind,
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    done = subprocess.run(
        [*torchrun, *script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **FSDP, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Two processes write at once, and one line may end in the other.
    said = [
        line.split()
        for line in done.stdout.replace("DistributedType", "\nDistributedType").splitlines()
        if line.startswith("Distr")
    ]
    hashes = {adapter_hash(tmp_path / "two")}
    assert [line[0] for line in said] == ["DistributedType.FSDP"] * 2 and {
        line[1] for line in said
    } == hashes
    assert_close(one.path, tmp_path / "two", 1e-5)
    assert [float(loss) for loss in said[0][2:]] == pytest.approx(
        [record["loss"] for record in one.history], rel=1e-4, abs=1e-5
    )
    assert {name: tensor.dtype for name, tensor in read(one.path).items()} == {
        name: tensor.dtype for name, tensor in read(tmp_path / "two").items()
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("programs/nowhere.yaml", "TuningError: programs/nowhere.yaml is not there"),
        ("0", "CowestError: --accelerate 0: it takes 1 process or more"),
        ("-2", "CowestError: --accelerate -2: it takes 1 process or more"),
    ],
)
def test_the_command_line_says_at_once_what_is_wrong(
    given: str, says: str, task: list[str], tmp_path: Path
) -> None:
    assert cowest("tune", *task, "--accelerate", given, fails=True).startswith(says)
    assert not (tmp_path / "run").exists(), "nothing is begun"
