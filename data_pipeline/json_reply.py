"""Reading a reply that has to be one JSON object: strictly, since it may quote text that nobody trusts."""

import json
import re
from typing import Any

LONGEST_REPLY = 100_000
_FENCED = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n```\Z", re.DOTALL)


def read_object(text: str) -> tuple[dict[str, Any] | None, str]:
    """The object of a reply, bare or in one code fence, or None and the problem; never raises.

    ``too_long``; ``not_json``: no JSON, text around it, or a repeated key; ``wrong_shape``: JSON, but no object.
    """
    text = text.strip()
    if len(text) > LONGEST_REPLY:
        return None, "too_long"
    fenced = _FENCED.match(text)
    try:
        reply = json.loads(fenced[1] if fenced else text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return None, "not_json"
    return (reply, "") if isinstance(reply, dict) else (None, "wrong_shape")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)
