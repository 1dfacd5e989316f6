"""The pipeline itself: sample, generate, filter by accuracy, judge, tag, select; then preference pairs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipeline.endpoint import Endpoint, Unit, for_each
from data_pipeline.filters import chain_problem
from data_pipeline.funnel import Funnel
from data_pipeline.judge import judge_chain
from data_pipeline.preferences import (
    Candidate,
    choose_pairs,
    finish_pair,
    pqp_candidates,
    prp_candidates,
)
from data_pipeline.prompts import PromptTemplate
from data_pipeline.selection import draw_instances, select_chains, shuffled
from data_pipeline.settings import ChainSettings
from data_pipeline.tagging import RestrictedTagging, tag_chain
from data_pipeline.teacher import read_rollout, rollout_unit
from tagpr.benchmarks.prompt import QueryTooLongError
from tagpr.rewards.verifiable import verifiable_reward
from tagpr.schema import Chain, Example, PreferencePair
from tagpr.tags import Response

logger = logging.getLogger(__name__)

PromptOf = Callable[[Example, bool], str]
"""Example, with its profile or without -> the prompt."""


@dataclass(frozen=True)
class Models:
    """The three endpoints and the wordings of two of them."""

    teacher: Endpoint
    judge: Endpoint
    tagger: Endpoint
    judge_prompt: PromptTemplate
    tagging: RestrictedTagging


@dataclass(frozen=True)
class Built:
    """What a run of the pipeline made. ``chains``: every usable rollout, with what each stage made of it."""

    chains: list[Chain]
    selected: list[Chain]
    pairs: list[PreferencePair]


@dataclass(frozen=True)
class _Ask:
    example: Example
    prompt: str
    number: int
    with_profile: bool
    extra: bool = False


async def build(
    examples: Sequence[Example],
    tasks: Sequence[str],
    prompt_of: PromptOf,
    settings: ChainSettings,
    models: Models,
    funnel: Funnel,
    seed: int,
) -> Built:
    """Run every stage. All that is paid for goes through the ledger: doing this again with the same settings is free.

    Raises:
        StageError: an endpoint cannot be used.
        DataError, ConfigError: as ``prompt_of`` raises them.
    """
    pipeline = _Pipeline(settings, models, funnel)

    # 1. sample (S5)
    instances: list[tuple[Example, str]] = []
    for example in draw_instances(examples, tasks, settings.instances_per_task, seed):
        try:
            instances.append((example, prompt_of(example, True)))
        except QueryTooLongError:
            funnel.drop("instances", "query_too_long")
            continue
        funnel.keep("instances", example.task)

    # 2. generate (S6)
    asks = [
        _Ask(example, prompt, number, True)
        for example, prompt in instances
        for number in range(settings.rollouts)
    ]
    chains = _distinct(await pipeline.roll_out("teacher", asks), funnel)

    # 3. filter by accuracy (S7), then by the judge (S8)
    accurate = []
    for chain in chains:
        problem = chain_problem(chain, settings.accuracy)
        if problem:
            funnel.drop("accurate", problem)
            continue
        funnel.keep("accurate", chain.task)
        accurate.append(chain)
    judged = await pipeline.judge(accurate)

    # 4. tag (S12), 5. select (S14)
    tagged = await pipeline.tag("tagger", judged)
    for chain in judged:
        if chain.id in tagged:
            funnel.keep("tagged", chain.task)
    finished = [
        chain.model_copy(update={"tagged": tagged[chain.id]}) for chain in judged if chain.id in tagged
    ]
    selected = select_chains(finished, settings.size, settings.max_per_instance, seed)
    for chain in selected:
        funnel.keep("selected", chain.task)

    # 6. preference pairs from these chains, from more of the same, and from some made without the profile (S15, S16)
    extra, without = await _rollouts_for_pairs(pipeline, instances, chains, prompt_of, seed)
    preferences = settings.preferences
    candidates = choose_pairs(
        prp_candidates(judged, without, preferences.prp_minimum_gain),
        pqp_candidates([*chains, *extra], preferences.pqp_margin),
        preferences,
        seed,
    )
    used = {chain.id: chain for pair in candidates for chain in (pair.chosen, pair.rejected)}
    missing = [chain for chain in used.values() if chain.id not in tagged]
    pairs = _finish(candidates, tagged | await pipeline.tag("tagger, for pairs", missing), funnel)

    by_id = {chain.id: chain for chain in [*judged, *finished]}
    return Built([by_id.get(chain.id, chain) for chain in chains], selected, pairs)


class _Pipeline:
    """The stages that ask a model."""

    def __init__(self, settings: ChainSettings, models: Models, funnel: Funnel) -> None:
        self.settings = settings
        self.models = models
        self.funnel = funnel

    async def roll_out(self, label: str, asks: Sequence[_Ask]) -> list[Chain]:
        """Ask the teacher; unusable replies are counted under ``parsed``."""

        async def one(ask: _Ask) -> Chain | None:
            request = self.settings.preferences.extra_request if ask.extra else {}
            unit: Unit = rollout_unit(ask.prompt, ask.example.id, ask.number, ask.with_profile, request)
            rollout = read_rollout(await self.models.teacher.ask(unit))
            if rollout.problem:
                self.funnel.drop("parsed", rollout.problem)
                return None
            example = ask.example
            answer = Response(rollout.reasoning, rollout.answer, "")
            return Chain(
                id=f"{example.id}-{'r' if ask.with_profile else 'n'}{ask.number}",
                example_id=example.id,
                task=example.task,
                user_id=example.user_id,
                prompt=ask.prompt,
                gold=example.gold,
                rollout=ask.number,
                reasoning=rollout.reasoning,
                answer=rollout.answer,
                verifiable=verifiable_reward(example.task, example.gold, answer),
            )

        for ask in asks:
            stage = "extra_rollouts" if ask.extra else "rollouts" if ask.with_profile else "without_profile"
            self.funnel.keep(stage, ask.example.task)
        made = await for_each(label, asks, one, self.models.teacher.settings.concurrency)
        return [chain for chain in made if chain is not None]

    async def judge(self, chains: Sequence[Chain]) -> list[Chain]:
        """The chains whose total is above the minimum, with their scores."""

        async def one(chain: Chain) -> Chain | None:
            verdict = await judge_chain(
                chain,
                self.models.judge,
                self.models.judge_prompt,
                self.settings.judge_longest,
                self.settings.malformed_attempts,
            )
            if verdict.scores is None:
                self.funnel.drop("judged", f"unjudged_{verdict.problem}")
                return None
            if verdict.total <= self.settings.judge_minimum:
                self.funnel.drop("judged", "low_total")
                return None
            self.funnel.keep("judged", chain.task)
            return chain.model_copy(update={"judge_scores": verdict.scores})

        made = await for_each("judge", chains, one, self.models.judge.settings.concurrency)
        return [chain for chain in made if chain is not None]

    async def tag(self, label: str, chains: Sequence[Chain]) -> dict[str, str]:
        """Chain id -> tagged reasoning; chains that no reply tagged acceptably are counted and left out."""

        async def one(chain: Chain) -> tuple[str, str]:
            tagged = await tag_chain(
                chain, self.models.tagger.ask, self.models.tagging, self.settings.malformed_attempts
            )
            for problem in tagged.rejected:
                self.models.tagger.counts[f"rejected_{problem}"] += 1
            if tagged.problem:
                self.funnel.drop("tagged" if label == "tagger" else "tagged_for_pairs", tagged.problem)
            return chain.id, tagged.text

        made = await for_each(label, chains, one, self.models.tagger.settings.concurrency)
        return {chain_id: text for chain_id, text in made if text}


def _distinct(chains: Sequence[Chain], funnel: Funnel) -> list[Chain]:
    """Chains without those that repeat an earlier rollout of their instance word for word."""
    seen = set()
    kept = []
    for chain in chains:
        funnel.keep("parsed", chain.task)
        text = (chain.example_id, chain.reasoning, chain.answer)
        if text in seen:
            funnel.drop("distinct", "repeated")
            continue
        seen.add(text)
        funnel.keep("distinct", chain.task)
        kept.append(chain)
    return kept


async def _rollouts_for_pairs(
    pipeline: _Pipeline,
    instances: Sequence[tuple[Example, str]],
    chains: Sequence[Chain],
    prompt_of: PromptOf,
    seed: int,
) -> tuple[list[Chain], list[Chain]]:
    """More rollouts where no answer was fully right yet, and rollouts without the profile."""
    settings = pipeline.settings
    preferences = settings.preferences
    solved = {chain.example_id for chain in chains if chain.verifiable == 1.0}
    more = [
        _Ask(example, prompt, settings.rollouts + number, True, extra=True)
        for example, prompt in instances
        if preferences.pqp_pairs and example.id not in solved
        for number in range(preferences.extra_rollouts)
    ]
    blank: list[_Ask] = []
    per_task: dict[str, int] = {}
    for example, _ in shuffled(instances, lambda instance: instance[0].id, seed + 1):
        per_task[example.task] = per_task.get(example.task, 0) + 1
        if not preferences.prp_pairs or per_task[example.task] > preferences.prp_instances_per_task:
            continue
        prompt = prompt_of(example, False)
        blank += [_Ask(example, prompt, number, False) for number in range(preferences.prp_rollouts)]
    extra = await pipeline.roll_out("teacher, more for pairs", more)
    return extra, await pipeline.roll_out("teacher, without profile", blank)


def _finish(candidates: Sequence[Candidate], tagged: dict[str, str], funnel: Funnel) -> list[PreferencePair]:
    pairs = []
    for candidate in candidates:
        pair = finish_pair(candidate, tagged)
        if pair is None:
            funnel.drop("pairs", "untagged")
            continue
        funnel.keep(candidate.kind, pair.task)
        if candidate.kind == "pqp" and candidate.last_word_only:
            funnel.keep("pqp_last_word", pair.task)
        pairs.append(pair)
    return pairs
