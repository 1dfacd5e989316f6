"""Which pairs are in a batch together, and which of them go through the model together (S18)."""

import random
from collections.abc import Iterator, Sequence

from tagpr.prmu.packing import EncodedPair, prompt_groups

# Batches are cut from this many batches' worth of shuffled pairs sorted by length.
BUCKET_BATCHES = 16


def bucketed_batches(
    pairs: Sequence[EncodedPair], batch_size: int, rng: random.Random, by_prompt: bool = False
) -> list[list[EncodedPair]]:
    """Every pair once, in random batches of pairs of similar length (less padding).

    With ``by_prompt``, pairs of one prompt stand next to each other, so that a batch has almost all of them: what they share is
    computed once, and a response that is in several pairs is not met again in each batch of an epoch (Ouyang et al., 2022,
    section 3.5, train on all comparisons of a prompt at once for the same two reasons).
    """
    groups = (
        [[pairs[at] for at in group] for group in prompt_groups(pairs)] if by_prompt else [[p] for p in pairs]
    )
    rng.shuffle(groups)
    batches = []
    bucket: list[list[EncodedPair]] = []
    size = 0
    for group in [*groups, []]:
        bucket.append(group)
        size += len(group)
        if size >= batch_size * BUCKET_BATCHES or not group:
            bucket.sort(key=lambda members: max((pair.length for pair in members), default=0))
            row = [pair for members in bucket for pair in members]
            batches += [row[first : first + batch_size] for first in range(0, len(row), batch_size)]
            bucket, size = [], 0
    rng.shuffle(batches)
    return batches


def drop_ids(
    pairs: Sequence[EncodedPair], share: float, unknown_row: int, rng: random.Random, by_prompt: bool = False
) -> list[EncodedPair]:
    """A share of the pairs as the unknown user's (S17); with ``by_prompt`` a prompt's pairs together, for they share the row."""
    chosen: dict[tuple[int, ...] | int, bool] = {}
    found = []
    for at, pair in enumerate(pairs):
        key = pair.prompt if by_prompt else at
        if key not in chosen:
            chosen[key] = rng.random() < share
        found.append(pair.with_row(unknown_row) if chosen[key] else pair)
    return found


def share_of(batch: Sequence[EncodedPair], rank: int, world: int) -> Sequence[EncodedPair]:
    """What process ``rank`` of ``world`` takes of a batch: neighbours, so that few prompts are divided."""
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


def micro_batches(
    batch: Sequence[EncodedPair], size: int, by_prompt: bool = False
) -> Iterator[Sequence[EncodedPair]]:
    """At most ``size`` pairs each, in order; with ``by_prompt`` a prompt's pairs are divided only where they are more than that."""
    first = 0
    while first < len(batch):
        last = min(first + size, len(batch))
        if by_prompt and last < len(batch):
            cut = last
            while cut > first and batch[cut - 1].prompt == batch[cut].prompt:
                cut -= 1
            last = cut if cut > first else last
        yield batch[first:last]
        first = last
