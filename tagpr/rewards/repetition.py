"""R_rep: does the response repeat itself? (eq. 8, S25)."""

from collections.abc import Sequence

from tagpr.errors import ConfigError


def repetition_reward(token_ids: Sequence[int], n: int = 4, delta: float = 1e-6) -> float:
    """R_rep = -(|T| - |U|) / (|T| + delta) in (-1, 0]: the share of n-grams that occurred before, negated.

    T is the multiset and U the set of n-grams of the policy's own tokens, chain and answer together. A
    response of fewer than ``n`` tokens has none and gets 0. ``delta`` is unstated in the paper.

    Raises:
        ConfigError: ``n`` < 1 or ``delta`` <= 0.
    """
    if n < 1 or not 0.0 < delta < 1.0:
        raise ConfigError(f"repetition: n={n}, delta={delta}. Use n >= 1 and a delta between 0 and 1.")
    total = len(token_ids) - n + 1
    if total <= 0:
        return 0.0
    distinct = len(set(zip(*(token_ids[start:] for start in range(n)), strict=False)))
    return -((total - distinct) / (total + delta)) if distinct < total else 0.0
