"""Public strict fakes for tests of programs and recipes: they fail on what they were not told.

    engine = ScriptedEngine({"What is 2+2?": "4"})            # the last user message contains the
        key
    lm = engine.lm()                                          # a dspy.LM; engine.asked lists every
        request

    with OpenAIServer({"What is 2+2?": "4"}, faults=[Fault.status(429, retry_after=0.2)]) as server:
        lm = dspy.LM(f"openai/{server.model}", api_base=server.api_base, api_key="any")

``ScriptedEngine`` answers inside the process, ``OpenAIServer`` over real HTTP, where things can go
wrong on the way. Both are reached through the real LM layer of DSPy, so that prompts, adapters,
parsing, retries and the store are the real ones.
"""

from cowest_dspy.testing.engine import Script, ScriptedEngine
from cowest_dspy.testing.server import Fault, OpenAIServer, Received

__all__ = ["Fault", "OpenAIServer", "Received", "Script", "ScriptedEngine"]
