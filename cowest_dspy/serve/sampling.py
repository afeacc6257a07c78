"""Live traces: a share of what is answered, kept in a run's store, so that the next round drafts
for what is really asked.

A live trace has no gold answer and no score: what people, a metric or a judge say of it comes
later.

    rows = live_rows("runs/live")            # [{"id": "3f2a...", "question": "..."}]: what was
        asked, each input once
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cowest_dspy.influence.trace import Trace
from cowest_dspy.serve.asking import Answer
from cowest_dspy.serve.config import SampleRules
from cowest_dspy.serve.protocol import Failing
from cowest_dspy.store.store import Store
from cowest_dspy.utils.jsonable import plain
from cowest_dspy.utils.safe_text import without_half_pairs

log = logging.getLogger(__name__)
KIND = "live"
WAITING = 1000
"""Traces that may wait for the disk; one more is lost, and counted, so that no request waits."""
UNSCORED = "unscored: nobody has said what a right answer is"


class LiveSamples:
    """Keeps a share of live traces. Use as a context manager; requests never wait for it.

    Args:
        rules: the share, and the run's folder; nothing is opened where the share is 0.
        models: the ids of both models.
        counted: told "kept" or "lost" of each trace.

    Raises:
        StoreError: the folder is in use or damaged.
    """

    def __init__(
        self,
        rules: SampleRules,
        models: dict[Failing, str],
        counted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._rules, self._models, self._counted = rules, models, counted
        self._store = Store(rules.run) if rules.share else None
        self._queue: queue.Queue[Trace | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._keep, name="cowest-live", daemon=True)
        if self._store is not None:
            self._thread.start()

    def __enter__(self) -> LiveSamples:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offer(self, request_id: str, inputs: dict[str, Any], answer: Answer) -> None:
        """Takes a trace along if it is of the share: by its request's id, so that no input is taken
        more often than others."""
        if self._store is None or not _chosen(request_id, self._rules.share):
            return
        try:
            self._queue.put_nowait(live_trace(inputs, answer, self._models))
        except queue.Full:
            self._counted("lost")

    def close(self) -> None:
        """Writes what waits, and gives the run free."""
        if self._store is not None:
            self._queue.put(None)
            self._thread.join()
            self._store.close()
            self._store = None

    def _keep(self) -> None:
        ending, store = False, self._store
        while store is not None and not ending:
            together = [self._queue.get()]
            while len(together) < 100 and not self._queue.empty():
                together.append(self._queue.get())
            ending = None in together
            traces = {trace.key: _plain(trace.to_dict()) for trace in together if trace is not None}
            what = "kept"
            try:
                store.keep_all(KIND, traces)
            except Exception as error:  # Requests go on whatever a disk does; that it failed is logged and counted.
                log.error("live traces could not be kept: %s", type(error).__name__)
                what = "lost"
            for _ in traces:
                self._counted(what)


def live_trace(inputs: dict[str, Any], answer: Answer, models: dict[Failing, str]) -> Trace:
    """What a request left: the draft with its prompt, and the answer; one of both models is
    ``refined``, one of the strong model alone ``alone``. Its id is that of its inputs."""
    last = answer.weak_calls[-1] if answer.weak_calls else None
    failed = ", ".join(f"the {role} model failed ({kind})" for role, kind in answer.failed.items())
    given: dict[str, Any] = plain(inputs)
    outputs = dict(answer.outputs)
    whole = answer.fallback != "draft"
    return Trace(
        example_id=hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16],
        draft_index=0,
        round=0,
        inputs=given,
        gold={},
        prompt=last.messages if last else (),
        completion=last.text if last else "",
        draft=answer.draft or "",
        refined=outputs if whole and answer.route == "collaborate" else None,
        alone=outputs if whole and answer.route == "strong" else None,
        refined_score=None,
        alone_score=None,
        influence=None,
        draft_score=None,
        weak_model=models["weak"],
        strong_model=models["strong"],
        tokens=answer.tokens,
        error=f"{UNSCORED}; {failed}" if failed else UNSCORED,
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON can say it."""
    return json.loads(without_half_pairs(json.dumps(plain(values), ensure_ascii=False)))


def live_traces(run: str | Path) -> list[Trace]:
    """The live traces of a run, in the order in which they were last kept; of equal inputs the
    last.

    Raises:
        StoreError: the folder is in use (its server runs) or damaged.
    """
    with Store(run) as store:
        return [Trace.from_dict(value) for _, value in store.each(KIND)]


def live_rows(run: str | Path) -> list[dict[str, Any]]:
    """What was asked, as rows of an "id" and the inputs: with the gold answers added they are the
    examples of a next round."""
    return [{"id": trace.example_id, **trace.inputs} for trace in live_traces(run)]


def _chosen(request_id: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") < share * 2**64
