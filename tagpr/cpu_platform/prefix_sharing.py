"""Responses to one prompt go through the model with the prompt once: the layout of a micro-batch for :mod:`tagpr.tree_attention`.

verl computes every response with a copy of its prompt, pads all of them to the longest and makes logits of every token. In RL
with groups most of that is for nothing: a group's prompt is the same, and only the logits that predict a response's tokens are
looked at. The result is the same to rounding (``tests/unit/test_prefix_sharing.py``).
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from tagpr.tree_attention import Segment


class Layout(NamedTuple):
    """``n`` responses as one packed sequence of ``t`` tokens, and where what is predicted is found.

    ``token_ids`` and ``positions`` [t]; ``rows`` [k]: the places whose logits predict the ``k`` tokens of all responses, which
    are ``labels`` [k]; ``owners`` [k]: the response of each; ``places`` [k]: where each belongs among all tokens of the ``n``
    sequences behind each other, which in verl is the place of the token that predicts.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    rows: torch.Tensor
    labels: torch.Tensor
    owners: torch.Tensor
    places: torch.Tensor


def lay_out(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Layout:
    """Lay ``n`` responses out behind their prompts, each different prompt once.

    Args:
        prompts: token ids, none of them empty.
        responses: as many.

    Raises:
        ValueError: a prompt is empty.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt without a token predicts nothing")
    groups: dict[tuple[int, ...], list[int]] = {}
    for at, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(at)
    offsets = [0]
    for prompt, response in zip(prompts, responses, strict=True):
        offsets.append(offsets[-1] + len(prompt) + len(response))

    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    places: list[int] = []
    for prompt, members in groups.items():
        first, last = len(ids), len(ids) + len(prompt)
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        segments.append(Segment(first, last, first, first))
        for at in members:
            response = responses[at]
            if not response:
                continue
            # Nothing is predicted from a response's last token.
            start, own = len(ids), response[:-1]
            ids.extend(own)
            positions.extend(range(len(prompt), len(prompt) + len(own)))
            if own:
                segments.append(Segment(start, len(ids), first, last))
            rows.extend((last - 1, *range(start, len(ids))))
            labels.extend(response)
            owners.extend([at] * len(response))
            begin = offsets[at] + len(prompt) - 1
            places.extend(range(begin, begin + len(response)))
    return Layout(
        torch.tensor(ids),
        torch.tensor(positions),
        tuple(segments),
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(owners, dtype=torch.long),
        torch.tensor(places, dtype=torch.long),
    )


def group_size(prompts: Sequence[Sequence[int]]) -> int:
    """How many rows behind each other have the same prompt, where that is the same number everywhere; else 1."""
    sizes = {len(list(rows)) for _, rows in groupby(prompts)}
    return sizes.pop() if len(sizes) == 1 else 1


def partitions_of_groups(
    balance: Callable[..., list[list[int]]], group: int
) -> Callable[..., list[list[int]]]:
    """verl's way to share rows out among workers, with ``group`` rows behind each other kept together where that comes out even.

    Args:
        balance: verl's ``get_seqlen_balanced_partitions``: work of each row, number of workers, whether all get as many rows.
        group: rows of a prompt.

    Returns:
        The same function for groups: places of the rows of each worker.
    """

    def partitions(workloads: Any, k_partitions: int, equal_size: bool) -> list[list[int]]:
        if len(workloads) % (group * k_partitions):
            return balance(workloads, k_partitions=k_partitions, equal_size=equal_size)
        work = [float(sum(workloads[at : at + group])) for at in range(0, len(workloads), group)]
        return [
            [at * group + row for at in sorted(part) for row in range(group)]
            for part in balance(work, k_partitions=k_partitions, equal_size=equal_size)
        ]

    return partitions
