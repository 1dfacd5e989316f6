"""The pipeline itself: generate, filter by accuracy, judge, tag, select; then preference pairs (S5-S16).

Everything streams: a bounded window of instances is under way, each on its own from its rollouts to its judgements, and
what is done is in the results store. Selection and pairs look at ids and numbers only, in an order that does not depend on
what arrived when.
"""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_pipeline.endpoint import Endpoint, PendingError, Unit, stream
from data_pipeline.eta import CHAINS, EXPLORATORY
from data_pipeline.exploration import draw_chains, explore
from data_pipeline.filters import chain_problem
from data_pipeline.funnel import Funnel
from data_pipeline.judge import judge_chain
from data_pipeline.preferences import Candidate, choose_pairs, finish_pair
from data_pipeline.progress import Progress
from data_pipeline.prompts import PromptTemplate
from data_pipeline.selection import select_chains
from data_pipeline.settings import ChainSettings
from data_pipeline.store import Instance, Kind, Label, Result, Store
from data_pipeline.tagging import RestrictedTagging, tag_chain
from data_pipeline.teacher import read_rollout, rollout_unit
from tagpr.chat.asking import RequestRefusedError
from tagpr.chat.client import Reply
from tagpr.errors import StageError
from tagpr.rewards.verifiable import verifiable_reward
from tagpr.schema import Chain, PreferencePair
from tagpr.tags import Response

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# Requests of the instances under way, in multiples of what the endpoints take: enough that the slowest never idles.
AHEAD = 3.0
STAGE_OF: dict[Kind, str] = {"main": "rollouts", "extra": "extra_rollouts", "blank": "without_profile"}
# Where an unusable reply is counted: those for pairs only are not part of the funnel's main line.
DROPPED_AT: dict[Kind, str] = {"main": "parsed", "extra": "extra_rollouts", "blank": "without_profile"}


@dataclass(frozen=True)
class Models:
    """The endpoints and how two of them are asked. ``explorer`` is the tagger, asked now even if there is a batch mode."""

    teacher: Endpoint
    judge: Endpoint
    tagger: Endpoint
    explorer: Endpoint
    judge_prompt: PromptTemplate
    tagging: RestrictedTagging


class _Waiting:
    """In place of an answer that waits in a batch."""


WAITING = _Waiting()


