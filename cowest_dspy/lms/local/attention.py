"""Attention in parts: what many rows have in common is stored once, and met by all of their queries
in one product.

Prompts of a collaboration differ only in their last turn, and several drafts are sampled of each.
So a row of a batch attends to a beginning that (nearly) all rows share, to a prompt that it shares
with the other drafts of it, and to its own text. Each part gives a weighted mean and the weights'
sum, and the means are put together as if one softmax had spanned all parts. The idea of splitting
attention at a shared prefix is that of Hydragen (Juravsky et al., 2024, arXiv 2402.05099); what is
new here is a second level, of drafts within prompts.

Transformers calls :data:`ATTENTION` in every layer, and hands it the keyword arguments of the pass;
one of them (:func:`attending`, :func:`attending_to`) says what it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cowest_dspy.compat import attention_name, cached

if TYPE_CHECKING:
    import torch

ATTENTION = "cowest_shared_prefix"
# Attention of another kind, which the parts do not compute: logits capped, sinks, windows.
_OTHER_KINDS = ("softcap", "s_aux", "sliding_window", "head_mask")
# Tokens of each half of the question whether a model may be computed in parts; and the difference,
# relative to the logits, that bfloat16 and int8 may make.
_PROBE = 6
_ALIKE = 0.05
_FEWEST = 8  # sequences that room is made for
_ARGUMENT = "cowest_attend"

# (layer, query, key, value, mask, scaling) -> [rows, heads, length, size]
Attend = Callable[[int, Any, Any, Any, Any, float], Any]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a prompt's beginning, per layer ``[1, kv heads, length, head size]`` in
    float32; ``length`` in tokens."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    length: int


@dataclass(frozen=True)
class Sharing:
    """Which rows attend to which stored sequence; the same for all layers of a step.

    ``members [sequences, most]``: rows (where a sequence has fewer, any row stands in the gap);
    None when row i attends to sequence i. ``rows`` and ``places``: row ``rows[i]`` stands at
    ``places[i]`` of the flattened members. ``hidden [sequences, length]``: true where there is
    nothing to see.
    """

    members: torch.Tensor | None
    rows: torch.Tensor | None
    places: torch.Tensor | None
    hidden: torch.Tensor | None


def enable_parts(model: Any) -> bool:
    """Give ``model`` the attention in parts, if its logits then stay the same; whether they do.

    Whether it does is asked of the model itself, by a few tokens: an architecture that bends
    attention in a way of its own (windows, capped scores, sinks, biases) would be computed wrongly
    without a word.
    """
    import torch

    if not _sees_everything(model.config):
        return False
    usual = attention_name(model.config)
    ids = torch.arange(1, 1 + 2 * _PROBE, device=model.device)[None] * 7 % model.config.vocab_size
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    _register()
    try:
        model.set_attn_implementation(ATTENTION)
        prefix = compute_prefix(model, model.config, ids[0, :_PROBE].tolist(), model.device)
        real = torch.ones((1, _PROBE), dtype=torch.bool, device=model.device)
        positions = torch.arange(_PROBE, 2 * _PROBE, device=model.device)[None]
        with torch.inference_mode():
            out = model(
                input_ids=ids[:, _PROBE:],
                attention_mask=prefill_mask(real),
                position_ids=positions,
                use_cache=False,
                **attending_to(prefix),
            )
        found = out.logits[0, -1].float()
        same = bool((found - expected).norm() < _ALIKE * expected.norm())
    # A model's own code, of any architecture, runs here in a way that it was not written for: what
    # it raises (a mask of a form that it does not take, a cache that it does not have, our own
    # refusal) is its answer "no", and it stays as it was.
    except (ValueError, TypeError, AttributeError, RuntimeError):
        same = False
    if not same:
        model.set_attn_implementation(usual)
        return False
    return True


def has_parts(model: Any) -> bool:
    """Whether :func:`enable_parts` gave ``model`` the attention in parts."""
    return attention_name(model.config) == ATTENTION


def _sees_everything(config: Any) -> bool:
    """Whether every layer is full attention: the probe is too short to meet the end of a window."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    return set(kinds) == {"full_attention"} and not (
        windowed and not getattr(config, "layer_types", None)
    )


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attending(attend: Attend) -> dict[str, Any]:
    """The keyword argument of a pass of the model in which ``attend`` computes every layer's
    attention; without it, transformers' own ``sdpa`` does."""
    return {_ARGUMENT: attend}


