"""Linear layers in 8-bit integers, for a processor: what limits a large model there is arithmetic,
and integers are cheaper.

A weight's row and an input's token each get a scale of their own (the largest absolute value
becomes 127); their product is summed exactly in 32-bit integers and scaled back. No calibration,
nothing to configure: the form called W8A8 with dynamic, per-token scales (as in Dettmers et al.,
2022, arXiv 2208.07339, without its separate treatment of outliers).

Processors without instructions for this (AVX2 only, no VNNI) sum two products in 16 bits. There the
input's largest value becomes 63, so that the sum stays exact, and FBGEMM computes it from packed
weights: half as fine, 2.4 to 3.7 times as fast as floats, and 7 times (one token) to 53 times (128)
as fast as what PyTorch's integer product falls back to (`python benchmarks/bench_precision.py
--layers`, on a processor with AVX2 only).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cowest_dspy import compat

if TYPE_CHECKING:
    import torch

# Rows of a weight that are rounded together: the float copies of a large head would cost gigabytes.
ROWS = 4096


def quantize(model: Any) -> Any:
    """Make every linear layer of ``model``, the head included, compute in int8, and return
    ``model``. For inference only.

    The float weights are let go. What stays (embeddings, norms) becomes float32, and with it all
    that is computed between the layers.
    """
    import torch

    linears: list[Any] = [
        module for module in model.modules() if isinstance(module, torch.nn.Linear)
    ]
    for module in linears:
        if module.weight is not None:
            module.forward = int8_product(module.weight, module.bias)
            module.register_parameter("weight", None)
            module.register_parameter("bias", None)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return model


def int8_product(
    weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The linear layer with this weight ``[out, in]`` and bias ``[out]`` in int8, from ``[...,
    in]`` to ``[..., out]``, float32."""
    import torch

    rows, row_scales = _rounded(weight.detach())
    product, largest_value = (
        (_packed(rows, row_scales), 63) if packs() else (_plain(rows, row_scales), 127)
    )
    offset = None if bias is None else bias.detach().float()

    def forward(input: torch.Tensor) -> torch.Tensor:
        tokens = input.reshape(-1, input.shape[-1])
        largest = torch.maximum(
            tokens.amax(dim=1, keepdim=True), tokens.amin(dim=1, keepdim=True).neg_()
        )
        scales = largest.clamp_(min=1e-12).div_(largest_value)
        summed = product(tokens.mul(scales.reciprocal()).round_()).mul_(scales)
        if offset is not None:
            summed.add_(offset)
        return summed.view(*input.shape[:-1], summed.shape[-1])

    return forward


@lru_cache(maxsize=1)
def packs() -> bool:
    """Whether this processor has no instructions for sums of 8-bit products, and this PyTorch has
    FBGEMM, which does without."""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64") or compat.has_vnni():
        return False
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch.ops.quantized, _PACKED_PRODUCT
    )


_PACKED_PRODUCT = "linear_with_input_q_dq_qweight_dq_output_fp32"


def _plain(rows: torch.Tensor, row_scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product with these rows, from whole numbers of -127 to 127 in floats."""
    import torch

    def product(whole: torch.Tensor) -> torch.Tensor:
        summed = compat.int8_product(whole.to(torch.int8), rows.t())
        return summed.float().mul_(row_scales)

    return product


def _packed(rows: torch.Tensor, row_scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product with these rows, from whole numbers of -63 to 63 in floats."""
    import torch

    zeros = torch.zeros(len(rows), dtype=torch.long)
    quantized = compat.quantized_rows(rows, row_scales.double(), zeros)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    times = getattr(torch.ops.quantized, _PACKED_PRODUCT)
    # As unsigned bytes around 64: at most 2 * 127 * 127 in 16 bits.
    return lambda whole: times(whole, 1.0, 64, packed)


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` in int8, and what each row is to be multiplied by, float32 ``[out]``."""
    import torch

    rows = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.float32)
    for start in range(0, weight.shape[0], ROWS):
        part = weight[start : start + ROWS].float()
        scale = part.abs().amax(dim=1).clamp_(min=1e-12).div_(127)
        rows[start : start + ROWS] = part.div(scale[:, None]).round_()
        scales[start : start + ROWS] = scale
    return rows, scales
