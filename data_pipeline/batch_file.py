"""The lines of a provider's batch files: requests that go out, answers that come back."""

import json
import zlib
from typing import Final

from tagpr.chat.client import Reply, read_completion

URL: Final = "/v1/chat/completions"


def request_line(key: str, body: bytes) -> bytes:
    """One request of a batch file."""
    head = f'{{"custom_id": "{key}", "method": "POST", "url": "{URL}", "body": '
    return head.encode() + zlib.decompress(body) + b"}\n"


def read_answer(line: str) -> tuple[str, Reply | None, int, str]:
    """(custom_id, reply or None, status, code) of a line of an output or error file; status 0 where there was no response."""
    try:
        entry = json.loads(line)
        key, response, error = str(entry["custom_id"]), entry.get("response"), entry.get("error")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", None, 0, "broken_line"
    if not isinstance(response, dict):
        return (
            key,
            None,
            0,
            str(error.get("code") or "no_response") if isinstance(error, dict) else "no_response",
        )
    status, body = int(response.get("status_code") or 0), response.get("body")
    if status == 200:
        reply = read_completion(body)
        return key, reply, status, "" if reply else "no_completion"
    inside = body.get("error") if isinstance(body, dict) else None
    code = inside.get("code") or inside.get("type") if isinstance(inside, dict) else None
    return key, None, status, str(code or "")[:80]
