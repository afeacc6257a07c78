"""Generation for models whose attention is not computed in parts: windows, capped scores, sinks,
recurrent layers.

The same as generation.py for who calls it, by transformers' own means: padded prompts, its cache,
its attention. A batch runs to its end before another begins, and all of its rows speak as one
adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cowest_dspy.lms.local.attention import attending, left_padded
from cowest_dspy.lms.local.generate import Finished, Speak, completed
from cowest_dspy.lms.local.sampling import Draws, Row, choose


class PlainSession:
    """A batch on its way, as :class:`cowest_dspy.lms.local.generate.Session`; rows come in only
    while it is empty."""

    def __init__(
        self, model: Any, tokenizer: Any, end_tokens: frozenset[int], speak: Speak | None = None
    ) -> None:
        self._tokenizer, self._end_tokens = tokenizer, end_tokens
        self._config, self._device = model.config, model.device
        self._speak: Speak = speak or (lambda adapters: model)
        self._rows: list[Draws] = []
        self._cache: Any = None
        self._real: Any = None

    @property
    def live(self) -> int:
        """How many rows are on their way."""
        return len(self._rows)

    @property
    def adapters(self) -> list[str | None]:
        """The adapters of the rows on their way."""
        return [item.row.adapter for item in self._rows]

    def admit(self, rows: Sequence[Row]) -> Finished:
        """Takes rows in, computes their prompts, and chooses every row's first token."""
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
        model = self._speak(self.adapters)
        with attending(None):
            out = model(
                input_ids=ids,
                attention_mask=self._real.long(),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            choose(out.logits[:, -1].float(), self._rows)
            ended = [completed(item, self._tokenizer, self._end_tokens) for item in self._rows]
            keep = [slot for slot, completion in enumerate(ended) if completion is None]
            finished = [
                (item.row, one)
                for item, one in zip(self._rows, ended, strict=True)
                if one is not None
            ]
            if finished:
                where = torch.tensor(keep, device=ids.device, dtype=torch.long)
                self._rows = [self._rows[slot] for slot in keep]
                self._real = self._real[where]
                self._cache = self._cache if keep else None
                if keep:
                    self._cache.batch_select_indices(where)
        return finished
