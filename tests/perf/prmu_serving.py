"""The reward service beside a plain one, in the same run: what sharing prompts wins.

    python tests/perf/prmu_serving.py [--groups 12] [--threads 1]

Groups of five responses (150 to 600 tokens) to prompts of about 1,400 tokens, a random Qwen3 of about 40 million parameters in
float32, so that arithmetic decides and not the cost of a call. All three are asked over HTTP with the same texts, in turn and in
several rounds; the ratios are medians of ratios within a round, of the time (``*_over_*``) and of the processor time that the
server took (``cpu_*``), which other work on the machine disturbs less.

``service``   ours as it is served on a CPU: the engine that shares prefixes
``no_cache``  ours with server.prefix_cache=false: padded batches of inputs of similar length
``padded``    the usual small server: FastAPI, one request is one padded batch with an attention mask, in the order of arrival

Also there: the same requests through vLLM's CPU build (--vllm), and one response per request against one group per request at
a small model, where the cost of a request is what counts. The last line is one JSON object of figures.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "faults")]

import torch  # noqa: E402
from prmu_setup import service, tiny_prmu  # noqa: E402
from prmu_tiny import USERS, make_tokenizer  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from tagpr.prmu import model as prmu_model  # noqa: E402
from tagpr.prmu.wire import ScoreItem  # noqa: E402

PROMPT_TOKENS, GROUP = 1400, 5
TOKENIZER = make_tokenizer()
CANDIDATES = (
    "the user likes short titles about boats and rain so which tag does this movie relate to among these"
)
# One token each, so that as many words are as many tokens.
WORDS = [f" {word}" for word in CANDIDATES.split() if len(TOKENIZER.encode(f" {word}")) == 1]

PEER = """
import sys, torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

class Query(BaseModel):
    texts: list[str]

