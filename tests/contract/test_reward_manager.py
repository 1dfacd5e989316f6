"""The reward manager as verl calls it, against a real reward client and a server that can be told to fail."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto

from tagpr.configuration import compose
from tagpr.errors import RewardServerError
from tagpr.prmu.client import sigmoid
from tagpr.rl.response_shape import response_shape
from tagpr.rl.reward_manager import TagPRRewardManager
from tagpr.rl.reward_metrics import reward_metrics
from tagpr.tags import format_response

TAGGED = "".join(
    f"<{tag}> step. </{tag}>\n" for tag in ("analyze_input", "identify_patterns", "make_decision")
).strip()


@pytest.fixture(scope="module")
def tokenizer():
    from tagpr.tiny_model.tokenizer import build_tokenizer

    return build_tokenizer(0, users=40)


class Server:
    """Answers every item with logit 1, or with what ``fault`` says."""

    def __init__(self) -> None:
        self.fault: int | None = None
        self.asked: list[dict] = []
        self.sizes: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                items = json.loads(self.rfile.read(int(self.headers["content-length"])))["items"]
                outer.asked += items
                outer.sizes.append(len(items))
                scores = [
                    {"id": i["id"], "logit": 1.0, "score": sigmoid(1.0), "unknown_user": False} for i in items
                ]
                body = json.dumps({"model_version": "v1", "scores": scores}).encode()
                self.send_response(outer.fault or 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def manager(tokenizer, server: Server, tmp_path: Path, **objective: object) -> TagPRRewardManager:
    (tmp_path / "token").write_text("0123456789abcdef")
    client = {"url": server.url, "token_file": str(tmp_path / "token"), "version": "v1"}
    limits = {"timeout_s": 5, "deadline_s": 5, "concurrency": 4, "gather_s": 0.05, "request_items": 8}
    client["also_versions"] = []
    weights = {**OmegaConf.to_container(compose("guided_rl").objective), **objective}
    config = OmegaConf.create({"objective": weights, "prmu_client": {**client, **limits}})
    return TagPRRewardManager(config, tokenizer)


def row(tokenizer, response: str, gold: str = "[1]", end: bool = True, pad: int = 3) -> DataProto:
    """One response as verl's agent loop hands it over: right-padded, with an attention mask over prompt and response."""
    ids = tokenizer.encode(response, add_special_tokens=False) + ([tokenizer.eos_token_id] if end else [])
    responses = torch.tensor([ids + [tokenizer.pad_token_id] * pad])
    attention = torch.tensor([[1] * 4 + [1] * len(ids) + [0] * pad])
    about = {"example_id": "e1", "task": "lamp1", "user_id": "u1", "split": "train"}
    return DataProto.from_dict(
        tensors={"responses": responses, "attention_mask": attention},
        non_tensors={
            "extra_info": np.array([about], dtype=object),
            "reward_model": np.array([{"ground_truth": gold}], dtype=object),
            "raw_prompt": np.array([[{"role": "user", "content": "Which one?"}], None], dtype=object)[:1],
        },
    )


def score(manager: TagPRRewardManager, data: DataProto) -> dict:
    return asyncio.run(manager.run_single(data))


def test_a_right_answer_gets_the_maximum(tokenizer, server: Server, tmp_path: Path) -> None:
    result = score(manager(tokenizer, server, tmp_path), row(tokenizer, format_response(TAGGED, "[1]")))
    info = result["reward_extra_info"]
    assert result["reward_score"] == pytest.approx(0.8 + 0.2 * sigmoid(1.0))
    assert (info["verifiable"], info["format"], info["tag"], info["repetition"], info["failure"]) == (
        1,
        1,
        0,
        0,
        "",
    )
    assert "reward" not in info, "verl's validation appends to this key twice"
    assert server.asked == [
        {"id": "e1", "user_id": "u1", "prompt": "Which one?", "response": format_response(TAGGED, "[1]")}
    ]


@pytest.mark.parametrize(
    ("response", "end", "failure"),
    [
        (format_response(TAGGED, "[1]"), False, "truncated"),
        (f"{TAGGED}\n\n[1]", True, "no_think"),
        (f"<think>\n{TAGGED}\n</think>\n\n[1]<|im_start|>user", True, "control_token"),
        ("<think>\nplain words.\n</think>\n\n[1]", True, "text_outside_tags"),
    ],
)
def test_each_failure_is_named(
    tokenizer, server: Server, tmp_path: Path, response: str, end: bool, failure: str
) -> None:
    info = score(manager(tokenizer, server, tmp_path), row(tokenizer, response, end=end))["reward_extra_info"]
    assert info["failure"] == failure
    assert info["finished"] == end
    assert info["total"] < 0.8


