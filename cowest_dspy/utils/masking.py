"""Secrets out of texts: keys of ours in any form that a server repeats them in, and whatever else
has the shape of a secret.

    masked("401: Bearer abcdefgh1234 is no key")      # "401: Bearer *** is no key"
    remember_secret(key)                              # from now on masked() knows this one,
        whatever its shape

Every search takes time in proportion to the text: patterns match runs of characters that they
either mask or step over, so that no text is looked at again from each of its places.
"""

from __future__ import annotations

import base64
import binascii
import functools
import html
import itertools
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

MASK = "***"
# A server that needs no key is given a word such as "none", which would be masked wherever it
# stands.
SHORTEST_SECRET = 8
# A part of a key is told apart from a word by this many characters, and shorter keys are only known
# whole.
PART, SHORTEST_WITH_PARTS = 8, 16
# Of "sk-a...wxyz": what stands beside the dots.
BESIDE_DOTS = range(PART - 1, 3, -1)

_known: set[str] = set()


def remember_secret(secret: str | None) -> None:
    """Have :func:`masked` know this key from now on. A plain word, as a local server may be given
    for a key, is not remembered."""
    if (
        secret
        and len(secret) >= SHORTEST_SECRET
        and (len(secret) >= SHORTEST_WITH_PARTS or not secret.isalpha())
    ):
        _known.add(secret)


def masked(text: str) -> str:
    """``text`` with ``***`` in the place of every remembered key and of all that looks like an API
    key, a token, a private key or a password."""
    for secret in sorted(_known, key=len, reverse=True):
        text = without_secret(text, secret)
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    return text


def without_secret(text: str, secret: str | None) -> str:
    """``text`` without a key that we know: as it is, in base64 or hex, as URLs, JSON and HTML quote
    it; and without its halves.

    >>> without_secret("not with 'correct-hor...aple'", "correct-horse-battery-staple")
    "not with '***...***'"
    """
    if not secret or len(secret) < SHORTEST_SECRET:
        return text
    for form in _forms(secret):
        text = text.replace(form, MASK)
    if len(secret) >= SHORTEST_WITH_PARTS:
        text = _without_beginnings(text, secret)
        text = _without_beginnings(text[::-1], secret[::-1])[::-1]
        for pattern in _beside_dots(secret):
            text = pattern.sub(MASK, text)
    return text


@functools.lru_cache(maxsize=64)
def _forms(secret: str) -> tuple[str, ...]:
    """The forms in which a whole key is repeated, the longest first."""
    raw = secret.encode("utf-8", "surrogateescape")  # as the environment may hold it
    plain = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        html.escape(secret),
    }
    plain |= {json.dumps(form)[1:-1] for form in plain} | {
        form.replace("/", "\\/") for form in plain
    }
    quoted = {
        urllib.parse.quote(raw, safe=""),
        urllib.parse.quote(raw),
        urllib.parse.quote_plus(raw),
    }
    quoted |= {re.sub("%..", lambda found: found[0].lower(), form) for form in quoted}
    encoded = {raw.hex(), raw.hex().upper(), *_in_base64(raw)}
    encoded |= {urllib.parse.quote(form, safe="") for form in encoded}
    return tuple(sorted(plain | quoted | encoded, key=lambda form: (-len(form), form)))