torch.set_num_threads(int(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.padding_side = "right"
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype="float32").eval()
app = FastAPI()

@app.post("/get_reward")
def get_reward(query: Query):
    rewards = []
    with torch.inference_mode():
        for first in range(0, len(query.texts), 8):
            batch = tokenizer(query.texts[first:first + 8], padding=True, return_tensors="pt", add_special_tokens=False)
            rewards += model(**batch).logits[:, 0].tolist()
    return {"rewards": rewards}

@app.get("/health")
def health():
    return {}

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
"""


def make_model(folder: Path) -> Path:
    """About 40 million parameters, almost all of them in the layers."""
    tokenizer = TOKENIZER
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model, tokenizer, users = prmu_model.build(
        str(folder / "base"), USERS, row_std=0.3, max_tokens=4096, seed=0
    )
    prmu_model.save(folder / "model", model, tokenizer, users, "{}")
    return folder / "model"


def make_groups(count: int, seed: int) -> list[list[ScoreItem]]:
    """New prompts for every round, so nothing of an earlier round is in a cache."""
    rng = random.Random(seed)
    groups = []
    for number in range(count):
        prompt = "".join(rng.choices(WORDS, k=PROMPT_TOKENS + rng.randint(-100, 100)))
        user = rng.choice(USERS)
        groups.append(
            [
                ScoreItem(
                    id=f"{seed}/{number}/{i}", user_id=user, prompt=prompt,
                    response="".join(rng.choices(WORDS, k=rng.randint(150, 600))),
                )
                for i in range(GROUP)
            ]
        )  # fmt: skip
    return groups


@contextmanager
def peer(folder: Path, model: Path, threads: int) -> Iterator[tuple[str, int]]:
    """The plain server: its address and its process."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "peer.py"
    script.write_text(PEER)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(model), str(port), str(threads)], env=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                httpx.get(url + "/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.kill()
        process.wait()


async def ask_peer(url: str, groups: Sequence[Sequence[ScoreItem]]) -> list[float]:
    """One request a group; user and template are part of the text."""
    async with httpx.AsyncClient(timeout=600, trust_env=False) as http:

        async def one(group: Sequence[ScoreItem]) -> list[float]:
            texts = [
                f"<|user_{USERS.index(item.user_id)}|><|im_start|>user\n{item.prompt}<|im_end|>\n<|im_start|>assistant\n"
                f"{item.response}<|im_end|>"
                for item in group
            ]
            answer = await http.post(url + "/get_reward", json={"texts": texts})
            rewards: list[float] = answer.raise_for_status().json()["rewards"]
            return rewards

        return [reward for rewards in await asyncio.gather(*map(one, groups)) for reward in rewards]


async def ask_ours(running, groups: Sequence[Sequence[ScoreItem]]) -> list[float]:
    """One request a group."""
    async with running.client(timeout_s=600.0, deadline_s=600.0) as client:
        answers = await asyncio.gather(*map(client.score, groups))
    return [score.logit for scores in answers for score in scores]


async def ask_singly(running, items: Sequence[ScoreItem], together: bool) -> float:
    """Seconds for all of them, asked for one by one at the same time."""
    async with running.client() as client:
        await client.score(items[:1])
        began = time.monotonic()
        if together:
            await asyncio.gather(*(client.score_one(item) for item in items))
        else:
            await asyncio.gather(*(client.score([item]) for item in items))
        return time.monotonic() - began


def processor_s(pid: int) -> float:
    """Processor time that a process has taken so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def metric(running, name: str) -> float:
    """One figure of a service's /metrics."""
    text = httpx.get(
        running.address.url + "/metrics",
        headers={"authorization": f"Bearer {running.token}"},
        trust_env=False,
    ).text
    return float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name)))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm", action="store_true", help="also vLLM's CPU build")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = make_model(folder)
        common = (
            f"threads={arguments.threads}", "request_timeout_s=900", "batch_tokens=16384", "dtype=float32", "kv_cache_gib=1",
        )  # fmt: skip
        ours = {
            "service": stack.enter_context(service(folder / "service", model, *common)),
            "no_cache": stack.enter_context(
                service(folder / "no_cache", model, *common, "prefix_cache=false")
            ),
        }
        if arguments.vllm:
            ours["vllm"] = stack.enter_context(service(folder / "vllm", model, *common, "engine=vllm"))
        plain, plain_pid = stack.enter_context(peer(folder, model, arguments.threads))
        seconds: dict[str, list[float]] = {each: [] for each in [*ours, "padded"]}
        cpu: dict[str, list[float]] = {each: [] for each in seconds}
        pids = {each: running.process.pid for each, running in ours.items()} | {"padded": plain_pid}
        worst = 0.0
        for number in range(-1, arguments.rounds):  # the first only warms up
            groups = make_groups(arguments.groups, number + 1)
            if number < 0:
                groups = [groups[0][:1]]
            results = {}
            for each in random.Random(number).sample(list(seconds), len(seconds)):
                began, used = time.monotonic(), processor_s(pids[each])
                if each == "padded":
                    results[each] = asyncio.run(ask_peer(plain, groups))
                else:
                    results[each] = asyncio.run(ask_ours(ours[each], groups))
                if number >= 0:
                    seconds[each].append(time.monotonic() - began)
                    cpu[each].append(processor_s(pids[each]) - used)
            # Ours only: the plain server tokenizes user, template and texts as one string, into not quite the same tokens.
            worst = max(
                worst,
                *(
                    abs(a - b)
                    for each in ours
                    for a, b in zip(results[each], results["no_cache"], strict=True)
                ),
            )
            print(
                f"round {number}: " + ", ".join(f"{k} {v[-1]:.1f} s" for k, v in seconds.items() if v),
                flush=True,
            )

        def ratio(of: str, to: str, what: dict[str, list[float]] = seconds) -> float:
            return round(statistics.median(a / b for a, b in zip(what[of], what[to], strict=True)), 2)

        samples = arguments.groups * GROUP
        figures: dict[str, object] = {
            "parameters": sum(p.numel() for p in prmu_model.load(model).model.parameters()),
            "threads": arguments.threads,
            "samples_per_round": samples,
            "service_over_padded": ratio("padded", "service"),
            "service_over_no_cache": ratio("no_cache", "service"),
            "no_cache_over_padded": ratio("padded", "no_cache"),
            "cpu_service_over_padded": ratio("padded", "service", cpu),
            "cpu_service_over_no_cache": ratio("no_cache", "service", cpu),
            "cached_token_share": round(metric(ours["service"], "tagpr_prmu_cached_token_share"), 3),
            "samples_per_s": {each: round(samples / statistics.median(v), 2) for each, v in seconds.items()},
            "largest_difference_of_our_logits": worst,
        }
        if arguments.vllm:
            figures["vllm_over_padded"] = ratio("padded", "vllm")
            figures["service_over_vllm"] = ratio("vllm", "service")
            figures["cpu_vllm_over_padded"] = ratio("padded", "vllm", cpu)
            figures["cpu_service_over_vllm"] = ratio("vllm", "service", cpu)
            figures["cached_token_share_vllm"] = round(
                metric(ours["vllm"], "tagpr_prmu_cached_token_share"), 3
            )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with service(folder / "run", tiny_prmu(folder)) as small:
            rng = random.Random(0)
            times: dict[bool, list[float]] = {False: [], True: []}
            for number in range(5):
                items = [
                    ScoreItem(
                        id=f"{number}/{g}/{i}",
                        user_id="ann",
                        prompt="".join(rng.choices(WORDS, k=80)),
                        response="x",
                    )
                    for g in range(32)
                    for i in range(5)
                ]
                items = [
                    item.model_copy(update={"prompt": items[at - at % 5].prompt, "response": f"{at} rain"})
                    for at, item in enumerate(items)
                ]
                for together in (False, True) if number % 2 else (True, False):
                    fresh = [i.model_copy(update={"prompt": f"{together} {i.prompt}"}) for i in items]
                    times[together].append(asyncio.run(ask_singly(small, fresh, together)))
    figures["160_responses_singly_s"] = round(statistics.median(times[False]), 3)
    figures["160_responses_gathered_s"] = round(statistics.median(times[True]), 3)
    figures["gathered_over_singly"] = round(
        statistics.median(a / b for a, b in zip(times[False], times[True], strict=True)), 2
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
