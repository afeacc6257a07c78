"""The JSON Schema of report.json, made from the classes that write it.

cowest report --schema        # prints it; docs/report.schema.json is what it printed last
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from cowest_dspy.report.figures import Figures
from cowest_dspy.report.model import SCHEMA_VERSION, RunReport


def report_schema() -> dict[str, Any]:
    """The schema, in the dialect 2020-12: facts of a ``RunReport``, their version, and under
    "numbers" what follows from them."""
    facts = TypeAdapter(RunReport).json_schema(mode="serialization", ref_template="#/$defs/{model}")
    numbers = TypeAdapter(Figures).json_schema(mode="serialization", ref_template="#/$defs/{model}")
    definitions = {**numbers.pop("$defs", {}), **facts.pop("$defs", {}), "Figures": numbers}
    properties = {
        "schema_version": {"const": SCHEMA_VERSION},
        **facts["properties"],
        "numbers": {"$ref": "#/$defs/Figures"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of cowest_dspy",
        "description": facts.get("description", ""),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "$defs": dict(sorted(definitions.items())),
    }


def schema_text() -> str:
    """The schema as a file has it."""
    return json.dumps(report_schema(), ensure_ascii=False, indent=1) + "\n"
