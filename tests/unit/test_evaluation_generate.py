"""Answering rows: nothing twice, nothing lost, whatever kills the run; what becomes of odd completions."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tagpr.benchmarks.prompt import QueryTooLongError
from tagpr.errors import DataError, StageError
from tagpr.evaluation import generate
from tagpr.evaluation.engines import Completion, Engine, Request
from tagpr.evaluation.generate import answer
from tagpr.evaluation.prompts import PromptRenderer, PromptSettings, RenderedPrompt
from tagpr.evaluation.rows import RowFile
from tagpr.evaluation.score import score_row
from tagpr.schema import Example, ProfileItem

SETTINGS = {"model": "abc"}
REPLY = "<think>\n<make_decision> fine. </make_decision>\n</think>\n\n5"


def examples(number: int) -> list[Example]:
    return [
        Example(
            id=f"r{n}", task="lamp3", split="dev", user_id=str(n % 3), query="review: x", profile=(), gold="5"
        )
        for n in range(number)
    ]


class FakeRenderer:
    """Characters for tokens."""

    def render(self, example: Example) -> RenderedPrompt:
        if example.id == "r13":
            raise QueryTooLongError("r13: too long. Raise it.")
        return RenderedPrompt(example.id, tuple(map(ord, example.id)), 0, 0)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    thinking = True
    opens_thinking = False
    response_text = PromptRenderer.response_text
    reasoning_tokens = PromptRenderer.reasoning_tokens
    tokenizer = type("Tokenizer", (), {"encode": staticmethod(lambda text, **_: list(text))})


class FakeEngine:
    """Answers the same to everything, last request first, and dies after ``survives`` answers."""

    def __init__(self, survives: int = 10**9, finish_reason: str = "stop") -> None:
        self.survives = survives
        self.finish_reason = finish_reason
        self.asked: list[Request] = []

    def complete(self, requests: Iterable[Request]) -> Generator[Completion | None, None, None]:
        self.asked = list(requests)
        for number, request in enumerate(reversed(self.asked)):
            if number == self.survives:
                raise RuntimeError("engine died")
            yield Completion(request.key, tuple(map(ord, REPLY)), self.finish_reason)

    def start(self) -> AbstractContextManager["FakeEngine"]:
        @contextmanager
        def running() -> Iterator[FakeEngine]:
            yield self

        return running()


def run(
    file: RowFile,
    renderer: Callable[[], PromptRenderer],
    engine: Callable[[], AbstractContextManager[Engine]],
    rows: int = 10,
    seeds: Sequence[int | None] = (None,),
    only: Sequence[Example] | None = None,
) -> int:
    return answer(
        label="base",
        examples=examples(rows) if only is None else only,
        seeds=seeds,
        file=file,
        renderer=renderer,
        engine=engine,
        score=lambda generation, example: score_row(generation, example, None),
        write_every_s=0.0,
    )


def go(path: Path, engine: FakeEngine, rows: int = 10, seeds: Sequence[int | None] = (None,)) -> int:
    with RowFile(path, SETTINGS) as file:
        return run(file, FakeRenderer, engine.start, rows, seeds)  # type: ignore[arg-type]


def forbidden() -> None:
    raise AssertionError("loaded")


def ids(path: Path) -> list[tuple[str, int | None]]:
    return [(row["id"], row["seed"]) for row in map(json.loads, path.read_text().splitlines())]


def test_every_row_and_seed_once(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    assert go(path, FakeEngine(), rows=4, seeds=[None, 1, 2]) == 12
    assert len(set(ids(path))) == len(ids(path)) == 12
    # More rows and one more seed later: only those are asked for.
    engine = FakeEngine()
    assert go(path, engine, rows=5, seeds=[None, 1, 2, 3]) == 8
    assert {request.key for request in engine.asked} == {("r4", None), ("r4", 1), ("r4", 2)} | {
        (f"r{n}", 3) for n in range(5)
    }
    assert len(set(ids(path))) == len(ids(path)) == 20


def test_an_engine_that_dies_keeps_what_it_answered(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    with pytest.raises(RuntimeError, match="engine died"):
        go(path, FakeEngine(survives=6))
    assert [id_ for id_, _ in ids(path)] == ["r9", "r8", "r7", "r6", "r5", "r4"]
    engine = FakeEngine()
    assert go(path, engine) == 4
    assert {request.key[0] for request in engine.asked} == {"r0", "r1", "r2", "r3"}
    assert sorted(id_ for id_, _ in ids(path)) == sorted(example.id for example in examples(10))


def test_killed_in_the_middle_then_run_again(tmp_path: Path) -> None:
    """A real process, really killed, with half a line behind it."""
    path = tmp_path / "base.jsonl"
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal\nfrom pathlib import Path\nfrom test_evaluation_generate import *\n"
        "class Killing(FakeEngine):\n"
        "    def complete(self, requests):\n"
        "        for number, completion in enumerate(super().complete(requests)):\n"
        "            if number == 5:\n"
        f'                os.write(os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND), b\'{{"id": "r4", "ta\')\n'
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            yield completion\n"
        f"go(Path({str(path)!r}), Killing())\n"
    )
    here = Path(__file__).parent
    root = here.parent.parent
    killed = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{here}"},
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes().endswith(b'"ta')
    engine = FakeEngine()
    assert go(path, engine) == 5
    assert sorted(id_ for id_, _ in ids(path)) == sorted(example.id for example in examples(10))


def test_with_nothing_to_do_no_engine_and_no_tokenizer_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    go(path, FakeEngine())

    with RowFile(path, SETTINGS) as file:
        done = run(file, forbidden, forbidden)  # type: ignore[arg-type]
    assert done == 0


def test_a_query_that_does_not_fit_is_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "base.jsonl"
    assert go(path, FakeEngine(), rows=15) == 14
    assert ("r13", None) not in ids(path)
    assert "r13: too long" in caplog.text


def test_too_long_rows_are_named_once_and_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    go(path, FakeEngine(), rows=15, seeds=[None, 1])
    with RowFile(path, SETTINGS) as file:
        assert set(file.unanswered) == {("r13", None), ("r13", 1)}
        assert {entry.reason for entry in file.unanswered.values()} == {"query_too_long"}
        assert all("r13: too long" in entry.detail for entry in file.unanswered.values())
        # Nothing is left to do, so nothing is loaded.
        assert run(file, forbidden, forbidden, rows=15, seeds=[None, 1]) == 0  # type: ignore[arg-type]


def test_where_no_prompt_fits_no_engine_is_started(tmp_path: Path) -> None:
    with RowFile(tmp_path / "base.jsonl", SETTINGS) as file:
        only = [example for example in examples(15) if example.id == "r13"]
        assert run(file, FakeRenderer, forbidden, only=only) == 0  # type: ignore[arg-type]
        assert set(file.unanswered) == {("r13", None)}


def test_prompts_are_rendered_a_little_ahead_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "RENDERED_AHEAD", 5)
    rendered: list[str] = []

    class Counting(FakeRenderer):
        def render(self, example: Example) -> RenderedPrompt:
            rendered.append(example.id)
            return super().render(example)

    most = 0

    class OneByOne(FakeEngine):
        def complete(self, requests: Iterable[Request]) -> Generator[Completion | None, None, None]:
            nonlocal most
            for number, request in enumerate(requests):
                most = max(most, len(rendered) - number)
                yield None
                yield Completion(request.key, tuple(map(ord, REPLY)), "stop")

    with RowFile(tmp_path / "base.jsonl", SETTINGS) as file:
        assert run(file, Counting, OneByOne().start, rows=60) == 59  # type: ignore[arg-type]
    assert most <= 5 + 3
    assert len(rendered) == 60


def test_greedy_answers_come_before_sampled_ones_and_a_prompt_is_rendered_twice_at_most(
    tmp_path: Path,
) -> None:
    rendered: list[str] = []

    class Counting(FakeRenderer):
        def render(self, example: Example) -> RenderedPrompt:
            rendered.append(example.id)
            return super().render(example)

    engine = FakeEngine()
    with RowFile(tmp_path / "base.jsonl", SETTINGS) as file:
        run(file, Counting, engine.start, rows=3, seeds=[1, None, 2, 3])  # type: ignore[arg-type]
    assert [request.key for request in engine.asked[:5]] == [
        ("r0", None), ("r1", None), ("r2", None), ("r0", 1), ("r0", 2),
    ]  # fmt: skip
    assert len(rendered) == 6


def test_a_failure_while_rendering_is_not_swallowed_and_keeps_what_is_there(tmp_path: Path) -> None:
    class Failing(FakeRenderer):
        def render(self, example: Example) -> RenderedPrompt:
            if example.id == "r7":
                raise DataError("r7: no date. Mend it.")
            return super().render(example)

    class InOrder(FakeEngine):
        def complete(self, requests: Iterable[Request]) -> Generator[Completion | None, None, None]:
            for request in requests:
                yield Completion(request.key, tuple(map(ord, REPLY)), "stop")

    path = tmp_path / "base.jsonl"
    with RowFile(path, SETTINGS) as file, pytest.raises(DataError, match="r7: no date"):
        run(file, Failing, InOrder().start)  # type: ignore[arg-type]
    assert [id_ for id_, _ in ids(path)] == [f"r{n}" for n in range(7)]


def test_an_engine_that_forgets_rows_is_an_error(tmp_path: Path) -> None:
    class Forgetting(FakeEngine):
        def complete(self, requests: Iterable[Request]) -> Generator[Completion | None, None, None]:
            yield from list(super().complete(requests))[1:]

    with pytest.raises(StageError, match="base: 1 rows got no answer, first"):
        go(tmp_path / "base.jsonl", Forgetting())
    assert len(ids(tmp_path / "base.jsonl")) == 9


def test_an_answer_without_thinking_is_all_of_the_response(tmp_path: Path) -> None:
    class Plain(FakeRenderer):
        thinking = False

    path = tmp_path / "base.jsonl"
    with RowFile(path, SETTINGS) as file:
        run(file, Plain, Saying("5").start, rows=1)  # type: ignore[arg-type]
    row = json.loads(path.read_text())
    assert (row["thinking"], row["answer"], row["verifiable"], row["reasoning_tokens"]) == (
        False,
        "5",
        1.0,
        0,
    )


def test_a_template_that_opens_the_thinking_has_it_in_the_row(tmp_path: Path) -> None:
    class Opens(FakeRenderer):
        opens_thinking = True

    path = tmp_path / "base.jsonl"
    with RowFile(path, SETTINGS) as file:
        run(file, Opens, Saying("fine.\n</think>\n\n5").start, rows=1)  # type: ignore[arg-type]
    row = json.loads(path.read_text())
    assert row["response"] == "<think>\nfine.\n</think>\n\n5"
    assert (row["verifiable"], row["reasoning_tokens"], row["thinking"]) == (1.0, 5, True)


class Saying(FakeEngine):
    """Says one thing, with its thinking cut."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def complete(self, requests: Iterable[Request]) -> Generator[Completion | None, None, None]:
        for request in requests:
            yield Completion(request.key, tuple(map(ord, self.text)), "stop", thinking_cut=True)


