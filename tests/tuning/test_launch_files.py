"""Configuration files of Accelerate's: read by itself, followed, or told what is wrong with them;
on a CPU, sharded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerated import OF_PASSES, compared, launched, left, marked, nothing_is_left, task, trainers  # noqa: F401 - fixtures
from command_line import cowest
from round_parts import examples, match, student, taught  # noqa: F401 - fixtures
from sharded import FSDP, settings
from tuning_rows import LORA, assert_close, kinds, quick, read

from cowest_dspy.errors import TuningError
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.tuning import (
    SFT,
    launch,
    plan_processes,
    provider,
)
from cowest_dspy.tuning.launch import launch_command
from cowest_dspy.utils.processes import free_port

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
    one = tune(weak, kinds(7)["sft"][2], how, tmp_path / "one", seed=5)
    two = tune(weak, kinds(7)["sft"][2], how, tmp_path / "two", seed=5, processes=CPU)
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
    said = [line.split() for line in done.stdout.splitlines() if line.startswith("Distr")]
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
