"""GGUF -> Hugging Face folder, on a whole but tiny llama: Q8_0 matrices, a byte-level tokenizer, a
chat template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_tiny_gguf

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.local import weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(tiny: Path) -> Path:
    weights.convert_gguf(tiny, tiny.parent / "tiny", "float32")
    return tiny.parent / "tiny"


def test_the_weights_are_those_of_the_file(tiny: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import load_file

    written = load_file(folder / "model.safetensors")
    stored = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(tiny).tensors
    }
    assert np.array_equal(written["model.embed_tokens.weight"], stored["token_embd.weight"])
    assert np.array_equal(
        written["model.layers.1.mlp.down_proj.weight"], stored["blk.1.ffn_down.weight"]
    )
    assert np.array_equal(written["model.norm.weight"], stored["output_norm.weight"])
    # The embedding serves as the output too, and stands in the folder once.
    assert len(written) == len(stored)


def test_the_folder_computes_what_the_gguf_computes(tiny: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype="float32")
    after = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_the_folder_can_be_trained_and_saved_again(folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(3, 40).unsqueeze(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(tokens, labels=tokens).loss
    first.backward()
    optimizer.step()
    assert model(tokens, labels=tokens).loss < first
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_the_tokenizer_and_its_chat_template_come_along(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert tokens[0] == 1 and tokens.count(2) == 1
    assert tokenizer.decode(tokens) == text


def test_generation_stops_at_every_turn_end_of_the_vocabulary_and_can_pad(folder: Path) -> None:
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert generation["pad_token_id"] is not None


def test_the_dtype_is_the_one_asked_for(tiny: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights.convert_gguf(tiny, tmp_path / "half", "bfloat16")
    written = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "model.gguf"
    page.write_bytes(b"<!doctype html> not found")
    with pytest.raises(
        ModelError, match=r"model\.gguf is not a GGUF file: it begins with b'<!do'.*Fetch it again"
    ):
        weights.locate(str(page))
    with pytest.raises(ModelError, match=r"no GGUF file .*absent\.gguf"):
        weights.locate(str(tmp_path / "absent.gguf"))


@pytest.mark.parametrize(
    "kept", [0.002, 0.1, 0.6, 0.999], ids=["header", "vocabulary", "half", "tail"]
)
def test_a_file_that_ends_too_early_is_refused_and_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    monkeypatch.setenv("COWEST_CACHE", str(tmp_path / "cache"))
    cut = tmp_path / "cut.gguf"
    whole = tiny.read_bytes()
    cut.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ModelError, match=r"cut\.gguf.*damaged, or ends too early.*Fetch it again"):
        weights.locate(str(cut))
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    strange = tmp_path / "strange.gguf"
    writer = GGUFWriter(strange, "perpetuum")
    writer.add_name("strange")
    writer.add_tensor("x", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="perpetuum"):
        weights.convert_gguf(strange, tmp_path / "model", "float32")


def test_the_engine_takes_a_gguf_file_and_converts_it_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cowest_dspy.lms import LocalEngine
    from cowest_dspy.store import serialize

    monkeypatch.setenv("COWEST_CACHE", str(tmp_path))
    engine = LocalEngine(tiny, dtype="float32")
    request = serialize.request_from_messages(
        engine.model_id, [{"role": "user", "content": "hell"}], max_tokens=4
    )
    answer = engine.complete(request)
    (folder,) = (tmp_path / "gguf").iterdir()
    made = folder.stat().st_mtime_ns
    again = LocalEngine(tiny, dtype="float32")
    assert again.model_id == engine.model_id and serialize.response_text(
        again.complete(request)
    ) == serialize.response_text(answer)
    assert folder.stat().st_mtime_ns == made