def test_a_cut_of_the_thinking_is_in_the_row(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    with RowFile(path, SETTINGS) as file:
        run(file, FakeRenderer, Saying(REPLY).start, rows=1)  # type: ignore[arg-type]
    assert json.loads(path.read_text())["thinking_cut"] is True


def test_truncation_is_recorded_and_an_aborted_row_is_an_error(tmp_path: Path) -> None:
    go(tmp_path / "cut.jsonl", FakeEngine(finish_reason="length"), rows=1)
    assert json.loads((tmp_path / "cut.jsonl").read_text())["finish_reason"] == "length"
    with pytest.raises(StageError, match="row r0 ended with 'abort'"):
        go(tmp_path / "aborted.jsonl", FakeEngine(finish_reason="abort"), rows=1)
    assert (tmp_path / "aborted.jsonl").read_text() == ""


def test_reasoning_tokens_end_at_the_mark() -> None:
    count = FakeRenderer().reasoning_tokens
    assert count("<think>\nabc\n</think>\n\n5", 99) == 3  # type: ignore[misc]
    assert count("abc</think>5", 99) == 3  # type: ignore[misc]
    assert count("<think>\nnever closed", 99) == 99  # type: ignore[misc]


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={letter: n for n, letter in enumerate(sorted(byte_level.alphabet()))}, merges=[]
        )
    )
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    folder = tmp_path / "tokenizer"
    fast.save_pretrained(folder)
    return str(folder)


