"""The HTTP surface holds what its own OpenAPI schema says: schemathesis asks what the schema
allows, and what it does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from serving_parts import body, program, root, serving

pytestmark = pytest.mark.slow

KEY = "a-key-of-this-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def test_schemathesis_finds_no_answer_that_the_schema_does_not_describe(tmp_path: Path) -> None:
    """All of its checks but one: what the schema allows may still be refused, as a last message
    that is not the user's."""
    made = program(weak=lambda _: "a note", strong=lambda _: "yes")
    with serving(made, key=KEY, earlier="ignore") as address:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{root(address)}/openapi.json"]
        command += [
            "--header",
            f"Authorization: Bearer {KEY}",
            "--phases",
            "examples,coverage,fuzzing",
            "--no-color",
        ]
        command += [
            "--seed",
            "0",
            "--max-examples",
            "30",
            "--exclude-checks",
            "positive_data_acceptance",
        ]
        found = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280
        )
        counted = httpx.get(f"{root(address)}/metrics", headers=HEADERS).text
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert "Selected: 4/4" in found.stdout
    statuses = {
        status: float(count)
        for status, count in re.findall(r'cowest_requests_total{status="(\d+)"} (\S+)', counted)
    }
    assert statuses["200"] > 10 and statuses["400"] > 10 and statuses["401"] > 0, statuses
    assert "500" not in statuses


def test_the_schema_says_what_is_so() -> None:
    with serving(key=KEY) as address:
        found = httpx.get(f"{root(address)}/openapi.json", headers=HEADERS).json()
        said = httpx.post(f"{address}/chat/completions", json=body(), headers=HEADERS).json()
    assert set(found["paths"]) == {"/v1/chat/completions", "/v1/models", "/healthz", "/metrics"}
    chat = found["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", "4XX", "5XX"}
    assert chat["security"] == [{"key": []}] and "security" not in found["paths"]["/healthz"]["get"]
    whole: dict[str, Any] = {
        "$ref": "#/components/schemas/ChatCompletion",
        "components": found["components"],
    }
    jsonschema.validate(said, whole)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**said, "choices": "yes"}, whole)
