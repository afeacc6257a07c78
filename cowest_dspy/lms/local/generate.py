"""Prompts -> texts: a batch that rows join and leave at any step.

    session = Session(model, tokenizer, end_tokens)
    done = session.admit(rows)          # computes their prompts, each distinct one once
    while session.live:
        for row, completion in session.step(): ...

Every row has its own settings, its own random numbers (sampling.py) and its own adapter. What rows
share is computed and kept once (attention.py): a beginning of many prompts, and a prompt of which
several drafts are sampled. The memory of a row that ends is taken by another (:class:`Blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cowest_dspy.compat import cached
from cowest_dspy.lms.local.attention import (
    Attend,
    Blocks,
    LayerShape,
    Prefix,
    Sharing,
    attend_part,
    attending,
    attending_to,
    by_heads,
    left_padded,
    merge_parts,
    prefill_mask,
)
from cowest_dspy.lms.local.sampling import Completion, Draws, PromptRow, choose, completed

# Prompt tokens computed together on a processor (measured: with more of them, the time goes into
# moving memory).
PREFILL_TOKENS = 256
_SHORTEST_POOL = 32

# The adapters of the rows of a pass (None: the base) -> the model as it is to be called for them.
Select = Callable[[Sequence[str | None]], Callable[..., Any]]


Finished = list[tuple[PromptRow, Completion]]


@dataclass(eq=False)
class _Prompt:
    """A prompt that is computed: where its keys and values stand, and its last logits
    ``[vocabulary]``."""

    row: PromptRow
    pool: Blocks
    number: int
    logits: Any
    rows: int = 0

    @property
    def length(self) -> int:
        return len(self.row.tokens)

    @property
    def end(self) -> int:
        """The position of the first generated token."""
        return self.length + (self.row.prefix.length if self.row.prefix else 0)


@dataclass(eq=False)
class _Live:
    """A row on its way: what it has so far, and the prompt it came from."""

    draws: Draws
    prompt: _Prompt


@dataclass(frozen=True)
class _View:
    """A part of the attention: what is stored per layer, and which rows attend to it."""

    layers: Callable[[int], tuple[Any, Any]]
    sharing: Sharing


class Session:
    """A batch on its way. Not for several threads at once.

    Args:
        model: a causal LM of transformers with the attention of attention.py.
        end_tokens: ids that end a text.
        select: gives the model with the rows' adapters; by default the base alone.
    """

    def __init__(
        self, model: Any, tokenizer: Any, end_tokens: frozenset[int], select: Select | None = None
    ) -> None:
        self._tokenizer, self._end_tokens = tokenizer, end_tokens
        self._config, self._device = model.config, model.device
        self._select: Select = select or (lambda adapters: model)
        self._rows: list[_Live] = []
        self._prompts: dict[Any, _Prompt] = {}
        self._pools: dict[int, Blocks] = {}
        self._own: Blocks | None = None
        self._views: list[_View] | None = None

    @property
    def live(self) -> int:
        """The number of rows on their way."""
        return len(self._rows)

    @property
    def adapters(self) -> list[str | None]:
        """The adapters of the rows on their way."""
        return [item.prompt.row.adapter for item in self._rows]

    def admit(self, rows: Sequence[PromptRow]) -> Finished:
        """Take rows in: compute those of their prompts that are not there yet, and choose every
        row's first token."""
        import torch

        if not rows:
            return []
        new = {_key(row): row for row in rows if _key(row) not in self._prompts}
        self._compute_prompts(list(new.values()))
        prompts = [self._prompts[_key(row)] for row in rows]
        draws = [Draws(row) for row in rows]
        choose(torch.stack([prompt.logits for prompt in prompts]), draws)
        finished: Finished = []
        for item, prompt in zip(draws, prompts, strict=True):
            completion = completed(item, self._tokenizer, self._end_tokens)
            if completion is None:
                prompt.rows += 1
                self._rows.append(_Live(item, prompt))
            else:
                finished.append((item.row, completion))
        for prompt in prompts:
            self._release(prompt)
        if self._rows and self._own:
            self._own.make_room(len(self._rows), 1)
            self._own.count = len(self._rows)
        self._views = None
        return finished

    def step(self) -> Finished:
        """One more token for every row; gives those that are done with it."""
        import torch

        device = self._device
        ids = torch.tensor([[item.draws.tokens[-1]] for item in self._rows], device=device)
        written = [len(item.draws.tokens) - 1 for item in self._rows]
        positions = torch.tensor(
            [[item.prompt.end + at] for item, at in zip(self._rows, written, strict=True)],
            device=device,
        )
        model = self._select(self.adapters)
        mask = torch.ones((len(ids), 1, 1, 1), dtype=torch.bool, device=device)
        attend = self._decoding(written)
        with torch.inference_mode():
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
                **attending(attend),
            )
            choose(out.logits[:, -1].float(), [item.draws for item in self._rows])
        return self._leave()

    def _leave(self) -> Finished:
        """Take out the rows that are done; from the last to the first, since the last one fills
        the gap."""
        finished: Finished = []
        for slot in reversed(range(len(self._rows))):
            item = self._rows[slot]
            completion = completed(item.draws, self._tokenizer, self._end_tokens)
            if completion is None:
                continue
            finished.append((item.draws.row, completion))
            if self._own:
                self._own.remove(slot, len(self._rows[-1].draws.tokens))
            self._rows[slot] = self._rows[-1]
            self._rows.pop()
            item.prompt.rows -= 1
            self._release(item.prompt)
            self._views = None
        return finished

    def _release(self, prompt: _Prompt) -> None:
        """Forget a prompt of which no row is left."""
        key = _key(prompt.row)
        if prompt.rows or key not in self._prompts:
            return
        del self._prompts[key]
        beside = [other for other in self._prompts.values() if other.pool is prompt.pool]
        last = next((other for other in beside if other.number == prompt.pool.count - 1), prompt)
        prompt.pool.remove(prompt.number, last.length)
        last.number = prompt.number

    # Prompts

    def _compute_prompts(self, rows: list[PromptRow]) -> None:
        """In groups of one adapter and the same beginning; on a processor small ones, whose
        intermediate results stay in its caches."""
        alike: dict[tuple[str | None, int], list[PromptRow]] = {}
        for row in sorted(rows, key=lambda row: len(row.tokens)):
            alike.setdefault((row.adapter, id(row.prefix)), []).append(row)
        for group in alike.values():
            while group:
                size = (
                    max(1, PREFILL_TOKENS // len(group[-1].tokens))
                    if self._device.type == "cpu"
                    else len(group)
                )
                group, some = group[:-size], group[-size:]
                self._prefill(some)

    def _prefill(self, rows: list[PromptRow]) -> None:
        import torch
        from transformers import DynamicCache

        first = rows[0]
        ids, real = left_padded([row.tokens for row in rows], self._device)
        positions = (real.long().cumsum(1) - 1).clamp(min=0) + (
            first.prefix.length if first.prefix else 0
        )
        model = self._select([row.adapter for row in rows])
        cache: Any = DynamicCache(config=self._config)
        with torch.inference_mode():
            out = model(
                input_ids=ids,
                attention_mask=prefill_mask(real),
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **cached(self._config, cache),
                **attending_to(first.prefix),
            )
            logits = out.logits[:, -1].float()
        if self._own is None:
            shapes = [
                LayerShape(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers
            ]
            self._own = Blocks(shapes, self._device)
        for index, row in enumerate(rows):
            self._prompts[_key(row)] = self._stored(row, cache, index, logits[index])

    def _stored(self, row: PromptRow, cache: Any, index: int, logits: Any) -> _Prompt:
        """The prompt's keys and values, copied to others of like length."""
        assert self._own is not None
        size = max(_SHORTEST_POOL, 1 << (len(row.tokens) - 1).bit_length())
        pool = self._pools.setdefault(size, Blocks(self._own.layers, self._own.device))
        pool.make_room(pool.count + 1, size)
        pad = cache.layers[0].keys.shape[2] - len(row.tokens)
        keys = [layer.keys[index, :, pad:] for layer in cache.layers]
        values = [layer.values[index, :, pad:] for layer in cache.layers]
        return _Prompt(row, pool, pool.append(keys, values), logits)

    # Attention of a step

    def _decoding(self, written: list[int]) -> Attend:
        """The attention in which every row sees its prompt's beginning, its prompt, and its own
        text, whose newest token is written at ``written``."""
        import torch

        own, count = self._own, len(written)
        assert own is not None
        longest = max(written) + 1
        own.make_room(count, longest)
        own.count = count
        level = min(written) + 1 == longest
        at = torch.tensor(written, device=own.device)
        slots = torch.arange(count, device=own.device)
        hidden = None if level else torch.arange(longest, device=own.device)[None] > at[:, None]
        to_itself = Sharing(None, None, None, hidden)
        views = self._views = (
            self._views if self._views is not None else [*self._beginnings(), *self._of_prompts()]
        )

        def attend(layer: int, query: Any, key: Any, value: Any, mask: Any, scaling: float) -> Any:
            keys, values = own.keys[layer], own.values[layer]
            if level:
                keys[:count, :, longest - 1], values[:count, :, longest - 1] = (
                    key[:, :, 0],
                    value[:, :, 0],
                )
            else:
                keys[slots, :, at], values[slots, :, at] = (
                    key[:, :, 0].float(),
                    value[:, :, 0].float(),
                )
            asked = by_heads(query, key.shape[1], scaling)
            parts = [attend_part(asked, *view.layers(layer), view.sharing) for view in views]
            parts.append(
                attend_part(
                    asked, keys[:count, :, :longest], values[:count, :, :longest], to_itself
                )
            )
            return merge_parts(parts).reshape(query.shape)

        return attend

    def _beginnings(self) -> list[_View]:
        prefixes = {
            id(item.prompt.row.prefix): item.prompt.row.prefix
            for item in self._rows
            if item.prompt.row.prefix
        }
        return [self._beginning(prefix) for prefix in prefixes.values()]

    def _beginning(self, prefix: Prefix) -> _View:
        rows = [slot for slot, item in enumerate(self._rows) if item.prompt.row.prefix is prefix]
        return _View(lambda layer: prefix.layers[layer], self._sharing([rows], None))

    def _of_prompts(self) -> list[_View]:
        members: dict[int, dict[int, list[int]]] = {}
        for slot, item in enumerate(self._rows):
            members.setdefault(id(item.prompt.pool), {}).setdefault(item.prompt.number, []).append(
                slot
            )
        pools = {id(pool): pool for pool in self._pools.values()}
        return [
            self._of_pool(pools[pool], [numbers[n] for n in range(pools[pool].count)])
            for pool, numbers in members.items()
        ]

    def _of_pool(self, pool: Blocks, members: list[list[int]]) -> _View:
        lengths = [self._rows[rows[0]].prompt.length for rows in members]
        count, longest = pool.count, max(lengths)
        sharing = self._sharing(members, lengths if min(lengths) < longest else None)
        return _View(
            lambda layer: (
                pool.keys[layer][:count, :, :longest],
                pool.values[layer][:count, :, :longest],
            ),
            sharing,
        )

    def _sharing(self, members: list[list[int]], lengths: list[int] | None) -> Sharing:
        import torch

        device, total = self._device, len(self._rows)
        most = max(map(len, members))
        rows = [slot for group in members for slot in group]
        places = [
            number * most + place
            for number, group in enumerate(members)
            for place in range(len(group))
        ]
        hidden = None
        if lengths is not None:
            hidden = (
                torch.arange(max(lengths), device=device)[None]
                >= torch.tensor(lengths, device=device)[:, None]
            )
        if most == 1 and rows == list(range(total)):
            return Sharing(None, None, None, hidden)
        filled = torch.tensor(
            [group + [group[0]] * (most - len(group)) for group in members], device=device
        )
        if len(rows) == total:
            ordered = [place for _, place in sorted(zip(rows, places, strict=True))]
            return Sharing(filled, None, torch.tensor(ordered, device=device), hidden)
        return Sharing(
            filled, torch.tensor(rows, device=device), torch.tensor(places, device=device), hidden
        )


class PlainSession:
    """A batch of a model whose attention is not computed in parts (windows, capped scores, sinks,
    recurrent layers): as :class:`Session`, by transformers' own means, padded prompts, its cache,
    its attention. Rows come in only while it is empty, and all have one adapter."""

    def __init__(
        self, model: Any, tokenizer: Any, end_tokens: frozenset[int], select: Select | None = None
    ) -> None:
        self._tokenizer, self._end_tokens = tokenizer, end_tokens
        self._config, self._device = model.config, model.device
        self._select: Select = select or (lambda adapters: model)
        self._rows: list[Draws] = []
        self._cache: Any = None
        self._real: Any = None

    @property
    def live(self) -> int:
        """The number of rows on their way."""
        return len(self._rows)

    @property
    def adapters(self) -> list[str | None]:
        """The adapters of the rows on their way."""
        return [item.row.adapter for item in self._rows]

    def admit(self, rows: Sequence[PromptRow]) -> Finished:
        """Take rows in, compute their prompts, and choose every row's first token."""
        from transformers import DynamicCache

        if not rows:
            return []
        self._rows = [Draws(row) for row in rows]
        ids, self._real = left_padded([row.tokens for row in rows], self._device)
        self._cache = DynamicCache(config=self._config)
        return self._pass(ids)

    def step(self) -> Finished:
        """One more token for every row; gives those that are done with it."""
        import torch

        ids = torch.tensor([[item.tokens[-1]] for item in self._rows], device=self._device)
        self._real = torch.cat([self._real, torch.ones_like(self._real[:, :1])], dim=1)
        return self._pass(ids)

    def _pass(self, ids: Any) -> Finished:
        import torch

        positions = (self._real.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        model = self._select(self.adapters)
        with torch.inference_mode():
            out = model(
                input_ids=ids,
                attention_mask=self._real.long(),
                position_ids=positions,
                **cached(self._config, self._cache),
                use_cache=True,
                logits_to_keep=1,
            )
            return self._settled(out.logits[:, -1].float())

    def _settled(self, logits: Any) -> Finished:
        import torch

        choose(logits, self._rows)
        ended = [completed(item, self._tokenizer, self._end_tokens) for item in self._rows]
        keep = [slot for slot, completion in enumerate(ended) if completion is None]
        finished = [
            (item.row, one) for item, one in zip(self._rows, ended, strict=True) if one is not None
        ]
        if finished:
            where = torch.tensor(keep, device=logits.device, dtype=torch.long)
            self._rows = [self._rows[slot] for slot in keep]
            self._real = self._real[where]
            self._cache = self._cache if keep else None
            if keep:
                self._cache.batch_select_indices(where)
        return finished


def run(session: Any, rows: Sequence[PromptRow]) -> list[Completion]:
    """The completions of ``rows``, in their order, by a session that is empty."""
    done = dict(session.admit(rows))
    while session.live:
        done.update(session.step())
    return [done[row] for row in rows]


def _key(row: PromptRow) -> Any:
    return (row.adapter, id(row.prefix), tuple(row.tokens))
