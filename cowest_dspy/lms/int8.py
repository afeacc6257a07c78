"""Linear layers in 8-bit integers, for a processor: what limits a large model there is arithmetic, and integers are cheaper.

A weight's row and an input's token each get a scale of their own (the largest absolute value becomes 127); their product is
summed exactly in 32-bit integers and scaled back. No calibration, nothing to configure: the form called W8A8 with dynamic,
per-token scales (as in Dettmers et al., 2022, arXiv 2208.07339, without its separate treatment of outliers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cowest_dspy.lms.mapped import drop_pages

if TYPE_CHECKING:
    import torch

# Rows of a weight that are rounded together: the float copies of a large head would cost gigabytes.
ROWS = 4096


def quantize(model: Any) -> Any:
    """Makes every linear layer of ``model``, the head included, compute in int8, and gives ``model``. For inference only.

    The float weights are let go. What stays (embeddings, norms) becomes float32, and with it all that is computed between
    the layers.
    """
    import torch

    linears: list[Any] = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for module in linears:
        if module.weight is not None:
            module.forward = int8_product(module.weight, module.bias)
            drop_pages(module.weight)
            module.register_parameter("weight", None)
            module.register_parameter("bias", None)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return model


def int8_product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The linear layer with this weight ``[out, in]`` and bias ``[out]`` in int8, from ``[..., in]`` to ``[..., out]``, float32."""
    import torch

    rows, row_scales = _rounded(weight.detach())
    offset = None if bias is None else bias.detach().float()

    def forward(input: torch.Tensor) -> torch.Tensor:
        tokens = input.reshape(-1, input.shape[-1])
        largest = torch.maximum(tokens.amax(dim=1, keepdim=True), tokens.amin(dim=1, keepdim=True).neg_())
        scales = largest.clamp_(min=1e-12).div_(127)
        whole = tokens.mul(scales.reciprocal()).round_().to(torch.int8)
        # Underscored, but it is what torch has for this since 2.1; torchao calls it too.
        product = torch._int_mm(whole, rows.t())  # pyright: ignore[reportPrivateImportUsage]
        product = product.float().mul_(scales).mul_(row_scales)
        if offset is not None:
            product.add_(offset)
        return product.view(*input.shape[:-1], product.shape[-1])

    return forward


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
