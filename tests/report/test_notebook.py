"""Views for notebooks: every text escaped, hidden inputs hidden, nothing run, nothing large; and
short plain words beside them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import dspy
import pytest
from compared import compared, comparison, full
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_traces import drafts_of, made_trace, many
from report_runs import HOSTILE, full_run

from cowest_dspy import Collaboration, CoWest, Cycle, Influence, InfluenceReport, Store
from cowest_dspy.influence import NoiseFloor, Traces
from cowest_dspy.influence.trace import Traces
from cowest_dspy.optimizers.cycle import StepHistory, StepResult
from cowest_dspy.optimizers.rounds import Round, RoundHistory, gain
from cowest_dspy.pairs import PreferencePairs, preference_pairs, unpaired_preferences
from cowest_dspy.report.compared import Comparison
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.tuning import Tuned
from cowest_dspy.tuning.provider import TunedLM
from cowest_dspy.utils import notebook
from cowest_dspy.utils.safe_text import visible

TAGS, ATTRIBUTES = {"pre", "span"}, {"style"}
LARGEST = 40_000
texts = st.text(alphabet="<>&\"'/=! scriptonerror\n\u2028", max_size=60)


class Seen(HTMLParser):
    """What a browser would make of a fragment: its tags and attributes, what of them stays open,
    and its text."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.text = set[str](), set[str](), list[str](), ""
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def view_of(thing: Any) -> str:
    """The text of a view that keeps the rules."""
    fragment = thing._repr_html_()
    seen = Seen(fragment)
    assert seen.tags <= TAGS and seen.attributes <= ATTRIBUTES and not seen.open
    assert len(fragment) < LARGEST
    assert "url(" not in fragment and "http" not in re.sub(r"&\S+;", "", fragment).replace(
        seen.text, ""
    )
    assert len(repr(thing)) < 1000, "what is stored beside a view in a notebook is short, too"
    return seen.text


def program(text: str = "Say what you know.") -> Collaboration:
    task: Any = dspy.Signature("question -> answer", text)  # pyright: ignore[reportCallIssue]
    lm = ScriptedEngine(lambda request: "yes", model="scripted/model").lm()
    return Collaboration(task, draft="direct").bind(weak=lm, strong=lm)


def round_of(text: str) -> Round:
    found = gain({"a": 0.0, "b": 0.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0})
    return Round(1, "local/base", "local/tuned", 12, 0, "accepted", text, found)


def tuned_lm() -> TunedLM:
    history = [
        {"step": float(step), "loss": 1 / step, "rewards/margins": step / 10}
        for step in range(1, 40)
    ]
    result = Tuned(
        Path("/a/machine/adapters/dpo"), "0123456789ab", "base@1", history, 12.0, 900, 40, 2**30
    )
    return TunedLM(dspy.LM("openai/x"), "local/base+0123456789ab", result)


def every(text: str) -> list[Any]:
    """One of each thing that has a view, with the text wherever somebody else's text may stand."""
    traces = [
        *drafts_of(
            (1.0, text),
            (0.0, f"other {text}"),
            (-1.0, "third"),
            inputs={"question": text, "place": text},
        ),
        made_trace(3, None, text, error=f"{text}: {text}"),
    ]
    held = Traces(traces)
    held.saved = {"weak_calls": 3, "strong_calls": 1}
    found = program("Answer." + text.replace("draft", ""))
    cast: Any = found
    cast.rounds = RoundHistory([round_of(text)])
    return [
        held,
        preference_pairs(traces, per_example=3),
        unpaired_preferences(traces),
        InfluenceReport((1.0, -1.0, None, 0.0), ("a", "a", "b", text), NoiseFloor(4, 1, 0.25, 0.1)),
        NoiseFloor(4, 1, 0.25, 0.1),
        found,
        RoundHistory([round_of(text)]),
        StepHistory(
            [
                StepResult(0, text, text, 0.5, 4, 0, True),
                StepResult(1, "w", "m", None, 0, 4, False, round_of("").gain),
            ]
        ),
        tuned_lm(),
        full_run(text),
        comparison(
            compared("strong", "+-!-", title=text),
            compared("both", "++-!", note=text),
            title=text,
            warnings=(text,),
        ),
    ]