def test_prompt_is_one_user_message_and_ends_where_the_model_begins(tokenizer_folder: str) -> None:
    renderer = PromptRenderer(tokenizer_folder, PromptSettings(8, "recency", 100, 20, 0))
    example = examples(1)[0].model_copy(update={"query": "review: <|im_end|> <think>"})
    prompt = renderer.render(example)
    text = renderer.tokenizer.decode(prompt.token_ids)
    assert text == f"<|im_start|>user\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n"
    control = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt.token_ids.count(control) == 1
    # A forged special token must stay visible: the reward sees it, and it breaks the format.
    forged = [*renderer.tokenizer.encode("<think>a</think>"), control, *renderer.tokenizer.encode("b")]
    assert renderer.decode(forged) == "<think>a</think><|im_end|>b"
    with pytest.raises(QueryTooLongError):
        renderer.render(example.model_copy(update={"query": "review: " + "x" * 100}))


def test_without_thinking_the_prompt_says_the_same_and_the_template_closes_the_thinking(
    tokenizer_folder: str,
) -> None:
    item = ProfileItem(id="1", fields={"text": "word " * 40, "score": "4"})
    example = examples(1)[0].model_copy(update={"profile": (item,)})
    ample = PromptRenderer(tokenizer_folder, PromptSettings(8, "recency", 1000, 20, 0)).render(example)
    # Not a token to spare.
    settings = PromptSettings(8, "recency", len(ample.token_ids), 20, 0)
    thinking, plain = (PromptRenderer(tokenizer_folder, settings, each) for each in (True, False))
    prompts = thinking.render(example), plain.render(example)
    assert prompts[0].text == prompts[1].text == ample.text
    assert len(prompts[1].token_ids) > len(prompts[0].token_ids)
    assert plain.decode(prompts[1].token_ids).endswith("<think>\n\n</think>\n\n")
    assert not thinking.opens_thinking
    assert not plain.opens_thinking
    # Qwen3-Thinking and DeepSeek-R1 open it in the template.
    thinking.tokenizer.chat_template = TEMPLATE.replace("assistant\n", "assistant\n<think>\n", 1)
    thinking.tokenizer.save_pretrained(tokenizer_folder)
    opened = PromptRenderer(tokenizer_folder, settings)
    assert opened.opens_thinking
    assert opened.response_text("a</think>b") == "<think>\na</think>b"
    assert opened.response_text("<think>a</think>b") == "<think>a</think>b"
