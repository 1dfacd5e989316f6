"""Structured outputs: what a request says so that the reply is JSON of one shape."""

from typing import Any, Literal

import openai
from pydantic import BaseModel

Structured = Literal["json_schema", "json_object", "none"]
"""What the server can do: a strict schema, any JSON object, or nothing of the kind."""


def schema_format(model: type[BaseModel], name: str) -> dict[str, Any]:
    """``response_format`` for a strict JSON schema: every field required, no other field allowed.

    The reply is still text that somebody has to parse: a server may ignore the field, and a cut-off reply is no JSON.
    """
    function = openai.pydantic_function_tool(model, name=name)["function"]
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "strict": True, "schema": function["parameters"]},
    }


def structured_request(structured: Structured, model: type[BaseModel], name: str) -> dict[str, Any]:
    """The fields that a request body gets for this mode; none where the server knows no structured outputs."""
    if structured == "json_schema":
        return {"response_format": schema_format(model, name)}
    if structured == "json_object":
        return {"response_format": {"type": "json_object"}}
    return {}
