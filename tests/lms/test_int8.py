"""int8: close to the float layers that it replaces, told apart by its name, and honest about what
it cannot do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_adapter
from torch import nn

from cowest_dspy.errors import ModelError
from cowest_dspy.lms import LocalEngine
from cowest_dspy.lms.local import attention, int8, weights
from cowest_dspy.lms.local.int8 import int8_product, quantize
from cowest_dspy.store import serialize


@pytest.fixture(autouse=True, params=["plain", "packed"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every test with each of the two ways to multiply; gives the largest value of an input's
    token."""
    packed = request.param == "packed"
    if packed and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no FBGEMM")
    monkeypatch.setattr(int8, "packs", lambda: packed)
    return 63 if packed else 127


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    sizes=st.tuples(st.integers(8, 70), st.integers(1, 70)),
    bias=st.booleans(),
    largest=st.floats(1e-3, 1e3),
)
def test_a_layer_in_int8_is_off_by_about_one_part_in_a_hundred(
    arithmetic: int, rows: list[int], sizes: tuple[int, int], bias: bool, largest: float
) -> None:
    torch.manual_seed(len(rows) + sum(sizes))
    linear = nn.Linear(*sizes, bias=bias)
    inputs = torch.randn(*rows, sizes[0]) * largest
    with torch.no_grad():
        exact, found = linear(inputs), int8_product(linear.weight, linear.bias)(inputs)
    assert found.shape == exact.shape and found.dtype == torch.float32
    # Rounding moves each factor by at most half a step: the sum cannot be off by more than this.
    step_in, step_weight = (
        inputs.abs().amax(-1, keepdim=True) / (2 * arithmetic),
        linear.weight.abs().amax(1) / 254,
    )
    bound = (
        step_in * linear.weight.abs().sum(1)
        + step_weight * inputs.abs().sum(-1, keepdim=True)
        + sizes[0] * step_in * step_weight
    )
    assert bool(((found - exact).abs() <= bound * 1.001 + 1e-5 * largest).all())


def test_a_token_of_zeros_stays_zero() -> None:
    assert not int8_product(nn.Linear(8, 4).weight)(torch.zeros(2, 8)).any()


def test_a_large_token_does_not_blur_the_others() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    inputs = torch.randn(2, 16)
    beside = torch.stack([inputs[0], inputs[1] * 1e4])
    with torch.no_grad():
        layer = int8_product(linear.weight, linear.bias)
        assert torch.equal(layer(inputs)[0], layer(beside)[0])


def test_every_linear_layer_of_a_model_is_replaced_and_what_it_says_stays_close(
    tiny_model: Path,
) -> None:
    float_model, int8_model = (
        weights.load_model(tiny_model, "float32"),
        weights.load_model(tiny_model, "int8"),
    )
    assert not [
        module
        for module in int8_model.modules()
        if isinstance(module, nn.Linear) and module.weight is not None
    ]
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        exact, found = (
            torch.log_softmax(model(input_ids=ids).logits, -1)
            for model in (float_model, int8_model)
        )
    assert float((exact.exp() * (exact - found)).sum(-1).mean()) < 0.01


def test_the_file_of_the_weights_is_let_go(tiny_model: Path) -> None:
    model = weights.load_model(tiny_model, "int8")
    kept = {
        name: parameter.untyped_storage().nbytes() for name, parameter in model.named_parameters()
    }
    assert all(
        size == dict(model.named_parameters())[name].numel() * 4 for name, size in kept.items()
    )


def test_quantizing_twice_changes_nothing(tiny_model: Path) -> None:
    model = weights.load_model(tiny_model, "int8")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        assert torch.equal(quantize(model)(input_ids=ids).logits, before)


def test_a_large_weight_is_rounded_in_parts_as_it_would_be_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, inputs = torch.randn(11, 16), torch.randn(3, 16)
    whole = int8_product(weight)(inputs)
    monkeypatch.setattr(int8, "ROWS", 4)
    assert torch.equal(int8_product(weight)(inputs), whole)


def test_an_engine_in_int8_has_a_name_of_its_own_and_answers(tiny_model: Path) -> None:
    plain, small = (
        LocalEngine(tiny_model, dtype="float32"),
        LocalEngine(tiny_model, dtype="int8"),
    )
    assert small.model_id == f"{plain.model_id}-int8"
    asked = [[{"role": "user", "content": f"Question {i}?"}] for i in range(6)]
    requests = [
        serialize.request_from_messages(small.model_id, messages, max_tokens=5, temperature=0.0)
        for messages in asked
    ]
    with ThreadPoolExecutor(6) as pool:
        together = [
            serialize.response_text(response) for response in pool.map(small.complete, requests)
        ]
    assert together == [serialize.response_text(small.complete(request)) for request in requests]


def test_an_adapter_on_int8_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_model, tmp_path / "adapter", seed=1)
    with pytest.raises(ModelError, match="adapters need float weights"):
        LocalEngine(tiny_model, dtype="int8").load_adapter(folder)


def test_rounding_does_not_keep_an_engine_from_sharing_prompts(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a model's attention can be computed in parts is asked of it before its weights are
    rounded: rounding makes more of a difference than the question allows (0.09 of 0.05 on
    Qwen2.5-Coder-1.5B, which then computed every prompt whole)."""
    seen: list[bool] = []

    def asked(model: Any) -> bool:
        seen.extend(
            layer.weight is not None for layer in model.modules() if isinstance(layer, nn.Linear)
        )
        return take_over(model)

    take_over = attention.take_over
    monkeypatch.setattr(attention, "take_over", asked)
    assert LocalEngine(tiny_model, dtype="int8")._load().joinable
    assert seen and all(seen), "all weights were floats when it was asked"


def test_sums_are_exact_at_the_largest_values(arithmetic: int) -> None:
    """All weights and inputs at the ends of their ranges: where 16 bits would overflow, if the
    input had all of its 8."""
    weight, inputs = torch.full((4, 4096), -1.0), torch.full((3, 4096), 1.0)
    weight[1], inputs[1], weight[2, ::2] = 1.0, -1.0, 1.0
    assert torch.allclose(int8_product(weight)(inputs), inputs @ weight.T, rtol=1e-6)


def test_both_ways_say_nearly_the_same(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, said = torch.arange(3, 40)[None], []
    for packed in (False, True):
        monkeypatch.setattr(int8, "packs", lambda packed=packed: packed)
        with torch.inference_mode():
            said.append(
                torch.log_softmax(weights.load_model(tiny_model, "int8")(input_ids=ids).logits, -1)
            )
    assert float((said[0].exp() * (said[0] - said[1])).sum(-1).mean()) < 0.01
