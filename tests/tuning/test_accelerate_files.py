"""Configuration files of Accelerate's: read by itself, followed, told what is wrong with; on a CPU,
over two machines, sharded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from accelerated import compared, marked, nothing_is_left, task  # noqa: F401 - fixtures
from command_line import cowest
from sharded import FSDP, settings
from tuning_rows import LORA, assert_close, kinds, quick, read, sft_rows

from cowest_dspy import Store
from cowest_dspy.errors import TuningError
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.lms.processes import free_port
from cowest_dspy.tuning import (
    DPO,
    KTO,
    SFT,
    Machines,
    check_processes,
    join,
    launch,
    machines,
    provider,
)
from cowest_dspy.tuning.cluster import check_precision
from cowest_dspy.tuning.launching import command

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "programs/accelerate").glob("*.yaml"))
CPU, SEVERAL = (
    ROOT / "programs/accelerate/cpu.yaml",
    ROOT / "programs/accelerate/several_nodes.yaml",
)
HOME = {"MASTER_ADDR": "10.0.0.1"}


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
        ("cpu", (2, 1, True, False)),
        ("fsdp", (4, 1, False, True)),
        ("one_gpu", (1, 1, False, False)),
        ("several_gpus", (4, 1, False, False)),
        ("several_nodes", (16, 2, False, False)),
    ],
)
def test_what_each_file_asks_for_and_hands_on(
    name: str, expected: tuple[Any, ...], gpus: None, tmp_path: Path
) -> None:
    made = machines(ROOT / f"programs/accelerate/{name}.yaml", HOME)
    assert (made.processes, made.count, made.cpu, made.sharded) == expected
    from accelerate.commands.config.config_args import load_config_from_file

    command(tmp_path, made, tmp_path)
    handed_on: Any = load_config_from_file(str(tmp_path / "accelerate.json"))
    assert (handed_on.num_processes, handed_on.num_machines, handed_on.use_cpu) == expected[:3]
    assert handed_on.distributed_type == ("FSDP" if made.sharded else "MULTI_GPU")
    assert bool(handed_on.fsdp_config) == made.sharded


def test_the_machines_of_a_cluster_share_a_file_and_differ_in_the_environment(gpus: None) -> None:
    first, second = (
        machines(SEVERAL, HOME | {"NODE_RANK": rank, "MASTER_PORT": "4000"}) for rank in "01"
    )
    assert (first.rank, second.rank, second.here) == (0, 1, 8)
    assert (second.address, second.port) == ("10.0.0.1", 4000)
    assert machines(SEVERAL, HOME | {"SLURM_NODEID": "1"}).rank == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is not there: --accelerate takes a number of processes, or a configuration file"),
        ("distributed_type: [", "is no configuration of Accelerate's: ParserError"),
        ("four", "is no configuration of Accelerate's: AttributeError"),
        ("num_processes: 2", "A `distributed_type` must be specified"),
        ("distributed_type: MULTI_GPU\nproceses: 2", r"unknown keys \(\['proceses'\]\)"),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}",
            "deepspeed_config is not known to work here",
        ),
        (
            "distributed_type: XLA",
            "distributed_type: XLA is not known to work here. distributed_type may be NO",
        ),
        ("distributed_type: FSDP\nnum_processes: 2", "FSDP and an fsdp_config belong together"),
        (
            "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 1}",
            "set fsdp_version: 2",
        ),
        (
            "distributed_type: FSDP\nnum_processes: 1\nfsdp_config: {fsdp_version: 2}",
            "nobody to share the weights with",
        ),
        (
            "distributed_type: MULTI_CPU\nnum_processes: 3\nnum_machines: 2",
            "no multiple of num_machines: 2",
        ),
        (
            "distributed_type: MULTI_CPU\nnum_processes: 2\nnum_machines: 2",
            "set MASTER_ADDR, or main_process_ip",
        ),
        (
            "distributed_type: MULTI_CPU\nnum_processes: 2\nnum_machines: 2\nmain_process_ip: "
            "h\nmachine_rank: 2",
            "machine 2 of 2, counted from 0",
        ),
        (
            "distributed_type: MULTI_GPU\nnum_processes: 2",
            "asks for GPUs, and this machine has none",
        ),
        ('distributed_type: "NO"', "asks for GPUs, and this machine has none"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_and_what_to_write(
    text: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    file = tmp_path / "own.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TuningError, match=says):
        machines(file, {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "distributed_type: MULTI_GPU\nnum_processes: 9",
            "asks for 9 processes with a GPU each, and this machine has 8",
        ),
        ('distributed_type: "NO"\nuse_cpu: true', "says use_cpu, and this process sees a GPU"),
        ('distributed_type: "NO"\ngpu_ids: "3"', "set CUDA_VISIBLE_DEVICES=3"),
    ],
)
def test_a_file_that_does_not_fit_the_gpus_says_so(
    text: str, says: str, gpus: None, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(TuningError, match=says):
        machines(tmp_path / "own.yaml", {})


@pytest.mark.parametrize(
    ("mixed", "precision", "fits"),
    [("bf16", "auto", True), ("bf16", "fp32", False), ("fp16", "bf16", False)],
)
def test_a_precision_of_the_file_that_would_not_count_is_refused(
    mixed: str, precision: str, fits: bool
) -> None:
    made = Machines(2, file=Path("own.yaml"), mixed=mixed)
    if fits:
        return check_precision(made, precision)
    with pytest.raises(
        TuningError,
        match=f'mixed_precision: {mixed}, and the settings say precision = "{precision}"',
    ):
        check_precision(made, precision)


def test_one_process_is_this_one_and_takes_what_one_process_takes(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ROOT / "programs/accelerate/one_gpu.yaml"
    check_processes(KTO(held_out=0.25), file)
    with pytest.raises(
        TuningError,
        match="per_device_train_batch_size = 3, gradient_accumulation_steps = 2 cannot be dealt out to 4",
    ):
        check_processes(
            DPO(per_device_train_batch_size=3, gradient_accumulation_steps=2),
            ROOT / "programs/accelerate/several_gpus.yaml",
        )


@pytest.mark.slow
def test_the_file_for_a_cpu_trains_as_one_process_does(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cowest_dspy import tune
    from cowest_dspy.lms import TransformersEngine
    from cowest_dspy.tuning import tunable

    given: list[Any] = []
    monkeypatch.setattr(
        provider, "launch", lambda *a, **b: given.append(b["processes"]) or launch(*a, **b)
    )
    weak = tunable(TransformersEngine(str(tiny_model)).lm())
    how = SFT(
        **quick(num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=4),
        lora=LORA,
    )
    one = tune(weak, sft_rows(7), "sft", how, tmp_path / "one", seed=5)
    two = tune(weak, sft_rows(7), "sft", how, tmp_path / "two", seed=5, processes=CPU)
    assert [made.file for made in given] == [CPU]
    assert_close(one.result.path, two.result.path, 1e-5)
    pairs = zip(one.result.history, two.result.history, strict=True)
    for alone, together in pairs:
        assert compared(together) == pytest.approx(compared(alone), rel=1e-4, abs=1e-5)
    assert two.model.endswith(adapter_hash(two.result.path))


@pytest.mark.slow
def test_two_machines_train_together_and_only_the_first_writes(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Both are this machine, which shows all but the network: two launchers, which meet at an
    address, and share a folder."""
    file, run = tmp_path / "two.yaml", tmp_path / "run"
    file.write_text(
        "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\n"
    )
    port = str(free_port())
    first, second = (
        machines(file, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": rank})
        for rank in "01"
    )
    said: list[str] = []
    took: list[int] = []
    other = threading.Thread(target=lambda: took.append(join(run, second, said.append, poll=0.05)))
    stale = run / "adapters/.r0.1.killed.tmp"
    stale.mkdir(parents=True)
    (stale / "spec.json").write_text('{"begun": 9e12, "by": ["elsewhere", 1, 0.0]}')
    other.start()
    how = settings(SFT)
    with Store(run):
        two = launch(
            how, sft_rows(7), first, base=str(tiny_model), output=run / "adapters/r1", seed=5
        )
    other.join(timeout=30)
    train, _, data = kinds(7)["sft"]
    assert_close(
        train(how, data, base=str(tiny_model), output=tmp_path / "one", seed=5).path, two.path, 1e-5
    )
    assert took == [1] and [line.partition(":")[0] for line in said] == [
        "machine 1 of 2, counted from 0",
        "training",
    ]
    assert sorted(path.name for path in (run / "adapters").iterdir()) == [stale.name, "r1"]


def test_a_machine_after_the_first_begins_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        TuningError, match="This is machine 1 of 2: training is begun on the first one"
    ):
        launch(SFT(), sft_rows(), Machines(2, 2, 1), base="none", output=tmp_path / "out")
    with pytest.raises(TuningError, match="This is the first machine"):
        join(tmp_path, Machines(2, 2, 0))


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
    hashes = {adapter_hash(tmp_path / "two" / rank) for rank in "01"}
    assert [line[0] for line in said] == ["DistributedType.FSDP"] * 2 and {
        line[1] for line in said
    } == hashes
    assert len(hashes) == 1, "every process has the whole adapter"
    assert_close(one.path, tmp_path / "two/0", 1e-5)
    assert [float(loss) for loss in said[0][2:]] == pytest.approx(
        [record["loss"] for record in one.history], rel=1e-4, abs=1e-5
    )
    assert {name: tensor.dtype for name, tensor in read(one.path).items()} == {
        name: tensor.dtype for name, tensor in read(tmp_path / "two/0").items()
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


@pytest.mark.slow
def test_the_same_command_on_two_machines_tunes_one_run(task: list[str], tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(
        "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\n"
    )
    cowest("collect", *task)
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }
    command = [
        sys.executable,
        "-m",
        "cowest_dspy.cli.main",
        "tune",
        *task,
        "--accelerate",
        str(file),
    ]
    both = [
        subprocess.Popen(
            command,
            env={**os.environ, **where, "NODE_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "tuned: local/" in said[0][0]
    assert said[1][0].splitlines()[-1] == "took part in 1 trainings", (
        "preference tuning; collecting has fine-tuned"
    )
    assert "tuned:" not in said[1][0]
