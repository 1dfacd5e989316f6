"""Prompt files: text with ``{placeholders}``, filled once, with untrusted values kept inside their fences."""

import hashlib
import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.fences import disarm
from tagpr.errors import ConfigError

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
FENCE = re.compile(r"<([a-z_]+)>\s*\{[a-z_]+\}\s*</\1>")
PACKAGE_PREFIX = "pkg://"


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt's wording. ``version`` is a hash of the text: another wording is another unit of work."""

    text: str
    version: str

    @classmethod
    def load(cls, key: str, reference: str, fields: frozenset[str]) -> "PromptTemplate":
        """Read ``reference``: a path, or ``pkg://package/path`` for a file that is shipped in a package.

        Raises:
            ConfigError: the file cannot be read, or its placeholders are not exactly ``fields``.
        """
        try:
            if reference.startswith(PACKAGE_PREFIX):
                package, _, inside = reference[len(PACKAGE_PREFIX) :].partition("/")
                text = importlib.resources.files(package).joinpath(inside).read_text(encoding="utf-8")
            else:
                text = Path(reference).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ModuleNotFoundError) as error:
            raise ConfigError(
                f"{key}={reference}: cannot be read ({type(error).__name__}). Point it to a UTF-8 prompt file."
            ) from error
        found = PLACEHOLDER.findall(text)
        if set(found) != fields or len(found) != len(fields):
            wanted = ", ".join("{" + field + "}" for field in sorted(fields))
            raise ConfigError(
                f"{key}={reference}: its placeholders are {sorted(found)}. Use each of {wanted} once, and no other."
            )
        return cls(text=text.strip(), version=hashlib.sha256(text.encode()).hexdigest()[:16])

    def render(self, **values: str) -> str:
        """Fill every placeholder in one pass, so that a value which looks like a placeholder stays as it is.

        Where a placeholder stands between ``<name>`` and ``</name>``, whatever looks like these fences inside a value loses
        its bracket: text of a user or a model cannot close its own fence.
        """
        fences = FENCE.findall(self.text)
        values = {field: disarm(value, fences) for field, value in values.items()}
        return PLACEHOLDER.sub(lambda match: values[match.group(1)], self.text)

    def extract(self, prompt: str) -> dict[str, str] | None:
        """The inverse of :meth:`render`: the values in ``prompt``, or None where it is not one of this template's.

        Only the simulated endpoint needs it: a real judge reads the prompt itself.
        """
        parts = PLACEHOLDER.split(self.text)
        literals, fields = parts[0::2], parts[1::2]
        if not (prompt.startswith(literals[0]) and prompt.endswith(literals[-1])):
            return None
        values: dict[str, str] = {}
        position = len(literals[0])
        end = len(prompt) - len(literals[-1])
        for field, literal in zip(fields[:-1], literals[1:-1], strict=True):
            found = prompt.find(literal, position, end)
            if found < 0:
                return None
            values[field] = prompt[position:found]
            position = found + len(literal)
        values[fields[-1]] = prompt[position:end]
        return values
