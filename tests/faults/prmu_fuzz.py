"""Attacks on the reward server: what is sent is refused or made harmless, and the server goes on.

    python tests/faults/prmu_fuzz.py [--inputs 10000] [--seed 0]

Every input is one request (or one abuse of a connection) of a kind drawn at random, over HTTP against a running server. After each
block of inputs a known request must still give its known logit. The last line is one JSON object with counts by kind and outcome;
status 1 where an outcome was none of those allowed for its kind.
"""

import argparse
import asyncio
import json
import pickle
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import torch
from prmu_setup import USERS, WORDS, Service, last_line, make_base, resident_mib, service

from reward_server.engine import TransformersEngine
from tagpr.prmu import model as prmu_model
from tagpr.prmu.model import load
from tagpr.prmu.wire import HEALTH_PATH, METRICS_PATH, SCORE_PATH, SWAP_PATH, VERSION_PATH

ADMIN_TOKEN = "an-administrators-token"
MAX_BODY = 2_000_000
BLOCK = 500
AT_ONCE = 16
POISON = "poisoned"
"""A user whose row in the model is not a number."""
SPECIALS = [
    "<|user_7|>", "<|user_0|>", "<|user_unk|>", "<|im_end|>", "<|im_start|>", "<|im_start|>system\n", "<|endoftext|>", "</think>",
    "<think>", "<analyze_input>", "</make_decision>", "TagPRMessageGoesHere", "{{ messages }}", "\u200b", "\ufeff", "\x00",
    "\x1b[2J", "<|user_\uff17|>", "<\u200b|im_end|>", "\u202e", "\U0001f600",
]  # fmt: skip
FORGED = [
    "<|user_0|>", "<|user_unk|>", "0", "1", "ann ", " ann", "ANN", "ann\x00", "\uff41nn", "ann,bob", "../ann", "null", "__class__",
    "320", "a" * 512, "\u0430nn",
]  # fmt: skip
NAMES = [
    "..", "../secret", "../../etc", "/etc/passwd", "a/../../b", "%2e%2e", "..\\..", ".", "", "model\x00", "link", "file", "x" * 500,
    "file:///etc", "hub/name", "~", "$HOME", "-rf",
]  # fmt: skip
PATHS = [
    "/",
    "/docs",
    "/openapi.json",
    "/v1",
    "/v1/score/",
    "//v1/score",
    "/V1/SCORE",
    "/v1/score%00",
    "/../etc/passwd",
    "/health/x",
]

Outcome = tuple[str, bool]
"""What came of an input, and whether that is as it must be."""


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


def make_checkpoints(folder: Path) -> tuple[Path, Path]:
    """A root with the served model, one of pickled weights, a broken one, a link and a file; and what the pickle would make."""
    root, marker = folder / "checkpoints", folder / "unpickled"
    base = make_base(folder / "base")
    model, tokenizer, users = prmu_model.build(
        str(base), [*USERS, POISON], row_std=0.3, max_tokens=512, seed=0
    )
    with torch.no_grad():
        model.get_parameter("score.weight").mul_(50.0)
        model.get_input_embeddings().weight[users.rows[POISON]] = float("nan")
    prmu_model.save(root / "model", model, tokenizer, users, "{}")
    for name in ("pickled", "broken"):
        shutil.copytree(root / "model", root / name)
        (root / name / "model.safetensors").unlink()
    (root / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(marker)))
    (root / "broken" / "model.safetensors").write_bytes(b"\xff" * 1000)
    (root / "file").write_text("no folder")
    (folder / "secret").mkdir()
    (root / "link").symlink_to(folder / "secret")
    return root, marker


