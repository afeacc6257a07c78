"""Logits -> the next token of every row of a batch, each row by its own settings and its own random
numbers.

A row draws one number per token, from a generator that only its seed decides, and takes the token
at that point of the cumulated distribution. So its draws do not depend on what else is in the
batch, and a logit that differs in its last bits (a matrix product of another size may add in
another order) changes the token only when the number falls on the very border.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cowest_dspy.lms.local.attention import Prefix

# More tokens than this are rarely needed to reach a top_p: sorting only them is a hundredth of the
# work.
_LIKELIEST = 1024


@dataclass(frozen=True, eq=False)
class PromptRow:
    """One prompt and how to continue it; lengths are in tokens.

    ``tokens`` are those after ``prefix``, a beginning that other rows have too. ``adapter`` names
    the LoRA adapter (None: the base). ``logprobs``: None for none, otherwise how many
    of the likeliest tokens to note beside each chosen one (0: only that). ``on_tokens`` gets the
    tokens so far after each one that does not end the row.
    """

    tokens: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prefix: Prefix | None = None
    adapter: str | None = None
    on_tokens: Callable[[Sequence[int]], None] | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token and its natural log-probability under the model, before temperature, top_p and top_k;
    ``top``: the likeliest."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Draws:
    """The progress of a row: its tokens so far, and their scores when it asked for them."""

    row: PromptRow
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.row.seed % (1 << 64))

    def number(self) -> float:
        """The next number in [0, 1), a multiple of 2^-24, so that float32 holds it exactly."""
        return self._random.getrandbits(24) / (1 << 24)


@dataclass(frozen=True)
class Completion:
    """The result of one row. ``finish_reason`` is "stop" (end token or stop string) or "length"
    (``max_tokens`` reached).

    ``tokens`` are all that were generated, an end token included; ``scores`` those of the tokens
    that ``text`` is made of, when the row asked for them.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    scores: tuple[TokenScore, ...] | None = None


def choose(logits: Any, rows: Sequence[Draws]) -> list[int]:
    """The next token of every row from ``logits [rows, vocabulary]``; appended to the row, with its
    score when asked for.

    Greedy where ``temperature`` is 0.

    Raises:
        ValueError: a row's logits are not numbers.
    """
    import torch

    best = logits.max(dim=-1)
    if not bool(torch.isfinite(best.values).all()):
        raise ValueError(
            "The model's logits are not numbers: its weights or its precision cannot be used for "
            "this prompt."
        )
    chosen = best.indices.tolist()
    warm = [slot for slot, item in enumerate(rows) if item.row.temperature > 0]
    if warm:
        picked = logits if len(warm) == len(rows) else logits[warm]
        for slot, token in zip(warm, _sample(picked, [rows[slot] for slot in warm]), strict=True):
            chosen[slot] = token
    for slot, item in enumerate(rows):
        item.tokens.append(chosen[slot])
        if item.row.logprobs is not None:
            item.scores.append(_token_score(logits[slot], chosen[slot], item.row.logprobs))
    return chosen


def _sample(logits: Any, rows: Sequence[Draws]) -> list[int]:
    import torch

    temperatures = torch.tensor([[item.row.temperature] for item in rows], device=logits.device)
    weights = torch.softmax(logits / temperatures, dim=-1)
    for slot, item in enumerate(rows):
        if item.row.top_k > 0 or item.row.top_p < 1:
            weights[slot] = _likely(weights[slot], item.row.top_k, item.row.top_p)
    numbers = torch.tensor([[item.number()] for item in rows], device=logits.device)
    cumulated = weights.cumsum(dim=-1)
    whole = cumulated[:, -1:]
    # Below the whole, so that the token found has a weight above zero.
    points = torch.minimum(numbers * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(cumulated, points, right=True).squeeze(-1).tolist()


def _likely(weights: Any, top_k: int, top_p: float) -> Any:
    """``weights`` with zeros after the ``top_k`` largest, then after the smallest set whose mass
    reaches ``top_p`` of what is left (the first always stays). Equal weights are taken in the order
    of their tokens."""
    import torch

    size = weights.shape[-1]
    count = min(top_k, size) if top_k > 0 else size
    best = weights.topk(min(count, _LIKELIEST))
    if count > _LIKELIEST and (top_p >= 1 or float(best.values.sum()) < top_p):
        best = weights.topk(count)
    values = best.values
    if top_p < 1:
        mass = float(values.sum()) if top_k > 0 else float(weights.sum())
        values = values.masked_fill(values.cumsum(-1) - values >= top_p * mass, 0.0)
    return torch.zeros_like(weights).index_copy_(0, best.indices, values)


def _token_score(logits: Any, token: int, count: int) -> TokenScore:
    logprobs = logits.log_softmax(dim=-1)
    best = logprobs.topk(count)
    return TokenScore(
        token,
        float(logprobs[token]),
        tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    )


def completed(draws: Draws, tokenizer: Any, end_tokens: frozenset[int]) -> Completion | None:
    """The completion of the row, when its newest token ends it; otherwise None."""
    row, tokens = draws.row, draws.tokens
    ended = tokens[-1] in end_tokens
    spoken = tokens[:-1] if ended else tokens
    cut = -1
    if row.stop:
        text = tokenizer.decode(spoken, skip_special_tokens=True)
        cut = min((at for at in (text.find(stop) for stop in row.stop) if at >= 0), default=-1)
    if not ended and cut < 0 and len(tokens) < row.max_tokens:
        if row.on_tokens:
            row.on_tokens(tokens)
        return None
    text = tokenizer.decode(spoken, skip_special_tokens=True)
    scores: tuple[TokenScore, ...] | None = None
    if row.logprobs is not None:
        while (
            cut >= 0
            and spoken
            and len(tokenizer.decode(spoken[:-1], skip_special_tokens=True)) >= cut
        ):
            spoken = spoken[:-1]
        scores = tuple(draws.scores[: len(spoken)])
    reason = "stop" if ended or cut >= 0 else "length"
    return Completion(text[:cut] if cut >= 0 else text, tuple(tokens), reason, scores)
