"""What can go wrong, by who can mend it.

Every message is one line of the form ``<key or file>: <what is wrong>. <what to do>.``; command-line entry points
print it without a traceback and exit with the error's ``status`` (``tagpr.configuration.main``): 2, which no supervisor answers
with another attempt, unless the class says otherwise.
"""

from typing import ClassVar


class TagPRError(Exception):
    """Root of every error that this project raises on purpose."""

    status: ClassVar[int] = 2


class ConfigError(TagPRError, ValueError):
    """A setting is missing, unknown, or contradicts another one."""


class DataError(TagPRError, ValueError):
    """An input file is missing, malformed, or inconsistent with another file."""


class StageError(TagPRError, RuntimeError):
    """A stage cannot run: something another stage makes is missing, or its own outputs contradict its settings."""


class RewardServerError(TagPRError, RuntimeError):
    """The reward server did not give a score that can be trusted; never stands for a reward of 0.0."""


class RunFault(StageError):
    """Something that a run depends on went away, got stuck or is full: the same command may well go on, later."""

    # sysexits' EX_TEMPFAIL
    status = 75
