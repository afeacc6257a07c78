"""A collaboration as one OpenAI-compatible model: `cowest serve`.

breaker.py      a model that fails again and again is left alone for a while
asking.py       Answering: the phases of one request, and the declared fallbacks; Router: who
                answers
protocol.py     OpenAI's requests and answers, as pydantic models
refusals.py     every error in OpenAI's form
reading.py      a chat request -> the program's inputs
writing.py      the program's answer -> OpenAI's, whole or in chunks
turns.py        so many at once, so many that wait; the threads that models are asked in
metrics.py      what is counted, for Prometheus
sampling.py     live traces for the next round
service.py      Service: all of that for one program
front.py        what every request meets first: key, limits, errors
app.py          the paths, and their OpenAPI schema
connections.py  so many connections, and a deadline for each client
server.py       on a socket, until it is asked to stop
"""

from cowest_dspy.serve.asking import Answer, Answering, Fallbacks, Router, Unanswered
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.serve.sampling import live_rows, live_traces
from cowest_dspy.serve.server import served

__all__ = [
    "Answer",
    "Answering",
    "Fallbacks",
    "Router",
    "ServeRules",
    "Unanswered",
    "live_rows",
    "live_traces",
    "served",
]
