"""R_tag: is the chain made of well-formed tags of the vocabulary? (eq. 9, S26)."""

from collections.abc import Iterable

from tagpr.tags import check_tags


def tag_reward(
    reasoning: str, minimum: int = 3, vocabulary: Iterable[str] | None = None
) -> tuple[float, str]:
    """R_tag in {0, -1} and the name of the first problem, empty if there is none.

    ``vocabulary``: the tags to go by, those in use where none is given (S41). A response whose chain cannot
    be told from its answer has an empty ``reasoning``, and gets -1 for having too few segments.

    Raises:
        ConfigError: the vocabulary is not a list of distinct tag names.
    """
    problem = check_tags(reasoning, minimum, vocabulary)
    return (-1.0 if problem else 0.0), problem
