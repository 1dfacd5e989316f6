"""Counting tokens where the model's own tokenizer is not at hand."""

import math

BYTES_PER_TOKEN = 4.0


def approximate_tokens(text: str) -> int:
    """Tokens of a text at four UTF-8 bytes a token: a little too many for plain English, too few for code or rare words."""
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)
