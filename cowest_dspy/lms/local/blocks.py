"""Where keys and values of sequences stand while they are generated: in place, without gaps, never
concatenated.

Sequences 0 .. count-1 are in use. One that ends is overwritten by the last, so that what is in use
is always a view of the first ones, and a step of decoding copies nothing but its new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SMALLEST = 8


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps of a token: ``kv_heads`` keys and values of ``size`` numbers."""

    kv_heads: int
    size: int


class Blocks:
    """Room for sequences of up to some length: per layer keys and values ``[capacity, kv heads,
    length, size]`` in float32.

    Room grows when it is asked for, at least to the double, so that what is copied on the way is
    less than what stands there in the end.
    """

    def __init__(self, layers: Sequence[LayerShape], device: Any) -> None:
        self.layers, self.device = tuple(layers), device
        self.count, self.capacity, self.length = 0, 0, 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def make_room(self, count: int, length: int) -> None:
        """Sees that ``count`` sequences of ``length`` tokens can stand here."""
        if count <= self.capacity and length <= self.length:
            return
        capacity = (
            self.capacity if count <= self.capacity else max(count, 2 * self.capacity, _SMALLEST)
        )
        longer = self.length if length <= self.length else max(length, 2 * self.length)
        self.keys = [
            self._moved(old, layer, capacity, longer) for old, layer in self._old(self.keys)
        ]
        self.values = [
            self._moved(old, layer, capacity, longer) for old, layer in self._old(self.values)
        ]
        self.capacity, self.length = capacity, longer

    def append(self, keys: Sequence[Any], values: Sequence[Any]) -> int:
        """A new sequence, per layer ``[kv heads, tokens, size]``; gives its number. There must be
        room."""
        for layer in range(len(self.layers)):
            tokens = keys[layer].shape[1]
            self.keys[layer][self.count, :, :tokens] = keys[layer]
            self.values[layer][self.count, :, :tokens] = values[layer]
        self.count += 1
        return self.count - 1

    def remove(self, number: int, tokens: int) -> int:
        """Ends a sequence: the last one (of which ``tokens`` are in use) takes its number. Gives
        the number the last one had."""
        last = self.count - 1
        if number != last:
            for stored in (*self.keys, *self.values):
                stored[number, :, :tokens] = stored[last, :, :tokens]
        self.count = last
        return last

    def _old(self, stored: list[Any]) -> list[tuple[Any, LayerShape]]:
        return list(zip(stored or [None] * len(self.layers), self.layers, strict=True))

    def _moved(self, old: Any, layer: LayerShape, capacity: int, length: int) -> Any:
        import torch

        new = torch.zeros((capacity, layer.kv_heads, length, layer.size), device=self.device)
        if old is not None and self.count:
            new[: self.count, :, : self.length] = old[: self.count]
        return new
