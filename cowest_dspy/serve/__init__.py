"""A collaboration as one OpenAI-compatible model: `cowest serve`.

config.py   [serve], and the API key
chat.py     OpenAI's chat protocol: a request -> the program's inputs, its answer -> the response
answer.py   one request through a collaboration, with declared fallbacks
guard.py    what every request meets first: key, limits, errors in OpenAI's form, metrics
app.py      the HTTP application
server.py   on a socket, until it is asked to stop
"""

from cowest_dspy.serve.answer import Answering, Chooser, ServedAnswer, Unanswered
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.serve.server import served

__all__ = [
    "Answering",
    "Chooser",
    "ServeRules",
    "ServedAnswer",
    "Unanswered",
    "served",
]
