"""What PRMU says of answered rows: asked of a server of this run's own, kept in ``<label>.prmu.jsonl`` beside the rows.

A score is kept for one checkpoint, one user, one prompt and one response; when any of them changed it is asked for
again. One that cannot be had is an error: no score is ever made up.
"""

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import FiniteFloat, ValidationError

from tagpr.evaluation.rows import Key, Row, exclusive
from tagpr.prmu.client import RewardClient, sigmoid
from tagpr.prmu.local_server import local_server
from tagpr.prmu.wire import Address, ScoreItem, read_token
from tagpr.runs import write_text_atomically
from tagpr.schema import PrmuScore, Record

logger = logging.getLogger(__name__)

PROGRESS_S = 5.0
# Enough to keep the server's next batch full while this process renders prompts.
REQUESTS_IN_FLIGHT = 8


class KeptScore(Record):
    """One line of ``<label>.prmu.jsonl``; ``asked`` is a hash of everything the logit is a function of."""

    id: str
    seed: int | None
    asked: str
    version: str
    logit: FiniteFloat
    unknown_user: bool

    def score(self) -> PrmuScore:
        """The score as the reward server gives it (eq. 3)."""
        return PrmuScore(
            logit=self.logit,
            score=sigmoid(self.logit),
            unknown_user=self.unknown_user,
            version=self.version,
        )


@dataclass(frozen=True)
class Answered:
    """A model's rows; ``settings`` are those of its row file, ``prompt`` gives the user message of a row."""

    label: str
    path: Path
    rows: Sequence[Row]
    settings: Mapping[str, Any]
    prompt: Callable[[Row], str]

    def asked(self, row: Row) -> str:
        """Hash of user, prompt and response; the prompt by what determines it, for rendering takes long."""
        about = [dict(self.settings), row.id, row.user_id, row.prompt_tokens, row.response]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class ScoreFile:
    """The scores of one model's rows that still hold; locked while open.

    A line that cannot be read, e.g. one torn by a kill, is dropped: its score is asked for again.

    Raises:
        StageError: another process has the file open.
    """

    def __init__(self, answered: Answered, version: str) -> None:
        self.path = answered.path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = exclusive(self.path)
        wanted = {row.key: answered.asked(row) for row in answered.rows}
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.splitlines()
        self.scores: dict[Key, KeptScore] = {}
        for line in lines:
            try:
                kept = KeptScore.model_validate_json(line)
            except ValidationError:
                continue
            key = (kept.id, kept.seed)
            # Rows that are not looked at this time, e.g. under a smaller limit, keep theirs.
            if kept.version == version and wanted.get(key, kept.asked) == kept.asked:
                self.scores[key] = kept
        if len(self.scores) < len(lines):
            logger.info(
                "%s: %d scores of another PRMU or another response are made again",
                self.path, len(lines) - len(self.scores),
            )  # fmt: skip
        if len(self.scores) < len(lines) or (content and not content.endswith(b"\n")):
            write_text_atomically(self.path, "".join(map(_line, self.scores.values())))
        self._file = self.path.open("ab")

    def append(self, scores: Iterable[KeptScore]) -> None:
        """Add scores; a kill of this process does not lose them any more."""
        batch = list(scores)
        self._file.write("".join(map(_line, batch)).encode())
        self._file.flush()
        self.scores.update({(kept.id, kept.seed): kept for kept in batch})

    def __enter__(self) -> "ScoreFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._lock.close()