@settings(max_examples=25)
@given(texts)
def test_law_no_text_gets_out_as_markup(text: str) -> None:
    for thing in every(text):
        view_of(thing)


def test_a_hostile_draft_is_shown_and_not_run() -> None:
    traces, pairs, *_ = every(HOSTILE)
    assert "<script>" in view_of(traces) and "<script>" in view_of(pairs)


@given(st.text(max_size=200), st.text(max_size=200))
def test_law_a_diff_is_the_two_texts_with_marks(one: str, other: str) -> None:
    for shown, text in zip(notebook.word_diff(one, other), (one, other), strict=True):
        assert shown.plain == visible(text)


def test_a_diff_marks_what_differs_and_nothing_else() -> None:
    one, two = notebook.word_diff("The Arbel may run at 31 bar.", "The Arbel may run at 18 bar.")
    for shown, word in ((one, "31"), (two, "18")):
        assert [shown.plain[span.start : span.end] for span in shown.spans] == [word]


def test_a_report_says_counts_mean_interval_harm_and_noise() -> None:
    report = InfluenceReport(
        (1.0, 1.0, 0.0, -1.0, None), tuple("aabbc"), NoiseFloor(10, 2, 0.2, 0.1)
    )
    text = view_of(report)
    interval = report.interval()
    assert interval is not None
    for part in (
        "5 drafts of 3 examples",
        "+0.250",
        f"{interval.low:+.3f} to",
        "helped 2",
        "hurt 1",
        "failed 1",
        "25.0 %",
        "floor",
    ):
        assert part in text
    assert "no draft has an influence" in view_of(InfluenceReport((None, None)))
    assert view_of(InfluenceReport(())) and repr(report).startswith(
        "InfluenceReport(influence +0.25"
    )


def test_pairs_say_what_was_dropped_and_why_and_show_the_first_few() -> None:
    pairs = preference_pairs(
        many(
            [[(1.0, f"good {n}"), (0.0, f"worse {n}")] for n in range(9)]
            + [[(0.0, "a"), (0.0, "b")]]
        )
    )
    text = view_of(pairs)
    assert (
        "9 preference pairs of 9 examples" in text
        and "1 examples: all drafts had the same influence" in text
    )
    assert "good 2" in text and "good 3" not in text and "and 6 more pairs" in text
    assert "9 pairs of 9 examples" in repr(pairs) and "good" not in repr(pairs)
    assert view_of(PreferencePairs(()))


def test_ten_thousand_traces_are_a_small_view() -> None:
    held = Traces(
        [made_trace(0, 1.0 if n % 2 else None, "word " * 900, f"e{n}") for n in range(10_000)]
    )
    held.saved = {"weak_calls": 0, "strong_calls": 0}
    text = view_of(held)
    assert (
        "10,000 traces" in text
        and "and 9,995 more rows" in text
        and "failed: timeout 5,000" in text
    )
    assert "more characters]" in text
    drafts = unpaired_preferences(
        many([[(1.0, f"good {n}"), (-1.0, f"bad {n}")] for n in range(500)])
    )
    assert "1,000 labelled drafts" in view_of(drafts) and "and 995 more rows" in view_of(drafts)


@pytest.mark.parametrize("hide", [("question",), ()])
def test_inputs_that_the_run_hides_are_hidden_in_traces_and_in_what_is_made_of_them(
    tmp_path: Path, hide: tuple[str, ...]
) -> None:
    secret, names = "the old ladder in the shed", list(hide)
    (tmp_path / "config.toml").write_text(f"[report]\nhide = {names}\n")
    made = drafts_of((1.0, f"It says: {secret}. Fine."), (-1.0, "no"), inputs={"question": secret, "place": "yard"},
                     prompt=({"role": "user", "content": f"Question: {secret}"},), alone={"answer": secret})  # fmt: skip
    with Store(tmp_path) as store:
        store.keep_all("trace", {trace.key: trace.to_dict() for trace in made})
        traces = Traces.load(store)
        views = [
            view_of(one) for one in (traces, preference_pairs(traces), unpaired_preferences(traces))
        ]
        plain = [
            repr(one) for one in (traces, preference_pairs(traces), unpaired_preferences(traces))
        ]
    for text in views:
        assert ("ladder" in text) is not bool(hide)
        assert ("(hidden: " in text) is bool(hide)
    assert "yard" in views[0] and not any("ladder" in text for text in plain)