class Attacker:
    """Sends one input of each kind; every method says what came of it."""

    def __init__(self, running: Service, http: httpx.AsyncClient, rng: random.Random, model: Path) -> None:
        self.running, self.http, self.rng = running, http, rng
        self.auth = {"authorization": f"Bearer {running.token}"}
        self.prmu = load(model)
        self.oracle = TransformersEngine(self.prmu, 8192)
        self.number = 0
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[Outcome]]]] = {
            "special_text": (30, self.special_text),
            "forged_user": (15, self.forged_user),
            "malformed_body": (25, self.malformed_body),
            "invalid_unicode": (10, self.invalid_unicode),
            "no_or_wrong_token": (15, self.no_or_wrong_token),
            "checkpoint_name": (8, self.checkpoint_name),
            "wrong_route": (8, self.wrong_route),
            "no_number": (5, self.no_number),
            "raw_connection": (6, self.raw_connection),
            "megabyte": (1, self.megabyte),
        }
        self.rare: dict[str, Callable[[], Awaitable[Outcome]]] = {
            "body_of_64_mb": self.body_of_64_mb,
            "body_of_3_mb": self.body_of_3_mb,
            "pickled_checkpoint": self.pickled_checkpoint,
            "broken_checkpoint": self.broken_checkpoint,
        }

    def text(self, words: int = 12) -> str:
        """Words with special strings among them."""
        parts = [
            self.rng.choice(WORDS if self.rng.random() < 0.6 else SPECIALS)
            for _ in range(self.rng.randint(0, words))
        ]
        return self.rng.choice(["", " "]).join(parts)

    def item(self, **change: object) -> dict[str, object]:
        """One item of a request."""
        self.number += 1
        return {
            "id": f"i{self.number}",
            "user_id": "ann",
            "prompt": self.text(),
            "response": self.text(),
            **change,
        }

    async def post(self, body: object, path: str = SCORE_PATH, **options: object) -> httpx.Response:
        """Send a body, as JSON where it is not bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post(
            path, content=content, headers=options.pop("headers", self.auth), **options
        )  # type: ignore[arg-type]

    async def special_text(self) -> Outcome:
        """Text that looks like special tokens stays text: the logit is that of its plain encoding, with one user row."""
        item = self.item(user_id=self.rng.choice([*USERS, "nobody"]))
        answer = await self.post({"items": [item]})
        if answer.status_code != 200:
            return f"{answer.status_code}", False
        encoded = self.prmu.encoder.encode("x", item["user_id"], item["prompt"], item["response"])  # type: ignore[arg-type]
        rows = self.prmu.encoder.users
        plain = sum(rows.unknown_row <= token < rows.end for token in encoded.token_ids) == 1
        logit = self.oracle.score([encoded])[0]
        return "neutralised", plain and abs(answer.json()["scores"][0]["logit"] - logit) < 1e-4

    async def forged_user(self) -> Outcome:
        """An id that is none gets the unknown row, whatever it looks like."""
        answer = await self.post({"items": [self.item(user_id=self.rng.choice(FORGED))]})
        ok = answer.status_code == 200 and answer.json()["scores"][0]["unknown_user"] is True
        return "unknown row" if ok else f"{answer.status_code}", ok

    async def malformed_body(self) -> Outcome:
        """A right body after an accident."""
        whole = json.dumps({"items": [self.item(), self.item()]}).encode()
        at = self.rng.randrange(len(whole))
        body = self.rng.choice(
            [
                whole[:at],
                whole[:at] + bytes([self.rng.randrange(256)]) + whole[at + 1 :],
                b"[" * self.rng.randint(1, 50_000),
                b'{"items":' * self.rng.randint(1, 2000),
                whole.replace(
                    b'"ann"', self.rng.choice([b"NaN", b"1e999", b"[]", b"null", b"{}", b"-1", b"true"])
                ),
                json.dumps({"items": [self.item(token_ids=[1, 2])]}).encode(),
                json.dumps({"items": [self.item()], "model": "x"}).encode(),
                json.dumps({"items": []}).encode(),
                json.dumps({"items": [self.item()] * 300}).encode(),
                json.dumps({"items": [self.item(id="")]}).encode(),
                bytes(self.rng.randrange(256) for _ in range(200)),
            ]
        )
        answer = await self.post(body)
        # A changed byte can leave a right body.
        return f"{answer.status_code}", answer.status_code in (200, 413, 422) and (
            answer.status_code != 200 or len(body) == len(whole)
        )

    async def invalid_unicode(self) -> Outcome:
        """Lone surrogates and bytes that are no UTF-8."""
        whole = json.dumps({"items": [self.item(response="@@")]}).encode()
        bad = self.rng.choice(
            [b"\\ud800", b"\\udfff x", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"]
        )
        answer = await self.post(whole.replace(b"@@", bad))
        return f"{answer.status_code}", answer.status_code == 422

    async def no_or_wrong_token(self) -> Outcome:
        """On every route but /health."""
        token = self.running.token or ""
        given = self.rng.choice(
            [
                {}, {"authorization": "Bearer"}, {"authorization": f"bearer {token}"}, {"authorization": f"Bearer {token}x"},
                {"authorization": f"Bearer {token[:-1]}"}, {"authorization": f"Basic {token}"}, {"x-token": token},
                {"authorization": f"Bearer  {token}"}, {"authorization": "Bearer \xe9".encode("latin-1")},
            ]
        )  # fmt: skip
        path = self.rng.choice([SCORE_PATH, VERSION_PATH, METRICS_PATH, SWAP_PATH, *PATHS[:4]])
        if path == SWAP_PATH and self.rng.random() < 0.5:
            given = self.auth  # right elsewhere
        elif path != SWAP_PATH and self.rng.random() < 0.1:
            given = {"authorization": f"Bearer {ADMIN_TOKEN}"}
        method = self.rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
        answer = await self.http.request(method, path, headers=given)  # type: ignore[arg-type]
        return f"{answer.status_code}", answer.status_code == 401

    async def checkpoint_name(self) -> Outcome:
        """Names that leave the folder, or name nothing usable."""
        answer = await self.swap(self.rng.choice(NAMES))
        return f"{answer.status_code}", answer.status_code == 422

    async def wrong_route(self) -> Outcome:
        """With a right token."""
        method = self.rng.choice(["GET", "PUT", "DELETE", "PATCH", "TRACE"])
        answer = await self.http.request(method, self.rng.choice([*PATHS, SCORE_PATH]), headers=self.auth)
        return f"{answer.status_code}", answer.status_code in (404, 405)

    async def no_number(self) -> Outcome:
        """A model that gives no number for a user: an error that names the item; its company is refused with it."""
        bad = self.item(user_id=POISON)
        answer = await self.post({"items": [self.item(), bad]})
        body = answer.json()
        ok = (answer.status_code, body.get("code"), body.get("item")) == (500, "not_finite", bad["id"])
        return "named" if ok else f"{answer.status_code}", ok

    async def raw_connection(self) -> Outcome:
        """What is no HTTP, or half of it."""
        url = urlsplit(self.running.address.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        try:
            writer.write(
                self.rng.choice(
                    [
                        b"\x16\x03\x01\x02\x00" + bytes(50),
                        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * self.rng.randint(1, 3000),
                        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
                        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
                        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc",
                        b"GET " + b"/x" * 40_000 + b" HTTP/1.1\r\n\r\n",
                        bytes(self.rng.randrange(256) for _ in range(100)),
                    ]
                )
            )
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(100), 0.05)
        except (TimeoutError, ConnectionError):
            answer = b""
        finally:
            writer.close()
        return "closed" if not answer else answer[9:12].decode("latin-1"), not answer.startswith(
            b"HTTP/1.1 200"
        )

    async def megabyte(self) -> Outcome:
        """A long text, as prompt or as response."""
        part = self.rng.choice(["rain ", "<|im_end|>", "\u1234", "a"])
        text = part * (1_000_000 // len(part.encode()))
        answer = await self.post({"items": [self.item(**{self.rng.choice(["prompt", "response"]): text})]})
        return f"{answer.status_code}", answer.status_code in (413, 422)

    async def body_of_64_mb(self) -> Outcome:
        """Declared, or sent bit by bit without saying how much comes."""
        sent = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(64):
                sent += 1
                yield b" " * 2**20

        try:
            if self.rng.random() < 0.5:
                answer = await self.http.post(SCORE_PATH, content=bytes(64 * 2**20), headers=self.auth)
            else:
                answer = await self.http.post(SCORE_PATH, content=chunks(), headers=self.auth)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return "connection closed", True
        return f"{answer.status_code}", answer.status_code == 413

    async def body_of_3_mb(self) -> Outcome:
        """Somewhat too large: whoever sent it gets to see why it is refused."""
        answer = await self.post(b" " * 3_000_000)
        return f"{answer.status_code}", answer.status_code == 413

    async def pickled_checkpoint(self) -> Outcome:
        """Weights that would run code."""
        answer = await self.swap("pickled")
        return f"{answer.status_code}", answer.status_code == 422

    async def broken_checkpoint(self) -> Outcome:
        """Weights that are none."""
        answer = await self.swap("broken")
        return f"{answer.status_code}", answer.status_code == 422

    async def swap(self, name: str) -> httpx.Response:
        """Ask for another checkpoint, as the administrator."""
        return await self.post(
            {"checkpoint": name}, SWAP_PATH, headers={"authorization": f"Bearer {ADMIN_TOKEN}"}
        )

    async def healthy(self, want: float | None) -> float:
        """The logit of a known request.

        Raises:
            AssertionError: the server is not as it was.
        """
        assert (await self.http.get(HEALTH_PATH)).status_code == 200
        item = {"id": "known", "user_id": "ann", "prompt": "boats", "response": "rain"}
        answer = await self.post({"items": [item]})
        assert answer.status_code == 200, answer.text
        logit: float = answer.json()["scores"][0]["logit"]
        assert want is None or abs(logit - want) < 1e-4
        return logit


async def attack(
    running: Service, model: Path, inputs: int, seed: int
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Send inputs; counts of outcomes by kind, and what was not as it must be."""
    rng = random.Random(seed)
    counts: dict[str, Counter[str]] = {}
    faults: list[str] = []
    slots = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE + 4)
    async with httpx.AsyncClient(
        base_url=running.address.url, timeout=120, trust_env=False, limits=limits
    ) as http:
        attacker = Attacker(running, http, rng, model)
        known = await attacker.healthy(None)

        async def one(kind: str, send: Callable[[], Awaitable[Outcome]]) -> None:
            async with slots:
                try:
                    outcome, ok = await send()
                except httpx.HTTPError as error:
                    outcome, ok = type(error).__name__, False
            counts.setdefault(kind, Counter())[outcome] += 1
            if not ok:
                faults.append(f"{kind}: {outcome}")

        kinds = list(attacker.kinds)
        weights = [attacker.kinds[kind][0] for kind in kinds]
        done = 0
        for kind, send in attacker.rare.items():
            for _ in range(4):
                await one(kind, send)
                done += 1
        while done < inputs:
            block = rng.choices(kinds, weights, k=min(BLOCK, inputs - done))
            await asyncio.gather(*(one(kind, attacker.kinds[kind][1]) for kind in block))
            done += len(block)
            await attacker.healthy(known)
    return counts, faults


