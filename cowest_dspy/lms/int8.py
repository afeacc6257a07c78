"""Linear layers in 8-bit integers, for a processor: what limits a large model there is arithmetic, and integers are cheaper.

A weight's row and an input's token each get a scale of their own (the largest absolute value becomes 127); their product is
summed exactly in 32-bit integers and scaled back. No calibration, nothing to configure: the form called W8A8 with dynamic,
per-token scales (as in Dettmers et al., 2022, arXiv 2208.07339, without its separate treatment of outliers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Int8Linear(nn.Module):
    """``nn.Linear`` for inference: int8 weight ``[out, in]``, one float32 scale per row; inputs of any shape ``[..., in]``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", (weight / scale[:, None]).round_().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, both float32."""
        tokens = input.reshape(-1, self.in_features)
        largest = torch.maximum(tokens.amax(dim=1, keepdim=True), tokens.amin(dim=1, keepdim=True).neg_())
        scale = largest.clamp_(min=1e-12).div_(127)
        whole = tokens.mul(scale.reciprocal()).round_().to(torch.int8)
        # Underscored, but it is what torch has for this since 2.1; torchao calls it too.
        product = torch._int_mm(whole, self.weight.t())  # pyright: ignore[reportPrivateImportUsage]
        product = product.float().mul_(scale).mul_(self.scale)
        if self.bias is not None:
            product.add_(self.bias)
        return product.view(*input.shape[:-1], self.out_features)


def quantize(model: Any) -> Any:
    """Replaces every linear layer of ``model`` in place, the head included, and gives ``model``.

    Whatever stays (embeddings, norms) becomes float32, and with it all that is computed between the layers.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return model
