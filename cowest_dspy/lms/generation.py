"""One batch of prompts -> texts, with the beginning that all prompts share computed once.

Prompts of a collaboration differ only in their last turn: instructions and worked examples come first and are the same for
every question. Their keys and values are computed once (``Prefix``) and attended to by all rows of a batch without a copy per
row: the queries of all rows meet the one prefix in a single matrix product, and one softmax spans prefix and row. The idea of
splitting attention at a shared prefix is that of Hydragen (Juravsky et al., 2024, arXiv 2402.05099).

Every row has its own sampling settings and its own random generator, and leaves the batch as soon as it is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = "cowest_shared_prefix"
# Prompt tokens computed together on a processor (measured: with more of them, the time goes into moving memory).
PREFILL_TOKENS = 256
_current = threading.local()


@dataclass(frozen=True)
class Row:
    """One prompt and how to continue it. ``tokens`` are those after the prefix; lengths are in tokens.

    ``logprobs``: None for none, otherwise how many of the likeliest tokens to note beside each chosen one (0: only that).
    """

    tokens: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token and its natural log-probability under the model, before temperature, top_p and top_k; ``top``: the likeliest."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """What one row became. ``finish_reason`` is "stop" (end token or stop string) or "length" (``max_tokens`` reached).

    ``tokens`` are all that were generated, an end token included; ``scores`` those of the tokens that ``text`` is made of, when
    the row asked for them.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    scores: tuple[TokenScore, ...] | None = None


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a prompt's beginning, per layer ``[1, kv heads, length, head size]`` in float32; ``length`` in tokens."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    length: int


@dataclass
class _Live:
    """A row on its way: where it stands in the input, and what it has so far."""

    index: int
    row: Row
    generator: Any
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)