def test_hidden_inputs_stay_hidden_in_pairs_that_were_cut_down() -> None:
    class Hiding(list[Any]):
        hide = ("question",)

    traces = Hiding(many([[(1.0, f"good {n}"), (0.0, f"worse {n}")] for n in range(9)]))
    assert "prompt of" not in view_of(preference_pairs(traces).at_most(4))


def test_a_collaboration_shows_its_models_and_formats_and_no_key() -> None:
    text = view_of(program())
    for part in (
        "scripted/model",
        "question -> answer",
        "Answer as well as you can.",
        "Say what you know.",
        "draft",
        "alone",
    ):
        assert part in text
    keyed = Collaboration("question -> answer").bind(
        weak=dspy.LM("openai/x", api_key="sk-secret1234567890", temperature=0.5)
    )
    assert "openai/x temperature 0.5" in view_of(keyed) and "sk-secret" not in view_of(
        keyed
    ) + repr(keyed)
    assert "not bound" in view_of(Collaboration("question -> answer"))
    assert "scripted/model" in repr(program()) and "\n" not in repr(program())


def test_a_compiled_program_shows_its_rounds_and_a_cycle_its_steps() -> None:
    compiled: Any = program()
    compiled.rounds = RoundHistory([round_of("gain was large")])
    compiled.steps = StepHistory([StepResult(0, "start", "w", 0.5, 4, 0, True)])
    text = view_of(compiled)
    assert "1 round, 1 accepted" in text and "gain was large" in text and "0 start" in text
    assert (
        repr(compiled.rounds) == "round 1 accepted: gain was large"
        and compiled.rounds[0].number == 1
    )
    assert isinstance(compiled.rounds, tuple) and compiled.rounds == (round_of("gain was large"),)


def test_a_training_shows_its_steps_and_no_path() -> None:
    text = view_of(tuned_lm())
    assert "39 optimiser steps" in text and "local/base+0123456789ab" in text and "+0.100" in text
    assert "machine" not in text + repr(tuned_lm())


def test_a_run_and_a_comparison_show_verdict_and_numbers_and_no_answer() -> None:
    text = view_of(full_run("the draft of somebody"))
    assert (
        "The both arm" in text
        and "strict" in text
        and "Round" not in text
        and "of somebody" not in text
    )
    assert "Cost of each stage" in text and "no margin" in text
    shown = view_of(full("plain"))
    assert "Better than" in shown or "No arm is reliably better" in shown
    assert "p (Holm)" in shown and "post 1" not in shown
    empty = Comparison("None yet", "2025-01-01T00:00:00Z", "a", "m", ())
    assert "nothing to compare" in view_of(empty)
    assert "arms" in repr(full()) and "answer" not in repr(full_run())
    alone = Comparison("One", "2025-01-01T00:00:00Z", "strong", "m", (compared("strong", "+-"),))
    assert "The strong arm" in view_of(alone)


def test_optimisers_and_metrics_say_what_they_are() -> None:
    def right(example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0

    weights = CoWest(metric=right, drafts=6, rounds=2)
    assert repr(weights).startswith("CoWest(metric=right") and "drafts=6" in repr(weights)
    assert repr(Cycle(right, "w -> w", {"w": weights})) == "Cycle(metric=right, strategy='w -> w')"
    assert repr(Influence(right, program())).startswith("Influence(right, Collaboration(")


def test_what_has_no_view_says_so() -> None:
    with pytest.raises(TypeError, match="no view of a int"):
        notebook.html_of(3)
