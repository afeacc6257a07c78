"""The prompts in a report: those that the models were sent, each message once, within a limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted import match, questions, strong_that_reads, together, weak_that_varies

from cowest_dspy.experiment import summary
from cowest_dspy.experiment.summary import load_prompts
from cowest_dspy.influence import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.report.facts import Prompts
from cowest_dspy.store import Store


def test_the_prompts_of_traces_are_read_from_the_store_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = together(weak_that_varies(["{n}", "x"]), strong_that_reads())
    with Store(tmp_path) as store:
        traces = list(collect(program, questions(3), match, Sampling(drafts=2), store=store))
        prompts = load_prompts(traces, store)
        whole = sum(len(message["content"]) for message in prompts.messages)
        monkeypatch.setattr(summary, "MOST_PROMPTS", whole - 1)
        fewer = load_prompts(traces, store)
        assert store.request_messages("of no call") is None

    def sent(key: str) -> list[dict[str, str]]:
        return [prompts.messages[place] for place in prompts.requests[key]]

    for trace in traces:
        assert trace.requests.keys() == {"draft", "alone", "refine"}
        assert sent(trace.requests["draft"]) == list(trace.prompt)
        alone, refine = (sent(trace.requests[name])[-1]["content"] for name in ("alone", "refine"))
        assert f"Background: {trace.draft}" in refine and "Background" not in alone
    assert len(prompts.messages) == len({tuple(one.items()) for one in prompts.messages})
    assert 0 < len(fewer.requests) < len(prompts.requests) == 3 * (2 + 1 + 2)
    assert all(prompts.requests[key] == places for key, places in fewer.requests.items())


def test_traces_of_an_earlier_version_have_no_prompts(tmp_path: Path) -> None:
    program = together(weak_that_varies(["{n}", "x"]), strong_that_reads())
    with Store(tmp_path) as store:
        (trace, *_) = collect(program, questions(1), match, Sampling(drafts=2), store=store)
        values = {name: value for name, value in trace.to_dict().items() if name != "requests"}
        assert load_prompts([type(trace).from_dict(values)], store) == Prompts()
