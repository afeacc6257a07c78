"""An adapter that is damaged, or is another model's, is one clear error before anything is answered
or trained with it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter, make_tiny_model
from tuning_rows import QUICK, sft_rows

from cowest_dspy import build_lm
from cowest_dspy.errors import ModelError
from cowest_dspy.lms import LocalEngine, lora_gguf
from cowest_dspy.lms.config import InProcess, Server
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.lms.server import ServerEngine
from cowest_dspy.store import serialize
from cowest_dspy.tuning import SFT, train_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "good", seed=1)


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def cut(length: int) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def configured(text: str | None = None, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / CONFIG
        values = {**json.loads(file.read_text()), **changes}
        file.write_text(
            json.dumps({key: value for key, value in values.items() if value != "left out"})
            if text is None
            else text
        )

    return change


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def write(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return write


UNREADABLE: dict[str, Change] = {
    "cut in the header": cut(1000),
    "cut at the end": cut(-100),
    "empty": cut(0),
    "a header of 2^60 bytes": lambda folder: (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", 2**60) + b"{}"
    ),
    "no JSON": configured("{"),
    "a list": configured("[]"),
    "deep": configured("[" * 100_000),
    "a number of 5,000 digits": configured('{"r": ' + "1" * 5000 + "}"),
    "no kind": configured(peft_type="left out"),
    "another kind of modules": configured(target_modules=[1, "q_proj"]),
    "no UTF-8": lambda folder: (folder / CONFIG).write_bytes(b"\xff"),
}
UNFIT: dict[str, Change] = {
    "an unknown kind": configured(peft_type="NOPE"),
    "a rank in words": configured(r="four"),
    "another rank": configured(r=8),
    "an alpha in words": configured(lora_alpha="eight"),
    "modules that are not there": configured(target_modules=["nothing"]),
    "other shapes": tensors(
        lambda all_: {k: v[:, :3].contiguous() if "lora_A" in k else v for k, v in all_.items()}
    ),
    "half of the tensors": tensors(lambda all_: dict(list(all_.items())[:5])),
    "other names": tensors(
        lambda all_: {name.replace("layers", "blocks"): value for name, value in all_.items()}
    ),
    "layers of the base moved": configured(layer_replication=[[0, 2], [0, 2]]),
}


@pytest.mark.parametrize("damage", [*UNREADABLE, *UNFIT])
def test_no_engine_takes_a_damaged_adapter(damage: str, adapter: Path, tiny_model: Path) -> None:
    {**UNREADABLE, **UNFIT}[damage](adapter)
    engine = LocalEngine(tiny_model, dtype="float32")
    server = ServerEngine(
        Server(
            kind="server",
            server="vllm",
            model="tiny",
            api_base="http://127.0.0.1:9/v1",
            weights=str(tiny_model),
        )  # pyright: ignore[reportCallIssue]
    )
    says = "adapter.* is damaged" if damage in UNREADABLE else "adapter does not fit .*tiny"
    for load in (engine.load_adapter, server.load_adapter):
        with pytest.raises(ModelError, match=says) as error:
            load(adapter)
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    assert engine.adapter_folder(engine.model_id) is None and not engine.dump_state()["adapters"]


@pytest.mark.parametrize("damage", ["empty", "deep", "other shapes"])
def test_neither_a_table_nor_a_training_starts_with_one(
    damage: str, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    {**UNREADABLE, **UNFIT}[damage](adapter)
    says = "is damaged|does not fit"
    with pytest.raises(ModelError, match=says):
        build_lm(InProcess(kind="in_process", model=str(tiny_model), adapter=str(adapter)))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ModelError, match=says):
        train_adapter(
            SFT(**QUICK), sft_rows(), base=str(tiny_model), adapter=adapter, output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", UNREADABLE)
def test_none_is_converted_for_llama_cpp(damage: str, adapter: Path, tiny_model: Path) -> None:
    UNREADABLE[damage](adapter)
    with pytest.raises(ModelError, match="is damaged"):
        lora_gguf.convert(adapter, tiny_model)


def test_an_adapter_that_names_no_base_is_taken(
    adapter: Path, good: Path, tiny_model: Path
) -> None:
    configured(base_model_name_or_path=None)(adapter)
    assert LocalEngine(tiny_model).load_adapter(adapter).endswith(adapter_hash(good))


def test_the_base_answers_as_before_after_one_was_refused(
    adapter: Path, good: Path, tiny_model: Path
) -> None:
    engine = LocalEngine(tiny_model, dtype="float32")
    asked = lambda model: serialize.response_text(  # noqa: E731
        engine.complete(
            serialize.request_from_messages(
                model, [{"role": "user", "content": "Which press?"}], max_tokens=8
            )
        )
    )
    before = asked(engine.model_id)
    UNFIT["other shapes"](adapter)
    with pytest.raises(ModelError, match="does not fit"):
        engine.load_adapter(adapter)
    assert asked(engine.model_id) == before != asked(engine.load_adapter(good))


def test_law_6_weights_that_changed_since_their_id_was_given_never_answer(
    adapter: Path, tiny_model: Path
) -> None:
    engine = LocalEngine(tiny_model, dtype="float32")
    model = engine.load_adapter(adapter)
    tensors(lambda all_: {name: -value for name, value in all_.items()})(adapter)
    with pytest.raises(ModelError, match=r"does not hold the weights of .* any more"):
        engine.complete(
            serialize.request_from_messages(
                model, [{"role": "user", "content": "Which press?"}], max_tokens=4
            )
        )


def test_law_6_what_scales_an_adapter_is_part_of_its_id(adapter: Path) -> None:
    before = adapter_hash(adapter)
    configured(alpha_pattern={"down_proj": 2})(adapter)
    assert adapter_hash(adapter) != before


def test_a_planted_gguf_is_not_taken_for_the_adapter(
    adapter: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("COWEST_CACHE", str(tmp_path / "cache"))
    planted = adapter / lora_gguf.file_name(adapter_hash(adapter))
    planted.write_bytes(b"GGUF planted")
    file = lora_gguf.convert(adapter, tiny_model)
    assert (
        file.is_relative_to(tmp_path / "cache")
        and file.name == planted.name
        and b"planted" not in file.read_bytes()[:64]
    )
    assert lora_gguf.convert(adapter, tiny_model) == file and [*file.parent.iterdir()] == [file]


def test_a_base_of_another_shape_is_named(good: Path, tmp_path: Path) -> None:
    wide = make_tiny_model(tmp_path / "wide", hidden_size=128)
    with pytest.raises(ModelError, match=r"good does not fit .*wide: .*size mismatch"):
        LocalEngine(wide).load_adapter(good)
