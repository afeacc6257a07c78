"""An odd answer is a failure of its own call only, and a commit that fails takes nobody else's
answer with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import InvalidRequestError, Request, Response, ServerError
from dspy.utils.exceptions import LMTransportError
from scripted import match, questions, strong_that_reads, together, weak_that_varies

from cowest_dspy.errors import StoreError
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.store import serialize
from cowest_dspy.store.store import Store

THREADS = 32
HALF = "half of it: \ud83d"


def question(number: int) -> Request:
    return serialize.request_from_messages(
        "m", [{"role": "user", "content": f"Question {number}?"}]
    )


def answer(text: str = "yes", tokens: int = 1, usd: float | None = 0.5) -> Response:
    return serialize.make_response("m", text, "stop", 1, tokens, usd=usd)


ODD = {
    "half of a surrogate pair": lambda: answer(HALF),
    "more tokens than SQLite can count": lambda: answer(tokens=2**63),
    "a price below nothing": lambda: answer(usd=-1.0),
}


def asked_at_once(store: Store, odd: Callable[[], Response]) -> dict[int, BaseException]:
    """The errors of threads that all ask at once; the answers of the first three are odd."""
    together, errors = threading.Barrier(THREADS), dict[int, BaseException]()

    def ask(number: int) -> Response:
        together.wait()
        return odd() if number < 3 else answer(f"Answer {number}")

    def work(number: int) -> None:
        try:
            store.answer(question(number), lambda: ask(number))
        except BaseException as error:
            errors[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_answer_fails_only_its_own_call(tmp_path: Path, odd: Callable[[], Response]) -> None:
    with Store(tmp_path) as store:
        errors = asked_at_once(store, odd)
        assert sorted(errors) == [0, 1, 2], errors
        assert all(
            isinstance(error, LMTransportError) and "garbled" in str(error)
            for error in errors.values()
        )
        assert (store.calls(), store.usage.calls, store.usage.failed) == (
            THREADS - 3,
            THREADS - 3,
            3,
        )
    with Store(tmp_path) as store:
        for number in range(3, THREADS):
            response, cached = store.answer(question(number), ODD["half of a surrogate pair"])
            assert cached and serialize.response_text(response) == f"Answer {number}"


def test_an_odd_draft_fails_alone_in_a_collection_and_is_asked_again(tmp_path: Path) -> None:
    def collected(odd: str) -> list[Any]:
        program = together(weak_that_varies(["{n}", odd]), strong_that_reads())
        with Store(tmp_path) as store:
            return list(
                collect(
                    program, questions(4), match, Sampling(drafts=2), store=store, max_errors=1.0
                )
            )

    first = collected(HALF)
    assert sum(trace.error is not None and "garbled" in trace.error for trace in first) == 4
    assert sum(trace.influence is not None for trace in first) == 4
    assert all(trace.error is None for trace in collected("x"))


def test_an_error_with_half_a_pair_in_it_is_noted_as_a_failure(tmp_path: Path) -> None:
    def down() -> Response:
        raise ServerError(HALF)

    with Store(tmp_path) as store:
        with pytest.raises(ServerError):
            store.answer(question(1), down)
        assert store.usage.failed == 1 and store.cost("none")["note"] == "1 calls failed"


def test_a_request_with_half_a_pair_in_it_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    request = serialize.request_from_messages("m", [{"role": "user", "content": HALF}])
    with Store(tmp_path) as store, pytest.raises(InvalidRequestError, match="cannot be sent"):
        store.answer(request, lambda: pytest.fail("it was asked"))


def test_a_record_with_half_a_pair_in_it_is_kept_as_it_is(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.keep("trace", "a", {"text": HALF})
        assert store.record("trace", "a") == {"text": HALF}
        assert dict(store.each("trace")) == {"a": {"text": HALF}}


def test_a_write_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        refused = serialize.request_key(question(1))
        store._db.execute(
            f"CREATE TRIGGER one BEFORE INSERT ON calls WHEN NEW.key = '{refused}' BEGIN SELECT "
            "RAISE(ABORT, 'not this one'); END"
        )
        errors = asked_at_once(store, lambda: answer("as it should be"))
        assert list(errors) == [1] and isinstance(errors[1], StoreError), errors
        assert store.calls() == store.usage.calls == THREADS - 1
        assert store.usage.failed == 0, "it is no failure of a model"


def test_sums_of_older_files_with_counts_that_sqlite_cannot_add_can_be_read(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for number in range(2):
            store.answer(question(number), answer)
        store._db.execute(f"UPDATE calls SET tokens = {2**62 + 2**61}")
        store._db.commit()
    with Store(tmp_path) as store:
        assert store.bill().tokens >= 2**63