class Flow:
    """One pass over everything. ``pending`` counts units that wait in a batch: with any, there must be another pass."""

    def __init__(
        self,
        store: Store,
        settings: ChainSettings,
        models: Models,
        funnel: Funnel,
        progress: Progress,
        seed: int,
    ) -> None:
        self.store = store
        self.settings = settings
        self.models = models
        self.funnel = funnel
        self.pending = 0
        self._progress = progress
        self._seed = seed

    async def chains(self) -> None:
        """Rollouts, their filters and their judgements, and the rollouts that only pairs need (S5-S8, S15, S16)."""
        notes = self.store.noted("instances")
        for task, count in notes["kept"].items():
            self.funnel.keep("instances", task, count)
        for reason, count in notes["dropped"].items():
            self.funnel.drop("instances", reason, count)
        asked = self.models.teacher.settings.concurrency + self.models.judge.settings.concurrency
        window = math.ceil(AHEAD * asked / self.settings.rollouts) + 1
        with self._progress.stage(CHAINS, "instances", self.store.instance_count()):
            await stream(self.store.instances(), self._instance, window)
            self.store.commit()

    async def explore(self, folder: Path) -> None:
        """Free tags for some of the judged chains, and their clusters (S9, S10)."""
        wanted = self.settings.exploratory.chains
        judged = self.store.labels("main", judged=True)
        drawn = list(self.store.chains(label.id for label in draw_chains(judged, wanted, self._seed)))
        if not drawn:
            return
        settings = self.settings.model_copy(
            update={"exploratory": self.settings.exploratory.model_copy(update={"chains": len(drawn)})}
        )

        async def ask(unit: Unit) -> Reply:
            try:
                return await self.models.explorer.ask(unit)
            except RequestRefusedError as error:
                return Reply("", None, f"refused_{error.code or error.http_status}", 0, 0, 0)
            finally:
                self._progress.step()

        with self._progress.stage(EXPLORATORY, "replies", len(drawn)):
            await explore(drawn, ask, settings, folder, self._seed)

    async def tag(self, ids: Sequence[str], label: str, stage: str) -> None:
        """Tag these chains (S12); ``stage`` is where the funnel counts those that cannot be."""

        async def one(chain_id: str) -> None:
            chain = self.store.chain(chain_id)
            tagged = await self._asked(
                stage,
                tag_chain(
                    chain, self.models.tagger.ask, self.models.tagging, self.settings.malformed_attempts
                ),
            )
            self._progress.step()
            if tagged is None or isinstance(tagged, _Waiting):
                return
            for problem in tagged.rejected:
                self.models.tagger.counts[f"rejected_{problem}"] += 1
            if tagged.problem:
                self.funnel.drop(stage, tagged.problem)
            else:
                if stage == "tagged":
                    self.funnel.keep(stage, chain.task)
                self.store.set_tagged(chain.id, tagged.text)

        window = math.ceil(AHEAD * self.models.tagger.settings.concurrency)
        with self._progress.stage(label, "chains", len(ids)):
            await stream(ids, one, window)
            self.store.commit()

    def select(self) -> list[Label]:
        """The chains for SFT (S14)."""
        tagged = self.store.labels("main", judged=True, tagged=True)
        selected = select_chains(tagged, self.settings.size, self.settings.max_per_instance, self._seed)
        for chain in selected:
            self.funnel.keep("selected", chain.task)
        return selected

    def candidates(self) -> list[Candidate]:
        """The pairs for PRMU, before their chains are tagged (S15, S16)."""
        return choose_pairs(self.store.rollouts, self.settings.preferences, self._seed)

    def untagged(self, candidates: Sequence[Candidate]) -> list[str]:
        """Chains of these pairs that nobody has tried to tag yet."""
        tried = {label.id for label in self.store.labels("main", judged=True)}
        used = [brief.id for pair in candidates for brief in (pair.chosen, pair.rejected)]
        return [chain_id for chain_id in dict.fromkeys(used) if chain_id not in tried]

    def pairs(self, candidates: Sequence[Candidate]) -> Iterator[PreferencePair]:
        """The pairs whose chains are both tagged."""
        for candidate in candidates:
            chosen, rejected = self.store.chains((candidate.chosen.id, candidate.rejected.id))
            pair = finish_pair(candidate, chosen, rejected)
            if pair is None:
                self.funnel.drop("pairs", "untagged")
                continue
            self.funnel.keep(candidate.kind, pair.task)
            if candidate.kind == "pqp" and candidate.last_word_only:
                self.funnel.keep("pqp_last_word", pair.task)
            yield pair

    async def _instance(self, instance: Instance) -> None:
        """One instance from its rollouts to its judgements."""
        settings = self.settings
        preferences = settings.preferences
        async with asyncio.TaskGroup() as group:

            def start(kind: Kind, first: int, count: int) -> list[asyncio.Task[Chain | _Waiting | None]]:
                return [
                    group.create_task(self._roll_out(instance, kind, first + number))
                    for number in range(count)
                ]

            main = start("main", 0, settings.rollouts)
            blank = start("blank", 0, preferences.prp_rollouts if instance.blank_prompt is not None else 0)
            answers = [await task for task in main]
            chains = self._distinct([answer for answer in answers if isinstance(answer, Chain)])
            extra: list[asyncio.Task[Chain | _Waiting | None]] = []
            judged: dict[str, asyncio.Task[Chain | _Waiting | None]] = {}
            # What is repeated, and whether more rollouts are needed, is known when all are there.
            if not any(isinstance(answer, _Waiting) for answer in answers):
                judged = {
                    chain.id: group.create_task(self._judge(chain))
                    for chain in chains
                    if self._accurate(chain)
                }
                if preferences.pqp_pairs and not any(chain.verifiable == 1.0 for chain in chains):
                    extra = start("extra", settings.rollouts, preferences.extra_rollouts)
        results = []
        for chain in chains:
            verdict = judged[chain.id].result() if chain.id in judged else None
            good = isinstance(verdict, Chain)
            results.append(
                Result(verdict if isinstance(verdict, Chain) else chain, instance.number, "main", good)
            )
        for kind, tasks in (("extra", extra), ("blank", blank)):
            done = [task.result() for task in tasks]
            results += [
                Result(chain, instance.number, "extra" if kind == "extra" else "blank")
                for chain in done
                if isinstance(chain, Chain)
            ]
        self.store.add(results)
        self._progress.step()

    async def _roll_out(self, instance: Instance, kind: Kind, number: int) -> Chain | _Waiting | None:
        """One chain of the teacher; None where the reply cannot be used."""
        prompt = instance.blank_prompt if kind == "blank" else instance.prompt
        assert prompt is not None, "instances without a blank prompt get no blank rollouts"
        request = self.settings.preferences.extra_request if kind == "extra" else {}
        unit = rollout_unit(prompt, instance.example_id, number, kind != "blank", request)
        self.funnel.keep(STAGE_OF[kind], instance.task)
        reply = await self._asked(DROPPED_AT[kind], self.models.teacher.ask(unit))
        if reply is None or isinstance(reply, _Waiting):
            return reply
        rollout = read_rollout(reply)
        if rollout.problem:
            self.funnel.drop(DROPPED_AT[kind], rollout.problem)
            return None
        answer = Response(rollout.reasoning, rollout.answer, "")
        return Chain(
            id=f"{instance.example_id}-{'n' if kind == 'blank' else 'r'}{number}",
            example_id=instance.example_id,
            task=instance.task,
            user_id=instance.user_id,
            prompt=prompt,
            gold=instance.gold,
            rollout=number,
            reasoning=rollout.reasoning,
            answer=rollout.answer,
            verifiable=verifiable_reward(instance.task, instance.gold, answer),
        )

    def _distinct(self, chains: Sequence[Chain]) -> list[Chain]:
        """Chains of one instance without those that repeat an earlier rollout word for word."""
        kept: dict[tuple[str, str], Chain] = {}
        for chain in chains:
            self.funnel.keep("parsed", chain.task)
            if kept.setdefault((chain.reasoning, chain.answer), chain) is chain:
                self.funnel.keep("distinct", chain.task)
            else:
                self.funnel.drop("distinct", "repeated")
        return list(kept.values())

    def _accurate(self, chain: Chain) -> bool:
        problem = chain_problem(chain, self.settings.accuracy)
        if problem:
            self.funnel.drop("accurate", problem)
            return False
        self.funnel.keep("accurate", chain.task)
        return True

    async def _judge(self, chain: Chain) -> Chain | _Waiting | None:
        """The chain with its scores if their total is above the minimum (S8)."""
        verdict = await self._asked(
            "judged",
            judge_chain(
                chain,
                self.models.judge,
                self.models.judge_prompt,
                self.settings.judge_longest,
                self.settings.malformed_attempts,
            ),
        )
        if verdict is None or isinstance(verdict, _Waiting):
            return verdict
        if verdict.scores is None:
            self.funnel.drop("judged", f"unjudged_{verdict.problem}")
            return None
        if verdict.total <= self.settings.judge_minimum:
            self.funnel.drop("judged", "low_total")
            return None
        self.funnel.keep("judged", chain.task)
        return chain.model_copy(update={"judge_scores": verdict.scores})

    async def _asked(self, stage: str, asking: Awaitable[Answer]) -> Answer | _Waiting | None:
        """What was asked for; None, counted, where the endpoint refuses just this."""
        try:
            return await asking
        except PendingError:
            self.pending += 1
            return WAITING
        except RequestRefusedError as error:
            self.funnel.drop(stage, f"refused_{error.code or error.http_status}")
            return None


def no_chain_left(funnel: Funnel) -> StageError:
    """The error for a run in which nothing is left to train on."""
    dropped = json.dumps(funnel.as_dict()["dropped"])
    return StageError(
        f"chains: no chain passed every filter (dropped: {dropped}). Loosen chains.accuracy.above or chains.judge_minimum, "
        "or look at the teacher's replies."
    )
