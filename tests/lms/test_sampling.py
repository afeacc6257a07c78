"""The next token of every row: laws of the distribution, and that rows do not disturb each
other."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowest_dspy.lms.local.sampling import Draws, PromptRow, choose

# In steps of 1/64: nearer logits have equal weights in float32.
LOGITS = st.lists(st.integers(-512, 512).map(lambda number: number / 64), min_size=2, max_size=12)


def row(**settings: Any) -> Draws:
    return Draws(PromptRow((1,), 8, **{"temperature": 1.0, **settings}))


def drawn(logits: list[float], count: int = 1, **settings: Any) -> list[int]:
    import torch

    given = torch.tensor([logits])
    item = row(**settings)
    return [choose(given, [item])[0] for _ in range(count)]


@settings(max_examples=60)
@given(LOGITS, st.integers(0, 2**40), st.integers(1, 12))
def test_top_k_never_takes_a_token_that_k_others_beat(
    logits: list[float], seed: int, top_k: int
) -> None:
    token = drawn(logits, seed=seed, top_k=top_k)[0]
    assert sum(other > logits[token] for other in logits) < top_k


@settings(max_examples=60)
@given(LOGITS, st.integers(0, 2**40), st.floats(0.05, 0.95))
def test_top_p_never_takes_a_token_when_likelier_ones_have_the_mass(
    logits: list[float], seed: int, top_p: float
) -> None:
    token = drawn(logits, seed=seed, top_p=top_p)[0]
    weights = [math.exp(one - max(logits)) for one in logits]
    likelier = sum(
        weight for weight, one in zip(weights, logits, strict=True) if one > logits[token]
    )
    assert likelier / sum(weights) < top_p + 1e-5


@settings(max_examples=40)
@given(
    st.lists(LOGITS.filter(lambda one: len(one) == 5), min_size=1, max_size=9), st.integers(0, 99)
)
def test_a_row_draws_the_same_whatever_is_beside_it(rows: list[list[float]], seed: int) -> None:
    import torch

    alone = [drawn(logits, seed=seed + place)[0] for place, logits in enumerate(rows)]
    assert (
        choose(torch.tensor(rows), [row(seed=seed + place) for place in range(len(rows))]) == alone
    )


def test_what_is_drawn_is_distributed_as_the_softmax_says() -> None:
    logits = [0.0, 1.0, 2.0, -30.0]
    count = 4000
    found = Counter(token for seed in range(count // 20) for token in drawn(logits, 20, seed=seed))
    total = sum(math.exp(one) for one in logits)
    for token, one in enumerate(logits):
        expected = math.exp(one) / total
        # Five standard errors: with fixed seeds the test repeats, and it would not have passed by
        # chance alone.
        assert (
            abs(found[token] / count - expected)
            <= 5 * math.sqrt(expected * (1 - expected) / count) + 1e-9
        )


def test_a_cold_row_beside_a_warm_one_is_greedy() -> None:
    import torch

    items = [row(temperature=0.0), row(seed=3), row(temperature=0.0)]
    chosen = choose(torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 2.0, 9.0]]), items)
    assert (chosen[0], chosen[2]) == (1, 2) and [item.tokens for item in items] == [
        [token] for token in chosen
    ]


def test_a_large_vocabulary_is_cut_as_a_small_one() -> None:
    import torch

    logits = torch.linspace(0, 1e-3, 5000)[None]
    kept = {choose(logits, [row(seed=seed, top_k=3000)])[0] for seed in range(50)}
    assert min(kept) >= 2000 and len(kept) > 30
    wide = {choose(logits, [row(seed=seed, top_p=0.9)])[0] for seed in range(50)}
    assert min(wide) >= 499 and len(wide) > 30


def test_logits_that_are_no_numbers_say_so() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        drawn([0.0, float("nan")])