def run(folder: Path, inputs: int, seed: int) -> dict[str, object]:
    """Figures of one run; ``ok`` says whether all was as it must be."""
    torch.set_num_threads(1)
    root, marker = make_checkpoints(folder)
    (folder / "admin").write_text(ADMIN_TOKEN)
    settings = (f"admin_token_file={folder / 'admin'}", f"max_body_bytes={MAX_BODY}", "kv_cache_gib=0.02")
    with service(folder / "run", root / "model", *settings) as running:
        before = resident_mib([running.process.pid])
        counts, faults = asyncio.run(attack(running, root / "model", inputs, seed))
        alive, after = running.process.poll() is None, resident_mib([running.process.pid])
        log = (folder / "run" / "service.log").read_text("utf-8", errors="replace")
        token = running.token or ""
    quiet = token not in log and ADMIN_TOKEN not in log
    return {
        "inputs": sum(sum(each.values()) for each in counts.values()),
        "outcomes": {kind: dict(counts[kind]) for kind in sorted(counts)},
        "not_as_it_must_be": dict(Counter(faults)),
        "server_alive_and_right": alive,
        "pickle_ran": marker.exists(),
        "token_in_log": not quiet,
        "memory_mib": [round(before), round(after)],
        "ok": not faults and alive and quiet and not marker.exists(),
    }


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = run(Path(name), arguments.inputs, arguments.seed)
    last_line(figures)
    return int(not figures["ok"])


if __name__ == "__main__":
    sys.exit(main())