def attending_to(prefix: Prefix | None) -> dict[str, Any]:
    """The keyword argument of a pass of the model in which all rows also see ``prefix``."""
    return attending(_after(prefix)) if prefix else {}


def compute_prefix(
    model: Callable[..., Any], config: Any, tokens: Sequence[int], device: Any
) -> Prefix:
    """The keys and values of ``tokens`` under ``model``, which is of ``config`` and on
    ``device``."""
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        cache = DynamicCache(config=config)
        ids = torch.tensor([list(tokens)], device=device)
        model(input_ids=ids, **cached(config, cache), use_cache=True, logits_to_keep=1)
    layers: Any = cache.layers
    return Prefix(
        tuple((layer.keys.float(), layer.values.float()) for layer in layers), len(tokens)
    )


def left_padded(sequences: Sequence[Sequence[int]], device: Any) -> tuple[Any, Any]:
    """``ids [rows, longest]`` and ``real [rows, longest]``, false where a row is padded on its
    left."""
    import torch

    longest = max(len(tokens) for tokens in sequences)
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    real = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for index, tokens in enumerate(sequences):
        ids[index, longest - len(tokens) :] = torch.tensor(list(tokens))
        real[index, longest - len(tokens) :] = True
    return ids.to(device), real.to(device)


def prefill_mask(real: Any) -> Any:
    """``[rows, 1, longest, longest]``: causal, and no padding is seen, but every position sees
    itself (no empty softmax)."""
    import torch

    size = real.shape[1]
    causal = torch.ones((size, size), dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(size, dtype=torch.bool, device=real.device)
    return ((causal & real[:, None, :]) | itself)[:, None]


def by_heads(query: Any, kv_heads: int, scaling: float) -> Any:
    """``query [rows, heads, 1, size]`` of one new token per row, scaled, in float32, as ``[rows, kv
    heads, group, size]``."""
    rows, heads, _, size = query.shape
    return (query.float() * scaling).view(rows, kv_heads, heads // kv_heads, size)


def attend_part(query: Any, keys: Any, values: Any, sharing: Sharing) -> tuple[Any, Any, Any]:
    """What one part gives every row: the greatest score and the sum of weights ``[rows, kv heads,
    group, 1]``, and the weighted sum of values ``[rows, kv heads, group, size]``. A row that
    attends to none of the sequences: -inf, 0, 0.

    ``query`` is as :func:`by_heads` makes it, ``keys`` and ``values`` are ``[sequences, kv heads,
    length, size]``.
    """
    import torch

    rows, kv_heads, group, size = query.shape
    stacked = query
    if sharing.members is not None:
        sequences, most = sharing.members.shape
        stacked = query[sharing.members.reshape(-1)].view(sequences, most, kv_heads, group, size)
        stacked = stacked.transpose(1, 2).reshape(sequences, kv_heads, most * group, size)
    scores = torch.matmul(stacked, keys.transpose(-1, -2))
    if sharing.hidden is not None:
        scores.masked_fill_(sharing.hidden[:, None, None, :], float("-inf"))
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    found = (top, weights.sum(dim=-1, keepdim=True), torch.matmul(weights, values))
    if sharing.members is None:
        return found
    return tuple(
        _back(one, sharing, rows, group, empty)
        for one, empty in zip(found, (float("-inf"), 0.0, 0.0), strict=True)
    )  # pyright: ignore[reportReturnType]


def _back(found: Any, sharing: Sharing, rows: int, group: int, empty: float) -> Any:
    """From ``[sequences, kv heads, most * group, x]`` to ``[rows, kv heads, group, x]``."""
    sequences, kv_heads, stacked, last = found.shape
    by_place = (
        found.view(sequences, kv_heads, stacked // group, group, last)
        .transpose(1, 2)
        .reshape(-1, kv_heads, group, last)
    )
    if sharing.rows is None:
        return by_place[sharing.places]
    whole = by_place.new_full((rows, kv_heads, group, last), empty)
    whole[sharing.rows] = by_place[sharing.places]
    return whole


def merge_parts(parts: Sequence[tuple[Any, Any, Any]]) -> Any:
    """The parts' means as one softmax over all of them would give it: ``[rows, kv heads, group,
    size]``."""
    import functools

    import torch

    if len(parts) == 1:
        return parts[0][2] / parts[0][1]
    top = functools.reduce(torch.maximum, (part[0] for part in parts))
    shares = [(part[0] - top).exp_() for part in parts]
    total = sum(part[1] * share for part, share in zip(parts, shares, strict=True))
    return sum(part[2] * share for part, share in zip(parts, shares, strict=True)) / total


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Any, Any]:
    """What transformers calls: ``query [rows, heads, q, d]``, ``key``, ``value`` of this pass ->
    ``[rows, q, heads, d]``."""
    attend: Attend | None = rest.pop(_ARGUMENT, None)
    if attend is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **rest
        )
    other = [name for name in _OTHER_KINDS if rest.get(name) is not None]
    if other:
        # The answer "no" to the probe of enable_parts: a model that needs this keeps transformers'
        # own attention.
        raise NotImplementedError(f"attention with {', '.join(other)} is not computed in parts")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = attend(module.layer_idx, query, key, value, attention_mask, scale)
    return mixed.transpose(1, 2).contiguous().to(query.dtype), None


def _after(prefix: Prefix) -> Attend:
    """Attention of prompts over a shared beginning and over themselves, in one softmax.

    Grouped-query attention without repeating keys: the query heads of one key head are stacked
    along the query axis.
    """
    import torch

    def attend(layer: int, query: Any, key: Any, value: Any, mask: Any, scaling: float) -> Any:
        # In float32: scores rounded to bfloat16 would be off by whole tenths before the softmax,
        # and this part is cheap.
        query, key, value = query.float() * scaling, key.float(), value.float()
        rows, heads, length, size = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        shared_key, shared_value = (one[0] for one in prefix.layers[layer])
        shared = shared_key.shape[1]
        grouped = query.reshape(rows, kv_heads, group * length, size)
        stacked = grouped.transpose(0, 1).reshape(kv_heads, rows * group * length, size)
        to_prefix = (
            torch.matmul(stacked, shared_key.transpose(1, 2))
            .view(kv_heads, rows, group, length, shared)
            .transpose(0, 1)
        )
        to_row = torch.matmul(grouped, key.transpose(2, 3)).view(rows, kv_heads, group, length, -1)
        if mask is not None:
            to_row = to_row.masked_fill(~mask[:, :, None], float("-inf"))
        weights = torch.softmax(torch.cat([to_prefix, to_row], dim=-1), dim=-1)
        of_prefix = (
            weights[..., :shared].transpose(0, 1).reshape(kv_heads, rows * group * length, shared)
        )
        from_prefix = (
            torch.matmul(of_prefix, shared_value)
            .view(kv_heads, rows, group * length, size)
            .transpose(0, 1)
        )
        from_row = torch.matmul(
            weights[..., shared:].reshape(rows, kv_heads, group * length, -1), value
        )
        return (from_prefix + from_row).reshape(rows, heads, length, size)

    return attend


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
        """Make room for ``count`` sequences of ``length`` tokens."""
        if count <= self.capacity and length <= self.length:
            return
        capacity = (
            self.capacity if count <= self.capacity else max(count, 2 * self.capacity, _FEWEST)
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
        """End a sequence: the last one (of which ``tokens`` are in use) takes its number. Return
        the number that the last one had."""
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
