"""The evaluation of one model through a local vLLM server behind a proxy that misbehaves, against vLLM's offline engine.

``python tests/faults/evaluation_endpoint.py [--rows 120] [--share 0.35] [--kills 1] [--outputs FOLDER]``: rate limits, 500,
replies beyond the timeout, connections cut in the middle, truncated JSON and replies that the server broke off, and a ``kill -9``
on top. At temperature 0 every row must be there once and say what the offline engine says. Then a wrong key, and refused rows.
The last line is one JSON object of figures.
"""

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.faults.evaluation_setup import environment, evaluation, finish, key, prepare, rows, start
from tests.faults.faulty_endpoint import FaultyEndpoint, completion, forward_to

# What an answer is; the server counts the end of turn as a token, and the offline engine does not.
COMPARED = ("response", "finish_reason", "prompt_tokens", "items_used", "reasoning_tokens", "repetition", "parsed",
            "verifiable", "format", "tag", "failure", "thinking")  # fmt: skip
TIMEOUT_S, DELAY_S = 10.0, 12.0


@contextmanager
def vllm_server(model: Path, log: Path, positions: int = 240) -> Iterator[tuple[str, str]]:
    """A vLLM server of this machine's own: its URL and key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_urlsafe(24)
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16",
        "--max-model-len", str(positions), "--generation-config", "vllm", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True,
            # Not on the command line, where every user of the machine reads it.
            env={**environment(), "VLLM_PLUGINS": "", "VLLM_API_KEY": token, "VLLM_LOGGING_LEVEL": "WARNING"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"vLLM did not start: {log.read_text()[-2000:]}") from None
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1", token
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def served(outputs: Path, url: str, thinking: bool = True, **changes: Any) -> list[str]:
    """Overrides that evaluate the served model beside nothing else."""
    fields = {
        "model": "tiny", "endpoint": url, "key_variable": "TINY_KEY", "tokenizer": str(outputs / "base" / "model"),
        "thinking": thinking, "concurrency": 16, "timeout_s": TIMEOUT_S, "retries": 8,
        # As offline: special tokens that a response holds stay in it.
        "request": {"skip_special_tokens": False, "chat_template_kwargs": {"enable_thinking": thinking}},
        **changes,
    }  # fmt: skip
    return [
        f"+evaluate.models.served={_hydra(fields)}",
        "evaluate.only=[served]",
        "evaluate.engine.write_every_s=0",
    ]


def _hydra(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_hydra(each)}" for name, each in value.items()) + "}"
    return json.dumps(value)


def compare(offline: Path, online: Path) -> dict[str, Any]:
    """Rows of both files side by side."""
    expected, found = ({key(row): row for row in rows(path)} for path in (offline, online))
    differing = [
        {
            "id": id_,
            **{name: (row[name], found[id_][name]) for name in COMPARED if row[name] != found[id_][name]},
        }
        for id_, row in expected.items()
        if id_ in found and any(row[name] != found[id_][name] for name in COMPARED)
    ]
    return {
        "rows": len(expected),
        "equal": len(expected) - len(differing) - len(expected.keys() - found.keys()),
        "lost": len(expected.keys() - found.keys()),
        "double": len(rows(online)) - len(found),
        "not_asked_for": len(found.keys() - expected.keys()),
        "truncated": sum(row["finish_reason"] == "length" for row in found.values()),
        "first_difference": differing[:1],
    }


def check(outputs: Path, number: int, share: float, kills: int, thinking: bool = True) -> dict[str, Any]:
    """Offline, then through the proxy; figures."""
    name = "thinking" if thinking else "plain"
    # Short enough that some answers are truncated.
    limit = [f"evaluate.limit={number}", "benchmark.max_response_tokens=30"]
    alone = [f"+evaluate.models.alone={{model: {outputs}/base/model, thinking: {str(thinking).lower()}}}"]
    offline = evaluation(outputs, "minilamp", f"offline-{name}", *alone, "evaluate.only=[alone]", *limit)
    finish(start(offline))
    with vllm_server(outputs / "base" / "model", outputs / "vllm-server.log") as (url, token):
        with FaultyEndpoint(forward_to(url, token), token, share, DELAY_S) as proxy:
            command = evaluation(
                outputs, "minilamp", f"endpoint-{name}", *served(outputs, proxy.url, thinking), *limit
            )
            file = outputs / f"endpoint-{name}" / "served.jsonl"
            at_kill = [_kill(command, file, number * (n + 1) // (kills + 1), token) for n in range(kills)]
            again = finish(start(command, TINY_KEY=token))
            faults = dict(sorted((name, number) for name, number in proxy.met.items() if name))
            figures = {
                **compare(outputs / f"offline-{name}" / "alone.jsonl", file),
                "rows_at_kill": at_kill,
                "faults": faults,
                "answered_by_server": sum(proxy.asked.values()),
            }
            # With everything there, nobody is asked.
            before = sum(proxy.asked.values())
            finish(start(command, TINY_KEY=token))
            figures["asked_again"] = sum(proxy.asked.values()) - before
            figures["key_in_outputs"] = _contains(outputs / f"endpoint-{name}", token) or token in again
    return figures


def _kill(command: list[str], file: Path, wanted: int, token: str) -> int:
    process = start(command, TINY_KEY=token)
    while not (file.exists() and file.read_bytes().count(b"\n") >= wanted):
        if process.poll() is not None:
            raise SystemExit(f"ended before it could be killed: {process.communicate()[1][-2000:]}")
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return file.read_bytes().count(b"\n")


def refusals(outputs: Path, number: int) -> dict[str, Any]:
    """A wrong key, and rows that the endpoint does not take; no vLLM is needed for either."""

    async def five(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, completion("<think>\nfine.\n</think>\n\n5")

    with FaultyEndpoint(five, "right", refuse=("movie",)) as endpoint:
        command = evaluation(
            outputs,
            "minilamp",
            "endpoint-refusals",
            *served(outputs, endpoint.url),
            f"evaluate.limit={number}",
        )
        begun = time.monotonic()
        wrong = start(command, TINY_KEY="wrong")
        _, errors = wrong.communicate(timeout=120)
        seconds = time.monotonic() - begun
        refused = endpoint.met["401"]
        finish(start(command, TINY_KEY="right"))
        table = (outputs / "endpoint-refusals" / "table.md").read_bytes()
        asked = endpoint.met["400"] + sum(endpoint.asked.values())
        finish(start(command, TINY_KEY="right"))
        again = endpoint.met["400"] + sum(endpoint.asked.values()) - asked
        same = (outputs / "endpoint-refusals" / "table.md").read_bytes() == table
    folder = outputs / "endpoint-refusals"
    return {
        "wrong_key_status": wrong.returncode,
        "wrong_key_lines": [line for line in errors.splitlines() if line.startswith("error:")],
        "wrong_key_requests": refused,
        "wrong_key_s": round(seconds, 1),
        "second_run_asked": again,
        "second_run_same_table": same,
        "refused_rows": len(rows(folder / "served.unanswered.jsonl")),
        "answered_rows": len(rows(folder / "served.jsonl")),
    }


def _contains(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def problems_of(figures: dict[str, Any]) -> list[str]:
    """What must not be, in the figures of :func:`check`."""
    found = [
        name for name in ("lost", "double", "not_asked_for", "asked_again", "key_in_outputs") if figures[name]
    ]
    return found + (["rows differ"] if figures["equal"] != figures["rows"] else [])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--share", type=float, default=0.35)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--outputs", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        outputs = (arguments.outputs or Path(folder)).resolve()
        prepare(outputs, ["minilamp"])
        thinking = check(outputs, arguments.rows, arguments.share, arguments.kills)
        print("thinking", thinking, flush=True)
        plain = check(outputs, arguments.rows // 2, arguments.share, 0, thinking=False)
        print("plain", plain, flush=True)
        refused = refusals(outputs, 60)
        print("refusals", refused, flush=True)
    problems = problems_of(thinking) + problems_of(plain)
    if refused["wrong_key_status"] != 2 or len(refused["wrong_key_lines"]) != 1:
        problems.append("a wrong key is not one line")
    if refused["second_run_asked"] or not refused["second_run_same_table"]:
        problems.append("a second run with refused rows is another")
    if not refused["refused_rows"] or refused["refused_rows"] + refused["answered_rows"] != 60:
        problems.append("refused rows are not accounted for")
    print(json.dumps({"thinking": thinking, "plain": plain, "refusals": refused, "problems": problems}))
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