class BackgroundServer:
    """A reward server that starts beside other work, at most once; as a context manager it ends with the body."""

    def __init__(self, checkpoint: str, run_dir: Path) -> None:
        self._server = local_server(checkpoint, run_dir, "auto")
        self._pool = ThreadPoolExecutor(1, "reward-server")
        self._address: Future[Address] | None = None

    def start(self) -> None:
        """Begin to start it and return at once."""
        if self._address is None:
            self._address = self._pool.submit(self._server.__enter__)

    def address(self) -> Address:
        """Where it is, once it is ready; starts it where nobody has.

        Raises:
            RewardServerError: it did not come up.
        """
        self.start()
        assert self._address is not None
        return self._address.result()

    def check(self) -> None:
        """Say now if it has failed already, not after hours of other work.

        Raises:
            RewardServerError: it did not come up.
        """
        if self._address is not None and self._address.done():
            self._address.result()

    def __enter__(self) -> "BackgroundServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The wait for a server that is still starting is the price of never leaving one behind.
        if self._address is not None and self._address.exception() is None:
            self._server.__exit__(None, None, None)
        self._pool.shutdown()


@dataclass
class _Progress:
    total: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    def add(self, number: int) -> None:
        self.done += number
        if time.monotonic() - self.told >= PROGRESS_S:
            logger.info("PRMU: %d of %d responses", self.done, self.total)
            self.told = time.monotonic()


def prmu_scores(
    models: Sequence[Answered], server: BackgroundServer, version: str, batch_items: int
) -> dict[str, dict[Key, PrmuScore]]:
    """PRMU's score of every row, label -> key -> score; asks only for those that are not kept.

    The server is not started where nothing is to be asked. Whatever ends this, the scores that came are kept.

    Raises:
        RewardServerError: a score cannot be had, or the server serves another checkpoint than ``version``.
        StageError: a prompt cannot be rendered as the model saw it, or another process scores the same rows.
    """
    with ExitStack() as stack:
        files = {
            model.label: stack.enter_context(ScoreFile(model, version)) for model in models if model.rows
        }
        missing = [
            (model, row) for model in models for row in model.rows if row.key not in files[model.label].scores
        ]
        if missing:
            # Responses to one prompt side by side: the server's engine may have its prefix still.
            missing.sort(key=lambda one: one[1].id)
            started = time.monotonic()
            address = server.address()
            progress = _Progress(len(missing))
            asyncio.run(_ask(missing, files, address, version, batch_items, progress))
            logger.info(
                "PRMU: %d responses (wait for the server %.1f s, scores %.1f s)",
                len(missing), progress.began - started, time.monotonic() - progress.began,
            )  # fmt: skip
        return {
            model.label: {row.key: files[model.label].scores[row.key].score() for row in model.rows}
            for model in models
        }


async def _ask(
    missing: Sequence[tuple[Answered, Row]],
    files: Mapping[str, ScoreFile],
    address: Address,
    version: str,
    batch_items: int,
    progress: _Progress,
) -> None:
    token = read_token(address.token_file)
    async with RewardClient(address.url, token, version, concurrency=REQUESTS_IN_FLIGHT) as client:
        batches = (missing[at : at + batch_items] for at in range(0, len(missing), batch_items))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(REQUESTS_IN_FLIGHT):
                    group.create_task(_ask_in_turn(batches, client, files, progress))
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None


async def _ask_in_turn(
    batches: Iterator[Sequence[tuple[Answered, Row]]],
    client: RewardClient,
    files: Mapping[str, ScoreFile],
    progress: _Progress,
) -> None:
    """One of several that share ``batches``: prompts are rendered only shortly before they are sent."""
    for batch in batches:
        items = [
            ScoreItem(
                id=f"{model.label}/{row.id}/{'greedy' if row.seed is None else row.seed}",
                user_id=row.user_id,
                prompt=model.prompt(row),
                response=row.response,
            )
            for model, row in batch
        ]
        by_label: dict[str, list[KeptScore]] = {}
        for (model, row), score in zip(batch, await client.score(items), strict=True):
            kept = KeptScore(
                id=row.id,
                seed=row.seed,
                asked=model.asked(row),
                version=score.version,
                logit=score.logit,
                unknown_user=score.unknown_user,
            )
            by_label.setdefault(model.label, []).append(kept)
        for label, scores in by_label.items():
            files[label].append(scores)
        progress.add(len(batch))


def _line(kept: KeptScore) -> str:
    return json.dumps(kept.model_dump()) + "\n"
