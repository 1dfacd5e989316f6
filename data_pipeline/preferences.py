"""Preference pairs for PRMU, from the teacher's chains (S15, S16)."""

import hashlib
import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Literal

from data_pipeline.selection import place, turns
from data_pipeline.settings import PreferenceSettings
from tagpr.schema import Chain, PreferencePair
from tagpr.tags import format_response


@dataclass(frozen=True, slots=True)
class Brief:
    """A chain without its text, of which ``text`` is a hash: what choosing needs of a hundred thousand of them."""

    id: str
    example_id: str
    task: str
    user_id: str
    answer: str
    verifiable: float
    text: bytes

    @classmethod
    def of(
        cls,
        id_: str,
        example_id: str,
        task: str,
        user_id: str,
        answer: str,
        verifiable: float,
        reasoning: str,
    ) -> "Brief":
        """The brief of a chain with this reasoning."""
        text = hashlib.sha256(f"{len(answer)} {answer}{reasoning}".encode()).digest()[:16]
        return cls(id_, example_id, task, user_id, answer, verifiable, text)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair before its chains are tagged; both answer the same instance."""

    kind: Literal["prp", "pqp"]
    chosen: Brief
    rejected: Brief

    @property
    def id(self) -> str:
        """Kind and the two chains."""
        return f"{self.kind}/{self.chosen.id}/{self.rejected.id}"

    @property
    def margin(self) -> float:
        """R_v of the chosen answer minus that of the rejected one."""
        return self.chosen.verifiable - self.rejected.verifiable

    @property
    def last_word_only(self) -> bool:
        """The answers are equally long and differ in their last word: what a profile may not show (MiniLaMP's habit)."""
        chosen, rejected = self.chosen.answer.split(), self.rejected.answer.split()
        return len(chosen) > 1 and chosen[:-1] == rejected[:-1] and chosen[-1:] != rejected[-1:]

    @property
    def rule(self) -> str:
        """Why the first is preferred, for the pair's record."""
        if self.kind == "prp":
            return "made with the profile"
        return "better by R_v in the last word" if self.last_word_only else "better by R_v"


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The usable chains of one instance: those past the judge, all with the profile (more rollouts last), those without."""

    kept: Sequence[Brief]
    personalised: Sequence[Brief]
    without_profile: Sequence[Brief]


def prp_candidates(
    kept: Sequence[Brief], without_profile: Sequence[Brief], minimum_gain: float | None
) -> list[Candidate]:
    """Every kept chain over every chain that was made without the profile for the same instance (S15).

    Equal texts are no pair. ``minimum_gain`` drops pairs whose chosen answer is not at least so much better by R_v; None:
    as the paper says it, whatever the answers.
    """
    others: dict[str, list[Brief]] = {}
    for chain in without_profile:
        others.setdefault(chain.example_id, []).append(chain)
    found = {}
    for chosen in kept:
        for rejected in others.get(chosen.example_id, []):
            candidate = Candidate("prp", chosen, rejected)
            if chosen.text != rejected.text and (minimum_gain is None or candidate.margin >= minimum_gain):
                found[chosen.example_id, chosen.text, rejected.text] = candidate
    return list(found.values())


def pqp_candidates(personalised: Sequence[Brief], margin: float) -> list[Candidate]:
    """Every two chains with the profile for one instance whose R_v differ by more than ``margin`` (S16): no ties.

    Chains with the same answer never differ, so a pair never sets two wordings of one answer against each other. Of chains
    with one text the first counts.
    """
    by_example: dict[str, dict[bytes, Brief]] = {}
    for chain in personalised:
        by_example.setdefault(chain.example_id, {}).setdefault(chain.text, chain)
    found = []
    for chains in by_example.values():
        for one, other in combinations(chains.values(), 2):
            better, worse = (one, other) if one.verifiable > other.verifiable else (other, one)
            if better.verifiable - worse.verifiable > margin:
                found.append(Candidate("pqp", better, worse))
    return found


@dataclass(frozen=True, slots=True)
class _Offer:
    """So many candidates of one sort for one instance, the first of which comes at ``first`` in the shuffled order."""

    first: bytes
    number: int
    user_id: str
    task: str
    count: int


def choose_pairs(
    instances: Callable[[], Iterable[Rollouts]], settings: PreferenceSettings, seed: int
) -> list[Candidate]:
    """The pairs to keep: users take turns, within a user tasks, within a task instances, so that each user has its share.

    With ``pqp_last_word_share``, that share of the PQP pairs differ in the answer's last word only, as far as there are
    such pairs; what is missing of either sort is not made up by the other.

    ``instances`` gives the same instances in the same order each time it is called, which is twice: a hundred chains can be
    paired in thousands of ways, so what an instance has to offer is counted first, and made where its turn has come. Memory
    holds a number or two for each instance, and the pairs that are kept.
    """
    share = settings.pqp_last_word_share
    sizes = [settings.prp_pairs, settings.pqp_pairs]
    if share is not None:
        last_word = round(share * settings.pqp_pairs)
        sizes[1:] = [last_word, settings.pqp_pairs - last_word]

    def sorts(rollouts: Rollouts) -> list[list[Candidate]]:
        prp = prp_candidates(rollouts.kept, rollouts.without_profile, settings.prp_minimum_gain)
        pqp = pqp_candidates(rollouts.personalised, settings.pqp_margin)
        if share is None:
            return [prp, pqp]
        return [prp, *([pair for pair in pqp if pair.last_word_only is wanted] for wanted in (True, False))]

    def order(candidate: Candidate) -> bytes:
        return place(candidate.id, seed)

    offers: list[list[_Offer]] = [[] for _ in sizes]
    for number, rollouts in enumerate(instances()):
        for offered, candidates in zip(offers, sorts(rollouts), strict=True):
            if candidates:
                one = candidates[0].chosen
                first = min(map(order, candidates))
                offered.append(_Offer(first, number, one.user_id, one.task, len(candidates)))

    drawn = [
        [
            offer.number
            for offer in islice(
                turns(
                    sorted(offered, key=lambda offer: offer.first),
                    lambda offer: offer.user_id,
                    lambda offer: offer.task,
                    lambda offer: offer.number,
                    times=lambda offer: offer.count,
                ),
                size,
            )
        ]
        for offered, size in zip(offers, sizes, strict=True)
    ]
    wanted = [Counter(numbers) for numbers in drawn]
    made: list[dict[int, deque[Candidate]]] = [{} for _ in sizes]
    for number, rollouts in enumerate(instances()):
        if not any(number in counts for counts in wanted):
            continue
        for counts, queues, candidates in zip(wanted, made, sorts(rollouts), strict=True):
            if number in counts:
                queues[number] = deque(heapq.nsmallest(counts[number], candidates, key=order))
    return [
        queues[number].popleft() for numbers, queues in zip(drawn, made, strict=True) for number in numbers
    ]


def finish_pair(candidate: Candidate, chosen: Chain, rejected: Chain) -> PreferencePair | None:
    """The pair with both chains tagged, as the policy will write them; None if either could not be tagged.

    ``chosen`` and ``rejected`` are the candidate's chains in full, the prompt is the one with the profile. Both sides are
    tagged or there is no pair: PRMU must not learn to tell tagged from untagged.
    """
    if not (chosen.tagged and rejected.tagged):
        return None
    return PreferencePair(
        id=candidate.id,
        kind=candidate.kind,
        task=chosen.task,
        user_id=chosen.user_id,
        prompt=chosen.prompt,
        chosen=format_response(chosen.tagged, chosen.answer),
        rejected=format_response(rejected.tagged, rejected.answer),
        margin=candidate.margin,
        rule=candidate.rule,
        chains=(chosen.id, rejected.id),
        example_id=chosen.example_id,
    )
