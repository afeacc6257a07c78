"""Is there an OpenAI-compatible endpoint, does it take the key, does it serve the model, and what
context does it say.

Only questions that cost nothing: the list of models, and llama.cpp's properties.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from cowest_dspy.errors import masked, nearest
from cowest_dspy.lms.config import Api, Server
from cowest_dspy.lms.protocol import UNREADABLE

DEADLINE = 5.0


@dataclass(frozen=True)
class EndpointCheck:
    """The result of asking an endpoint; ``context`` in tokens when it says so."""

    level: Literal["ok", "warning", "error"]
    text: str
    context: int | None = None


def check_endpoint(settings: Api | Server) -> EndpointCheck:
    """Ask the endpoint at ``api_base`` for its models; an answer must begin within 5 seconds."""
    address, variable = masked(settings.api_base or ""), settings.api_key_env
    if variable and not os.environ.get(variable):
        return _error(
            f"The environment variable {variable} is not set: export it, it holds the API key."
        )
    try:
        answer = httpx.get(
            f"{_base(settings)}/models", headers=_headers(settings), timeout=DEADLINE
        )
    except httpx.TimeoutException:
        return _error(
            f"{address} did not answer within {DEADLINE:.0f} s: is the server loading, or the "
            "address wrong?"
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return _error(
            f"{address} cannot be reached ({masked(str(error))}): start the server, or correct "
            "api_base."
        )
    if answer.status_code in (401, 403):
        key = (
            f"look at what is in the environment variable {variable}."
            if variable
            else "name the environment variable that holds one with api_key_env = ..."
        )
        return _error(f"{address} refused the key ({answer.status_code}): {key}")
    if answer.status_code >= 500:
        return _error(
            f"{address} is there, but not ready ({answer.status_code}): wait until it has loaded "
            "its model."
        )
    return _served(settings, address, _listed(answer))


def _error(text: str) -> EndpointCheck:
    return EndpointCheck("error", text)


def _served(settings: Api | Server, address: str, listed: list[dict[str, Any]]) -> EndpointCheck:
    name = settings.model.partition("/")[2] if isinstance(settings, Api) else settings.model
    entry = next((one for one in listed if one.get("id") in (name, settings.model)), None)
    if listed and entry is None:
        known = [str(one.get("id")) for one in listed]
        shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
        return EndpointCheck(
            "warning",
            f'{address} does not list the model "{name}".{nearest(name, known)} It lists: {shown}.',
        )
    context = (entry or {}).get("max_model_len") or _context_of_llama_cpp(settings)
    how = f"serves {name}" if entry else "answers, without a list of models"
    return EndpointCheck(
        "ok", f"{address} {how}", context if isinstance(context, int) and context > 0 else None
    )


def _context_of_llama_cpp(settings: Api | Server) -> Any:
    """What llama.cpp's server says at ``/props``, which stands beside ``/v1``."""
    if not isinstance(settings, Server) or settings.server != "llama_cpp":
        return None
    try:
        answer = httpx.get(
            f"{_base(settings).removesuffix('/v1')}/props",
            headers=_headers(settings),
            timeout=DEADLINE,
        )
        return answer.json()["default_generation_settings"]["n_ctx"]
    except (httpx.HTTPError, *UNREADABLE):
        return None


def _listed(answer: httpx.Response) -> list[dict[str, Any]]:
    """The models of an answer; none of one in another form: not every endpoint has this list."""
    try:
        found = answer.json()["data"]
    except UNREADABLE:
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _base(settings: Api | Server) -> str:
    return (settings.api_base or "").rstrip("/")


def _headers(settings: Api | Server) -> dict[str, str]:
    key = os.environ.get(settings.api_key_env or "")
    return {"Authorization": f"Bearer {key}"} if key else {}