def _in_base64(raw: bytes) -> Iterator[str]:
    """The characters in the base64 of any text with these bytes in it: they begin at one of three
    places of a group."""
    for before, first in ((0, 0), (1, 2), (2, 3)):
        characters = (before + len(raw)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(b"\0" * before + raw).decode()[first:characters]


def _without_beginnings(text: str, secret: str) -> str:
    """``text`` with each run masked that begins as the key does."""
    parts, last = list[str](), 0
    while (start := text.find(secret[:PART], last)) >= 0:
        alike = itertools.takewhile(
            lambda two: two[0] == two[1],
            zip(text[start : start + len(secret)], secret, strict=False),
        )
        parts += [text[last:start], MASK]
        last = start + sum(1 for _ in alike)
    return "".join([*parts, text[last:]])


@functools.lru_cache(maxsize=64)
def _beside_dots(secret: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of what is left of a key on either side of "...", "***" or the like."""
    before = "|".join(re.escape(secret[:size]) for size in BESIDE_DOTS)
    after = "|".join(re.escape(secret[-size:]) for size in BESIDE_DOTS)
    return re.compile(rf"(?:{before})(?=[.*•]{{2}}|…)"), re.compile(
        rf"(?:(?<=[.*•]{{2}})|(?<=…))(?:{after})(?!\w)"
    )


# By shape. What a function of these gives stands in the place of the match.

_TOKEN = "[A-Za-z0-9_-]"
_PREFIXES = (
    "sk|pk|rk|gsk|hf|xai|gh[pousr]|github_pat|gl(?:pat|dt|ft|rt|soat)|pypi|key|xox[abeoprs]|npm|"
    "nvapi|pplx|r8|shp(?:at|ss)|dop_v1"
)
_SURE_PREFIXES = "sk-|hf_|gh[pousr]_|npm_|gsk_"
_FIXED = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bAIza[A-Za-z0-9_-]{10,}|\bya29\.[A-Za-z0-9_-]{16,}|\bGOCSPX-[A-Za-z0-9_-]{16,}"  # Google
    # Twilio and its SendGrid
    r"|\b(?:AC|SK)[0-9a-f]{32}\b|\bSG\.[A-Za-z0-9_-]{16,64}\.[A-Za-z0-9_-]{16,64}"
    # Mailchimp, Telegram
    r"|\b[0-9a-f]{32}-us\d{1,2}\b|\b\d{8,10}:AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])"
    # Slack, Square
    r"|(?<=hooks\.slack\.com/services/)[A-Za-z0-9/_-]+|\bsq0[a-z]{3}-[A-Za-z0-9_-]{22,}"
)
_KEY_NAMES = (
    r"(?:api|access|account|secret|private|auth|subscription)[ _-]?key(?:[ "
    r"_-]?id)?|secret|credentials?|token"
)
_PASSWORD_NAMES = r"password|passwd|passphrase|pwd"
_BETWEEN = r"""\\*["']?\s{0,3}(?:=>|:=|[:=])\s{0,3}\\*["']?"""
_VALUE = r"""[^\s"'\\,;&<>(){}\[\]]++(?![(\[{])"""
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w{0,30}(?:\.[A-Za-z_]\w{0,30})+")
_NO_SECRETS = {"none", "null", "true", "false", "password", "passwd", "string", "required"}


def _whole(found: re.Match[str]) -> str:
    """A mask for the group "secret"; where it took no part, the match was only stepped over."""
    if found["secret"] is None:
        return found[0]
    start, end = (place - found.start() for place in found.span("secret"))
    return found[0][:start] + MASK + found[0][end:]


def _if_random(found: re.Match[str]) -> str:
    return _whole(found) if _looks_random(found["secret"]) else found[0]


def _looks_random(value: str) -> bool:
    """Whether a value is more than a word, a number, a path, an address, an attribute in code, or a
    mask."""
    if (
        MASK in value
        or value.startswith(("http", "./"))
        or (value.startswith("/") and "=" not in value)
    ):
        return False
    if _ATTRIBUTE.fullmatch(value):
        return False
    digits, letters = any(sign.isdigit() for sign in value), any(sign.isalpha() for sign in value)
    return (digits and letters) or re.search(r"[a-z][A-Z]|[!@#$%^&*+]", value) is not None


def _after_a_name(found: re.Match[str]) -> str:
    """``name = value`` without the value, unless it is a plain word: prose and code say "token:
    none" and "secret = given"."""
    name, between, value = found["name"].lower(), found["between"], found["secret"]
    if name.endswith(("password", "passwd", "passphrase", "pwd")):
        given = (
            (between == "=" or between[-1] in "\"'")
            and value.lower() not in _NO_SECRETS
            and MASK not in value
        )
        return _whole(found) if len(value) >= 4 and (given or _looks_random(value)) else found[0]
    return (
        _if_random(found)
        if len(value) >= (12 if name == "token" else SHORTEST_SECRET)
        else found[0]
    )


def _in_query(found: re.Match[str]) -> str:
    """A parameter of a URL. One that is only named "key" or "auth" may be another."""
    return _whole(found) if found["other"] is None else _if_random(found)


def _basic(found: re.Match[str]) -> str:
    """HTTP Basic is the base64 of "user:password"; a word after "Basic" is none."""
    given = found["secret"].rstrip("=")
    try:
        named = b":" in base64.b64decode(
            given + "=" * (-len(given) % 4), altchars=b"-_" if set("-_") & set(given) else None
        )
    except (binascii.Error, ValueError):
        named = False
    return (
        _whole(found)
        if named or (len(given) >= 16 and {"0", "a", "A"} <= set(_kinds(given)))
        else found[0]
    )


def _aws(found: re.Match[str]) -> str:
    """40 characters of base64 that look drawn at random: in paths and words the kind of letter
    changes seldom, hex has one case."""
    kinds = _kinds(found[0])
    changes = sum(one != other for one, other in itertools.pairwise(kinds))
    return MASK if changes >= 16 and {"0", "a", "A"} <= set(kinds) else found[0]


def _kinds(text: str) -> list[str]:
    return [
        "0" if sign.isdigit() else "a" if sign.islower() else "A" if sign.isupper() else "/"
        for sign in text
    ]


_PEM = r"(?:[A-Z0-9]++ )*?PRIVATE KEY(?: BLOCK)?-----"
_PRIVATE_KEY = re.compile(rf"-----BEGIN {_PEM}.*?(?:-----END {_PEM}|\Z)", re.DOTALL)
_JSON_WEB_TOKEN = re.compile(
    rf"(?P<secret>\beyJ{_TOKEN}{{8,}}+(?=\.{_TOKEN}{{8}})(?:\.{_TOKEN}*+){{2,4}}+)|\beyJ{_TOKEN}*+"
)
# The first prefix of a run of characters decides: what follows a later one is no key either.
_PREFIXED = re.compile(
    rf"(?P<secret>\b(?:{_PREFIXES})[-_](?=[A-Za-z_-]*+\d){_TOKEN}{{12,}}+)"
    rf"|\b(?:{_PREFIXES})[-_]{_TOKEN}*+"
)
_LETTERS_ONLY = re.compile(
    rf"(?P<secret>\b(?:{_SURE_PREFIXES})[A-Za-z0-9]{{30,}}+)|\b(?:{_SURE_PREFIXES})[A-Za-z0-9]*+"
)
_BASE64_40 = re.compile(r"(?<![A-Za-z0-9/+=_-])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=_-])")
# "git" is nobody's secret. A password may have any sign in it but those that end the part of an
# address.
_IN_ADDRESS = re.compile(
    r"""(?<=://)(?!git@)(?:[^\s/@:?#"'<>]*+:[^\s/"'<>]+|[^\s/@?#"'<>]++)(?=@)"""
)
_PARAMETER = re.compile(
    r"[?&;](?:[\w.-]{0,40}?[_.-])??"
    r"(?:(?:api|access|auth)?(?:token|secret|password|passwd|pwd|signature|credential)"
    r"|(?:api|access)[_-]?key|(?P<other>key|auth|sig))"
    r"""=(?P<secret>[^\s&#"'<>]++)""",
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"(?<![\w-])--?(?:[\w-]{0,40}?[_-])??(?:api-?key|key|token|secret|password)(?:=|\s)"
    r"""(?P<secret>[^\s"',-][^\s"',]{3,})""",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"""(?<=\bBearer )[^\s"'\\,]{8,}|(?<=\b(?i:bearer) )(?=[^\s"'\d]*+\d)[^\s"'\\,]{8,}"""
)
_BASIC = re.compile(r"\b(?i:basic) (?P<secret>[A-Za-z0-9+/_-]{8,}+={0,2})")
_SCHEME = "(?:(?i:token|apikey|key|digest|basic) )?"
_AUTHORIZATION = re.compile(
    rf"""(?i:authorization){_BETWEEN}{_SCHEME}(?P<secret>[^\s"'\\,;]{{8,}}+)"""
)
_NAMED = re.compile(
    rf"(?P<name>(?i:{_KEY_NAMES}|{_PASSWORD_NAMES}))(?P<between>{_BETWEEN})(?P<secret>{_VALUE})"
)
_MENTIONED = re.compile(
    r"\b(?i:api|access|secret|auth)[ _-]?(?i:key|token)(?: "
    r"(?i:provided|given|used|sent|supplied|value|is|was)){0,2}:?"
    r""" {0,2}["'`(]?(?P<secret>[./+=~A-Za-z0-9_-]{16,}+)"""
)
_SHAPES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_PRIVATE_KEY, MASK),
    (_JSON_WEB_TOKEN, _whole),
    (_PREFIXED, _whole),
    (_LETTERS_ONLY, _whole),
    (_FIXED, MASK),
    (_BASE64_40, _aws),
    (_IN_ADDRESS, MASK),
    (_PARAMETER, _in_query),
    (_OPTION, _whole),
    (_BEARER, MASK),
    (_BASIC, _basic),
    (_AUTHORIZATION, _if_random),
    (_NAMED, _after_a_name),
    (_MENTIONED, _if_random),
)


# Documents: a report, settings.

_SECRET_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|apikey|secret|password|passwd|credentials?|authorization|access[_-]?key|"
    r"(access|auth|api|hf|bearer|session|refresh)[_-]?token)$|^token$",
    re.IGNORECASE,
)