def register_attention() -> None:
    """Makes the shared-prefix attention known to transformers under the name ``ATTENTION``; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def compute_prefix(model: Any, tokens: Sequence[int]) -> Prefix:
    """The keys and values of ``tokens`` under ``model``, to be shared by many calls of :func:`generate`."""
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([list(tokens)], device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: Any = cache.layers
    return Prefix(tuple((layer.keys.float(), layer.values.float()) for layer in layers), len(tokens))


def generate(
    model: Any, tokenizer: Any, rows: Sequence[Row], end_tokens: frozenset[int], prefix: Prefix | None = None
) -> list[Completion]:
    """Continues every row; the result is in the order of ``rows``.

    Greedy where ``temperature`` is 0, otherwise a sample whose random numbers come from the row's own seed, so that they do
    not depend on what else is in the batch. (The logits may, in the last bits: a matrix product of another size can add in
    another order.)
    """
    done: dict[int, Completion] = {}
    with attending_to(prefix):
        _run(model, tokenizer, rows, end_tokens, prefix.length if prefix else 0, done)
    return [done[index] for index in range(len(rows))]


@contextmanager
def attending_to(prefix: Prefix | None) -> Iterator[None]:
    """A context for passes of the model, without gradients, in which all rows also see ``prefix``."""
    import torch

    _current.prefix = prefix
    try:
        with torch.inference_mode():
            yield
    finally:
        _current.prefix = None


def _run(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    end_tokens: frozenset[int],
    offset: int,
    done: dict[int, Completion],
) -> None:
    import torch
    from transformers import DynamicCache

    live = [_Live(index, row, torch.Generator().manual_seed(row.seed % (2**63))) for index, row in enumerate(rows)]
    ids, real = left_padded([row.tokens for row in rows], model.device)
    positions = (real.long().cumsum(1) - 1).clamp(min=0) + offset
    cache = DynamicCache(config=model.config)
    logits = _prefill(model, ids, real, positions, cache)
    while True:
        chosen = _choose(logits, live)
        keep = [slot for slot, token in enumerate(chosen) if not _finished(live[slot], token, tokenizer, end_tokens, done)]
        if len(keep) < len(live):
            where = torch.tensor(keep, device=model.device, dtype=torch.long)
            live = [live[slot] for slot in keep]
            if not live:
                return
            cache.batch_select_indices(where)
            real, positions = real[where], positions[where]
        ids = torch.tensor([[item.tokens[-1]] for item in live], device=model.device)
        real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
        logits = _forward(model, ids, real[:, None, None, :], positions, cache)


def _forward(model: Any, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
    """Logits of the last position, ``[rows, vocabulary]`` in float32; keys and values go to ``cache``."""
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].float()


def _prefill(model: Any, ids: Any, real: Any, positions: Any, cache: Any) -> Any:
    """The first logits of all rows; equal prompts (several drafts of one question) are computed once.

    On a processor in small groups of rows, whose intermediate results stay in its caches.
    """
    import torch
    from transformers import DynamicCache

    places: dict[tuple[int, ...], int] = {}
    copies = [
        places.setdefault((length, *row), len(places)) for length, row in zip(real.sum(1).tolist(), ids.tolist(), strict=True)
    ]
    firsts = [copies.index(place) for place in range(len(places))]
    size = max(1, PREFILL_TOKENS // ids.shape[1]) if ids.device.type == "cpu" else len(ids)
    logits: list[Any] = []
    caches: list[Any] = []
    for start in range(0, len(firsts), size):
        group = firsts[start : start + size]
        caches.append(DynamicCache(config=model.config))
        logits.append(_forward(model, ids[group], prefill_mask(real[group]), positions[group], caches[-1]))
    where = torch.tensor(copies, device=ids.device)
    for index, layers in enumerate(zip(*(part.layers for part in caches), strict=True)):
        keys, values = torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])
        cache.update(keys[where], values[where], index)
    return torch.cat(logits)[where]


def left_padded(sequences: Sequence[Sequence[int]], device: Any) -> tuple[Any, Any]:
    """``ids [rows, longest]`` and ``real [rows, longest]``, false where a row is padded on its left."""
    import torch

    longest = max(len(tokens) for tokens in sequences)
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    real = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for index, tokens in enumerate(sequences):
        ids[index, longest - len(tokens) :] = torch.tensor(list(tokens))
        real[index, longest - len(tokens) :] = True
    return ids.to(device), real.to(device)


def prefill_mask(real: Any) -> Any:
    """``[rows, 1, longest, longest]``: causal, and no padding is seen, but every position sees itself (no empty softmax)."""
    import torch

    size = real.shape[1]
    causal = torch.ones((size, size), dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(size, dtype=torch.bool, device=real.device)
    return ((causal & real[:, None, :]) | itself)[:, None]


def _choose(logits: Any, live: list[_Live]) -> list[int]:
    import torch

    chosen = logits.argmax(dim=-1).tolist()
    for slot, item in enumerate(live):
        if item.row.temperature > 0:
            weights = _filtered(logits[slot].cpu() / item.row.temperature, item.row)
            chosen[slot] = int(torch.multinomial(weights, 1, generator=item.generator))
        if item.row.logprobs is not None:
            item.scores.append(_token_score(logits[slot], chosen[slot], item.row.logprobs))
    return chosen


def _token_score(logits: Any, token: int, count: int) -> TokenScore:
    logprobs = logits.log_softmax(dim=-1)
    best = logprobs.topk(count)
    return TokenScore(token, float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def _filtered(logits: Any, row: Row) -> Any:
    """Probabilities after top-k, then top-p (the smallest set of tokens whose mass reaches ``top_p``; the first always stays)."""
    import torch

    if row.top_k > 0:
        floor = torch.topk(logits, min(row.top_k, logits.shape[-1])).values[-1]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    weights = torch.softmax(logits, dim=-1)
    if row.top_p < 1:
        ordered, order = weights.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= row.top_p
        weights = weights.index_fill(0, order[outside], 0.0)
    return weights


def _finished(item: _Live, token: int, tokenizer: Any, end_tokens: frozenset[int], done: dict[int, Completion]) -> bool:
    """Takes ``token`` into the row; when that ends the row, notes its completion and says so."""
    ended = token in end_tokens
    item.tokens.append(token)
    spoken = item.tokens[:-1] if ended else item.tokens
    cut = -1
    if item.row.stop:
        text = tokenizer.decode(spoken, skip_special_tokens=True)
        cut = min((at for at in (text.find(stop) for stop in item.row.stop) if at >= 0), default=-1)
    if not ended and cut < 0 and len(item.tokens) < item.row.max_tokens:
        return False
    text = tokenizer.decode(spoken, skip_special_tokens=True)
    reason = "stop" if ended or cut >= 0 else "length"
    scores: tuple[TokenScore, ...] | None = None
    if item.row.logprobs is not None:
        while cut >= 0 and spoken and len(tokenizer.decode(spoken[:-1], skip_special_tokens=True)) >= cut:
            spoken = spoken[:-1]
        scores = tuple(item.scores[: len(spoken)])
    done[item.index] = Completion(text[:cut] if cut >= 0 else text, tuple(item.tokens), reason, scores)
    return True


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
    """Attention of ``query [rows, heads, q, d]`` over the shared prefix, if there is one, and the rows' own ``key``, ``value``.

    Grouped-query attention without repeating keys: the query heads of one key head are stacked along the query axis.
    Without a prefix this is transformers' own ``sdpa``.
    """
    import torch

    prefix: Prefix | None = getattr(_current, "prefix", None)
    if prefix is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    rows, heads, length, size = query.shape
    # In float32: scores rounded to bfloat16 would be off by whole tenths before the softmax, and this part is cheap.
    kind, query, key, value = query.dtype, query.float() * scaling, key.float(), value.float()
    kv_heads = key.shape[1]
    group = heads // kv_heads
    shared_key, shared_value = prefix.layers[module.layer_idx]
    shared_key, shared_value = shared_key[0], shared_value[0]
    shared = shared_key.shape[1]
    grouped = query.reshape(rows, kv_heads, group * length, size)
    stacked = grouped.transpose(0, 1).reshape(kv_heads, rows * group * length, size)
    to_prefix = torch.matmul(stacked, shared_key.transpose(1, 2)).view(kv_heads, rows, group, length, shared).transpose(0, 1)
    to_row = torch.matmul(grouped, key.transpose(2, 3)).view(rows, kv_heads, group, length, -1)
    if attention_mask is not None:
        to_row = to_row.masked_fill(~attention_mask[:, :, None], float("-inf"))
    weights = torch.softmax(torch.cat([to_prefix, to_row], dim=-1), dim=-1)
    of_prefix = weights[..., :shared].transpose(0, 1).reshape(kv_heads, rows * group * length, shared)
    from_prefix = torch.matmul(of_prefix, shared_value).view(kv_heads, rows, group * length, size).transpose(0, 1)
    from_row = torch.matmul(weights[..., shared:].reshape(rows, kv_heads, group * length, -1), value)
    mixed = (from_prefix + from_row).reshape(rows, heads, length, size)
    return mixed.transpose(1, 2).contiguous().to(kind), None
