"""How likely a model finds texts that it has not written: one batched pass, no sampling.

The prompts' shared beginning is computed once, as in generate.py, and only the texts' own tokens
are projected onto the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cowest_dspy.lms.local.attention import Prefix, attending_to, left_padded, prefill_mask
from cowest_dspy.lms.local.generate import PREFILL_TOKENS


@dataclass(frozen=True)
class Likelihood:
    """The natural log-probability of a text under a model: ``logprob`` <= 0 is the sum over its
    ``tokens``."""

    logprob: float
    tokens: int

    @property
    def per_token(self) -> float:
        """The mean log-probability of a token, which does not punish a text for its length."""
        return self.logprob / self.tokens


def score(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], prefix: Prefix | None = None
) -> list[Likelihood]:
    """The likelihood of every row's second part after its first, in the order of ``rows``.

    A row is (tokens of the prompt after the prefix, at least one; tokens of the text, at least
    one). Rows of like length are computed together, on a processor at most some 256 tokens at a
    time.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]) + len(rows[index][1]))
    found: dict[int, Likelihood] = {}
    while order:
        longest = sum(map(len, rows[order[-1]]))
        size = max(1, PREFILL_TOKENS // longest) if model.device.type == "cpu" else len(order)
        order, group = order[:-size], order[-size:]
        made = _score_group(model, [rows[index] for index in group], prefix)
        found.update(zip(group, made, strict=True))
    return [found[index] for index in range(len(rows))]


def _score_group(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], prefix: Prefix | None
) -> list[Likelihood]:
    import torch

    # Padded on the left: the texts end together, and the logits before each of their tokens are the
    # last ones.
    ids, real = left_padded([[*prompt, *text] for prompt, text in rows], model.device)
    positions = (real.long().cumsum(1) - 1).clamp(min=0) + (prefix.length if prefix else 0)
    longest = max(len(text) for _, text in rows)
    with torch.inference_mode():
        out = model(
            input_ids=ids,
            attention_mask=prefill_mask(real) if prefix else real.long(),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=longest + 1,
            **attending_to(prefix),
        )
    logprobs = out.logits[:, :-1].float().log_softmax(dim=-1)
    of_tokens = logprobs.gather(-1, ids[:, -longest:, None]).squeeze(-1)
    lengths = torch.tensor([len(text) for _, text in rows], device=ids.device)
    inside = torch.arange(longest, device=ids.device) >= longest - lengths[:, None]
    sums = of_tokens.masked_fill(~inside, 0.0).sum(dim=1).tolist()
    return [Likelihood(total, len(text)) for total, (_, text) in zip(sums, rows, strict=True)]
