"""R_f: can the response be read at all? (eq. 7, S24)."""

from tagpr.tags import Response


def format_reward(response: Response) -> float:
    """R_f in {0, 1}: 1 if ``tags.split_response`` found no problem; its name is the failure otherwise."""
    return 0.0 if response.problem else 1.0
