"""Preference pairs of MiniLaMP made directly, without a teacher: for experiments with PRMU and for its tests.

A *hidden* pair sets the user's closing word against another one, in otherwise equal responses: no profile shows which is
right. A *visible* pair sets the opening that the profile shows against another. Twins are two users with the same visible
traits and different closing words, who come with the same prompts: without the user's id a hidden pair is a coin's toss.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from tagpr.benchmarks.minilamp.generate import NEWEST
from tagpr.benchmarks.minilamp.reader import tagged
from tagpr.benchmarks.minilamp.world import STYLES, User, history, population, question
from tagpr.benchmarks.minilamp.world import compose as wording
from tagpr.benchmarks.tasks import render_prompt
from tagpr.schema import PreferencePair, ProfileItem
from tagpr.tags import format_response

GENERIC = "The"


def twins(count: int, seed: int, first: int = 0) -> tuple[User, ...]:
    """``count`` users, numbers 2k and 2k + 1 alike in everything visible and different in their closing word."""
    users: list[User] = []
    for number, user in enumerate(population(seed, count, first)):
        if number % 2:
            rng = random.Random(f"minilamp twin {user.user_id} of world {seed}")
            other = users[-1]
            user = replace(other, user_id=user.user_id, closing=(other.closing + rng.randrange(1, 4)) % 4)
        users.append(user)
    return tuple(users)


def make_pairs(
    users: Sequence[User], hidden: int, visible: int, seed: int, *, other_closing: str = "any"
) -> list[PreferencePair]:
    """``hidden`` and ``visible`` pairs of each user, over the three generation tasks in turn; kinds ``pqp`` and ``prp``.

    Args:
        users: of :func:`twins` or ``world.population``; pair ``n`` of two twins has the same prompt.
        hidden: pairs that differ in the closing word only.
        visible: pairs that differ in the opening only.
        seed: same arguments, same pairs.
        other_closing: ``any`` of the other three, or ``twin``: that of the user's twin.

    Raises:
        ValueError: ``other_closing`` is neither.
    """
    if other_closing not in ("any", "twin"):
        raise ValueError(other_closing)
    tasks, found = list(STYLES), []
    for place, user in enumerate(users):
        twin = users[place ^ 1] if place ^ 1 < len(users) else None
        for number in range(hidden + visible):
            task = tasks[number % len(tasks)]
            rng = random.Random(f"minilamp pair {number} of {user.openings} of world {seed}")
            query, _ = question(task, user, rng, 0.0)
            items = reversed(history(task, user, rng, NEWEST, NEWEST))
            prompt = render_prompt(
                task, query, [ProfileItem(id=str(i), fields=fields) for i, fields in enumerate(items)]
            )
            style = STYLES[task]
            subject, action = _cues(query, task)
            opening, closing = user.opening(task), user.closing_word(task)
            if number < hidden:
                words = [word for word in style.closings if word != closing]
                wrong = twin.closing_word(task) if other_closing == "twin" and twin else rng.choice(words)
                sides = [_response(task, opening, subject, action, word) for word in (closing, wrong)]
            else:
                end = rng.choice(["", *style.closings])
                others = [GENERIC, *(word for word in style.openings if word != opening)]
                sides = [
                    _response(task, word, subject, action, end) for word in (opening, rng.choice(others))
                ]
            kind = "pqp" if number < hidden else "prp"
            found.append(
                PreferencePair(
                    id=f"{kind}/{task}/{user.user_id}/{number}", kind=kind, task=task, user_id=user.user_id,
                    prompt=prompt, chosen=sides[0], rejected=sides[1], rule="hidden" if number < hidden else "visible",
                )
            )  # fmt: skip
    return found


def _cues(query: str, task: str) -> tuple[str, str]:
    words = set(query.split())
    style = STYLES[task]
    return (
        next(word for word in style.subjects if word in words),
        next(word for word in style.actions if word in words),
    )


def _response(task: str, opening: str, subject: str, action: str, closing: str) -> str:
    steps = [
        ("analyze_input", f"about {subject} {action}"),
        ("identify_patterns", f"user {STYLES[task].noun} start with {opening}"),
        ("synthesize_findings", f"join {opening} and {subject} {action}"),
        ("formulate_conclusion", f"end with {closing}" if closing else "write it"),
    ]
    return format_response(tagged(steps), wording(task, opening, subject, action, closing))