@pytest.mark.parametrize(
    "response",
    [
        format_response(TAGGED, "[1]"),
        f"<think>{TAGGED}</think>[1]",
        f"{TAGGED}\n</think>\n\n[1]",
        f"<think>\n\n</think>\n\n{TAGGED}</think>",
        "<think> \n </think> 1",
    ],
)
def test_reasoning_is_counted_as_if_it_were_encoded_alone(tokenizer, response: str) -> None:
    ids = tokenizer.encode(response, add_special_tokens=False)
    reasoning = response.partition("</think>")[0].removeprefix("<think>").strip()
    encoded = tokenizer.encode(reasoning, add_special_tokens=False)
    assert response_shape(response, ids, tokenizer)["reasoning_tokens"] == len(encoded)
    # A mark that was not written as its own token.
    assert response_shape(response, ids[:-1], tokenizer)["reasoning_tokens"] == len(encoded)
    forged = [token for token in ids if token != tokenizer.convert_tokens_to_ids("</think>")]
    assert response_shape(response, forged, tokenizer)["reasoning_tokens"] == len(encoded)


def test_every_outcome_has_the_same_keys(tokenizer, server: Server, tmp_path: Path) -> None:
    asked = manager(tokenizer, server, tmp_path)
    good = score(asked, row(tokenizer, format_response(TAGGED, "[1]")))["reward_extra_info"]
    bad = score(asked, row(tokenizer, "x", end=False))["reward_extra_info"]
    assert good.keys() == bad.keys()
    assert all(isinstance(value, int | float | str) for value in good.values())


def test_exploratory_never_asks_the_server(tokenizer, server: Server, tmp_path: Path) -> None:
    result = score(
        manager(tokenizer, server, tmp_path, mode="exploratory"),
        row(tokenizer, format_response(TAGGED, "[1]")),
    )
    assert result["reward_score"] == 1.0
    assert server.asked == []
    assert "prmu" not in result["reward_extra_info"]


def test_responses_of_a_group_share_a_request(tokenizer, server: Server, tmp_path: Path) -> None:
    asked = manager(tokenizer, server, tmp_path)
    rows = [row(tokenizer, format_response(TAGGED, f"[{i}]")) for i in range(5)]

    async def together() -> list[dict]:
        return await asyncio.gather(*(asked.run_single(each) for each in rows))

    results = asyncio.run(together())
    assert server.sizes == [5]
    assert [one["response"][-3:] for one in server.asked] == [f"[{i}]" for i in range(5)]
    assert results[1]["reward_extra_info"]["verifiable"] == 1
    assert [r["reward_extra_info"]["verifiable"] for r in results] == [0, 1, 0, 0, 0]
    assert all(0 < r["reward_extra_info"]["prmu_seconds"] < 5 for r in results)


@pytest.mark.parametrize("status", [500, 400])
def test_no_score_means_no_reward(tokenizer, server: Server, tmp_path: Path, status: int) -> None:
    server.fault = status
    with pytest.raises(RewardServerError, match="e1"):
        score(manager(tokenizer, server, tmp_path), row(tokenizer, format_response(TAGGED, "[1]")))


def test_latencies_become_training_metrics(tokenizer, server: Server, tmp_path: Path) -> None:
    info = score(manager(tokenizer, server, tmp_path), row(tokenizer, format_response(TAGGED, "[1]")))
    infos = [info["reward_extra_info"] | {"prmu_seconds": seconds} for seconds in (0.02, 0.2, 0.2, 5.0)]
    metrics = reward_metrics(infos, ["lamp1"] * 4, ["a", "a", "b", "b"])
    assert metrics["prmu/latency_max_s"] == 5.0
    assert metrics["prmu/latency_p50_s"] == pytest.approx(0.2)
    shares = [metrics[f"prmu/latency_le_{end}s_frac"] for end in ("0.03", "0.1", "0.3", "3", "10")]
    assert shares == [0.25, 0.25, 0.75, 0.75, 1.0]


@pytest.mark.parametrize(("step", "gamma"), [(1, 0.2), (3, 1.0), (9, 1.0)])
def test_weights_are_those_of_the_step(
    tokenizer, server: Server, tmp_path: Path, step: int, gamma: float
) -> None:
    asked = manager(tokenizer, server, tmp_path, changes=[{"step": 3, "gamma": 1.0}])
    data = row(tokenizer, format_response(TAGGED, "[1]"))
    data.non_tensor_batch["global_steps"] = np.array([step])
    assert score(asked, data)["reward_score"] == pytest.approx(0.8 + gamma * sigmoid(1.0))


def test_guards_are_part_of_the_objective(tokenizer, server: Server, tmp_path: Path) -> None:
    broken = row(tokenizer, "x", end=False)
    literal = score(manager(tokenizer, server, tmp_path), broken)["reward_score"]
    guarded = score(manager(tokenizer, server, tmp_path, gate_all=True), broken)["reward_score"]
    assert literal == pytest.approx(-0.8 + 0.2 * sigmoid(1.0))
    assert guarded == pytest.approx(-0.8)
