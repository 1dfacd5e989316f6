"""The same requests through a well-known library: ``<peer's python> peers.py curator <base_url> <requests> <concurrency>``.

Run by pipeline.py in the peer's own environment. The last line is a JSON object with the seconds from the first request to
the last reply, as the library's user sees them (its start is not counted where it can be told apart).
"""

import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "The user has rated two similar products before, and praised the sound of both of them. " * 46


def prompts(number: int) -> list[str]:
    return [f"{index} {PROMPT}" for index in range(number)]


def curator(base_url: str, number: int, concurrency: int) -> dict[str, Any]:
    """bespokelabs-curator: its online OpenAI backend, limits out of the way, no cache to read from."""
    os.environ.update(
        CURATOR_DISABLE_RICH_DISPLAY="1",
        TELEMETRY_ENABLED="false",
        CURATOR_VIEWER="0",
        OPENAI_API_KEY="unused",
        HF_HUB_OFFLINE="1",
        # It counts tokens, with an encoding that it would fetch; litellm, which comes with it, has a copy.
        TIKTOKEN_CACHE_DIR=str(
            Path(importlib.util.find_spec("litellm").origin).parent / "litellm_core_utils" / "tokenizers"
        ),
    )
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CURATOR_CACHE_DIR"] = cache
        from bespokelabs import curator

        model = curator.LLM(
            model_name="gpt-4o",
            backend="openai",
            backend_params={
                "base_url": base_url,
                "api_key": "unused",
                "max_requests_per_minute": 10_000_000,
                "max_tokens_per_minute": 100_000_000_000,
                "max_concurrent_requests": concurrency,
            },
            generation_params={"max_tokens": 512, "temperature": 0.0},
        )
        started = time.monotonic()
        made = model(prompts(number))
        took = time.monotonic() - started
        rows = getattr(made, "dataset", made)
        assert len(rows) == number
    from importlib.metadata import version

    return {"peer": f"bespokelabs-curator {version('bespokelabs-curator')}", "seconds": took}


if __name__ == "__main__":
    name, base_url, number, concurrency = (
        sys.argv[1],
        sys.argv[2],
        int(sys.argv[3]),
        int(sys.argv[4]),
    )
    run = {"curator": curator}[name]
    print(json.dumps({**run(base_url, number, concurrency), "requests": number}))
