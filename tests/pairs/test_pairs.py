"""The gate and its strategies: what becomes a pair, what does not, and that every drop is counted
with its reason."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_traces import drafts_of, examples, long, made_trace, many, rules, sides

from cowest_dspy.errors import PairsError
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling, Trace
from cowest_dspy.pairs import preference_pairs, unpaired_preferences
from cowest_dspy.pairs.texts import near, says
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.testing import ScriptedEngine


@given(examples, rules)
def test_every_draft_and_every_example_is_accounted_for(
    drafts: list[list[tuple[float | None, str]]], rules: dict[str, Any]
) -> None:
    pairs = preference_pairs(many(drafts), **rules)
    gone = sum(
        count
        for reason, count in pairs.dropped.items()
        if reason.startswith(("drafts that failed", "drafts equal"))
    )
    different = [
        {text for influence, text in example if influence is not None} for example in drafts
    ]
    assert gone + sum(map(len, different)) == sum(map(len, drafts))
    without = sum(
        count for reason, count in pairs.dropped.items() if reason.startswith("examples: ")
    )
    per_example = [
        sum(pair.example_id == f"e{number}" for pair in pairs) for number in range(len(drafts))
    ]
    assert without == per_example.count(0)
    limit = rules["per_example"] or (1 if rules["strategy"] == "ranked" else 99)
    assert max(per_example, default=0) <= limit


@given(examples)
def test_the_papers_strategy_is_all_that_helped_against_all_that_did_not(
    drafts: list[list[tuple[float | None, str]]],
) -> None:
    wanted: set[tuple[str, str, str]] = set()
    for number, example in enumerate(drafts):
        first = {}
        for influence, text in example:
            if influence is not None:
                first.setdefault(text, influence)
        for (one, gain), (other, loss) in itertools.permutations(first.items(), 2):
            if gain > 0 >= loss and one.lower() != other.lower():
                wanted.add((f"e{number}", one, other))
    made = preference_pairs(many(drafts), strategy="paper", margin=0.01)
    found = [
        (pair.example_id, pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in made
    ]
    assert len(found) == len(wanted) and set(found) == wanted


def test_ranked_sets_the_best_against_the_worst_and_equally_good_ones_take_turns() -> None:
    traces = drafts_of((0.0, "a"), (1.0, "b"), (-1.0, "c"), (1.0, "d"), (-0.5, "e"))
    assert sides(preference_pairs(traces)) == [(1, 2)]
    assert sides(preference_pairs(traces, per_example=9)) == [(1, 2), (3, 4), (1, 0)]


def test_all_begins_with_the_largest_differences_and_breaks_ties_by_sampling() -> None:
    traces = drafts_of((0.0, "a"), (1.0, "b"), (-1.0, "c"), (1.0, "d"))
    assert sides(preference_pairs(traces, strategy="all")) == [
        (1, 2),
        (3, 2),
        (0, 2),
        (1, 0),
        (3, 0),
    ]
    assert sides(preference_pairs(traces, strategy="all", per_example=2)) == [(1, 2), (3, 2)]
    assert sides(preference_pairs(traces, strategy="paper")) == [(1, 2), (3, 2), (1, 0), (3, 0)]
    assert preference_pairs(reversed(traces), strategy="all") == preference_pairs(
        traces, strategy="all"
    )


def test_a_difference_that_is_short_of_the_margin_by_rounding_only_meets_it() -> None:
    assert 0.7 - 0.2 < 0.5
    assert len(preference_pairs(drafts_of((0.7 - 0.2, "a"), (0.0, "b")), margin=0.5)) == 1


DROPS = [
    (drafts_of((1.0, "a"), (None, "b"), (0.0, "c")), {}, {"drafts that failed (timeout)": 1}),
    (drafts_of((None, ""), (None, ""), error="truncated: max_tokens"), {},
     {"drafts that failed (truncated)": 2, "examples: every draft failed": 1}),
    (drafts_of((None, "a"), (None, "b"), error="alone timeout: slow"), {},
     {"drafts that failed (alone timeout)": 2, "examples: every draft failed": 1}),
    (drafts_of((1.0, "a  b"), (1.0, " a b\n"), (0.0, "c")), {}, {"drafts equal to another": 1}),
    (drafts_of((1.0, " "), (0.0, "c")), {}, {"drafts without any text": 1, ("examples: only one " "draft"): 1}),
    (drafts_of((1.0, "a"), (1.0, "b")), {}, {"examples: all drafts had the same influence": 1}),
    (drafts_of((-0.1, "a"), (-1.0, "b")), {}, {"examples: the best draft hurt": 1}),
    (drafts_of((0.4, "a"), (0.0, "b")), {}, {"examples: the difference is below the margin": 1}),
    (drafts_of((0.0, "a"), (-1.0, "b")), {"strategy": "paper"}, {"examples: no draft helped": 1}),
    (drafts_of((1.0, "a"), (0.2, "b")), {"strategy": "paper"}, {"examples: every draft helped": 1}),
    (drafts_of((1.0, long), (0.0, long.replace("as always", "as usual"))), {"near": 0.9},
     {"examples: nearly equal texts": 1, "pairs: nearly equal texts": 1}),
    (drafts_of((1.0, "one two three"), (0.0, "one"), (-1.0, "four five")), {"length_ratio": 1.5, "per_example": 2},
     {"pairs: lengths that differ by more than length_ratio": 1}),
    (drafts_of((1.0, "one two three"), (0.0, "one")), {"length_ratio": 1.5},
     {"examples: lengths that differ by more than length_ratio": 1, ("pairs: lengths that differ " "by more " "than " "length_ratio"): 1}),
    (drafts_of((1.0, "It is 25 bar."), (0.0, "b")), {"leak": "answer"},
     {"drafts that say the answer (never chosen)": 1, "examples: the best drafts say the answer": 1}),
    ([made_trace(0, 1.0, "a"), made_trace(1, 0.0, "b", prompt=({"role": "user", "content": "another"},))], {},
     {"examples: drafts of different prompts": 1, "pairs: drafts of different prompts": 1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("traces", "rules", "dropped"),
    DROPS,
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_every_drop_is_counted_by_its_reason(
    traces: list[Trace], rules: dict[str, Any], dropped: dict[str, int]
) -> None:
    made = preference_pairs(traces, **rules)
    assert made.dropped == dropped
    assert bool(made) != any(reason.startswith("examples: ") for reason in dropped)


def test_drafts_that_were_cut_off_are_counted_apart_from_those_that_failed_otherwise() -> None:
    texts = iter(["good one", "cut off in the middle ...", ""])
    weak = ScriptedEngine(lambda request: next(texts))
    strong = ScriptedEngine({"": "x"}, model="scripted/strong")
    program = Collaboration("question -> answer", draft="knowledge").bind(
        weak=weak.lm(), strong=strong.lm()
    )
    example = dspy.Example(id="q", question="Which?", answer="x").with_inputs("question")
    traces = collect(
        program,
        [example],
        lambda e, p, trace=None: 1.0,
        Sampling(drafts=3),
        num_threads=1,
        max_errors=1.0,
    )
    made = preference_pairs(traces)
    assert made.dropped == {
        "drafts that failed (parse)": 1,
        "drafts that failed (truncated)": 1,
        "examples: only one draft": 1,
    }


def test_where_saying_the_answer_is_cheating_the_next_best_is_chosen_and_the_cheat_may_be_rejected() -> (
    None
):
    traces = drafts_of(
        (1.0, "25 bar"), (0.5, "high pressure"), (0.0, "low"), (-0.5, "up to 25 BAR")
    )
    assert sides(preference_pairs(traces, leak="answer", per_example=9)) == [(1, 3), (1, 2)]
    assert sides(preference_pairs(traces, per_example=9)) == [(0, 3), (0, 2), (0, 1)]
    several = drafts_of((1.0, "25 bar"), (0.0, "low"), gold={"answer": ["26 bar", "25 bar"]})
    assert len(preference_pairs(several, leak="answer")) == 0
    with pytest.raises(PairsError, match=r'"anser".*does not have.*Did you mean "answer"\?'):
        preference_pairs(traces, leak="anser")


@pytest.mark.parametrize(
    ("text", "answer", "said"),
    [
        ("It may run at up to 25  BAR.", "25 bar", True),
        ("The answer is (Paris).", "paris", True),
        ("Comparison", "paris", False),
        ("Parisian", "paris", False),
        ("25", "25", True),
        ("25.", "25", True),
        ("It is 25, not 30.", "25", True),
        ("25 %", "25", True),
        ("x=25", "25", True),
        ("125", "25", False),
        ("2.5", "5", False),
        ("2.5", "2", False),
        (".5", "5", False),
        ("1,250", "250", False),
        ("1,250", "1", False),
        ("1/2", "2", False),
        ("12:30", "30", False),
        ("-5", "5", False),
        ("at \u22125 degrees", "5", False),
        ("A-5", "5", True),
        ("-5", "-5", True),
        ("25th", "25", False),
        ("the C++ one", "c++", True),
        ("ＰＡＲＩＳ", "paris", True),  # noqa: RUF001 - full-width letters are the point
        ("stra\u00dfe", "STRASSE", True),
        ("first line\nsecond line", "line second", True),
        ("anything", "", False),
        ("anything", "  ", False),
    ],
)
def test_an_answer_is_found_as_whole_words_and_a_number_not_inside_another(
    text: str, answer: str, said: bool
) -> None:
    assert says(text, answer) is said


@given(st.text(max_size=30), st.text(max_size=30), st.text(min_size=1, max_size=10))
def test_an_answer_between_spaces_is_always_found(before: str, after: str, answer: str) -> None:
    assert says(f"{before} \u00b7 {answer} \u00b7 {after}", answer) is bool(answer.split())


words = st.lists(st.sampled_from("abc"), max_size=12)


@given(words, words, st.sampled_from([0.3, 0.5, 0.8, 0.95, 1.0]))
def test_similarity_is_that_of_the_longest_common_subsequence(
    one: list[str], other: list[str], least: float
) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, j in itertools.product(range(len(one)), range(len(other))):
        table[i + 1][j + 1] = (
            table[i][j] + 1 if one[i] == other[j] else max(table[i][j + 1], table[i + 1][j])
        )
    size = len(one) + len(other)
    similarity = 2 * table[-1][-1] / size if size else 1.0
    found = near(" ".join(one), " ".join(other), least)
    assert found is (similarity >= least - 1e-9)
    assert found is near(" ".join(other), " ".join(one), least)


def test_texts_with_other_numbers_are_never_nearly_equal() -> None:
    twenty = " ".join(["word"] * 20)
    assert near(f"{twenty} yes", f"{twenty} no", 0.9)
    assert not near(f"{twenty} 42 bar", f"{twenty} 22 bar", 0.9)
    assert near("Yes, at 4 bar", "yes,  at 4 BAR", 1.0)
    assert not near("x > y", "x < y", 0.9)
    assert near(
        "".join(map(chr, range(0x4E00, 0x4E20))), "".join(map(chr, range(0x4E01, 0x4E21))), 0.95
    )


@pytest.mark.timeout(30)
def test_a_megabyte_of_text_is_compared_at_once() -> None:
    draw = random.Random(0)
    text = [draw.choice(["press", "mill", "bar", "the", "hot"]) for _ in range(200_000)]
    changed = list(text)
    for place in range(0, 200_000, 4_000):
        changed[place] = "other"
    draw.shuffle(other := list(text))
    assert near(" ".join(text), " ".join(changed), 0.95)
    assert not near(" ".join(text), " ".join(other), 0.95)
    assert not near("the " * 200_000, "hot " * 200_000, 0.95)


def test_lengths_are_those_of_words_with_an_interval_over_examples() -> None:
    traces = many(
        [
            [(1.0, "one two three four"), (0.0, "one")],
            [(1.0, "one two three"), (0.0, "four")],
            [(1.0, "a"), (0.0, "b c")],
        ]
    )
    lengths = preference_pairs(traces).lengths
    assert lengths is not None and lengths.interval is not None
    assert (lengths.chosen, lengths.rejected, lengths.difference) == pytest.approx(
        (8 / 3, 4 / 3, 4 / 3)
    )
    assert (lengths.longer, lengths.shorter) == pytest.approx((2 / 3, 1 / 3))
    assert lengths.interval.low == -1 and lengths.interval.high == 3
    assert lengths.warning is None, "three examples are no certainty"
    assert str(lengths).startswith(
        "chosen 2.7 words, rejected 1.3, difference +1.3 [-1.0, +3.0]; chosen is longer in 67 % and"
    )
    assert preference_pairs([]).lengths is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"), [(8, 2, "longer"), (2, 8, "shorter"), (20, 19, None)]
)
def test_a_certain_and_large_difference_of_lengths_is_warned_of(
    chosen: int, rejected: int, says: str | None
) -> None:
    traces = many([[(1.0, "good " * chosen), (0.0, "bad " * rejected)]] * 5)
    lengths = preference_pairs(traces).lengths
    assert lengths is not None
    assert says in (lengths.warning or "") if says else lengths.warning is None
    matched = preference_pairs(traces, length_ratio=1.5)
    assert len(matched) == (0 if says else 5)


def test_pairs_of_one_example_do_not_make_its_lengths_more_certain() -> None:
    one = many([[(1.0, "a b c"), (0.0, "d"), (0.0, "e"), (0.0, "f")]])
    lengths = preference_pairs(one, per_example=3).lengths
    assert lengths is not None and lengths.interval is None


def held_out(question: str) -> dspy.Example:
    return dspy.Example(id="t7", question=question, answer="x").with_inputs("question")


@pytest.mark.parametrize("make", [preference_pairs, unpaired_preferences])
def test_examples_that_are_tested_on_are_refused_by_name(make: Any) -> None:
    traces = many([[(1.0, "a"), (0.0, "b")], [(1.0, "a"), (0.0, "b")]])
    with pytest.raises(
        PairsError, match=r"1 examples have the inputs of held-out ones: e1 \(held out as t7\)"
    ):
        make(traces, held_out=[held_out("something else"), held_out("what OF\n e1?")])
    assert len(make(traces, held_out=[held_out("what of e2?")])) > 0
    row = {"id": "t7", "question": "what of e1?", "answer": "x"}
    for rows in ([row], iter([row]), [dspy.Example(**row)]):
        with pytest.raises(PairsError, match=r"e1 \(held out as t7\)"):
            make(traces, held_out=rows)


@pytest.mark.parametrize("make", [preference_pairs, unpaired_preferences])
def test_traces_are_read_as_a_stream_of_which_one_example_is_held(make: Any) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Seen(str):
        """A text that can be watched: of a trace itself, frozen and compared by value, there is no
        weak set."""

    def traces() -> Iterator[Trace]:
        nonlocal most
        for number in range(200):
            for index in range(4):
                text = Seen(f"draft {index} of {number}")
                alive.add(text)
                yield made_trace(index, 0.0, text, f"e{number}")
                del text
            gc.collect(0)
            most = max(most, len(alive))

    assert len(make(traces())) == 0
    assert most <= 8


def test_drafts_of_one_example_must_stand_together() -> None:
    first, second = drafts_of((1.0, "a"), (0.0, "b"))
    other = made_trace(0, 1.0, "c", "f")
    with pytest.raises(PairsError, match=r'"e" \(round 1\) do not stand together.*sorted\(traces'):
        preference_pairs([first, other, second])
    again = [
        made_trace(index, value, text, round=2)
        for index, (value, text) in enumerate([(1.0, "a"), (0.0, "b")])
    ]
    assert [pair.round for pair in preference_pairs([first, second, other, *again])] == [1, 2]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"margin": 0.0}, "margin is 0.0: it must be above 0"),
        ({"margin": 3.0}, "at most 2"),
        ({"near": 0.0}, "near is 0.0"),
        ({"near": 1.5}, "near is 1.5"),
        ({"length_ratio": 0.5}, "length_ratio is 0.5: it must be at least 1"),
        ({"per_example": 0}, "per_example is 0: at least one"),
        ({"strategy": "rankd"}, r'no strategy "rankd". Did you mean "ranked"\?'),
    ],
)
def test_rules_out_of_range_say_what_is_allowed(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(PairsError, match=message):
        preference_pairs([], **rules)


@given(examples, st.sampled_from([None, True, False]))
def test_labels_say_whether_a_draft_helped_and_only_usable_drafts_have_one(
    drafts: list[list[tuple[float | None, str]]], same: bool | None
) -> None:
    traces = many(drafts)
    made = unpaired_preferences(traces, same=same)
    for draft in made:
        assert draft.label is (same if draft.influence == 0 else draft.influence > 0)
    assert [(d.example_id, d.draft_index) for d in made] == sorted(
        (d.example_id, d.draft_index) for d in made
    )
    assert len(made) + sum(made.dropped.values()) == len(traces)
    honest = unpaired_preferences(traces, same=same, leak="answer")
    assert [d for d in made if not (d.label and "25 bar" in d.completion[0]["content"])] == list(
        honest
    )


def test_labels_of_one_kind_only_are_nothing_to_learn_from() -> None:
    with pytest.raises(PairsError, match="2 of 2 labelled drafts helped: both labels are needed"):
        unpaired_preferences(drafts_of((1.0, "a"), (0.5, "b"))).to_dataset()
    with pytest.raises(PairsError, match="0 of 0"):
        unpaired_preferences([]).to_dataset()
