"""Private names of other libraries that the library reaches into are there, do what it takes them
for, and stand in compat.py."""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

from cowest_dspy import compat
from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.testing import ScriptedEngine

LIBRARY = Path(compat.__file__).parent
PROTOCOLS = {
    "_exit",  # os, documented
    "_make",  # namedtuple, documented
    "_repr_html_",  # IPython, documented
    "_compiled",  # what every optimiser of DSPy sets on a program
}
KNOWN = {("prompt_calls.py", "_set_num_trials_from_num_candidates")}


def test_trl_looks_up_use_triton_when_it_projects_onto_the_vocabulary() -> None:
    utils: Any = importlib.import_module("trl.trainer.utils")
    original = utils._use_triton
    assert "_use_triton" in utils.add_fused_lm_head.__code__.co_names or any(
        "_use_triton" in getattr(one, "co_names", ())
        for one in utils.add_fused_lm_head.__code__.co_consts
    )
    with pytest.raises(KeyError), compat.compact_lm_head():  # noqa: PT012
        assert utils._use_triton is not original and utils._use_triton("cpu")
        raise KeyError
    assert utils._use_triton is original


def test_a_config_of_transformers_knows_the_name_of_its_attention() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, num_key_value_heads=1, **sizes))
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert compat.attention_name(model.config) == name


def test_torch_says_what_the_processor_has() -> None:
    import torch

    capabilities: Any = torch.cpu.get_capabilities()
    assert compat.has_vnni() is bool(capabilities.get("avx512_vnni", False))


def test_torch_multiplies_int8_exactly_and_quantizes_rows() -> None:
    import torch

    one = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    other = torch.randint(-127, 128, (64, 16), dtype=torch.int8)
    assert torch.equal(compat.int8_product(one, other).long(), one.long() @ other.long())
    scales = torch.linspace(0.5, 2.0, 32, dtype=torch.float64)
    rows = compat.quantized_rows(one, scales, torch.zeros(32, dtype=torch.long))
    assert torch.equal(rows.int_repr(), one)
    torch.testing.assert_close(rows.dequantize(), one * scales.float()[:, None])


def test_an_lm_of_dspy_knows_whether_it_can_be_awaited() -> None:
    from cowest_dspy.lms.base_engine import AsyncEngine
    from cowest_dspy.testing import ScriptedEngine

    engine = ScriptedEngine({"": "yes"})
    plain, awaited = engine.lm(), dspy.LM("a/b", engine=engine, async_engine=AsyncEngine(engine))
    assert compat.has_async_engine(dspy.LM("openai/any"))
    assert compat.has_async_engine(awaited) and not compat.has_async_engine(plain)
    with pytest.raises(dspy.LMUnsupportedFeatureError, match="no async counterpart"):
        asyncio.run(plain.acall("Is it?"))


def test_a_connection_of_uvicorn_is_what_ours_takes_it_for() -> None:
    """tests/serve/test_serving_connections.py says what ours does with it."""
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

    begins = inspect.getsource(H11Protocol.__init__)
    for name in ("app", "cycle", "loop", "timeout_keep_alive_task", "transport"):
        assert f"self.{name}" in begins, name
    assert "self.timeout_keep_alive_task" in inspect.getsource(
        H11Protocol._unset_keepalive_if_required
    )
    assert "self.response_complete" in inspect.getsource(RequestResponseCycle.__init__)
    assert issubclass(compat.connection_class(1.0, 1.0), H11Protocol)


def test_only_compat_reaches_into_private_names_of_others() -> None:
    trees = {path: ast.parse(path.read_text("utf-8")) for path in LIBRARY.rglob("*.py")}
    ours = {name for tree in trees.values() for name in defined(tree)}
    found = {
        (path.name, name)
        for path, tree in trees.items()
        if path.name != "compat.py"
        for name in reached(tree)
        if name not in ours | PROTOCOLS
    }
    assert found <= KNOWN, found - KNOWN


def test_the_check_sees_every_kind_of_reach() -> None:
    tree = ast.parse(
        "from torch import _C\nimport trl._x\ntorch._int_mm(a)\ngetattr(lm, '_engine_spec')\n"
        "class A(B):\n    def f(self):\n        self._own = 1\n        self._theirs\n"
    )
    assert set(reached(tree)) - set(defined(tree)) == {
        "_C", "_x", "_int_mm", "_engine_spec", "_theirs",
    }  # fmt: skip


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


def reached(tree: ast.AST) -> Iterator[str]:
    """The private names that a file takes from an object or a module."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            names = [
                ast.literal_eval(one) for one in node.args[1:2] if isinstance(one, ast.Constant)
            ]
        yield from (name for name in names if is_private(name))


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a file gives to something: functions, classes, variables and the attributes
    that an object sets on itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) in ("self", "cls") else []


@pytest.mark.parametrize("zero_shot", [True, False])
def test_miprov2_looks_at_the_number_of_predictors_for_its_trials(zero_shot: bool) -> None:
    program = dspy.ChainOfThought("question -> answer")
    lm = dspy.utils.DummyLM([])
    optimizer: Any = dspy.MIPROv2(metric=lambda *_: 1.0, prompt_model=lm, task_model=lm)
    found = optimizer._set_num_trials_from_num_candidates(program, zero_shot, 6)
    assert compat.count_mipro_trials(1, zero_shot, 6) == found > 0


def test_prompt_messages_are_what_the_adapter_sends() -> None:
    lm = ScriptedEngine(lambda request: "Answer: 8").lm()
    signature: Any = dspy.Predict("question -> answer").signature
    with dspy.context(lm=lm, adapter=LineAdapter()):
        dspy.Predict(signature)(question="How many?")
    sent = lm.history[-1]["messages"]
    assert compat.prompt_messages(LineAdapter(), signature, [], {"question": "How many?"}) == sent


def test_only_compat_makes_prompts_of_an_adapter() -> None:
    """``adapter.format(signature, demos, inputs)`` gives something else in DSPy 3.5; an adapter of
    ours may pass on what its base gives."""
    calls = {
        path.relative_to(LIBRARY).as_posix()
        for path in LIBRARY.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "format"
        and len(node.args) >= 3
        and not isinstance(node.func.value, ast.Constant)
    }
    assert calls == {"compat.py"}


def test_a_hub_that_cannot_be_reached_raises_what_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import get_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(compat.hub_errors(), match=r"(?i)refused|connect"):
        get_session().get("http://127.0.0.1:1")
    for error in (HfHubHTTPError, LocalEntryNotFoundError):
        assert issubclass(error, compat.hub_errors())


def test_a_model_takes_its_cache_by_the_name_that_stays(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    cache: Any = DynamicCache(config=model.config)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("error", "`past_key_values`", FutureWarning)
        model(input_ids=torch.tensor([[1, 2, 3]]), **compat.cached(model.config, cache))
    assert cache.get_seq_length() == 3
