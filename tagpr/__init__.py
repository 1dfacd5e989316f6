"""TagPR: teach a language model to reason about one user in explicit, tagged steps."""

__version__ = "0.1.0"
