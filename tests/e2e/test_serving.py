"""A served model answers, through OpenAI's client, what the evaluation's offline engine answered to the same rows."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from tagpr.benchmarks.storage import read_examples
from tests.e2e.conftest import Workplace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(rewarded: Workplace) -> Iterator[tuple[Workplace, dict[str, Any]]]:
    if not (rewarded.outputs / "evaluation" / "exploratory.jsonl").is_file():
        pytest.skip("there is no evaluation to compare with (its own test says why)")
    command = rewarded.command("serve", "server.port=0", "serve.prmu=true", "serve.splits=[dev]")
    log = rewarded.folder / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=rewarded.folder, env=rewarded.environment(), stdout=stream, stderr=stream
        )
    started = []
    try:
        file = rewarded.outputs / "serve" / "server.json"
        give_up = time.monotonic() + 900
        while not file.exists():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < give_up, log.read_text()[-4000:]
            time.sleep(0.5)
        started = psutil.Process(process.pid).children(recursive=True)
        yield rewarded, json.loads(file.read_text())
    finally:
        process.terminate()
        process.wait(timeout=120)
        psutil.wait_procs(started, timeout=60)
        assert [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


def client_of(address: dict[str, Any]) -> OpenAI:
    token = Path(address["token_file"]).read_text().strip()
    return OpenAI(base_url=address["url"], api_key=token, timeout=300)


def test_the_same_answers_as_the_evaluation(served: tuple[Workplace, dict[str, Any]]) -> None:
    place, address = served
    client = client_of(address)
    lines = (place.outputs / "evaluation" / "exploratory.jsonl").read_text().splitlines()
    answered = {row["id"]: row for row in map(json.loads, lines) if row["seed"] is None}
    examples = [
        each
        for each in read_examples(place.outputs / "data" / "minilamp" / "dev.parquet")
        if each.id in answered
    ]
    assert len(examples) == len(answered)
    for each in examples:
        completion = client.chat.completions.create(
            model="tagpr", user=each.user_id, messages=[{"role": "user", "content": each.query}],
            extra_body={"task": each.task},
        )  # fmt: skip
        row, message = answered[each.id], completion.choices[0].message
        said = (message.content or "", message.model_extra["reasoning_content"] or "")
        if row["format"] == 1:
            assert said == (row["answer"], row["reasoning"])
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == row["prompt_tokens"]
        assert completion.usage.completion_tokens == row["response_tokens"]


def test_the_best_of_some_by_prmu(served: tuple[Workplace, dict[str, Any]]) -> None:
    completion = client_of(served[1]).chat.completions.create(
        model="tagpr", user="0", temperature=1,
        messages=[{"role": "user", "content": "Generate a headline for the following article: A pixel test"}],
        extra_body={"task": "lamp4", "best_of": 4},
    )  # fmt: skip
    ours = completion.model_extra["tagpr"]
    assert len(ours["prmu"]["scores"]) == 4
    assert len(completion.choices) == 1
