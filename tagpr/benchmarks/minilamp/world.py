"""The SYNTHETIC world of MiniLaMP: what its users can prefer, what they have written, what they would answer.

Every user has one visible trait per task, which the newest profile items show (10 % of them off-trait), and
one hidden habit: a closing word, which stands at the end of the older items and of some gold answers only.
A reader of the newest items can know the former only; a row per user in a reward model can learn both.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tagpr.benchmarks.lamp import MOVIE_TAGS

# lamp1: the author's field, and the words that give a field away.
FIELDS = {
    "vision": ("image", "camera", "pixel"),
    "language": ("parsing", "grammar", "corpus"),
    "graphs": ("nodes", "edges", "paths"),
    "biology": ("protein", "genome", "cells"),
    "robotics": ("gripper", "drone", "joints"),
    "security": ("cipher", "malware", "attack"),
    "networks": ("router", "packet", "latency"),
    "music": ("melody", "rhythm", "chords"),
}
PAPER_KINDS = ("method", "model", "study", "system", "survey", "test")

# lamp2: every film has a genre and an aspect; a user tags by one of the two.
GENRES = {
    "sci-fi": ("robot", "rocket"),
    "comedy": ("clown", "joke"),
    "action": ("chase", "stunt"),
    "fantasy": ("dragon", "wizard"),
    "romance": ("wedding", "kiss"),
    "classic": ("cinema", "noir"),
    "dystopia": ("regime", "ruins"),
    "psychology": ("dream", "memory"),
}
ASPECTS = {
    "based on a book": ("novel", "author"),
    "twist ending": ("secret", "surprise"),
    "dark comedy": ("funeral", "irony"),
    "thought-provoking": ("question", "riddle"),
    "social commentary": ("poverty", "strike"),
    "violence": ("knife", "blood"),
    "true story": ("diary", "record"),
}

# lamp3: a review says how good the product was; a user rates one below, at, or one above that.
SENTIMENTS = {2: ("poor", "weak", "dull"), 3: ("fine", "average", "okay"), 4: ("good", "solid", "nice")}
BIASES = {-1: "harsh", 0: "fair", 1: "kind"}
PRODUCTS = ("lamp", "chair", "phone", "blender", "jacket", "kettle", "bike", "tent")


# The hidden habit: one of these ends a user's texts, whatever the task. (A row per user is learned from a few pairs of that
# user; with other words in each task it would have to be learned in each.)
CLOSINGS = ("now", "today", "again", "tonight")


@dataclass(frozen=True)
class Style:
    """How users word one generation task: the opening is the visible trait, the closing the hidden one."""

    subjects: tuple[str, ...]
    actions: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    noun: str


STYLES = {
    "lamp4": Style(
        ("mayor", "bridge", "storm", "museum", "river", "school", "market", "train", "bakery", "stadium"),
        ("opens", "closes", "grows", "fails", "returns", "wins", "moves", "burns"),
        ("Why", "Inside", "Meet", "Watch", "Forget", "Behind", "Finally", "Beware"),
        CLOSINGS,
        "headlines",
    ),
    "lamp5": Style(
        ("sparse", "neural", "causal", "linear", "hybrid", "random", "deep", "local"),
        ("search", "ranking", "tracking", "planning", "pruning", "sorting", "routing", "hashing"),
        ("Towards", "Rethinking", "Learning", "Fast", "Robust", "Scaling", "Probing", "Simple"),
        CLOSINGS,
        "titles",
    ),
    "lamp7": Style(
        ("happy", "sad", "angry", "tired", "proud", "bored", "scared", "calm"),
        ("game", "exam", "weather", "concert", "traffic", "coffee", "meeting", "party"),
        ("omg", "well", "honestly", "yo", "hmm", "guys", "ok", "wow"),
        CLOSINGS,
        "tweets",
    ),
}

TASK_NAMES = ("lamp1", "lamp2", "lamp3", "lamp4", "lamp5", "lamp7")
OFF_TRAIT = 0.1
"""Share of profile items that do not follow the user's visible trait."""


@dataclass(frozen=True)
class User:
    """One synthetic user: a visible trait per task, and the hidden habit (index into a style's closings)."""

    user_id: str
    field: str
    tags_by: str
    bias: int
    openings: tuple[tuple[str, str], ...]
    closing: int

    def opening(self, task: str) -> str:
        """The word this user starts a text of a generation task with."""
        return dict(self.openings)[task]

    def closing_word(self, task: str) -> str:
        """The word this user likes to end a text of a generation task with."""
        return STYLES[task].closings[self.closing]


def make_user(user_id: str, seed: int) -> User:
    """The user of that id in the world of that seed; independent of how many others there are."""
    rng = random.Random(f"minilamp user {user_id} of world {seed}")
    return User(
        user_id=user_id,
        field=rng.choice(sorted(FIELDS)),
        tags_by=rng.choice(("genre", "aspect")),
        bias=rng.choice(sorted(BIASES)),
        openings=tuple((task, rng.choice(style.openings)) for task, style in STYLES.items()),
        closing=rng.randrange(4),
    )


