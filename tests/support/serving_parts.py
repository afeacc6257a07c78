"""A collaboration of scripted models behind a real server, for tests: what fails, waits or is
counted is said by the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dspy
import httpx

from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.serve import served
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.testing import ScriptedEngine

Answering = Callable[[str], "str | Exception"]
QUESTION = "May the Arbel run at 25 bar?"
FACT = "The Arbel may run at up to 31 bar."


def drafted(text: str) -> str | Exception:
    """What is known."""
    return FACT if "Arbel" in text else "Nothing is known."


def refined(text: str) -> str | Exception:
    """Yes with the right fact, otherwise no."""
    return "yes" if "31 bar" in text else "no"


def program(
    weak: Answering = drafted,
    strong: Answering = refined,
    *,
    signature: str = "question -> answer",
    draft: Any = "knowledge",
) -> Collaboration:
    """A bound program; both functions get the last message."""
    return Collaboration(signature, draft=draft).bind(
        weak=lm(weak, "weak"), strong=lm(strong, "strong")
    )


def lm(answer: Answering, role: str) -> dspy.LM:
    """An LM that answers as the function says; an exception that it gives is raised."""
    return ScriptedEngine(
        lambda asked: answer(asked["messages"][-1]["content"]), model=f"scripted/{role}"
    ).lm()


def rules(**settings: Any) -> ServeRules:
    """[serve] with these settings."""
    return ServeRules.model_validate(settings)


@contextmanager
def serving(
    made: Collaboration | None = None,
    *,
    key: str | None = None,
    router: Any = None,
    **settings: Any,
) -> Iterator[str]:
    """The address of a server as "http://127.0.0.1:PORT/v1"."""
    with served(
        made or program(), rules(**settings), name="handbook", key=key, router=router
    ) as address:
        yield address


def body(text: str = QUESTION, **more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": "handbook", "messages": [{"role": "user", "content": text}], **more}


def post(address: str, asked: Any = None, **options: Any) -> httpx.Response:
    """The answer to a request, without any client's own retries."""
    return httpx.post(
        f"{address}/chat/completions",
        json=body() if asked is None else asked,
        timeout=30,
        **options,
    )


def root(address: str) -> str:
    """The address without /v1."""
    return address.removesuffix("/v1")


class Held:
    """An answer that is held back until it is let go; ``asked`` counts who has come for it."""

    def __init__(self, answer: str = "yes") -> None:
        self.answer, self.go, self.asked = answer, threading.Event(), threading.Semaphore(0)

    def __call__(self, text: str) -> str:
        self.asked.release()
        assert self.go.wait(30), "nobody let it go"
        return self.answer

    def wait_until_asked(self, times: int = 1) -> None:
        """Returns when so many more have come."""
        for _ in range(times):
            assert self.asked.acquire(timeout=30), "nobody asked"