def mask_text(value: Any) -> Any:
    """A copy of JSON values with every text that looks like a secret masked; not example ids, which
    must stay apart.

    >>> mask_text({"error": "401 for Bearer abcdefgh1234"})
    {'error': '401 for Bearer ***'}
    """
    if isinstance(value, dict):
        return {
            key: item if key == "example_id" else mask_text(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [mask_text(item) for item in value]
    return masked(value) if isinstance(value, str) else value


def mask_settings(value: Any) -> Any:
    """A copy of settings with the texts under names such as ``api_key`` masked, whatever they look
    like.

    >>> mask_settings({"weak": {"api_key": "abc", "max_tokens": 9}})
    {'weak': {'api_key': '***', 'max_tokens': 9}}
    """
    if isinstance(value, dict):
        return {
            key: MASK
            if isinstance(item, str) and item and _SECRET_NAME.search(str(key))
            else mask_settings(item)
            for key, item in value.items()
        }
    return [mask_settings(item) for item in value] if isinstance(value, list) else value


def mask_document(facts: dict[str, Any]) -> dict[str, Any]:
    """A report or a comparison as JSON with its secrets masked: those in texts, and by their names
    those of its "config"."""
    made = mask_text(facts)
    return {**made, "config": mask_settings(made["config"])}