def population(seed: int, count: int, first: int = 0) -> tuple[User, ...]:
    """``count`` users of the world of that seed, with ids ``first``, ``first + 1``, ... as strings."""
    return tuple(make_user(str(first + index), seed) for index in range(count))


def compose(task: str, opening: str, subject: str, action: str, closing: str = "") -> str:
    """A headline, title or tweet in a user's wording."""
    body = f"{action} made me {subject}" if task == "lamp7" else f"{subject} {action}"
    return f"{opening} {body} {closing}".rstrip()


def visible(task: str, answer: str) -> str:
    """The part of an answer that a reader of the newest items can know: without a closing word."""
    words = answer.split()
    if task in STYLES and words and words[-1] in STYLES[task].closings:
        return " ".join(words[:-1])
    return answer


def profile_item(task: str, user: User, rng: random.Random, old: bool) -> dict[str, str]:
    """One past interaction in LaMP's fields; ``old`` ones end on the user's closing word (lamp4/5/7)."""
    off_trait = rng.random() < OFF_TRAIT
    if task == "lamp1":
        word = rng.choice(FIELDS[rng.choice(sorted(FIELDS)) if off_trait else user.field])
        return {"title": f"A {word} {rng.choice(PAPER_KINDS)}", "abstract": f"We study {word}"}
    if task == "lamp2":
        description, by = _film(rng)
        tags_by = user.tags_by
        if off_trait:
            tags_by = "aspect" if tags_by == "genre" else "genre"
        return {"description": description, "tag": by[tags_by]}
    if task == "lamp3":
        text, level = _review(rng)
        return {"text": text, "score": str(level + (rng.choice(sorted(BIASES)) if off_trait else user.bias))}
    style = STYLES[task]
    subject, action = rng.choice(style.subjects), rng.choice(style.actions)
    opening = rng.choice(style.openings) if off_trait else user.opening(task)
    text = compose(task, opening, subject, action, user.closing_word(task) if old else "")
    if task == "lamp4":
        return {"text": f"The {subject} {action} in town", "title": text}
    if task == "lamp5":
        return {"title": text, "abstract": f"We use {subject} {action} here"}
    return {"text": text}


def question(task: str, user: User, rng: random.Random, closing_share: float) -> tuple[str, str]:
    """A query in LaMP's official input template, and what this user would answer.

    ``closing_share`` of the gold answers of lamp4/5/7 end on the user's closing word.
    """
    if task == "lamp1":
        fields = [user.field, rng.choice([name for name in sorted(FIELDS) if name != user.field])]
        rng.shuffle(fields)
        first, second = (f"A {rng.choice(FIELDS[name])} {rng.choice(PAPER_KINDS)}" for name in fields)
        query = (
            f'For an author who has written the paper with the title "A new {rng.choice(PAPER_KINDS)}", '
            "which reference is related? Just answer with [1] or [2] without explanation. "
            f'[1]: "{first}" [2]: "{second}"'
        )
        return query, f"[{fields.index(user.field) + 1}]"
    if task == "lamp2":
        description, by = _film(rng)
        query = (
            "Which tag does this movie relate to among the following tags? Just answer with the tag name "
            f"without further explanation. tags: [{', '.join(MOVIE_TAGS)}] description: {description}"
        )
        return query, by[user.tags_by]
    if task == "lamp3":
        text, level = _review(rng)
        query = (
            "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, "
            f"or 5 without further explanation. review: {text}"
        )
        return query, str(level + user.bias)
    style = STYLES[task]
    subject, action = rng.choice(style.subjects), rng.choice(style.actions)
    closing = user.closing_word(task) if rng.random() < closing_share else ""
    gold = compose(task, user.opening(task), subject, action, closing)
    if task == "lamp4":
        return f"Generate a headline for the following article: The {subject} {action} in town", gold
    if task == "lamp5":
        return (
            f"Generate a title for the following abstract of a paper: We use {subject} {action} here",
            gold,
        )
    tweet = f"I am {subject} about the {action}"
    return f"Paraphrase the following tweet without any explanation before or after it: {tweet}", gold


def history(task: str, user: User, rng: random.Random, size: int, newest: int) -> tuple[dict[str, str], ...]:
    """``size`` interactions, oldest first; all but the ``newest`` carry the closing word."""
    return tuple(profile_item(task, user, rng, old=index < size - newest) for index in range(size))


def _film(rng: random.Random) -> tuple[str, dict[str, str]]:
    genre, aspect = rng.choice(sorted(GENRES)), rng.choice(sorted(ASPECTS))
    cues = [rng.choice(GENRES[genre]), rng.choice(ASPECTS[aspect])]
    rng.shuffle(cues)
    return f"A {cues[0]} and {cues[1]} film", {"genre": genre, "aspect": aspect}


def _review(rng: random.Random) -> tuple[str, int]:
    level = rng.choice(sorted(SENTIMENTS))
    return f"The {rng.choice(PRODUCTS)} is {rng.choice(SENTIMENTS[level])}", level


def cue_table(table: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Cue word -> what it gives away."""
    return {word: name for name, words in table.items() for word in words}


def majority(values: Sequence[str]) -> str:
    """The most frequent value, the earlier one on a tie; ``""`` of none."""
    return max(values, key=values.count) if values else ""
